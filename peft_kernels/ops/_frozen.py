"""What the operations on a frozen linear layer share: its weight, rows of activations, and what is not supported."""

from typing import Protocol

import torch
from torch import Tensor


class QuantizedWeight(Protocol):
    """A frozen weight that is stored in another form, and made dense afresh whenever a product needs it."""

    shape: torch.Size

    def dequantize(self, dtype: torch.dtype) -> Tensor: ...


def dense(weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    result = weight.dequantize(dtype)
    if not isinstance(result, Tensor) or result.dtype != dtype or tuple(result.shape) != tuple(weight.shape):
        got = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"weight: expected dequantize to give {dtype} {tuple(weight.shape)}, got {got}")
    return result


def rows(t: Tensor) -> Tensor:
    """(..., n) as (rows, n) with unit column stride; the same memory wherever strides allow it."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(-1) == 1 else t.contiguous()


def shaped(t: Tensor, *shape: int) -> Tensor:
    """A fresh result in another shape, as a tensor of its own.

    Autograd lets nobody write into a custom function's view, as nn.ReLU(inplace=True) and y += x do.
    """
    return torch.ops.aten._unsafe_view(t, shape)


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def refuse_second_derivative(name: str) -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name}: has first derivatives only; call backward without create_graph=True")
