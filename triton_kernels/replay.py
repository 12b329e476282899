"""Calls made again: what launched kernels once launches them again from a list, for a fraction of the host's time.

Triton's own launch works out at every call what it has compiled for such arguments, which takes 8 to 17 µs, and before
it tiles, grids and constants are chosen. All that depends on kinds, sizes and numbers, and not on where tensors lie. So
the first call of a kind is watched: which tensors it makes, and what it launches on which of them. The next call makes
those tensors and launches the compiled kernels on the new addresses.
"""

import copy
import functools
from collections.abc import Callable, Hashable, Sequence
from functools import reduce
from itertools import combinations
from operator import itemgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

from . import common

Memo = dict[Hashable, "Replay"]  # replays of one kind of call, by what else a launch depends on
ALIGNED = 16  # bytes: Triton compiles another kernel for what does not begin at a multiple
PART = 256  # bytes: parts of a workspace begin at multiples, as a GPU's allocations do
MOST = 1024  # replays of one kind


def replayed(memo: Memo | None, key: Hashable, function: Callable[[], tuple], tensors: tuple) -> tuple:
    """function() -> a tuple of tensors and None, again from `memo` where that is possible.

    function: only makes contiguous tensors, and launches kernels on them, on parts of them and on `tensors`
    tensors: contiguous ones, and between them numbers and None
    memo: kept by the caller for as long as dtypes, device, sizes and presence of all tensors, and whatever else
        `function` and compilation depend on, are the same, but for what is in the key. None: nothing is kept
    """
    runtime = knobs.runtime
    replaced = runtime.launch_enter_hook is not _ENTER or runtime.launch_exit_hook is not _EXIT
    if memo is None or common._record is not None or replaced or _ENTER.calls or _EXIT.calls:
        return function()
    try:
        device, present, ties, kinds, parts, launches, results = memo[key]
    except KeyError:
        return _recorded(memo, key, function, tensors)
    stream = 0
    if device.type == "cuda":
        stream = _raw_stream(device.index) if _current_device() == device.index else None
    made = [empty(size, stride, dtype=dtype, device=device) for size, stride, dtype in kinds]
    addresses = [*map(Tensor.data_ptr, (*present(tensors), *made))]
    if stream is None or reduce(or_, addresses) % ALIGNED:
        return function()
    if ties and any(addresses[second] - addresses[first] != offset for first, second, offset in ties):
        return _recorded(memo, key, function, tensors)  # one tensor stood where several stand now, which serves both
    for index, offset in parts:
        addresses.append(addresses[index] + offset)
    for launch, grid, how, pick, rest in launches:
        launch(*grid, stream, *how, (*pick(addresses), *rest))
    return results((*made, None))


def again(launcher: Callable) -> Callable:
    """A decorator: `replayed` for a launcher that does nothing beside, with a memo by how its arguments look."""
    memo = _memos.setdefault(launcher, {})

    @functools.wraps(launcher)
    def call(*args: Any) -> Any:
        flat = _flattened(args)
        looks = (*map(_looks, flat), common.allows_tf32())
        result = replayed(None if None in looks else memo, looks, lambda: _as_tuple(launcher(*args)), tuple(flat))
        return result[0] if single else result

    single = launcher.__annotations__["return"] is Tensor
    return call


def _flattened(args: Sequence) -> list:
    """What is in records and lists, each with its length before it: two lists of one tensor are not one of two."""
    flat: list = []
    for arg in args:
        if isinstance(arg, tuple | list):
            flat += [len(arg), *_flattened(arg)]
        else:
            flat.append(arg)
    return flat


_memos: dict[Callable, Memo] = {}


def forget() -> None:
    """What launchers have kept: for who changes tiles or kernels under them."""
    for memo in _memos.values():
        memo.clear()


def _looks(arg: Any) -> Any:
    """What a launch depends on; None for a tensor whose strides it depends on, too."""
    if isinstance(arg, Tensor):
        return (arg.dtype, arg.device, arg.shape) if arg.is_contiguous() else None
    return _ABSENT if arg is None else arg


def _as_tuple(result: Tensor | tuple) -> tuple:
    return (result,) if isinstance(result, Tensor) else result


_ABSENT = "absent"


class Replay(NamedTuple):
    device: torch.device
    present: Callable[[Sequence], tuple]  # those of the call's tensors that are not None
    ties: list[tuple[int, int, int]]  # those of them that shared memory, and how many bytes they began apart
    made: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]  # what the call returns, and a workspace
    parts: list[tuple[int, int]]  # a tensor's index among those, and how many bytes the part lies behind its start
    launches: list[tuple[Callable, tuple, tuple, Callable, tuple]]
    results: Callable[[Sequence], tuple]  # picks the results from what is made, and None


def _recorded(memo: Memo, key: Hashable, function: Callable[[], tuple], tensors: tuple) -> tuple:
    before, common._recording.launches = getattr(common._recording, "launches", None), []
    try:
        results = function()
        launches = common._recording.launches
    finally:
        common._recording.launches = before
    if (again := _replay(launches, tensors, results)) is not None:
        if len(memo) >= MOST:
            memo.clear()
        memo[key] = again
    return results


