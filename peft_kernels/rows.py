"""Activations (..., n) as rows (M, n), which is how every backend takes and returns them."""

import torch
from torch import Tensor


def rows(t: Tensor) -> Tensor:
    """(..., n) as (rows, n) with unit column stride; the same memory wherever strides allow it."""
    if t.ndim != 2:
        t = t.reshape(-1, t.shape[-1])
    return t if t.is_contiguous() or t.stride(-1) == 1 else t.contiguous()


def shaped(t: Tensor, *shape: int) -> Tensor:
    """A fresh result in another shape, as a tensor of its own.

    Autograd lets nobody write into a custom function's view, as nn.ReLU(inplace=True) and y += x do.
    """
    return torch.ops.aten._unsafe_view(t, shape)


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
