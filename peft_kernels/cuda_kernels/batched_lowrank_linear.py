"""CUDA launchers of the low-rank linear with an adapter for each row: thin passes around torch's GEMM; no checks.

Forward:  shrink (x -> z), expand (z -> y0 = s z Bᵀ + b), y0 += x Wᵀ.
Backward: shrink (dY -> dz), gram (dY, z -> dB and x, dz -> dA), expand (dz -> dx0), one launch adds the partial sums of
both gradients, dx0 += dY W. Shapes and formulas: peft_kernels/ops/batched_lowrank_linear.py; the params struct:
csrc/batched_lowrank_linear.h.
"""

from typing import Any

import torch
from torch import Tensor

from peft_kernels.records import AdapterSegments, Factors

from . import extension
from .common import DTYPES, floats, hand_over, launch, set_scale, strips


def batched_lowrank_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, segments: AdapterSegments
) -> tuple[Tensor, Tensor]:
    """-> y (M, N), z (M, R)"""
    params = _params(x, factors, segments)
    y, z = x.new_empty(x.shape[0], params.out_features), x.new_empty(x.shape[0], params.rank)
    hand_over(params, x=x, bias=bias, z=z, y=y)
    launch(extension().batched_lowrank_linear_fwd, params, x)
    return y.addmm_(x, weight.t()), z


def batched_lowrank_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    factors: Factors,
    segments: AdapterSegments,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """-> dx, d_down, d_up: those that `needs`, three bools in that order, asks for.

    x: read for d_down only; weight: for dx only; factors.z: for d_up only.
    """
    (need_x, need_down, need_up), (down, up, _, _, z) = needs, factors
    params = _params(dy, factors, segments)
    dx = dy.new_empty(dy.shape[0], down.shape[2]) if need_x else None
    d_down, d_up = (torch.empty_like(f) if need else None for f, need in ((down, need_down), (up, need_up)))
    buffers = {}  # kept until the launch is queued
    if need_x or need_down:
        buffers["dz"] = dy.new_empty(dy.shape[0], down.shape[1])
    if need_down:
        params.down_strips = strips(dy, params.rank, down.shape[2], params.adapters)
        buffers["d_down_partial"] = _partial(d_down, params.down_strips)
    if need_up:
        params.up_strips = strips(dy, params.rank, up.shape[1], params.adapters)
        buffers["d_up_partial"] = _partial(d_up, params.up_strips)
    hand_over(params, dy=dy, x=x if need_down else None, z=z if need_up else None, dx=dx, d_down=d_down, d_up=d_up)
    hand_over(params, **buffers)
    launch(extension().batched_lowrank_linear_bwd, params, dy)
    return dx.addmm_(dy, weight) if need_x else None, d_down, d_up


def _params(like: Tensor, factors: Factors, segments: AdapterSegments) -> Any:
    """csrc's params struct with everything but the activations."""
    params, (down, up, _, scale, _) = extension().BatchedLowRankLinear(), factors
    params.adapters, params.rank, params.in_features = down.shape
    params.rows, params.out_features, params.dtype = like.shape[0], up.shape[1], DTYPES[like.dtype]
    params.down_float, params.up_float = down.dtype == torch.float32, up.dtype == torch.float32
    params.tiles = segments.tile_adapter.numel()
    set_scale(params, scale)
    hand_over(params, down=down, up=up, **segments._asdict())
    return params


def _partial(gradient: Tensor, count: int) -> Tensor | None:
    """A buffer for partial sums; one strip writes the gradient itself."""
    return floats(gradient, count * gradient.numel()) if count > 1 else None
