"""Interpreted Triton launches in a random order of their programs, with everything they read and write recorded.

Programs of one launch run side by side on a GPU. So none may touch what another one writes, and a program's own threads
may read what it wrote only after a barrier. Inside `checked_launches` a `Fault` is raised for

    two programs that write one element              a program that reads what another one writes
    a program that reads what it wrote itself, with no `tl.debug_barrier` in between
    a pointer that leaves its tensor, is read as another type, or comes from nowhere; an atomic

A pointer carries the number of its tensor in its upper 16 bits, which a machine's addresses leave free. Pointers that
kernels find in tables lead to, or into, the tensors whose `data_ptr()` was asked for when the tables were made: inside
the block.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

_NUMBER = 48  # the first of the bits that hold a tensor's number
_HOOKS = {
    GridExecutor: ("_init_args_hst", "_restore_args_dev"),
    InterpreterBuilder: (
        "set_grid_dim", "set_grid_idx", "create_barrier", "create_int_to_ptr", "create_masked_load",
        "create_masked_store", "create_atomic_cas", "create_atomic_rmw",
    ),
    Tensor: ("data_ptr",),
}  # fmt: skip


class Fault(AssertionError):
    """What would go wrong on a GPU, or only there."""


class Launch(NamedTuple):
    kernel: str
    constants: dict[str, Any]
    grid: tuple[int, ...]
    order: list[tuple[int, int, int]]


class _Numbered(Tensor):
    """An argument whose address carries its number."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def data_ptr(self) -> int:
        return super().data_ptr() + (self.number << _NUMBER)


class _Place:
    """The memory of one tensor, from its first to its last element."""

    def __init__(self, name: str, tensor: Tensor):
        self.name, self.shape, self.strides = name, tuple(tensor.shape), tensor.stride()
        self.first, self.size, self.bytes = tensor.data_ptr(), tensor.element_size(), span(tensor)
        storage = tensor.untyped_storage()
        self.storage, self.elements = storage.data_ptr(), storage.nbytes() // self.size

    def __str__(self) -> str:
        return f"{self.name} {self.shape}"

    def element(self, address: int) -> str:
        """name[i, j] of what lies at an address."""
        rest, index = (address - self.first) // self.size, dict.fromkeys(range(len(self.shape)), 0)
        for dim in sorted(index, key=lambda dim: -self.strides[dim]):
            if self.strides[dim]:
                index[dim], rest = divmod(rest, self.strides[dim])
        return f"{self.name}[{', '.join(map(str, index.values()))}]"


