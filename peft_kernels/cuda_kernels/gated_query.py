"""CUDA launchers of the gated query transformation: one kernel forward; backward one, and one that adds partial sums.

Shapes and formulas: peft_kernels/ops/gated_query.py; (..., d) come as rows (M, d). The params struct:
csrc/gated_query.h.
"""

import torch
from torch import Tensor

from . import extension
from .common import (
    DTYPES,
    PROCESSORS,
    floats,
    hand_over,
    launch,
    require,
    set_scale,
    unsupported_device,
    unsupported_dtype,
)

_VECTORS = ("gamma", "beta", "cross_gamma", "cross_beta")


def unsupported(hidden: Tensor) -> str | None:
    """Why these kernels cannot run such a call, or None; hidden is (..., d)."""
    if problem := unsupported_dtype(hidden.dtype):
        return problem
    rows, columns = hidden[..., 0].numel(), hidden.shape[-1]
    if rows * -(-columns // extension().GATED_QUERY_COLUMNS) >= 2**31:
        return f"the CUDA kernels take fewer than 2³¹ pieces of 256 columns, not those of {rows} x {columns}"
    return unsupported_device(hidden, 0, "it")


def additive_query_fwd(hidden, text, gamma, beta, cross, cross_gamma, cross_beta, scale):
    """-> out (M, d)"""
    require(unsupported(hidden))
    params = _params(hidden, gamma=gamma, beta=beta, cross_gamma=cross_gamma, cross_beta=cross_beta)
    out = torch.empty(*hidden.shape, dtype=hidden.dtype, device=hidden.device)
    hand_over(params, hidden=hidden, text=text, cross=cross, out=out)
    set_scale(params, scale)
    launch(extension().additive_query_fwd, params, hidden)
    return out


def additive_query_bwd(dy, text, gamma, beta, cross, cross_gamma, cross_beta, scale, needs):
    """-> d_text, d_gamma, d_beta, d_cross, d_cross_gamma, d_cross_beta, as `needs` says in that order"""
    needs_text, needs_gamma, needs_beta, needs_cross, needs_cross_gamma, needs_cross_beta = needs
    params = _params(dy, gamma=gamma, beta=beta, cross_gamma=cross_gamma, cross_beta=cross_beta)
    module = extension()
    chunks, row_tiles = -(-dy.shape[1] // module.GATED_QUERY_COLUMNS), -(-dy.shape[0] // module.GATED_QUERY_ROWS)
    # Two blocks on a multiprocessor; a function of the shape alone, and with it the order of every sum.
    params.strips = max(1, min(row_tiles, 2 * PROCESSORS // chunks))
    d_text, d_cross = (dy.new_empty(*dy.shape) if needed else None for needed in (needs_text, needs_cross))
    hand_over(params, dy=dy, text=text, cross=cross, d_text=d_text, d_cross=d_cross)
    set_scale(params, scale)
    which = (needs_gamma, needs_beta, needs_cross_gamma, needs_cross_beta)
    grads, partials = _vector_grads(params, dy, which, gamma, beta, cross_gamma, cross_beta)
    launch(module.additive_query_bwd, params, dy)
    del partials  # kept until the launch was queued
    d_gamma, d_beta, d_cross_gamma, d_cross_beta = grads
    return d_text, d_gamma, d_beta, d_cross, d_cross_gamma, d_cross_beta


def gated_query_fwd(hidden, text, gamma, beta, padding_mask, positions):
    """-> out (M, d), g (B, S) and τ (B, d), both float32; padding_mask (B, S), positions: S"""
    require(unsupported(hidden))
    params, batch = _params(hidden, gamma=gamma, beta=beta), hidden.shape[0] // positions
    out = torch.empty(*hidden.shape, dtype=hidden.dtype, device=hidden.device)
    gate, total = (floats(hidden, batch * size).view(batch, size) for size in (positions, hidden.shape[1]))
    params.positions = positions
    hand_over(params, hidden=hidden, text=text, padding_mask=padding_mask, out=out, gate=gate, total=total)
    launch(extension().gated_query_fwd, params, hidden)
    return out, gate, total


def gated_query_bwd(dy, hidden, text, gamma, beta, padding_mask, gate, total, needs):
    """-> d_hidden, d_text, d_gamma, d_beta, as `needs` says in that order"""
    params, q = _params(dy, gamma=gamma, beta=beta), floats(dy, gate.numel())
    params.strips, params.positions = gate.shape
    d_hidden, d_text = (dy.new_empty(*dy.shape) if needed else None for needed in needs[:2])
    hand_over(params, dy=dy, hidden=hidden, text=text, padding_mask=padding_mask, gate=gate, total=total, q=q)
    hand_over(params, d_hidden=d_hidden, d_text=d_text)
    grads, partials = _vector_grads(params, dy, (*needs[2:], False, False), gamma, beta, None, None)
    launch(extension().gated_query_bwd, params, dy)
    del partials
    return d_hidden, d_text, *grads[:2]


def _params(like, **vectors):
    """csrc's params struct with sizes and vectors."""
    params = extension().GatedQuery()
    (params.rows, params.columns), params.dtype = like.shape, DTYPES[like.dtype]
    for name, vector in vectors.items():
        if vector is not None:
            setattr(params, f"{name}_float", vector.dtype == torch.float32)
    hand_over(params, **vectors)
    return params


def _vector_grads(params, like, needs, *vectors):
    """-> the gradients to be, None where not needed, and their partial sums; d_beta and d_cross_beta share theirs."""
    grads = [torch.empty_like(vector) if needed else None for vector, needed in zip(vectors, needs)]
    hand_over(params, **{f"d_{name}": grad for name, grad in zip(_VECTORS, grads)})
    summed = {"gamma": needs[0], "beta": needs[1] or needs[3], "cross_gamma": needs[2]}
    partials = {f"{n}_partial": floats(like, params.strips * params.columns) for n, needed in summed.items() if needed}
    hand_over(params, **partials)
    return grads, partials
