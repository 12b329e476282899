"""The one way from an operation to its backends: a direct call, or in a compiled graph a custom operator.

An operator's schema, and its results' shapes, follow from the torch backend's launcher: every backend has a launcher of
that name with those arguments. Records are flattened for the schema and put together again behind it, here alone.
"""

import importlib
import inspect
import typing
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from peft_kernels.autocast import autocast_off
from peft_kernels.frozen_products import kept_apart
from peft_kernels.records import KEEP_ALL, Dropout, Scale

_SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Scale: "Tensor",  # a changed number would be another graph, a changed tensor is not
    list[Tensor]: "Tensor[]",
    list[Tensor | None]: "Tensor?[]",
    bool: "bool",
    tuple[bool, ...]: "bool[]",
    int: "SymInt",
    float: "float",
    str: "str",
    str | None: "str?",
    torch.dtype: "ScalarType",
}


class Operator:
    """Calls `launcher` of the named backend: `operator(backend, *arguments)`.

    launcher: the torch backend's. Its first argument is a tensor, or a record that begins with one. Its last argument
        `needs`, if it has one, says which results are not None; without it, only the last ones may be.
    reads: an operator on the torch backend, too, since what that does depends on what is in its tensors;  fake: its
        results' shapes, for a launcher that cannot say them without reading
    """

    def __init__(self, launcher: Callable, *, reads: bool = False, fake: Callable | None = None):
        self.name, self.reads, self.fake = launcher.__name__, reads, fake or launcher
        self.modules = _Modules(launcher.__module__.rpartition(".")[2])
        hints = typing.get_type_hints(launcher)
        returned = hints.pop("return")
        self.single, self.count = returned is Tensor, len(typing.get_args(returned))
        self.parameters = {name: hints[name] for name in inspect.getfullargspec(launcher).args}
        self.layout = [_fields(kind) for kind in self.parameters.values()]
        self.operator = torch.library.custom_op(
            f"peft_kernels::{self.name}", self._run, mutates_args=(), schema=self._schema()
        )
        self.operator.register_fake(self._shapes)

    def __call__(self, backend: str, *args: Any) -> Any:
        """Every dtype has been chosen before; autocast, which would choose others, is off in here."""
        if torch.compiler.is_compiling() and (self.reads or backend != "torch"):
            return self._in_graph(backend, args)
        launcher, like = getattr(self.modules[backend], self.name), _first(args)
        device = like.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with autocast_off(like):
                return launcher(*args)
        return launcher(*args)

    def direct(self, backend: str, memo: dict, *args: Any) -> Any:
        """The same for who knows that no graph is being made and that autocast is off.

        memo: where the backend may keep what it works out for calls of one kind, which differ in rows only
        """
        return self.modules[backend].__dict__[self.name](*args, memo=memo)

    # ---- in a graph ----

    def _in_graph(self, backend: str, args: tuple) -> Any:
        like, flat = _first(args), []
        for arg, scales in zip(args, self.layout):
            parts = (arg,) if len(scales) == 1 else arg
            flat += [_as_tensor(part, like) if is_scale else part for part, is_scale in zip(parts, scales)]
        with autocast_off(like):
            results = self.operator(*flat, backend)
        if self.single:
            return results
        if "needs" not in self.parameters:
            return (*results, *[None] * (self.count - len(results)))
        remaining = iter(results)
        return tuple(next(remaining) if needed else None for needed in args[-1])

    def _run(self, *flat: Any) -> Tensor | list[Tensor]:
        *flat, backend = flat
        with kept_apart():
            results = getattr(self.modules[backend], self.name)(*self._together(flat))
        return results if self.single else [each for each in results if each is not None]

    def _shapes(self, *flat: Any) -> Tensor | list[Tensor]:
        """No result's shape depends on what is dropped, and each backend has masks of its own."""
        args = [KEEP_ALL if isinstance(arg, Dropout) else arg for arg in self._together(flat[:-1])]
        with kept_apart():  # it may not look where they lie, either
            results = self.fake(*args)
        return results if self.single else [each for each in results if each is not None]

    def _together(self, flat: typing.Iterable[Any]) -> Iterator[Any]:
        remaining = iter(flat)
        for kind in self.parameters.values():
            if hasattr(kind, "_fields"):
                yield kind(*(next(remaining) for _ in kind._fields))
            else:
                value = next(remaining)
                yield tuple(value) if kind == tuple[bool, ...] else value

    def _schema(self) -> str:
        parts = []
        for name, kind in self.parameters.items():
            if hasattr(kind, "_fields"):
                parts += [f"{_SCHEMA[hint]} {name}_{field}" for field, hint in typing.get_type_hints(kind).items()]
            else:
                parts.append(f"{_SCHEMA[kind]} {name}")
        return f"({', '.join([*parts, 'str backend'])}) -> {'Tensor' if self.single else 'Tensor[]'}"


def composed(composition: Callable, *args: Any) -> Tensor:
    """An operation as a composition of torch's own, for transforms to see through; its first argument as an Operator's.

    Every dtype has been chosen before, here too.
    """
    with autocast_off(_first(args)):
        return composition(*args)


class _Modules(dict):
    """The module of one operation by backend, imported when it is first asked for; Dynamo traces no import."""

    def __init__(self, op: str):
        self.op = op
        self["torch"] = self.__missing__("torch")

    def __missing__(self, backend: str) -> ModuleType:
        self[backend] = importlib.import_module(f"peft_kernels.{backend}_kernels.{self.op}")
        return self[backend]


def _fields(kind: Any) -> tuple[bool, ...]:
    """Which fields of a record are scales; one answer for an argument that is no record."""
    hints = typing.get_type_hints(kind).values() if hasattr(kind, "_fields") else (kind,)
    return tuple(hint == Scale for hint in hints)


def _first(args: tuple) -> Tensor:
    return args[0] if isinstance(args[0], Tensor) else args[0][0]


def _as_tensor(scale: Scale, like: Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        return scale
    return torch.full((), scale, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
