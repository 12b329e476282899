"""MLPs that keep what their first layers compute, and in the backward compute the activation again."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from peft_kernels.blocks.activations import activated, recomputed_activation
from peft_kernels.transforms import transformed

_PLAIN = (Tensor, nn.Parameter)
_compiling, _tracing = torch.compiler.is_compiling, torch._C._get_tracing_state


class MlpParts(NamedTuple):
    """How an MLP is made of its children: last(act(gate(x))), or last(act(gate(x)) ∘ up(x)).

    activation: its name in blocks/activations.py;  first: gate, and up, in the order of their calls
    act: the activation's name and module, or None for a function
    idle: modules that give what they get: identities, and dropout without a probability
    """

    activation: str
    first: tuple[str, ...]
    gate: str
    last: str
    act: tuple[str, nn.Module] | None
    idle: tuple[str, ...]


class RecomputingMlp:
    """What a model's MLP becomes: its class derives from this one and from the class it had. Bits are the model's.

    The forward calls the same layers, hooks included. Between them stands one node that keeps h of QuickGELU, or g and
    u of a gated MLP, where the model's own products also keep σ(1.702 h), or act(g); the layer behind it makes its
    input anew of the same tensors (peft_kernels/recomputed.py).

    The model's own forward runs with other arguments than one plain tensor, with hooks on the activation or all
    modules, with another activation in its place or dropout that drops, in compiled graphs, under torch.func and
    torch.jit.
    """

    recomputing: MlpParts

    def forward(self, *args, **kwargs) -> Tensor:
        if kwargs or not args or args[1:] or type(args[0]) not in _PLAIN or not self._recomputes():
            return super().forward(*args, **kwargs)
        parts, modules = self.recomputing, self._modules
        others = []
        for name in parts.first:
            if name == parts.gate:
                h = modules[name](args[0])
            else:
                others += (modules[name](args[0]),)
        plain = type(h) in _PLAIN and h.requires_grad
        for up in others:
            plain = plain and type(up) in _PLAIN and up.shape == h.shape and up.dtype == h.dtype
        return modules[parts.last]((recomputed_activation if plain else activated)(parts.activation, h, *others))

    def _recomputes(self) -> bool:
        if _compiling() or transformed() or _tracing() is not None or _has_any_global_hook():
            return False
        parts, modules = self.recomputing, self._modules
        if parts.act is not None:
            name, act = parts.act
            if name not in modules or modules[name] is not act or watched(act):
                return False
        return not parts.idle or all(is_idle(modules.get(name)) for name in parts.idle)

    def __reduce_ex__(self, protocol: int):
        """The class is none that a pickle could name."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (_stock(self),), *state


def recompute_activation(module: nn.Module, parts: MlpParts) -> None:
    """In place; `restore_mlp` undoes it."""
    module.__class__ = _class_of(type(module))
    module.recomputing = parts


def restore_mlp(module: nn.Module) -> None:
    if RecomputingMlp in type(module).__bases__:  # and no class that a framework derived from ours
        module.__class__ = _stock(module)
        del module.recomputing


def watched(module: nn.Module) -> bool:
    """Would something see the module's call?"""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return True if hooks else "forward" in module.__dict__


def is_idle(module: object) -> bool:
    """Does it give what it gets, and does nothing see its call?"""
    idle = type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0)
    return idle and not watched(module)


@functools.cache
def _class_of(stock: type[nn.Module]) -> type[nn.Module]:
    """Under the same name, which frameworks look at."""
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, (RecomputingMlp, stock), names)


def _new(stock: type[nn.Module]) -> nn.Module:
    made = _class_of(stock)
    return made.__new__(made)


def _stock(module: RecomputingMlp) -> type[nn.Module]:
    """The class that it had."""
    mro = type(module).__mro__
    return mro[mro.index(RecomputingMlp) + 1]
