"""The distance of W̄ = W0 + F C from a target that moves: MoIL's imitation loss, without W̄ ever existing.

    target ← decay · target + (1 − decay) · live        (only in `momentum_weight_distance`; in place, float32)
    E = F C + (W0 − target)                             in this order: the difference of two close numbers is exact
    L = Σ over matrices     ΣE² / n ("mean", n = out · in), ΣE² ("sum") or ΣE² / max(D, 1e-12 · ΣW0²) ("relative"),
                            where D = Σ(target − W0)² is taken as a constant; 0 where target and W0 are zeros
    dF = φ E Cᵀ,   dC = φ Fᵀ E,   dtarget = −φ E        φ = 2/n | 2 | 2/max(…)

One pass over live, target and W0 does the update, the loss and E; two products give dF and dC at once, while E is at
hand, and the backward only scales them. Never ‖D‖² − 2⟨D, F C⟩ + ‖F C‖²: that cancels where training ends.

Sources: MoIL, doi 10.1109/TPAMI.2024.3435790, and docs/method.md, section 3, whose low-rank form this is.
"""

import operator
from collections.abc import Hashable, Iterable, Sequence
from itertools import chain, compress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.backend import requested_by, resolve
from peft_kernels.checks import check_choice, check_shape, check_tensor, kind_of, refuse_second_derivative
from peft_kernels.distance_plan import DistancePlan, matrices_of
from peft_kernels.looks import looks
from peft_kernels.operator import composed
from peft_kernels.torch_kernels.weight_distance import weight_distance_composed
from peft_kernels.transforms import transformed

REDUCTIONS = ("mean", "sum", "relative")
WIDE = (torch.float32, torch.float64)
LIVE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Matrices = Tensor | Sequence[Tensor]


def weight_distance_reference(target, base, left, right, *, reduction="mean"):
    """The definition for one matrix, in the precision of its arguments, with everything materialised."""
    squared = (target - (base + left @ right)).square()
    if reduction == "relative":
        moved = (target - base).detach().square().sum().clamp_min(1e-12 * base.detach().square().sum())
        return squared.sum() / moved if moved != 0 else 0 * squared.sum()
    return squared.mean() if reduction == "mean" else squared.sum()


class _WeightDistance(torch.autograd.Function):
    """passed: of a plan's inputs those that it passes."""

    @staticmethod
    def forward(ctx, plan, inputs, addresses, decay, reduction, *passed):
        loss, saved = plan.run(inputs, addresses, decay, reduction)
        ctx.plan = plan
        ctx.save_for_backward(*saved)
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        refuse_second_derivative("weight_distance")
        return None, None, None, None, None, *ctx.plan.scaled(d_loss, *ctx.saved_tensors)


class _Signature(NamedTuple):
    """All that the checks of a call, the choice of its backend and its tables look at, but for addresses."""

    op: str
    requested: tuple[str, str]
    kinds: tuple
    looks: Hashable
    needs: tuple | None  # None: no gradients are recorded


MOST_PLANS = 256  # then all of them go
_plans: dict[_Signature, DistancePlan] = {}
_PLAIN = frozenset((Tensor, nn.Parameter))  # what other types hide changes without a sign
_apply = super(torch.autograd.Function, _WeightDistance).apply  # without unwrapping what functorch left
_NEEDS = operator.attrgetter("requires_grad")


def _distance(op: str, given: dict[str, object], decay: float | None, reduction: str, backend: str) -> Tensor:
    """given: the matrices by the names of their arguments, in a plan's order; no live ones: None."""
    check_choice("reduction", reduction, REDUCTIONS)
    given = {name: _listed(name, each) for name, each in given.items()}
    parts = [() if each is None else (each,) if isinstance(each, Tensor) else each for each in given.values()]
    key = plan = addresses = None
    try:
        inputs = [*chain.from_iterable(parts)]
        if _PLAIN.issuperset(map(type, inputs)):
            addresses = [*map(Tensor.data_ptr, inputs)]
            key = _signature(op, parts, inputs, backend)
            plan = _plans.get(key)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        pass  # an argument that the checks will name
    if plan is None and transformed():
        return _composed(op, given, reduction, backend)
    if plan is None:
        plan = _checked(op, given, parts, backend, key is None)
        if key is not None:
            if len(_plans) >= MOST_PLANS:
                _plans.clear()
            _plans[key] = plan
    for index in plan.copied:
        inputs[index] = inputs[index].contiguous()
        if key is not None:
            addresses[index] = inputs[index].data_ptr()
    if given["live"] is not None:
        _check_teachers(plan, inputs, addresses)
    if any(plan.passed):
        apply = _WeightDistance.apply if key is None else _apply
        loss = apply(plan, inputs, addresses, decay, reduction, *compress(inputs, plan.passed))
    else:
        with torch.no_grad():
            loss, _ = plan.run(inputs, addresses, decay, reduction)
    if given["live"] is not None:
        torch.autograd.graph.increment_version(parts[1])
    return loss


