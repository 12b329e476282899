"""`lowrank_linear` as a short chain of in-place torch calls: no ΔW, no dropped copy of x kept, no avoidable temporary.

Shapes as in peft_kernels/ops/lowrank_linear.py. `x (M, I·in)` is the same memory as `(M·I, in)`, so one product by A
serves every input block, and one by B every output block. dropout.rng is the 1-byte keep-mask (True = kept): drawing
it again in the backward costs a CPU more than keeping it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels.records import Dropout, Factors, Needs, Scale


def lowrank_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, dropout: Dropout, design: str | None = None,
    *, memo: dict | None = None,
) -> tuple[Tensor, Tensor | None]:
    """-> y (M, N), z (M, I·R); z is None when factors.z was given."""
    down, up, core, scale, z = factors
    if z is None and dropout.on == "input":
        dropped = keep_numbers(dropout.rng, x).mul_(x)
        z = lowrank_hidden_fwd(dropped, down, _blocks(x, down)).mul_(1 / (1 - dropout.p))
    elif z is None:
        z = lowrank_hidden_fwd(x, down, _blocks(x, down))
    expanded = _expand(z, core, dropout)
    y = F.linear(x, weight, bias)
    _add_product(y.view(-1, up.shape[0]), expanded.reshape(-1, up.shape[1]), up.to(x.dtype).t(), scale)
    return y, (z if factors.z is None else None)


def lowrank_linear_bwd(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, factors: Factors, dropout: Dropout, needs: Needs,
    *, memo: dict | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """-> dx, d_down, d_up, d_core, dz, as `needs` says in that order. factors.down is None if z came from outside."""
    down, up, core, scale, z = factors
    through_down = needs.x and down is not None
    dx = d_down = d_up = d_core = d_z = None
    dy_blocks = dy.reshape(-1, up.shape[0])
    if needs.up:
        expanded = _expand(z, core, dropout)
        d_up = up_gradient(dy_blocks, expanded.reshape(-1, up.shape[1])).mul_(scale).to(up.dtype)
    if needs.down or needs.core or needs.z or through_down:
        d_expanded = times_up(dy_blocks, up).mul_(scale).view(dy.shape[0], _blocks(dy, up.t()) * up.shape[1])
        dz, d_core = _expand_bwd(d_expanded, z, core, dropout, needs.core)
        on_input = dropout.on == "input"
        if on_input:
            dz.mul_(1 / (1 - dropout.p))
        if needs.z:
            d_z = dz
        keep = keep_numbers(dropout.rng, dy) if on_input else None
        if needs.down:
            x = x * keep if on_input else x
            d_down = _d_down(dz, x, down)
        if through_down and on_input:  # dz A into the memory of the dropped x: fresh memory costs a CPU dearly
            dx = _dx(dz, down, out=x if needs.down else None).mul_(keep)
    if needs.x:
        dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    if through_down and dropout.on != "input":
        _add_product(dx.view(-1, down.shape[1]), dz.reshape(-1, down.shape[0]), down.to(dy.dtype), 1.0)
    return dx, d_down, d_up, d_core, d_z


def lowrank_hidden_fwd(x: Tensor, down: Tensor, input_blocks: int) -> Tensor:
    """-> z (M, I·R)"""
    return (x.reshape(-1, down.shape[1]) @ down.to(x.dtype).t()).view(x.shape[0], input_blocks * down.shape[0])


def lowrank_linear_composed(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, p: float, on: str
) -> Tensor:
    """-> y (..., N) from x (..., K), with z (..., I·R), by differentiable operations alone, none in place."""
    down, up, core, scale, z = factors
    if z is None:
        z = lowrank_hidden_composed(F.dropout(x, p) if on == "input" else x, down, _blocks(x, down))
    z = F.dropout(z, p) if on == "rank" else z
    if core is not None:
        z = _through_core(z, core.to(z.dtype))
    z = F.dropout(z, p) if on == "core" else z
    update = z.unflatten(-1, (-1, up.shape[1])) @ up.to(x.dtype).t()
    return F.linear(x, weight, bias) + scale * update.flatten(-2)


def lowrank_hidden_composed(x: Tensor, down: Tensor, input_blocks: int) -> Tensor:
    """-> z (..., I·R), likewise"""
    return (x.unflatten(-1, (input_blocks, down.shape[1])) @ down.to(x.dtype).t()).flatten(-2)


def lowrank_hidden_bwd(
    dz: Tensor, x: Tensor | None, down: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """-> dx, d_down; `needs` says which, in that order."""
    needs_x, needs_down = needs
    return _dx(dz, down) if needs_x else None, _d_down(dz, x, down) if needs_down else None


LONG = 64  # outputs from which on exchanging the sides pays for the transposing copy behind it


def times_up(dy: Tensor, up: Tensor) -> Tensor:
    """dy B (M, R), for a long and very thin B with the sides exchanged: a CPU's BLAS takes a quarter of the time."""
    up = up.to(dy.dtype)
    return (up.t() @ dy.t()).t().contiguous() if up.shape[1] < 16 and up.shape[0] >= LONG else dy @ up


