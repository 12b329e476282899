"""`weight_distance` in torch: in-place calls, matrix by matrix. Records: peft_kernels/records.py."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.records import Distance, Product, Results, Stage

FLOOR = 1e-12  # of a relative distance's denominator, relative to the base


class Placed(NamedTuple):
    """The records themselves, and where results go."""

    stages: Sequence[Stage]
    results: Results | None = None

    def at(self, results: Results | None) -> "Placed":
        return Placed(self.stages, results)


weight_distance_tables = Placed


def weight_distance_fwd(placed: Placed, decay: float | None, reduction: str, loss_scale: float | Tensor) -> None:
    """Every stage: targets, errors, sums, losses, factors and bias gradients of all matrices; products."""
    for stage in placed.stages:
        if isinstance(stage[0], Product):
            _multiply(stage)
        else:
            _compare(stage, placed.results, decay, reduction, loss_scale)


def weight_distance_composed(
    targets: Sequence[Tensor],
    bases: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    reduction: str,
) -> Tensor:
    """-> loss (), by differentiable operations alone, none in place"""
    losses = []
    for target, base, left, right in zip(targets, bases, lefts, rights):
        difference = base - target
        error = left @ right + difference
        sums = [t.detach().square().sum() for t in (error, difference, base)]
        losses.append(_coefficient(sums, error.numel(), reduction) * error.square().sum())
    return torch.stack(losses).sum()


def _compare(
    distances: Sequence[Distance], results: Results, decay: float | None, reduction: str, loss_scale: float | Tensor
) -> None:
    for index, d in enumerate(distances):
        sums = results.sums[index]
        _follow(d.target, d.live, decay)
        torch.sub(d.base, d.target, out=d.error)
        sums[1], sums[2] = _square(d.error), _square(d.base)
        for left, right in d.pairs:
            d.error.addmm_(left, right)
        sums[0] = _square(d.error)
        coefficient = _coefficient(sums[:3], d.error.numel(), reduction)
        results.losses[index] = coefficient * sums[0]
        results.factors[index] = 2 * coefficient * loss_scale
        if d.target_bias is None:
            sums[3:] = 0
            continue
        _follow(d.target_bias, d.live_bias, decay)
        e = d.base_bias - d.target_bias
        sums[4], sums[5] = _square(e), _square(d.base_bias)
        if d.shift is not None:
            e.addmv_(d.shift, d.shift_vector)
        if d.shift_last is not None:
            e += d.shift_last
        sums[3] = _square(e)
        coefficient = _coefficient(sums[3:], e.numel(), reduction)
        results.losses[index] += coefficient * sums[3]
        if d.bias_gradient is not None:
            d.bias_gradient.copy_(e.mul_(2 * coefficient * loss_scale))


def _multiply(products: Sequence[Product]) -> None:
    """Every product, one call for each term."""
    for product in products:
        columns, keep = product.result.shape[1], product.accumulate
        for term in product.terms:
            left = term.left.t() if product.form == "tn" else term.left
            right = term.right.t() if product.form == "nt" else term.right
            _add_product(product.result, left, right[:, :columns], term.factor, keep)
            if product.result_last is not None:
                _add_product(product.result_last[:, None], left, right[:, columns:], term.factor, keep)
            if term.right_last is not None:
                _add_product(product.result[:, -1:], left, term.right_last[:, None], term.factor, keep)
            keep = True


def _add_product(result: Tensor, left: Tensor, right: Tensor, factor: Tensor | None, keep: bool) -> None:
    result, beta = result[:, : right.shape[1]], 1 if keep else 0
    if factor is None:
        result.addmm_(left, right, beta=beta)
    elif result.device.type == "cpu":
        result.addmm_(left, right, beta=beta, alpha=factor.item())
    else:  # its value stays on the device
        product = (left @ right).mul_(factor)
        result.add_(product) if keep else result.copy_(product)


def _follow(target: Tensor, live: Tensor | None, decay: float | None) -> None:
    if live is not None and decay is not None:
        target.lerp_(live.to(target.dtype), 1 - decay)


def _square(t: Tensor) -> Tensor:
    """Σ t²; by rows first, for squares in memory took a CPU 1.7 times as long."""
    return torch.linalg.vector_norm(t, dim=-1).square_().sum()


def _coefficient(sums: Sequence[Tensor], count: int, reduction: str) -> Tensor | float:
    """What the sum of squares is multiplied by."""
    if reduction == "relative":  # what has not moved from zeros counts nothing
        denominator = torch.maximum(sums[1], FLOOR * sums[2])
        return torch.where(denominator == 0, 0, denominator.reciprocal())
    return 1 / count if reduction == "mean" else 1.0
