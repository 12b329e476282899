"""`lowrank_linear` in Triton: thin passes around torch's GEMM ("passes"), or one kernel for small widths ("fused").

The mathematics and every shape: peft_kernels/ops/lowrank_linear.py. M rows; K = I·KB inputs; N = O·NB outputs; rank R.

    forward    shrink      x -> z
               mix         z -> S: core and masks, where there are any
               expand      S -> s·S Bᵀ + b;  then torch adds x Wᵀ          ("fused": all of it in one kernel)
    backward   up_bwd      dy, S -> dy B by chunks of columns, dB by strips of rows  (S by mix, from z)
               hidden_bwd  those chunks -> dz              core_bwd  those chunks, z -> d_core by strips
               down_bwd    x, dz -> dA by strips, mask ∘ (dz A);  then torch adds dy W
               sums        dB, dA and d_core of their strips

Where there is no core and few chunks, down_bwd makes dz of them itself: a LoRA layer takes five launches for both
directions. dy and x are read once each by the thin passes. Sums have a fixed order: gradients repeat bit for bit.
"""

import torch
from torch import Tensor

from ..records import Dropout, Factors, Needs
from .common import allows_tf32, architecture, sum_partials
from .config import LowRankLinearConfig, LowRankShape, down_bwd_makes_dz, lowrank_linear_config
from .lowrank_linear_bwd import core_bwd, down_bwd, hidden_bwd, up_bwd
from .lowrank_linear_fwd import drop_of, expand, fused, mix, shrink
from .replay import Memo, again, replayed


def lowrank_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, dropout: Dropout, design: str | None = None,
    *, memo: Memo | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """-> y (M, N), z (M, I·R); z is None when factors.z was given."""
    one_kernel = design == "fused" and factors.z is None
    args = x, weight, bias, factors, dropout, design
    if memo is None or (one_kernel and not weight.is_contiguous()):
        y, z = _forward_again(*args)
    else:
        tensors = x, weight if one_kernel else None, bias, dropout.rng, *factors
        number = factors.scale if type(factors.scale) is float else None
        key = "fwd", x.shape[0], number, x.dtype is torch.float32 and allows_tf32()
        y, z = replayed(memo, key, lambda: _forward(*args), tensors)
    return y if one_kernel else y.addmm_(x, weight.t()), z


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, dropout: Dropout, design: str | None
) -> tuple[Tensor, Tensor | None]:
    """-> y, without the frozen weight's part unless one kernel does it all; z"""
    (_, in_blocks), drop = factors.blocks, drop_of(dropout)
    shape = _shape(x.shape[1], weight.shape[0], factors, drop.place)
    config = lowrank_linear_config(shape, x.dtype, architecture(x.device), design)
    if design == "fused" and factors.z is None:
        return fused(x, weight, bias, factors, drop, config)
    z = shrink(x, factors.down, in_blocks, drop, config) if factors.z is None else factors.z
    y = expand(mix(z, factors, shape.out_blocks, drop, config), factors, bias, shape.out_features, config)
    return y, z if factors.z is None else None


def lowrank_linear_bwd(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, factors: Factors, dropout: Dropout, needs: Needs,
    *, memo: Memo | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """-> dx, d_down, d_up, d_core, dz, as `needs` says in that order. factors.down is None if z came from outside.

    The same for every design: dB needs a read of dy, which yields dy B at no further traffic.
    """
    args = dy, x, factors, dropout, needs
    if memo is None or not dy.is_contiguous():
        dx, *grads = _backward_again(*args)
    else:
        tensors = dy, x, dropout.rng, *factors
        number = factors.scale if type(factors.scale) is float else None
        key = needs, dy.shape[0], number, dy.dtype is torch.float32 and allows_tf32()
        dx, *grads = replayed(memo, key, lambda: _backward(*args), tensors)
    if needs.x:
        dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    return dx, *grads


def _backward(
    dy: Tensor, x: Tensor | None, factors: Factors, dropout: Dropout, needs: Needs
) -> tuple[Tensor | None, ...]:
    """-> mask ∘ (dz A), d_down, d_up, d_core, dz"""
    drop, through_down = drop_of(dropout), (needs.x and factors.down is not None, needs.down)
    needs_dz = needs.z or any(through_down)
    shape = _shape(0, dy.shape[1], factors, drop.place)
    config = lowrank_linear_config(shape, dy.dtype, architecture(dy.device))
    s = mix(factors.z, factors, shape.out_blocks, drop, config) if needs.up else None
    dx = dz = t = d_up = d_core = d_down = None
    if needs_dz or needs.up or needs.core:
        t, d_up = up_bwd(dy, s, factors, needs_dz or needs.core, needs.up, config)
    if needs.core:
        d_core = core_bwd(t, factors.z, factors, drop, config)
    if needs_dz and not (any(through_down) and _makes_dz_late(factors, needs, config)):
        dz = hidden_bwd(t, factors, drop, dy.dtype, config)
    if any(through_down):
        dx, d_down = down_bwd(x, t if dz is None else dz, factors, drop, through_down, config)
    sums = [(parts, of) for parts, of in ((d_up, factors.up), (d_core, factors.core), (d_down, factors.down))]
    d_up, d_core, d_down = sum_partials(sums)
    return dx, d_down, d_up, d_core, dz if needs.z else None


_forward_again, _backward_again = again(_forward), again(_backward)


def _makes_dz_late(factors: Factors, needs: Needs, config: LowRankLinearConfig) -> bool:
    """Does down_bwd make dz of the chunks?"""
    if factors.core is not None or needs.z:
        return False
    return down_bwd_makes_dz(config, factors.down.shape[1], factors.up.shape[0])


@again
def lowrank_hidden_fwd(x: Tensor, down: Tensor, input_blocks: int) -> Tensor:
    """-> z (M, I·R)"""
    return shrink(x, down, input_blocks, drop_of(Dropout()), _hidden_config(x, down.shape[0], input_blocks))


@again
def lowrank_hidden_bwd(
    dz: Tensor, x: Tensor | None, down: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """-> dx, d_down; `needs` says which, in that order."""
    config = _hidden_config(dz, down.shape[0], dz.shape[1] // down.shape[0])
    dx, d_down = down_bwd(x, dz, Factors(down, down), drop_of(Dropout()), tuple(needs), config)
    return dx, *sum_partials([(d_down, down)])


def _hidden_config(rows: Tensor, rank: int, in_blocks: int) -> LowRankLinearConfig:
    return lowrank_linear_config(LowRankShape(0, 0, rank, in_blocks), rows.dtype, architecture(rows.device))


def _shape(in_features: int, out_features: int, factors: Factors, place: str) -> LowRankShape:
    out_blocks, in_blocks = factors.blocks
    return LowRankShape(in_features, out_features, factors.rank, in_blocks, out_blocks, place == "input")
