"""`lowrank_linear` on the chosen backend: its launchers called directly, or in a compiled graph as custom operators.

Shapes as in peft_kernels/ops/lowrank_linear.py. Every dtype has been chosen before; autocast, which would choose
others, is off in here.
"""

from types import ModuleType

import torch
from torch import Tensor

from peft_kernels.autocast import autocast_off
from peft_kernels.dispatch.common import as_operator, kernels, spread, tensor_scale
from peft_kernels.torch_kernels import lowrank_linear as torch_kernels


def _module(backend: str) -> ModuleType:
    return torch_kernels if backend == "torch" else kernels(backend, "lowrank_linear")  # Dynamo traces no import


@torch.library.custom_op("peft_kernels::lowrank_linear_fwd", mutates_args=())
def _fwd_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    core: Tensor | None,
    scale: Tensor,
    hidden: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    dropout_on: str,
    design: str | None,
    backend: str,
) -> list[Tensor]:
    y, z = _module(backend).lowrank_linear_fwd(
        x, weight, bias, down, up, core, scale, hidden, rng, dropout_p, dropout_on, design
    )
    return [y] if hidden is not None else [y, z]


@_fwd_op.register_fake
def _(x, weight, bias, down, up, core, scale, hidden, rng, dropout_p, dropout_on, design, backend):
    y = x.new_empty(x.shape[0], weight.shape[0])
    return [y] if hidden is not None else [y, x.new_empty(x.shape[0], x.shape[1] // down.shape[1] * down.shape[0])]


@torch.library.custom_op("peft_kernels::lowrank_linear_bwd", mutates_args=())
def _bwd_op(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    down: Tensor | None,
    up: Tensor,
    core: Tensor | None,
    scale: Tensor,
    z: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    dropout_on: str,
    needs: list[bool],
    design: str | None,
    backend: str,
) -> list[Tensor]:
    grads = _module(backend).lowrank_linear_bwd(
        dy, x, weight, down, up, core, scale, z, rng, dropout_p, dropout_on, needs, design
    )
    return [grad for grad in grads if grad is not None]


@_bwd_op.register_fake
def _(dy, x, weight, down, up, core, scale, z, rng, dropout_p, dropout_on, needs, design, backend):
    rank, out_blocks = up.shape[1], dy.shape[1] // up.shape[0]
    in_blocks = 1 if core is None else core.shape[-2 if core.dim() == 3 else -3]
    grads = [
        dy.new_empty(dy.shape[0], weight.shape[1]) if needs[0] else None,
        torch.empty_like(down) if needs[1] else None,
        torch.empty_like(up) if needs[2] else None,
        torch.empty_like(core) if needs[3] else None,
        dy.new_empty(dy.shape[0], in_blocks * rank) if needs[4] else None,
    ]
    assert out_blocks * up.shape[0] == dy.shape[1]
    return [grad for grad in grads if grad is not None]


@torch.library.custom_op("peft_kernels::lowrank_hidden_fwd", mutates_args=())
def _hidden_fwd_op(x: Tensor, down: Tensor, input_blocks: int, backend: str) -> Tensor:
    return _module(backend).lowrank_hidden_fwd(x, down, input_blocks)


@_hidden_fwd_op.register_fake
def _(x, down, input_blocks, backend):
    return x.new_empty(x.shape[0], input_blocks * down.shape[0])


@torch.library.custom_op("peft_kernels::lowrank_hidden_bwd", mutates_args=())
def _hidden_bwd_op(dz: Tensor, x: Tensor | None, down: Tensor, needs: list[bool], backend: str) -> list[Tensor]:
    return [grad for grad in _module(backend).lowrank_hidden_bwd(dz, x, down, needs) if grad is not None]


@_hidden_bwd_op.register_fake
def _(dz, x, down, needs, backend):
    columns = dz.shape[1] // down.shape[0] * down.shape[1]
    grads = [dz.new_empty(dz.shape[0], columns) if needs[0] else None, torch.empty_like(down) if needs[1] else None]
    return [grad for grad in grads if grad is not None]


def lowrank_linear_fwd(backend: str, x: Tensor, weight, bias, down, up, core, scale, hidden, rng, *options):
    """-> y (M, N), z (M, I·R); z is None when `hidden` was given. options: dropout_p, dropout_on, design"""
    with autocast_off(x):
        if not as_operator(backend):
            return _module(backend).lowrank_linear_fwd(x, weight, bias, down, up, core, scale, hidden, rng, *options)
        scale = tensor_scale(scale, x)
        y, *z = _fwd_op(x, weight, bias, down, up, core, scale, hidden, rng, *options, backend)
        return y, z[0] if z else None


def lowrank_linear_bwd(
    backend: str, dy: Tensor, x, weight, down, up, core, scale, z, rng, dropout_p, dropout_on, needs, design
):
    """-> dx, d_down, d_up, d_core, d_hidden, as `needs` says in that order; `down` is None if `hidden` was given."""
    if not any(needs):
        return (None,) * 5
    with autocast_off(dy):
        options = (z, rng, dropout_p, dropout_on, needs, design)
        if not as_operator(backend):
            return _module(backend).lowrank_linear_bwd(dy, x, weight, down, up, core, scale, *options)
        scale = tensor_scale(scale, dy)
        return spread(_bwd_op(dy, x, weight, down, up, core, scale, *options, backend), needs)


def lowrank_hidden_fwd(backend: str, x: Tensor, down: Tensor, input_blocks: int) -> Tensor:
    """-> z (M, I·R)"""
    with autocast_off(x):
        if not as_operator(backend):
            return _module(backend).lowrank_hidden_fwd(x, down, input_blocks)
        return _hidden_fwd_op(x, down, input_blocks, backend)


def lowrank_hidden_bwd(backend: str, dz: Tensor, x: Tensor | None, down: Tensor, needs: tuple[bool, bool]):
    """-> dx, d_down; `needs` says which, in that order."""
    with autocast_off(dz):
        if not as_operator(backend):
            return _module(backend).lowrank_hidden_bwd(dz, x, down, needs)
        return spread(_hidden_bwd_op(dz, x, down, needs, backend), needs)
