"""`reconstruct` in Triton: every block of the dense update, and the base under it, in one launch.

The mathematics and every shape: peft_kernels/ops/reconstruct.py. O × I blocks of (NB, KB); rank R of any size.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Factors
from .common import DOT_TYPES, add_dot, architecture, dot_constants, launch, load_scale, scale_arguments
from .config import reconstruct_tile
from .lowrank_linear_fwd import load_dense
from .replay import again


@triton.jit
def _load_up(up_ptr, rows, first, NB, R, BLOCK_N: tl.constexpr, CHUNK_R: tl.constexpr):
    """B from column `first` on, (BLOCK_N, CHUNK_R)."""
    offs_r = first + tl.arange(0, CHUNK_R)
    mask = (rows < NB)[:, None] & (offs_r < R)[None, :]
    return tl.load(up_ptr + rows[:, None] * R + offs_r[None, :], mask=mask, other=0.0)


@triton.jit
def _part(x, KIND: tl.constexpr):
    """x rounded to KIND, and what that leaves of it: nothing of what does not fit KIND's range, or is no number."""
    part = x.to(KIND)
    rest = x.to(tl.float32) - part.to(tl.float32)
    return part, tl.where(tl.abs(rest) < float("inf"), rest, 0.0)


@triton.jit
def _add_product(
    acc, a, b, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr,
    KIND: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + a · b, in float32: the products of their parts of type KIND, but for those below 2⁻²⁴ of the first."""
    for i in tl.static_range(A_PARTS):
        a_part, a = _part(a, KIND)
        rest = b
        for _ in tl.static_range(min(B_PARTS, 3 - i)):
            b_part, rest = _part(rest, KIND)
            acc = add_dot(acc, a_part.to(DOT), b_part.to(DOT), PRECISION)
    return acc


@triton.jit(do_not_specialize=["NB", "O", "I"])
def _reconstruct_kernel(
    down_ptr, up_ptr, core_ptr, base_ptr, out_ptr, scale_ptr, scale, NB, KB, R, O, I,
    CORE: tl.constexpr, SHARED_BASE: tl.constexpr,
    DOWN_PARTS: tl.constexpr, UP_PARTS: tl.constexpr, CORE_PARTS: tl.constexpr, MIXED_PARTS: tl.constexpr,
    KIND: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
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
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for b in range(0, R, CHUNK_R):
        offs_r = b + tl.arange(0, CHUNK_R)
        mask_r = offs_r < R
        if CORE == "dense":
            mixed = tl.zeros((BLOCK_N, CHUNK_R), tl.float32)
            for a in range(0, R, CHUNK_R):
                up = _load_up(up_ptr, rows, a, NB, R, BLOCK_N, CHUNK_R)
                core = load_dense(core_ptr, block, a, b, R, CHUNK_R, CHUNK_R)
                mixed = _add_product(mixed, up, core, UP_PARTS, CORE_PARTS, KIND, DOT, PRECISION)
            mixed = tl.where(mask_r[None, :], mixed, 0.0)  # an Inf in B makes NaN of the rank's padding
        else:
            mixed = _load_up(up_ptr, rows, b, NB, R, BLOCK_N, CHUNK_R)
            if CORE == "diagonal":
                diagonal = tl.load(core_ptr + block * R + offs_r, mask=mask_r, other=0.0)
                mixed = mixed.to(tl.float32) * diagonal.to(tl.float32)[None, :]
        down = tl.load(
            down_ptr + offs_r[:, None].to(tl.int64) * KB + offs_k[None, :],
            mask=mask_r[:, None] & mask_k[None, :],
            other=0.0,
        )
        acc = _add_product(acc, mixed, down, MIXED_PARTS, DOWN_PARTS, KIND, DOT, PRECISION)
    acc *= load_scale(scale_ptr, scale)
    if base_ptr is not None:
        base_offsets = rows[:, None] * KB + offs_k[None, :] if SHARED_BASE else offsets
        base = tl.load(base_ptr + base_offsets, mask=mask, other=0.0)
        acc += base.to(tl.float32)
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # how many bfloat16 numbers hold one


def _core_kind(core: Tensor | None) -> str:
    return "none" if core is None else "diagonal" if core.dim() == 3 else "dense"


def _products(down: Tensor, up: Tensor, core: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
    """How operands are multiplied: the sum is to be float32's, so that only its rounding to `dtype` is lost.

    Two factors of one half type multiply exactly into float32. For any other half-precision result each operand becomes
    a sum of bfloat16 numbers, 8 bits each, which have float32's range: three for a float32, and two for the product of
    two bfloat16. Two for a float32 would round wrongly too often: 17 bits are few where an update cancels its base.
    """
    kind, parts = dtype, [1, 1, 1, 1]
    if dtype != torch.float32 and not (core is None and down.dtype == up.dtype == dtype):
        kind, parts = torch.bfloat16, [_PARTS[t.dtype] for t in (down, up, up if core is None else core)]
        exact_mixed = _core_kind(core) == "diagonal" and up.dtype == core.dtype == kind
        parts.append(parts[1] if core is None else 2 if exact_mixed else 3)
    names = "DOWN_PARTS", "UP_PARTS", "CORE_PARTS", "MIXED_PARTS"
    return {"KIND": DOT_TYPES[kind], **dot_constants(kind), **dict(zip(names, parts))}


@again
def reconstruct_fwd(factors: Factors, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    """-> (O·NB, I·KB) in `dtype`; base (NB, KB) under every block of a stack, or as large as the result"""
    down, up, core, scale, _ = factors
    rows, (rank, columns), (out_blocks, in_blocks) = up.shape[0], down.shape, factors.blocks
    products = _products(down, up, core, dtype)
    split = max(products["DOWN_PARTS"], products["UP_PARTS"], products["CORE_PARTS"]) > 1
    tile = reconstruct_tile(rank, _core_kind(core), dtype, split, architecture(down.device))
    out = down.new_empty((out_blocks * rows, in_blocks * columns), dtype=dtype)
    launch(
        _reconstruct_kernel,
        (out_blocks * in_blocks * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),),
        (down, up, core, base, out, *scale_arguments(scale), rows, columns, rank, out_blocks, in_blocks),
        {
            "CORE": _core_kind(core), "SHARED_BASE": base is not None and base.shape != out.shape,
            **products, "BLOCK_N": tile.rows, "BLOCK_K": tile.columns, "CHUNK_R": tile.depth,
        },
        tile,
    )  # fmt: skip
    return out
