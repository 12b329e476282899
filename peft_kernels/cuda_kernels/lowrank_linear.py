"""CUDA launchers of the low-rank linear: thin passes around torch's GEMM. Tensors in, tensors out; no checks.

Forward:  shrink (x -> z), mix (z -> S, where a core or a mask asks for it), expand (S -> y0 = s S Bᵀ + b), y0 += x Wᵀ.
Backward: one read of dY gives T and dB, hidden_bwd turns T into dz, one read of x gives dA and dx0 = mask ∘ (dz A),
one launch adds all partial sums, dx0 += dY W. Shapes and formulas: peft_kernels/ops/lowrank_linear.py; the params
struct: csrc/lowrank_linear.h.
"""

import torch
from torch import Tensor

from . import extension
from .common import (
    DTYPES,
    floats,
    hand_over,
    launch,
    require,
    set_core,
    set_scale,
    strips,
    unsupported_device,
    unsupported_dtype,
)


def unsupported(
    x: Tensor, rank: int, input_blocks: int = 1, output_blocks: int = 1, design: str | None = None
) -> str | None:
    """Why these kernels cannot run such a call, or None. The limits: rank 128, and 1024 for rank times blocks."""
    if problem := unsupported_dtype(x.dtype):
        return problem
    module, hidden = extension(), rank * max(input_blocks, output_blocks)
    if rank > module.LOWRANK_LINEAR_MAX_RANK:
        return f"the CUDA kernels take ranks up to {module.LOWRANK_LINEAR_MAX_RANK}, not {rank}"
    if hidden > module.LOWRANK_LINEAR_MAX_HIDDEN:
        return f"the CUDA kernels take rank × blocks up to {module.LOWRANK_LINEAR_MAX_HIDDEN}, not {hidden}"
    if design not in (None, "passes"):
        return f"the CUDA kernels implement design 'passes', not {design!r}"
    if x[..., 0].numel() >= 2**31:
        return f"the CUDA kernels take fewer than 2³¹ rows, not {x[..., 0].numel()}"
    needed = module.lowrank_linear_shared_bytes(DTYPES[x.dtype], rank)
    return unsupported_device(x, needed, f"rank {rank} in {x.dtype}")