def span(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (1 + steps) * tensor.element_size() if tensor.numel() else 0


class Checker:
    """The methods named in _HOOKS run around those of the interpreter, which they get as `original`.

    Programs run one after the other. Each, and each part of one between two barriers, is an epoch; a written element is
    stamped with its epoch.
    """

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        self.launches: list[Launch] = []
        self.fault: Fault | None = None
        self.known: dict[int, Tensor] = {}  # by address; kept, so that no memory is used twice

    # ---- launches and programs ----

    def _init_args_hst(self, original: Callable, executor: GridExecutor, args: tuple, kwargs: dict) -> tuple:
        self.kernel, self.names, self.dims = executor.fn.__name__, executor.arg_names, len(executor.grid)
        self.constants = {name: kwargs[name] for name in executor.constexprs if name in kwargs}
        self.places: list[_Place | None] = [None]
        self.pointed: dict[int, int] = {0: 0}  # address in a table: number
        self.stamps: dict[int, np.ndarray] = {}  # the epoch of every element, for each storage that is written
        self.reads: list[tuple[int, _Place, np.ndarray]] = []
        self.epochs: list[tuple | None] = [None]  # whose each is
        args, kwargs = original(args, kwargs)
        args = [self._numbered(name, arg) for name, arg in zip(self.names, args)]
        return args, {name: self._numbered(name, arg) for name, arg in kwargs.items()}

    def _numbered(self, name: str, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            number = self._number(name, arg)
            arg = arg.as_subclass(_Numbered)
            arg.number = number
        return arg

    def _number(self, name: str, tensor: Tensor) -> int:
        self.places.append(_Place(name, tensor))
        return len(self.places) - 1

    def set_grid_dim(self, original: Callable, builder: InterpreterBuilder, *grid: int) -> None:
        original(*grid)
        order = self.random.permutation(int(np.prod(grid)))
        if (order[:-1] < order[1:]).all():  # the usual one, as half of the time with two programs
            order = order[::-1]
        programs = [tuple(map(int, program)) for program in zip(*np.unravel_index(order, grid))]
        self.launches.append(Launch(self.kernel, self.constants, grid[: self.dims], programs))

    def set_grid_idx(self, original: Callable, builder: InterpreterBuilder, *usual: int) -> None:
        self.program = self.launches[-1].order[np.ravel_multi_index(usual, builder.grid_dim)]
        self.first = len(self.epochs)
        self._begin_epoch()
        original(*self.program)

    def create_barrier(self, original: Callable, builder: InterpreterBuilder) -> None:
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.epochs.append(self.program)
        self.fresh: set[int] = set()  # storages written in this epoch

    def _restore_args_dev(self, original: Callable, executor: GridExecutor, *args: Any) -> None:
        """After the last program: was anything read that another program writes, before or after?"""
        number = {program: index for index, program in enumerate(self.launches[-1].order)}
        owner = np.array([-1, *(number[program] for program in self.epochs[1:])])
        for epoch, place, addresses in self.reads:
            if place.storage in self.stamps:
                owners = owner[self.stamps[place.storage][self._elements(place, addresses)]]
                wrong = (owners >= 0) & (owners != owner[epoch])
                if wrong.any():
                    at = wrong.argmax()
                    writer, element = self.launches[-1].order[owners[at]], place.element(int(addresses[at]))
                    raise Fault(f"{self.kernel}: program {self.epochs[epoch]} reads {element}, which {writer} writes")
        self.reads.clear()
        original(*args)

    # ---- memory ----

    def data_ptr(self, original: Callable, tensor: Tensor) -> int:
        address = original()
        if address and (address not in self.known or span(self.known[address]) < span(tensor)):
            self.known[address] = tensor.detach()
        return address

    def create_int_to_ptr(self, original: Callable, builder: InterpreterBuilder, source: TensorHandle, *rest: Any):
        pointer = original(source, *rest)
        for address in set(pointer.data.flat) - self.pointed.keys():
            known = self._found(int(address))
            self.pointed[address] = 0 if known is None else self._number("a matrix of a table", known)
        numbers = np.array([self.pointed[address] for address in pointer.data.flat], np.uint64)
        data = pointer.data + (numbers << np.uint64(_NUMBER)).reshape(pointer.data.shape)
        return TensorHandle(data, pointer.dtype)

    def _found(self, address: int) -> Tensor | None:
        """The tensor that begins there, or else the smallest with an element there: a table points to columns, too."""
        if address in self.known:
            return self.known[address]
        around = [t for first, t in self.known.items() if first < address < first + span(t)]
        return min(around, key=span, default=None)

    def create_masked_load(
        self, original: Callable, builder: InterpreterBuilder, pointers: TensorHandle, mask: TensorHandle, *rest: Any
    ):
        place, addresses = self._reached("reads", pointers, mask)
        if place is not None:
            self.reads.append((len(self.epochs) - 1, place, addresses))
            if place.storage in self.fresh:
                stale = self.stamps[place.storage][self._elements(place, addresses)] == len(self.epochs) - 1
                if stale.any():
                    element = place.element(int(addresses[stale.argmax()]))
                    self._fail(f"reads {element} after writing it, with no barrier in between")
        return original(_plain(pointers), mask, *rest)

    def create_masked_store(
        self, original: Callable, builder: InterpreterBuilder, pointers: TensorHandle, value: TensorHandle,
        mask: TensorHandle, *rest: Any,
    ):  # fmt: skip
        place, addresses = self._reached("writes", pointers, mask)
        if place is not None:
            stamps = self.stamps.setdefault(place.storage, np.zeros(place.elements, np.int32))
            elements = self._elements(place, addresses)
            before = stamps[elements]
            others = (before > 0) & (before < self.first)
            if others.any():
                at = others.argmax()
                self._fail(f"writes {place.element(int(addresses[at]))}, and so does {self.epochs[before[at]]}")
            stamps[elements] = len(self.epochs) - 1
            self.fresh.add(place.storage)
        return original(_plain(pointers), value, mask, *rest)

    def create_atomic_cas(self, original: Callable, *args: Any):
        self._fail("uses an atomic: sums have a fixed order")

    create_atomic_rmw = create_atomic_cas

    def _reached(self, does: str, pointers: TensorHandle, mask: TensorHandle) -> tuple[_Place | None, np.ndarray]:
        """The tensor that the pointers lead to, and the addresses under the mask."""
        kept = mask.data.astype(bool)  # conjunctions with a scalar come as integers
        addresses = pointers.data[np.broadcast_to(kept, pointers.data.shape)]
        if not addresses.size:
            return None, addresses
        number, last = int(addresses.min()) >> _NUMBER, int(addresses.max())
        place = self.places[number] if number < len(self.places) else None
        if place is None:
            self._fail(f"{does} through a pointer that leads to no tensor")
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if size != place.size:
            self._fail(f"{does} {size} bytes for an element of {place}, whose elements have {place.size}")
        addresses = addresses.view(np.int64) - (number << _NUMBER)
        last -= number << _NUMBER
        if addresses.min() < place.first or last >= place.first + place.bytes:
            outside = last if last >= place.first + place.bytes else int(addresses.min())
            self._fail(f"{does} element {(outside - place.first) // size} of {place}, outside of it")
        return place, addresses

    def _elements(self, place: _Place, addresses: np.ndarray) -> np.ndarray:
        stamps = self.stamps[place.storage]
        assert len(stamps) == place.elements, f"{self.kernel}: {place} shares its memory with another type"
        return (addresses - place.storage) // place.size

    def _fail(self, what: str) -> None:
        self.fault = Fault(f"{self.kernel}: program {self.program} {what}")
        raise self.fault


def _plain(pointers: TensorHandle) -> TensorHandle:
    return TensorHandle(pointers.data & np.uint64((1 << _NUMBER) - 1), pointers.dtype)


@contextmanager
def checked_launches(seed: int) -> Iterator[Checker]:
    """Programs run in an order that the seed decides; what they do wrong raises a Fault."""
    checker = Checker(seed)
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in _HOOKS.items():
            for name in names:
                patch.setattr(owner, name, _around(getattr(owner, name), getattr(checker, name)))
        try:
            yield checker
        except InterpreterError:  # its text repeats the fault's, once for every function around
            if checker.fault is None:
                raise
            raise checker.fault from None


def _around(original: Callable, method: Callable) -> Callable:
    def hooked(owner, *args, **kwargs):
        return method(partial(original, owner), owner, *args, **kwargs)

    return hooked
