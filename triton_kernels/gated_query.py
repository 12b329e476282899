"""`gated_query` in Triton: each mode is one launch forward, and two backward, the second of which adds partial sums.

The mathematics and every shape: peft_kernels/ops/gated_query.py. (..., d) come as rows (M, D), M = B·S for "gated". Its
kernels give one program to each sequence and read what they need twice (hidden and text forward; dy, hidden and text
backward): the second time from the caches, at S = 40, D = 768 in bfloat16 61 KB for each tensor, so that 130 sequences
take 16 MB or 24 MB of an H100's 50 MB of L2.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from ..records import Gate, Modulated, Scale
from .common import NULL, Kernel, Kind, chosen, kind_of, programs, scale_arguments, with_nulls
from .config import gated_query_config, strip_tiles
from .gated_query_kernels import (
    additive_bwd_kernel,
    additive_fwd_kernel,
    finish_kernel,
    gated_bwd_kernel,
    gated_fwd_kernel,
)


def additive_query_fwd(hidden: Tensor, text: Modulated, cross: Modulated, scale: Scale) -> Tensor:
    """-> out (M, d)"""
    (rows, columns), (scale_ptr, scale) = hidden.shape, scale_arguments(scale)
    out = hidden.new_empty(rows, columns)
    tensors = (hidden, *text, *cross, out, scale_ptr)
    run = _kept(additive_fwd_kernel, "additive", gated_query_config, columns, kind_of(hidden, tensors))
    plain, strides = _row_strides(hidden, text.values, cross.values)
    tiles = -(-rows // run.tile.rows) * -(-columns // run.tile.columns)
    run.launch((tiles, 1, 1), tensors, (scale, rows, columns, *strides), plain)
    return out


def additive_query_bwd(
    dy: Tensor, text: Modulated, cross: Modulated, scale: Scale, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """-> d_text, d_gamma, d_beta, d_cross, d_cross_gamma, d_cross_beta, as `needs` says in that order"""
    needs_text, needs_gamma, needs_beta, needs_cross, needs_cross_gamma, needs_cross_beta = needs
    (rows, columns), (scale_ptr, scale) = dy.shape, scale_arguments(scale)
    tile = chosen(gated_query_config, columns).additive
    column_tiles = -(-columns // tile.columns)
    tiles = strip_tiles(rows, tile, programs(tile, dy.device) // column_tiles)
    strips = -(-rows // (tiles * tile.rows))
    d_text, d_cross = (dy.new_empty(rows, columns) if needed else None for needed in (needs_text, needs_cross))
    partials = _partials(dy, strips, needs_gamma, needs_beta or needs_cross_beta, needs_cross_gamma)
    read = text.values if needs_gamma else None, cross.values if needs_cross_gamma else None
    gammas = text.gamma if needs_text else None, cross.gamma if needs_cross else None
    tensors = with_nulls(dy, read[0], gammas[0], read[1], gammas[1], d_text, d_cross, *partials, scale_ptr)
    run = _kept(additive_bwd_kernel, "additive", gated_query_config, columns, kind_of(dy, tensors))
    plain, strides = _row_strides(dy, *read)
    run.launch((column_tiles, strips, 1), tensors, (scale, rows, columns, *strides, tiles), plain)
    vectors = (text.gamma, needs_gamma), (text.beta, needs_beta), (cross.gamma, needs_cross_gamma)
    d_gamma, d_beta, *others = _finish(partials, *vectors, (cross.beta, needs_cross_beta))
    return d_text, d_gamma, d_beta, d_cross, *others


def gated_query_fwd(
    hidden: Tensor, text: Modulated, padding_mask: Tensor | None, positions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out (M, d), g (B, S) and τ (B, d), both float32; padding_mask (B, S), positions: S"""
    rows, columns = hidden.shape
    batch, out = rows // positions, hidden.new_empty(rows, columns)
    sizes = (positions, positions, columns)
    scores, gate, total = (hidden.new_empty((batch, size), dtype=torch.float32) for size in sizes)
    tensors = with_nulls(hidden, *text, padding_mask, out, scores, gate, total)
    run = _kept(gated_fwd_kernel, "gated_fwd", gated_query_config, columns, kind_of(hidden, tensors))
    plain, strides = _row_strides(hidden, text.values)
    run.launch((batch, 1, 1), tensors, (positions, columns, *strides), plain)
    return out, gate, total


def gated_query_bwd(
    dy: Tensor, hidden: Tensor, text: Modulated, padding_mask: Tensor | None, gate: Gate, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """-> d_hidden, d_text, d_gamma, d_beta, as `needs` says in that order"""
    (rows, columns), (batch, positions) = dy.shape, gate.weights.shape
    d_hidden, d_text = (dy.new_empty(rows, columns) if needed else None for needed in needs[:2])
    partials, q = _partials(dy, batch, *needs[2:], False), torch.empty_like(gate.weights)
    tensors = with_nulls(dy, hidden, *text, padding_mask, *gate, q, d_hidden, d_text, *partials[:2])
    run = _kept(gated_bwd_kernel, "gated_bwd", gated_query_config, columns, kind_of(dy, tensors))
    plain, strides = _row_strides(dy, hidden, text.values)
    run.launch((batch, 1, 1), tensors, (positions, columns, *strides), plain)
    unneeded = (text.beta, False)
    grads = _finish(partials, (text.gamma, needs[2]), (text.beta, needs[3]), unneeded, unneeded)
    return d_hidden, d_text, *grads[:2]


@functools.lru_cache(maxsize=1024)
def _kept(kernel: JITFunction, name: str, choose: Callable, columns: int, kind: Kind) -> Kernel:
    """name: of its tile;  columns: d"""
    tile = getattr(choose(columns), name)
    chunks = {"CHUNKS": -(-columns // tile.columns)} if name in ("gated_fwd", "gated_bwd") else {}
    return Kernel(kernel, tile, kind.device, BLOCK_M=tile.rows, BLOCK_D=tile.columns, **chunks)


def _row_strides(*tensors: Tensor | None) -> tuple[bool, list[int]]:
    """Does in each of them every row follow the one before; and how far apart rows are. The first is there."""
    plain = all(t is None or t.is_contiguous() for t in tensors)
    columns = tensors[0].shape[1]
    return plain, [columns if plain else 0 if t is None else t.stride(0) for t in tensors]


def _partials(dy: Tensor, count: int, *needed: bool) -> list[Tensor]:
    """Places for partial sums of γ, β and γ_c."""
    return [dy.new_empty((count, dy.shape[1]), dtype=torch.float32) if each else NULL for each in needed]


def _finish(partials: list[Tensor], *vectors: tuple[Tensor | None, bool]) -> list[Tensor | None]:
    """(vector, whether it needs a gradient) of γ, β, γ_c, β_c -> gradients; d_cross_beta is d_beta once more."""
    grads = [torch.empty_like(vector) if needed else None for vector, needed in vectors]
    given = next((partial for partial in partials if partial is not NULL), None)
    if given is not None:
        (count, columns), tensors = given.shape, with_nulls(*partials, *grads)
        run = _kept(finish_kernel, "finish", gated_query_config, columns, kind_of(given, tensors))
        run.launch((-(-columns // run.tile.columns), 3, 1), tensors, (count, columns), plain=True)
    return grads
