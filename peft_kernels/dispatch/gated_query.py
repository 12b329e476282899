"""`gated_query` on the chosen backend, a pair of launchers for each mode. Shapes as in peft_kernels/ops/gated_query.py;
(..., d) come as rows (M, d) with unit column stride."""

from types import ModuleType

import torch
from torch import Tensor

from peft_kernels.autocast import autocast_off
from peft_kernels.dispatch.common import as_operator, kernels, spread, tensor_scale
from peft_kernels.torch_kernels import gated_query as torch_kernels


def _module(backend: str) -> ModuleType:
    return torch_kernels if backend == "torch" else kernels(backend, "gated_query")  # Dynamo traces no import


@torch.library.custom_op("peft_kernels::additive_query_fwd", mutates_args=())
def _additive_fwd_op(
    hidden: Tensor,
    text: Tensor,
    gamma: Tensor,
    beta: Tensor,
    cross: Tensor,
    cross_gamma: Tensor,
    cross_beta: Tensor,
    scale: Tensor,
    backend: str,
) -> Tensor:
    return _module(backend).additive_query_fwd(hidden, text, gamma, beta, cross, cross_gamma, cross_beta, scale)


@_additive_fwd_op.register_fake
def _(hidden, text, gamma, beta, cross, cross_gamma, cross_beta, scale, backend):
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("peft_kernels::additive_query_bwd", mutates_args=())
def _additive_bwd_op(
    dy: Tensor,
    text: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor,
    cross: Tensor | None,
    cross_gamma: Tensor | None,
    cross_beta: Tensor,
    scale: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    args = (dy, text, gamma, beta, cross, cross_gamma, cross_beta, scale, needs)
    return [grad for grad in _module(backend).additive_query_bwd(*args) if grad is not None]


@_additive_bwd_op.register_fake
def _(dy, text, gamma, beta, cross, cross_gamma, cross_beta, scale, needs, backend):
    return _empty((dy, gamma, beta, dy, cross_gamma, cross_beta), needs)


@torch.library.custom_op("peft_kernels::gated_query_fwd", mutates_args=())
def _gated_fwd_op(
    hidden: Tensor,
    text: Tensor,
    gamma: Tensor,
    beta: Tensor,
    padding_mask: Tensor | None,
    positions: int,
    backend: str,
) -> list[Tensor]:
    return list(_module(backend).gated_query_fwd(hidden, text, gamma, beta, padding_mask, positions))


@_gated_fwd_op.register_fake
def _(hidden, text, gamma, beta, padding_mask, positions, backend):
    batch, wide = hidden.shape[0] // positions, torch.promote_types(hidden.dtype, torch.float32)
    gate, total = (hidden.new_empty(batch, size, dtype=wide) for size in (positions, hidden.shape[1]))
    return [hidden.new_empty(hidden.shape), gate, total]


@torch.library.custom_op("peft_kernels::gated_query_bwd", mutates_args=())
def _gated_bwd_op(
    dy: Tensor,
    hidden: Tensor,
    text: Tensor,
    gamma: Tensor,
    beta: Tensor,
    padding_mask: Tensor | None,
    gate: Tensor,
    total: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    args = (dy, hidden, text, gamma, beta, padding_mask, gate, total, needs)
    return [grad for grad in _module(backend).gated_query_bwd(*args) if grad is not None]


@_gated_bwd_op.register_fake
def _(dy, hidden, text, gamma, beta, padding_mask, gate, total, needs, backend):
    return _empty((dy, dy, gamma, beta), needs)


def _empty(like: tuple[Tensor | None, ...], needs: list[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, needed in zip(like, needs) if needed]


def additive_query_fwd(backend: str, hidden: Tensor, text, gamma, beta, cross, cross_gamma, cross_beta, scale):
    """-> out (M, d)"""
    args = (hidden, text, gamma, beta, cross, cross_gamma, cross_beta)
    with autocast_off(hidden):
        if not as_operator(backend):
            return _module(backend).additive_query_fwd(*args, scale)
        return _additive_fwd_op(*args, tensor_scale(scale, hidden), backend)


def additive_query_bwd(backend: str, dy: Tensor, text, gamma, beta, cross, cross_gamma, cross_beta, scale, needs):
    """-> d_text, d_gamma, d_beta, d_cross, d_cross_gamma, d_cross_beta, as `needs` says in that order"""
    if not any(needs):
        return (None,) * 6
    args = (dy, text, gamma, beta, cross, cross_gamma, cross_beta)
    with autocast_off(dy):
        if not as_operator(backend):
            return _module(backend).additive_query_bwd(*args, scale, needs)
        return spread(_additive_bwd_op(*args, tensor_scale(scale, dy), needs, backend), needs)


def gated_query_fwd(backend: str, hidden: Tensor, text, gamma, beta, padding_mask, positions: int):
    """-> out (M, d), g (B, S), τ (B, d)"""
    args = (hidden, text, gamma, beta, padding_mask, positions)
    with autocast_off(hidden):
        return tuple(_gated_fwd_op(*args, backend)) if as_operator(backend) else _module(backend).gated_query_fwd(*args)


def gated_query_bwd(backend: str, dy: Tensor, hidden, text, gamma, beta, padding_mask, gate, total, needs):
    """-> d_hidden, d_text, d_gamma, d_beta, as `needs` says in that order"""
    args = (dy, hidden, text, gamma, beta, padding_mask, gate, total, needs)
    with autocast_off(dy):
        if not as_operator(backend):
            return _module(backend).gated_query_bwd(*args)
        return spread(_gated_bwd_op(*args, backend), needs)
