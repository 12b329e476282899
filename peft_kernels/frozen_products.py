"""The products of several frozen weights with one tensor, which every backend of `lowrank_projections` adds to its own.

Weights may lie one after another in one memory, where a layer has stacked them: then one product takes them all.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class _Thread(threading.local):
    def __init__(self):
        self.apart = False


_thread = _Thread()


@contextlib.contextmanager
def kept_apart() -> Iterator[None]:
    """Inside, outputs share no memory: a custom operator may not return such."""
    _thread.apart, before = True, _thread.apart
    try:
        yield
    finally:
        _thread.apart = before


def stacked(weights: Sequence[Tensor]) -> Tensor | None:
    """The weights (N_j, K) as one (ΣN_j, K) where that is their memory already; None elsewhere, and in graphs."""
    first = weights[0]
    if torch.compiler.is_dynamo_compiling() or _thread.apart:
        return None
    place, rows = first.data_ptr(), 0
    if weights[1:] and weights[1].data_ptr() - place != first.shape[0] * first.shape[1] * first.itemsize:
        return None
    for weight in weights:
        if weight.data_ptr() != place or not weight.is_contiguous():
            return None
        place += weight.numel() * weight.element_size()
        rows += weight.shape[0]
    if place - first.data_ptr() > first.untyped_storage().nbytes() - first.storage_offset() * first.element_size():
        return None  # neighbours by chance, in memory of their own
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


def empty_outputs(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    """-> y (M, ΣN_j) if the weights lie together, and y_j (M, N_j): its columns, or memory of their own.

    The columns are no views to autograd, which forbids to write into several views that one function returns.
    """
    if stacked(weights) is None:
        return None, [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    widths = [weight.shape[0] for weight in weights]
    y = x.new_empty(x.shape[0], sum(widths))
    return y, columns_of(y, widths)


def columns_of(y: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """y (M, ΣN_j) as y_j (M, N_j), tensors of their own."""
    first, columns = y.storage_offset(), []
    for width in widths:
        columns.append(y.new_empty(0).set_(y.untyped_storage(), first, (y.shape[0], width), y.stride()))
        first += width
    return columns


def add_frozen(outputs: tuple[Tensor | None, list[Tensor]], x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """-> y_j + x W_jᵀ in the memory of y_j, in one product where all lie together.  outputs: from `empty_outputs`"""
    y, ys = outputs
    if y is not None:
        y.addmm_(x, stacked(weights).t())
        return ys
    for each, weight in zip(ys, weights):
        each.addmm_(x, weight.mT)
    return ys


def add_frozen_bwd(dx: Tensor | None, dys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """dx + Σ_j dy_j W_j, in dx's memory if there is one."""
    for dy, weight in zip(dys, weights):
        dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    return dx
