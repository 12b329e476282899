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

import functools
import importlib
import operator
from collections.abc import Iterable, Sequence
from itertools import chain, compress
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.autocast import autocast_off
from peft_kernels.backend import requested_by, resolve
from peft_kernels.checks import check_choice, check_shape, check_tensor, refuse_second_derivative
from peft_kernels.records import Distance, Product, Results, Term
from peft_kernels.tables import Placed

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


@functools.cache
def kernels(backend: str) -> ModuleType:
    """The launchers of one backend."""
    return importlib.import_module(f"peft_kernels.{backend}_kernels.weight_distance")


def new_results(count: int, like: Tensor) -> Results:
    return Results(like.new_empty(count, 6), like.new_empty(count), like.new_empty(count))


# ---- what calls of one kind have in common --------------------------------------------------------------------------


class _Shapes:
    """Where tensors of these shapes lie in one buffer; each begins at a multiple of 16 bytes."""

    def __init__(self, shapes: Sequence[torch.Size]):
        self.size, self.groups, order = 0, [], []
        for shape in dict.fromkeys(shapes):
            those = [index for index, each in enumerate(shapes) if each == shape]
            step, strides = -(-shape.numel() // 4) * 4, torch.empty(shape, device="meta").stride()
            self.groups.append(((len(those), *shape), (step, *strides), self.size))
            self.size += len(those) * step
            order += those
        places = sorted(range(len(order)), key=order.__getitem__)
        self.in_order = tuple if places == order else operator.itemgetter(*places)

    def split(self, buffer: Tensor) -> Sequence[Tensor]:
        """The tensors; those of one shape are made together."""
        views, start = [], buffer.storage_offset()
        for shape, strides, offset in self.groups:
            views += buffer.as_strided(shape, strides, start + offset).unbind(0)
        return self.in_order(views)


class _Plan:
    """How calls with one signature go. It keeps neither a tensor nor an address.

    inputs: matrices, and stacks of them: lives, targets, bases, lefts and rights, as many of each as `kinds` says
    needs: which of them require a gradient, which lives do not get;  shown: lets autograd see the others, too
    """

    def __init__(self, inputs: list[Tensor], kinds: Sequence[int], needs: Sequence[bool], backend: str, shown: bool):
        follows, ends = kinds[0] > 0, [sum(kinds[: end + 1]) for end in range(5)]
        self.targets, self.bases, self.thin = (range(*ends[:2]), range(*ends[1:3]), range(ends[2], ends[4]))
        self.backend, self.kinds, self.tables = backend, kinds, None
        self.needs = [need and index >= kinds[0] for index, need in enumerate(needs)]
        self.passed = [index >= kinds[0] and (shown or need) for index, need in enumerate(needs)]
        self.answered = [index if self.needs[index] else None for index, passed in enumerate(self.passed) if passed]
        self.stacked = [len(t) if t.dim() == 3 else 0 for t in inputs]
        self.copied = [i for i, t in enumerate(inputs) if t.stride(-1) != 1 and not (follows and i in self.targets)]
        self.followed, self.starts = False, []  # the input of every matrix, and how many bytes lie before it there
        for index, t in enumerate(inputs):
            step = (t[0].numel() if index in self.copied else t.stride(0)) * t.element_size()
            self.starts += [(index, number * step) for number in range(self.stacked[index] or 1)]
        shapes = [[*map(Tensor.size, matrices)] for matrices in self.by_kind(map(_matrices_of, inputs))]
        self.count = len(shapes[3])
        self.errors = _Shapes([torch.Size((left[0], right[1])) for left, right in zip(*shapes[3:])])
        self.learned = [index for index in self.thin if self.needs[index]]
        self.gradients = _Shapes([inputs[index].shape for index in self.learned])
        self.wide = any(self.needs[index] for index in (*self.targets, *self.bases))
        n = self.count
        self.sizes = [self.gradients.size, -(-n // 4) * 4, -(-6 * n // 4) * 4, n]  # gradients, factors, sums, losses

    def by_kind(self, matrices: Iterable[Sequence]) -> list[list]:
        """Lives, targets, bases, lefts and rights, of what each input consists of."""
        matrices = iter(matrices)
        return [[each for _ in range(count) for each in next(matrices)] for count in self.kinds]

    def run(self, inputs: list[Tensor], addresses: list[int] | None, decay: float | None, reduction: str) -> tuple:
        """-> the loss, and what the backward needs;  addresses: of the inputs, None for calls without a signature"""
        like, module = inputs[-1], kernels(self.backend)
        errors, kept = like.new_empty(self.errors.size), like.new_empty(sum(self.sizes))
        gradients, factors, sums, losses = kept.split_with_sizes(self.sizes)
        results = Results(sums, losses, factors)
        with autocast_off(like):
            if self.tables is None:
                placed = self._placed(inputs, errors, kept, results)
            else:
                placed = self.tables.at(results, (*addresses, errors.data_ptr(), kept.data_ptr()))
            module.weight_distance_fwd(placed.distance, decay, reduction, 1.0)
            for stage in placed.stages:
                module.product_fwd(stage)
            return losses.sum(), (gradients, *((factors, errors) if self.wide else ()))

    def _placed(self, inputs: list[Tensor], errors: Tensor, kept: Tensor, results: Results) -> Placed:
        """By records. Kernels' tables are kept: they find every matrix behind the start of an input or of a buffer."""
        own = [_matrices_of(t.detach()) for t in inputs]  # objects that stand for one place each
        lives, targets, bases, lefts, rights = self.by_kind(own)
        of_errors, of_gradients = self.errors.split(errors), iter(self.gradients.split(kept[: self.sizes[0]]))
        taken = [_matrices_of(next(of_gradients)) if self.needs[i] else [None] * len(own[i]) for i in self.thin]
        *_, d_lefts, d_rights = self.by_kind([[]] * self.thin.start + taken)
        factors = results.factors.unbind(0)
        n, results = self.count, results._replace(sums=results.sums[: 6 * self.count].view(-1, 6))
        bases, lives = bases * n if len(bases) < n else bases, lives or [None] * n
        matrices = zip(targets, bases, zip(lefts, rights), of_errors, lives)
        distances = [Distance(target, base, (pair,), error, live) for target, base, pair, error, live in matrices]
        products = []
        for error, factor, left, right, d_left, d_right in zip(of_errors, factors, lefts, rights, d_lefts, d_rights):
            if d_left is not None:
                products.append(Product("nt", d_left, (Term(error, right, factor),)))
            if d_right is not None:
                products.append(Product("tn", d_right, (Term(left, error, factor),)))
        tables = kernels(self.backend).weight_distance_tables(distances, [products] if products else [])
        placed = tables.at(results)
        if self.backend != "torch":
            behind = [*own, of_errors, [*chain(*taken), *factors]]
            tables.table.follow({
                id(t): (source, t.data_ptr() - start.data_ptr())
                for source, (start, those) in enumerate(zip((*inputs, errors, kept), behind))
                for t in those
                if t is not None
            })  # fmt: skip
            self.tables = tables
        return placed

    def scaled(self, d_loss: Tensor, gradients: Tensor, factors: Tensor | None = None, errors: Tensor | None = None):
        """The gradients by what was passed."""
        found = dict(zip(self.learned, self.gradients.split(gradients * d_loss)))
        if self.wide:
            d_bases = [error * (factor * d_loss) for error, factor in zip(self.errors.split(errors), factors)]
            for indices, grads in ((self.targets, [-grad for grad in d_bases]), (self.bases, d_bases)):
                if len(indices) == 1 and not self.stacked[indices[0]]:  # one base under every matrix
                    found[indices[0]] = functools.reduce(operator.add, grads)
                    continue
                remaining = iter(grads)
                for index in indices:
                    stack = [next(remaining) for _ in range(self.stacked[index] or 1)]
                    found[index] = torch.stack(stack) if self.stacked[index] else stack[0]
        return [*map(found.get, self.answered)]


def _matrices_of(t: Tensor) -> Sequence[Tensor]:
    return t.unbind(0) if t.dim() == 3 else (t,)


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
    sizes: tuple
    strides: tuple | None  # None: contiguous tensors
    alignment: tuple | None  # None: multiples of 16 bytes
    dtypes: tuple
    devices: frozenset
    needs: tuple | None  # None: no gradients are recorded


MOST_PLANS = 256  # then all of them go
_plans: dict[_Signature, _Plan] = {}
_PLAIN = frozenset((Tensor, nn.Parameter))  # what other types hide changes without a sign
_apply = super(torch.autograd.Function, _WeightDistance).apply  # without unwrapping what functorch left
_DTYPE, _DEVICE, _NEEDS = map(operator.attrgetter, ("dtype", "device", "requires_grad"))


def _distance(op: str, given: dict[str, object], decay: float | None, reduction: str, backend: str) -> Tensor:
    """given: the matrices by the names of their arguments, in a plan's order; no live ones: None."""
    check_choice("reduction", reduction, REDUCTIONS)
    given = {name: [*each] if _is_list(each) else each for name, each in given.items()}
    parts = [() if each is None else (each,) if isinstance(each, Tensor) else each for each in given.values()]
    key = plan = addresses = None
    try:
        inputs = [*chain.from_iterable(parts)]
        if _PLAIN.issuperset(map(type, inputs)):
            addresses = [*map(Tensor.data_ptr, inputs)]
            key = _signature(op, parts, inputs, addresses, backend)
            plan = _plans.get(key)
    except (AttributeError, RuntimeError, TypeError):
        pass  # an argument that the checks will name
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


def _is_list(value: object) -> bool:
    return hasattr(value, "__iter__") and not isinstance(value, str | Tensor)


def _signature(op: str, parts: Sequence, inputs: list[Tensor], addresses: list[int], backend: str) -> _Signature:
    """Raises TypeError where tensors are more than they show."""
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        raise TypeError
    together = functools.reduce(operator.or_, addresses)
    return _Signature(
        op,
        requested_by(backend),
        (*map(len, parts), *map(type, parts)),
        tuple(map(Tensor.size, inputs)),
        None if all(map(Tensor.is_contiguous, inputs)) else tuple(map(Tensor.stride, inputs)),
        None if together % 16 == 0 else tuple(address % 16 for address in addresses),
        tuple(map(_DTYPE, inputs)),
        frozenset(map(_DEVICE, inputs)),
        tuple(map(_NEEDS, inputs)) if torch.is_grad_enabled() else None,
    )


def _checked(op: str, given: dict[str, object], parts: Sequence[Sequence[Tensor]], backend: str, shown: bool) -> _Plan:
    """Raises whatever is to be raised about a call, or says how it goes."""
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
    inputs, needs_any = [*chain.from_iterable(parts)], torch.is_grad_enabled()  # without it no gradient is computed
    return _Plan(inputs, [*map(len, parts)], [t.requires_grad and needs_any for t in inputs], name, shown)


def _check_teachers(plan: _Plan, inputs: list[Tensor], addresses: list[int] | None) -> None:
    """`check_changed`; where that has passed for this signature, only what a signature does not say."""
    own, n = inputs[plan.targets.start : plan.targets.stop], plan.count
    if plan.followed and not any(map(Tensor.is_inference, own)):
        starts = [addresses[index] + offset for index, offset in plan.starts]
        teachers = {*starts[n : 2 * n]}
        if len(teachers) == n and teachers.isdisjoint(starts[:n]) and teachers.isdisjoint(starts[2 * n :]):
            return
    own = own if torch.is_grad_enabled() else [t.detach() for t in own]
    lives, _, *others = plan.by_kind(map(_matrices_of, inputs))
    check_changed((("teacher", teacher) for t in own for teacher in _matrices_of(t)), chain(lives, *others))
    plan.followed = True


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
    given = {"live": live, "teacher": teacher, "base": base, "left": left, "right": right}
    return _distance("momentum_weight_distance", given, decay, reduction, backend)
