"""Frozen weights that are stored in another form."""

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
