"""Notices layers whose weight a model reads without calling them: an adapter would change nothing there."""

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from peft_kernels.layers.adapted_linear import AdaptedLinear
from peft_kernels.layers.weight_read import WeightRead

_WITHOUT_FORWARD = (nn.ModuleList, nn.ModuleDict)


class CallWatch:
    """Warns, by name, of one module's adapted layers that its first forward has read and not called.

    The layers are of another class while that forward runs; then the hooks are off.
    """

    def __init__(self, owner: nn.Module, layers: Mapping[str, AdaptedLinear]):
        self.layers, self.read, self.called = dict(layers), set(), set()
        self._handles = [
            owner.register_forward_pre_hook(self._starts),
            owner.register_forward_hook(self._ends, always_call=True),
        ]

    def _starts(self, owner: nn.Module, args: tuple) -> None:
        if not torch.compiler.is_compiling():
            for name, layer in self.layers.items():
                layer.__class__ = _watched(_own_class(layer), name, self.read, self.called)

    def _ends(self, owner: nn.Module, args: tuple, output: object) -> None:
        if torch.compiler.is_compiling():
            return
        for layer in self.layers.values():
            layer.__class__ = _own_class(layer)
        if output is None:  # it has failed
            return
        self.detach()
        if passed := [name for name in self.layers if name in self.read - self.called]:
            what = "it" if len(passed) == 1 else "them"
            warnings.warn(
                f"{', '.join(passed)}: the {type(owner).__name__} that holds {what} reads the weight and does not call "
                f"{what}: the adapter changed nothing there. Name it by a Target with reads_weight=True",
                stacklevel=2,
            )

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()


def _watched(kind: type[AdaptedLinear], name: str, read: set[str], called: set[str]) -> type[AdaptedLinear]:
    class Watched(kind):
        own_class = kind

        @property
        def weight(self):
            read.add(name)
            return self.base_weight

        def forward(self, *args, **kwargs):
            called.add(name)
            return kind.forward(self, *args, **kwargs)

    return Watched


def _own_class(layer: AdaptedLinear) -> type[AdaptedLinear]:
    return getattr(type(layer), "own_class", type(layer))


def watch_calls(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> list[CallWatch]:
    """One for each module that holds adapted layers; containers run nothing themselves, what they are part of does."""
    modules = dict(model.named_modules())
    held: dict[str, dict[str, AdaptedLinear]] = {}
    for name, layer in layers.items():
        owner = name.rpartition(".")[0]
        while owner and isinstance(modules[owner], _WITHOUT_FORWARD):
            owner = owner.rpartition(".")[0]
        if not isinstance(layer, WeightRead) and not isinstance(modules[owner], _WITHOUT_FORWARD):
            held.setdefault(owner, {})[name] = layer
    return [CallWatch(modules[owner], of) for owner, of in held.items()]
