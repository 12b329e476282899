"""`lowrank_projections` in Triton: one read of x each way, for all projections; torch's GEMMs add the frozen weights.

The mathematics and every shape: peft_kernels/ops/lowrank_projections.py. M rows, K inputs, N_j outputs, rank R.

    forward    shrink      x -> z: all z_j side by side, or one where one A serves all without a mask on x
               expand      z -> s_j · drop_j(z_j) B_jᵀ + b_j
    backward   up_bwd      dy_j, z -> dy_j B_j by chunks of columns, dB by strips of rows
               hidden_bwd  those chunks -> dz
               down_bwd    x, dz -> dA by strips, Σ_j mask_j ∘ (dz_j A_j)
               sums        dB and dA of their strips

Where there are few chunks, down_bwd makes dz of them itself. Projection j draws its masks from row j of dropout.rng
(J, 2), as lowrank_linear does from a (seed, offset).
"""

import torch
import triton
from torch import Tensor

from ..frozen_products import add_frozen, add_frozen_bwd, columns_of, stacked
from ..records import MOST_PROJECTIONS, Dropout, ProjectionNeeds, Projections
from .common import allows_tf32, architecture, dot_constants, launch, sum_partials
from .config import ProjectionsConfig, ProjectionsShape, down_bwd_makes_dz, projections_config
from .lowrank_linear_bwd import row_strips
from .lowrank_linear_fwd import Drop, blocks, drop_of
from .lowrank_projections_kernels import (
    down_bwd_kernel,
    expand_kernel,
    hidden_bwd_kernel,
    shrink_kernel,
    up_bwd_kernel,
)
from .replay import Memo, again, replayed


def lowrank_projections_fwd(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], projections: Projections, dropout: Dropout,
    *, memo: Memo | None = None,
) -> list[Tensor]:  # fmt: skip
    """-> y_j (M, N_j), and z at the end unless it was given"""
    together = stacked(weights) is not None
    args = x, biases, projections, dropout, together
    downs, ups, scales, given = projections
    if memo is None:
        *ys, z = _forward_again(*args)
    else:
        key = "fwd", x.shape[0], together, x.dtype is torch.float32 and allows_tf32()
        tensors = x, given, dropout.rng, *biases, *downs, *ups, *scales
        *ys, z = replayed(memo, key, lambda: _forward(*args), tensors)
    outputs = (ys[0], columns_of(ys[0], projections.widths)) if together else (None, ys)
    ys = add_frozen(outputs, x, weights)
    return [*ys, z] if given is None else ys


def _forward(
    x: Tensor, biases: list[Tensor | None], projections: Projections, dropout: Dropout, together: bool
) -> tuple[Tensor, ...]:
    """-> y_j without the frozen weights' part, or all of them in one (M, ΣN_j); z, or None if it was given"""
    drop, z = drop_of(dropout), projections.z
    config = _config(x.shape[1], projections, drop, x)
    if z is None:
        z = _shrink(x, projections.downs, _parts(projections, drop), drop, config)
    ys = _expand(z, biases, projections, drop, together, config)
    return *ys, z if projections.z is None else None


