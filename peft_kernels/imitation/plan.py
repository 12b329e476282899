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

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels.distance_plan import kernels, new_results
from peft_kernels.imitation.factors import Transform
from peft_kernels.imitation.gradients import Gradients, places_of, without_collisions, written_first
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


class _Followed(NamedTuple):
    """Tables that follow the gradients, for as long as these look alike but for their addresses."""

    kinds: Hashable
    tables: Any
    others: list[int]  # where everything else in them lies
    unwritten: list[int]  # gradients to which a product adds before one has written them, or none does


class Plan:
    """The records of one set of groups, and the memory between them. Only gradients may move from step to step."""

    def __init__(self, groups: Sequence[ImitationGroup], backend: str, memory: Memory):
        self.backend, self.kernels, self.like, self.memory = backend, kernels(backend), groups[0].weight0[0], memory
        memory.begin()
        self.gradients = Gradients(list({id(t): t for group in groups for t in group.adapters()}.values()))
        self.teachers = [t for group in groups for t in group.teachers()]
        self.one = torch.ones(1, 1, dtype=self.like.dtype, device=self.like.device)
        self.results: Results = new_results(sum(len(group.live) for group in groups), self.like)
        self.before: list[list[Product]] = [[], []]
        self.distances: list[Distance] = []
        self.layers = [(group.placement, group.transform, self._students(group)) for group in groups]
        self.after: list[list[Product]] = []
        self.places: Hashable = None  # where the gradients were when what is placed was
        self.fresh = False  # are gradients written, and not added to?
        self.followed: dict[bool, _Followed] = {}
        self.placed: dict[bool, Any] = {}

    def run(self, decay: float | None, reduction: str, loss_scale: float | Tensor) -> Results:
        """After `find_gradients`."""
        gradients = self.gradients.tensors
        if self.fresh and (unwritten := self.followed[True].unwritten):
            torch._foreach_zero_([gradients[index] for index in unwritten])
        self.kernels.weight_distance_fwd(self.placed[self.fresh], decay, reduction, loss_scale)
        torch.autograd.graph.increment_version(gradients if decay is None else self.teachers + gradients)
        return self.results

    def drop_unfinished(self) -> None:
        """After an error: gradients that were to be written first hold anything."""
        if self.fresh:
            self.gradients.drop()

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
        """Where they are in this step. On the torch backend, where another plan may yet refuse its own, they are zeros
        where they are new."""
        self.fresh = False
        self.fresh = self.gradients.find(overwritten=self.backend != "torch")
        if self.gradients.places != self.places:
            check_changed([("groups: an adapter's .grad", grad) for grad in self.gradients.tensors], self.teachers)
            self.places, self.placed = self.gradients.places, {}
        if self.fresh not in self.placed:
            self.placed[self.fresh] = self._place()

    def _place(self) -> Any:
        """Tables are made anew where gradients look different; records, which the torch backend reads, always."""
        if self.backend == "torch":
            return self.kernels.weight_distance_tables(self.stages()).at(self.results)
        gradients, known = self.gradients.tensors, self.followed.get(self.fresh)
        addresses, kinds = [*map(Tensor.data_ptr, gradients)], looks(gradients)
        if known is None or known.kinds != kinds:
            known = self.followed[self.fresh] = self._following(addresses, kinds)
        return known.tables.at(self.results, [*addresses, *known.others])

    def _following(self, addresses: list[int], kinds: Hashable) -> _Followed:
        stages, adds = self.stages(), {}
        for product in (record for stage in stages for record in stage if isinstance(record, Product)):
            for place in places_of(product):
                adds.setdefault(place, product.accumulate)
        unwritten = [index for index, address in enumerate(addresses) if adds.get(address, True)]
        tables = self.kernels.weight_distance_tables(stages)
        sources = {address: index for index, address in enumerate(addresses)}
        others = [*{t.data_ptr() for t in tables.table.tensors} - sources.keys()]
        sources |= {address: len(addresses) + index for index, address in enumerate(others)}
        tables.table.follow({id(t): (sources[t.data_ptr()], 0) for t in tables.table.tensors})
        return _Followed(kinds, tables, others, unwritten)

    def stages(self) -> list[Stage]:
        """All that the step does, in records; with the gradients where they are."""
        self.after = [[], [], [], []]
        for layer in self.layers:
            (self._after_output if layer[0] == "output" else self._after_input)(*layer[1:])
        after, self.after = [without_collisions(stage) for stage in self.after], []
        after = written_first(after) if self.fresh else after
        return [stage for stage in (*self.before, self.distances, *after) if stage]

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
