"""`batched_lowrank_linear` in Triton: thin passes, each row through its own adapter, around torch's GEMM.

The mathematics, every shape and the segments: peft_kernels/ops/batched_lowrank_linear.py. M rows, L adapters, rank R;
"wide" is x, dy, y or dx with W columns, "thin" is z or dz with R. A factor is `down` (L, R, W) or, with UP, `up`
(L, W, R).

    forward    shrink   x -> z                 expand   z -> s · z Bᵀ + b;  then torch adds x Wᵀ
    backward   shrink   dy -> dz = s · dy B    expand   dz -> dz A;  then torch adds dy W
               gram     dy, z -> dB; x, dz -> dA, by strips of each adapter's rows

Programs take a tile of rows of one adapter, which they gather and scatter through `order`; partial sums are added in
a fixed order: gradients repeat bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import AdapterSegments, Factors, Scale
from .common import add_dot, architecture, dot_constants, launch, scale_arguments, sum_partials
from .config import SEGMENT_ROWS, BatchedConfig, Tile, adapter_strips, batched_config
from .lowrank_linear_fwd import load_up
from .replay import again


@triton.jit
def _load_tile(
    order_ptr, offsets_ptr, tile_adapter_ptr, tile_first_ptr, BLOCK_M: tl.constexpr, SEGMENT: tl.constexpr
):  # fmt: skip
    """This program's adapter (-1: none), the rows it gathers and which of them there are."""
    parts: tl.constexpr = SEGMENT // BLOCK_M
    tile = tl.program_id(0) // parts
    adapter = tl.load(tile_adapter_ptr + tile)
    first = tl.load(tile_first_ptr + tile) + tl.program_id(0) % parts * BLOCK_M
    places = first + tl.arange(0, BLOCK_M)
    mask_m = places < tl.load(offsets_ptr + adapter + 1)
    return adapter, tl.load(order_ptr + places, mask=mask_m, other=0), mask_m


@triton.jit
def _load_scale(scale_ptr, scale, adapter):
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + adapter)
    return scale