def lowrank_projections_bwd(
    dys: list[Tensor], x: Tensor | None, weights: list[Tensor], projections: Projections, dropout: Dropout,
    needs: ProjectionNeeds, *, memo: Memo | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """-> dx, d_down of all A_j one above the other, d_up of all B_j likewise, dz of a given z, as `needs` says

    With a given z, which all share, dx has no part through it.
    """
    args = dys, x, projections, dropout, needs
    if memo is None or not all(map(Tensor.is_contiguous, dys)):
        dx, d_down, d_up, dz = _backward_again(*args)
    else:
        downs, ups, scales, z = projections
        tf32 = dys[0].dtype is torch.float32 and allows_tf32()
        key = needs, dys[0].shape[0], *projections.widths, tf32
        tensors = *dys, x, dropout.rng, z, *downs, *ups, *scales
        dx, d_down, d_up, dz = replayed(memo, key, lambda: _backward(*args), tensors)
    return add_frozen_bwd(dx, dys, weights) if needs.x else None, d_down, d_up, dz


def _backward(
    dys: list[Tensor], x: Tensor | None, projections: Projections, dropout: Dropout, needs: ProjectionNeeds
) -> tuple[Tensor | None, ...]:
    """-> Σ_j mask_j ∘ (dz_j A_j), d_down, d_up, dz of a given z"""
    drop, (downs, ups, _, _) = drop_of(dropout), projections
    columns, through_down = downs[0].shape[1] if downs else 0, (needs.x and bool(downs), needs.down)
    config = _config(columns, projections, drop, dys[0])
    dx = dz = d_down = t = d_up = None
    needs_dz = needs.z or any(through_down)
    if needs_dz or needs.up:
        t, d_up = _up_bwd(dys, projections, drop, (needs_dz, needs.up), config)
    if needs_dz and (needs.z or not down_bwd_makes_dz(config, columns, sum(projections.widths))):
        dz = _hidden_bwd(t, projections, _parts(projections, drop), drop, config)
    if any(through_down):
        dx, d_down = _down_bwd(x, t if dz is None else dz, projections, drop, through_down, config)
    d_down, d_up = sum_partials([(d_down, downs[0] if downs else None), (d_up, ups[0])])
    return dx, d_down, d_up, dz if needs.z else None


_forward_again, _backward_again = again(_forward), again(_backward)


def _parts(projections: Projections, drop: Drop) -> int:
    """How many parts z and dz have: one where all share A and none masks x."""
    return 1 if len(projections.downs) < 2 and drop.place != "input" else len(projections.ups)


def _config(in_features: int, projections: Projections, drop: Drop, like: Tensor) -> ProjectionsConfig:
    shape = ProjectionsShape(
        in_features, max(projections.widths), projections.rank, len(projections.ups), _parts(projections, drop),
        drop.place == "input",
    )  # fmt: skip
    return projections_config(shape, like.dtype, architecture(like.device))


def _shrink(x: Tensor, downs: list[Tensor], parts: int, drop: Drop, config: ProjectionsConfig) -> Tensor:
    """-> z (M, parts · R)"""
    tile, (rank, columns), rows = config.shrink, downs[0].shape, x.shape[0]
    z = x.new_empty(rows, parts * rank)
    rng, threshold, keep_scale, place = drop
    launch(
        shrink_kernel,
        (triton.cdiv(rows, tile.rows),),
        (x, *_four(downs), z, rng, rows, columns, rank, x.stride(0), z.stride(0), threshold, keep_scale),
        {
            "J": parts, "AT_ONCE": config.shrink_at_once, "SHARED": len(downs) == 1, "DROPOUT": place,
            **dot_constants(x.dtype), **blocks(config, rank, BLOCK_M=tile.rows, BLOCK_K=tile.columns),
        },
        tile,
    )  # fmt: skip
    return z


def _expand(
    z: Tensor, biases: list[Tensor | None], projections: Projections, drop: Drop, together: bool,
    config: ProjectionsConfig,
) -> list[Tensor]:  # fmt: skip
    """-> y_j, or all of them in one tensor, without the frozen weights' part"""
    (_, ups, scales, _), tile, rows = projections, config.expand, z.shape[0]
    widths, rank = projections.widths, projections.rank
    made = ys = [z.new_empty(rows, width) for width in ([sum(widths)] if together else widths)]
    if together:  # where each begins, as a tensor that replay.py takes
        ys = [made[0].view(-1)[sum(widths[:j]) :] for j in range(len(widths))]
    rng, threshold, keep_scale, place = drop
    launch(
        expand_kernel,
        (triton.cdiv(rows, tile.rows), sum([triton.cdiv(width, tile.columns) for width in widths])),
        (
            z, *_four(ups), *_four(biases), *_four(scales), *_four(ys), rng, rows, *_four(widths, 0), rank, z.stride(0),
            threshold, keep_scale,
        ),
        {
            "J": len(ups), "ONE_Z": z.shape[1] == rank, "STACKED": together, "DROPOUT": place,
            **dot_constants(z.dtype), **blocks(config, rank, z.stride(0), BLOCK_M=tile.rows, BLOCK_N=tile.columns),
        },
        tile,
    )  # fmt: skip
    return made


def _up_bwd(
    dys: list[Tensor], projections: Projections, drop: Drop, needs: tuple[bool, bool], config: ProjectionsConfig
) -> tuple[Tensor | None, Tensor | None]:
    """-> t (chunks of all projections, M, R) float32 with dy_j B_j = Σ_chunks t; partial sums of d_up"""
    (_, ups, scales, z), (needs_t, needs_up) = projections, needs
    tile, rank, widths, rows, like = config.up_bwd, projections.rank, projections.widths, dys[0].shape[0], dys[0]
    chunks = sum(_chunks(widths, config))
    tiles, strips = row_strips(rows, tile, chunks, like.device)
    t = like.new_empty(chunks, rows, rank, dtype=torch.float32) if needs_t else None
    partials = like.new_empty(strips, sum(widths), rank, dtype=torch.float32) if needs_up else None
    z = z if needs_up else None
    rng, threshold, keep_scale, place = drop
    launch(
        up_bwd_kernel,
        (chunks, strips),
        (
            *_four(dys), *_four(ups), *_four(scales), z, rng, t, partials, rows, *_four(widths, 0), rank,
            *_four([dy.stride(0) for dy in dys], 0), z.stride(0) if needs_up else 0, threshold, keep_scale, tiles,
        ),
        {
            "J": len(ups), "ONE_Z": needs_up and z.shape[1] == rank, "DROPOUT": place, "NEEDS_T": needs_t,
            "NEEDS_UP": needs_up, **dot_constants(like.dtype),
            **blocks(config, rank, z.stride(0) if needs_up else 0, BLOCK_M=tile.rows, BLOCK_N=tile.columns),
        },
        tile,
    )  # fmt: skip
    return t, partials


def _hidden_bwd(t: Tensor, projections: Projections, parts: int, drop: Drop, config: ProjectionsConfig) -> Tensor:
    """-> dz (M, parts · R)"""
    _, rows, rank = t.shape
    dz = t.new_empty(rows, parts * rank, dtype=config.dtype)
    rng, threshold, keep_scale, place = drop
    launch(
        hidden_bwd_kernel,
        (triton.cdiv(rows, config.hidden_bwd.rows), parts),
        (
            t, dz, *_four(projections.scales), rng, rows, rank, *_four(_chunks(projections.widths, config), 0),
            threshold, keep_scale,
        ),
        {
            "J": len(projections.ups), "PARTS": parts, "DROPOUT": place,
            **blocks(config, rank, BLOCK_M=config.hidden_bwd.rows),
        },
        config.hidden_bwd,
    )  # fmt: skip
    return dz


def _down_bwd(
    x: Tensor | None, dz: Tensor, projections: Projections, drop: Drop, needs: tuple[bool, bool],
    config: ProjectionsConfig,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """-> Σ_j mask_j ∘ (dz_j A_j) (M, K), partial sums of d_down; `needs` says which

    dz: (M, parts · R), or t (chunks of all projections, M, R), of which the kernel makes dz itself
    """
    (downs, ups, scales, _), (needs_x, needs_down), late = projections, needs, dz.dim() == 3
    tile, (rank, columns), rows = config.down_bwd, downs[0].shape, dz.shape[-2]
    column_tiles = triton.cdiv(columns, tile.columns)
    tiles, strips = row_strips(rows, tile, column_tiles, dz.device)
    dx = dz.new_empty(rows, columns, dtype=config.dtype) if needs_x else None
    parts, partials = _parts(projections, drop), None
    if needs_down:
        passes = parts // config.down_at_once if len(downs) == 1 else 1
        partials = dz.new_empty(strips * passes, len(downs) * rank, columns, dtype=torch.float32)
    chunks = _four(_chunks(projections.widths, config) if late else [], 0)
    rng, threshold, keep_scale, place = drop
    launch(
        down_bwd_kernel,
        (column_tiles, strips),
        (
            x if needs_down else None, dz, *_four(downs), *_four(scales), dx, partials, rng, rows, columns, rank,
            x.stride(0) if needs_down else 0, threshold, keep_scale, tiles,
        ),
        {
            "J": len(ups), "PARTS": parts, "AT_ONCE": config.down_at_once, "SHARED": len(downs) == 1,
            "DROPOUT": place, "NEEDS_X": needs_x, "NEEDS_DOWN": needs_down, "LATE": late,
            **{f"CHUNKS{j}": count for j, count in enumerate(chunks)}, **dot_constants(config.dtype),
            **blocks(config, rank, BLOCK_M=tile.rows, BLOCK_K=tile.columns),
        },
        tile,
    )  # fmt: skip
    return dx, partials


def _chunks(widths: list[int], config: ProjectionsConfig) -> list[int]:
    """Chunks of columns in which up_bwd reads each dy_j."""
    return [triton.cdiv(width, config.up_bwd.columns) for width in widths]


def _four(values: list, missing: int | None = None) -> tuple:
    """As many as the kernels have arguments for."""
    return *values, *[missing] * (MOST_PROJECTIONS - len(values))
