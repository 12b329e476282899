"""The dense update that low-rank factors stand for, alone or on its base: what merging, exporting and inspecting need.

    ΔW[o, i] = s · B · diag(c[o, i]) · A    or    s · B · K[o, i] · A    or, without a core,  s · B · A
    W'       = base + ΔW, summed in float32 and rounded once

A stack of N updates that share A and B, as in a CP decomposition over layers (Aurora, arXiv 2305.08381), is the case of
N output blocks and one input block: ΔW_k = s · B · diag(c_k) · A. All of it is one launch.

Adjoint, with H[o, i] = ∂L/∂ΔW[o, i] and Q[o, i] = H[o, i] Aᵀ (out, R):

    dB = s Σ Q[o, i] diag(c[o, i])      or    s Σ Q[o, i] K[o, i]ᵀ
    dc[o, i] = s · colsum(B ∘ Q[o, i])  or    dK[o, i] = s · Bᵀ Q[o, i]
    dA = s Σ F[o, i]ᵀ H[o, i],    F[o, i] = B diag(c[o, i])  or  B K[o, i];    dbase = H

Q is H's `lowrank_hidden` and dA that operation's gradient: two reads of H by the same kernels, and thin products for
the rest. Nothing of the size of a whole stack exists besides ΔW (forward) and H (backward).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import kinds
from peft_kernels.autocast import autocast_off
from peft_kernels.backend import resolve
from peft_kernels.checks import (
    check_core,
    check_factor,
    check_scale,
    check_shape,
    check_tensor,
    refuse_second_derivative,
)
from peft_kernels.operator import Operator, composed
from peft_kernels.ops.lowrank_linear import lowrank_hidden_bwd, lowrank_hidden_fwd
from peft_kernels.records import Factors, Scale
from peft_kernels.remembered import remembered
from peft_kernels.rows import contiguous, rows
from peft_kernels.torch_kernels import reconstruct as launchers
from peft_kernels.transforms import transformed
from peft_kernels.triton_kernels.config import MAX_RANK  # which no backend's `lowrank_hidden` falls short of

_STRIP = 2**24  # elements of a half-precision gradient that are held in float32 at once


def _shape(factors: Factors, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    out_blocks, in_blocks = factors.blocks
    return factors.up.new_empty(out_blocks * factors.up.shape[0], in_blocks * factors.down.shape[1], dtype=dtype)


reconstruct_fwd = Operator(launchers.reconstruct_fwd, fake=_shape)


def reconstruct_reference(down, up, core=None, *, scale=1.0, base=None):
    """The definition, in the precision of its arguments."""
    if core is None or core.dim() < 3:
        core = (up.new_ones(up.shape[1]) if core is None else core)[None, None]
    core = torch.diag_embed(core) if core.dim() == 3 else core
    delta = scale * torch.einsum("na,oiab,bk->onik", up, core, down).flatten(2).flatten(0, 1)
    return delta if base is None else base + delta


class _Reconstruct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, down, up, core, scale, base, dtype, backend):
        ctx.save_for_backward(down, up, core, scale if isinstance(scale, Tensor) else None)
        ctx.scale, ctx.backend = None if isinstance(scale, Tensor) else scale, backend
        ctx.base_shape = None if base is None else base.shape
        return reconstruct_fwd(backend, Factors(down, up, core, scale), base, dtype)

    @staticmethod
    def backward(ctx, dw):
        refuse_second_derivative("reconstruct")
        down, up, core, scale = ctx.saved_tensors
        needs_down, needs_up, needs_core, _, needs_base = ctx.needs_input_grad[:5]
        scale = ctx.scale if scale is None else scale
        dw = rows(dw)
        d_down = d_up = d_core = d_base = None
        with autocast_off(dw):
            strips = _strips(dw, (down, up, core))
            if needs_up or needs_core:
                q = _hidden(ctx.backend, strips, down, 1 if core is None else core.shape[1])
                d_up, d_core = _thin_adjoint(q, up, core, scale, needs_up, needs_core)
            if needs_down:
                d_down = _d_down(ctx.backend, strips, down, _fold(up, core, scale))
            if needs_base:
                d_base = dw if dw.shape == ctx.base_shape else dw.view(-1, *ctx.base_shape).sum(0)
        return d_down, d_up, d_core, None, d_base, None, None


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _strips(dw: Tensor, factors: tuple[Tensor | None, ...]) -> list[Callable[[], Tensor]]:
    """dw by rows. Masters in float32 get gradients of that grade: a half-precision dw is then widened, some rows at a
    time."""
    masters = dw.dtype.itemsize == 2 and any(t is not None and t.dtype == torch.float32 for t in factors)
    if not masters:
        return [lambda: dw]
    return [partial(Tensor.float, strip) for strip in dw.split(max(1, _STRIP // dw.shape[1]))]


def _hidden(backend: str, strips: list[Callable[[], Tensor]], down: Tensor, in_blocks: int) -> Tensor:
    """Q (O·NB, I, R) in the strips' dtype"""
    parts, q = [down] if backend == "torch" else down.split(MAX_RANK), []
    for strip in strips:
        dw = strip()
        of_parts = [lowrank_hidden_fwd(backend, dw, part, in_blocks) for part in parts]
        q.append(torch.cat([part.unflatten(1, (in_blocks, -1)) for part in of_parts], dim=-1))
    return torch.cat(q)


