"""One or two linear layers of one tensor, inside a node of a block: plain, or with low-rank updates."""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from peft_kernels.ops.lowrank_linear import lowrank_linear_bwd, lowrank_linear_fwd
from peft_kernels.ops.lowrank_projections import lowrank_projections_bwd, lowrank_projections_fwd
from peft_kernels.records import Dropout, Factors, Needs, ProjectionNeeds, Projections


class MlpLinear(NamedTuple):
    """A linear layer of an MLP with its update scale · up down, or without one: then down and up are None.

    weight: (N, K);  bias: (N,) or None;  down: (R, K) and up: (N, R), in the weight's dtype or float32
    scale: a number, or a 0-d tensor on the weight's device
    """

    weight: Tensor
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float | Tensor = 1.0


class LinearNeeds(NamedTuple):
    """Which gradients of a layer are asked for."""

    weight: bool
    bias: bool
    down: bool
    up: bool

    @property
    def input(self) -> bool:
        """Is what the layer reads needed for them?"""
        return self.weight or self.down


def linears_fwd(
    backend: str | None, x: Tensor, layers: list[MlpLinear], dropout: Dropout
) -> tuple[list[Tensor], Tensor | None]:
    """-> y of each layer (M, N), z of all (M, R) or (M, 2·R).  x: (M, K);  backend: None for a plain linear"""
    if backend is None:
        return [F.linear(x, layers[0].weight, layers[0].bias)], None
    if len(layers) == 1:
        weight, bias, down, up, scale = layers[0]
        y, z = lowrank_linear_fwd(backend, x, weight, bias, Factors(down, up, None, scale), dropout, None)
        return [y], z
    weights, biases, downs, ups, scales = map(list, zip(*layers))
    *ys, z = lowrank_projections_fwd(backend, x, weights, biases, Projections(downs, ups, scales), dropout)
    return ys, z


def linears_bwd(
    backend: str | None,
    dys: list[Tensor],
    x: Tensor | None,
    layers: list[MlpLinear],
    kept: tuple[Tensor | None, Dropout],
    needs: tuple[bool, list[LinearNeeds]],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """-> dx, the gradients of each layer's tensors, one layer after another.

    x: if a layer's needs ask for it;  kept: z and the dropout;  needs: of x, and of each layer
    """
    (z, dropout), (needs_x, each) = kept, needs
    weights, _, downs, ups, scales = map(list, zip(*layers))
    needs_down, needs_up = any(need.down for need in each), any(need.up for need in each)
    dx, d_downs, d_ups = None, [None] * len(layers), [None] * len(layers)
    if backend is None:
        dx = dys[0] @ weights[0] if needs_x else None
    elif not (needs_x or needs_down or needs_up):
        pass
    elif len(layers) == 1:
        factors, asked = Factors(downs[0], ups[0], None, scales[0], z), Needs(needs_x, needs_down, needs_up)
        own_x = x if needs_down else None
        dx, *found = lowrank_linear_bwd(backend, dys[0], own_x, weights[0], factors, dropout, asked)
        d_downs, d_ups = found[:1], found[1:2]
    else:
        projections, asked = Projections(downs, ups, scales, z), ProjectionNeeds(needs_x, needs_down, needs_up)
        own_x, read = x if needs_down else None, weights if needs_x else []
        dx, d_down, d_up, _ = lowrank_projections_bwd(backend, dys, own_x, read, projections, dropout, asked)
        d_downs = d_downs if d_down is None else d_down.split(projections.rank)
        d_ups = d_ups if d_up is None else d_up.split(projections.widths)
    gradients = []
    for dy, need, d_down, d_up in zip(dys, each, d_downs, d_ups):
        d_weight, d_bias = dy.t() @ x if need.weight else None, dy.sum(0) if need.bias else None
        gradients += [d_weight, d_bias, d_down if need.down else None, d_up if need.up else None]
    return dx, gradients
