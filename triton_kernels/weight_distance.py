"""`weight_distance` in Triton: two launches for every matrix of a call, whatever their shapes; products: one more.

The mathematics: peft_kernels/ops/weight_distance.py; the records: peft_kernels/records.py.

    distance   live, target, W0 -> target, E = F C + (W0 − target), and three partial sums of every tile
    finish     those sums, each matrix's in their order; its bias; loss and factor

Programs find their matrix in a table of addresses and sizes, ordered as the records are: matrices of one layer stay
together, and so does what they share in the L2.
"""

from collections.abc import Sequence
from itertools import chain

import triton
import triton.language as tl
from torch import Tensor

from ..records import Product, Stage
from ..tables import Placed, Tables
from .common import allows_tf32, architecture, launch, load_pointer, load_scale, load_size, scale_arguments
from .config import weight_distance_config
from .replay import replayed
from .weight_distance_product import make_products, multiply
from .weight_distance_records import (
    BASE,
    BASE_BIAS,
    BIAS_GRADIENT,
    COLUMNS,
    DEPTH,
    ERROR,
    FIRST_TILE,
    LEFT,
    LIVE,
    LIVE_BIAS,
    LIVE_BIAS_KIND,
    LIVE_KIND,
    PAIR,
    PAIRS,
    RANK,
    RECORD,
    RIGHT,
    ROWS,
    SHIFT,
    SHIFT_LAST,
    SHIFT_VECTOR,
    TARGET,
    TARGET_BIAS,
    TILES,
    Distances,
    load_live,
    load_tile,
    make_distances,
    pointers_of,
)


