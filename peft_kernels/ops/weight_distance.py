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

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from peft_kernels.backend import resolve
from peft_kernels.checks import check_choice, check_shape, check_tensor, refuse_second_derivative
from peft_kernels.dispatch import weight_distance as dispatch
from peft_kernels.dispatch.weight_distance import Distance, Product, Results, Term

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


def new_results(count: int, like: Tensor) -> Results:
    return Results(like.new_empty(count, 6), like.new_empty(count), like.new_empty(count))


class _WeightDistance(torch.autograd.Function):
    """tensors: n targets, n bases, n lefts, n rights."""

    @staticmethod
    def forward(ctx, live, decay, reduction, backend, *tensors):
        n = len(tensors) // 4
        targets, bases, lefts, rights = (tensors[i * n : (i + 1) * n] for i in range(4))
        needs = ctx.needs_input_grad[4:]
        grads = [torch.empty_like(t) if need else None for t, need in zip(tensors[2 * n :], needs[2 * n :])]
        errors = [torch.empty(base.shape, dtype=base.dtype, device=base.device) for base in bases]
        results = new_results(n, errors[0])
        matrices = zip(targets, bases, zip(lefts, rights), errors, live or [None] * n)
        distances = [Distance(target, base, (pair,), error, own) for target, base, pair, error, own in matrices]
        tables = dispatch.weight_distance_tables(backend, distances, results)
        dispatch.weight_distance_fwd(backend, tables, errors[0], decay, reduction, 1.0)
        products = []
        for error, factor, left, right, d_left, d_right in zip(
            errors, results.factors, lefts, rights, grads[:n], grads[n:]
        ):
            if d_left is not None:
                products.append(Product("nt", d_left, (Term(error, right, factor),)))
            if d_right is not None:
                products.append(Product("tn", d_right, (Term(left, error, factor),)))
        if products:
            dispatch.product_fwd(backend, dispatch.product_tables(backend, products), errors[0])
        ctx.save_for_backward(*grads, results.factors, *(errors if any(needs[: 2 * n]) else ()))
        return results.losses.sum()

    @staticmethod
    def backward(ctx, d_loss):
        refuse_second_derivative("weight_distance")
        n = (len(ctx.needs_input_grad) - 4) // 4
        needs, saved = ctx.needs_input_grad[4:], ctx.saved_tensors
        thin, factors, errors = saved[: 2 * n], saved[2 * n], saved[2 * n + 1 :]
        d_bases = [error * (factor * d_loss) for error, factor in zip(errors, factors)] or [None] * n
        d_targets = [-grad if need else None for grad, need in zip(d_bases, needs)]
        d_bases = [grad if need else None for grad, need in zip(d_bases, needs[n:])]
        wanted = [grad for grad in thin if grad is not None]
        scaled = iter(torch._foreach_mul(wanted, d_loss) if wanted else ())
        d_thin = [None if grad is None else next(scaled) for grad in thin]
        return None, None, None, None, *d_targets, *d_bases, *d_thin


def _matrices(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    """One matrix, a stack or a list of them, as a list."""
    if isinstance(value, Tensor) and value.dim() in (2, 3):
        matrices = list(value.unbind(0)) if value.dim() == 3 else [value]
    elif hasattr(value, "__iter__") and not isinstance(value, str | Tensor):
        matrices = list(value)
    else:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a Tensor with 2 or 3 dimensions, or a list of matrices, got {got}")
    if not matrices:
        raise ValueError(f"{name}: expected at least one matrix, got none")
    for matrix in matrices:
        check_tensor(name, matrix, dtypes=dtypes)
        if matrix.dim() != 2 or 0 in matrix.shape:
            raise ValueError(f"{name}: expected matrices, no size 0, got shape {tuple(matrix.shape)}")
    return matrices


def _distance(op: str, live, target, base, left, right, decay, reduction, backend, target_name: str) -> Tensor:
    check_choice("reduction", reduction, REDUCTIONS)
    lefts, rights = _matrices("left", left, WIDE), _matrices("right", right, WIDE)
    targets, bases = _matrices(target_name, target, WIDE), _matrices("base", base, WIDE)
    n, first = len(lefts), lefts[0]
    bases = bases * n if len(bases) == 1 else bases  # one base under every matrix
    lives = None if live is None else _matrices("live", live, LIVE)
    kinds = {target_name: targets, "base": bases, "left": lefts, "right": rights} | ({"live": lives} if lives else {})
    for name, matrices in kinds.items():
        if len(matrices) != n:
            raise ValueError(f"{name}: expected {n} matrices, as left, got {len(matrices)}")
        for index, matrix in enumerate(matrices):
            check_tensor(name, matrix, first, dtypes=LIVE if name == "live" else (first.dtype,))
            rows, columns, rank = lefts[index].shape[0], rights[index].shape[1], lefts[index].shape[1]
            expected = {"left": (rows, rank), "right": (rank, columns)}.get(name, (rows, columns))
            check_shape(name, matrix, expected, "(R, in_features)" if name == "right" else "that of left · right")
    choice = resolve(op, (first, *rights), backend)
    if not torch.is_grad_enabled():  # no gradient is wanted, and none is computed
        targets, bases, lefts, rights = ([m.detach() for m in each] for each in (targets, bases, lefts, rights))
    bases, lefts, rights = ([_unit_columns(m) for m in matrices] for matrices in (bases, lefts, rights))
    if lives is None:
        targets = [_unit_columns(m) for m in targets]
    else:
        check_changed([("teacher", t) for t in targets], [*lives, *bases, *lefts, *rights])
        lives = [_unit_columns(m.detach()) for m in lives]
    return _WeightDistance.apply(lives, decay, reduction, choice.name, *targets, *bases, *lefts, *rights)


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
        raise ValueError(f"decay: expected a number in [0, 1], got {decay!r}")


def _unit_columns(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


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
    return _distance("weight_distance", None, target, base, left, right, None, reduction, backend, "target")


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
    loss = _distance("momentum_weight_distance", live, teacher, base, left, right, decay, reduction, backend, "teacher")
    torch.autograd.graph.increment_version([teacher] if isinstance(teacher, Tensor) else list(teacher))
    return loss
