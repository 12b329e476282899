"""What every operation's dispatch shares: which module runs, and whether as a custom operator."""

import importlib
from types import ModuleType

import torch
from torch import Tensor


def kernels(backend: str, op: str) -> ModuleType:
    """The module with the launchers of `op`."""
    return importlib.import_module(f"peft_kernels.{backend}_kernels.{op}")


def as_operator(backend: str) -> bool:
    """Kernels enter a compiled graph as custom operators; an eager call skips what those cost, about 16 µs."""
    return backend != "torch" and torch.compiler.is_compiling()


def tensor_scale(scale: float | Tensor, like: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """A changed number would be another graph, a changed tensor is not."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return scale if isinstance(scale, Tensor) else torch.full(shape, scale, dtype=dtype, device=like.device)


def spread(grads: list[Tensor], needs: tuple[bool, ...]) -> list[Tensor | None]:
    """The inverse of leaving out what was not needed."""
    remaining = iter(grads)
    return [next(remaining) if needed else None for needed in needs]