@triton.jit
def _distance_kernel(
    records_ptr, tiles_ptr, partial_ptr, decay, rest,
    FOLLOW: tl.constexpr, ALIGNED: tl.constexpr, THIN_ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of one matrix; partial (tiles, 3): Σ E², Σ (target − W0)², Σ W0²; grid (tiles,).

    ALIGNED promises that rows of the large matrices and of rights begin at multiples of 16 bytes and are multiples of 8
    elements long; THIN_ALIGNED likewise of lefts, and of 4 elements. rest = 1 − decay.
    """
    pid = tl.program_id(0)
    record_ptr = records_ptr + tl.load(tiles_ptr + pid) * RECORD
    M = load_size(record_ptr + ROWS).to(tl.int32)
    N = load_size(record_ptr + COLUMNS, 8 if ALIGNED else 1).to(tl.int32)
    tile = (pid - tl.load(record_ptr + FIRST_TILE)).to(tl.int32)
    column_tiles = tl.cdiv(N, BLOCK_N)
    rows = (tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    columns = (tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (rows < M) & (columns < N)
    if FOLLOW:
        follows = tl.load(record_ptr + LIVE) != 0
        live = load_live(record_ptr + LIVE, record_ptr + LIVE_KIND, rows, columns, mask & follows, ALIGNED)
    target_pointers = pointers_of(record_ptr + TARGET, rows, columns, ALIGNED)
    target = tl.load(target_pointers, mask=mask, other=0.0)
    if FOLLOW:
        target = tl.where(follows, decay * target + rest * live, target)
        tl.store(target_pointers, target, mask=mask & follows)
    base = load_tile(record_ptr + BASE, rows, columns, mask, ALIGNED)
    error = base - target  # exact where they are close
    tl.store(partial_ptr + pid * 3 + 1, tl.sum(error * error))
    tl.store(partial_ptr + pid * 3 + 2, tl.sum(base * base))
    for pair in range(tl.load(record_ptr + PAIRS)):
        pair_ptr = record_ptr + pair * PAIR
        R = load_size(pair_ptr + RANK, 4 if THIN_ALIGNED else 1).to(tl.int32)
        left_ptr = load_pointer(pair_ptr + LEFT, tl.float32, THIN_ALIGNED)
        right_ptr = load_pointer(pair_ptr + RIGHT, tl.float32, ALIGNED)
        stride_left = load_size(pair_ptr + LEFT + 1, 4 if THIN_ALIGNED else 1)
        stride_right = load_size(pair_ptr + RIGHT + 1, 4 if ALIGNED else 1)
        for r in range(0, R, BLOCK_R):  # offsets and masks anew every time: kept, they would spill
            offs_r = r + tl.arange(0, BLOCK_R)
            mask_r = offs_r < R
            left_offsets = rows * stride_left + offs_r[None, :]
            right_offsets = offs_r[:, None] * stride_right + columns
            left = tl.load(left_ptr + left_offsets, mask=(rows < M) & mask_r[None, :], other=0.0)
            right = tl.load(right_ptr + right_offsets, mask=mask_r[:, None] & (columns < N), other=0.0)
            error = tl.dot(left, right, error, input_precision="ieee")  # ranks are short: add_dot would spill
    error = tl.where(mask, error, 0.0)  # an Inf makes NaN of what is outside
    tl.store(pointers_of(record_ptr + ERROR, rows, columns, ALIGNED), error, mask=mask)
    tl.store(partial_ptr + pid * 3, tl.sum(error * error))


@triton.jit
def _sum_partials(partial_ptr, count, BLOCK: tl.constexpr):
    """Three sums of `count` triples of numbers."""
    squared = tl.zeros((BLOCK,), tl.float32)
    moved = tl.zeros((BLOCK,), tl.float32)
    base = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        pointers, mask = partial_ptr + offsets * 3, offsets < count
        squared += tl.load(pointers, mask=mask, other=0.0)
        moved += tl.load(pointers + 1, mask=mask, other=0.0)
        base += tl.load(pointers + 2, mask=mask, other=0.0)
    return tl.sum(squared), tl.sum(moved), tl.sum(base)


@triton.jit
def _coefficient(moved, base, count, REDUCTION: tl.constexpr):
    """What a sum of squares is multiplied by; in a relative distance nothing counts that has not moved from zeros."""
    coefficient = 1.0
    if REDUCTION == "mean":
        coefficient = tl.div_rn(1.0, count.to(tl.float32))
    if REDUCTION == "relative":
        floored = tl.maximum(moved, 1e-12 * base, propagate_nan=tl.PropagateNan.ALL)
        inverse = tl.div_rn(1.0, tl.where(floored == 0.0, 1.0, floored))
        coefficient = tl.where(floored == 0.0, 0.0, inverse)
    return coefficient


@triton.jit
def _bias(
    record_ptr, scale, decay, rest,
    FOLLOW: tl.constexpr, REDUCTION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Target and gradient of one bias, (M,); returns Σ e², Σ (target − b0)², Σ b0² and the loss.

    e waits in the gradient's memory for the sum that the gradient depends on.
    """
    M, K = tl.load(record_ptr + ROWS).to(tl.int32), tl.load(record_ptr + DEPTH).to(tl.int32)
    has_last, has_gradient = tl.load(record_ptr + SHIFT_LAST) != 0, tl.load(record_ptr + BIAS_GRADIENT) != 0
    # Read before the loops: after a store in them, it would be read again every time.
    matrix_ptr = load_pointer(record_ptr + SHIFT, tl.float32)
    vector_ptr = load_pointer(record_ptr + SHIFT_VECTOR, tl.float32)
    stride, stride_vector = load_size(record_ptr + SHIFT + 1), load_size(record_ptr + SHIFT_VECTOR + 1)
    squared = tl.zeros((BLOCK_M,), tl.float32)
    moved = tl.zeros((BLOCK_M,), tl.float32)
    of_base = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, M, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        mask = rows < M
        pointers = pointers_of(record_ptr + TARGET_BIAS, rows, 0, False)
        target = tl.load(pointers, mask=mask, other=0.0)
        if FOLLOW:
            follows = tl.load(record_ptr + LIVE_BIAS) != 0
            live = load_live(record_ptr + LIVE_BIAS, record_ptr + LIVE_BIAS_KIND, rows, 0, mask & follows, False)
            target = tl.where(follows, decay * target + rest * live, target)
            tl.store(pointers, target, mask=mask & follows)
        base = load_tile(record_ptr + BASE_BIAS, rows, 0, mask, False)
        difference = base - target
        shift = load_tile(record_ptr + SHIFT_LAST, rows, 0, mask & has_last, False)
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < K
            vector = tl.load(vector_ptr + offs_k * stride_vector, mask=mask_k, other=0.0)
            mask_2d = mask[:, None] & mask_k[None, :]
            matrix = tl.load(matrix_ptr + rows[:, None] * stride + offs_k[None, :], mask=mask_2d, other=0.0)
            shift += tl.sum(matrix * vector[None, :], axis=1)
        e = tl.where(mask, shift + difference, 0.0)
        squared += e * e
        moved += difference * difference
        of_base += base * base
        gradient_pointers = pointers_of(record_ptr + BIAS_GRADIENT, rows, 0, False)
        tl.store(gradient_pointers, e, mask=mask & has_gradient)
    sum_squared, sum_moved, sum_base = tl.sum(squared), tl.sum(moved), tl.sum(of_base)
    coefficient = _coefficient(sum_moved, sum_base, M, REDUCTION)
    tl.debug_barrier()  # what other threads wrote above is read below
    for first in range(0, M, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        mask = (rows < M) & has_gradient
        pointers = pointers_of(record_ptr + BIAS_GRADIENT, rows, 0, False)
        tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) * (2 * coefficient * scale), mask=mask)
    return sum_squared, sum_moved, sum_base, coefficient * sum_squared


