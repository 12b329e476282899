"""`weight_distance` on the chosen backend, and the two kinds of work that it and the imitation step are made of.

A backend turns records into tables once (`…_tables`) and runs them as often as wanted; on a GPU running is one or two
launches for all records together, whatever their shapes, and reads nothing back. Every matrix has unit column stride
and any row stride, and is float32 unless said otherwise (the torch backend takes float64, too).
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels.autocast import autocast_off
from peft_kernels.dispatch.common import kernels


class Distance(NamedTuple):
    """One matrix: target ← decay · target + (1 − decay) · live, then error = Σ left · right + (base − target).

    With a bias: the same for target_bias, then e = base_bias + shift · shift_vector + shift_last − target_bias.
    """

    target: Tensor  # (out, in), changed in place if there is a live one
    base: Tensor  # (out, in)
    pairs: tuple[tuple[Tensor, Tensor], ...]  # none to two (left (out, R), right (R, in))
    error: Tensor  # (out, in), written
    live: Tensor | None = None  # (out, in) float32, bfloat16 or float16
    target_bias: Tensor | None = None  # (out,), changed in place if there is a live one
    base_bias: Tensor | None = None  # (out,)
    live_bias: Tensor | None = None  # (out,) likewise
    shift: Tensor | None = None  # (out, k), with shift_vector (k,)
    shift_vector: Tensor | None = None
    shift_last: Tensor | None = None  # (out,), any stride
    bias_gradient: Tensor | None = None  # (out,), any stride: the loss's gradient by e is written here


class Results(NamedTuple):
    """What `weight_distance_fwd` writes for each of n matrices."""

    sums: Tensor  # (n, 6): Σ error², Σ (target − base)², Σ base²; Σ e², Σ (target_bias − base_bias)², Σ base_bias²
    losses: Tensor  # (n,): weight and bias, reduced
    factors: Tensor  # (n,): the loss's gradient by the error is this factor times the error; times loss_scale


class Term(NamedTuple):
    """factor · op(left) · op(right), transposed as the product's form says."""

    left: Tensor
    right: Tensor
    factor: Tensor | None = None  # 0-d
    right_last: Tensor | None = None  # (K,), form "nn" only: one more column of `right`, kept elsewhere


class Product(NamedTuple):
    """result = Σ terms, or += where it accumulates. Products that run together do not depend on each other."""

    form: str  # "nn": left (M, K), right (K, N) | "nt": right (N, K) | "tn": left (K, M), right (K, N)
    result: Tensor  # (M, N)
    terms: tuple[Term, ...]
    accumulate: bool = False
    result_last: Tensor | None = None  # (M,): where the product has one column more than `result`, its last one


def _module(backend: str) -> ModuleType:
    return kernels(backend, "weight_distance")


def weight_distance_tables(backend: str, distances: Sequence[Distance], results: Results) -> Any:
    return _module(backend).weight_distance_tables(distances, results)


def weight_distance_fwd(
    backend: str, tables: Any, like: Tensor, decay: float | None, reduction: str, loss_scale: float | Tensor
) -> None:
    """decay: None leaves the targets as they are. reduction: "mean" | "sum" | "relative". Two launches."""
    with torch.no_grad(), autocast_off(like):
        _module(backend).weight_distance_fwd(tables, decay, reduction, loss_scale)


def product_tables(backend: str, products: Sequence[Product]) -> Any:
    return _module(backend).product_tables(products)


def product_fwd(backend: str, tables: Any, like: Tensor) -> None:
    """One launch."""
    with torch.no_grad(), autocast_off(like):
        _module(backend).product_fwd(tables)
