"""A GPU that is not there: tensors "on cuda" without memory, and a torch.cuda that agrees to everything.

A tensor on the pretended GPU is a meta tensor that tells Python "cuda:0": shapes, dtypes and devices follow torch's own
rules, mixing it with a CPU tensor raises, its address is one that an allocator could have given, and nothing is
computed, so that the shapes of real models cost nothing. Results read as 0, so that two of them are equal; to read one
while a graph is being captured is an error, as it would be there. CPU tensors stay as they are.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before anything is replaced: it looks through torch.cuda
import torch.profiler
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
_profile = torch.profiler.profile
_known = WeakTensorKeyDictionary()  # what is in few tensors: numbers that were sent, what shapes depend on
_capturing = False
BLOCK, FIRST, LAST = 2**20, 2**40, 2**46  # what a machine's own addresses begin behind
_free, _places = itertools.count(FIRST, BLOCK), {}  # addresses; by storage its size and where it begins
_SO = {getattr(torch.ops.aten, name) for name in ("all", "eq", "ge", "le")}  # true: everything reads as 0


def is_there(tensor: Tensor) -> bool:
    """Whether a tensor is on the pretended GPU."""
    return _device(tensor) == META


def is_address(number: int) -> bool:
    """Whether something may lie there on the pretended GPU."""
    return FIRST <= number < LAST


def _says_so(tensor: Tensor) -> bool:
    """Torch's own code below the dispatcher is told the truth: no mode is in force there."""
    return bool(torch._C._len_torch_dispatch_stack()) and is_there(tensor)


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """One GPU, for this process and thread, until the block ends."""
    with ExitStack() as patches:
        for name, stand_in in _CUDA.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, stand_in, create=True))
        for name, value in _TENSOR.items():
            patches.enter_context(mock.patch.object(Tensor, name, value, create=True))
        for name in ("tensor", "as_tensor", "asarray"):
            patches.enter_context(mock.patch.object(torch, name, _made_here(getattr(torch, name))))
        patches.enter_context(mock.patch.object(torch, "Generator", _Generator))
        patches.enter_context(mock.patch.object(torch, "compile", _uncompiled))
        patches.enter_context(mock.patch.object(torch.profiler, "profile", _profile_of_cpu))
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


def _made_here(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For what makes a tensor of numbers, such as a learning rate: they are known."""

    @functools.wraps(function)
    def make(data: Any, *args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Tensor:
        if isinstance(data, Tensor) or _here(device) != META:
            options = {"requires_grad": True} if requires_grad else {}
            return function(data, *args, device=_here(device), **options, **kwargs)
        value = function(data, *args, **kwargs)
        there = value.to(META)
        _known[there] = value
        return there.requires_grad_(requires_grad)

    return make


class _Dispatch(TorchDispatchMode):
    """Every operation for "cuda" goes to the meta device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = {name: _here(value) for name, value in (kwargs or {}).items()}
        kwargs.pop("pin_memory", None)
        if (read := _read(function, args, kwargs)) is not None:
            return read
        try:
            result = function(*map(_here, args), **kwargs)
        except NotImplementedError:
            if not function._schema.returns:  # a fused optimizer's step, which only writes
                return None
            return _on_zeros(function, args, kwargs)  # its result's shape depends on what is in its tensors
        if function.overloadpacket in _SO and is_there(result) and result.numel() == 1:
            _known[result] = torch.ones(result.shape, dtype=result.dtype)
        return result


def _read(function: Any, args: tuple, kwargs: dict) -> Any:
    """What comes back where an operation waits for the GPU; None for any other one."""
    aten = torch.ops.aten
    if function is aten.copy_.default and is_there(args[1]) and not is_there(args[0]):
        return _waited() or args[0].zero_()
    if not args or not isinstance(args[0], Tensor) or not is_there(args[0]):
        return None
    if function is aten._local_scalar_dense.default:
        return _waited() or _content(args[0]).item()
    if function is aten._to_copy.default and kwargs.get("device", META) != META:
        return _waited() or _content(args[0]).to(kwargs.get("dtype"))
    if function in (aten.equal.default, aten.allclose.default):
        return _waited() or True
    return None


def _content(tensor: Tensor) -> Tensor:
    """What is read: 0, or what is known."""
    return _known.get(tensor, torch.zeros(tensor.shape, dtype=tensor.dtype))


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
    """No two storages overlap, and each begins at a multiple of a power of two; an empty one is nowhere."""
    if not is_there(tensor):
        return _data_ptr(tensor)
    storage = tensor.untyped_storage()
    size, key = storage.nbytes(), storage._cdata
    if size == 0:
        return 0
    if _places.get(key, (0, 0))[0] != size:  # another storage where one was that is gone
        _places[key] = size, next(_free)
        for _ in range(size // BLOCK):
            next(_free)
    return _places[key][1] + tensor.storage_offset() * tensor.element_size()


_TENSOR = {
    "device": property(lambda tensor: GPU if _says_so(tensor) else _device(tensor)),
    "is_cuda": property(_says_so),
    "is_meta": property(lambda tensor: is_there(tensor) and not _says_so(tensor)),
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


def _profile_of_cpu(*_: Any, activities: Any = None, **options: Any) -> Any:
    """A profiler that is to watch a GPU complains of each operation that there is none."""
    return _profile(activities=[torch.profiler.ProfilerActivity.CPU], **options)


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
