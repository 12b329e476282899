"""CUDA launchers of several low-rank linears of one tensor: thin passes around torch's GEMMs. Tensors in, tensors out.

Forward:  shrink (x -> all z_j), expand (z_j -> y0_j = s_j drop_j(z_j) B_jᵀ + b_j), y0_j += x W_jᵀ.
Backward: one read of all dY_j gives T_j and dB_j, one launch turns T_j into dz_j, one read of x gives all dA_j and
dx0 = Σ_j mask_j ∘ (dz_j A_j), one launch adds all partial sums, dx0 += dY_j W_j. That is two launches forward and four
backward, however many projections there are. Shapes: peft_kernels/ops/lowrank_projections.py.

As for the low-rank linear, what depends on neither rows nor addresses is worked out once: `_kind`, the caller's memo.
"""

import functools
from collections.abc import Iterable
from itertools import repeat
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels.frozen_products import add_frozen, add_frozen_bwd, empty_outputs
from peft_kernels.records import Dropout, ProjectionNeeds, Projections

from . import common, extension
from .common import DTYPES, NULL, floats, launch

_NO_NEEDS = ProjectionNeeds()


def lowrank_projections_fwd(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], projections: Projections, dropout: Dropout,
    *, memo: dict | None = None,
) -> list[Tensor]:  # fmt: skip
    """-> y_j (M, N_j), and z at the end unless it was given"""
    downs, ups, scales, given = projections
    memo, key = {} if memo is None else memo, common.PROCESSORS
    if key not in memo:
        memo[key] = _kind_of(x, projections, dropout, _NO_NEEDS)
    kind, rows, rng = memo[key], x.shape[0], dropout.rng
    outputs, z = empty_outputs(x, weights), x.new_empty(rows, kind.z_columns) if given is None else given
    numbers = [*map(Tensor.data_ptr, (x, z, NULL if rng is None else rng)), x.stride(0), z.stride(0)]
    for down, up, bias, scale, y in zip(_each(downs), ups, biases, scales, outputs[1]):
        bias, row = NULL if bias is None else bias, y if outputs[0] is None else outputs[0]
        numbers += (*map(Tensor.data_ptr, (down, up, bias, scale, y)), row.shape[1])
    launch(kind.module.lowrank_projections_fwd, kind.params, x, rows, numbers)
    ys = add_frozen(outputs, x, weights)
    return [*ys, z] if given is None else ys


def lowrank_projections_bwd(
    dys: list[Tensor], x: Tensor | None, weights: list[Tensor], projections: Projections, dropout: Dropout,
    needs: ProjectionNeeds, *, memo: dict | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """-> dx, d_down of all A_j one above the other, d_up of all B_j likewise, dz of a given z, as `needs` says

    With a given z, which all share, dx has no part through it.
    """
    downs, ups, scales, z = projections
    if not (downs or needs.up or needs.z):
        return add_frozen_bwd(None, dys, weights) if needs.x else None, None, None, None
    like, widths = dys[0], projections.widths
    memo, key = {} if memo is None else memo, (common.PROCESSORS, needs, *widths)  # not all outputs need have been used
    if key not in memo:
        memo[key] = _kind_of(like, projections, dropout, needs)
    kind, rows, rng = memo[key], like.shape[0], dropout.rng
    dx = like.new_empty(rows, downs[0].shape[1]) if needs.x and downs else NULL
    d_down = downs[0].new_empty(len(downs) * kind.rank, downs[0].shape[1]) if needs.down else NULL
    d_up = ups[0].new_empty(sum(widths), kind.rank) if needs.up else NULL
    dz = like.new_empty(rows, kind.rank) if needs.z else NULL
    workspace = floats(like, kind.module.lowrank_projections_bwd_floats(kind.params, rows))
    tensors = NULL if x is None else x, NULL if z is None else z, NULL if rng is None else rng
    numbers = [*map(Tensor.data_ptr, tensors), *(0 if t is None else t.stride(0) for t in (x, z))]
    numbers += map(Tensor.data_ptr, (dx, d_down, d_up, dz))
    for down, up, scale, dy in zip(_each(downs), ups, scales, dys):
        numbers += (*map(Tensor.data_ptr, (down, up, scale, dy)), dy.stride(0))
    launch(kind.module.lowrank_projections_bwd, kind.params, like, rows, numbers, workspace.data_ptr())
    return (
        add_frozen_bwd(dx if downs else None, dys, weights) if needs.x else None,
        d_down if needs.down else None,
        d_up if needs.up else None,
        dz if needs.z else None,
    )


def _each(downs: list[Tensor]) -> Iterable[Tensor]:
    """One for each projection."""
    return downs if downs[1:] else repeat(downs[0] if downs else NULL)


# ---- what is worked out once ----------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    module: ModuleType
    params: Any  # csrc's ProjectionsKind
    rank: int
    z_columns: int


@functools.lru_cache(maxsize=1024)
def _kind(
    processors: int, dtype: torch.dtype, in_features: int, widths: tuple[int, ...], rank: int, shared: bool,
    drop: tuple[str, float] | None, needs: ProjectionNeeds, down_dtype: torch.dtype | None, up_dtype: torch.dtype,
) -> _Kind:  # fmt: skip
    """in_features: 0 where z is given;  widths: N_j;  shared: is there one A for all?  drop: where, how likely"""
    module = extension()
    params = module.ProjectionsKind()
    params.processors, params.dtype, params.in_features = processors, DTYPES[dtype], in_features
    params.count, params.rank, params.shared = len(widths), rank, shared
    for j, width in enumerate(widths):
        params.set_out_features(j, width)
    params.down_float, params.up_float = down_dtype == torch.float32, up_dtype == torch.float32
    if drop is not None:
        place, params.dropout_p = drop
        setattr(params, f"drop_{place}", True)
    needs_x, params.needs_down, params.needs_up, params.needs_z = needs
    params.needs_x = needs_x and in_features > 0
    return _Kind(module, params, rank, rank * (1 if shared and not params.drop_input else len(widths)))


def _kind_of(like: Tensor, projections: Projections, dropout: Dropout, needs: ProjectionNeeds) -> _Kind:
    downs, ups, _, _ = projections
    columns, down_dtype = (downs[0].shape[1], downs[0].dtype) if downs else (0, None)
    return _kind(
        common.PROCESSORS, like.dtype, columns, tuple(projections.widths), projections.rank, len(downs) < 2,
        None if dropout.rng is None else (dropout.on, dropout.p), needs, down_dtype, ups[0].dtype,
    )  # fmt: skip