@triton.jit
def _load_factor(
    factor_ptr, adapter, offs_w, mask_w, W, R, UP: tl.constexpr, DOT: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """Some columns of F_l, (BLOCK_R, columns)."""
    if UP:
        factor = tl.trans(load_up(factor_ptr + adapter * W * R, offs_w, mask_w, R, DOT, BLOCK_R))
    else:
        offs_r = tl.arange(0, BLOCK_R)
        pointers = factor_ptr + (adapter * R + offs_r[:, None]) * W + offs_w[None, :]
        factor = tl.load(pointers, mask=(offs_r < R)[:, None] & mask_w[None, :], other=0.0).to(DOT)
    return factor


@triton.jit(do_not_specialize=["R", "stride_tm"])
def _batched_shrink_kernel(
    wide_ptr, factor_ptr, thin_ptr, scale_ptr, order_ptr, offsets_ptr, tile_adapter_ptr, tile_first_ptr,
    scale, W, R, stride_wm, stride_tm,
    UP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """thin = s_l · wide F_lᵀ; rows without an adapter are left alone; grid (row tiles,)."""
    adapter, rows, mask_m = _load_tile(order_ptr, offsets_ptr, tile_adapter_ptr, tile_first_ptr, BLOCK_M, SEGMENT)
    if adapter < 0:
        return
    offs_r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for w in range(0, W, BLOCK_W):
        offs_w = w + tl.arange(0, BLOCK_W)
        mask_w = offs_w < W
        pointers = wide_ptr + rows[:, None] * stride_wm + offs_w[None, :]
        wide = tl.load(pointers, mask=mask_m[:, None] & mask_w[None, :], other=0.0).to(DOT)
        factor = _load_factor(factor_ptr, adapter, offs_w, mask_w, W, R, UP, DOT, BLOCK_R)
        acc = add_dot(acc, wide, tl.trans(factor), PRECISION)
    acc *= _load_scale(scale_ptr, scale, adapter)
    pointers = thin_ptr + rows[:, None] * stride_tm + offs_r[None, :]
    tl.store(pointers, acc.to(thin_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_r < R)[None, :])


@triton.jit
def _load_thin(thin_ptr, rows, mask_m, R, stride_tm, DOT: tl.constexpr, BLOCK_R: tl.constexpr):
    offs_r = tl.arange(0, BLOCK_R)
    mask = mask_m[:, None] & (offs_r < R)[None, :]
    return tl.load(thin_ptr + rows[:, None] * stride_tm + offs_r[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit(do_not_specialize=["R", "stride_tm"])
def _batched_expand_kernel(
    thin_ptr, factor_ptr, bias_ptr, wide_ptr, scale_ptr, order_ptr, offsets_ptr, tile_adapter_ptr, tile_first_ptr,
    scale, W, R, stride_tm, stride_wm,
    UP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """wide = s_l · thin F_l + bias; rows without an adapter get the bias alone; grid (row tiles, column tiles)."""
    adapter, rows, mask_m = _load_tile(order_ptr, offsets_ptr, tile_adapter_ptr, tile_first_ptr, BLOCK_M, SEGMENT)
    offs_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask_w = offs_w < W
    acc = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    if adapter >= 0:
        thin = _load_thin(thin_ptr, rows, mask_m, R, stride_tm, DOT, BLOCK_R)
        factor = _load_factor(factor_ptr, adapter, offs_w, mask_w, W, R, UP, DOT, BLOCK_R)
        acc = tl.dot(thin, factor, acc, input_precision=PRECISION) * _load_scale(scale_ptr, scale, adapter)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)[None, :]
    pointers = wide_ptr + rows[:, None] * stride_wm + offs_w[None, :]
    tl.store(pointers, acc.to(wide_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_w[None, :])


@triton.jit(do_not_specialize=["R", "stride_tm", "adapters", "strips"])
def _gram_kernel(
    thin_ptr, wide_ptr, out_ptr, scale_ptr, order_ptr, offsets_ptr, scale, W, R, stride_tm, stride_wm, adapters, strips,
    UP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[strip, l] = s_l · Σ thinᵀ wide over one strip of the rows of l; an adapter without rows gets zeros.

    out: (strips, L, R, W) or, with UP, (strips, L, W, R); grid (strips · L · column tiles,).
    """
    column_tiles = tl.cdiv(W, BLOCK_W)
    part = (tl.program_id(0) // column_tiles).to(tl.int64)
    adapter, strip = part % adapters, part // adapters
    offs_w = tl.program_id(0) % column_tiles * BLOCK_W + tl.arange(0, BLOCK_W)
    offs_r = tl.arange(0, BLOCK_R)
    mask_w = offs_w < W
    begin, end = tl.load(offsets_ptr + adapter), tl.load(offsets_ptr + adapter + 1)
    height = tl.cdiv(tl.cdiv(end - begin, strips), BLOCK_M) * BLOCK_M
    begin += strip * height
    end = tl.minimum(end, begin + height)
    acc = tl.zeros((BLOCK_W, BLOCK_R), tl.float32)
    for place in range(begin, end, BLOCK_M):
        places = place + tl.arange(0, BLOCK_M)
        mask_m = places < end
        rows = tl.load(order_ptr + places, mask=mask_m, other=0)
        pointers = wide_ptr + rows[:, None] * stride_wm + offs_w[None, :]
        wide = tl.load(pointers, mask=mask_m[:, None] & mask_w[None, :], other=0.0).to(DOT)
        thin = _load_thin(thin_ptr, rows, mask_m, R, stride_tm, DOT, BLOCK_R)
        acc = add_dot(acc, tl.trans(wide), thin, PRECISION)
    acc *= _load_scale(scale_ptr, scale, adapter)
    if UP:
        pointers = out_ptr + (part * W + offs_w[:, None]) * R + offs_r[None, :]
    else:
        pointers = out_ptr + (part * R + offs_r[None, :]) * W + offs_w[:, None]
    tl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=mask_w[:, None] & (offs_r < R)[None, :])


@again
def _shrink(wide: Tensor, factor: Tensor, up: bool, scale: Scale, segments: AdapterSegments) -> Tensor:
    """-> thin (M, R)"""
    rank, config = factor.shape[2 if up else 1], _config(factor, up, wide)
    thin, (scale_ptr, scale) = wide.new_empty(wide.shape[0], rank), scale_arguments(scale)
    launch(
        _batched_shrink_kernel,
        (_row_tiles(segments, config.shrink.rows),),
        (
            wide, factor, thin, scale_ptr, *segments,
            scale, wide.shape[1], rank, wide.stride(0), thin.stride(0),
        ),
        _constants(config, config.shrink, up, wide.dtype, SEGMENT=SEGMENT_ROWS),
        config.shrink,
    )  # fmt: skip
    return thin


@again
def _expand(
    thin: Tensor, factor: Tensor, up: bool, bias: Tensor | None, scale: Scale, segments: AdapterSegments
) -> Tensor:
    """-> wide (M, W) without the frozen weight's part"""
    columns, config = factor.shape[1 if up else 2], _config(factor, up, thin)
    wide, (scale_ptr, scale) = thin.new_empty(thin.shape[0], columns), scale_arguments(scale)
    launch(
        _batched_expand_kernel,
        (_row_tiles(segments, config.expand.rows), triton.cdiv(columns, config.expand.columns)),
        (
            thin, factor, bias, wide, scale_ptr, *segments,
            scale, columns, thin.shape[1], thin.stride(0), wide.stride(0),
        ),
        _constants(config, config.expand, up, thin.dtype, SEGMENT=SEGMENT_ROWS),
        config.expand,
    )  # fmt: skip
    return wide


@again
def _gram(thin: Tensor, wide: Tensor, factor: Tensor, up: bool, scale: Scale, segments: AdapterSegments) -> Tensor:
    """-> the gradient of `factor`"""
    config, adapters, (rows, columns) = _config(factor, up, wide), factor.shape[0], wide.shape
    column_tiles = triton.cdiv(columns, config.gram.columns)
    strips = adapter_strips(rows, adapters, config.gram, column_tiles, architecture(wide.device))
    out = torch.empty_like(factor) if strips == 1 else wide.new_empty((strips, *factor.shape), dtype=torch.float32)
    scale_ptr, scale = scale_arguments(scale)
    launch(
        _gram_kernel,
        (strips * adapters * column_tiles,),
        (
            thin, wide, out, scale_ptr, segments.order, segments.offsets,
            scale, columns, thin.shape[1], thin.stride(0), wide.stride(0), adapters, strips,
        ),
        _constants(config, config.gram, up, wide.dtype),
        config.gram,
    )  # fmt: skip
    return out if strips == 1 else sum_partials([(out, factor)])[0]


def _config(factor: Tensor, up: bool, like: Tensor) -> BatchedConfig:
    return batched_config(factor.shape[2 if up else 1], like.dtype, architecture(like.device))


def _constants(config: BatchedConfig, tile: Tile, up: bool, dtype: torch.dtype, **others: int) -> dict[str, Any]:
    sizes = {"BLOCK_M": tile.rows, "BLOCK_W": tile.columns, "BLOCK_R": config.block_r}
    return {"UP": up, **dot_constants(dtype), **sizes, **others}


def _row_tiles(segments: AdapterSegments, tile_rows: int) -> int:
    return segments.tile_adapter.shape[0] * (SEGMENT_ROWS // tile_rows)


def batched_lowrank_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, segments: AdapterSegments
) -> tuple[Tensor, Tensor]:
    """-> y (M, N), z (M, R); rows of z without an adapter are not written"""
    z = _shrink(x, factors.down, False, 1.0, segments)
    return _expand(z, factors.up, True, bias, factors.scale, segments).addmm_(x, weight.t()), z


def batched_lowrank_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    factors: Factors,
    segments: AdapterSegments,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """-> dx, d_down, d_up; `needs` says which, in that order."""
    (needs_x, needs_down, needs_up), (down, up, _, scale, z) = needs, factors
    dx = d_down = d_up = None
    if needs_up:
        d_up = _gram(z, dy, up, True, scale, segments)
    if needs_x or needs_down:
        dz = _shrink(dy, up, True, scale, segments)
        if needs_down:
            d_down = _gram(dz, x, down, False, 1.0, segments)
        if needs_x:
            dx = _expand(dz, down, False, None, 1.0, segments).addmm_(dy, weight)
    return dx, d_down, d_up
