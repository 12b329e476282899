"""Which implementation runs an operation, and why.

A backend is named per call (`backend="triton"`), per block (`with use_backend("triton"):`) or per process
(`PEFT_KERNELS_BACKEND=triton`), in that order. A named backend that cannot run raises; only "auto" chooses.
"""

import logging
import os
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cuda_kernels import support as cuda
from .devices import architecture, asked_once, constant_in_graphs
from .fastest import FASTEST, SOURCE
from .records import Case
from .torch_kernels import support as plain_torch
from .transforms import WHY_NOT, transformed
from .triton_kernels import support as triton

SUPPORT = {"cuda": cuda, "triton": triton, "torch": plain_torch}  # each says by `unsupported` what it cannot run
BACKENDS = tuple(SUPPORT)
ENVIRONMENT_VARIABLE = "PEFT_KERNELS_BACKEND"


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
    op: str, tensors: Sequence[Tensor | None], requested: str = "auto", *, kind: str = "", **case: Any
) -> Choice:
    """The backend for one call of `op` on `tensors` (None entries are ignored; the first tensor decides the device).

    requested: "auto" | "cuda" | "triton" | "torch"; "auto" defers to `use_backend`, then to PEFT_KERNELS_BACKEND, and
    then chooses: torch on a CPU; on a GPU what fastest.py has for this operation, kind of call (kinds.py), dtype and
    architecture, and Triton where it has nothing. What cannot run there leaves its place to Triton, and that to torch.
    case: fields of `records.Case`: what else a backend may refuse
    Raises BackendUnavailableError (a ValueError), with the reason, if a named backend cannot run the call, and
    ValueError or TypeError, naming the argument.
    """
    name, origin = requested_by(_checked_name(requested, "backend"))
    _checked_name(name, origin if origin == ENVIRONMENT_VARIABLE else "backend")
    if not isinstance(op, str):
        raise TypeError(f"op: expected an operation's name, got {type(op).__name__}")
    first = _first(tensors)
    asked = Case(op, first.device, first.dtype, **case)
    if name != "auto":
        if problem := _unsupported(name, asked):
            raise BackendUnavailableError(f"{op}: backend {name!r} (asked for by {origin}) cannot run: {problem}")
        return Choice(name, f"asked for by {origin}")
    if first.device.type != "cuda":
        return Choice("torch", f"the tensors are on {first.device.type}, where only torch is fast")
    dtype = "float32" if first.dtype == torch.float32 else "half"
    fastest = FASTEST.get((op, kind, dtype, architecture(first.device.index)))
    reason = "the tensors are on a GPU" if fastest is None else f"the fastest on {SOURCE}"
    for name in dict.fromkeys((fastest or "triton", "triton")):
        if not (problem := _unsupported(name, asked)):
            return Choice(name, reason)
        if name == "cuda" and (lacking := cuda.missing("cuda")):
            _tell_once(f"{lacking} Measured as the fastest for some operations here, they leave their place to Triton.")
        reason = f"{name} cannot run: {problem}"
    return Choice("torch", reason)


@asked_once
def _tell_once(words: str) -> None:
    """A log entry and no warning: nothing is wrong with the call, and whoever turns warnings into errors goes on."""
    logging.getLogger("peft_kernels").warning(words)


def _unsupported(name: str, case: Case) -> str | None:
    return WHY_NOT if name != "torch" and transformed() else SUPPORT[name].unsupported(case)


def _first(tensors: Sequence[Tensor | None]) -> Tensor:
    if isinstance(tensors, tuple | list):
        for tensor in tensors:
            if isinstance(getattr(tensor, "device", None), torch.device):
                return tensor
            if tensor is not None:
                break
    raise TypeError(f"tensors: expected a list that begins with a Tensor, got {tensors!r:.80}")


def requested_by(backend: str) -> tuple[str, str]:
    """The backend's name that counts, "auto" perhaps, and where it comes from; not checked."""
    if backend != "auto":
        return backend, "backend="
    if (name := _requested.names[-1]) != "auto":
        return name, "use_backend"
    return _from_environment(), ENVIRONMENT_VARIABLE


def status() -> dict[str, str | None]:
    """Each backend's name with None if it can run on this machine, or else the reason why not."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = Case("", torch.device(device), torch.float32)
    return {name: support.unsupported(case) for name, support in SUPPORT.items()}


def explain(model: nn.Module) -> dict[str, Choice]:
    """For every adapter layer of `model`, by module name: the backend its next forward will take, and the reason, with
    the layers that it runs with as one call, or why it runs by itself.

    "none" with the reason where the forward will raise, since a backend asked for by name cannot run.
    Raises TypeError for what is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    choices = {}
    for name, module in model.named_modules():
        if callable(getattr(module, "backend_choice", None)):
            try:
                choices[name] = _with_group(module, module.backend_choice())
            except BackendUnavailableError as error:
                choices[name] = Choice("none", str(error))
    return choices


def _with_group(module: nn.Module, choice: Choice) -> Choice:
    group, alone = getattr(module, "group", None), getattr(module, "why_alone", "")
    told = alone if group is None else group[0].explain(group[1])
    return choice._replace(reason=f"{choice.reason}; {told}") if told else choice


def _checked_name(name: str, argument: str) -> str:
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        raise ValueError(f"{argument}: expected 'auto', 'cuda', 'triton' or 'torch', got {name!r:.80}")
    return name


@constant_in_graphs
def _from_environment() -> str:
    """os.environ.get, past the five calls that it is made of."""
    value = os.environ._data.get(_ENVIRONMENT_KEY)
    return "auto" if value is None else os.environ.decodevalue(value)


_ENVIRONMENT_KEY = os.environ.encodekey(ENVIRONMENT_VARIABLE)
