"""Layers that read one tensor, as q, k and v do, run as one `lowrank_projections`: the first one asked computes all."""

import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from peft_kernels.autocast import linear_dtype
from peft_kernels.frozen_products import stacked
from peft_kernels.ops.lowrank_projections import lowrank_projections
from peft_kernels.records import MOST_PROJECTIONS

PATIENCE = 3  # passes in a row that left some member unasked, after which a group is none


Reads = dict[str, Tensor | None]


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

    def reads(self) -> Reads:
        """The parameters that its output depends on, by name."""

    def projection(self, x: Tensor) -> Projection | None:
        """None where the layer has to run by itself now."""


class _ThisThread(threading.local):
    current: "_Pass | None" = None


class LinearGroup:
    """Layers of one parent that are thought to read the same tensor.

    One call serves all members of a pass by the rules that `PerPass` has: same tensor, unchanged, same thread, grad
    mode, autocast and region of activation checkpointing, until a member asks again or a backward comes. Where members
    differ in what a call has once (dropout, training, backend, dtype, device, rank), in compiled graphs and in
    inference mode each runs by itself; so does a merged one.

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
        self.count, self._here = len(layers), _ThisThread()

    def get(self, member: int, layer: Member, x: Tensor) -> Tensor | None:
        """The output of that member for x, or None where it has to run by itself."""
        if _in_graph() or self.dissolved:
            return None
        autocast, current = linear_dtype(x) if _any_autocast() else None, self._here.current
        state = _grad_enabled(), autocast, _hooks(True)
        if current is not None and current.state == state and current.x() is x:
            y = current.ys[member]
            if y is not None and current.version == x._version and current.required == x.requires_grad:
                if layer is not self.layers[member]:
                    return None
                now, before = layer.reads(), current.reads[member]
                for name in now:
                    if name not in before or now[name] is not before[name][0]:  # or another adapter is active
                        return None
                    if (version := before[name][1]) is not None and now[name]._version != version:
                        return None
                current.ys[member] = None
                current.asked += 1
                if current.asked == self.count:
                    self._here.current = None
                return y
        return self._begin(member, layer, x, state)

    def _begin(self, member: int, layer: Member, x: Tensor, state: tuple) -> Tensor | None:
        """Another pass, or None where the layer has to run by itself."""
        if layer is not self.layers[member] or type(x) not in _PLAIN or _tracing() is not None:
            return None
        try:
            version = x._version
        except RuntimeError:  # a tensor of inference mode
            return None
        again, before = _graph_task() != -1, self._here.current
        if again:
            self.not_recomputed = max(0, self.not_recomputed - 1)
        else:
            self.wasted = 0 if before is None or before.again else self.wasted + 1
            self.dissolved = self.wasted >= PATIENCE and self.not_recomputed == 0
            if state[2] is not None or (layer.training and not state[0]):
                self.not_recomputed += 1
        self._here.current = None
        if self.dissolved:
            return None
        parts, reads = [], []  # += makes them grow without a call
        for each in self.layers:
            if (part := each.projection(x)) is None:
                return None
            parts += (part,)
            reads += ({} if each is layer else each.reads(),)
        if not _alike(parts, x):
            return None
        weights, biases, downs, ups, cores, scales, (options, *_), (hidden, *_) = zip(*parts)
        dropout_p, dropout_on, training, backend = options
        ys = lowrank_projections(
            x,
            weights,
            biases,
            downs[0] if downs[0] is downs[1] is downs[-1] else downs,
            ups,
            None if cores[0] is None else cores,
            scales=scales,
            dropout_p=dropout_p,
            dropout_on=dropout_on,
            training=training,
            hidden=hidden,
            backend=backend,
        )
        current = self._here.current = _Pass(x, version, state, ys, reads, again)
        y, current.ys[member] = ys[member], None
        return y

    @torch.no_grad()
    def stack(self) -> None:
        """Lay the frozen weights one behind the other in one memory, so that one product takes them all.

        They stay the same Parameters. A weight that is moved, cast, assigned or sharded later leaves the others, whose
        products are then made one by one.
        """
        weights = [layer.reads()["weight"] for layer in self.layers]
        together = torch.cat([weight.detach() for weight in weights])
        for weight, rows in zip(weights, together.split([len(weight) for weight in weights])):
            weight.data = rows

    @property
    def stacked(self) -> bool:
        return stacked([layer.reads()["weight"] for layer in self.layers]) is not None

    def explain(self, member: int) -> str:
        """Which layers a member forms one call with, or why it does not."""
        others = ", ".join(name for place, name in enumerate(self.names) if place != member)
        if self.dissolved:
            return f"by itself, since {others} read other tensors, or were not called"
        return f"one call with {others}" + ", weights stacked" * self.stacked

    def __getstate__(self) -> dict:
        """Copies and pickles have seen no pass yet."""
        return {"layers": self.layers, "names": self.names}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


class _Pass:
    """What one call has computed, and for what; `state` is None once it may serve no more."""

    def __init__(self, x: Tensor, version: int, state: tuple, ys: tuple[Tensor, ...], reads: list[Reads], again: bool):
        self.state, self.ys, self.asked, self.again = state, [*ys], 1, again
        self.reads = _versions(reads)
        this = weakref.ref(self)

        def end(*_) -> None:  # keeps nothing alive
            if (alive := this()) is not None:
                alive.state, alive.ys = None, [None] * len(alive.ys)

        self.x, self.version, self.required = weakref.ref(x, end), version, x.requires_grad
        if (node := ys[0].grad_fn) is not None:  # a backward frees the graph that later members would join
            try:
                node.begins_backward = end
            except AttributeError:  # a node of torch's own
                node.register_prehook(end)


def _alike(parts: list[Projection], x: Tensor) -> bool:
    """Does one call take them all?"""
    first = parts[0]
    for part in parts:
        if part.options != first.options or part.hidden is not first.hidden:
            return False
        weight, down = part.weight, part.down
        if weight.device != x.device or weight.dtype != first.weight.dtype or down.dtype != first.down.dtype:
            return False
        if down.shape != first.down.shape or (part.core is None) is not (first.core is None):
            return False
    return True


def _versions(reads: list[Reads]) -> list[dict[str, tuple[Tensor | None, int | None]]]:
    """What each layer reads, and how often that was changed in place; None where torch does not count."""
    found = []
    for own in reads:
        seen = {}
        for name in own:
            try:
                seen[name] = own[name], None if own[name] is None else own[name]._version
            except RuntimeError:  # a tensor of inference mode
                seen[name] = own[name], None
        found += (seen,)
    return found


_PLAIN = (Tensor, nn.Parameter)
_in_graph, _grad_enabled = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled
_any_autocast, _graph_task = torch._C._is_any_autocast_enabled, torch._C._current_graph_task_id
_tracing = torch._C._get_tracing_state  # torch.jit's, under which sizes are tensors
_hooks = torch._C._autograd._top_saved_tensors_default_hooks
