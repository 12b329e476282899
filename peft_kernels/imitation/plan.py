"""The imitation step's algebra, as records that a backend runs: products before and after the pass over the weights.

With X = [B_d | c_d], P = A X and G = W0 X + B P, whose last columns belong to the bias:

    "input"    F = [B | G], C = [A ; A_d],   b̄ = b0 + G [a_d ; 1]
    "output"   F = [B | B_d], C = [A ; H],   S = A_d B,   H = A_d W0 + S A,   b̄ = b0 + B_d t + c_d,   t = A_d b0 + a_d

With E = F C + (W0 − Ŵ) and e = b̄ − b̂, the loss's gradients φ E and g by them, the adapters' gradients, by stages:

    "input"    0  dB += φ E Aᵀ;    dG = [φ E A_dᵀ + g a_dᵀ | g]
               1  dA += φ Bᵀ E;    dA_d += φ Gᵀ E;   da_d += Gᵀ g;   U = Bᵀ dG
               2  dX += W0ᵀ dG + Aᵀ U;   dB += dG Pᵀ;   dA += U Xᵀ
    "output"   0  dB += φ E Aᵀ;    dB_d += φ E Hᵀ + g tᵀ;   dc_d += g
               1  dA += φ Bᵀ E;    dH = φ B_dᵀ E;    da_d += w;   w = B_dᵀ g
               2  dA += Sᵀ dH;     V = dH Aᵀ;   dA_d += dH W0ᵀ + w b0ᵀ
               3  dB += A_dᵀ V;    dA_d += V Bᵀ

Each stage is one launch; the transform's gradients add up over the projections of its layer.
Source: docs/method.md, section 3.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_kernels.distance_plan import kernels, new_results
from peft_kernels.imitation.factors import Transform
from peft_kernels.imitation.groups import ImitationGroup
from peft_kernels.looks import looks
from peft_kernels.ops.weight_distance import check_changed
from peft_kernels.records import Distance, Product, Results, Stage, Term


@dataclass
class _Student:
    """One projection and its scratch memory; names as in the formulas, columns for what is a vector there."""

    W0: Tensor
    b0: Tensor | None
    A: Tensor | None
    B: Tensor | None
    E: Tensor
    φ: Tensor
    g: Tensor | None = None
    P: Tensor | None = None
    G: Tensor | None = None
    dG: Tensor | None = None
    U: Tensor | None = None
    S: Tensor | None = None
    H: Tensor | None = None
    dH: Tensor | None = None
    t: Tensor | None = None
    w: Tensor | None = None
    V: Tensor | None = None


class Memory:
    """Scratch matrices. Plans that run one after the other may share them; rows begin at multiples of 16 bytes."""

    def __init__(self, like: Tensor):
        self.like, self.parts, self.used = like, [], 0

    def begin(self) -> None:
        self.used = 0

    def empty(self, rows: int, columns: int) -> Tensor:
        width = -(-columns // 4) * 4
        if self.used == len(self.parts):
            self.parts.append(self.like.new_empty(0))
        if self.parts[self.used].numel() < rows * width:
            self.parts[self.used] = self.like.new_empty(rows * width)
        self.used += 1
        return self.parts[self.used - 1][: rows * width].view(rows, width)[:, :columns]


def _without_collisions(stage: list[Product]) -> list[Product]:
    """Tied adapters: products that add to the same gradient become one, since those of a stage run side by side."""
    merged: dict[int, Product] = {}
    for product in stage:
        place = product.result.data_ptr()
        known = merged.get(place)
        if known is None:
            merged[place] = product
        elif (known.form, known.result_last is None) == (product.form, product.result_last is None):
            merged[place] = known._replace(terms=known.terms + product.terms)
        else:
            raise ValueError("groups: an adapter is tied between parts of layers that cannot share it")
    vectors = [product.result_last.data_ptr() for product in merged.values() if product.result_last is not None]
    if len({*merged, *vectors}) < len(merged) + len(vectors):
        raise ValueError("groups: transforms share a bias and not their matrices; tie all of them or none")
    return list(merged.values())


_GRAD = operator.attrgetter("grad")


class Plan:
    """The records of one set of groups, and the memory between them. Only gradients may move from step to step."""

    def __init__(self, groups: Sequence[ImitationGroup], backend: str, memory: Memory):
        self.backend, self.kernels, self.like, self.memory = backend, kernels(backend), groups[0].weight0[0], memory
        memory.begin()
        self.adapters = list({id(t): t for group in groups for t in group.adapters()}.values())
        self.teachers = [t for group in groups for t in group.teachers()]
        self.one = torch.ones(1, 1, dtype=self.like.dtype, device=self.like.device)
        self.results: Results = new_results(sum(len(group.live) for group in groups), self.like)
        self.before: list[list[Product]] = [[], []]
        self.distances: list[Distance] = []
        self.layers = [(group.placement, group.transform, self._students(group)) for group in groups]
        self.own_gradients, self.flat_gradients, self.own_places = [], None, None
        self.gradients, self.places, self.kinds = [None] * len(self.adapters), None, None
        self.after: list[list[Product]] = []
        self.tables: Any = None  # of all stages; follows the gradients
        self.others: list[int] = []  # where everything else in the tables lies
        self.placed: Any = None

    def run(self, decay: float | None, reduction: str, loss_scale: float | Tensor) -> Results:
        """After `find_gradients`."""
        self.kernels.weight_distance_fwd(self.placed, decay, reduction, loss_scale)
        changed = self.gradients if decay is None else self.teachers + self.gradients
        torch.autograd.graph.increment_version(changed)
        return self.results

    # ---- what the step reads and computes ----------------------------------------------------------------------------

    def _students(self, group: ImitationGroup) -> list[_Student]:
        students = []
        for m, (live, teacher, W0) in enumerate(zip(group.live, group.teacher, group.weight0)):
            b0 = None if group.bias0 is None else group.bias0[m]
            A, B = (None, None) if group.down is None else (group.down[m], group.up[m])
            s = _Student(W0, b0, A, B, self.memory.empty(*W0.shape), self.results.factors[len(self.distances)])
            pairs = [] if A is None else [(B, A)]
            bias = {}
            if b0 is not None:
                bias = {"target_bias": group.teacher_bias[m], "base_bias": b0, "live_bias": group.live_bias[m]}
            if group.transform is not None:
                prepare = self._prepare_input if group.placement == "input" else self._prepare_output
                pair, shift = prepare(s, group.transform)
                pairs.append(pair)
                bias |= shift if b0 is not None else {}
            self.distances.append(Distance(teacher, s.W0, tuple(pairs), s.E, live, **bias))
            students.append(s)
        return students

    def _prepare_input(self, s: _Student, transform: Transform) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        A_d, a_d, B_d, c_d = transform
        depth, columns = a_d.numel(), a_d.numel() + (s.b0 is not None)
        c_d = None if s.b0 is None else c_d
        s.G, s.dG = self.memory.empty(s.W0.shape[0], columns), self.memory.empty(s.W0.shape[0], columns)
        terms = [Term(s.W0, B_d, right_last=c_d)]
        if s.A is not None:
            s.P, s.U = self.memory.empty(s.A.shape[0], columns), self.memory.empty(s.A.shape[0], columns)
            self.before[0].append(Product("nn", s.P, (Term(s.A, B_d, right_last=c_d),)))
            terms.append(Term(s.B, s.P))
        self.before[1].append(Product("nn", s.G, tuple(terms)))
        if s.b0 is None:
            return (s.G, A_d), {}
        s.g = s.dG[:, depth:]
        shift = {"shift": s.G[:, :depth], "shift_vector": a_d, "shift_last": s.G[:, depth]}
        return (s.G[:, :depth], A_d), shift | {"bias_gradient": s.dG[:, depth]}

    def _prepare_output(self, s: _Student, transform: Transform) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        A_d, a_d, B_d, c_d = transform
        depth, (out, columns) = a_d.numel(), s.W0.shape
        s.H, s.dH = self.memory.empty(depth, columns), self.memory.empty(depth, columns)
        terms = [Term(A_d, s.W0)]
        if s.A is not None:
            rank = s.A.shape[0]
            s.S, s.V = self.memory.empty(depth, rank), self.memory.empty(depth, rank)
            self.before[0].append(Product("nn", s.S, (Term(A_d, s.B),)))
            terms.append(Term(s.S, s.A))
        self.before[1].append(Product("nn", s.H, tuple(terms)))
        if s.b0 is None:
            return (B_d, s.H), {}
        s.t, s.w, s.g = (self.memory.empty(rows, 1) for rows in (depth, depth, out))
        self.before[0].append(Product("nn", s.t, (Term(A_d, s.b0[:, None]), Term(a_d[:, None], self.one))))
        shift = {"shift": B_d, "shift_vector": s.t[:, 0], "shift_last": c_d, "bias_gradient": s.g[:, 0]}
        return (B_d, s.H), shift

    # ---- what it adds to gradients -----------------------------------------------------------------------------------

    def find_gradients(self) -> None:
        """Where `.grad` is missing, one of the plan's own takes its place; tables follow those that moved."""
        gradients = [*map(_GRAD, self.adapters)]
        missing = [index for index, grad in enumerate(gradients) if grad is None]
        if missing:
            self._set_own(missing, gradients)
        if not all(map(operator.is_, gradients, self.gradients)):
            for grad in gradients:
                if grad.layout != torch.strided or grad.is_inference():
                    raise ValueError("groups: an adapter's .grad is sparse or an inference tensor; set it to None")
        places = self.own_places if 0 < len(gradients) == len(missing) else looks(gradients, addresses=True)
        if places != self.places:
            check_changed([("groups: an adapter's .grad", grad) for grad in gradients], self.teachers)
            self._place(gradients)
            self.places = places
        self.gradients = gradients

    def _place(self, gradients: list[Tensor]) -> None:
        """Tables are made anew where gradients look different; records, which the torch backend reads, always."""
        addresses, kinds = [*map(Tensor.data_ptr, gradients)], looks(gradients)
        if self.backend == "torch" or kinds != self.kinds:
            self.tables, self.kinds = self.kernels.weight_distance_tables(self.stages()), kinds
            if self.backend == "torch":
                self.placed = self.tables.at(self.results)
                return
            sources = {address: index for index, address in enumerate(addresses)}
            self.others = [*{t.data_ptr() for t in self.tables.table.tensors} - sources.keys()]
            sources |= {address: len(addresses) + index for index, address in enumerate(self.others)}
            self.tables.table.follow({id(t): (sources[t.data_ptr()], 0) for t in self.tables.table.tensors})
        self.placed = self.tables.at(self.results, [*addresses, *self.others])

    def stages(self) -> list[Stage]:
        """All that the step does, in records; with the gradients where they are."""
        self.after = [[], [], [], []]
        for layer in self.layers:
            (self._after_output if layer[0] == "output" else self._after_input)(*layer[1:])
        after, self.after = [_without_collisions(stage) for stage in self.after], []
        return [stage for stage in (*self.before, self.distances, *after) if stage]

    def _set_own(self, missing: list[int], gradients: list[Tensor | None]) -> None:
        if looks(self.own_gradients, addresses=True) != self.own_places:  # none yet, or given other data since
            sizes = [-(-t.numel() // 4) * 4 for t in self.adapters]
            self.flat_gradients = self.like.new_empty(sum(sizes))
            parts = self.flat_gradients.split(sizes)
            self.own_gradients = [part[: t.numel()].view(t.shape) for part, t in zip(parts, self.adapters)]
            self.own_places = looks(self.own_gradients, addresses=True)
        if len(missing) == len(self.adapters):
            self.flat_gradients.zero_()
        else:
            torch._foreach_zero_([self.own_gradients[index] for index in missing])
        for index in missing:
            gradients[index] = self.adapters[index].grad = self.own_gradients[index]

    def _add(self, stage: int, form: str, adapter: Tensor, *terms: Term, last: Tensor | None = None) -> None:
        if adapter.requires_grad:
            grad = adapter.grad if adapter.dim() == 2 else adapter.grad[:, None]
            self.after[stage].append(Product(form, grad, terms, True, None if last is None else last.grad))

    def _set(self, stage: int, form: str, scratch: Tensor, *terms: Term) -> None:
        self.after[stage].append(Product(form, scratch, terms))

    def _after_lora(self, students: Sequence[_Student]) -> None:
        for s in students:
            if s.A is not None:
                self._add(0, "nt", s.B, Term(s.E, s.A, s.φ))
                self._add(1, "tn", s.A, Term(s.B, s.E, s.φ))

    def _after_input(self, transform: Transform | None, students: Sequence[_Student]) -> None:
        self._after_lora(students)
        if transform is None:
            return
        A_d, a_d, B_d, c_d = transform
        depth, biased = a_d.numel(), students[0].g is not None
        for s in students:
            through_bias = (Term(s.g, a_d[:, None]),) if biased else ()
            self._set(0, "nt", s.dG[:, :depth], Term(s.E, A_d, s.φ), *through_bias)
            if s.A is not None:
                self._set(1, "tn", s.U, Term(s.B, s.dG))
                through_bias = (Term(s.g, s.P[:, depth:]),) if biased else ()
                self._add(2, "nt", s.B, Term(s.dG[:, :depth], s.P[:, :depth]), *through_bias)
                through_bias = (Term(s.U[:, depth:], c_d[:, None]),) if biased else ()
                self._add(2, "nt", s.A, Term(s.U[:, :depth], B_d), *through_bias)
        self._add(1, "tn", A_d, *(Term(s.G[:, :depth], s.E, s.φ) for s in students))
        if biased:
            self._add(1, "tn", a_d, *(Term(s.G[:, :depth], s.g) for s in students))
        terms = [Term(s.W0, s.dG) for s in students] + [Term(s.A, s.U) for s in students if s.A is not None]
        both = biased and B_d.requires_grad and c_d.requires_grad
        self._add(2, "tn", B_d, *terms, last=c_d if both else None)
        if biased and not both:
            terms = [Term(term.left, term.right[:, depth:]) for term in terms]
            self._add(2, "tn", c_d, *terms)

    def _after_output(self, transform: Transform | None, students: Sequence[_Student]) -> None:
        self._after_lora(students)
        if transform is None:
            return
        A_d, a_d, B_d, c_d = transform
        biased = students[0].g is not None
        for s in students:
            self._set(1, "tn", s.dH, Term(B_d, s.E, s.φ))
            if biased:
                self._set(1, "tn", s.w, Term(B_d, s.g))
            if s.A is not None:
                self._add(2, "tn", s.A, Term(s.S, s.dH))
                self._set(2, "nt", s.V, Term(s.dH, s.A))
                self._add(3, "tn", s.B, Term(A_d, s.V))
        of_E, of_g = [Term(s.E, s.H, s.φ) for s in students], [Term(s.g, s.t) for s in students if biased]
        self._add(0, "nt", B_d, *of_E, *of_g)
        if biased:
            self._add(0, "nt", c_d, *(Term(s.g, self.one) for s in students))
            self._add(1, "tn", a_d, *(Term(B_d, s.g) for s in students))
        of_w = [Term(s.w, s.b0[:, None]) for s in students if biased]
        self._add(2, "nt", A_d, *(Term(s.dH, s.W0) for s in students), *of_w)
        if students[0].A is not None:
            self._add(3, "nt", A_d, *(Term(s.V, s.B) for s in students))
