"""`reconstruct` in Triton: every block of the dense update, and the base under it, in one launch.

The mathematics and every shape: peft_kernels/ops/reconstruct.py. O × I blocks of (NB, KB); rank R of any size.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import add_dot, architecture, dot_constants, launch, load_scale, scale_arguments
from .config import reconstruct_tile
from .lowrank_linear_fwd import Scale, core_kind, load_dense


@triton.jit
def _load_up(up_ptr, rows, first, NB, R, DOT: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK_R: tl.constexpr):
    """B from column `first` on, (BLOCK_N, CHUNK_R)."""
    offs_r = first + tl.arange(0, CHUNK_R)
    mask = (rows < NB)[:, None] & (offs_r < R)[None, :]
    return tl.load(up_ptr + rows[:, None] * R + offs_r[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit(do_not_specialize=["NB", "R", "O", "I"])
def _reconstruct_kernel(
    down_ptr, up_ptr, core_ptr, base_ptr, out_ptr, scale_ptr, scale, NB, KB, R, O, I,
    CORE: tl.constexpr, SHARED_BASE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK_R: tl.constexpr,
):  # fmt: skip
    """out[o, i] = base + s · B core[o, i] A for one tile; grid (O · I · row tiles · column tiles,).

    With a base under every matrix of a stack, neighbouring programs take the same tile of different matrices: the base
    is then read from memory once. Otherwise they take neighbouring columns.
    """
    column_tiles = tl.cdiv(KB, BLOCK_K)
    tiles = tl.cdiv(NB, BLOCK_N) * column_tiles
    if SHARED_BASE:
        block, tile = tl.program_id(0) % O, tl.program_id(0) // O
    else:
        block, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    block = block.to(tl.int64)
    o, i = block // I, block % I
    rows = (tile // column_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tile % column_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < KB
    mask = (rows < NB)[:, None] & mask_k[None, :]
    offsets = (o * NB + rows[:, None]) * I * KB + i * KB + offs_k[None, :]
    if base_ptr is not None:  # on its way while the products run
        base_offsets = rows[:, None] * KB + offs_k[None, :] if SHARED_BASE else offsets
        base = tl.load(base_ptr + base_offsets, mask=mask, other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for b in range(0, R, CHUNK_R):
        offs_r = b + tl.arange(0, CHUNK_R)
        mask_r = offs_r < R
        if CORE == "dense":
            mixed = tl.zeros((BLOCK_N, CHUNK_R), tl.float32)
            for a in range(0, R, CHUNK_R):
                up = _load_up(up_ptr, rows, a, NB, R, DOT, BLOCK_N, CHUNK_R)
                core = load_dense(core_ptr, block, a, b, R, CHUNK_R, CHUNK_R).to(DOT)
                mixed = add_dot(mixed, up, core, PRECISION)
            mixed = tl.where(mask_r[None, :], mixed, 0.0)  # an Inf in B makes NaN of the rank's padding
        else:
            mixed = _load_up(up_ptr, rows, b, NB, R, DOT, BLOCK_N, CHUNK_R)
            if CORE == "diagonal":
                diagonal = tl.load(core_ptr + block * R + offs_r, mask=mask_r, other=0.0)
                mixed *= diagonal.to(tl.float32)[None, :]
        down = tl.load(
            down_ptr + offs_r[:, None].to(tl.int64) * KB + offs_k[None, :],
            mask=mask_r[:, None] & mask_k[None, :],
            other=0.0,
        ).to(DOT)
        acc = add_dot(acc, mixed, down, PRECISION)
    acc *= load_scale(scale_ptr, scale)
    if base_ptr is not None:
        acc += base.to(tl.float32)
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _products(dtype: torch.dtype, exact: bool) -> dict[str, Any]:
    """Operand type and precision: the sum is to be float32's, so that only its rounding to `dtype` is lost.

    Two factors of one half type multiply exactly into float32. Anything else is multiplied as float32: by three tf32
    products where the result is half precision (22 bits of each operand), as torch's own matmul does where it is not.
    """
    if exact or dtype == torch.float32:
        return dot_constants(dtype)
    return {"DOT": tl.float32, "PRECISION": "tf32x3"}


def reconstruct_fwd(
    down: Tensor, up: Tensor, core: Tensor | None, scale: Scale, base: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """-> (O·NB, I·KB) in `dtype`; base (NB, KB) under every block of a stack, or as large as the result"""
    (rank, columns), rows = down.shape, up.shape[0]
    out_blocks, in_blocks = (1, 1) if core is None else core.shape[:2]
    exact = core is None and down.dtype == up.dtype == dtype != torch.float32
    tile = reconstruct_tile(rank, core_kind(core), dtype, exact, architecture(down.device))
    out = down.new_empty(out_blocks * rows, in_blocks * columns, dtype=dtype)
    launch(
        _reconstruct_kernel,
        (out_blocks * in_blocks * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),),
        (down, up, core, base, out, *scale_arguments(scale), rows, columns, rank, out_blocks, in_blocks),
        {
            "CORE": core_kind(core), "SHARED_BASE": base is not None and base.shape != out.shape,
            **_products(dtype, exact), "BLOCK_N": tile.rows, "BLOCK_K": tile.columns, "CHUNK_R": tile.depth,
        },
        tile,
    )  # fmt: skip
    return out