def _thin_adjoint(
    q: Tensor, up: Tensor, core: Tensor | None, scale: Scale, needs_up: bool, needs_core: bool
) -> tuple[Tensor | None, Tensor | None]:
    """-> d_up, d_core"""
    q = _wide(q).unflatten(0, (-1, up.shape[0])) * scale
    if core is None:
        return q.view_as(up).to(up.dtype), None
    of_up, of_core = ("onir,oir->nr", "onir,nr->oir") if core.dim() == 3 else ("onib,oiab->na", "onib,na->oiab")
    d_up = torch.einsum(of_up, q, core.to(q.dtype)).to(up.dtype) if needs_up else None
    d_core = torch.einsum(of_core, q, up.to(q.dtype)).to(core.dtype) if needs_core else None
    return d_up, d_core


def _fold(up: Tensor, core: Tensor | None, scale: Scale) -> Tensor:
    """s · F (O·NB, I, R), in float32 at least"""
    up = _wide(up) * scale
    if core is None:
        return up[:, None]
    folded = torch.einsum("nr,oir->onir" if core.dim() == 3 else "na,oiab->onib", up, core.to(up.dtype))
    return folded.flatten(0, 1)


def _d_down(backend: str, strips: list[Callable[[], Tensor]], down: Tensor, folded: Tensor) -> Tensor:
    size = down.shape[0] if backend == "torch" else MAX_RANK
    total, first = None, 0
    for strip in strips:
        dw, grads = strip(), []
        lefts = folded[first : first + dw.shape[0]].to(dw.dtype)
        for part, left in zip(down.split(size), lefts.split(size, dim=-1)):
            grads.append(lowrank_hidden_bwd(backend, left.flatten(1), dw, part, (False, True))[1])
        total, first = torch.cat(grads) if total is None else total + torch.cat(grads), first + dw.shape[0]
    return total


def _reconstruct(factors: Factors, base: Tensor | None, stack: bool, backend: str) -> Tensor:
    run, dtype, shape = _checked(factors, base, stack, backend)
    down, up, core, scale, _ = factors
    if not isinstance(scale, Tensor):
        check_scale(scale, down)
    core = _blocks(core, stack)
    if base is None:
        down, up, core = down.to(dtype), up.to(dtype), None if core is None else core.to(dtype)
    if run != "torch" and isinstance(scale, Tensor):
        scale = scale.to(torch.float32)
    base = None if base is None else base.reshape(-1, base.shape[-1]).contiguous()
    if run is None:
        return composed(launchers.reconstruct_composed, Factors(down, up, core, scale), base, dtype).view(shape)
    return _Reconstruct.apply(down.contiguous(), up.contiguous(), contiguous(core), scale, base, dtype, run).view(shape)


def _blocks(core: Tensor | None, stack: bool) -> Tensor | None:
    """core[o, i], as kernels take it"""
    if core is None or (core.dim() > 2 and not stack):
        return core
    return core[:, None] if stack else core[None, None]


class _Plan(NamedTuple):
    """What the checks of calls that look alike came to."""

    backend: str | None  # None inside transforms
    dtype: torch.dtype  # the result's
    shape: tuple[int, ...]