def lowrank_linear_fwd(x, weight, bias, down, up, core, scale, hidden, rng, dropout_p, dropout_on, design=None):
    """-> y (M, N), and z (M, I*R) or None if it was given as `hidden`."""
    require(unsupported(x, up.shape[1], weight.shape[1] // down.shape[1], weight.shape[0] // up.shape[0], design))
    params = _params(x, down if hidden is None else None, up, core, scale, rng, dropout_p, dropout_on)
    params.in_features, params.out_features = weight.shape[1], weight.shape[0]
    y = x.new_empty(x.shape[0], weight.shape[0])
    z = x.new_empty(x.shape[0], params.in_blocks * params.rank) if hidden is None else hidden
    if x.shape[0] > 0:
        mixed = _mixed(x, params, core, rng, dropout_on)
        hand_over(params, x=x, bias=bias, z=z, mixed=mixed, y=y)
        params.expand_strips = strips(x, params.rank, up.shape[0], params.out_blocks)
        launch(extension().lowrank_linear_fwd, params, x)
        y.addmm_(x, weight.t())
    return y, z if hidden is None else None


def lowrank_linear_bwd(dy, x, weight, down, up, core, scale, z, rng, dropout_p, dropout_on, needs, design=None):
    """-> dx, d_down, d_up, d_core, d_hidden: those that `needs`, five bools in that order, asks for.

    down: None if z came from outside; then dx has no part through z. x: read for d_down only; weight: for dx only;
    z: for d_up and d_core only.
    """
    need_x, need_down, need_up, need_core, need_hidden = needs
    rows, params = dy.shape[0], _params(dy, down, up, core, scale, rng, dropout_p, dropout_on)
    rank, in_blocks, out_blocks = params.rank, params.in_blocks, params.out_blocks
    d_down, d_up, d_core = (
        torch.empty_like(f) if need else None for f, need in ((down, need_down), (up, need_up), (core, need_core))
    )
    through_z = down is not None and not need_hidden and (need_x or need_down)
    dx = None
    if need_x:
        dx = dy.new_empty(rows, weight.shape[1]) if through_z else dy @ weight
    dz = dy.new_empty(rows, in_blocks * rank) if through_z or need_hidden else None
    if rows == 0:
        return dx, _zero(d_down), _zero(d_up), _zero(d_core), dz if need_hidden else None

    params.out_features = dy.shape[1]
    params.in_features = 0 if down is None else down.shape[1] * in_blocks
    buffers = {}  # kept until the launch is queued
    if need_up:
        params.up_strips = strips(dy, rank, up.shape[0], out_blocks)
        buffers["mixed"] = _mixed(dy, params, core, rng, dropout_on)
        buffers["d_up_partial"] = floats(dy, params.up_strips * out_blocks * up.numel())
    if dz is not None or need_core:
        chunks = -(-up.shape[0] // extension().LOWRANK_LINEAR_COLUMNS)
        buffers["t_partial"] = floats(dy, chunks * rows * out_blocks * rank)
    if need_core:
        params.core_strips = strips(dy, rank, rank, out_blocks * in_blocks)
        buffers["dropped"] = dy.new_empty(rows, in_blocks * rank) if rng is not None and dropout_on == "rank" else None
        buffers["ds"] = dy.new_empty(rows, out_blocks * rank)
        buffers["d_core_partial"] = floats(dy, params.core_strips * core.numel())
    if through_z:
        params.down_strips = strips(dy, rank, down.shape[1], in_blocks)
    if through_z and need_down:
        buffers["d_down_partial"] = floats(dy, params.down_strips * in_blocks * down.numel())
    if buffers:
        hand_over(params, dy=dy, x=x if need_down else None, z=z, dz=dz, dx=dx if through_z else None)
        hand_over(params, d_down=d_down, d_up=d_up, d_core=d_core, **buffers)
        launch(extension().lowrank_linear_bwd, params, dy)
    if need_x and through_z:
        dx.addmm_(dy, weight)
    return dx, d_down, d_up, d_core, dz if need_hidden else None


def lowrank_hidden_fwd(x, down, input_blocks):
    """-> z (M, I*R): z_i = x_i Aᵀ."""
    require(unsupported(x, down.shape[0], input_blocks))
    z = x.new_empty(x.shape[0], input_blocks * down.shape[0])
    if x.shape[0] > 0:
        params = _hidden_params(x, down, input_blocks)
        hand_over(params, x=x, z=z)
        launch(extension().lowrank_linear_fwd, params, x)
    return z


def lowrank_hidden_bwd(dz, x, down, needs):
    """-> dx (M, K) and d_down, of z_i = x_i Aᵀ; `needs` = (x, down)."""
    rows, in_blocks = dz.shape[0], dz.shape[1] // down.shape[0]
    dx = dz.new_empty(rows, in_blocks * down.shape[1]) if needs[0] else None
    d_down = torch.empty_like(down) if needs[1] else None
    if rows == 0:
        return dx, _zero(d_down)
    if needs[0] or needs[1]:
        params = _hidden_params(dz, down, in_blocks)
        params.down_strips = strips(dz, params.rank, down.shape[1], in_blocks)
        partial = floats(dz, params.down_strips * in_blocks * down.numel()) if needs[1] else None
        hand_over(params, x=x if needs[1] else None, dz=dz, dx=dx, d_down=d_down, d_down_partial=partial)
        launch(extension().lowrank_linear_bwd, params, dz)
    return dx, d_down


def _params(like, down, up, core, scale, rng, dropout_p, dropout_on):
    """csrc's params struct with everything but the feature counts and the activations."""
    params = extension().LowRankLinear()
    params.rows, params.rank, params.dtype = like.shape[0], up.shape[1], DTYPES[like.dtype]
    hand_over(params, up=up, down=down, rng=rng)
    set_core(params, core)
    params.up_float = up.dtype == torch.float32
    params.down_float = down is not None and down.dtype == torch.float32
    set_scale(params, scale)
    if rng is not None:
        params.dropout_p = dropout_p
        setattr(params, f"drop_{dropout_on}", True)
    return params


def _hidden_params(like, down, in_blocks):
    params = extension().LowRankLinear()
    params.rows, params.rank, params.dtype = like.shape[0], down.shape[0], DTYPES[like.dtype]
    params.in_blocks, params.in_features = in_blocks, in_blocks * down.shape[1]
    params.down_float = down.dtype == torch.float32
    hand_over(params, down=down)
    return params


def _mixed(like, params, core, rng, dropout_on) -> Tensor | None:
    """A buffer for S, unless S is z."""
    if core is None and (rng is None or dropout_on == "input"):
        return None
    return like.new_empty(like.shape[0], params.out_blocks * params.rank)


def _zero(gradient: Tensor | None) -> Tensor | None:
    return gradient if gradient is None else gradient.zero_()
