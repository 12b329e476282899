"""`lowrank_linear` in Triton: thin passes around torch's GEMM (passes), or one kernel for small widths (fused).

The mathematics and every shape: peft_kernels/ops/lowrank_linear.py. M rows; K = I·KB inputs; N = O·NB outputs; rank R.

    forward    shrink      x -> z
               mix         z -> S: core and masks, where there are any
               expand      S -> s·S Bᵀ + b;  then torch adds x Wᵀ          (fused: all of it in one kernel)
    backward   up_bwd      dy, S -> dy B by chunks of columns, dB by strips of rows  (S by mix, from z)
               hidden_bwd  those chunks -> dz              core_bwd  those chunks, z -> d_core by strips
               down_bwd    x, dz -> dA by strips, mask ∘ (dz A);  then torch adds dy W


dy and x are read once each by the thin passes. Partial sums are added in a fixed order: gradients repeat bit for bit.
"""

from torch import Tensor

from .common import architecture, dropout_arguments
from .config import LowRankLinearConfig, LowRankShape, lowrank_linear_config
from .lowrank_linear_bwd import core_bwd, down_bwd, hidden_bwd, up_bwd
from .lowrank_linear_fwd import Scale, expand, fused, mix, shrink


def lowrank_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    core: Tensor | None,
    scale: Scale,
    hidden: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    dropout_on: str,
    design: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """-> y (M, N), z (M, I·R); z is None when `hidden` was given."""
    (out_features, in_features), in_blocks = weight.shape, weight.shape[1] // down.shape[1]
    drop, out_blocks = _dropout(rng, dropout_p, dropout_on), out_features // up.shape[0]
    shape = LowRankShape(
        x.shape[0], in_features, out_features, up.shape[1], in_blocks, out_blocks, drop[-1] == "input"
    )  # fmt: skip
    config = lowrank_linear_config(shape, x.dtype, architecture(x.device), design)
    if config.design == "fused" and hidden is None:
        return fused(x, weight, bias, down, up, core, scale, drop, config)
    z = shrink(x, down, in_blocks, drop, config) if hidden is None else hidden
    s = mix(z, core, out_blocks, up.shape[1], drop, config)
    y = expand(s, up, bias, scale, out_features, config).addmm_(x, weight.t())
    return y, z if hidden is None else None


def lowrank_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    down: Tensor | None,
    up: Tensor,
    core: Tensor | None,
    scale: Scale,
    z: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    dropout_on: str,
    needs: tuple[bool, bool, bool, bool, bool],
    design: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """-> dx, d_down, d_up, d_core, d_hidden; `needs` says which, in that order. `down` is None if `hidden` was given.

    The same for every design: dB needs a read of dy, which yields dy B at no further traffic.
    """
    needs_x, needs_down, needs_up, needs_core, needs_hidden = needs
    through_down = needs_x and down is not None
    rank, out_blocks, in_blocks = up.shape[1], dy.shape[1] // up.shape[0], 1 if core is None else core.shape[1]
    needs_dz = needs_down or needs_hidden or through_down
    drop = _dropout(rng, dropout_p, dropout_on)
    shape = LowRankShape(dy.shape[0], 0, dy.shape[1], rank, in_blocks, out_blocks, drop[-1] == "input")
    config = lowrank_linear_config(shape, dy.dtype, architecture(dy.device))
    s = mix(z, core, out_blocks, rank, drop, config) if needs_up else None
    t, d_up = up_bwd(dy, s, up, scale, needs_dz or needs_core, needs_up, config)
    d_core = core_bwd(t, z, core, scale, drop, config) if needs_core else None
    dz = hidden_bwd(t, core, scale, drop, in_blocks, rank, dy.dtype, config) if needs_dz else None
    dx = d_down = None
    if needs_down or through_down:
        dx, d_down = down_bwd(x, dz, down, drop, (through_down, needs_down), config)
    if needs_x:
        dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    return dx, d_down, d_up, d_core, dz if needs_hidden else None


def lowrank_hidden_fwd(x: Tensor, down: Tensor, input_blocks: int) -> Tensor:
    """-> z (M, I·R)"""
    return shrink(x, down, input_blocks, _dropout(), _hidden_config(x, down.shape[0], input_blocks))


def lowrank_hidden_bwd(
    dz: Tensor, x: Tensor | None, down: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """-> dx, d_down; `needs` says which, in that order."""
    config = _hidden_config(dz, down.shape[0], dz.shape[1] // down.shape[0])
    return down_bwd(x, dz, down, _dropout(), needs, config)


def _hidden_config(rows: Tensor, rank: int, in_blocks: int) -> LowRankLinearConfig:
    shape = LowRankShape(rows.shape[0], 0, 0, rank, in_blocks)
    return lowrank_linear_config(shape, rows.dtype, architecture(rows.device))


def _dropout(rng: Tensor | None = None, dropout_p: float = 0.0, dropout_on: str = "none") -> tuple:
    """(rng, threshold, keep_scale, place) as the kernels take them; place "none" when nothing is dropped."""
    return *dropout_arguments(rng, dropout_p), (dropout_on if rng is not None else "none")
