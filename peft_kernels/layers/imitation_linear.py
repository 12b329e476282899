"""MoIL's layer: a live weight that trains, a teacher that follows, a student that adapters make of the frozen one.

    live      y = x Wᵀ + b                                          in training
    teacher   y = x Ŵᵀ + b̂
    student   y = (W0 + B A)(x + B_d(A_d x + a_d) + c_d) + b0       in evaluation; the transform is its layer's

With placement "output" the transform acts on the result instead. Source: docs/method.md, section 3.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_kernels import kinds
from peft_kernels.autocast import autocast_off, linear_dtype
from peft_kernels.backend import Choice, resolve
from peft_kernels.checks import check_choice, check_integer
from peft_kernels.imitation import Transform, hybrid_factors
from peft_kernels.imitation.factors import PLACEMENTS
from peft_kernels.layers.adapted_linear import AdaptedLinear, check_blocks, check_linear_module
from peft_kernels.layers.group import Projection
from peft_kernels.layers.per_pass import PerPass
from peft_kernels.ops.lowrank_linear import lowrank_linear

INITS = ("default", "released")
MODES = ("student", "live", "teacher")


def _kept_wide(fn, narrow: tuple[Tensor | None, ...] = ()):
    """`fn` of Module._apply, which moves and casts, but to no less than float32; the tensors of `narrow` are free."""

    def moved(t: Tensor) -> Tensor:
        new = fn(t)
        wide = torch.promote_types(new.dtype, torch.float32)
        return new if new.dtype == wide or any(t is other for other in narrow) else t.to(new.device, wide)

    return moved


class LinearTransform(nn.Module):
    """x + B_d(A_d x + a_d) + c_d, shared by the projections that read one tensor. It stays in float32.

    features: d;  rank: r_d;  down (r_d, d), down_bias (r_d,), up (d, r_d), up_bias (d,)
    bias: False for projections without biases, which could not take up what a_d and c_d add: x + B_d A_d x
    init: "default": Xavier down, the rest zero: the identity | "released": down and up of standard deviation 0.02
    """

    def __init__(self, features: int, rank: int, *, bias: bool = True, init: str = "default", dtype=None, device=None):
        super().__init__()
        check_integer("transform_rank", rank)
        check_choice("init", init, INITS)
        factory = {"dtype": dtype, "device": device}
        self.down = nn.Parameter(torch.empty(rank, features, **factory))
        self.down_bias = nn.Parameter(torch.empty(rank, **factory)) if bias else None
        self.up = nn.Parameter(torch.empty(features, rank, **factory))
        self.up_bias = nn.Parameter(torch.empty(features, **factory)) if bias else None
        self.init, self.shared = init, PerPass()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.up_bias is not None:
            nn.init.zeros_(self.down_bias)
            nn.init.zeros_(self.up_bias)
        if self.init == "default":
            nn.init.xavier_uniform_(self.down)
            nn.init.zeros_(self.up)
        else:
            nn.init.normal_(self.down, std=0.02)
            nn.init.normal_(self.up, std=0.02)

    def tensors(self) -> Transform:
        if self.up_bias is None:
            return Transform(self.down, self.down.new_zeros(len(self.down)), self.up, self.up.new_zeros(len(self.up)))
        return Transform(self.down, self.down_bias, self.up, self.up_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d). The adapters learn by imitation only: no gradient reaches them here."""
        tensors = (self.down, self.down_bias, self.up, self.up_bias)
        down, down_bias, up, up_bias = (None if t is None else t.detach().to(linear_dtype(x)) for t in tensors)
        return x + F.linear(F.linear(x, down, down_bias), up, up_bias)

    def shared_forward(self, member: int, x: Tensor) -> Tensor:
        """The same, computed once for all members that read x in one pass."""
        return self.shared.get(member, (x, *self.parameters()), lambda: self(x))

    def _apply(self, fn, recurse: bool = True):
        return super()._apply(_kept_wide(fn), recurse)


