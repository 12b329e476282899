"""Many thin products in one launch, whatever their shapes and forms: the other half of `weight_distance`.

Records and their meaning: peft_kernels/dispatch/weight_distance.py. A product of M × N elements is the sum of terms
factor · op(left) · op(right); "nn", "nt" and "tn" say what is transposed.

A matrix of N + 1 columns, N a multiple of the tile's, would cost one more tile for a single column. So that column is
peeled off: programs of the last column tile compute it beside their tile from the same elements of `left`. It may be
read and written elsewhere, as `right_last` and `result_last` ask.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    add_dot,
    architecture,
    device_tables,
    dot_constants,
    is_aligned,
    launch,
    load_pointer,
    load_size,
    place,
)
from .config import Tile, weight_distance_config

_FORMS = {"nn": 0, "nt": 1, "tn": 2}

# What a product's row of the table holds: a matrix or a vector takes two numbers, its address and its stride.
_RESULT, _LAST, _ROWS, _COLUMNS = (tl.constexpr(i) for i in (0, 2, 4, 5))
_FORM, _ACCUMULATE, _FIRST_TERM, _TERMS, _FIRST_TILE = (tl.constexpr(i) for i in range(6, 11))
_PRODUCT = tl.constexpr(11)
# And a term's.
_LEFT, _RIGHT, _RIGHT_LAST, _FACTOR, _DEPTH, _ALIGNED = (tl.constexpr(i) for i in (0, 2, 4, 6, 7, 8))
_TERM = tl.constexpr(9)


@triton.jit
def _multiply(
    product_ptr, term_ptr, tile_m, tile_n, with_last,
    TRANS_A: tl.constexpr, TRANS_B: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """op(left) · op(right) of one term for one tile, (BLOCK_M, BLOCK_N), and for the last column, (BLOCK_M,).

    ALIGNED promises that rows begin at multiples of 16 bytes and are multiples of 16 bytes long.
    """
    FOUR: tl.constexpr = 4 if ALIGNED else 1
    M = load_size(product_ptr + _ROWS, FOUR if TRANS_A else 1).to(tl.int32)
    N = load_size(product_ptr + _COLUMNS, 1 if TRANS_B else FOUR).to(tl.int32)
    K = load_size(term_ptr + _DEPTH, 1 if TRANS_A and not TRANS_B else FOUR).to(tl.int32)
    left_ptr = load_pointer(term_ptr + _LEFT, tl.float32, ALIGNED)
    right_ptr = load_pointer(term_ptr + _RIGHT, tl.float32, ALIGNED)
    last_ptr = load_pointer(term_ptr + _RIGHT_LAST, tl.float32)
    stride_left = load_size(term_ptr + _LEFT + 1, FOUR)
    stride_right = load_size(term_ptr + _RIGHT + 1, FOUR)
    stride_last = load_size(term_ptr + _RIGHT_LAST + 1)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    if TRANS_A:
        left_offsets = offs_k[None, :] * stride_left + offs_m[:, None]
        step_left = BLOCK_K * stride_left
    else:
        left_offsets = offs_m[:, None] * stride_left + offs_k[None, :]
        step_left = BLOCK_K
    if TRANS_B:
        right_offsets = offs_n[None, :] * stride_right + offs_k[:, None]
        step_right = BLOCK_K
    else:
        right_offsets = offs_k[:, None] * stride_right + offs_n[None, :]
        step_right = BLOCK_K * stride_right
    mask_m, mask_n = (offs_m < M)[:, None], (offs_n < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    column = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        left = tl.load(left_ptr + left_offsets, mask=mask_m & mask_k[None, :], other=0.0)
        right = tl.load(right_ptr + right_offsets, mask=mask_k[:, None] & mask_n, other=0.0)
        last = tl.load(last_ptr + offs_k * stride_last, mask=mask_k & with_last, other=0.0)
        acc = add_dot(acc, left, right, PRECISION)
        column += left * last[None, :]
        left_ptr += step_left
        right_ptr += step_right
        last_ptr += BLOCK_K * stride_last
    return acc, tl.sum(column, axis=1)


@triton.jit
def _multiply_by_form(
    form, product_ptr, term_ptr, tile_m, tile_n, with_last, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The loop for the product's form; all programs of a launch choose their own. The tile is M × N, K at a time."""
    if form == 0:
        acc, last = _multiply(
            product_ptr, term_ptr, tile_m, tile_n, with_last, False, False, ALIGNED, PRECISION, M, N, K
        )  # fmt: skip
    elif form == 1:
        acc, last = _multiply(
            product_ptr, term_ptr, tile_m, tile_n, with_last, False, True, ALIGNED, PRECISION, M, N, K
        )  # fmt: skip
    else:
        acc, last = _multiply(
            product_ptr, term_ptr, tile_m, tile_n, with_last, True, False, ALIGNED, PRECISION, M, N, K
        )  # fmt: skip
    return acc, last


