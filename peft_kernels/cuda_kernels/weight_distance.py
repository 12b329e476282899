"""CUDA launchers of the weight distance: records become tables in device memory, and run as often as wanted.

Records and formulas: peft_kernels/records.py. csrc/weight_distance.h has the tables' rows, field by field in the order
in which the functions below write them; a matrix or vector is its address and its stride.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from peft_kernels.records import Distance, Product, Results, Stage, Term
from peft_kernels.tables import Address, Placed, Rows, Tables, place

from . import extension
from .common import floats, launch, set_scale
from .support import DTYPES

_FORMS = {"nn": 0, "nt": 1, "tn": 2}  # csrc's enum Form
_REDUCTIONS = {"mean": 0, "sum": 1, "relative": 2}  # enum Reduction
_NONE = (0, 0)


class Prepared(NamedTuple):
    """csrc's params struct, and whatever it points to."""

    params: Any
    like: Tensor
    kept: tuple


class Distances(NamedTuple):
    """How many matrices and thread blocks."""

    records: int
    tiles: int

    def at(self, sections: Sequence[Tensor], results: Results) -> Prepared:
        params, partial = extension().WeightDistance(), floats(results.losses, 3 * self.tiles)
        params.record_count, params.tile_count = self
        params.records, params.tiles = (section.data_ptr() for section in sections)
        params.partial, params.sums = partial.data_ptr(), results.sums.data_ptr()
        params.losses, params.factors = results.losses.data_ptr(), results.factors.data_ptr()
        return Prepared(params, results.losses, (sections, results, partial))


class Products(NamedTuple):
    """How many thread blocks."""

    tiles: int

    def at(self, sections: Sequence[Tensor], results: Results | None) -> Prepared:
        params = extension().Products()
        params.tile_count = self.tiles
        params.records, params.terms, params.tiles = (section.data_ptr() for section in sections)
        return Prepared(params, sections[0], (sections,))


def weight_distance_tables(stages: Sequence[Stage]) -> Tables:
    """Tables for all stages; the caller keeps the records' tensors."""
    return Tables([_products(stage) if isinstance(stage[0], Product) else _distances(stage) for stage in stages])


def weight_distance_fwd(placed: Placed, decay: float | None, reduction: str, loss_scale: float | Tensor) -> None:
    """Every stage: targets, errors, sums, losses, factors and bias gradients of all matrices, two kernels; products,
    one."""
    module = extension()
    for part, (params, like, _) in placed.stages:
        if isinstance(part, Products):
            launch(module.product_fwd, params, like)
            continue
        params.follow, params.reduction = decay is not None, _REDUCTIONS[reduction]
        params.decay = 1.0 if decay is None else decay
        params.scale_ptr = 0
        set_scale(params, loss_scale)
        launch(module.weight_distance_fwd, params, like)


# ---- rows of tables --------------------------------------------------------------------------------------------------


def _distances(distances: Sequence[Distance]) -> tuple[Distances, list[Rows]]:
    rows, tiles = [], []
    for index, d in enumerate(distances):
        own = _tiles(index, *d.error.shape)
        rows.append(_distance_row(d, len(tiles), len(own)))
        tiles += own
    return Distances(len(rows), len(tiles)), _checked(distance=rows, tile=tiles)


def _products(products: Sequence[Product]) -> tuple[Products, list[Rows]]:
    rows, terms, tiles = [], [], []
    for index, product in enumerate(products):
        rows.append(_product_row(product, len(terms)))
        terms += [_term_row(product.form, term) for term in product.terms]
        tiles += _tiles(index, product.result.shape[0], product.result.shape[1] + (product.result_last is not None))
    return Products(len(tiles)), _checked(product=rows, term=terms, tile=tiles)


def _checked(**sections: Rows) -> list[Rows]:
    for kind, rows in sections.items():
        wanted = extension().WEIGHT_DISTANCE_FIELDS[kind]
        assert all(len(row) == wanted for row in rows), f"csrc's rows of {kind} have other fields"
    return list(sections.values())


def _distance_row(d: Distance, first_tile: int, tiles: int) -> list[int | Address]:
    pairs = [(*place(left), *place(right), left.shape[1]) for left, right in d.pairs]
    pairs += [(*_NONE, *_NONE, 0)] * (2 - len(pairs))
    return [
        *(*d.error.shape, first_tile, tiles),
        *(*place(d.target), *place(d.base), *place(d.error), *place(d.live)),
        *(_dtype(d.live), _dtype(d.live_bias)),
        *(*pairs[0], *pairs[1]),
        *(*place(d.target_bias), *place(d.base_bias), *place(d.live_bias)),
        *(*place(d.shift), *place(d.shift_vector), *place(d.shift_last), *place(d.bias_gradient)),
        0 if d.shift is None else d.shift.shape[1],
    ]


def _product_row(product: Product, first_term: int) -> list[int | Address]:
    return [
        *(_FORMS[product.form], *product.result.shape, int(product.accumulate), first_term, len(product.terms)),
        *(*place(product.result), *place(product.result_last)),
    ]


def _term_row(form: str, term: Term) -> list[int | Address]:
    depth, right_columns = term.left.shape[0 if form == "tn" else 1], term.right.shape[0 if form == "nt" else 1]
    return [
        *(depth, right_columns, *place(term.left), *place(term.right), *place(term.right_last)),
        0 if term.factor is None else Address(term.factor),
    ]


def _tiles(record: int, rows: int, columns: int) -> list[tuple[int, int, int]]:
    """Those that share columns are neighbours: a wide right operand is read while it is in the cache."""
    module = extension()
    return [
        (record, row, column)
        for column in range(0, columns, module.WEIGHT_DISTANCE_COLUMNS)
        for row in range(0, rows, module.WEIGHT_DISTANCE_ROWS)
    ]


def _dtype(t: Tensor | None) -> int:
    return 0 if t is None else DTYPES[t.dtype]
