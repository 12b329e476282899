"""What every adapter's layer is: an nn.Linear in another's place, with a low-rank update that merges and unmerges."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from peft_kernels import kinds
from peft_kernels.backend import BACKENDS, Choice, resolve
from peft_kernels.checks import DTYPES, check_choice, check_dense, check_probability, check_scale
from peft_kernels.layers.group import LinearGroup, Projection
from peft_kernels.ops.lowrank_linear import DESIGNS, DROPOUT_PLACES, lowrank_linear
from peft_kernels.ops.reconstruct import reconstruct

HOOKS_OFF = "take them off by accelerate.hooks.remove_hook_from_submodules(model) first, and dispatch it again after"
DENSE_FIRST = "dequantize the model first, or adapt it by peft and peft_kernels.integrations.peft.accelerate"


class AdaptedLinear(nn.Linear):
    """Takes the place of `linear` and keeps its `weight` and `bias`, the same Parameters under the same keys.

    It runs `linear`'s hooks, too. A subclass says by `factors` what is added to the weight, and by `adapted_bias` what
    the bias becomes, if anything. While merged, `weight` and `bias` (in the state dict too) hold the sums.

    recompute: as in `lowrank_linear`
    group: the LinearGroup that it is a member of, and its number there; None for a layer that runs by itself
    """

    recompute = True
    group: tuple[LinearGroup, int] | None = None
    why_alone = ""

    def __init__(
        self,
        linear: nn.Linear,
        *,
        scale: float = 1.0,
        dropout_p: float = 0.0,
        dropout_on: str = "input",
        backend: str = "auto",
        design: str | None = None,
        freeze: bool = True,
    ):
        check_linear_module(linear)
        check_choice("dropout_on", dropout_on, DROPOUT_PLACES)
        check_choice("backend", backend, ("auto", *BACKENDS))
        check_choice("design", design, DESIGNS)
        check_probability("dropout_p", dropout_p)
        check_scale(scale, linear.weight)
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        for name, hooks in vars(linear).items():  # one dictionary for both: handles go on removing
            if name.startswith(("_forward_", "_backward_", "_is_full_backward_")):
                setattr(self, name, hooks)
        if freeze:
            linear.requires_grad_(False)
        self.dropout_p, self.dropout_on = dropout_p, dropout_on
        self.backend, self.design = backend, design
        self._original: tuple[Tensor, Tensor | None] | None = None
        self.set_scale(scale)
        self.train(linear.training)

    def train(self, mode: bool = True):
        """As any module's. Raises ValueError where hooks of accelerate offload what trains: no gradient arrives."""
        if mode and "_hf_hook" in vars(self) and any(p.is_meta and p.requires_grad for p in self.parameters()):
            raise ValueError(f"train: the layer is offloaded by hooks of accelerate and cannot learn; {HOOKS_OFF}")
        return super().train(mode)

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(down, up, core) of the update, as `lowrank_linear` takes them."""
        raise NotImplementedError("a subclass says what its update is")  # nn.Module is no abstract base class

    def updated_weight(self) -> Tensor:
        """weight + scale · B core A in the weight's dtype, rounded once; differentiable in the factors."""
        return reconstruct(*self.factors(), scale=self.scale, base=self.base_weight, backend=self.backend)

    def adapted_bias(self) -> Tensor | None:
        """The bias with the update; None if it stays as it is."""
        return None

    @property
    def base_weight(self) -> Tensor:
        """The Parameter `weight`, under which name a `WeightRead` shows the sum; merged it is the sum itself."""
        if "weight" in self._parameters:
            return self._parameters["weight"]
        return self.weight  # parametrised

    @property
    def base_bias(self) -> Tensor | None:
        if "bias" in self._parameters:
            return self._parameters["bias"]
        return self.bias

    def reset_parameters(self) -> None:
        """As nn.Linear's, weight and bias too; what frameworks call after building a model on the meta device."""
        if hasattr(self, "backend"):  # nn.Linear's constructor calls it before there is an adapter
            super().reset_parameters()
            self.reset_adapter()

    def reset_adapter(self) -> None:
        """Start what is trained afresh."""

    def set_scale(self, scale: float) -> None:
        """Change the update's factor; not while merged. In place: a captured CUDA graph sees the new value."""
        check_scale(scale, self.base_weight)
        self._check_unmerged("set_scale")
        self._scale = float(scale)
        if "scale" in self._buffers:
            self.scale.fill_(self._scale)
        else:
            self.register_buffer("scale", self._scale_buffer(), persistent=False)

    @property
    def merged(self) -> bool:
        return self._original is not None

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """x: (..., in_features), hidden: None or (..., I·R) from `lowrank_hidden` -> (..., out_features)"""
        if self._original is not None:
            return F.linear(x, self.base_weight, self.base_bias)
        if self.group is not None and hidden is None:
            group, member = self.group
            if (y := group.get(member, self, x)) is not None:
                return y
        return self._adapted(x, self.factors(), hidden)

    def reads(self) -> dict[str, Tensor | None]:
        """The parameters that the output depends on, by name."""
        return self._parameters

    def projection(self, x: Tensor, factors: tuple[Tensor, Tensor, Tensor | None] | None = None) -> Projection | None:
        """What a group's call on x takes; None for a layer that has to run by itself.  factors: if they are known"""
        own = self._parameters
        if self._original is not None or "weight" not in own or "bias" not in own:
            return None
        if type(own["weight"]) is not nn.Parameter:
            return None
        if factors is None and "down" in own and "up" in own:  # past nn.Module's slow way to them
            down, up, core = own["down"], own["up"], own["core"] if "core" in own else None  # noqa: SIM401 (a call)
        else:
            down, up, core = self.factors() if factors is None else factors
        place = self.dropout_on
        if core is not None:
            core = core.view(core.shape[2:])
            place = "rank" if place == "core" and core.dim() == 1 else place  # a diagonal core lets masks through
        options = self.dropout_p, place, self.training, self.backend
        scale = self._buffers["scale"]
        return tuple.__new__(Projection, (own["weight"], own["bias"], down, up, core, scale, options, None))

    def group_kind(self) -> tuple[tuple | None, str]:
        """As layers/group.py's Member: one call takes blockless updates of one rank and dropout."""
        return None, "by itself: no call takes such a layer with others"

    def _group_kind(self, rank: int, blocks: tuple[int, int], core: str | None) -> tuple[tuple | None, str]:
        if blocks != (1, 1) or self.design is not None:
            return None, "by itself: its weight is adapted in blocks, or a design was asked for"
        if core == "dense" and self.dropout_p and self.dropout_on == "core":
            return None, "by itself: a dense core with dropout behind it"
        options = self.dropout_p, self.dropout_on, self.backend
        return (self.in_features, rank, core, *options, self.weight.dtype), ""

    def _adapted(self, x: Tensor, factors: tuple[Tensor | None, ...], hidden: Tensor | None = None) -> Tensor:
        own = self._parameters  # past nn.Module's slow way to them, unless they are parametrised
        weight, bias = (own["weight"], own["bias"]) if "weight" in own and "bias" in own else (self.weight, self.bias)
        down, up, core = factors
        return lowrank_linear(
            x,
            weight,
            bias,
            down,
            up,
            core,
            scale=self._buffers["scale"],
            dropout_p=self.dropout_p,
            dropout_on=self.dropout_on,
            training=self.training,
            hidden=hidden,
            backend=self.backend,
            design=self.design,
            recompute=self.recompute,
        )

    def _wide_factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        dtype = torch.promote_types(self.base_weight.dtype, torch.float32)
        return tuple(None if t is None else t.to(dtype) for t in self.factors())

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scale · B core A as a float32 (float64 for a float64 weight) tensor (out_features, in_features)."""
        return reconstruct(*self._wide_factors(), scale=self.scale, backend=self.backend)

    @torch.no_grad()
    def lora_factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(A, B, b): the same update as stock LoRA, weight + B A and bias + b; A (r, in), B (out, r), b (out,) or None.

        float32 (float64 for a float64 weight); scale and core are in B, or with several input blocks in A.
        """
        self._check_unmerged("lora_factors")
        down, up, core = self._wide_factors()
        up = up * self.scale.to(up.dtype)
        bias = self.adapted_bias()
        shift = None if bias is None or self.base_bias is None else bias - self.base_bias.to(bias.dtype)
        if core is None:
            return down, up, shift
        core = torch.diag_embed(core) if core.dim() == 3 else core
        out_blocks, in_blocks = core.shape[:2]
        if out_blocks == 1:
            return torch.cat([part @ down for part in core[0]], dim=1), up, shift
        left = torch.cat([torch.cat([up @ part for part in row], dim=1) for row in core])
        return torch.block_diag(*[down] * in_blocks), left, shift

    @torch.no_grad()
    def merge(self, keep_on: torch.device | str | None = None) -> None:
        """Add the update to `weight`, summed in float32 and rounded once; the original is kept for `unmerge`.

        keep_on: the device of the kept original; None is the weight's own, "cpu" frees that memory.
        """
        self._check_unmerged("merge")
        check_keep_on(keep_on)
        check_dense("merge: weight", self.base_weight, DENSE_FIRST)
        merged, bias = self.updated_weight(), self.adapted_bias()
        kept = [
            None if t is None else t.detach().to(keep_on or t.device, copy=True)
            for t in (self.base_weight, None if bias is None else self.base_bias)
        ]
        self.base_weight.copy_(merged)
        if bias is not None:
            self.base_bias.copy_(bias)
        self._original, self._merged_version = tuple(kept), self._changes()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the original bits of `weight` and `bias`. Raises ValueError if they changed since `merge`."""
        if self._original is None:
            raise ValueError("unmerge: the layer is not merged")
        if self._changes() != self._merged_version:
            raise ValueError("unmerge: weight or bias was changed after merge, and would be lost")
        weight, bias = self._original
        self.base_weight.copy_(weight)
        if bias is not None:
            self.base_bias.copy_(bias)
        self._original = None

    def frozen(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias without the update, merged or not."""
        weight, bias = self._original or (self.base_weight, None)
        return weight.detach(), self.base_bias if bias is None else bias

    def backend_choice(self) -> Choice:
        """The backend that the next forward on the weight's device takes, and the reason."""
        if self.merged:
            return Choice("torch", "merged: a plain linear")
        *_, core = factors = self.factors()
        kind = kinds.linear(self.in_features, self.out_features, self.training and self.dropout_p > 0)
        blocks = (1, 1) if core is None else core.shape[:2]
        tensors = (self.base_weight, self.base_bias, *factors)
        return resolve("lowrank_linear", tensors, self.backend, kind=kind, rank=factors[0].shape[0], blocks=blocks)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), *self._describe()]
        if self.dropout_p:
            parts.append(f"dropout={self.dropout_p:g} on {self.dropout_on}")
        parts.append(f"backend={self.backend}")
        return ", ".join(parts + ["merged"] * self.merged)

    def _describe(self) -> list[str]:
        return [f"scale={self._scale:g}"]

    def _check_unmerged(self, action: str) -> None:
        if getattr(self, "_original", None) is not None:
            raise ValueError(f"{action}: the layer is merged; unmerge it first")

    def _scale_buffer(self) -> Tensor:
        dtype = torch.promote_types(self.base_weight.dtype, torch.float32)
        return torch.full((), self._scale, dtype=dtype, device=self.base_weight.device)

    def _apply(self, fn, recurse: bool = True):
        """Moves and casts as any module does, but leaves the scale in float32 (float64 with a float64 weight)."""
        super()._apply(fn, recurse)
        self.scale = self._scale_buffer()
        if self.merged:
            self._merged_version = self._changes()
        return self

    def __setstate__(self, state: dict) -> None:
        """A copy's or pickle's tensors count their changes from zero."""
        super().__setstate__(state)
        if self.merged:
            self._merged_version = self._changes()

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        if self.scale.device != self.base_weight.device:  # assign=True brings a meta model to a real device
            self.scale = self._scale_buffer()

    def _changes(self) -> list[int | None]:
        """Counts changes in place of weight and bias (tensors made in inference mode count none)."""
        return [None if t is None or t.is_inference() else t._version for t in (self.base_weight, self.base_bias)]


