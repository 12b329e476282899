"""`batched_lowrank_linear` on the chosen backend. Shapes as in peft_kernels/ops/batched_lowrank_linear.py.

In a compiled graph the torch backend is a custom operator too: on a CPU it reads how many rows each adapter has.
"""

from types import ModuleType

import torch
from torch import Tensor

from peft_kernels.autocast import autocast_off
from peft_kernels.dispatch.common import kernels, spread, tensor_scale


def _module(backend: str) -> ModuleType:
    return kernels(backend, "batched_lowrank_linear")


@torch.library.custom_op("peft_kernels::batched_lowrank_linear_fwd", mutates_args=())
def _fwd_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    segments: list[Tensor],
    backend: str,
) -> list[Tensor]:
    return list(_module(backend).batched_lowrank_linear_fwd(x, weight, bias, down, up, scale, segments))


@_fwd_op.register_fake
def _(x, weight, bias, down, up, scale, segments, backend):
    return [x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], down.shape[1])]


@torch.library.custom_op("peft_kernels::batched_lowrank_linear_bwd", mutates_args=())
def _bwd_op(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    z: Tensor | None,
    segments: list[Tensor],
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    grads = _module(backend).batched_lowrank_linear_bwd(dy, x, weight, down, up, scale, z, segments, needs)
    return [grad for grad in grads if grad is not None]


@_bwd_op.register_fake
def _(dy, x, weight, down, up, scale, z, segments, needs, backend):
    grads = [
        dy.new_empty(dy.shape[0], down.shape[2]) if needs[0] else None,
        torch.empty_like(down) if needs[1] else None,
        torch.empty_like(up) if needs[2] else None,
    ]
    return [grad for grad in grads if grad is not None]


def batched_lowrank_linear_fwd(backend: str, x: Tensor, weight, bias, down, up, scale, segments):
    """-> y (M, N), z (M, R)"""
    with autocast_off(x):
        if not torch.compiler.is_compiling():
            return _module(backend).batched_lowrank_linear_fwd(x, weight, bias, down, up, scale, segments)
        scale = tensor_scale(scale, x, (down.shape[0],))
        y, z = _fwd_op(x, weight, bias, down, up, scale, list(segments), backend)
        return y, z


def batched_lowrank_linear_bwd(backend: str, dy: Tensor, x, weight, down, up, scale, z, segments, needs):
    """-> dx, d_down, d_up; `needs` says which, in that order."""
    if not any(needs):
        return (None,) * 3
    with autocast_off(dy):
        if not torch.compiler.is_compiling():
            return _module(backend).batched_lowrank_linear_bwd(dy, x, weight, down, up, scale, z, segments, needs)
        scale = tensor_scale(scale, dy, (down.shape[0],))
        return spread(_bwd_op(dy, x, weight, down, up, scale, z, list(segments), list(needs), backend), needs)
