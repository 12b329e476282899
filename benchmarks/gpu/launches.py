"""Where our own kernels were launched: what says that a result, or a test, is one of the kernels it names."""

import functools
import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from unittest import mock

from torch import Tensor

from peft_kernels import cuda_kernels, triton_kernels
from peft_kernels.triton_kernels import common

PACKAGES = {"triton": triton_kernels, "cuda": cuda_kernels}


@contextmanager
def counted() -> Iterator[Counter]:
    """Launches inside the block, by backend and kind of device: "triton on cuda"."""
    counts: Counter = Counter()
    with ExitStack() as patches:
        for backend, module in _modules("launch"):
            counting = _counting(module.launch, backend, counts)
            patches.enter_context(mock.patch.object(module, "launch", counting))
        for _, module in _modules("replayed"):
            counting = _counting_again(module.replayed, counts)
            patches.enter_context(mock.patch.object(module, "replayed", counting))
        yield counts


@functools.cache
def _modules(function: str) -> list[tuple[str, ModuleType]]:
    """All that know it by that name, imported before any is patched: one imported later would get a patched one."""
    found = []
    for backend, package in PACKAGES.items():
        for each in pkgutil.iter_modules(package.__path__):
            found.append((backend, importlib.import_module(f"{package.__name__}.{each.name}")))
    return [(backend, module) for backend, module in found if hasattr(module, function)]


def _counting(launch: Callable, backend: str, counts: Counter) -> Callable:
    """Both packages' functions get a tensor that says where: Triton's among the kernel's arguments, CUDA's the last.

    What `record_launches` only records is not launched.
    """

    def counting(*args):
        if backend == "triton" and not common._running:
            return launch(*args)
        tensors = args[2] if backend == "triton" else args[2:]
        where = next(each.device.type for each in tensors if isinstance(each, Tensor))
        counts[f"{backend} on {where}"] += 1
        return launch(*args)

    return counting


def _counting_again(replayed: Callable, counts: Counter) -> Callable:
    """Launches that are made again pass by `launch`: so many as were kept, unless the call takes its long way."""

    def counting(memo, key, function, tensors):
        kept, anew = None if memo is None else memo.get(key), []
        results = replayed(memo, key, lambda: anew.append(True) or function(), tensors)
        if not anew:
            counts[f"triton on {kept.device.type}"] += len(kept.launches)
        return results

    return counting
