"""`gated_query` in Triton: each mode is one launch forward, and two backward, the second of which adds partial sums.

The mathematics and every shape: peft_kernels/ops/gated_query.py. (..., d) come as rows (M, D), M = B·S for "gated". Its
kernels give one program to each sequence and read what they need twice (hidden and text forward; dy, hidden and text
backward): the second time from the caches, at S = 40, D = 768 in bfloat16 61 KB for each tensor, so that 130 sequences
take 16 MB or 24 MB of an H100's 50 MB of L2.
"""

import torch
import triton
from torch import Tensor

from .common import architecture, launch, scale_arguments
from .config import Tile, gated_query_config, strip_tiles
from .gated_query_kernels import (
    additive_bwd_kernel,
    additive_fwd_kernel,
    finish_kernel,
    gated_bwd_kernel,
    gated_fwd_kernel,
)

Scale = float | Tensor
Needs = tuple[bool, ...]


def additive_query_fwd(
    hidden: Tensor,
    text: Tensor,
    gamma: Tensor,
    beta: Tensor,
    cross: Tensor,
    cross_gamma: Tensor,
    cross_beta: Tensor,
    scale: Scale,
) -> Tensor:
    """-> out (M, d)"""
    rows, columns = hidden.shape
    tile = gated_query_config(columns).additive
    out = torch.empty(rows, columns, dtype=hidden.dtype, device=hidden.device)
    launch(
        additive_fwd_kernel,
        (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),),
        (
            hidden, text, gamma, beta, cross, cross_gamma, cross_beta, out, *scale_arguments(scale), rows, columns,
            hidden.stride(0), text.stride(0), cross.stride(0),
        ),
        _blocks(tile),
        tile,
    )  # fmt: skip
    return out


def additive_query_bwd(
    dy: Tensor,
    text: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor,
    cross: Tensor | None,
    cross_gamma: Tensor | None,
    cross_beta: Tensor,
    scale: Scale,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """-> d_text, d_gamma, d_beta, d_cross, d_cross_gamma, d_cross_beta, as `needs` says in that order"""
    needs_text, needs_gamma, needs_beta, needs_cross, needs_cross_gamma, needs_cross_beta = needs
    rows, columns = dy.shape
    tile = gated_query_config(columns).additive
    column_tiles = triton.cdiv(columns, tile.columns)
    tiles = strip_tiles(rows, tile, column_tiles, architecture(dy.device))
    strips = triton.cdiv(rows, tiles * tile.rows)
    d_text, d_cross = (dy.new_empty(rows, columns) if needed else None for needed in (needs_text, needs_cross))
    any_beta = needs_beta or needs_cross_beta
    partials = [_partials(dy, strips, needed) for needed in (needs_gamma, any_beta, needs_cross_gamma)]
    text, cross = text if needs_gamma else None, cross if needs_cross_gamma else None
    launch(
        additive_bwd_kernel,
        (column_tiles, strips),
        (
            dy, text, gamma if needs_text else None, cross, cross_gamma if needs_cross else None, d_text, d_cross,
            *partials, *scale_arguments(scale), rows, columns, dy.stride(0), _row_stride(text), _row_stride(cross),
            tiles,
        ),
        _blocks(tile),
        tile,
    )  # fmt: skip
    grads = [
        torch.empty_like(vector) if needed else None
        for vector, needed in zip(
            (gamma, beta, cross_gamma, cross_beta), (needs_gamma, needs_beta, needs_cross_gamma, needs_cross_beta)
        )
    ]
    _finish(partials, *grads)
    d_gamma, d_beta, d_cross_gamma, d_cross_beta = grads
    return d_text, d_gamma, d_beta, d_cross, d_cross_gamma, d_cross_beta


def gated_query_fwd(
    hidden: Tensor, text: Tensor, gamma: Tensor, beta: Tensor, padding_mask: Tensor | None, positions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out (M, d), g (B, S) and τ (B, d), both float32; padding_mask (B, S), positions: S"""
    rows, columns = hidden.shape
    batch, tile = rows // positions, gated_query_config(columns).gated_fwd
    out = torch.empty(rows, columns, dtype=hidden.dtype, device=hidden.device)
    scores, gate, total = (
        torch.empty(batch, size, dtype=torch.float32, device=hidden.device) for size in (positions, positions, columns)
    )
    launch(
        gated_fwd_kernel,
        (batch,),
        (
            hidden, text, gamma, beta, padding_mask, out, scores, gate, total, positions, columns,
            hidden.stride(0), text.stride(0),
        ),
        {**_blocks(tile), "CHUNKS": triton.cdiv(columns, tile.columns)},
        tile,
    )  # fmt: skip
    return out, gate, total


def gated_query_bwd(
    dy: Tensor,
    hidden: Tensor,
    text: Tensor,
    gamma: Tensor,
    beta: Tensor,
    padding_mask: Tensor | None,
    gate: Tensor,
    total: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """-> d_hidden, d_text, d_gamma, d_beta, as `needs` says in that order"""
    rows, columns = dy.shape
    (batch, positions), tile = gate.shape, gated_query_config(columns).gated_bwd
    d_hidden, d_text = (dy.new_empty(rows, columns) if needed else None for needed in needs[:2])
    partials = [_partials(dy, batch, needed) for needed in needs[2:]]
    q = torch.empty_like(gate)
    launch(
        gated_bwd_kernel,
        (batch,),
        (
            dy, hidden, text, gamma, beta, padding_mask, gate, total, q, d_hidden, d_text, *partials,
            positions, columns, dy.stride(0), hidden.stride(0), text.stride(0),
        ),
        {**_blocks(tile), "CHUNKS": triton.cdiv(columns, tile.columns)},
        tile,
    )  # fmt: skip
    d_gamma, d_beta = (torch.empty_like(t) if needed else None for t, needed in zip((gamma, beta), needs[2:]))
    _finish([*partials, None], d_gamma, d_beta, None, None)
    return d_hidden, d_text, d_gamma, d_beta


def _blocks(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.rows, "BLOCK_D": tile.columns}


def _row_stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _partials(dy: Tensor, count: int, needed: bool) -> Tensor | None:
    return torch.empty(count, dy.shape[1], dtype=torch.float32, device=dy.device) if needed else None


def _finish(partials: list[Tensor | None], *grads: Tensor | None) -> None:
    """Sums of γ's, β's and γ_c's partials into d_gamma, d_beta, d_cross_gamma; d_cross_beta is d_beta once more."""
    given = next((partial for partial in partials if partial is not None), None)
    if given is not None:
        count, columns = given.shape
        tile = gated_query_config(columns).finish
        grid = (triton.cdiv(columns, tile.columns), 3)
        launch(finish_kernel, grid, (*partials, *grads, count, columns), _blocks(tile), tile)
