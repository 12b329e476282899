"""The activations of transformers' MLPs, and their derivatives by the very functions that torch's autograd calls."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten


class Activation(NamedTuple):
    of: Callable[[Tensor], Tensor]
    bwd: Callable[[Tensor, Tensor], Tensor]  # (gradient of act(h), h) -> gradient of h


def _quick_gelu(h: Tensor) -> Tensor:
    return h * torch.sigmoid(1.702 * h)


def _quick_gelu_bwd(da: Tensor, h: Tensor) -> Tensor:
    gate = torch.sigmoid(1.702 * h)
    return da * gate + aten.sigmoid_backward(da * h, gate) * 1.702


ACTIVATIONS = {
    "gelu": Activation(F.gelu, aten.gelu_backward),
    "gelu_tanh": Activation(
        functools.partial(F.gelu, approximate="tanh"), functools.partial(aten.gelu_backward, approximate="tanh")
    ),
    "quick_gelu": Activation(_quick_gelu, _quick_gelu_bwd),
    "silu": Activation(F.silu, aten.silu_backward),
    "relu": Activation(F.relu, lambda da, h: aten.threshold_backward(da, h, 0)),
}


def activated(name: str, hs: list[Tensor]) -> Tensor:
    """act(h), or act(g) ∘ u of a gated pair"""
    a = ACTIVATIONS[name].of(hs[0])
    return a if len(hs) == 1 else a * hs[1]


def activated_bwd(name: str, da: Tensor, hs: list[Tensor], wanted: list[bool]) -> list[Tensor | None]:
    """-> the gradient of each of `hs` that is wanted"""
    act = ACTIVATIONS[name]
    if len(hs) == 1:
        return [act.bwd(da, hs[0]) if wanted[0] else None]
    gate, up = hs
    return [act.bwd(da * up, gate) if wanted[0] else None, da * act.of(gate) if wanted[1] else None]
