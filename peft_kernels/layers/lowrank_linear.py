"""A drop-in nn.Linear with a low-rank update of its frozen weight."""

import math

import torch
from torch import Tensor, nn

from peft_kernels.checks import check_choice, check_integer
from peft_kernels.layers.adapted_linear import (
    AdaptedLinear,
    adapter_dtype_for,
    check_blocks,
    check_linear_module,
)

CORES = (None, "diagonal", "dense")
INITS = ("kaiming", "gaussian")


class LowRankLinear(AdaptedLinear):
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
    device: of down, up and core; None is `linear`'s ("meta": to be filled from a file)

    Raises ValueError or TypeError, naming the argument, on sizes that do not divide and unknown names.
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
        device: torch.device | str | None = None,
    ):
        check_linear_module(linear)
        check_integer("rank", rank)
        check_choice("core", core, CORES)
        check_choice("init", init, INITS)
        check_blocks("out_blocks", out_blocks, linear.out_features)
        check_blocks("in_blocks", in_blocks, linear.in_features)
        if core is None and (out_blocks, in_blocks) != (1, 1):
            raise ValueError(f"core: {out_blocks} × {in_blocks} blocks need 'diagonal' or 'dense', got None")
        dtype = adapter_dtype_for(linear, adapter_dtype)
        super().__init__(
            linear,
            scale=scale,
            dropout_p=dropout_p,
            dropout_on=dropout_on,
            backend=backend,
            design=design,
            freeze=freeze,
        )
        factory = {"device": device or linear.weight.device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(rank, linear.in_features // in_blocks, **factory))
        self.up = nn.Parameter(torch.empty(linear.out_features // out_blocks, rank, **factory))
        shape = {None: None, "diagonal": (rank,), "dense": (rank, rank)}[core]
        self.core = None if core is None else nn.Parameter(torch.empty(out_blocks, in_blocks, *shape, **factory))
        self.rank, self.out_blocks, self.in_blocks, self.init = rank, out_blocks, in_blocks, init
        self.reset_adapter()

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        own = self._parameters  # past nn.Module's slow way to them, unless they are parametrised
        if "down" not in own or "up" not in own:
            return self.down, self.up, self.core
        return own["down"], own["up"], self.core

    def group_kind(self) -> tuple[tuple | None, str]:
        core = None if self.core is None else "diagonal" if self.core.dim() == 3 else "dense"
        kind, why = self._group_kind(self.rank, (self.out_blocks, self.in_blocks), core)
        return kind if kind is None else (*kind, self.down.dtype), why

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

    def _describe(self) -> list[str]:
        parts = [f"rank={self.rank}", *super()._describe()]
        if self.core is not None:
            kind = "diagonal" if self.core.dim() == 3 else "dense"
            parts += [f"core={kind}", f"blocks={self.out_blocks}x{self.in_blocks}"]
        return parts