@triton.jit
def _finish_kernel(
    records_ptr, partial_ptr, sums_ptr, losses_ptr, factors_ptr, scale_ptr, scale, decay, rest,
    FOLLOW: tl.constexpr, REDUCTION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums, loss, factor and bias of one matrix; grid (matrices,)."""
    index = tl.program_id(0)
    record_ptr = records_ptr + index * RECORD
    first, tiles = tl.load(record_ptr + FIRST_TILE), tl.load(record_ptr + TILES).to(tl.int32)
    count = tl.load(record_ptr + ROWS) * tl.load(record_ptr + COLUMNS)
    squared, moved, base = _sum_partials(partial_ptr + first * 3, tiles, BLOCK)
    scale = load_scale(scale_ptr, scale)
    coefficient = _coefficient(moved, base, count, REDUCTION)
    loss = coefficient * squared
    bias_squared, bias_moved, bias_base = 0.0, 0.0, 0.0
    if tl.load(record_ptr + TARGET_BIAS) != 0:
        bias_squared, bias_moved, bias_base, bias_loss = _bias(
            record_ptr, scale, decay, rest, FOLLOW, REDUCTION, BLOCK_M, BLOCK_K
        )
        loss += bias_loss
    tl.store(sums_ptr + index * 6, squared)
    tl.store(sums_ptr + index * 6 + 1, moved)
    tl.store(sums_ptr + index * 6 + 2, base)
    tl.store(sums_ptr + index * 6 + 3, bias_squared)
    tl.store(sums_ptr + index * 6 + 4, bias_moved)
    tl.store(sums_ptr + index * 6 + 5, bias_base)
    tl.store(losses_ptr + index, loss)
    tl.store(factors_ptr + index, 2 * coefficient * scale)


def weight_distance_tables(stages: Sequence[Stage]) -> Tables:
    """Tables for all stages; the caller keeps the records' tensors."""
    first = stages[0][0]
    config = weight_distance_config(architecture((first.result if isinstance(first, Product) else first.error).device))
    return Tables([
        make_products(stage, config.product) if isinstance(stage[0], Product) else make_distances(stage, config)
        for stage in stages
    ])  # fmt: skip


def weight_distance_fwd(placed: Placed, decay: float | None, reduction: str, loss_scale: float | Tensor) -> None:
    """Every stage: targets, errors, sums, losses, factors and bias gradients of all matrices; products."""
    (scale_ptr, scale), tf32 = scale_arguments(loss_scale), allows_tf32()

    def launch_all() -> tuple[()]:
        for part, tensors in placed.stages:
            if isinstance(part, Distances):
                _launch(part, tensors, decay, reduction, (scale_ptr, scale))
            else:
                multiply(part, tensors, tf32)
        return ()

    tensors = (*chain.from_iterable([tensors for _, tensors in placed.stages]), scale_ptr)
    replayed(placed.memo, (decay, reduction, tf32, None if scale_ptr is not None else scale), launch_all, tensors)


def _launch(
    run: Distances,
    tensors: Sequence[Tensor],
    decay: float | None,
    reduction: str,
    scale: tuple[Tensor | None, float],
) -> None:
    records, tiles, partial, *results = tensors
    follow, moving = decay is not None, (1.0, 0.0) if decay is None else (float(decay), 1.0 - decay)
    all_aligned, short = run.aligned and run.thin_aligned, run.config.finish
    wide = run.config.distance if all_aligned else run.config.unaligned
    launch(
        _distance_kernel,
        (run.programs,),
        (records, tiles, partial, *moving),
        {
            "FOLLOW": follow, "ALIGNED": run.aligned, "THIN_ALIGNED": run.thin_aligned,
            "BLOCK_M": wide.rows, "BLOCK_N": wide.columns, "BLOCK_R": wide.depth,
        },
        wide,
    )  # fmt: skip
    launch(
        _finish_kernel,
        (run.count,),
        (records, partial, *results, *scale, *moving),
        {
            "FOLLOW": follow, "REDUCTION": reduction,
            "BLOCK_M": short.rows, "BLOCK_K": short.columns, "BLOCK": short.depth,
        },
        short,
    )  # fmt: skip