def check_linear_module(linear: object) -> None:
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
    if isinstance(linear, AdaptedLinear):
        raise ValueError(f"linear: is a {type(linear).__name__} already; its adapter would be lost")
    if "_hf_hook" in vars(linear):
        raise ValueError(f"linear: has a hook of accelerate, which calls the forward that it found; {HOOKS_OFF}")
    if isinstance(linear._parameters.get("weight"), Tensor):
        check_dense("linear: weight", linear.weight, DENSE_FIRST)
    if getattr(linear.forward, "__func__", None) is not nn.Linear.forward:  # hooks, taken off, leave it on the instance
        raise TypeError(f"linear: expected the forward of nn.Linear, {type(linear).__name__} has its own")
    weight = linear._parameters.get("weight")
    if weight is None or is_lazy(weight):
        raise TypeError(f"linear: expected a plain weight Parameter, {type(linear).__name__} has none")
    if weight.dtype not in DTYPES:
        raise TypeError(f"linear: expected a floating-point weight, got {weight.dtype}; use lowrank_linear for it")


def check_keep_on(keep_on: torch.device | str | None) -> None:
    try:
        device = None if keep_on is None else torch.empty(0, device=keep_on).device
    except (RuntimeError, AssertionError, TypeError) as error:  # each kind of device has its own
        raise ValueError(f"keep_on: expected a device of this machine or None, got {keep_on!r}") from error
    if device is not None and device.type == "meta":
        raise ValueError("keep_on: the meta device holds no values, and unmerge needs the originals")


def adapter_dtype_for(linear: nn.Linear, asked: torch.dtype | None) -> torch.dtype:
    dtype = asked or linear.weight.dtype
    if dtype != linear.weight.dtype and (dtype != torch.float32 or linear.weight.dtype == torch.float64):
        raise TypeError(f"adapter_dtype: expected float32, under half precision, or {linear.weight.dtype}, got {dtype}")
    return dtype


def check_blocks(name: str, blocks: object, features: int) -> None:
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1 or features % blocks:
        raise ValueError(f"{name}: expected a divisor of {features}, got {blocks!r}")
