"""What kernels need of a machine, whoever launches them."""

import functools
import importlib.util
import sys
from collections.abc import Callable

import torch


def constant_in_graphs(function: Callable) -> Callable:
    """What torch.compiler.assume_constant_result does, without its import of the whole compiler (1 s)."""
    function._dynamo_marked_constant = True
    return function


def asked_once(function: Callable) -> Callable:
    """A decorator: the answer is kept, and graphs take it as a constant.

    Marked as one, an lru_cache alone would not do: Dynamo looks through it.
    """
    kept = functools.lru_cache(maxsize=1024)(function)

    def ask(*args):
        return kept(*args)

    ask.__name__, ask.__doc__, ask.cache_clear = function.__name__, function.__doc__, kept.cache_clear
    return constant_in_graphs(ask)


@asked_once
def architecture(index: int | None = None) -> int:
    """80 for sm_80, 90 for sm_90 and so on; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def no_gpu_for_kernels(device_type: str) -> str:
    """Why tensors on such a device are no place for kernels; "" for nothing. A CPU may have an interpreter for them."""
    if device_type not in ("cuda", "cpu"):
        return f"its kernels run on CUDA devices, not on {device_type}"
    if device_type == "cuda" and torch.version.hip:
        return "its kernels have not been tried on ROCm"
    if device_type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return "its kernels need compute capability 8.0 or newer"
    return ""


def importable(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None
