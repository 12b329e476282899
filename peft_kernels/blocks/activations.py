"""The activations of transformers' MLPs, and their derivatives by the very functions that torch's autograd calls."""

import functools
from collections.abc import Callable, Sequence
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


def activated(name: str, h: Tensor, up: Tensor | None = None) -> Tensor:
    """act(h), or act(h) ∘ up of a gated pair, in torch's differentiable operations"""
    a = ACTIVATIONS[name].of(h)
    return a if up is None else a * up


def activated_bwd(name: str, da: Tensor, hs: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """-> the gradient of each of `hs` that is wanted"""
    act = ACTIVATIONS[name]
    if len(hs) == 1:
        return [act.bwd(da, hs[0]) if wanted[0] else None]
    gate, up = hs
    return [act.bwd(da * up, gate) if wanted[0] else None, da * act.of(gate) if wanted[1] else None]


class _RecomputedActivation(torch.autograd.Function):
    """`activated` as one node that keeps only its arguments; torch's nodes keep a pair's act(h) too, or QuickGELU's σ.

    It has derivatives of any order: those beyond the first are torch's own.
    """

    @staticmethod
    def forward(ctx, name, *hs):
        ctx.save_for_backward(*hs)
        ctx.name, ctx.made_by = name, functools.partial(activated, name)
        return activated(name, *hs)

    @staticmethod
    def backward(ctx, da):
        hs, wanted = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if not torch.is_grad_enabled():
            return None, *activated_bwd(ctx.name, da, hs, wanted)
        asked = [h for h, want in zip(hs, wanted) if want]
        found = iter(torch.autograd.grad(activated(ctx.name, *hs), asked, da, create_graph=True))
        return None, *(next(found) if want else None for want in wanted)


recomputed_activation = super(torch.autograd.Function, _RecomputedActivation).apply  # past functorch's unwrapping
