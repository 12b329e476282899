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


@constant_in_graphs
def architecture(index: int | None = None) -> int:
    """80 for sm_80, 90 for sm_90 and so on; 0 without a GPU."""
    return _architecture(index)


@functools.lru_cache  # apart from the decorator above, which Dynamo would look through
def _architecture(index: int | None) -> int:
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
