"""Which modules of a model are MLPs, found by running their forward on a symbolic input, whatever their classes."""

import functools
import types
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from peft_kernels.blocks.activations import ACTIVATIONS
from peft_kernels.layers.mlp import MlpParts, is_idle, recompute_activation, restore_mlp


def recompute_activations(model: nn.Module, layers: Iterable[nn.Module] = ()) -> None:
    """Let the MLPs in which some of `layers` stand recompute their activation; all others are the model's own again.

    Only gated ones and those with QuickGELU change: elsewhere torch keeps the activation's input alone.
    """
    adapted = set(map(id, layers))
    for module in model.modules():
        restore_mlp(module)
        if any(id(child) in adapted for child in module.children()):
            parts = mlp_parts(module)
            if parts is not None and (len(parts.first) > 1 or parts.activation == "quick_gelu"):
                recompute_activation(module, parts)


def mlp_parts(module: nn.Module) -> MlpParts | None:
    """How an MLP is made of its children; None for what is none, or where its forward does anything besides."""
    if "forward" in vars(module):
        return None
    itself = _StandIn(module)
    try:
        term = type(module).forward(itself, _Symbol(_X)).term
    except Exception:  # anything can come of a forward that wants more than a symbol can do
        return None
    match term:
        case ("call", last, ("act", activation, act, ("call", gate, ("x",)))):
            linears = [gate, last]
        case ("call", last, ("times", ("act", activation, act, ("call", gate, ("x",))), ("call", up, ("x",)))):
            linears = [gate, up, last]
        case ("call", last, ("times", ("call", up, ("x",)), ("act", activation, act, ("call", gate, ("x",))))):
            linears = [gate, up, last]
        case _:
            return None
    *first, _ = itself.calls
    if sorted([*first, last]) != sorted({*linears}):  # one was called twice, or for nothing
        return None
    return MlpParts(activation, tuple(first), gate, last, act, tuple(itself.idle))


_X = ("x",)


class _Symbol:
    """A tensor of which nothing is known but how it was made: ("x",), ("call", name of the child, term),
    ("act", name of the activation, its module, term) or ("times", term, term).
    """

    def __init__(self, term: tuple):
        self.term = term

    def __mul__(self, other: "_Symbol") -> "_Symbol":
        return _Symbol(("times", self.term, other.term))

    @classmethod
    def __torch_function__(cls, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        symbol, *others = args
        if function in (torch.mul, torch.multiply):
            return symbol * others[0]
        return _activated(lambda x: function(x, *others, **(kwargs or {})), None, symbol)


class _StandIn:
    """What a forward, and the methods that it calls, take for their module."""

    def __init__(self, module: nn.Module):
        vars(self).update(module=module, calls=[], idle=[])

    def __getattr__(self, name: str) -> object:
        found = getattr(self.module, name)
        if getattr(found, "__self__", None) is self.module:
            return types.MethodType(found.__func__, self)
        return functools.partial(self._call, name, found) if isinstance(found, nn.Module) else found

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name}: an MLP leaves nothing behind")

    def _call(self, name: str, child: nn.Module, symbol: _Symbol) -> _Symbol:
        if is_idle(child):
            self.idle.append(name)
            return symbol
        if next(child.parameters(), None) is None and next(child.buffers(), None) is None:
            return _activated(child, (name, child), symbol)
        self.calls.append(name)
        return _Symbol(("call", name, symbol.term))


def _activated(function: Callable[[Tensor], Tensor], act: tuple[str, nn.Module] | None, symbol: _Symbol) -> _Symbol:
    """Known by what it computes."""
    h = torch.linspace(-6, 6, 61)
    with torch.no_grad(), torch.random.fork_rng([]):  # dropout would draw
        a = function(h)
    activation = next(name for name, each in ACTIVATIONS.items() if torch.equal(each.of(h), a))
    return _Symbol(("act", activation, act, symbol.term))