class ImitationLinear(AdaptedLinear):
    """Takes the place of `linear`, whose weight and bias stay, frozen, as W0 and b0.

    rank: R of A (R, in) and B (out / projections, R), one pair for each projection: `down.0`, `up.0`, …; None: no pair
    transform: the LinearTransform of its layer, or None;  placement: "input" | "output", where it stands
    projections: how many are fused into the weight, one above the other
    live_weight, live_bias: trained by the task; teacher_weight, teacher_bias: their average. All of it in float32
        (float64 for a float64 weight) whatever the model's dtype: with decay 0.9996 an average never moves in bfloat16.
    mode: None (live in training, student in evaluation) | "student" | "live" | "teacher"
    device: of all that; None is `linear`'s ("meta": to know the shapes)
    """

    TRAINING_STATE = ("live_weight", "live_bias", "teacher_weight", "teacher_bias")

    def __init__(
        self,
        linear: nn.Linear,
        rank: int | None,
        transform: LinearTransform | None = None,
        *,
        placement: str = "input",
        projections: int = 1,
        backend: str = "auto",
        freeze: bool = True,
        device: torch.device | str | None = None,
    ):
        check_linear_module(linear)
        check_blocks("projections", projections, linear.out_features)
        check_choice("placement", placement, PLACEMENTS)
        if projections > 1 and placement == "output":
            raise ValueError("placement: fused projections take the transform on their input")
        if rank is not None:
            check_integer("rank", rank)
        super().__init__(linear, backend=backend, freeze=freeze)
        self.rank, self.placement, self.projections, self.mode = rank, placement, projections, None
        self._transform = (transform,)  # in a tuple: the model's module, under one name, and not this layer's too
        self._member = None if transform is None else transform.shared.join()
        wide = torch.promote_types(linear.weight.dtype, torch.float32)
        factory = {"dtype": wide, "device": device or linear.weight.device}
        for name, frozen in (("weight", linear.weight), ("bias", linear.bias)):
            live = None if frozen is None else torch.empty(frozen.shape, **factory)
            self.register_parameter(f"live_{name}", None if live is None else nn.Parameter(live))
            self.register_buffer(f"teacher_{name}", None if live is None else torch.empty_like(live))
        out = linear.out_features // projections
        pairs = range(0 if rank is None else projections)
        self.down = nn.ParameterList(nn.Parameter(torch.empty(rank, linear.in_features, **factory)) for _ in pairs)
        self.up = nn.ParameterList(nn.Parameter(torch.empty(out, rank, **factory)) for _ in pairs)
        self.reset_adapter()

    @property
    def transform(self) -> LinearTransform | None:
        return self._transform[0]

    def reset_adapter(self) -> None:
        """Start the adapters afresh, and live weight and teacher from the frozen weight."""
        for down, up in zip(self.down, self.up):
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            nn.init.zeros_(up)
        self._restart(*self.frozen())

    def restart_from_student(self) -> None:
        """Live weight and teacher become what the student is: where training goes on from a file, which holds it."""
        weight = self.frozen()[0].to(self.live_weight.dtype)
        self._restart(weight + self.delta_weight(), self.adapted_bias())

    @torch.no_grad()
    def _restart(self, weight: Tensor, bias: Tensor | None) -> None:
        for name, start in (("weight", weight), ("bias", bias)):
            for kind in ("live", "teacher") if start is not None else ():
                getattr(self, f"{kind}_{name}").copy_(start)

    def set_scale(self, scale: float) -> None:
        """Refused: the student's update has no factor."""
        if scale != 1:
            raise ValueError(f"set_scale: MoIL's update has no scale, got {scale}")
        super().set_scale(scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)"""
        if self.mode_now == "student" and not self.merged:
            return self._student(x)
        return F.linear(x, self.taken("weight"), self.taken("bias"))

    @property
    def mode_now(self) -> str:
        return self.mode or ("live" if self.training else "student")

    def taken(self, name: str) -> Tensor | None:
        """The "weight" or "bias" of the mode that is on, in the base's dtype; the student's is made anew."""
        base, mode = getattr(self, f"base_{name}"), self.mode_now
        if base is None or (mode == "student" and self.merged):
            return base
        if mode == "student":
            return (self.updated_weight() if name == "weight" else self.adapted_bias()).to(base.dtype)
        return getattr(self, f"{mode}_{name}").to(base.dtype)

    def _student(self, x: Tensor) -> Tensor:
        transform = self.transform
        if transform is not None and self.placement == "input":
            x = transform.shared_forward(self._member, x)
        grouped = None if self.group is None else self.group[0].get(self.group[1], self, x)
        if grouped is not None:
            y = grouped
        elif self.rank is None:
            y = F.linear(x, self.base_weight, self.base_bias)
        elif self.projections > 1 and self.backend_choice().name == "torch":  # one product, with the base's own bits
            dtype = linear_dtype(x)
            z = F.linear(x, torch.cat([down.detach().to(dtype) for down in self.down])).chunk(self.projections, dim=-1)
            updates = [F.linear(part, up.detach().to(dtype)) for part, up in zip(z, self.up)]
            y = F.linear(x, self.base_weight, self.base_bias) + torch.cat(updates, dim=-1)
        else:
            biases = [None] * self.projections if self.base_bias is None else self.base_bias.chunk(self.projections)
            parts = zip(self.base_weight.chunk(self.projections), biases, self.down, self.up)
            ys = [lowrank_linear(x, w, b, a.detach(), u.detach(), backend=self.backend) for w, b, a, u in parts]
            y = ys[0] if len(ys) == 1 else torch.cat(ys, dim=-1)
        if transform is not None and self.placement == "output":
            return transform(y)
        if transform is not None:
            transform.shared.needed_by(y)
        return y

    def reads(self) -> dict[str, Tensor | None]:
        factors = {"down": self.down[0], "up": self.up[0]} if self.rank is not None else {}
        return {"weight": self.base_weight, "bias": self.base_bias, **factors}

    def projection(self, x: Tensor) -> Projection | None:
        """The student's part of a group's call; its adapters take no gradient."""
        if self.mode_now != "student" or self.merged:
            return None
        options = 0.0, "input", False, self.backend
        down, up = self.down[0].detach(), self.up[0].detach()
        return Projection(self.base_weight, self.base_bias, down, up, None, self.scale, options)

    def group_kind(self) -> tuple[tuple | None, str]:
        if self.rank is None or self.projections > 1:
            return None, "by itself: it has no adapter of its own, or several"
        return (self.in_features, self.rank, self.weight.dtype, self.placement, id(self.transform)), ""

    def _hybrid(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """(F, C, b̄) of each projection."""
        wide = self.live_weight.dtype
        weight, bias = (None if t is None else t.to(wide) for t in self.frozen())
        biases = [None] * self.projections if bias is None else bias.chunk(self.projections)
        pairs = list(zip(self.down, self.up)) or [None] * self.projections
        transform = None if self.transform is None else self.transform.tensors()
        with autocast_off(weight):
            return [
                hybrid_factors(w, b, pair, transform, self.placement)
                for w, b, pair in zip(weight.chunk(self.projections), biases, pairs)
            ]

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor, None]:
        """The student as W0 + F C: C and F, of rank R + r_d, or P · R + r_d for P fused projections."""
        hybrid = self._hybrid()
        if self.projections == 1:
            left, right, _ = hybrid[0]
            return right, left, None
        rank = self.rank or 0
        own, shared = [f[:, :rank] for f, _, _ in hybrid], [f[:, rank:] for f, _, _ in hybrid]
        left = torch.cat([torch.block_diag(*own), torch.cat(shared)], dim=1)
        right = torch.cat([*(c[:rank] for _, c, _ in hybrid), hybrid[0][1][rank:]])
        return right, left, None

    @torch.no_grad()
    def adapted_bias(self) -> Tensor | None:
        return None if self.base_bias is None else torch.cat([bias for _, _, bias in self._hybrid()])

    def backend_choice(self) -> Choice:
        if self.mode_now != "student":
            return Choice("torch", f"{self.mode_now}: a plain linear")
        if self.merged or self.rank is None:
            return Choice("torch", f"{'merged' if self.merged else 'no adapter of its own'}: a plain linear")
        tensors = (self.base_weight, self.base_bias, self.down[0], self.up[0])
        kind = kinds.linear(self.in_features, self.out_features, dropout=False)
        return resolve("lowrank_linear", tensors, self.backend, rank=self.rank, kind=kind)

    def _describe(self) -> list[str]:
        parts = [f"rank={self.rank}"]
        if self.transform is not None:
            parts.append(f"transform on {self.placement}")
        return parts + [f"projections={self.projections}"] * (self.projections > 1)

    def _apply(self, fn, recurse: bool = True):
        return super()._apply(_kept_wide(fn, (self.base_weight, self.base_bias)), recurse)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """A state that brings the base alone, as a model's own checkpoint does, brings the weights to start from."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}weight" in state_dict and f"{prefix}live_weight" not in state_dict:
            self._restart(*self.frozen())


class SharedState(nn.Module):
    """What a model gets as `moil`: the layers' transforms, and how many steps were taken (int64, on the CPU)."""

    def __init__(self, transforms: Sequence[LinearTransform]):
        super().__init__()
        self.transforms = nn.ModuleList(transforms)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        """An nn.Sequential calls whatever is in it."""
        return x

    def _apply(self, fn, recurse: bool = True):
        steps = self.steps
        super()._apply(fn, recurse)
        self.steps = steps  # read at every step: on a GPU that would wait
        return self
