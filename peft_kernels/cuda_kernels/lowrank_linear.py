"""CUDA launchers of the low-rank linear: thin passes around torch's GEMM. Tensors in, tensors out; no checks.

Forward:  shrink (x -> z), mix (z -> S, where a core or a mask asks for it), expand (S -> y0 = s S Bᵀ + b), y0 += x Wᵀ.
Backward: one read of dY gives T and dB, hidden_bwd turns T into dz, one read of x gives dA and dx0 = mask ∘ (dz A),
one launch adds all partial sums, dx0 += dY W. Where there is no core and few chunks of T, the pass over x makes dz of
them itself: a LoRA layer takes five launches for both directions. Shapes: peft_kernels/ops/lowrank_linear.py.

What does not depend on rows or addresses is worked out once for each kind of call and kept: `_kind`, and nearer in the
caller's memo. What follows from that and the rows, strips and the places in the backward's workspace, csrc works out.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels.records import Dropout, Factors, Needs

from . import common, extension
from .common import CORES, DTYPES, NULL, floats, launch

_NO_NEEDS = Needs()


def lowrank_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, dropout: Dropout, design: str | None = None,
    *, memo: dict | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """-> y (M, N), z (M, I·R); z is None when factors.z was given."""
    down, up, core, scale, z = factors
    memo, key = {} if memo is None else memo, common.PROCESSORS
    if key not in memo:
        columns = weight.shape[1] if z is None else 0
        memo[key] = _kind_of(x, columns, weight.shape[0], factors, dropout, _NO_NEEDS)
    kind, rows = memo[key], x.shape[0]
    y = x.new_empty(rows, weight.shape[0])
    hidden = x.new_empty(rows, kind.z_columns) if z is None else z
    mixed = x.new_empty(rows, kind.s_columns) if kind.mixes else NULL
    scale, scale_ptr = (1.0, scale) if isinstance(scale, Tensor) else (scale, NULL)
    tensors = (
        x, NULL if bias is None else bias, NULL if down is None else down, up, NULL if core is None else core,
        hidden, mixed, y, NULL if dropout.rng is None else dropout.rng, scale_ptr,
    )  # fmt: skip
    strides = x.stride(0), kind.z_columns if z is None else z.stride(0)
    launch(kind.module.lowrank_linear_fwd, kind.params, x, rows, scale, *strides, *map(Tensor.data_ptr, tensors))
    return y.addmm_(x, weight.t()), hidden if z is None else None


def lowrank_linear_bwd(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, factors: Factors, dropout: Dropout, needs: Needs,
    *, memo: dict | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """-> dx, d_down, d_up, d_core, dz, as `needs` says in that order. factors.down is None if z came from outside; then
    dx has no part through z.
    """
    down, up, core, scale, z = factors
    columns = 0 if down is None else down.shape[1] * (1 if core is None else core.shape[1])
    memo, key = {} if memo is None else memo, (common.PROCESSORS, needs)
    if key not in memo:
        memo[key] = _kind_of(dy, columns, dy.shape[1], factors, dropout, needs)
    kind, rows = memo[key], dy.shape[0]
    dx = dy.new_empty(rows, columns) if needs.x and columns else NULL
    d_down = torch.empty_like(down) if needs.down else NULL
    d_up = torch.empty_like(up) if needs.up else NULL
    d_core = torch.empty_like(core) if needs.core else NULL
    dz = dy.new_empty(rows, kind.z_columns) if needs.z else NULL
    workspace = floats(dy, kind.module.lowrank_linear_bwd_floats(kind.params, rows))
    scale, scale_ptr = (1.0, scale) if isinstance(scale, Tensor) else (scale, NULL)
    tensors = (
        dy, NULL if x is None else x, NULL if down is None else down, up, NULL if core is None else core,
        NULL if z is None else z, dx, d_down, d_up, d_core, dz, NULL if dropout.rng is None else dropout.rng,
        scale_ptr, workspace,
    )  # fmt: skip
    strides = dy.stride(0), 0 if x is None else x.stride(0), 0 if z is None else z.stride(0), kind.z_columns
    launch(kind.module.lowrank_linear_bwd, kind.params, dy, rows, scale, *strides, *map(Tensor.data_ptr, tensors))
    if needs.x:
        dx = dx.addmm_(dy, weight) if columns else dy @ weight
    return (
        dx if needs.x else None,
        d_down if needs.down else None,
        d_up if needs.up else None,
        d_core if needs.core else None,
        dz if needs.z else None,
    )


def lowrank_hidden_fwd(x: Tensor, down: Tensor, input_blocks: int) -> Tensor:
    """-> z (M, I·R): z_i = x_i Aᵀ."""
    kind = _hidden_kind(x, down, input_blocks, (False, False))
    z = x.new_empty(x.shape[0], kind.z_columns)
    tensors = x, NULL, down, NULL, NULL, z, NULL, NULL, NULL, NULL
    strides = x.stride(0), kind.z_columns
    launch(kind.module.lowrank_linear_fwd, kind.params, x, x.shape[0], 1.0, *strides, *map(Tensor.data_ptr, tensors))
    return z


def lowrank_hidden_bwd(
    dz: Tensor, x: Tensor | None, down: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """-> dx (M, K) and d_down, of z_i = x_i Aᵀ; `needs` says which, in that order."""
    rows, blocks = dz.shape[0], dz.shape[1] // down.shape[0]
    kind = _hidden_kind(dz, down, blocks, needs)
    dx = dz.new_empty(rows, blocks * down.shape[1]) if needs[0] else NULL
    d_down = torch.empty_like(down) if needs[1] else NULL
    workspace = floats(dz, kind.module.lowrank_linear_bwd_floats(kind.params, rows))
    tensors = NULL, NULL if x is None else x, down, *[NULL] * 3, dx, d_down, NULL, NULL, dz, NULL, NULL, workspace
    strides = 0, 0 if x is None else x.stride(0), 0, dz.stride(0)
    launch(kind.module.lowrank_linear_bwd, kind.params, dz, rows, 1.0, *strides, *map(Tensor.data_ptr, tensors))
    return dx if needs[0] else None, d_down if needs[1] else None


# ---- what is worked out once ----------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    module: ModuleType
    params: Any  # csrc's LowRankKind
    z_columns: int
    s_columns: int
    mixes: bool  # is S anything else than z?


@functools.lru_cache(maxsize=1024)
def _kind(
    processors: int, dtype: torch.dtype, in_features: int, out_features: int, rank: int, core: torch.Size | None,
    drop: tuple[str, float] | None, needs: tuple[bool, ...], down_dtype: torch.dtype | None,
    up_dtype: torch.dtype | None, core_dtype: torch.dtype | None, in_blocks: int = 1,
) -> _Kind:  # fmt: skip
    """in_features, out_features: 0 as LowRankKind says;  core: its shape, which has the numbers of blocks;
    drop: where, and with which probability;  needs: as Needs
    """
    module = extension()
    params = module.LowRankKind()
    params.processors, params.dtype, params.in_features = processors, DTYPES[dtype], in_features
    params.out_features, params.rank, params.in_blocks = out_features, rank, in_blocks
    if core is not None:
        params.out_blocks, params.in_blocks, params.core_kind = core[0], core[1], CORES[len(core)]
    for name, factor in (("down", down_dtype), ("up", up_dtype), ("core", core_dtype)):
        setattr(params, f"{name}_float", factor == torch.float32)
    if drop is not None:
        place, params.dropout_p = drop
        setattr(params, f"drop_{place}", True)
    for name, needed in zip(Needs._fields, needs):
        setattr(params, f"needs_{name}", needed)
    mixes = core is not None or params.drop_rank or params.drop_core
    return _Kind(module, params, params.in_blocks * rank, params.out_blocks * rank, mixes)


def _kind_of(
    like: Tensor, in_features: int, out_features: int, factors: Factors, dropout: Dropout, needs: Needs
) -> _Kind:
    down, up, core, _, _ = factors
    return _kind(
        common.PROCESSORS, like.dtype, in_features, out_features, up.shape[1],
        None if core is None else core.shape, None if dropout.rng is None else (dropout.on, dropout.p), needs,
        None if down is None else down.dtype, up.dtype, None if core is None else core.dtype,
    )  # fmt: skip


def _hidden_kind(like: Tensor, down: Tensor, blocks: int, needs: tuple[bool, ...]) -> _Kind:
    """The kind of a call that computes z alone; needs: x, down"""
    rank, columns = down.shape
    needs = (*needs, False, False, False)
    return _kind(
        common.PROCESSORS, like.dtype, blocks * columns, 0, rank, None, None, needs, down.dtype, None, None, blocks
    )