def up_gradient(dy: Tensor, hidden: Tensor) -> Tensor:
    """dyᵀ z (N, R), if long likewise: at 370 × 3072 a tenth of the time at rank 8, half of it at 16."""
    return (hidden.t() @ dy).t().contiguous() if dy.shape[1] >= LONG else dy.t() @ hidden


def _d_down(dz: Tensor, x: Tensor, down: Tensor) -> Tensor:
    return (dz.reshape(-1, down.shape[0]).t() @ x.reshape(-1, down.shape[1])).to(down.dtype)


def _dx(dz: Tensor, down: Tensor, out: Tensor | None = None) -> Tensor:
    out = None if out is None else out.view(-1, down.shape[1])
    dx = torch.mm(dz.reshape(-1, down.shape[0]), down.to(dz.dtype), out=out)
    return dx.view(dz.shape[0], dz.shape[1] // down.shape[0] * down.shape[1])


def keep_numbers(rng: Tensor, like: Tensor) -> Tensor:
    """The mask as numbers: a CPU converts bytes faster than booleans, and anew for every mixed product."""
    if torch.compiler.is_compiling():  # Inductor casts booleans while it loads them, and views of them not everywhere
        return rng.to(like.dtype)
    return rng.view(torch.uint8).to(like.dtype)


def _blocks(x: Tensor, factor: Tensor) -> int:
    return x.shape[-1] // factor.shape[1]


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: Scale) -> None:
    if isinstance(scale, Tensor):
        total.addmm_(left * scale, right)
    else:
        total.addmm_(left, right, alpha=scale)


def _drop(t: Tensor, dropout: Dropout, place: str) -> Tensor:
    return keep_numbers(dropout.rng, t).mul_(t).mul_(1 / (1 - dropout.p)) if dropout.on == place else t


def _expand(z: Tensor, core: Tensor | None, dropout: Dropout) -> Tensor:
    """S (M, O·R): every input block's z through the core, summed; with the "rank" and "core" masks."""
    z = _drop(z, dropout, "rank")
    if core is not None:
        z = _times_core(z, core)
    return _drop(z, dropout, "core")


def _times_core(z: Tensor, core: Tensor) -> Tensor:
    core = core.to(z.dtype)
    out_blocks, in_blocks, rank = core.shape[:3]
    if core.dim() == 4:  # S[o, a] = Σ_ib K[o, i, a, b] z[i, b]
        return z @ core.permute(1, 3, 0, 2).reshape(in_blocks * rank, out_blocks * rank)
    return _sum(z.view(-1, 1, in_blocks, rank) * core, 2).view(-1, out_blocks * rank)


def _sum(t: Tensor, blocks: int) -> Tensor:
    """Over a dimension that mostly has one block: a sum would copy it, at many times the cost of the product."""
    return t.sum(blocks) if t.shape[blocks] > 1 else t.squeeze(blocks)


def _through_core(z: Tensor, core: Tensor) -> Tensor:
    """S (..., O·R) of z (..., I·R)"""
    z = z.unflatten(-1, core.shape[1:3])
    return torch.einsum("oir,...ir->...or" if core.dim() == 3 else "oiab,...ib->...oa", core, z).flatten(-2)


def _expand_bwd(
    d_expanded: Tensor, z: Tensor, core: Tensor | None, dropout: Dropout, needs_core: bool
) -> tuple[Tensor, Tensor | None]:
    """-> dz (M, I·R), d_core"""
    d_core = None
    d_expanded = _drop(d_expanded, dropout, "core")
    if core is None:
        dz = d_expanded
    else:
        out_blocks, in_blocks, rank = core.shape[:3]
        c = core.to(d_expanded.dtype)
        if needs_core:
            z = _drop(z, dropout, "rank")
        if core.dim() == 4:
            dz = d_expanded @ c.permute(0, 2, 1, 3).reshape(out_blocks * rank, in_blocks * rank)
            if needs_core:
                d_core = (d_expanded.t() @ z).view(out_blocks, rank, in_blocks, rank).transpose(1, 2)
        else:
            per_block = d_expanded.view(-1, out_blocks, 1, rank)
            dz = _sum(per_block * c, 1).view(-1, in_blocks * rank)
            if needs_core:
                d_core = (per_block * z.view(-1, 1, in_blocks, rank)).sum(0)
        d_core = d_core.to(core.dtype).contiguous() if needs_core else None
    return _drop(dz, dropout, "rank"), d_core
