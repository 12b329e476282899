"""`lowrank_projections` in plain torch: one product by all A_j, and one sum of all that reaches x, in place.

Shapes as in peft_kernels/ops/lowrank_projections.py. dropout.rng holds the 1-byte keep-masks (J, M, columns).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels.frozen_products import add_frozen, add_frozen_bwd, empty_outputs
from peft_kernels.records import Dropout, Factors, Needs, Projections

from .lowrank_linear import keep_numbers, lowrank_linear_composed


def lowrank_projections_fwd(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], projections: Projections, dropout: Dropout,
    *, memo: dict | None = None,
) -> list[Tensor]:  # fmt: skip
    """-> y_j (M, N_j), and z at the end"""
    downs, ups, scales, _ = projections
    if dropout.on == "input":
        parts = [
            keep_numbers(keep, x).mul_(x) @ down.to(x.dtype).t()
            for keep, down in zip(dropout.rng, _each(downs, len(ups)))
        ]
        z = torch.cat(parts, 1).mul_(1 / (1 - dropout.p))
    else:
        z = x @ _stacked(downs, x).t()
    outputs = empty_outputs(x, weights)
    if outputs[0] is None:
        ys = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]
    else:
        for y, bias in zip(outputs[1], biases):
            y.zero_() if bias is None else y.copy_(bias)
        ys = add_frozen(outputs, x, weights)
    for y, part, up, scale in zip(ys, _hidden(z, projections, dropout), ups, scales):
        y.addmm_(part * scale.to(z.dtype), up.to(x.dtype).t())
    return [*ys, z]


def lowrank_projections_bwd(
    dys: list[Tensor], x: Tensor | None, weights: list[Tensor], projections: Projections, dropout: Dropout,
    needs: Needs, *, memo: dict | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """-> dx, d_down of all A_j one above the other, d_up of all B_j likewise, as `needs` says in that order"""
    downs, ups, scales, z = projections
    dx = d_down = d_up = None
    if needs.up:
        parts = zip(dys, _hidden(z, projections, dropout), scales)
        d_up = torch.cat([(dy.t() @ part).mul_(scale) for dy, part, scale in parts]).to(ups[0].dtype)
    if needs.x:
        dx = add_frozen_bwd(None, dys, weights)
    if not (needs.x or needs.down):
        return dx, d_down, d_up
    d_hidden = [(dy @ up.to(dy.dtype)).mul_(scale) for dy, up, scale in zip(dys, ups, scales)]
    if dropout.rng is not None:
        d_hidden = [part.mul_(1 / (1 - dropout.p)) for part in d_hidden]
    if dropout.on == "input":
        d_downs = []
        for keep, part, down in zip(dropout.rng, d_hidden, _each(downs, len(ups))):
            keep = keep_numbers(keep, part)
            dropped = x * keep if needs.down else None
            if needs.down:
                d_downs.append(part.t() @ dropped)
            if needs.x:  # dz A into the memory of the dropped x: fresh memory costs a CPU dearly
                dx.addcmul_(torch.mm(part, down.to(part.dtype), out=dropped), keep)
        if needs.down:
            d_down = torch.cat(d_downs) if len(downs) > 1 else sum(d_downs[1:], d_downs[0])
    else:
        if dropout.on == "rank":
            d_hidden = [keep_numbers(keep, part).mul_(part) for keep, part in zip(dropout.rng, d_hidden)]
        dz = torch.cat(d_hidden, 1) if len(downs) > 1 else sum(d_hidden[1:], d_hidden[0])
        if needs.x:
            dx.addmm_(dz, _stacked(downs, dz))
        if needs.down:
            d_down = dz.t() @ x
    return dx, d_down if d_down is None else d_down.to(downs[0].dtype), d_up


def lowrank_projections_composed(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], projections: Projections, p: float, on: str
) -> list[Tensor]:
    """-> y_j (..., N_j) from x (..., K), by differentiable operations alone, none in place."""
    downs, ups, scales, _ = projections
    factors = [Factors(down, up, None, scale) for down, up, scale in zip(_each(downs, len(ups)), ups, scales)]
    return [lowrank_linear_composed(x, w, b, each, p, on) for w, b, each in zip(weights, biases, factors)]


def _each(downs: list[Tensor], count: int) -> list[Tensor]:
    return downs if len(downs) > 1 else downs * count


def _stacked(downs: list[Tensor], like: Tensor) -> Tensor:
    return (torch.cat(downs) if len(downs) > 1 else downs[0]).to(like.dtype)


def _hidden(z: Tensor, projections: Projections, dropout: Dropout) -> list[Tensor]:
    """drop(z_j) (M, R) of each projection"""
    count, rank = len(projections.ups), projections.rank
    parts = z.split(rank, 1) if z.shape[1] > rank else [z] * count
    if dropout.on != "rank":
        return list(parts)
    return [keep_numbers(keep, z).mul_(part).mul_(1 / (1 - dropout.p)) for keep, part in zip(dropout.rng, parts)]
