"""A value that several layers need of one tensor, computed once in each pass through them."""

import threading
import weakref
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from peft_kernels.autocast import linear_dtype


def in_recomputation() -> bool:
    """Is this part of a backward: what reentrant activation checkpointing recomputes, region by region?"""
    return torch._C._current_graph_task_id() != -1


def sharing_state(x: Tensor) -> tuple | None:
    """Values computed in one state serve in no other: thread, grad mode, autocast, hooks. None: nothing is shared."""
    if torch.compiler.is_compiling():
        return None
    autocast = linear_dtype(x) if torch._C._is_any_autocast_enabled() else None
    return threading.get_ident(), torch.is_grad_enabled(), autocast, _saved_tensor_hooks(True)


# The pair that is on, if any: each region of non-reentrant checkpointing, and its recomputation, has its own
_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class _Pass:
    """What one pass has computed, and for what; `state` is None once it may serve no more."""

    def __init__(self, state: tuple, of: Sequence[Tensor], value: Any, member: int):
        self.state, self.value, self.asked = state, value, {member}
        self.end = _ender(weakref.ref(self))
        self.of = [(weakref.ref(t, self.end), t._version, t.requires_grad) for t in of]
        node = (value if isinstance(value, Tensor) else value[0]).grad_fn
        if node is not None:
            node.register_prehook(self.end)  # a backward frees the graph that later members would join

    def serves(self, member: int, state: tuple, of: Sequence[Tensor]) -> bool:
        if self.state != state or member in self.asked:
            return False
        for (ref, version, required), t in zip(self.of, of):
            if ref() is not t or t._version != version or t.requires_grad != required:
                return False
        return True

    def needed_by(self, result: Tensor) -> None:
        """The value's graph holds a whole model's activations: let go of it with the last result that needs it."""
        node = result.grad_fn
        if isinstance(node, FunctionCtx):  # torch's own nodes cannot be referred to weakly
            self.node = weakref.ref(node, self.end)


def _ender(this: weakref.ref[_Pass]) -> Callable[..., None]:
    """Ends the pass, if it is still there: hooks and callbacks keep no value alive."""

    def end(*_) -> None:
        if (alive := this()) is not None:
            alive.state = alive.value = None  # a checkpointed region's hooks in the state hold its inputs

    return end


class PerPass:
    """Members ask in any order; the first one's value serves the others, until one comes a second time.

    That begins another pass, whose graph may not be shared with the last one's, since either may be freed alone. So
    does a backward through the value. Nor is a value shared when its tensor or what it depends on has changed in place,
    between grad modes, autocast dtypes and threads, between the regions of activation checkpointing, which are
    recomputed one by one, in inference mode, which counts no changes, and in compiled graphs, whose own common
    subexpressions are merged. A value is dropped with the last member's request, or the last result that needs it.

    Writes that torch does not count, through .data or by a fused optimizer, do not end a pass: not one that no backward
    went through and that is taken up again by members that have not asked yet.

    Layers that shared a value are one graph: where a vanilla model's layers have none in common, and two of them are
    run backward separately after one pass, the first needs retain_graph=True.
    """

    def __init__(self):
        self.members = 0
        self._pass: _Pass | None = None

    def join(self) -> int:
        """A new member's number."""
        self.members += 1
        return self.members - 1

    def get(
        self, member: int, of: tuple[Tensor, ...], compute: Callable[[], Any], state: tuple | EllipsisType | None = ...
    ) -> Any:
        """compute(), or what it gave to another member in this pass.

        of: the tensor whose value it is, and the parameters that it was computed with;  state: if known, of the tensor
        """
        if self.members == 1:
            return compute()
        if state is ...:
            state = sharing_state(of[0])
        if state is None or True in map(Tensor.is_inference, of):
            return compute()
        current = self._pass
        if current is not None and current.serves(member, state, of):
            value = current.value
            current.asked.add(member)
        else:
            self._pass = None
            value = compute()
            current = _Pass(state, of, value, member)
        self._pass = None if len(current.asked) == self.members else current
        return value

    def needed_by(self, result: Tensor) -> None:
        """What the last request's value went into. Without this, a value waits for the next pass."""
        if self._pass is not None and not torch.compiler.is_dynamo_compiling():
            self._pass.needed_by(result)

    def __getstate__(self) -> dict:
        """Copies and pickles share nothing yet."""
        return {"members": self.members}

    def __setstate__(self, state: dict) -> None:
        self.__init__()
        self.__dict__.update(state)
