"""`gated_query` in Triton: each mode is one launch forward, and two backward, the second of which adds partial sums.

The mathematics and every shape: peft_kernels/ops/gated_query.py. (..., d) come as rows (M, D), M = B·S for "gated". Its
kernels give one program to each sequence and read what they need twice (hidden and text forward; dy, hidden and text
backward): the second time from the caches, at S = 40, D = 768 in bfloat16 61 KB for each tensor, so that 130 sequences
take 16 MB or 24 MB of an H100's 50 MB of L2.
"""

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from ..records import Gate, Modulated, Scale
from .common import architecture, launch, scale_arguments
from .config import Tile, gated_query_config, strip_tiles
from .gated_query_kernels import (
    additive_bwd_kernel,
    additive_fwd_kernel,
    finish_kernel,
    gated_bwd_kernel,
    gated_fwd_kernel,
)
from .replay import again


@again
def additive_query_fwd(hidden: Tensor, text: Modulated, cross: Modulated, scale: Scale) -> Tensor:
    """-> out (M, d)"""
    rows, columns = hidden.shape
    tile, out = gated_query_config(columns).additive, hidden.new_empty(rows, columns)
    launch(
        additive_fwd_kernel,
        (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),),
        (
            hidden, *text, *cross, out, *scale_arguments(scale), rows, columns,
            hidden.stride(0), text.values.stride(0), cross.values.stride(0),
        ),
        _blocks(tile),
        tile,
    )  # fmt: skip
    return out


@again
def additive_query_bwd(
    dy: Tensor, text: Modulated, cross: Modulated, scale: Scale, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """-> d_text, d_gamma, d_beta, d_cross, d_cross_gamma, d_cross_beta, as `needs` says in that order"""
    needs_text, needs_gamma, needs_beta, needs_cross, needs_cross_gamma, needs_cross_beta = needs
    (rows, columns), tile = dy.shape, gated_query_config(dy.shape[1]).additive
    column_tiles = triton.cdiv(columns, tile.columns)
    tiles = strip_tiles(rows, tile, column_tiles, architecture(dy.device))
    strips = triton.cdiv(rows, tiles * tile.rows)
    d_text, d_cross = (dy.new_empty(rows, columns) if needed else None for needed in (needs_text, needs_cross))
    partials = _partials(dy, strips, needs_gamma, needs_beta or needs_cross_beta, needs_cross_gamma)
    (a, gamma), (a_c, cross_gamma) = (
        (moved.values if needs_vector else None, moved.gamma if needs_values else None)
        for moved, needs_vector, needs_values in (
            (text, needs_gamma, needs_text), (cross, needs_cross_gamma, needs_cross),
        )
    )  # fmt: skip
    launch(
        additive_bwd_kernel,
        (column_tiles, strips),
        (
            dy, a, gamma, a_c, cross_gamma, d_text, d_cross, *partials, *scale_arguments(scale), rows, columns,
            dy.stride(0), _row_stride(a), _row_stride(a_c), tiles,
        ),
        _blocks(tile),
        tile,
    )  # fmt: skip
    vectors = (text.gamma, needs_gamma), (text.beta, needs_beta), (cross.gamma, needs_cross_gamma)
    d_gamma, d_beta, *others = _finish(partials, *vectors, (cross.beta, needs_cross_beta))
    return d_text, d_gamma, d_beta, d_cross, *others


@again
def gated_query_fwd(
    hidden: Tensor, text: Modulated, padding_mask: Tensor | None, positions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out (M, d), g (B, S) and τ (B, d), both float32; padding_mask (B, S), positions: S"""
    (rows, columns), sizes = hidden.shape, (positions, positions, hidden.shape[1])
    batch, out = rows // positions, hidden.new_empty(rows, columns)
    scores, gate, total = (hidden.new_empty((batch, size), dtype=torch.float32) for size in sizes)
    args = (hidden, *text, padding_mask, out, scores, gate, total, positions, columns)
    tile = gated_query_config(columns).gated_fwd
    _launch_by_sequence(gated_fwd_kernel, batch, (*args, hidden.stride(0), text.values.stride(0)), columns, tile)
    return out, gate, total


@again
def gated_query_bwd(
    dy: Tensor, hidden: Tensor, text: Modulated, padding_mask: Tensor | None, gate: Gate, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """-> d_hidden, d_text, d_gamma, d_beta, as `needs` says in that order"""
    (rows, columns), (batch, positions) = dy.shape, gate.weights.shape
    d_hidden, d_text = (dy.new_empty(rows, columns) if needed else None for needed in needs[:2])
    partials, q = _partials(dy, batch, *needs[2:], False), torch.empty_like(gate.weights)
    args = (dy, hidden, *text, padding_mask, *gate, q, d_hidden, d_text, *partials[:2], positions, columns)
    strides = (dy.stride(0), hidden.stride(0), text.values.stride(0))
    tile = gated_query_config(columns).gated_bwd
    _launch_by_sequence(gated_bwd_kernel, batch, (*args, *strides), columns, tile)
    unneeded = (text.beta, False)
    grads = _finish(partials, (text.gamma, needs[2]), (text.beta, needs[3]), unneeded, unneeded)
    return d_hidden, d_text, *grads[:2]


def _launch_by_sequence(kernel: JITFunction, batch: int, args: tuple, columns: int, tile: Tile) -> None:
    launch(kernel, (batch,), args, {**_blocks(tile), "CHUNKS": triton.cdiv(columns, tile.columns)}, tile)


def _blocks(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.rows, "BLOCK_D": tile.columns}


def _row_stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _partials(dy: Tensor, count: int, *needed: bool) -> list[Tensor | None]:
    """Places for partial sums of γ, β and γ_c."""
    return [dy.new_empty((count, dy.shape[1]), dtype=torch.float32) if each else None for each in needed]


def _finish(partials: list[Tensor | None], *vectors: tuple[Tensor | None, bool]) -> list[Tensor | None]:
    """(vector, whether it needs a gradient) of γ, β, γ_c, β_c -> gradients; d_cross_beta is d_beta once more."""
    grads = [torch.empty_like(vector) if needed else None for vector, needed in vectors]
    given = next((partial for partial in partials if partial is not None), None)
    if given is not None:
        count, columns = given.shape
        tile = gated_query_config(columns).finish
        grid = (triton.cdiv(columns, tile.columns), 3)
        launch(finish_kernel, grid, (*partials, *grads, count, columns), _blocks(tile), tile)
    return grads