@remembered
def _checked(factors: Factors, base: Tensor | None, stack: bool, backend: str) -> _Plan:
    """Raises whatever is to be raised about a call, but for a number as its scale."""
    (down, up, core, scale, _), dtype = factors, _check_factors(factors, base)
    if isinstance(scale, Tensor):
        check_scale(scale, down)
    rank, block = down.shape[0], (up.shape[0], down.shape[1])
    if stack:
        if core.dim() not in (2, 3) or tuple(core.shape[1:]) not in ((rank,), (rank, rank)):
            raise ValueError(f"core: expected (N, R) or (N, R, R) with R = {rank}, got {tuple(core.shape)}")
    elif core is not None:
        check_core(core, rank)
    core = _blocks(core, stack)
    out_blocks, in_blocks = blocks = factors._replace(core=core).blocks
    if stack:
        shape = (out_blocks, *block)
        if base is not None and tuple(base.shape) not in (block, shape):
            expected = f"{block} or {shape} = ([N,] out_features, in_features)"
            raise ValueError(f"base: expected shape {expected}, got {tuple(base.shape)}")
    else:
        shape = (out_blocks * block[0], in_blocks * block[1])
        if base is not None:
            check_shape("base", base, shape, "(out_features, in_features)")
    kind = kinds.core(None if core is None else core.dim() - 2)
    like = next(t for t in (base, down, up, core) if t is not None and t.dtype == dtype)
    choice = resolve("reconstruct", (like,), backend, kind=kind, blocks=blocks, shape=block)
    name = choice.name if 0 not in shape else "torch"  # an empty stack: nothing to launch
    return _Plan(None if transformed() else name, dtype, shape)


def _check_factors(factors: Factors, base: Tensor | None) -> torch.dtype:
    """-> the result's"""
    named = {name: t for name, t in zip(("down", "up", "core"), factors) if t is not None or name != "core"}
    for name, factor in named.items():
        check_tensor(name, factor)
    if base is not None:
        check_tensor("base", base)
    given = [*named.values()] if base is None else [base]
    like = next((t for t in given if t.dtype != torch.float32), given[0])
    for name, factor in named.items():
        check_factor(name, factor, like)
    down, up, *_ = factors
    for name in ("down", "up"):
        if named[name].dim() != 2 or 0 in named[name].shape:
            raise ValueError(f"{name}: expected 2 dimensions, none of them 0, got shape {tuple(named[name].shape)}")
    if up.shape[1] != down.shape[0]:
        expected = f"(out_features / output blocks, R) with R = {down.shape[0]}"
        raise ValueError(f"up: expected shape {expected}, got {tuple(up.shape)}")
    return torch.float32 if any(t.dtype != given[0].dtype for t in given) else given[0].dtype


def reconstruct(
    down: Tensor,
    up: Tensor,
    core: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    base: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """base + scale · B core A, summed in float32 and rounded once; without base, the update alone. Differentiable.

    down: (R, in_features / I);  up: (out_features / O, R)
    core: None | (R,) | (R, R) with O = I = 1 | (O, I, R) | (O, I, R, R), as in `lowrank_linear`
    scale: a number, or a 0-d tensor on the same device (takes no gradient)
    base: None, or (out_features, in_features): the frozen weight. The factors then have its dtype or float32.
    backend: "auto" | "cuda" | "triton" | "torch"; any rank
    returns W: (out_features, in_features) in base's dtype; without base in the factors', or float32 if they differ

    Source: docs/method.md, section 2; merging as LoRA's authors do (arXiv 2106.09685, section 4.1), rounded once.
    Raises ValueError or TypeError, naming the argument, before anything runs; BackendUnavailableError (a ValueError)
    if a backend asked for by name cannot run.
    """
    return _reconstruct(Factors(down, up, core, scale), base, False, backend)


def reconstruct_stack(
    down: Tensor,
    up: Tensor,
    core: Tensor,
    *,
    scale: float | Tensor = 1.0,
    base: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """N updates that share A and B, ΔW_k = scale · B core_k A, each on its base if there is one. Differentiable.

    down: (R, in_features);  up: (out_features, R)
    core: (N, R), diagonals, as `cp_core` makes them, or (N, R, R), as `tucker_core`
    scale, backend: as in `reconstruct`
    base: None, (out_features, in_features) under every update, or (N, out_features, in_features)
    returns W: (N, out_features, in_features), rounded once; its dtype as in `reconstruct`

    Source: Aurora's mode approximation, arXiv 2305.08381, section 3; docs/method.md, sections 2 and 4.
    Raises as `reconstruct` does.
    """
    check_tensor("core", core)
    return _reconstruct(Factors(down, up, core, scale), base, True, backend)
