"""Many thin products in one launch, whatever their shapes and forms: the other half of `weight_distance`.

Records and their meaning: peft_kernels/records.py. A product of M × N elements is the sum of terms
factor · op(left) · op(right); "nn", "nt" and "tn" say what is transposed.

A matrix of N + 1 columns, N a multiple of four, would end in a tile of a single column or be read by 4 bytes instead of
16. So that column is peeled off: programs of its own compute it without tensor cores. It may be read and written
elsewhere, as `right_last` and `result_last` ask. Terms of depth 1 are outer products of two vectors.

Every program is one long chain of steps; those of the deepest products start first.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..records import Product, Results, Term
from ..tables import Address, Rows, place
from .common import add_afresh, launch, load_pointer, load_size
from .config import Tile
from .weight_distance_records import is_aligned

_FORMS = {"nn": 0, "nt": 1, "tn": 2}

# What a product's row of the table holds: a matrix or a vector takes two numbers, its address and its stride.
_RESULT, _LAST, _ROWS, _COLUMNS = (tl.constexpr(i) for i in (0, 2, 4, 5))
_FORM, _ACCUMULATE, _FIRST_TERM, _TERMS, _FIRST_TILE = (tl.constexpr(i) for i in range(6, 11))
_PRODUCT = tl.constexpr(11)
# And a term's; where the depth is 1, left and right are vectors.
_LEFT, _RIGHT, _RIGHT_LAST, _FACTOR, _DEPTH = (tl.constexpr(i) for i in (0, 2, 4, 6, 7))
_TERM = tl.constexpr(8)


@triton.jit
def _multiply(
    product_ptr, term_ptr, offs_m, offs_n,
    TRANS_A: tl.constexpr, TRANS_B: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """op(left) · op(right) of one term for one tile, (BLOCK_M, BLOCK_N).

    ALIGNED promises that rows begin at multiples of 16 bytes and are multiples of 16 bytes long.
    """
    FOUR: tl.constexpr = 4 if ALIGNED else 1
    M = load_size(product_ptr + _ROWS, FOUR if TRANS_A else 1).to(tl.int32)
    N = load_size(product_ptr + _COLUMNS, 1 if TRANS_B else FOUR).to(tl.int32)
    K = load_size(term_ptr + _DEPTH, 1 if TRANS_A and not TRANS_B else FOUR).to(tl.int32)
    left_ptr = load_pointer(term_ptr + _LEFT, tl.float32, ALIGNED)
    right_ptr = load_pointer(term_ptr + _RIGHT, tl.float32, ALIGNED)
    stride_left = load_size(term_ptr + _LEFT + 1, FOUR)
    stride_right = load_size(term_ptr + _RIGHT + 1, FOUR)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):  # offsets and masks anew every time: kept, they would cost registers
        offs_k = k + tl.arange(0, BLOCK_K)
        if TRANS_A:
            left_offsets = offs_k[None, :] * stride_left + offs_m[:, None]
        else:
            left_offsets = offs_m[:, None] * stride_left + offs_k[None, :]
        if TRANS_B:
            right_offsets = offs_n[None, :] * stride_right + offs_k[:, None]
        else:
            right_offsets = offs_k[:, None] * stride_right + offs_n[None, :]
        left = tl.load(left_ptr + left_offsets, mask=(offs_m < M)[:, None] & (offs_k < K)[None, :], other=0.0)
        right = tl.load(right_ptr + right_offsets, mask=(offs_k < K)[:, None] & (offs_n < N)[None, :], other=0.0)
        acc = add_afresh(acc, left, right, PRECISION)
    return acc


@triton.jit
def _multiply_last(
    product_ptr, term_ptr, offs_m,
    TRANS_A: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """op(left) · the last column of op(right), (BLOCK_M,). ALIGNED as above, of left alone."""
    FOUR: tl.constexpr = 4 if ALIGNED else 1
    M = load_size(product_ptr + _ROWS, FOUR if TRANS_A else 1).to(tl.int32)
    K = load_size(term_ptr + _DEPTH, 1 if TRANS_A else FOUR).to(tl.int32)
    left_ptr = load_pointer(term_ptr + _LEFT, tl.float32, ALIGNED)
    last_ptr = load_pointer(term_ptr + _RIGHT_LAST, tl.float32)
    stride_left, stride_last = load_size(term_ptr + _LEFT + 1, FOUR), load_size(term_ptr + _RIGHT_LAST + 1)
    offs_k = tl.arange(0, BLOCK_K)
    if TRANS_A:
        left_offsets = offs_k[None, :] * stride_left + offs_m[:, None]
        step_left = BLOCK_K * stride_left
    else:
        left_offsets = offs_m[:, None] * stride_left + offs_k[None, :]
        step_left = BLOCK_K
    column = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        left = tl.load(left_ptr + left_offsets, mask=(offs_m < M)[:, None] & mask_k[None, :], other=0.0)
        last = tl.load(last_ptr + offs_k * stride_last, mask=mask_k, other=0.0)
        column += left * last[None, :]
        left_ptr += step_left
        last_ptr += BLOCK_K * stride_last
    return tl.sum(column, axis=1)


@triton.jit
def _load_vector(place_ptr, offsets, mask):
    return tl.load(load_pointer(place_ptr, tl.float32) + offsets * load_size(place_ptr + 1), mask=mask, other=0.0)


@triton.jit
def _load_factor(term_ptr):
    return tl.load(load_pointer(term_ptr + _FACTOR, tl.float32), mask=tl.load(term_ptr + _FACTOR) != 0, other=1.0)


@triton.jit
def _write_tile(
    product_ptr, terms_ptr, tile_m, tile_n, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    form, first, terms = tl.load(product_ptr + _FORM), tl.load(product_ptr + _FIRST_TERM), tl.load(product_ptr + _TERMS)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < tl.load(product_ptr + _ROWS).to(tl.int32)
    mask_n = offs_n < tl.load(product_ptr + _COLUMNS).to(tl.int32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # What all forms' loops have in common would be computed before this one and held in half of the registers.
    for term in tl.range(first, first + terms, disable_licm=True):
        term_ptr = terms_ptr + term * _TERM
        if tl.load(term_ptr + _DEPTH) == 1:
            left = _load_vector(term_ptr + _LEFT, offs_m, mask_m)
            acc = left[:, None] * _load_vector(term_ptr + _RIGHT, offs_n, mask_n)[None, :]
        elif form == 0:
            acc = _multiply(
                product_ptr, term_ptr, offs_m, offs_n, False, False, ALIGNED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
            )
        elif form == 1:
            acc = _multiply(
                product_ptr, term_ptr, offs_m, offs_n, False, True, ALIGNED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
            )
        else:
            acc = _multiply(
                product_ptr, term_ptr, offs_m, offs_n, True, False, ALIGNED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
            )
        total += _load_factor(term_ptr) * acc
    mask = mask_m[:, None] & mask_n[None, :]
    pointers = load_pointer(product_ptr + _RESULT, tl.float32)
    pointers += offs_m[:, None] * load_size(product_ptr + _RESULT + 1) + offs_n[None, :]
    accumulate = tl.load(product_ptr + _ACCUMULATE) != 0
    total += tl.load(pointers, mask=mask & accumulate, other=0.0)
    tl.store(pointers, total, mask=mask)


@triton.jit
def _write_last(
    product_ptr, terms_ptr, tile_m, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    form, first, terms = tl.load(product_ptr + _FORM), tl.load(product_ptr + _FIRST_TERM), tl.load(product_ptr + _TERMS)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < tl.load(product_ptr + _ROWS).to(tl.int32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for term in range(first, first + terms):
        term_ptr = terms_ptr + term * _TERM
        if tl.load(term_ptr + _DEPTH) == 1:
            last = tl.load(load_pointer(term_ptr + _RIGHT_LAST, tl.float32))
            last = _load_vector(term_ptr + _LEFT, offs_m, mask_m) * last
        elif form == 2:
            last = _multiply_last(product_ptr, term_ptr, offs_m, True, ALIGNED, BLOCK_M, BLOCK_K)
        else:
            last = _multiply_last(product_ptr, term_ptr, offs_m, False, ALIGNED, BLOCK_M, BLOCK_K)
        total += _load_factor(term_ptr) * last
    pointers = load_pointer(product_ptr + _LAST, tl.float32) + offs_m * load_size(product_ptr + _LAST + 1)
    accumulate = tl.load(product_ptr + _ACCUMULATE) != 0
    total += tl.load(pointers, mask=mask_m & accumulate, other=0.0)
    tl.store(pointers, total, mask=mask_m)


@triton.jit
def _product_kernel(
    products_ptr, terms_ptr, tiles_ptr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """result (+)= Σ factor · op(left) · op(right), terms in their order, for one tile of one product; grid (tiles,)."""
    product_ptr = products_ptr + tl.load(tiles_ptr + tl.program_id(0)) * _PRODUCT
    tile = (tl.program_id(0) - tl.load(product_ptr + _FIRST_TILE)).to(tl.int32)
    column_tiles = tl.cdiv(tl.load(product_ptr + _COLUMNS).to(tl.int32), BLOCK_N)
    all_tiles = column_tiles + (tl.load(product_ptr + _LAST) != 0).to(tl.int32)
    tile_m, tile_n = tile // all_tiles, tile % all_tiles
    if tile_n < column_tiles:
        _write_tile(product_ptr, terms_ptr, tile_m, tile_n, ALIGNED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        _write_last(product_ptr, terms_ptr, tile_m, ALIGNED, BLOCK_M, BLOCK_K)


class Products(NamedTuple):
    """How many programs, what tile and which promise."""

    tile: Tile
    programs: int
    aligned: bool

    def at(self, sections: Sequence[Tensor], results: Results | None) -> Sequence[Tensor]:
        """Products, terms, and the product that each program works on."""
        return sections


def make_products(products: Sequence[Product], tile: Tile) -> tuple[Products, list[Rows]]:
    """-> and their sections: rows, terms, tiles"""
    rows, terms, tiles, aligned = [], [], [], True
    for index, product in enumerate(sorted(products, key=_depth, reverse=True)):
        (M, N), last = product.result.shape, place(product.result_last)
        elsewhere = [term.right_last for term in product.terms if term.right_last is not None]
        with_last = product.result_last is not None
        if not with_last and (elsewhere or N % 4 == 1):
            N, last, with_last = N - 1, _column(product.result, N - 1), True
        accumulate, form = int(product.accumulate), product.form
        rows.append((
            *place(product.result), *last, M, N, _FORMS[form], accumulate, len(terms), len(product.terms), len(tiles),
        ))  # fmt: skip
        tiles += [index] * (-(-M // tile.rows) * (-(-N // tile.columns) + with_last))
        terms += [_term(term, form, N, with_last) for term in product.terms]
        aligned &= all(_is_aligned(term, form, M, N) for term in product.terms)
    return Products(tile, len(tiles), aligned), [rows, terms, [tiles]]


def _depth(product: Product) -> int:
    return sum(_term_depth(term, product.form) for term in product.terms)


def _term_depth(term: Term, form: str) -> int:
    return term.left.shape[0 if form == "tn" else 1]


def _column(matrix: Tensor, column: int) -> tuple[Address, int]:
    return Address(matrix, column * matrix.stride(1) * matrix.element_size()), matrix.stride(0)


def _row(matrix: Tensor, row: int) -> tuple[Address, int]:
    return Address(matrix, row * matrix.stride(0) * matrix.element_size()), matrix.stride(1)


def _term(term: Term, form: str, N: int, with_last: bool) -> tuple[int | Address, ...]:
    depth, last = _term_depth(term, form), place(term.right_last)
    if with_last and term.right_last is None:
        last = (_row if form == "nt" else _column)(term.right, N)
    left, right = place(term.left), place(term.right)
    if depth == 1:
        left = (_row if form == "tn" else _column)(term.left, 0)
        right = (_column if form == "nt" else _row)(term.right, 0)
    return (*left, *right, *last, 0 if term.factor is None else Address(term.factor), depth)


def _is_aligned(term: Term, form: str, M: int, N: int) -> bool:
    """What is read of a term in rows is read by 16 bytes."""
    depth = _term_depth(term, form)
    along = {"nn": (depth, N), "nt": (depth, depth), "tn": (M, N)}[form]  # the lengths of rows that are read
    matrices = (term.left, term.right) if N else (term.left,)
    return depth == 1 or (all(map(is_aligned, matrices)) and all(length % 4 == 0 for length in along))


def multiply(run: Products, tensors: Sequence[Tensor], tf32: bool) -> None:
    """All products of one stage in one launch."""
    tile, precision = run.tile, "tf32" if tf32 else "tf32x3"
    constants = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth, "ALIGNED": run.aligned}
    launch(_product_kernel, (run.programs,), tensors, constants | {"PRECISION": precision}, tile)