def _listed(name: str, value: object) -> object:
    """A list of what several matrices come in; anything else as it is."""
    if isinstance(value, Tensor) or not hasattr(value, "__iter__") or isinstance(value, str):
        return value
    try:
        return [*value]
    except TypeError as error:  # numpy's 0-d arrays only look iterable
        raise TypeError(f"{name}: {error}") from None


def _signature(op: str, parts: Sequence, inputs: list[Tensor], backend: str) -> _Signature:
    """Raises TypeError where tensors are more than they show."""
    if transformed():
        raise TypeError
    return _Signature(
        op,
        requested_by(backend),
        (*map(len, parts), *map(type, parts)),
        looks(inputs),
        tuple(map(_NEEDS, inputs)) if torch.is_grad_enabled() else None,
    )


def _checked(
    op: str, given: dict[str, object], parts: Sequence[Sequence[Tensor]], backend: str, shown: bool
) -> DistancePlan:
    """Raises whatever is to be raised about a call, or says how it goes."""
    _, name = _check_matrices(op, given, backend)
    inputs, needs_any = [*chain.from_iterable(parts)], torch.is_grad_enabled()  # without it no gradient is computed
    return DistancePlan(inputs, [*map(len, parts)], [t.requires_grad and needs_any for t in inputs], name, shown)


def _composed(op: str, given: dict[str, object], reduction: str, backend: str) -> Tensor:
    """Inside transforms."""
    if given["live"] is not None:
        raise ValueError("teacher: is changed in place, which transforms do not see through; call this outside")
    (targets, bases, lefts, rights), _ = _check_matrices(op, given, backend)
    return composed(weight_distance_composed, targets, bases, lefts, rights, reduction)


def _check_matrices(op: str, given: dict[str, object], backend: str) -> tuple[list[list[Tensor]], str]:
    """-> targets, bases, lefts and rights, as many of each; the backend's name"""
    target_name = [*given][1]
    lefts, rights = _matrices("left", given["left"], WIDE), _matrices("right", given["right"], WIDE)
    targets, bases = _matrices(target_name, given[target_name], WIDE), _matrices("base", given["base"], WIDE)
    n, first = len(lefts), lefts[0]
    bases = bases * n if len(bases) == 1 else bases  # one base under every matrix
    lives = [] if given["live"] is None else _matrices("live", given["live"], LIVE)
    kinds = {target_name: targets, "base": bases, "left": lefts, "right": rights} | ({"live": lives} if lives else {})
    for name, matrices in kinds.items():
        if len(matrices) != n:
            raise ValueError(f"{name}: expected {n} matrices, as left, got {len(matrices)}")
        for index, matrix in enumerate(matrices):
            check_tensor(name, matrix, first, dtypes=LIVE if name == "live" else (first.dtype,))
            rows, columns, rank = lefts[index].shape[0], rights[index].shape[1], lefts[index].shape[1]
            expected = {"left": (rows, rank), "right": (rank, columns)}.get(name, (rows, columns))
            check_shape(name, matrix, expected, "(R, in_features)" if name == "right" else "that of left · right")
    largest = tuple(max(matrix.shape[dim] for matrix in targets) for dim in (0, 1))
    widest = max((live.dtype for live in lives), key=lambda dtype: dtype.itemsize, default=None)
    name = resolve(op, (first, *rights), backend, shape=largest, live=widest).name
    return [targets, bases, lefts, rights], name


def _check_teachers(plan: DistancePlan, inputs: list[Tensor], addresses: list[int] | None) -> None:
    """`check_changed`; where that has passed for this signature, only what a signature does not say."""
    own, n = inputs[plan.targets.start : plan.targets.stop], plan.count
    if plan.followed and not any(map(Tensor.is_inference, own)):
        starts = [addresses[index] + offset for index, offset in plan.starts]
        teachers = {*starts[n : 2 * n]}
        if len(teachers) == n and teachers.isdisjoint(starts[:n]) and teachers.isdisjoint(starts[2 * n :]):
            return
    own = own if torch.is_grad_enabled() else [t.detach() for t in own]
    lives, _, *others = plan.by_kind(map(matrices_of, inputs))
    check_changed((("teacher", teacher) for t in own for teacher in matrices_of(t)), chain(lives, *others))
    plan.followed = True


