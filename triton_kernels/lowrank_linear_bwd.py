"""The backward kernels of `lowrank_linear`, and their launchers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import NULL, add_dot, keep_mask, load_rng, load_scale, programs
from .config import strip_tiles
from .lowrank_linear_fwd import (
    Drop,
    Setting,
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
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One read of dy: t[chunk] = dy_o B over this chunk of columns, d_up[o, strip] = s · dy_oᵀ S_o over this strip.

    t (chunks, M, O·R) and d_up (O · strips, NB, R) are float32 partial sums; grid (O · chunks, strips).
    """
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
def _load_d_mixed(
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
def _drop_hidden(
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
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK_R: tl.constexpr,
):  # fmt: skip
    """dz_i = Σ_o dS_o ∘ c[o, i], or Σ_o dS_o K[o, i], through the mask; grid (row tiles, I)."""
    i = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    dz = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for o in range(O):
        if CORE == "dense":
            for a in range(0, BLOCK_R, CHUNK_R):
                d_mixed = _load_d_mixed(
                    t_ptr, rng_ptr, scale_ptr, scale, rows, o, a, M, R, chunks, threshold, keep_scale,
                    O, DROPOUT, BLOCK_M, BLOCK_R, CHUNK_R,
                )  # fmt: skip
                core = load_dense(core_ptr, o * I + i, a, 0, R, CHUNK_R, BLOCK_R)
                dz = add_dot(dz, d_mixed.to(DOT), core.to(DOT), PRECISION)
        else:
            d_mixed = _load_d_mixed(
                t_ptr, rng_ptr, scale_ptr, scale, rows, o, 0, M, R, chunks, threshold, keep_scale,
                O, DROPOUT, BLOCK_M, BLOCK_R, BLOCK_R,
            )  # fmt: skip
            if CORE == "diagonal":
                d_mixed *= load_diagonal(core_ptr, o * I + i, R, BLOCK_R)
            dz += d_mixed
    dz = _drop_hidden(dz, rng_ptr, rows, i, threshold, keep_scale, DROPOUT, BLOCK_M, BLOCK_R)
    pointers = dz_ptr + (rows[:, None] * I + i) * R + offs_r[None, :]
    tl.store(pointers, dz.to(dz_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (offs_r < R)[None, :])


@triton.jit(do_not_specialize=["M", "R", "stride_zm", "chunks", "threshold", "tiles"])
def _core_bwd_kernel(
    t_ptr, z_ptr, d_core_ptr, rng_ptr, scale_ptr, scale, M, R, stride_zm, chunks, threshold, keep_scale, tiles,
    O: tl.constexpr, I: tl.constexpr, CORE: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK_R: tl.constexpr,
):  # fmt: skip
    """dc[o, i] = Σ_rows dS_o ∘ z_i, or rows `a` to `a + CHUNK_R` of dK[o, i] = dS_oᵀ z_i, over this strip of rows.

    grid (O · I, strips) for a diagonal core, (O · I, strips, BLOCK_R / CHUNK_R) for a dense one
    """
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
            d_mixed = _load_d_mixed(
                t_ptr, rng_ptr, scale_ptr, scale, rows, o, 0, M, R, chunks, threshold, keep_scale,
                O, DROPOUT, BLOCK_M, BLOCK_R, BLOCK_R,
            )  # fmt: skip
            acc += tl.sum(d_mixed * z, axis=0)
        else:
            d_mixed = _load_d_mixed(
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
    x_ptr, dz_ptr, down_ptr, dx_ptr, d_down_ptr, rng_ptr, scale_ptr, scale, M, KB, R, stride_xm, stride_dzm, stride_dxm,
    threshold, keep_scale, tiles,
    I: tl.constexpr, DROPOUT: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_DOWN: tl.constexpr, CHUNKS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One read of x: d_down[i, strip] = dz_iᵀ drop(x_i) over this strip of rows, and dx_i = mask ∘ (dz_i A).

    CHUNKS: dz_ptr points to so many chunks of t, and dz is made of them as hidden_bwd makes it where there is no core.
    d_down (I · strips, R, KB) holds float32 partial sums; grid (I · column tiles, strips).
    """
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
            total = _load_d_mixed(
                dz_ptr, rng_ptr, scale_ptr, scale, rows, 0, 0, M, R, 0, threshold, keep_scale,
                1, DROPOUT, BLOCK_M, BLOCK_R, BLOCK_R, CHUNKS,
            )  # fmt: skip
            dz = _drop_hidden(total, rng_ptr, rows, 0, threshold, keep_scale, DROPOUT, BLOCK_M, BLOCK_R)
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


class UpBwd:
    def __init__(self, to: Setting, needs_t: bool, needs_up: bool):
        self.tile, self.rank, self.columns = to.config.up_bwd, to.shape.rank, to.shape.block_rows
        self.blocks, self.chunks = to.shape.out_blocks, -(-self.columns // self.tile.columns)
        self.programs = programs(self.tile, to.device) // (self.blocks * self.chunks)
        self.needs_t, self.needs_up = needs_t, needs_up
        self.kernel = to.kernel(
            _up_bwd_kernel, self.tile, "O",
            NEEDS_T=needs_t, NEEDS_UP=needs_up, BLOCK_M=self.tile.rows, BLOCK_N=self.tile.columns,
        )  # fmt: skip

    def __call__(
        self, dy: Tensor, s: Tensor | None, up: Tensor, scale: tuple[Tensor, float], plain: bool
    ) -> tuple[Tensor, Tensor]:
        """-> t (chunks, M, O·R) float32 with dy_o B = Σ_chunks t; d_up's sums (O · strips, NB, R) float32"""
        rows, rank = dy.shape[0], self.rank
        tiles = strip_tiles(rows, self.tile, self.programs)
        strips = -(-rows // (tiles * self.tile.rows))
        width, partials, t = self.blocks * rank, NULL, NULL
        if self.needs_t:
            t = dy.new_empty((self.chunks, rows, width), dtype=torch.float32)
        if self.needs_up:
            partials = dy.new_empty((self.blocks * strips, self.columns, rank), dtype=torch.float32)
        stride_dy, stride_s = (dy.shape[1], width) if plain else (dy.stride(0), 0 if s is None else s.stride(0))
        self.kernel.launch(
            (self.blocks * self.chunks, strips, 1),
            (dy, NULL if s is None else s, up, t, partials, scale[0]),
            (scale[1], rows, self.columns, rank, stride_dy, stride_s, tiles),
            plain,
        )
        return t, partials


class HiddenBwd:
    def __init__(self, to: Setting):
        self.tile, self.rank, self.blocks = to.config.hidden_bwd, to.shape.rank, to.shape.in_blocks
        self.dtype = to.dtype
        self.kernel = to.kernel(
            _hidden_bwd_kernel, self.tile, "O", "I", "CORE", "DROPOUT", "CHUNK_R", BLOCK_M=self.tile.rows
        )

    def __call__(self, t: Tensor, core: Tensor, scale: tuple[Tensor, float], drop: Drop) -> Tensor:
        """-> dz (M, I·R)"""
        chunks, rows, _ = t.shape
        dz = t.new_empty((rows, self.blocks * self.rank), dtype=self.dtype)
        rng, threshold, keep_scale = drop
        self.kernel.launch(
            (-(-rows // self.tile.rows), self.blocks, 1),
            (t, core, dz, rng, scale[0]),
            (scale[1], rows, self.rank, chunks, threshold, keep_scale),
            True,
        )
        return dz


class CoreBwd:
    def __init__(self, to: Setting):
        self.tile, self.rank, self.blocks = to.config.core_bwd, to.shape.rank, to.shape.out_blocks * to.shape.in_blocks
        self.parts = 1 if to.core == "diagonal" else to.config.block_r // to.config.chunk_r
        self.programs = programs(self.tile, to.device) // self.blocks
        self.kernel = to.kernel(
            _core_bwd_kernel, self.tile, "O", "I", "CORE", "DROPOUT", "CHUNK_R", BLOCK_M=self.tile.rows
        )

    def __call__(
        self, t: Tensor, z: Tensor, core: Tensor, scale: tuple[Tensor, float], drop: Drop, plain: bool
    ) -> Tensor:
        """-> d_core's sums (strips, …) float32"""
        chunks, rows, _ = t.shape
        tiles = strip_tiles(rows, self.tile, self.programs)
        strips = -(-rows // (tiles * self.tile.rows))
        partials = t.new_empty((strips, *core.shape))
        rng, threshold, keep_scale = drop
        stride = z.shape[1] if plain else z.stride(0)
        self.kernel.launch(
            (self.blocks, strips, self.parts),
            (t, z, partials, rng, scale[0]),
            (scale[1], rows, self.rank, stride, chunks, threshold, keep_scale, tiles),
            plain,
        )
        return partials


class DownBwd:
    """chunks: of t, from which the kernel makes dz itself; 0: it reads dz"""

    def __init__(self, to: Setting, needs_x: bool, needs_down: bool, chunks: int = 0):
        self.tile, self.rank, self.columns = to.config.down_bwd, to.shape.rank, to.shape.block_columns
        self.blocks, self.column_tiles = to.shape.in_blocks, -(-self.columns // self.tile.columns)
        self.programs = programs(self.tile, to.device) // (self.blocks * self.column_tiles)
        self.needs_x, self.needs_down, self.dtype = needs_x, needs_down, to.dtype
        self.kernel = to.kernel(
            _down_bwd_kernel, self.tile, "I", "DROPOUT",
            NEEDS_X=needs_x, NEEDS_DOWN=needs_down, CHUNKS=chunks, BLOCK_M=self.tile.rows, BLOCK_K=self.tile.columns,
        )  # fmt: skip

    def __call__(
        self, x: Tensor | None, dz: Tensor, down: Tensor, scale: tuple[Tensor, float], drop: Drop, plain: bool
    ) -> tuple[Tensor, Tensor]:
        """dz (M, I·R), or t -> mask ∘ (dz A) (M, K); d_down's sums (I · strips, R, KB) float32"""
        rows, width = dz.shape[-2:]
        tiles = strip_tiles(rows, self.tile, self.programs)
        strips = -(-rows // (tiles * self.tile.rows))
        features, dx, partials = self.blocks * self.columns, NULL, NULL
        if self.needs_x:
            dx = dz.new_empty((rows, features), dtype=self.dtype)
        if self.needs_down:
            partials = dz.new_empty((self.blocks * strips, self.rank, self.columns), dtype=torch.float32)
        rng, threshold, keep_scale = drop
        stride_x, stride_dz = (features, width) if plain else (0 if x is None else x.stride(0), dz.stride(-2))
        self.kernel.launch(
            (self.blocks * self.column_tiles, strips, 1),
            (NULL if x is None else x, dz, down, dx, partials, rng, scale[0]),
            (
                scale[1], rows, self.columns, self.rank, stride_x, stride_dz, features, threshold, keep_scale, tiles,
            ),
            plain,
        )  # fmt: skip
        return dx, partials
