"""CUDA launchers of the weight distance: records become tables in device memory once, and run as often as wanted.

Records and formulas: peft_kernels/dispatch/weight_distance.py. csrc/weight_distance.h has the tables' rows, field by
field in the order in which the functions below write them; a matrix or vector is its address and its stride.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import extension
from .common import DTYPES, floats, launch, require, set_scale, unsupported_device, unsupported_dtype

_FORMS = {"nn": 0, "nt": 1, "tn": 2}  # csrc's enum Form
_REDUCTIONS = {"mean": 0, "sum": 1, "relative": 2}  # enum Reduction
_NONE = (0, 0)


@dataclass
class Tables:
    """csrc's params struct, and whatever it points to."""

    params: Any
    like: Tensor
    kept: tuple


def unsupported(matrix: Tensor, *lives: Tensor | None) -> str | None:
    """Why these kernels cannot run on such a matrix and what it follows, or None. Ranks have no limit."""
    for t in (matrix, *lives):
        if t is not None and (problem := unsupported_dtype(t.dtype)):
            return problem
    if matrix.dtype != torch.float32:
        return f"the CUDA kernels compute weight distances in float32, not {matrix.dtype}"
    if max(matrix.shape) > 2**31 - 256:  # 32-bit counts, up to the last tile's end
        return f"the CUDA kernels take fewer than 2³¹ rows and columns, not {tuple(matrix.shape)}"
    return unsupported_device(matrix, extension().weight_distance_shared_bytes(), "a weight distance")


def weight_distance_tables(distances: Sequence[Any], results: Any) -> Tables:
    """distances: Distance records; results: where `weight_distance_fwd` writes."""
    rows, tiles = [], []
    for index, d in enumerate(distances):
        require(unsupported(d.error, d.live, d.live_bias))
        own = _tiles(index, *d.error.shape)
        rows.append(_distance_row(d, len(tiles), len(own)))
        tiles += own
    params, like = extension().WeightDistance(), results.losses
    params.record_count, params.tile_count = len(rows), len(tiles)
    table = _on_device(like, params, records=("distance", rows), tiles=("tile", tiles))
    partial = floats(like, 3 * len(tiles))
    params.partial, params.sums = partial.data_ptr(), results.sums.data_ptr()
    params.losses, params.factors = results.losses.data_ptr(), results.factors.data_ptr()
    return Tables(params, like, (distances, results, table, partial))


def weight_distance_fwd(tables: Tables, decay: float | None, reduction: str, loss_scale: float | Tensor) -> None:
    """Targets, errors, sums, losses, factors and bias gradients of all matrices: two kernels."""
    params = tables.params
    params.follow, params.reduction = decay is not None, _REDUCTIONS[reduction]
    params.decay = 1.0 if decay is None else decay
    params.scale_ptr = 0
    set_scale(params, loss_scale)
    if params.tile_count:
        launch(extension().weight_distance_fwd, params, tables.like)


def product_tables(products: Sequence[Any]) -> Tables:
    """products: Product records."""
    rows, terms, tiles = [], [], []
    for index, product in enumerate(products):
        require(unsupported(product.result))
        rows.append(_product_row(product, len(terms)))
        terms += [_term_row(product.form, term) for term in product.terms]
        tiles += _tiles(index, product.result.shape[0], product.result.shape[1] + (product.result_last is not None))
    params, like = extension().Products(), products[0].result
    params.tile_count = len(tiles)
    table = _on_device(like, params, records=("product", rows), terms=("term", terms), tiles=("tile", tiles))
    return Tables(params, like, (products, table))


def product_fwd(tables: Tables) -> None:
    """Every product: one kernel."""
    launch(extension().product_fwd, tables.params, tables.like)


# ---- rows of tables --------------------------------------------------------------------------------------------------


def _distance_row(d: Any, first_tile: int, tiles: int) -> list[int]:
    pairs = [(*_strided(left), *_strided(right), left.shape[1]) for left, right in d.pairs]
    pairs += [(*_NONE, *_NONE, 0)] * (2 - len(pairs))
    return [
        *(*d.error.shape, first_tile, tiles),
        *(*_strided(d.target), *_strided(d.base), *_strided(d.error), *_strided(d.live)),
        *(_dtype(d.live), _dtype(d.live_bias)),
        *(*pairs[0], *pairs[1]),
        *(*_strided(d.target_bias), *_strided(d.base_bias), *_strided(d.live_bias)),
        *(*_strided(d.shift), *_strided(d.shift_vector), *_strided(d.shift_last), *_strided(d.bias_gradient)),
        0 if d.shift is None else d.shift.shape[1],
    ]


def _product_row(product: Any, first_term: int) -> list[int]:
    return [
        *(_FORMS[product.form], *product.result.shape, int(product.accumulate), first_term, len(product.terms)),
        *(*_strided(product.result), *_strided(product.result_last)),
    ]


def _term_row(form: str, term: Any) -> list[int]:
    depth, right_columns = term.left.shape[0 if form == "tn" else 1], term.right.shape[0 if form == "nt" else 1]
    return [
        *(depth, right_columns, *_strided(term.left), *_strided(term.right), *_strided(term.right_last)),
        0 if term.factor is None else term.factor.data_ptr(),
    ]


def _tiles(record: int, rows: int, columns: int) -> list[tuple[int, int, int]]:
    """Those that share columns are neighbours: a wide right operand is read while it is in the cache."""
    module = extension()
    return [
        (record, row, column)
        for column in range(0, columns, module.WEIGHT_DISTANCE_COLUMNS)
        for row in range(0, rows, module.WEIGHT_DISTANCE_ROWS)
    ]


def _strided(t: Tensor | None) -> tuple[int, int]:
    return _NONE if t is None else (t.data_ptr(), t.stride(0))


def _dtype(t: Tensor | None) -> int:
    return 0 if t is None else DTYPES[t.dtype]


def _on_device(like: Tensor, params: Any, **tables: tuple[str, list]) -> tuple[Tensor, Tensor]:
    """Hands `params` the addresses of these tables, which go to the device in one copy; nothing waits for it."""
    numbers, places = [], {}
    for name, (kind, rows) in tables.items():
        places[name] = len(numbers)
        for row in rows:
            assert len(row) == extension().WEIGHT_DISTANCE_FIELDS[kind], f"csrc's rows of {kind} have other fields"
            numbers += row
    host = torch.tensor(numbers, dtype=torch.int64)
    if like.device.type == "cuda":
        host = host.pin_memory()
    table = torch.empty(host.numel(), dtype=torch.int64, device=like.device).copy_(host, non_blocking=True)
    for name, place in places.items():
        setattr(params, name, table.data_ptr() + 8 * place)
    return host, table
