"""A GPU that is not there: tensors "on cuda" without memory, and a torch.cuda that agrees to everything.

A tensor on the pretended GPU is a meta tensor that tells Python "cuda:0": shapes, dtypes and devices follow torch's own
rules, mixing it with a CPU tensor raises, its address is one that an allocator could have given, and nothing is
computed, so that the shapes of real models cost nothing. What is read back is 0, and an error while a graph is being
captured, as it would be there. CPU tensors stay as they are.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before anything is replaced: it looks through torch.cuda
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

META, GPU = torch.device("meta"), torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="no GPU: a rehearsal",
    major=9,
    minor=0,
    total_memory=80 * 2**30,
    multi_processor_count=132,
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048,
    warp_size=32,
    L2_cache_size=50 * 2**20,
)
_device = torch._C.TensorBase.device.__get__
_data_ptr = torch._C.TensorBase.data_ptr
_known = WeakTensorKeyDictionary()  # what is in those few tensors whose values other results' shapes depend on
_below, _capturing = 0, False  # inside of torch's own code, which is told the truth; inside of a graph's capture


def is_there(tensor: Tensor) -> bool:
    """Whether a tensor is on the pretended GPU."""
    return _device(tensor) == META


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """One GPU, for this process and thread, until the block ends."""
    with ExitStack() as patches:
        for name, stand_in in _CUDA.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, stand_in, create=True))
        for name, value in _TENSOR.items():
            patches.enter_context(mock.patch.object(Tensor, name, value, create=True))
        for name in ("tensor", "as_tensor", "asarray"):
            patches.enter_context(mock.patch.object(torch, name, _sent_here(getattr(torch, name))))
        patches.enter_context(mock.patch.object(torch, "Generator", _Generator))
        patches.enter_context(mock.patch.object(torch, "compile", _uncompiled))
        patches.enter_context(_Dispatch())
        yield


# ---- tensors --------------------------------------------------------------------------------------------------------


def _here(value: Any) -> Any:
    """meta for cuda, everything else as it is."""
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return META
    return META if isinstance(value, torch.device) and value.type == "cuda" else value


def _sent_here(function: Callable[..., Any]) -> Callable[..., Any]:
    """For what asks CUDA's own library about a device before anything is dispatched."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(_here, args), **{name: _here(value) for name, value in kwargs.items()})

    return call


class _Dispatch(TorchDispatchMode):
    """Every operation for "cuda" goes to the meta device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        global _below
        kwargs = {name: _here(value) for name, value in (kwargs or {}).items()}
        kwargs.pop("pin_memory", None)
        if (read := _read(function, args, kwargs)) is not None:
            return read
        _below += 1
        try:
            return function(*map(_here, args), **kwargs)
        except NotImplementedError:  # its result's shape depends on what is in its tensors
            return _on_zeros(function, args, kwargs)
        finally:
            _below -= 1


def _read(function: Any, args: tuple, kwargs: dict) -> Any:
    """What comes back where an operation waits for the GPU; None for any other one."""
    aten = torch.ops.aten
    if function is aten.copy_.default and is_there(args[1]) and not is_there(args[0]):
        return _waited() or args[0].zero_()
    if not args or not isinstance(args[0], Tensor) or not is_there(args[0]):
        return None
    if function is aten._local_scalar_dense.default:
        return _waited() or torch.zeros((), dtype=args[0].dtype).item()
    if function is aten._to_copy.default and kwargs.get("device", META) != META:
        _waited()
        value = _known.get(args[0])
        return (torch.zeros(args[0].shape) if value is None else value).to(kwargs.get("dtype") or args[0].dtype)
    if function is aten.equal.default:
        return _waited() or True
    return None


def _on_zeros(function: Any, args: tuple, kwargs: dict) -> Any:
    """The same for tensors that are 0 throughout; to know the shape, the host has waited."""
    _waited()

    def zeros(value: Any) -> Any:
        return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value

    def sent(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        there = value.to(META)
        _known[there] = value
        return there

    args, kwargs = tree_map(zeros, (args, kwargs))
    return tree_map(sent, function(*args, **kwargs))


def _waited() -> None:
    if _capturing:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def _address(tensor: Tensor) -> int:
    """Storages begin at multiples of 512 bytes, as torch's allocator has it; an empty one is nowhere."""
    if not is_there(tensor):
        return _data_ptr(tensor)
    storage = tensor.untyped_storage()
    return (storage._cdata << 5) + tensor.storage_offset() * tensor.element_size() if storage.nbytes() else 0


_TENSOR = {
    "device": property(lambda tensor: GPU if not _below and is_there(tensor) else _device(tensor)),
    "is_cuda": property(is_there),
    "is_meta": property(lambda tensor: bool(_below) and is_there(tensor)),
    "data_ptr": _address,
    "to": _sent_here(torch._C.TensorBase.to),
    "cuda": lambda tensor, *_, **__: tensor.to(META),
    "pin_memory": lambda tensor, *_: tensor,
    "get_device": lambda tensor: 0 if is_there(tensor) else -1,
}


class _Generator(torch._C.Generator):
    """A generator of either device is the CPU's."""

    def __new__(cls, device: Any = None):
        return super().__new__(cls)


def _uncompiled(function: Any = None, **options: Any) -> Any:
    """A graph would be compiled for the meta device, which has no code: it runs as it is."""
    return function if function is not None else lambda function: function


# ---- torch.cuda -----------------------------------------------------------------------------------------------------


class _Stream:
    cuda_stream, device = 0, GPU

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: "_Stream") -> None:
        pass

    def synchronize(self) -> None:
        _waited()

    wait_event = record_event = wait_stream


class _Event:
    """Its time is the host's."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: "_Event") -> float:
        return max(other.at - self.at, 1e-6) * 1e3

    def synchronize(self) -> None:
        _waited()

    def query(self) -> bool:
        return True

    wait = record


class _Graph:
    """Nothing is captured: the block runs once, and a replay does nothing."""

    def replay(self) -> None:
        pass

    reset = replay

    def pool(self) -> tuple[int, int]:
        return 0, 0


@contextmanager
def _graph(*_: Any, **__: Any) -> Iterator[None]:
    global _capturing
    _capturing = True
    try:
        yield
    finally:
        _capturing = False


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


_CUDA: dict[str, Any] = {
    "_lazy_init": _nothing,
    "is_available": _always(True),
    "is_initialized": _always(True),
    "is_bf16_supported": _always(True),
    "is_current_stream_capturing": lambda: _capturing,
    "device_count": _always(1),
    "current_device": _always(0),
    "set_device": _nothing,
    "device": _always(nullcontext()),
    "get_device_name": _always(H100.name),
    "get_device_capability": _always((H100.major, H100.minor)),
    "get_device_properties": _always(H100),
    "synchronize": lambda *_: _waited(),
    "Stream": _Stream,
    "current_stream": _always(_Stream()),
    "default_stream": _always(_Stream()),
    "stream": _always(nullcontext()),
    "Event": _Event,
    "CUDAGraph": _Graph,
    "graph": _graph,
    "memory_allocated": _always(0),
    "max_memory_allocated": _always(0),
    "reset_peak_memory_stats": _nothing,
    "empty_cache": _nothing,
    "mem_get_info": _always((H100.total_memory, H100.total_memory)),
    "manual_seed": _nothing,
    "manual_seed_all": _nothing,
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    "profiler": SimpleNamespace(start=_nothing, stop=_nothing),
}