def _replay(launches: list[tuple], tensors: Sequence[Tensor | None], results: tuple) -> Replay | None:
    """None if this call cannot be made again: nothing was compiled, or something lies where it may not always lie."""
    if not launches or not all(isinstance(compiled, CompiledKernel) for _, compiled in launches):
        return None
    given, returned = ([t for t in each if isinstance(t, Tensor)] for each in (tensors, results))
    pointers = [arg for launched, _ in launches for arg in launched.args if isinstance(arg, Tensor)]
    if not all(_is_plain(t) for t in (*given, *pointers, *returned)) or any(_within(t, given) for t in returned):
        return None
    owners, inner = [*given, *returned], []
    for t in sorted(pointers, key=Tensor.numel, reverse=True):
        if not _within(t, [*owners, *inner]):
            inner.append(t)
    firsts, size = [], 0
    for t in inner:
        firsts.append(size)
        size += -(-_span(t)[1] // PART) * PART
    made = [(tuple(t.shape), t.stride(), t.dtype) for t in returned]
    if inner:
        made.append(((size,), (1,), torch.uint8))
    count, parts, places = len(given) + len(made), [], {}
    for t in {id(t): t for t in pointers}.values():
        owner = next(each for each in (*owners, *inner) if _within(t, [each]))
        index = next(i for i, each in enumerate((*owners, *inner)) if each is owner)
        offset = t.data_ptr() - owner.data_ptr()
        if index >= len(owners):
            index, offset = count - 1, offset + firsts[index - len(owners)]
        if offset or (index == count - 1 and inner):
            parts.append((index, offset))
            index = count + len(parts) - 1
        places[id(t)] = index
    present = _getter([index for index, t in enumerate(tensors) if isinstance(t, Tensor)])
    steps = [_step(launched, compiled, places) for launched, compiled in launches]
    index = {id(t): index for index, t in enumerate(returned)}
    returns = _getter([-1 if t is None else index[id(t)] for t in results])
    ties = [
        (first, second, other.data_ptr() - t.data_ptr())
        for (first, t), (second, other) in combinations(enumerate(given), 2)
        if _overlap(t, other)
    ]
    return Replay(given[0].device, present, ties, made, parts, steps, returns)


def _is_plain(t: Tensor) -> bool:
    return t.is_contiguous() and t.data_ptr() % ALIGNED == 0


def _within(t: Tensor, others: Sequence[Tensor]) -> bool:
    """Is its memory part of another's?"""
    first, size = _span(t)
    return any(o.data_ptr() <= first and first + size <= o.data_ptr() + _span(o)[1] for o in others)


def _overlap(t: Tensor, other: Tensor) -> bool:
    (first, size), (second, length) = _span(t), _span(other)
    return first < second + length and second < first + size


def _step(launched: common.Launch, compiled: CompiledKernel, places: dict[int, int]) -> tuple:
    """Arguments in the kernel's order; None is compiled away, whatever is passed in its place."""
    names, (grid, args, constants) = launched.kernel.arg_names, launched[1:4]
    count = max(index for index, arg in enumerate(args) if arg is None or isinstance(arg, Tensor)) + 1
    pick = _getter([0 if arg is None else places[id(arg)] for arg in args[:count]])
    rest = (*args[count:], *(constants[name] for name in names[len(args) :]))
    launch, how = _launcher(compiled)
    return launch, (*grid, 1, 1)[:3], how, pick, rest


def _launcher(compiled: CompiledKernel) -> tuple[Callable, tuple]:
    """-> what launches it with (*grid, stream, *the second result, a tuple of the kernel's arguments)

    Triton's launcher looks for scratch memory, of which our kernels have none, and then calls a compiled function. What
    it passes to that is seen here once; where it is anything else than expected, the launcher itself is called. Both
    take the arguments one by one, but for that function since Triton 3.7.
    """
    run, grid_and_stream, passed = compiled.run, (1, 1, 1, 0), []
    how = compiled.function, compiled.packed_metadata, None, None, None  # no hooks
    if getattr(run, "global_scratch_size", None) == getattr(run, "profile_scratch_size", None) == 0:
        watched = copy.copy(run)
        watched.launch = lambda *args: passed.append(args)
        watched(*grid_and_stream, *how)
    if len(passed) == 1 and passed[0][:4] == grid_and_stream:
        run, how = run.launch, passed[0][4:]
        if how[-1] == ():  # the arguments, of which there were none
            return run, how[:-1]
    return lambda *args: run(*args[:-1], *args[-1]), how


def _span(t: Tensor) -> tuple[int, int]:
    """Address and bytes."""
    return t.data_ptr(), t.numel() * t.element_size()


def _getter(indices: list[int]) -> Callable[[Sequence], tuple]:
    """itemgetter, which gives no tuple of one or none."""
    return itemgetter(*indices) if len(indices) > 1 else lambda items: tuple(items[index] for index in indices)


empty = torch.empty_strided
_ENTER, _EXIT = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook  # whose calls watch launches
_current_device = getattr(torch._C, "_cuda_getDevice", None)  # both missing where torch has no CUDA
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
