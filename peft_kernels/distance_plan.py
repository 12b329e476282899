"""How calls of `weight_distance` of one kind go: worked out once, and without a tensor or an address in it."""

import functools
import importlib
import operator
from collections.abc import Iterable, Sequence
from itertools import chain
from types import ModuleType

import torch
from torch import Tensor

from peft_kernels.autocast import autocast_off
from peft_kernels.records import Distance, Product, Results, Term
from peft_kernels.tables import Placed


@functools.cache
def kernels(backend: str) -> ModuleType:
    """The launchers of one backend."""
    return importlib.import_module(f"peft_kernels.{backend}_kernels.weight_distance")


def new_results(count: int, like: Tensor) -> Results:
    return Results(like.new_empty(count, 6), like.new_empty(count), like.new_empty(count))


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
        self.in_order = tuple if order == [*range(len(order))] else operator.itemgetter(*places)

    def split(self, buffer: Tensor) -> Sequence[Tensor]:
        """The tensors; those of one shape are made together."""
        views, start = [], buffer.storage_offset()
        for shape, strides, offset in self.groups:
            views += buffer.as_strided(shape, strides, start + offset).unbind(0)
        return self.in_order(views)


class DistancePlan:
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
        shapes = [[*map(Tensor.size, matrices)] for matrices in self.by_kind(map(matrices_of, inputs))]
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
            module.weight_distance_fwd(placed, decay, reduction, 1.0)
            return losses.sum(), (gradients, *((factors, errors) if self.wide else ()))

    def _placed(self, inputs: list[Tensor], errors: Tensor, kept: Tensor, results: Results) -> Placed:
        """By records. Kernels' tables are kept: they find every matrix behind the start of an input or of a buffer."""
        own = [matrices_of(t.detach()) for t in inputs]  # objects that stand for one place each
        lives, targets, bases, lefts, rights = self.by_kind(own)
        of_errors, of_gradients = self.errors.split(errors), iter(self.gradients.split(kept[: self.sizes[0]]))
        taken = [matrices_of(next(of_gradients)) if self.needs[i] else [None] * len(own[i]) for i in self.thin]
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
        tables = kernels(self.backend).weight_distance_tables([distances, products] if products else [distances])
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


def matrices_of(t: Tensor) -> Sequence[Tensor]:
    return t.unbind(0) if t.dim() == 3 else (t,)
