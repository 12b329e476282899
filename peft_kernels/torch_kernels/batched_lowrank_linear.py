"""`batched_lowrank_linear` in torch; it never waits for a GPU. Shapes: peft_kernels/ops/batched_lowrank_linear.py.

On a CPU, where reading a count costs nothing, each adapter gets its own rows. Elsewhere every row meets every adapter
in one product, and all but its own are masked out: L times the thin arithmetic, but a fixed sequence of launches.
(There a NaN in one row reaches every adapter's gradient: 0 · NaN.)
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels.records import AdapterSegments, Factors, Scale


def batched_lowrank_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, segments: AdapterSegments
) -> tuple[Tensor, Tensor]:
    """-> y (M, N), z (M, R). Of factors: down (L, R, K), up (L, N, R), scale a number or (L,)."""
    down, up, _, scale, _ = factors
    y = F.linear(x, weight, bias)
    if x.device.type != "cpu":
        z, own = _own(x @ down.flatten(0, 1).t().to(x.dtype), segments)
        spread = _spread(z, own, scale)
        return y.addmm_(spread, up.transpose(1, 2).flatten(0, 1).to(x.dtype)), z
    z = x.new_zeros(x.shape[0], down.shape[1])
    for adapter, rows, s in _groups(segments, scale):
        z_rows = x[rows] @ down[adapter].t().to(x.dtype)
        z[rows] = z_rows
        y.index_add_(0, rows, (z_rows @ up[adapter].t().to(x.dtype)).mul_(s))
    return y, z


def batched_lowrank_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    factors: Factors,
    segments: AdapterSegments,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """-> dx, d_down, d_up; `needs` says which, in that order. factors has z, if d_up is needed."""
    needs_x, needs_down, needs_up = needs
    dx = dy @ weight if needs_x else None
    if dy.device.type != "cpu":
        return _bwd_at_once(dy, x, dx, factors, segments, needs)
    down, up, _, scale, z = factors
    d_down, d_up = torch.zeros_like(down) if needs_down else None, torch.zeros_like(up) if needs_up else None
    for adapter, rows, s in _groups(segments, scale):
        dy_rows = dy[rows]
        if needs_up:
            d_up[adapter] = (dy_rows.t() @ z[rows]).mul_(s)
        if needs_x or needs_down:
            dz = (dy_rows @ up[adapter].to(dy.dtype)).mul_(s)
        if needs_down:
            d_down[adapter] = dz.t() @ x[rows]
        if needs_x:
            dx.index_add_(0, rows, dz @ down[adapter].to(dy.dtype))
    return dx, d_down, d_up


def batched_lowrank_linear_composed(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, segments: AdapterSegments
) -> Tensor:
    """-> y (M, N) by differentiable operations alone, none in place: every row meets every adapter."""
    down, up, _, scale, _ = factors
    places, offsets = segments.order.argsort()[:, None], segments.offsets
    own = (places >= offsets[:-1]) & (places < offsets[1:])
    factor = own.to(x.dtype) * scale.to(x.dtype) if isinstance(scale, Tensor) else own * scale
    z = torch.einsum("mk,lrk->mlr", x, down.to(x.dtype)) * factor.to(x.dtype)[..., None]
    return F.linear(x, weight, bias) + torch.einsum("mlr,lnr->mn", z, up.to(x.dtype))


def _groups(segments: AdapterSegments, scale: Scale) -> Iterator[tuple[int, Tensor, Scale]]:
    """(adapter, its rows, its scale) of every adapter that has rows."""
    order, offsets = segments.order, segments.offsets.tolist()
    for adapter, (first, end) in enumerate(itertools.pairwise(offsets)):
        if first < end:
            yield adapter, order[first:end], scale[adapter] if isinstance(scale, Tensor) else scale


def _bwd_at_once(
    dy: Tensor,
    x: Tensor | None,
    dx: Tensor | None,
    factors: Factors,
    segments: AdapterSegments,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """-> dx with the adapters' part added, d_down, d_up"""
    (needs_x, needs_down, needs_up), (down, up, _, scale, z) = needs, factors
    d_down = d_up = None
    dz, own = _own(dy @ up.transpose(0, 1).flatten(1).to(dy.dtype), segments)
    if needs_up:
        d_up = (dy.t() @ _spread(z, own, scale)).view(dy.shape[1], *down.shape[:2]).transpose(0, 1)
        d_up = d_up.to(up.dtype).contiguous()
    dz = _spread(dz, own, scale)
    if needs_down:
        d_down = (dz.t() @ x).view(down.shape).to(down.dtype)
    if needs_x:
        dx.addmm_(dz, down.flatten(0, 1).to(dy.dtype))
    return dx, d_down, d_up


def _own(of_all: Tensor, segments: AdapterSegments) -> tuple[Tensor, Tensor]:
    """of_all (M, L·R): every row's products with every adapter -> those with its own (M, R), and which it is (M, L)."""
    order, offsets = segments[:2]
    places = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    own = (places[:, None] >= offsets[:-1]) & (places[:, None] < offsets[1:])
    return torch.where(own[:, :, None], of_all.unflatten(1, (own.shape[1], -1)), 0).sum(1), own


def _spread(thin: Tensor, own: Tensor, scale: Scale) -> Tensor:
    """thin (M, R) -> s · thin at each row's own adapter, zeros at the others (M, L·R)"""
    scaled = thin[:, None] * (torch.ones_like(own, dtype=thin.dtype) * scale).to(thin.dtype)[:, :, None]
    return torch.where(own[:, :, None], scaled, 0).flatten(1)
