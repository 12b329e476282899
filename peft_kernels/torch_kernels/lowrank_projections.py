"""`lowrank_projections` in plain torch: one sum of all that reaches x, in place, and no avoidable temporary.

Shapes as in peft_kernels/ops/lowrank_projections.py. dropout.rng holds the 1-byte keep-masks (J, M, columns). Products
with A_j and B_j are made one by one, as for layers one by one: so outputs and the factors' gradients have their bits. A
CPU would gain a fifth of a thin product's time, itself a thirtieth of the frozen one's, by stacking them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels.frozen_products import add_frozen, add_frozen_bwd, empty_outputs, stacked
from peft_kernels.records import Dropout, Factors, ProjectionNeeds, Projections

from .lowrank_linear import keep_numbers, lowrank_linear_composed, times_up, up_gradient


def lowrank_projections_fwd(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], projections: Projections, dropout: Dropout,
    *, memo: dict | None = None,
) -> list[Tensor]:  # fmt: skip
    """-> y_j (M, N_j), and z at the end unless it was given"""
    downs, ups, scales, given = projections
    if given is not None:
        z = given
    elif dropout.on == "input":
        pairs = zip(dropout.rng, _each(downs, len(ups)))
        z = torch.cat([keep_numbers(keep, x).mul_(x) @ down.to(x.dtype).t() for keep, down in pairs], 1)
        z.mul_(1 / (1 - dropout.p))
    else:
        parts = [x @ down.to(x.dtype).t() for down in downs]
        z = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    if stacked(weights) is None:
        ys = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]
    else:
        outputs = empty_outputs(x, weights)
        for y, bias in zip(outputs[1], biases):
            y.zero_() if bias is None else y.copy_(bias)
        ys = add_frozen(outputs, x, weights)
    for y, part, up, scale in zip(ys, _hidden(z, projections, dropout), ups, scales):
        y.addmm_(part * scale, up.to(x.dtype).t())
    return ys if given is not None else [*ys, z]


def lowrank_projections_bwd(
    dys: list[Tensor], x: Tensor | None, weights: list[Tensor], projections: Projections, dropout: Dropout,
    needs: ProjectionNeeds, *, memo: dict | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """-> dx, d_down of all A_j one above the other, d_up of all B_j likewise, dz of a given z, as `needs` says

    With a given z, which all share, dx has no part through it.
    """
    downs, ups, scales, z = projections
    dx = d_down = d_up = None
    if needs.up:
        parts = zip(dys, _hidden(z, projections, dropout), scales)
        d_up = torch.cat([up_gradient(dy, part).mul_(scale) for dy, part, scale in parts]).to(ups[0].dtype)
    if needs.x and not (downs and dropout.on == "input"):
        dx = add_frozen_bwd(None, dys, weights)
    if not (needs.z or needs.down or (needs.x and downs)):
        return dx, d_down, d_up, None
    parts = [times_up(dy, up).mul_(scale) for dy, up, scale in zip(dys, ups, scales)]
    if dropout.rng is not None:
        parts = [part.mul_(1 / (1 - dropout.p)) for part in parts]
    if dropout.on == "rank":
        parts = [keep_numbers(keep, part).mul_(part) for keep, part in zip(dropout.rng, parts)]
    if needs.z:
        return dx, d_down, d_up, _sum(parts)
    if len(downs) == 1 and dropout.on != "input":
        parts = [_sum(parts)]
    d_downs, scratch = [], None
    for j, (part, down) in enumerate(zip(parts, _each(downs, len(parts)))):
        dropped, keep = x, None
        if dropout.on == "input":
            keep = keep_numbers(dropout.rng[j], part)
            dropped = torch.mul(x, keep, out=scratch) if needs.down else scratch
        if needs.down:
            d_downs.append(part.t() @ dropped)
        if needs.x and keep is not None:  # dz A into the memory of the dropped x: fresh memory costs a CPU dearly
            through = torch.mm(part, down.to(part.dtype), out=dropped)
            dx, scratch = (through.mul_(keep), None) if dx is None else (dx.addcmul_(through, keep), through)
        elif needs.x:
            dx.addmm_(part, down.to(part.dtype))
    if needs.x and dropout.on == "input":
        dx = add_frozen_bwd(dx, dys, weights)
    if needs.down:
        d_down = (torch.cat(d_downs) if len(downs) > 1 else _sum(d_downs)).to(downs[0].dtype)
    return dx, d_down, d_up, None


def lowrank_projections_composed(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], projections: Projections, p: float, on: str
) -> list[Tensor]:
    """-> y_j (..., N_j) from x (..., K), with a given z (..., R), by differentiable operations alone, none in place."""
    downs, ups, scales, z = projections
    factors = [Factors(down, up, None, scale, z) for down, up, scale in zip(_each(downs, len(ups)), ups, scales)]
    return [lowrank_linear_composed(x, w, b, each, p, on) for w, b, each in zip(weights, biases, factors)]


def _each(downs: list[Tensor], count: int) -> list[Tensor | None]:
    return downs if len(downs) > 1 else (downs or [None]) * count


def _sum(parts: list[Tensor]) -> Tensor:
    return sum(parts[1:], parts[0])


def _hidden(z: Tensor, projections: Projections, dropout: Dropout) -> list[Tensor]:
    """drop(z_j) (M, R) of each projection"""
    count, rank = len(projections.ups), projections.rank
    parts = z.split(rank, 1) if z.shape[1] > rank else [z] * count
    if dropout.on != "rank":
        return list(parts)
    return [keep_numbers(keep, z).mul_(part).mul_(1 / (1 - dropout.p)) for keep, part in zip(dropout.rng, parts)]
