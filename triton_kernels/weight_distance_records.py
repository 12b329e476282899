"""The table of matrices that both kernels of `weight_distance` read: its layout, how it is made and read."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Distance, Results
from ..tables import Address, Rows, place
from .common import load_pointer, load_size
from .config import WeightDistanceConfig

_LIVE_KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}

# What a matrix's row of the table holds: a matrix or a vector takes two numbers, its address and its stride.
TARGET, BASE, ERROR, LIVE = (tl.constexpr(i) for i in (0, 2, 4, 6))
LIVE_KIND, ROWS, COLUMNS, FIRST_TILE, TILES, PAIRS = (tl.constexpr(i) for i in range(8, 14))
LEFT, RIGHT, RANK, PAIR = (tl.constexpr(i) for i in (14, 16, 18, 5))  # of the first pair; numbers for each
TARGET_BIAS, BASE_BIAS, LIVE_BIAS, SHIFT_LAST = (tl.constexpr(i) for i in (24, 26, 28, 30))
SHIFT, SHIFT_VECTOR, BIAS_GRADIENT = (tl.constexpr(i) for i in (32, 34, 36))
LIVE_BIAS_KIND, DEPTH = tl.constexpr(38), tl.constexpr(39)
RECORD = tl.constexpr(40)


@triton.jit
def load_live(place_ptr, kind_ptr, rows, columns, mask, ALIGNED: tl.constexpr):
    """A tile of `live` in float32, whatever it is stored in; without one, the mask is empty. Vectors have columns=0."""
    offsets = rows * load_size(place_ptr + 1, 8 if ALIGNED else 1) + columns
    kind = tl.load(kind_ptr)
    if kind == 1:
        live = tl.load(load_pointer(place_ptr, tl.float32, ALIGNED) + offsets, mask=mask, other=0.0)
    elif kind == 2:
        live = tl.load(load_pointer(place_ptr, tl.bfloat16, ALIGNED) + offsets, mask=mask, other=0.0).to(tl.float32)
    elif kind == 3:
        live = tl.load(load_pointer(place_ptr, tl.float16, ALIGNED) + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        live = tl.load(load_pointer(place_ptr, tl.float64, ALIGNED) + offsets, mask=mask, other=0.0).to(tl.float32)
    return live


@triton.jit
def load_tile(place_ptr, rows, columns, mask, ALIGNED: tl.constexpr):
    return tl.load(pointers_of(place_ptr, rows, columns, ALIGNED), mask=mask, other=0.0)


@triton.jit
def pointers_of(place_ptr, rows, columns, ALIGNED: tl.constexpr):
    """To elements of a float32 matrix, or of a vector's `rows` with columns=0."""
    pointer, stride = load_pointer(place_ptr, tl.float32, ALIGNED), load_size(place_ptr + 1, 4 if ALIGNED else 1)
    return pointer + rows * stride + columns


class Distances(NamedTuple):
    """How many matrices and programs, what tiles and which promises."""

    count: int
    programs: int
    config: WeightDistanceConfig
    aligned: bool
    thin_aligned: bool

    def at(self, sections: Sequence[Tensor], results: Results) -> tuple[Tensor, ...]:
        """Records, the matrix that each program works on, what each sums up (programs, 3), and results."""
        partial = torch.empty(self.programs, 3, dtype=torch.float32, device=results.losses.device)
        return (*sections, partial, *results)


def make_distances(distances: Sequence[Distance], config: WeightDistanceConfig) -> tuple[Distances, list[Rows]]:
    """-> and their sections: records, tiles"""
    records, tiles, tile = [], [], config.distance
    for index, d in enumerate(distances):
        count = triton.cdiv(d.base.shape[0], tile.rows) * triton.cdiv(d.base.shape[1], tile.columns)
        records.append(_record(d, len(tiles), count))
        tiles += [index] * count
    aligned = all(map(_is_aligned, distances)), all(map(_is_thin_aligned, distances))
    return Distances(len(distances), len(tiles), config, *aligned), [records, [tiles]]


def is_aligned(matrix: Tensor) -> bool:
    """Every row begins at a multiple of 16 bytes."""
    return matrix.data_ptr() % 16 == 0 and place(matrix)[1] * matrix.element_size() % 16 == 0


def _is_aligned(d: Distance) -> bool:
    wide = [d.target, d.base, d.error, *([] if d.live is None else [d.live]), *(right for _, right in d.pairs)]
    strides = (d.base.shape[1], 8 if d.live is None else place(d.live)[1])  # 8 elements of bfloat16 are 16 bytes
    return all(number % 8 == 0 for number in strides) and all(map(is_aligned, wide))


def _is_thin_aligned(d: Distance) -> bool:
    return all(is_aligned(left) and left.shape[1] % 4 == 0 for left, _ in d.pairs)


def _record(d: Distance, first_tile: int, tiles: int) -> list[int | Address]:
    pairs = [(*place(left), *place(right), left.shape[1]) for left, right in d.pairs]
    pairs += [(0,) * PAIR.value] * (2 - len(pairs))
    biases = (d.target_bias, d.base_bias, d.live_bias, d.shift_last, d.shift, d.shift_vector, d.bias_gradient)
    return [
        *(number for matrix in (d.target, d.base, d.error, d.live) for number in place(matrix)),
        _live_kind(d.live), *d.base.shape, first_tile, tiles, len(d.pairs),
        *(number for pair in pairs for number in pair),
        *(number for vector in biases for number in place(vector)),
        _live_kind(d.live_bias), 0 if d.shift is None else d.shift.shape[1],
    ]  # fmt: skip


def _live_kind(live: Tensor | None) -> int:
    return 0 if live is None else _LIVE_KINDS[live.dtype]
