"""A drop-in nn.Linear with a low-rank update of its frozen weight."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from peft_kernels.backend import BACKENDS, Choice, resolve
from peft_kernels.checks import DTYPES, check_choice, check_probability, check_scale
from peft_kernels.ops.lowrank_linear import DESIGNS, DROPOUT_PLACES, lowrank_linear
from peft_kernels.ops.reconstruct import reconstruct

CORES = (None, "diagonal", "dense")
INITS = ("kaiming", "gaussian")


class LowRankLinear(nn.Linear):
    """Takes the place of `linear` and keeps its `weight` and `bias`: the same Parameters under the same keys.

        y = x Wᵀ + b + scale · B core(A x)        see peft_kernels.lowrank_linear

    linear: the nn.Linear to adapt, in_features = I · KB, out_features = O · NB; frozen unless freeze=False
    rank: R;  `down` is (R, KB), `up` (NB, R)
    scale: a number; it lives in a float32 buffer, so that changing it by `set_scale` recompiles nothing
    core: None (with O = I = 1) | "diagonal" (O, I, R), starting at ones | "dense" (O, I, R, R), starting at identities
    dropout_p, dropout_on: as in `lowrank_linear`
    init: of `down`: "kaiming" (uniform ±1/√KB, LoRA's and Aurora's) | "gaussian" (standard deviation 1/R, PEFT's). `up`
        starts at zero, so that the layer starts as `linear`.
    adapter_dtype: of down, up and core: float32 (masters under half-precision activations) or `linear`'s, the default
    backend, design: as in `lowrank_linear`

    Raises ValueError or TypeError, naming the argument, on sizes that do not divide and unknown names.
    While merged, `weight` (in the state dict too) holds the sum.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        *,
        scale: float = 1.0,
        core: str | None = None,
        out_blocks: int = 1,
        in_blocks: int = 1,
        dropout_p: float = 0.0,
        dropout_on: str = "input",
        init: str = "kaiming",
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
        design: str | None = None,
        freeze: bool = True,
    ):
        _check_linear(linear)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank: expected an integer ≥ 1, got {rank!r}")
        check_choice("core", core, CORES)
        check_choice("dropout_on", dropout_on, DROPOUT_PLACES)
        check_choice("init", init, INITS)
        check_choice("backend", backend, ("auto", *BACKENDS))
        check_choice("design", design, DESIGNS)
        check_probability("dropout_p", dropout_p)
        check_scale(scale, linear.weight)
        for name, blocks, features in (
            ("out_blocks", out_blocks, linear.out_features),
            ("in_blocks", in_blocks, linear.in_features),
        ):
            if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1 or features % blocks:
                raise ValueError(f"{name}: expected a divisor of {features}, got {blocks!r}")
        if core is None and (out_blocks, in_blocks) != (1, 1):
            raise ValueError(f"core: {out_blocks} × {in_blocks} blocks need 'diagonal' or 'dense', got None")
        dtype = adapter_dtype or linear.weight.dtype
        if dtype not in (linear.weight.dtype, torch.float32):
            raise TypeError(f"adapter_dtype: expected float32 or {linear.weight.dtype}, as weight, got {dtype}")

        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        if freeze:
            linear.requires_grad_(False)
        factory = {"device": linear.weight.device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(rank, linear.in_features // in_blocks, **factory))
        self.up = nn.Parameter(torch.empty(linear.out_features // out_blocks, rank, **factory))
        shape = {None: None, "diagonal": (rank,), "dense": (rank, rank)}[core]
        self.core = None if core is None else nn.Parameter(torch.empty(out_blocks, in_blocks, *shape, **factory))
        self.rank, self.out_blocks, self.in_blocks = rank, out_blocks, in_blocks
        self.dropout_p, self.dropout_on = dropout_p, dropout_on
        self.init, self.backend, self.design = init, backend, design
        self._original: Tensor | None = None
        self.set_scale(scale)
        self.reset_adapter()
        self.train(linear.training)

    def reset_parameters(self) -> None:
        """As nn.Linear's, weight and bias too; what frameworks call after building a model on the meta device."""
        if hasattr(self, "down"):  # nn.Linear's constructor calls it before there is an adapter
            super().reset_parameters()
            self.reset_adapter()

    def reset_adapter(self) -> None:
        """Start `down`, `up` and `core` afresh."""
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        else:
            nn.init.normal_(self.down, std=1 / self.rank)
        nn.init.zeros_(self.up)
        if self.core is not None:
            with torch.no_grad():
                self.core.copy_(torch.ones_like(self.core) if self.core.dim() == 3 else torch.eye(self.rank))

    def set_scale(self, scale: float) -> None:
        """Change the update's factor; not while merged. In place: a captured CUDA graph sees the new value."""
        check_scale(scale, self.weight)
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
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        return lowrank_linear(
            x,
            self.weight,
            self.bias,
            self.down,
            self.up,
            self.core,
            scale=self.scale,
            dropout_p=self.dropout_p,
            dropout_on=self.dropout_on,
            training=self.training,
            hidden=hidden,
            backend=self.backend,
            design=self.design,
        )

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scale · B core A as a float32 (float64 for a float64 weight) tensor (out_features, in_features)."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        factors = (None if t is None else t.to(dtype) for t in (self.down, self.up, self.core))
        return reconstruct(*factors, scale=self.scale, backend=self.backend)

    @torch.no_grad()
    def merge(self, keep_on: torch.device | str | None = None) -> None:
        """Add the update to `weight`, summed in float32 and rounded once; the original is kept for `unmerge`.

        keep_on: the device of the kept original; None is the weight's own, "cpu" frees that memory.
        """
        self._check_unmerged("merge")
        factors = (self.down, self.up, self.core)
        merged = reconstruct(*factors, scale=self.scale, base=self.weight, backend=self.backend)
        original = self.weight.detach().to(keep_on or self.weight.device, copy=True)
        self.weight.copy_(merged)
        self._original, self._merged_version = original, self._version()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the original bits of `weight`. Raises ValueError if it was changed since it was merged."""
        if self._original is None:
            raise ValueError("unmerge: the layer is not merged")
        if self._version() != self._merged_version:
            raise ValueError("unmerge: weight was changed after merge, and would be lost")
        self.weight.copy_(self._original)
        self._original = None

    def backend_choice(self) -> Choice:
        """The backend that the next forward on the weight's device takes, and the reason."""
        if self.merged:
            return Choice("torch", "merged: a plain linear")
        tensors = (self.weight, self.bias, self.down, self.up, self.core)
        return resolve("lowrank_linear", tensors, self.backend, rank=self.rank)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"rank={self.rank}", f"scale={self._scale:g}"]
        if self.core is not None:
            kind = "diagonal" if self.core.dim() == 3 else "dense"
            parts += [f"core={kind}", f"blocks={self.out_blocks}x{self.in_blocks}"]
        if self.dropout_p:
            parts.append(f"dropout={self.dropout_p:g} on {self.dropout_on}")
        parts.append(f"backend={self.backend}")
        return ", ".join(parts + ["merged"] * self.merged)

    def _check_unmerged(self, action: str) -> None:
        if getattr(self, "_original", None) is not None:
            raise ValueError(f"{action}: the layer is merged; unmerge it first")

    def _scale_buffer(self) -> Tensor:
        return torch.full((), self._scale, dtype=torch.float32, device=self.weight.device)

    def _apply(self, fn, recurse: bool = True):
        """Moves and casts as any module does, but leaves the scale in float32."""
        super()._apply(fn, recurse)
        self.scale = self._scale_buffer()
        if self.merged:
            self._merged_version = self._version()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        if self.scale.device != self.weight.device:  # assign=True brings a meta model to a real device
            self.scale = self._scale_buffer()

    def _version(self) -> int | None:
        """Counts changes in place of the weight (tensors made in inference mode count none)."""
        return None if self.weight.is_inference() else self.weight._version


def _check_linear(linear: object) -> None:
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
    if isinstance(linear, LowRankLinear):
        raise ValueError("linear: is a LowRankLinear already; its adapter would be lost")
    weight = linear._parameters.get("weight")
    if weight is None or is_lazy(weight):
        raise TypeError(f"linear: expected a plain weight Parameter, {type(linear).__name__} has none")
    if weight.dtype not in DTYPES:
        raise TypeError(f"linear: expected a floating-point weight, got {weight.dtype}; use lowrank_linear for it")
