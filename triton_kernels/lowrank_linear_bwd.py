"""The backward kernels of `lowrank_linear`, and their launchers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Factors
from .common import (
    add_dot,
    architecture,
    dot_constants,
    in_eights,
    keep_mask,
    launch,
    load_rng,
    load_scale,
    scale_arguments,
)
from .config import LowRankLinearConfig, Tile, strip_tiles
from .lowrank_linear_fwd import (
    Drop,
    blocks,
    core_kind,
    keep_input,
    load_dense,
    load_diagonal,
    load_hidden,
    load_rows,
    load_up,
)


@triton.jit(do_not_specialize=["M", "R", "stride_sm", "tiles"])
def _up_bwd_kernel(
    dy_ptr, s_ptr, up_ptr, t_ptr, d_up_ptr, scale_ptr, scale, M, NB, R, stride_dym, stride_sm, tiles,
    O: tl.constexpr, NEEDS_T: tl.constexpr, NEEDS_UP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One read of dy: t[chunk] = dy_o B over this chunk of columns, and s · dy_oᵀ S_o over this strip of rows.

    t (chunks, M, O·R) and d_up (O · strips, NB, R) are float32 partial sums; grid (O · chunks, strips).
    """
    R, stride_sm = in_eights(R, ALIGNED), in_eights(stride_sm, ALIGNED)
    chunks = tl.cdiv(NB, BLOCK_N)
    o = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    strip = tl.program_id(1).to(tl.int64)
    offs_n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < NB, offs_r < R
    if NEEDS_T:
        up = load_up(up_ptr, offs_n, mask_n, R, DOT, BLOCK_R)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for tile in range(tiles):
        rows = (strip * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = rows < M
        dy = tl.load(
            dy_ptr + rows[:, None] * stride_dym + o * NB + offs_n[None, :],
            mask=mask_m[:, None] & mask_n[None, :],
            other=0.0,
        ).to(DOT)
        if NEEDS_T:
            t = tl.dot(dy, up, input_precision=PRECISION)
            pointers = t_ptr + ((chunk * M + rows[:, None]) * O + o) * R + offs_r[None, :]
            tl.store(pointers, t, mask=mask_m[:, None] & mask_r[None, :])
        if NEEDS_UP:
            mixed = load_rows(s_ptr, rows, o, M, R, stride_sm, DOT, BLOCK_R)
            acc = add_dot(acc, tl.trans(dy), mixed, PRECISION)
    if NEEDS_UP:
        part = o * tl.num_programs(1) + strip
        pointers = d_up_ptr + (part * NB + offs_n[:, None]) * R + offs_r[None, :]
        tl.store(pointers, acc * load_scale(scale_ptr, scale), mask=mask_n[:, None] & mask_r[None, :])


@triton.jit
def load_d_mixed(
    t_ptr, rng_ptr, scale_ptr, scale, rows, o, first, M, R, chunks, threshold, keep_scale,
    O: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr = 0,
):  # fmt: skip
    """dS_o = s · Σ_chunks t, through S's mask, from column `first` on; (BLOCK_M, WIDTH) in float32.

    CHUNKS: their number, if it is a constant: without a loop in it, a loop around this still loads ahead.
    """
    offs_r = first + tl.arange(0, WIDTH)
    mask = (rows < M)[:, None] & (offs_r < R)[None, :]
    pointers = t_ptr + (rows[:, None] * O + o) * R + offs_r[None, :]
    total = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for _ in tl.static_range(CHUNKS):
        total += tl.load(pointers, mask=mask, other=0.0)
        pointers += tl.cast(M, tl.int64) * O * R
    if CHUNKS == 0:
        for _ in range(chunks):
            total += tl.load(pointers, mask=mask, other=0.0)
            pointers += tl.cast(M, tl.int64) * O * R
    total *= load_scale(scale_ptr, scale)
    if DROPOUT == "core":
        kept = keep_mask(load_rng(rng_ptr), rows, o * BLOCK_R + first, threshold, BLOCK_M, WIDTH)
        total = tl.where(kept, total * keep_scale, 0.0)
    return total


@triton.jit
def drop_hidden(
    dz, rng_ptr, rows, i, threshold, keep_scale, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr
):
    """dz_i through z's mask; with x's mask its 1/(1-p) only."""
    if DROPOUT == "rank":
        kept = keep_mask(load_rng(rng_ptr), rows, i * BLOCK_R, threshold, BLOCK_M, BLOCK_R)
        dz = tl.where(kept, dz * keep_scale, 0.0)
    if DROPOUT == "input":
        dz *= keep_scale
    return dz


@triton.jit(do_not_specialize=["M", "R", "chunks", "threshold"])
def _hidden_bwd_kernel(
    t_ptr, core_ptr, dz_ptr, rng_ptr, scale_ptr, scale, M, R, chunks, threshold, keep_scale,
    O: tl.constexpr, I: tl.constexpr, CORE: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK_R: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """dz_i = Σ_o dS_o ∘ c[o, i], or Σ_o dS_o K[o, i], through the mask; grid (row tiles, I)."""
    R = in_eights(R, ALIGNED)
    i = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    dz = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for o in range(O):
        if CORE == "dense":
            for a in range(0, BLOCK_R, CHUNK_R):
                d_mixed = load_d_mixed(
                    t_ptr, rng_ptr, scale_ptr, scale, rows, o, a, M, R, chunks, threshold, keep_scale,
                    O, DROPOUT, BLOCK_M, BLOCK_R, CHUNK_R,
                )  # fmt: skip
                core = load_dense(core_ptr, o * I + i, a, 0, R, CHUNK_R, BLOCK_R)
                dz = add_dot(dz, d_mixed.to(DOT), core.to(DOT), PRECISION)
        else:
            d_mixed = load_d_mixed(
                t_ptr, rng_ptr, scale_ptr, scale, rows, o, 0, M, R, chunks, threshold, keep_scale,
                O, DROPOUT, BLOCK_M, BLOCK_R, BLOCK_R,
            )  # fmt: skip
            if CORE == "diagonal":
                d_mixed *= load_diagonal(core_ptr, o * I + i, R, BLOCK_R)
            dz += d_mixed
    dz = drop_hidden(dz, rng_ptr, rows, i, threshold, keep_scale, DROPOUT, BLOCK_M, BLOCK_R)
    pointers = dz_ptr + (rows[:, None] * I + i) * R + offs_r[None, :]
    tl.store(pointers, dz.to(dz_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (offs_r < R)[None, :])


@triton.jit(do_not_specialize=["M", "R", "stride_zm", "chunks", "threshold", "tiles"])
def _core_bwd_kernel(
    t_ptr, z_ptr, d_core_ptr, rng_ptr, scale_ptr, scale, M, R, stride_zm, chunks, threshold, keep_scale, tiles,
    O: tl.constexpr, I: tl.constexpr, CORE: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK_R: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """dc[o, i] = Σ_rows dS_o ∘ z_i, or rows `a` to `a + CHUNK_R` of dK[o, i] = dS_oᵀ z_i, over this strip of rows.

    grid (O · I, strips) for a diagonal core, (O · I, strips, BLOCK_R / CHUNK_R) for a dense one
    """
    R, stride_zm = in_eights(R, ALIGNED), in_eights(stride_zm, ALIGNED)
    block = tl.program_id(0).to(tl.int64)
    strip = tl.program_id(1).to(tl.int64)
    a = tl.program_id(2) * CHUNK_R
    o, i = block // I, block % I
    offs_a, offs_r = a + tl.arange(0, CHUNK_R), tl.arange(0, BLOCK_R)
    part = strip * (O * I) + block
    if CORE == "diagonal":
        acc = tl.zeros((BLOCK_R,), tl.float32)
    else:
        acc = tl.zeros((CHUNK_R, BLOCK_R), tl.float32)
    for tile in range(tiles):
        rows = (strip * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        z = load_hidden(
            z_ptr, rng_ptr, rows, i, 0, M, R, stride_zm, threshold, keep_scale, DROPOUT, BLOCK_M, BLOCK_R, BLOCK_R
        )
        if CORE == "diagonal":
            d_mixed = load_d_mixed(
                t_ptr, rng_ptr, scale_ptr, scale, rows, o, 0, M, R, chunks, threshold, keep_scale,
                O, DROPOUT, BLOCK_M, BLOCK_R, BLOCK_R,
            )  # fmt: skip
            acc += tl.sum(d_mixed * z, axis=0)
        else:
            d_mixed = load_d_mixed(
                t_ptr, rng_ptr, scale_ptr, scale, rows, o, a, M, R, chunks, threshold, keep_scale,
                O, DROPOUT, BLOCK_M, BLOCK_R, CHUNK_R,
            )  # fmt: skip
            acc = add_dot(acc, tl.trans(d_mixed.to(DOT)), z.to(DOT), PRECISION)
    if CORE == "diagonal":
        tl.store(d_core_ptr + part * R + offs_r, acc, mask=offs_r < R)
    else:
        pointers = d_core_ptr + (part * R + offs_a[:, None]) * R + offs_r[None, :]
        tl.store(pointers, acc, mask=(offs_a < R)[:, None] & (offs_r < R)[None, :])


@triton.jit(do_not_specialize=["M", "R", "stride_dzm", "threshold", "tiles"])
def _down_bwd_kernel(
    x_ptr, dz_ptr, down_ptr, dx_ptr, d_down_ptr, rng_ptr, scale_ptr, scale,
    M, KB, R, stride_xm, stride_dzm, stride_dxm, threshold, keep_scale, tiles,
    I: tl.constexpr, DROPOUT: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_DOWN: tl.constexpr, CHUNKS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One read of x: dz_iᵀ drop(x_i) over this strip of rows, and dx_i = mask ∘ (dz_i A).

    CHUNKS: dz_ptr points to so many chunks of t, and dz is made of them as hidden_bwd makes it where there is no core.
    d_down (I · strips, R, KB) holds float32 partial sums; grid (I · column tiles, strips).
    """
    R, stride_dzm = in_eights(R, ALIGNED), in_eights(stride_dzm, ALIGNED)
    column_tiles = tl.cdiv(KB, BLOCK_K)
    i = (tl.program_id(0) // column_tiles).to(tl.int64)
    first_column = tl.program_id(0) % column_tiles * BLOCK_K
    strip = tl.program_id(1).to(tl.int64)
    offs_k = first_column + tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_k, mask_r = offs_k < KB, offs_r < R
    # On its side the result has fewer than 64 rows, which sm_100 would multiply in tf32 (config.py, _float32_tiles);
    # sm_90 spills nothing so, either.
    FLIPPED: tl.constexpr = BLOCK_R >= BLOCK_K and tl.float32 == DOT and PRECISION == "ieee"
    HALF: tl.constexpr = x_ptr.dtype.element_ty if NEEDS_DOWN else dx_ptr.dtype.element_ty
    if NEEDS_X:
        down = tl.load(
            down_ptr + offs_r[:, None].to(tl.int64) * KB + offs_k[None, :],
            mask=mask_r[:, None] & mask_k[None, :],
            other=0.0,
        ).to(DOT)
    if DROPOUT == "input":
        rng = load_rng(rng_ptr)
    acc = tl.zeros((BLOCK_K, BLOCK_R) if FLIPPED else (BLOCK_R, BLOCK_K), tl.float32)
    for tile in range(tiles):
        rows = (strip * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & mask_k[None, :]
        if CHUNKS:
            total = load_d_mixed(
                dz_ptr, rng_ptr, scale_ptr, scale, rows, 0, 0, M, R, 0, threshold, keep_scale,
                1, DROPOUT, BLOCK_M, BLOCK_R, BLOCK_R, CHUNKS,
            )  # fmt: skip
            dz = drop_hidden(total, rng_ptr, rows, 0, threshold, keep_scale, DROPOUT, BLOCK_M, BLOCK_R)
            dz = dz.to(HALF).to(DOT)
        else:
            dz = tl.load(
                dz_ptr + rows[:, None] * stride_dzm + i * R + offs_r[None, :],
                mask=(rows < M)[:, None] & mask_r[None, :],
                other=0.0,
            ).to(DOT)
        if DROPOUT == "input":
            kept = keep_input(rng, rows, i, first_column, KB, threshold, BLOCK_M, BLOCK_K)
        if NEEDS_DOWN:
            x = tl.load(x_ptr + rows[:, None] * stride_xm + i * KB + offs_k[None, :], mask=mask, other=0.0).to(DOT)
            if DROPOUT == "input":
                x = tl.where(kept, x, 0.0)
            acc = add_dot(acc, tl.trans(x), dz, PRECISION) if FLIPPED else add_dot(acc, tl.trans(dz), x, PRECISION)
        if NEEDS_X:
            dx = tl.dot(dz, down, input_precision=PRECISION)
            if DROPOUT == "input":
                dx = tl.where(kept, dx, 0.0)
            pointers = dx_ptr + rows[:, None] * stride_dxm + i * KB + offs_k[None, :]
            tl.store(pointers, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if NEEDS_DOWN:
        part = i * tl.num_programs(1) + strip
        pointers = d_down_ptr + (part * R + offs_r[:, None]) * KB + offs_k[None, :]
        tl.store(pointers, tl.trans(acc) if FLIPPED else acc, mask=mask_r[:, None] & mask_k[None, :])


def up_bwd(
    dy: Tensor, s: Tensor | None, factors: Factors, needs_t: bool, needs_up: bool, config: LowRankLinearConfig
) -> tuple[Tensor | None, Tensor | None]:
    """-> t (chunks, M, O·R) float32 with dy_o B = Σ_chunks t; partial sums of d_up"""
    tile, up, rows = config.up_bwd, factors.up, dy.shape[0]
    (columns, rank), chunks = up.shape, triton.cdiv(up.shape[0], tile.columns)
    out_blocks = dy.shape[1] // columns
    tiles, strips = row_strips(rows, tile, out_blocks * chunks, dy.device)
    t = dy.new_empty(chunks, rows, out_blocks * rank, dtype=torch.float32) if needs_t else None
    partials = dy.new_empty(out_blocks * strips, columns, rank, dtype=torch.float32) if needs_up else None
    launch(
        _up_bwd_kernel,
        (out_blocks * chunks, strips),
        (
            dy, s if needs_up else None, up, t, partials, *scale_arguments(factors.scale), rows, columns, rank,
            dy.stride(0), s.stride(0) if needs_up else 0, tiles,
        ),
        {
            "O": out_blocks, "NEEDS_T": needs_t, "NEEDS_UP": needs_up, **dot_constants(dy.dtype),
            **blocks(config, rank, s.stride(0) if needs_up else 0, BLOCK_M=tile.rows, BLOCK_N=tile.columns),
        },
        tile,
    )  # fmt: skip
    return t, partials


def hidden_bwd(t: Tensor, factors: Factors, drop: Drop, dtype: torch.dtype, config: LowRankLinearConfig) -> Tensor:
    """-> dz (M, I·R)"""
    (chunks, rows, columns), rank, (_, in_blocks) = t.shape, factors.rank, factors.blocks
    dz = t.new_empty(rows, in_blocks * rank, dtype=dtype)
    rng, threshold, keep_scale, place = drop
    launch(
        _hidden_bwd_kernel,
        (triton.cdiv(rows, config.hidden_bwd.rows), in_blocks),
        (
            t, factors.core, dz, rng, *scale_arguments(factors.scale), rows, rank, chunks, threshold, keep_scale,
        ),
        {
            "O": columns // rank, "I": in_blocks, "CORE": core_kind(factors.core), "DROPOUT": place,
            **dot_constants(dtype), **blocks(config, rank, BLOCK_M=config.hidden_bwd.rows, CHUNK_R=config.chunk_r),
        },
        config.hidden_bwd,
    )  # fmt: skip
    return dz


def core_bwd(t: Tensor, z: Tensor, factors: Factors, drop: Drop, config: LowRankLinearConfig) -> Tensor:
    """-> partial sums of d_core"""
    core, (chunks, rows, _) = factors.core, t.shape
    out_blocks, in_blocks, rank = core.shape[:3]
    tiles, strips = row_strips(rows, config.core_bwd, out_blocks * in_blocks, t.device)
    partials = t.new_empty(strips, *core.shape)
    rng, threshold, keep_scale, place = drop
    scale = scale_arguments(factors.scale)
    launch(
        _core_bwd_kernel,
        (out_blocks * in_blocks, strips, 1 if core.dim() == 3 else config.block_r // config.chunk_r),
        (t, z, partials, rng, *scale, rows, rank, z.stride(0), chunks, threshold, keep_scale, tiles),
        {
            "O": out_blocks, "I": in_blocks, "CORE": core_kind(core), "DROPOUT": place, **dot_constants(z.dtype),
            **blocks(config, rank, z.stride(0), BLOCK_M=config.core_bwd.rows, CHUNK_R=config.chunk_r),
        },
        config.core_bwd,
    )  # fmt: skip
    return partials


def down_bwd(
    x: Tensor | None, dz: Tensor, factors: Factors, drop: Drop, needs: tuple[bool, bool], config: LowRankLinearConfig
) -> tuple[Tensor | None, Tensor | None]:
    """-> mask ∘ (dz A) (M, K), partial sums of d_down; `needs` says which

    dz: (M, I·R), or where there is no core t (chunks, M, R), of which the kernel makes dz itself
    """
    (needs_x, needs_down), chunks = needs, dz.shape[0] if dz.dim() == 3 else 0
    tile, (rank, columns), (rows, width) = config.down_bwd, factors.down.shape, dz.shape[-2:]
    in_blocks, column_tiles = width // rank, triton.cdiv(columns, tile.columns)
    tiles, strips = row_strips(rows, tile, in_blocks * column_tiles, dz.device)
    dx = dz.new_empty(rows, in_blocks * columns, dtype=config.dtype) if needs_x else None
    partials = dz.new_empty(in_blocks * strips, rank, columns, dtype=torch.float32) if needs_down else None
    rng, threshold, keep_scale, place = drop
    launch(
        _down_bwd_kernel,
        (in_blocks * column_tiles, strips),
        (
            x if needs_down else None, dz, factors.down, dx, partials, rng, *scale_arguments(factors.scale),
            rows, columns, rank, x.stride(0) if needs_down else 0, dz.stride(-2), dx.stride(0) if needs_x else 0,
            threshold, keep_scale, tiles,
        ),
        {
            "I": in_blocks, "DROPOUT": place, "NEEDS_X": needs_x, "NEEDS_DOWN": needs_down, "CHUNKS": chunks,
            **dot_constants(config.dtype),
            **blocks(config, rank, dz.stride(-2), BLOCK_M=tile.rows, BLOCK_K=tile.columns),
        },
        tile,
    )  # fmt: skip
    return dx, partials


def row_strips(rows: int, tile: Tile, column_tiles: int, device: torch.device) -> tuple[int, int]:
    """Row tiles per strip, and the number of strips."""
    tiles = strip_tiles(rows, tile, column_tiles, architecture(device))
    return tiles, triton.cdiv(rows, tiles * tile.rows)