@triton.jit
def _product_kernel(
    products_ptr, terms_ptr, tiles_ptr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """result (+)= Σ factor · op(left) · op(right), terms in their order, for one tile of one product; grid (tiles,)."""
    product_ptr = products_ptr + tl.load(tiles_ptr + tl.program_id(0)) * _PRODUCT
    M, N = load_size(product_ptr + _ROWS).to(tl.int32), load_size(product_ptr + _COLUMNS).to(tl.int32)
    tile = (tl.program_id(0) - tl.load(product_ptr + _FIRST_TILE)).to(tl.int32)
    column_tiles = tl.maximum(tl.cdiv(N, BLOCK_N), 1)
    tile_m, tile_n = tile // column_tiles, tile % column_tiles
    with_last = (tl.load(product_ptr + _LAST) != 0) & (tile_n == column_tiles - 1)
    form, first, terms = tl.load(product_ptr + _FORM), tl.load(product_ptr + _FIRST_TERM), tl.load(product_ptr + _TERMS)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total_last = tl.zeros((BLOCK_M,), tl.float32)
    for term in range(first, first + terms):
        term_ptr = terms_ptr + term * _TERM
        if tl.load(term_ptr + _ALIGNED) != 0:
            acc, last = _multiply_by_form(
                form, product_ptr, term_ptr, tile_m, tile_n, with_last, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
            )
        else:
            acc, last = _multiply_by_form(
                form, product_ptr, term_ptr, tile_m, tile_n, with_last, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
            )
        factor_ptr = load_pointer(term_ptr + _FACTOR, tl.float32)
        factor = tl.load(factor_ptr, mask=tl.load(term_ptr + _FACTOR) != 0, other=1.0)
        total += factor * acc
        total_last += factor * last
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_n < N)[None, :]
    accumulate = tl.load(product_ptr + _ACCUMULATE) != 0
    pointers = load_pointer(product_ptr + _RESULT, tl.float32)
    pointers += offs_m[:, None] * load_size(product_ptr + _RESULT + 1) + offs_n[None, :]
    total += tl.load(pointers, mask=mask & accumulate, other=0.0)
    tl.store(pointers, total, mask=mask)
    pointers = load_pointer(product_ptr + _LAST, tl.float32) + offs_m * load_size(product_ptr + _LAST + 1)
    total_last += tl.load(pointers, mask=mask_m & with_last & accumulate, other=0.0)
    tl.store(pointers, total_last, mask=mask_m & with_last)


class ProductTables(NamedTuple):
    """What one launch needs; `products` keeps the tensors that the tables point to."""

    products: Sequence[Any]
    rows: Tensor
    terms: Tensor
    tiles: Tensor  # (programs,): the product that each works on
    tile: Tile


def make_product_tables(products: Sequence[Any]) -> ProductTables:
    device = products[0].result.device
    tile = weight_distance_config(architecture(device)).product
    rows, terms, counts = [], [], []
    for product in products:
        (M, N), result_last = product.result.shape, product.result_last
        elsewhere = [term.right_last for term in product.terms if term.right_last is not None]
        if result_last is None and (elsewhere or N % tile.columns == 1):
            N, result_last = N - 1, product.result[:, N - 1]
        accumulate, form = int(product.accumulate), product.form
        rows.append((
            *place(product.result), *place(result_last), M, N, _FORMS[form], accumulate,
            len(terms), len(product.terms), sum(counts),
        ))  # fmt: skip
        counts.append(-(-M // tile.rows) * max(1, -(-N // tile.columns)))
        terms += [_term(term, form, M, N, result_last is not None) for term in product.terms]
    tables = [torch.tensor(table, dtype=torch.int64) for table in (rows, terms)]
    tiles = torch.repeat_interleave(torch.tensor(counts))
    return ProductTables(products, *device_tables(device, *tables, tiles), tile)


def _term(term: Any, form: str, M: int, N: int, with_last: bool) -> tuple[int, ...]:
    depth = term.left.shape[0 if form == "tn" else 1]
    last = term.right_last
    if with_last and last is None:
        last = term.right[N] if form == "nt" else term.right[:, N]
    along = {"nn": (depth, N), "nt": (depth, depth), "tn": (M, N)}[form]  # the lengths of rows that are read
    aligned = is_aligned(term.left) and is_aligned(term.right) and all(length % 4 == 0 for length in along)
    factor = 0 if term.factor is None else term.factor.data_ptr()
    return (*place(term.left), *place(term.right), *place(last if with_last else None), factor, depth, int(aligned))


def multiply(tables: ProductTables) -> None:
    """All products of the tables in one launch."""
    tile = tables.tile
    launch(
        _product_kernel,
        (tables.tiles.shape[0],),
        (tables.rows, tables.terms, tables.tiles),
        {
            "PRECISION": dot_constants(torch.float32)["PRECISION"],
            "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth,
        },
        tile,
    )  # fmt: skip
