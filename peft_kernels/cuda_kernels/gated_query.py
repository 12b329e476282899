"""CUDA launchers of the gated query transformation: one kernel forward; backward one, and one that adds partial sums.

Shapes and formulas: peft_kernels/ops/gated_query.py; (..., d) come as rows (M, d). The params struct:
csrc/gated_query.h.
"""

from typing import Any

import torch
from torch import Tensor

from peft_kernels.records import Gate, Modulated, Scale

from . import extension
from .common import DTYPES, PROCESSORS, floats, hand_over, launch, set_scale


def additive_query_fwd(hidden: Tensor, text: Modulated, cross: Modulated, scale: Scale) -> Tensor:
    """-> out (M, d)"""
    params, out = _params(hidden, text, cross), torch.empty(*hidden.shape, dtype=hidden.dtype, device=hidden.device)
    hand_over(params, hidden=hidden, text=text.values, cross=cross.values, out=out)
    set_scale(params, scale)
    launch(extension().additive_query_fwd, params, hidden)
    return out


def additive_query_bwd(
    dy: Tensor, text: Modulated, cross: Modulated, scale: Scale, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """-> d_text, d_gamma, d_beta, d_cross, d_cross_gamma, d_cross_beta, as `needs` says in that order"""
    needs_text, needs_gamma, needs_beta, needs_cross, needs_cross_gamma, needs_cross_beta = needs
    params, module = _params(dy, text, cross), extension()
    chunks, row_tiles = -(-dy.shape[1] // module.GATED_QUERY_COLUMNS), -(-dy.shape[0] // module.GATED_QUERY_ROWS)
    # Two blocks on a multiprocessor; a function of the shape alone, and with it the order of every sum.
    params.strips = max(1, min(row_tiles, 2 * PROCESSORS // chunks))
    d_text, d_cross = (dy.new_empty(*dy.shape) if needed else None for needed in (needs_text, needs_cross))
    hand_over(params, dy=dy, text=text.values, cross=cross.values, d_text=d_text, d_cross=d_cross)
    set_scale(params, scale)
    grads, partials = _vector_grads(
        params, dy,
        gamma=(text.gamma, needs_gamma), beta=(text.beta, needs_beta),
        cross_gamma=(cross.gamma, needs_cross_gamma), cross_beta=(cross.beta, needs_cross_beta),
    )  # fmt: skip
    launch(module.additive_query_bwd, params, dy)
    del partials  # kept until the launch was queued
    d_gamma, d_beta, d_cross_gamma, d_cross_beta = grads
    return d_text, d_gamma, d_beta, d_cross, d_cross_gamma, d_cross_beta


def gated_query_fwd(
    hidden: Tensor, text: Modulated, padding_mask: Tensor | None, positions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out (M, d), g (B, S) and τ (B, d), both float32; padding_mask (B, S), positions: S"""
    params, batch = _params(hidden, text), hidden.shape[0] // positions
    out = torch.empty(*hidden.shape, dtype=hidden.dtype, device=hidden.device)
    gate, total = (floats(hidden, batch * size).view(batch, size) for size in (positions, hidden.shape[1]))
    params.positions = positions
    hand_over(params, hidden=hidden, text=text.values, padding_mask=padding_mask, out=out, gate=gate, total=total)
    launch(extension().gated_query_fwd, params, hidden)
    return out, gate, total


def gated_query_bwd(
    dy: Tensor, hidden: Tensor, text: Modulated, padding_mask: Tensor | None, gate: Gate, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """-> d_hidden, d_text, d_gamma, d_beta, as `needs` says in that order"""
    params, q = _params(dy, text), floats(dy, gate.weights.numel())
    params.strips, params.positions = gate.weights.shape
    d_hidden, d_text = (dy.new_empty(*dy.shape) if needed else None for needed in needs[:2])
    hand_over(params, dy=dy, hidden=hidden, text=text.values, padding_mask=padding_mask, d_hidden=d_hidden)
    hand_over(params, gate=gate.weights, total=gate.total, q=q, d_text=d_text)
    grads, partials = _vector_grads(params, dy, gamma=(text.gamma, needs[2]), beta=(text.beta, needs[3]))
    launch(extension().gated_query_bwd, params, dy)
    del partials
    return d_hidden, d_text, *grads


def _params(like: Tensor, text: Modulated, cross: Modulated | None = None) -> Any:
    """csrc's params struct with sizes and vectors."""
    params = extension().GatedQuery()
    (params.rows, params.columns), params.dtype = like.shape, DTYPES[like.dtype]
    vectors = {"gamma": text.gamma, "beta": text.beta}
    if cross is not None:
        vectors |= {"cross_gamma": cross.gamma, "cross_beta": cross.beta}
    for name, vector in vectors.items():
        if vector is not None:
            setattr(params, f"{name}_float", vector.dtype == torch.float32)
    hand_over(params, **vectors)
    return params


def _vector_grads(
    params: Any, like: Tensor, **vectors: tuple[Tensor | None, bool]
) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    """Takes each vector by name, and whether it needs a gradient -> places for the gradients, None where not needed,
    and for their partial sums; d_beta and d_cross_beta share theirs."""
    grads = {name: torch.empty_like(vector) if needed else None for name, (vector, needed) in vectors.items()}
    hand_over(params, **{f"d_{name}": grad for name, grad in grads.items()})
    summed = dict.fromkeys(name.replace("cross_beta", "beta") for name, grad in grads.items() if grad is not None)
    partials = {f"{name}_partial": floats(like, params.strips * params.columns) for name in summed}
    hand_over(params, **partials)
    return list(grads.values()), partials
