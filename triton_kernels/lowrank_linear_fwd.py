"""The forward kernels of `lowrank_linear`, what both directions load alike, and their launchers."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..records import Dropout, Factors
from .common import (
    add_dot,
    dot_constants,
    dropout_arguments,
    in_eights,
    keep_mask,
    launch,
    load_rng,
    load_scale,
    scale_arguments,
)
from .config import LowRankLinearConfig


@triton.jit(do_not_specialize=["M", "R", "stride_zm", "threshold"])
def _shrink_kernel(
    x_ptr, down_ptr, z_ptr, rng_ptr, M, KB, R, stride_xm, stride_zm, threshold, keep_scale,
    DROPOUT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """z_i = drop(x_i) Aᵀ; grid (row tiles, I)."""
    R, stride_zm = in_eights(R, ALIGNED), in_eights(stride_zm, ALIGNED)
    i = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_r = rows < M, offs_r < R
    if DROPOUT == "input":
        rng = load_rng(rng_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, KB, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < KB
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + i * KB + offs_k[None, :],
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        down = tl.load(
            down_ptr + offs_r[:, None].to(tl.int64) * KB + offs_k[None, :],
            mask=mask_r[:, None] & mask_k[None, :],
            other=0.0,
        )
        x = x.to(DOT)
        if DROPOUT == "input":
            x = tl.where(keep_input(rng, rows, i, k, KB, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        acc = add_dot(acc, x, tl.trans(down.to(DOT)), PRECISION)
    if DROPOUT == "input":
        acc *= keep_scale
    z = acc.to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + rows[:, None] * stride_zm + i * R + offs_r[None, :], z, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit
def keep_input(rng, rows, i, k, KB, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The mask on a tile of x; each input block starts at a multiple of 8 columns of the random stream."""
    return keep_mask(rng, rows, i * ((KB + 7) // 8 * 8) + k, threshold, BLOCK_M, BLOCK_K)


@triton.jit
def load_diagonal(core_ptr, block, R, BLOCK_R: tl.constexpr):
    """c[o, i] as (1, BLOCK_R) in float32; block = o·I + i."""
    offs_r = tl.arange(0, BLOCK_R)
    return tl.load(core_ptr + block * R + offs_r, mask=offs_r < R, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_dense(core_ptr, block, a, b, R, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr):
    """K[o, i] from row a and column b on, as (BLOCK_A, BLOCK_B); block = o·I + i."""
    offs_a, offs_b = a + tl.arange(0, BLOCK_A), b + tl.arange(0, BLOCK_B)
    mask = (offs_a < R)[:, None] & (offs_b < R)[None, :]
    return tl.load(core_ptr + (block * R + offs_a[:, None]) * R + offs_b[None, :], mask=mask, other=0.0)


@triton.jit
def load_hidden(
    z_ptr, rng_ptr, rows, i, first, M, R, stride_zm, threshold, keep_scale,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """drop(z_i) from column `first` on, (BLOCK_M, WIDTH) in float32."""
    offs_r = first + tl.arange(0, WIDTH)
    mask = (rows < M)[:, None] & (offs_r < R)[None, :]
    z = tl.load(z_ptr + rows[:, None] * stride_zm + i * R + offs_r[None, :], mask=mask, other=0.0).to(tl.float32)
    if DROPOUT == "rank":
        kept = keep_mask(load_rng(rng_ptr), rows, i * BLOCK_R + first, threshold, BLOCK_M, WIDTH)
        z = tl.where(kept, z * keep_scale, 0.0)
    return z


@triton.jit
def load_up(up_ptr, offs_n, mask_n, R, DOT: tl.constexpr, BLOCK_R: tl.constexpr):
    """A tile of B, (columns, BLOCK_R)."""
    offs_r = tl.arange(0, BLOCK_R)
    mask = mask_n[:, None] & (offs_r < R)[None, :]
    return tl.load(up_ptr + offs_n[:, None].to(tl.int64) * R + offs_r[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit(do_not_specialize=["M", "R", "stride_zm", "threshold"])
def _mix_kernel(
    z_ptr, core_ptr, s_ptr, rng_ptr, M, R, stride_zm, threshold, keep_scale,
    O: tl.constexpr, I: tl.constexpr, CORE: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK_R: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """S_o = drop(Σ_i drop(z_i) ∘ c[o, i]), or Σ_i z_i K[o, i]ᵀ; grid (row tiles, O).

    A dense core is multiplied in chunks of the rank: over the whole rank at once, float32 products spill registers.
    """
    R, stride_zm = in_eights(R, ALIGNED), in_eights(stride_zm, ALIGNED)
    o = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mixed = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for i in range(I):
        if CORE == "dense":
            for b in range(0, BLOCK_R, CHUNK_R):
                z = load_hidden(
                    z_ptr, rng_ptr, rows, i, b, M, R, stride_zm, threshold, keep_scale,
                    DROPOUT, BLOCK_M, BLOCK_R, CHUNK_R,
                )  # fmt: skip
                core = load_dense(core_ptr, o * I + i, 0, b, R, BLOCK_R, CHUNK_R)
                mixed = add_dot(mixed, z.to(DOT), tl.trans(core.to(DOT)), PRECISION)
        else:
            z = load_hidden(
                z_ptr, rng_ptr, rows, i, 0, M, R, stride_zm, threshold, keep_scale, DROPOUT, BLOCK_M, BLOCK_R, BLOCK_R
            )
            if CORE == "diagonal":
                z *= load_diagonal(core_ptr, o * I + i, R, BLOCK_R)
            mixed += z
    if DROPOUT == "core":
        kept = keep_mask(load_rng(rng_ptr), rows, o * BLOCK_R, threshold, BLOCK_M, BLOCK_R)
        mixed = tl.where(kept, mixed * keep_scale, 0.0)
    pointers = s_ptr + (rows[:, None] * O + o) * R + offs_r[None, :]
    tl.store(pointers, mixed.to(s_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (offs_r < R)[None, :])


@triton.jit
def load_rows(s_ptr, rows, o, M, R, stride_sm, DOT: tl.constexpr, BLOCK_R: tl.constexpr):
    """S_o (rows, BLOCK_R)"""
    offs_r = tl.arange(0, BLOCK_R)
    mask = (rows < M)[:, None] & (offs_r < R)[None, :]
    return tl.load(s_ptr + rows[:, None] * stride_sm + o * R + offs_r[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit(do_not_specialize=["M", "R", "stride_sm"])
def _expand_kernel(
    s_ptr, up_ptr, bias_ptr, y_ptr, scale_ptr, scale, M, NB, R, stride_sm, stride_ym,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """y_o = s · S_o Bᵀ + b_o; grid (row tiles, O · column tiles)."""
    R, stride_sm = in_eights(R, ALIGNED), in_eights(stride_sm, ALIGNED)
    column_tiles = tl.cdiv(NB, BLOCK_N)
    o = (tl.program_id(1) // column_tiles).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < NB
    mixed = load_rows(s_ptr, rows, o, M, R, stride_sm, DOT, BLOCK_R)
    up = load_up(up_ptr, offs_n, mask_n, R, DOT, BLOCK_R)
    y = tl.dot(mixed, tl.trans(up), input_precision=PRECISION) * load_scale(scale_ptr, scale)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + o * NB + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    pointers = y_ptr + rows[:, None] * stride_ym + o * NB + offs_n[None, :]
    tl.store(pointers, y.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["M", "R", "stride_zm", "threshold"])
def _fused_kernel(
    x_ptr, weight_ptr, bias_ptr, down_ptr, up_ptr, core_ptr, y_ptr, z_ptr, rng_ptr, scale_ptr, scale,
    M, K, NB, R, stride_xm, stride_wn, stride_wk, stride_ym, stride_zm, threshold, keep_scale,
    O: tl.constexpr, CORE: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """fused: y and z in one pass, x Aᵀ inside every column tile's K loop; grid (row tiles · O · column tiles,).

    Neighbouring programs share rows of x, which the L2 then reads once.
    """
    R, stride_zm = in_eights(R, ALIGNED), in_eights(stride_zm, ALIGNED)
    column_tiles = tl.cdiv(NB, BLOCK_N)
    column_tile = tl.program_id(0) % (O * column_tiles)
    o = (column_tile // column_tiles).to(tl.int64)
    rows = (tl.program_id(0) // (O * column_tiles)).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = column_tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_n, mask_r = rows < M, offs_n < NB, offs_r < R
    if DROPOUT == "input":
        rng = load_rng(rng_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    hidden = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0
        ).to(DOT)
        weight = tl.load(
            weight_ptr + (o * NB + offs_n[None, :]) * stride_wn + offs_k[:, None].to(tl.int64) * stride_wk,
            mask=mask_n[None, :] & mask_k[:, None],
            other=0.0,
        )
        down = tl.load(
            down_ptr + offs_r[None, :].to(tl.int64) * K + offs_k[:, None],
            mask=mask_r[None, :] & mask_k[:, None],
            other=0.0,
        )
        acc = add_dot(acc, x, weight.to(DOT), PRECISION)
        if DROPOUT == "input":
            x = tl.where(keep_input(rng, rows, 0, k, K, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        hidden = add_dot(hidden, x, down.to(DOT), PRECISION)
    if DROPOUT == "input":
        hidden *= keep_scale
    z = hidden.to(z_ptr.dtype.element_ty)
    if column_tile == 0:
        tl.store(z_ptr + rows[:, None] * stride_zm + offs_r[None, :], z, mask=mask_m[:, None] & mask_r[None, :])
    mixed = tl.where(mask_r[None, :], z.to(tl.float32), 0.0)  # an Inf in x makes NaN of the rank's padding
    if DROPOUT == "rank":
        kept = keep_mask(load_rng(rng_ptr), rows, 0, threshold, BLOCK_M, BLOCK_R)
        mixed = tl.where(kept, mixed * keep_scale, 0.0)
    if CORE == "diagonal":
        mixed *= load_diagonal(core_ptr, o, R, BLOCK_R)
    if CORE == "dense":
        core = load_dense(core_ptr, o, 0, 0, R, BLOCK_R, BLOCK_R)
        mixed = tl.dot(mixed.to(DOT), tl.trans(core.to(DOT)), input_precision=PRECISION)
    if DROPOUT == "core":
        kept = keep_mask(load_rng(rng_ptr), rows, o * BLOCK_R, threshold, BLOCK_M, BLOCK_R)
        mixed = tl.where(kept, mixed * keep_scale, 0.0)
    up = load_up(up_ptr, offs_n, mask_n, R, DOT, BLOCK_R)
    acc += tl.dot(mixed.to(DOT), tl.trans(up), input_precision=PRECISION) * load_scale(scale_ptr, scale)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o * NB + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    pointers = y_ptr + rows[:, None] * stride_ym + o * NB + offs_n[None, :]
    tl.store(pointers, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def core_kind(core: Tensor | None) -> str:
    return "none" if core is None else "diagonal" if core.dim() == 3 else "dense"


class Drop(NamedTuple):
    """A call's dropout as kernels take it."""

    rng: Tensor | None
    threshold: int
    keep_scale: float
    place: str  # "none" | "input" | "rank" | "core"


def drop_of(dropout: Dropout) -> Drop:
    return Drop(*dropout_arguments(dropout.rng, dropout.p), "none" if dropout.rng is None else dropout.on)


def shrink(x: Tensor, down: Tensor, in_blocks: int, drop: Drop, config: LowRankLinearConfig) -> Tensor:
    """-> z (M, I·R)"""
    tile, rank = config.shrink, down.shape[0]
    z = x.new_empty(x.shape[0], in_blocks * rank)
    rng, threshold, keep_scale, place = drop
    launch(
        _shrink_kernel,
        (triton.cdiv(x.shape[0], tile.rows), in_blocks),
        (x, down, z, rng, x.shape[0], down.shape[1], rank, x.stride(0), z.stride(0), threshold, keep_scale),
        {"DROPOUT": place, **dot_constants(x.dtype), **blocks(config, rank, BLOCK_M=tile.rows, BLOCK_K=tile.columns)},
        tile,
    )
    return z


def mix(z: Tensor, factors: Factors, out_blocks: int, drop: Drop, config: LowRankLinearConfig) -> Tensor:
    """-> S (M, O·R); without a core and a mask on z or S, that is z itself"""
    rng, threshold, keep_scale, place = drop
    core, rank = factors.core, factors.rank
    if core is None and place not in ("rank", "core"):
        return z
    tile = config.mix
    s = z.new_empty(z.shape[0], out_blocks * rank)
    launch(
        _mix_kernel,
        (triton.cdiv(z.shape[0], tile.rows), out_blocks),
        (z, core, s, rng, z.shape[0], rank, z.stride(0), threshold, keep_scale),
        {
            "O": out_blocks, "I": z.shape[1] // rank, "CORE": core_kind(core), "DROPOUT": place,
            **dot_constants(z.dtype), **blocks(config, rank, z.stride(0), BLOCK_M=tile.rows, CHUNK_R=config.chunk_r),
        },
        tile,
    )  # fmt: skip
    return s


def expand(
    s: Tensor, factors: Factors, bias: Tensor | None, out_features: int, config: LowRankLinearConfig
) -> Tensor:
    """-> y (M, N) without the frozen weight's part"""
    tile, (columns, rank) = config.expand, factors.up.shape
    y = s.new_empty(s.shape[0], out_features)
    scale = scale_arguments(factors.scale)
    launch(
        _expand_kernel,
        (triton.cdiv(s.shape[0], tile.rows), out_features // columns * triton.cdiv(columns, tile.columns)),
        (s, factors.up, bias, y, *scale, s.shape[0], columns, rank, s.stride(0), y.stride(0)),
        {**dot_constants(s.dtype), **blocks(config, rank, s.stride(0), BLOCK_M=tile.rows, BLOCK_N=tile.columns)},
        tile,
    )
    return y


def fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, drop: Drop, config: LowRankLinearConfig
) -> tuple[Tensor, Tensor]:
    """-> y (M, N), z (M, R)"""
    tile, (columns, rank), (down, up, core, scale, _) = config.fused, factors.up.shape, factors
    rows, out_features = x.shape[0], weight.shape[0]
    y, z = x.new_empty(rows, out_features), x.new_empty(rows, rank)
    rng, threshold, keep_scale, place = drop
    launch(
        _fused_kernel,
        (triton.cdiv(rows, tile.rows) * (out_features // columns) * triton.cdiv(columns, tile.columns),),
        (
            x, weight, bias, down, up, core, y, z, rng, *scale_arguments(scale), rows, x.shape[1], columns, rank,
            x.stride(0), weight.stride(0), weight.stride(1), y.stride(0), z.stride(0), threshold, keep_scale,
        ),
        {
            "O": out_features // columns, "CORE": core_kind(core), "DROPOUT": place, **dot_constants(x.dtype),
            **blocks(config, rank, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth),
        },
        tile,
    )  # fmt: skip
    return y, z


def blocks(config: LowRankLinearConfig, rank: int, stride: int = 0, **sizes: int) -> dict[str, int]:
    """stride: from row to row of what is R wide, if the kernel takes it as a number"""
    return {**sizes, "BLOCK_R": config.block_r, "ALIGNED": (rank | stride) % 8 == 0}
