"""Layers that read one tensor, as q, k and v do, run as one `lowrank_projections`: the first one asked computes all."""

from collections.abc import Sequence
from operator import is_
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from peft_kernels.layers.per_pass import PerPass, in_recomputation, sharing_state
from peft_kernels.ops.lowrank_projections import lowrank_projections
from peft_kernels.records import MOST_PROJECTIONS

PATIENCE = 3  # passes in a row that left some member unasked, after which a group is none


class Projection(NamedTuple):
    """What a layer brings into a group's call."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor
    core: Tensor | None
    scale: Tensor
    options: tuple[float, str, bool, str]  # dropout_p, dropout_on, training, backend
    hidden: Tensor | None = None  # x Aᵀ, if layers outside of the group share it, too


class Member(Protocol):
    """A layer that can be in a group. group: which one, and its number there;  why_alone: why it is in none"""

    training: bool
    group: "tuple[LinearGroup, int] | None"
    why_alone: str

    def group_kind(self) -> tuple[tuple | None, str]:
        """Equal for layers whose adapters one call takes, and ""; or None, and why no call takes it with others."""

    def reads(self) -> tuple[Tensor | None, ...]:
        """The parameters that its output depends on."""

    def projection(self, x: Tensor, state: tuple) -> Projection | None:
        """None where the layer has to run by itself now.  state: `sharing_state` of x"""


class LinearGroup:
    """Layers of one parent that are thought to read the same tensor.

    `PerPass` has the rules by which one call serves several members. Where it shares nothing, and where members differ
    in what a call has once (dropout, training, backend, dtype, device), each runs by itself; so does a merged one.

    A pass that leaves a member unasked, or asks it with another tensor, has computed an output for nothing. After
    PATIENCE such passes in a row the group dissolves: but never between a forward and its recomputation by activation
    checkpointing, which has to draw the same masks, and so not while regions have run that were not yet recomputed.
    """

    def __init__(self, layers: Sequence[Member], names: Sequence[str]):
        if not 2 <= len(layers) <= MOST_PROJECTIONS:
            raise ValueError(f"layers: expected 2 to {MOST_PROJECTIONS} of them, got {len(layers)}")
        self.layers, self.names = list(layers), list(names)
        self.wasted = self.not_recomputed = 0
        self.dissolved = False
        self._shared = PerPass()
        for _ in self.layers:
            self._shared.join()

    def get(self, member: int, layer: Member, x: Tensor) -> Tensor | None:
        """The output of that member for x, or None where it has to run by itself."""
        if torch.compiler.is_compiling() or self.dissolved or self.layers[member] is not layer or x.is_inference():
            return None
        state = sharing_state(x)
        cut_short, begun = self._shared.unfinished, []

        def compute() -> tuple | None:
            begun.append(True)
            return self._computed(x, state)

        value = self._shared.get(member, (x,), compute, state)
        self._count(state, layer.training, cut_short if begun else None)
        if value is None:
            return None
        tensors, versions = value[-1][member]
        now = layer.reads()
        if len(now) != len(tensors) or not all(map(is_, now, tensors)) or _versions(now) != versions:
            return None
        return value[member]

    def _computed(self, x: Tensor, state: tuple) -> tuple | None:
        """-> the output of each member, and what it was computed of"""
        parts = [layer.projection(x, state) for layer in self.layers]
        first = parts[0]
        for part in parts:
            if part is None or part.options != first.options or part.weight.device != x.device:
                return None
            if part.weight.dtype != first.weight.dtype or part.up.dtype != first.up.dtype:
                return None
            if part.hidden is not first.hidden or part.up.shape[1] != first.up.shape[1]:
                return None
        weights, biases, downs, ups, cores, scales, *_ = zip(*parts)
        dropout_p, dropout_on, training, backend = first.options
        ys = lowrank_projections(
            x,
            weights,
            biases,
            downs[0] if all(down is downs[0] for down in downs) else downs,
            ups,
            None if cores[0] is None else cores,
            scales=scales,
            dropout_p=dropout_p,
            dropout_on=dropout_on,
            training=training,
            hidden=first.hidden,
            backend=backend,
        )
        return *ys, [(reads := layer.reads(), _versions(reads)) for layer in self.layers]

    def _count(self, state: tuple, training: bool, cut_short: bool | None) -> None:
        """cut_short: was the pass before it, of a call that begins one?"""
        _, grad, _, hooks = state
        if in_recomputation():
            self.not_recomputed = max(0, self.not_recomputed - 1)
            return
        if cut_short is not None:
            self.wasted = self.wasted + 1 if cut_short else 0
            self.dissolved = self.wasted >= PATIENCE and self.not_recomputed == 0
        if hooks is not None or (training and not grad):
            self.not_recomputed += 1

    def explain(self, member: int) -> str:
        """Which layers a member forms one call with, or why it does not."""
        others = ", ".join(name for place, name in enumerate(self.names) if place != member)
        if self.dissolved:
            return f"by itself, since {others} read other tensors, or were not called"
        return f"one call with {others}"

    def __getstate__(self) -> dict:
        """Copies and pickles have seen no pass yet."""
        return {"layers": self.layers, "names": self.names}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


def _versions(tensors: tuple[Tensor | None, ...]) -> list[int | None]:
    return [None if t is None or t.is_inference() else t._version for t in tensors]
