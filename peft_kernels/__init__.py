"""Fused Triton and CUDA kernels for low-rank adapters of vision-language models (LoRA, MoIL, Aurora)."""

from importlib.metadata import PackageNotFoundError, version

from peft_kernels.backend import BackendUnavailableError, Choice, explain, resolve, use_backend
from peft_kernels.ops.lowrank_linear import lowrank_hidden, lowrank_linear

try:
    __version__ = version("peft_kernels")
except PackageNotFoundError:  # an uninstalled checkout
    __version__ = "0+unknown"

__all__ = [
    "BackendUnavailableError",
    "Choice",
    "explain",
    "lowrank_hidden",
    "lowrank_linear",
    "resolve",
    "use_backend",
]
