"""Which implementation runs an operation, and why.

A backend is named per call (`backend="triton"`), per block (`with use_backend("triton"):`) or per process
(`PEFT_KERNELS_BACKEND=triton`), in that order. A named backend that cannot run raises; only "auto" chooses.
"""

import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .fastest import FASTEST, SOURCE

BACKENDS = ("cuda", "triton", "torch")
ENVIRONMENT_VARIABLE = "PEFT_KERNELS_BACKEND"
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANK = {"cuda": 128, "triton": 64}  # what one tile of each kernel set holds


class Choice(NamedTuple):
    """The backend that will run a call, and the reason."""

    name: str
    reason: str


class BackendUnavailableError(ValueError):
    """A backend was asked for by name and cannot run this call; the message says why."""


class _Requested(threading.local):
    def __init__(self):  # no attribute of the class: torch 2.11's Dynamo would read that one, whatever is set
        self.names = ("auto",)  # the innermost block's last


_requested = _Requested()


class use_backend:
    """Context manager: operations of this thread inside the block use `name` ("auto", "cuda", "triton" or "torch").

    Raises ValueError for any other name, and BackendUnavailableError from the operation itself if it cannot run there.
    Works inside functions compiled by torch.compile. Under activation checkpointing name the backend per call or by
    environment instead: the recomputation runs after the block has ended, and may take another backend and its masks.
    """

    def __init__(self, name: str):
        self.name = _checked_name(name, "name")

    def __enter__(self) -> None:
        _requested.names = (*_requested.names, self.name)

    def __exit__(self, *exception) -> None:
        _requested.names = _requested.names[:-1]


def resolve(
    op: str, tensors: Sequence[Tensor | None], requested: str = "auto", *, rank: int = 1, kind: str = ""
) -> Choice:
    """The backend for one call of `op` on `tensors` (None entries are ignored; the first tensor decides the device).

    requested: "auto" | "cuda" | "triton" | "torch"; "auto" defers to `use_backend`, then to PEFT_KERNELS_BACKEND, and
    then chooses: torch on a CPU; on a GPU what fastest.py has for this operation, kind of call (kinds.py) and dtype,
    and Triton where it has nothing. What cannot run there leaves its place to Triton, and that to torch.
    Raises BackendUnavailableError (a ValueError), with the reason, if a named backend cannot run the call.
    """
    name, origin = _checked_name(requested, "backend"), "backend="
    if name == "auto":
        name, origin = _requested.names[-1], "use_backend"
    if name == "auto":
        name, origin = _checked_name(_from_environment(), ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE
    given = [t for t in tensors if t is not None]
    device, dtype = given[0].device, given[0].dtype
    if name != "auto":
        problem = _cannot_run(name, device.type, dtype, rank)
        if problem:
            raise BackendUnavailableError(f"{op}: backend {name!r} (asked for by {origin}) cannot run: {problem}")
        return Choice(name, f"asked for by {origin}")
    if device.type != "cuda":
        return Choice("torch", f"the tensors are on {device.type}, where only torch is fast")
    fastest = FASTEST.get((op, kind, "float32" if dtype == torch.float32 else "half"))
    reason = "the tensors are on a GPU" if fastest is None else f"the fastest on {SOURCE}"
    for name in dict.fromkeys((fastest or "triton", "triton")):
        if not (problem := _cannot_run(name, device.type, dtype, rank)):
            return Choice(name, reason)
        reason = f"{name} cannot run: {problem}"
    return Choice("torch", reason)


def status() -> dict[str, str | None]:
    """Each backend's name with None if it can run on this machine, or else the reason why not."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: _cannot_run(name, device, torch.float32, 1) for name in BACKENDS}


def explain(model: nn.Module) -> dict[str, Choice]:
    """For every adapter layer of `model`, by module name: the backend its next forward will take, and the reason.

    "none" with the reason where the forward will raise, since a backend asked for by name cannot run.
    """
    choices = {}
    for name, module in model.named_modules():
        if callable(getattr(module, "backend_choice", None)):
            try:
                choices[name] = module.backend_choice()
            except BackendUnavailableError as error:
                choices[name] = Choice("none", str(error))
    return choices


def _constant_in_graphs(function: Callable) -> Callable:
    """What torch.compiler.assume_constant_result does, without its import of the whole compiler (1 s)."""
    function._dynamo_marked_constant = True
    return function


def _checked_name(name: str, argument: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{argument}: expected 'auto', 'cuda', 'triton' or 'torch', got {name!r}")
    return name


@_constant_in_graphs
def _from_environment() -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE, "auto")


def _cannot_run(name: str, device_type: str, dtype: torch.dtype, rank: int) -> str | None:
    if name == "torch":
        return None
    if dtype not in KERNEL_DTYPES:
        return f"its kernels take float32, bfloat16 and float16, not {dtype}"
    if rank > MAX_RANK[name]:
        return f"its kernels take ranks up to {MAX_RANK[name]}, not {rank}"
    return _missing(name, device_type) or None


@_constant_in_graphs
def _missing(name: str, device_type: str) -> str:
    """What this machine lacks to run a kernel backend on such a device; "" for nothing."""
    return _find_missing(name, device_type)


@functools.lru_cache
def _find_missing(name: str, device_type: str) -> str:
    if device_type not in ("cuda", "cpu"):
        return f"its kernels run on CUDA devices, not on {device_type}"
    if device_type == "cuda" and torch.version.hip:
        return "its kernels have not been tried on ROCm"
    if device_type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return "its kernels need compute capability 8.0 or newer"
    if name == "triton":
        if not _importable("triton"):
            return "triton is not installed (pip install triton)"
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "the tensors are on the CPU (TRITON_INTERPRET=1, set before the first call, interprets them there)"
        return ""
    if not _importable("peft_kernels._C"):
        return "peft_kernels was built without its CUDA kernels (reinstall with nvcc on the PATH)"
    from peft_kernels.cuda_kernels import extension

    if device_type == "cpu" and not extension().build_info()["emulated"]:
        return "the tensors are on the CPU"
    return ""


def _importable(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None
