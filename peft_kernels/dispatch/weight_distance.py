"""`weight_distance` on the chosen backend, and the two kinds of work that it and the imitation step are made of.

A backend turns records into tables once (`…_tables`) and runs them as often as wanted; on a GPU running is one or two
launches for all records together, whatever their shapes, and reads nothing back. Every matrix has unit column stride
and any row stride, and is float32 unless said otherwise (the torch backend takes float64, too).
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from peft_kernels.autocast import autocast_off
from peft_kernels.dispatch.common import kernels
from peft_kernels.records import Distance, Product, Results, Term  # noqa: F401


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