def _matrices(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    """One matrix, a stack or a list of them, as a list."""
    if isinstance(value, Tensor):
        check_tensor(name, value, dtypes=dtypes)
    if isinstance(value, Tensor) and value.dim() in (2, 3):
        matrices = list(value.unbind(0)) if value.dim() == 3 else [value]
    elif isinstance(value, list):
        matrices = value
    else:
        got = tuple(value.shape) if isinstance(value, Tensor) else kind_of(value)
        raise TypeError(f"{name}: expected a Tensor with 2 or 3 dimensions, or a list of matrices, got {got}")
    if not matrices:
        raise ValueError(f"{name}: expected at least one matrix, got none")
    for matrix in matrices:
        check_tensor(name, matrix, dtypes=dtypes)
        if matrix.dim() != 2 or 0 in matrix.shape:
            raise ValueError(f"{name}: expected matrices, no size 0, got shape {tuple(matrix.shape)}")
    return matrices


def check_changed(changed: Iterable[tuple[str, Tensor]], others: Iterable[Tensor]) -> None:
    """What is changed in place lies in rows of its own, in memory that nothing else here uses, without a gradient."""
    taken = {t.data_ptr() for t in others}
    for name, teacher in changed:
        if teacher.requires_grad:
            raise ValueError(f"{name}: takes no gradient, and is changed in place; detach it")
        if teacher.is_inference():
            raise ValueError(f"{name}: is changed in place, and was made in inference mode; clone it outside")
        strides = teacher.stride() if teacher.dim() == 2 else (0, *teacher.stride())
        rows, columns = teacher.shape if teacher.dim() == 2 else (1, *teacher.shape)
        if (columns > 1 and strides[1] != 1) or (rows > 1 and strides[0] < columns):
            raise ValueError(f"{name}: expected rows of neighbouring elements, apart, got strides {teacher.stride()}")
        if teacher.data_ptr() in taken:
            raise ValueError(f"{name}: is changed in place, and shares its memory with another matrix; clone it")
        taken.add(teacher.data_ptr())


def check_decay(decay: float) -> None:
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay <= 1:
        raise ValueError(f"decay: expected a number in [0, 1], got {decay!r:.80}")


@torch._disable_dynamo
def weight_distance(
    target: Matrices,
    base: Matrices,
    left: Matrices,
    right: Matrices,
    *,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """How far base + left · right is from target, summed over all matrices; one launch set for all of them.

    target: (out, in), (N, out, in), or a list of matrices of any shapes;  base: likewise, or one (out, in) under all
    left: (out, R), (N, out, R), or a list;  right: (R, in), (N, R, in), or a list
    reduction: of each matrix's squared distance: "mean" (over its elements, the authors'), "sum", or "relative" (to the
        target's squared distance from base, taken as constant)
    backend: "auto" | "cuda" | "triton" | "torch"; all float32 (float64: the torch backend), any rank
    returns loss: () a 0-d tensor on the same device; differentiable in left and right, and in target and base if asked

    The forward computes the gradients, too; the backward only scales them. Where torch's own matmuls may use tf32, the
    gradients' products on Triton do, and the loss's take three tf32 products for each; otherwise all is float32.
    Raises ValueError or TypeError, naming the argument, before anything runs; BackendUnavailableError (a ValueError)
    if a backend asked for by name cannot run. Source: docs/method.md, section 3.
    """
    given = {"live": None, "target": target, "base": base, "left": left, "right": right}
    return _distance("weight_distance", given, None, reduction, backend)


@torch._disable_dynamo
def momentum_weight_distance(
    live: Matrices,
    teacher: Matrices,
    base: Matrices,
    left: Matrices,
    right: Matrices,
    *,
    decay: float,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """`weight_distance` from a teacher that first follows live, in the same pass: in place, no gradient by either.

        teacher ← decay · teacher + (1 − decay) · live

    live: (out, in), (N, out, in) or a list, float32, bfloat16 or float16; not changed
    teacher: the same shapes, float32 (in bfloat16 an average with decay 0.9996 never moves); changed in place
    base, left, right, reduction, backend: as in `weight_distance`
    decay: in [0, 1]; the authors' 0.9996
    returns loss: () a 0-d tensor, differentiable in left and right

    Not for activation checkpointing: the recomputation would move the teacher again.
    Raises as `weight_distance` does, and if teacher requires grad or shares memory with another argument.
    """
    check_decay(decay)
    if live is None:
        raise TypeError("live: expected a Tensor with 2 or 3 dimensions, or a list of matrices, got None")
    given = {"live": live, "teacher": teacher, "base": base, "left": left, "right": right}
    return _distance("momentum_weight_distance", given, decay, reduction, backend)
