"""A value that several layers need of one tensor, computed once in each pass through them."""

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from peft_kernels.autocast import linear_dtype


def in_recomputation() -> bool:
    """Is this part of a backward: what reentrant activation checkpointing recomputes, region by region?"""
    return torch._C._current_graph_task_id() != -1


def saved_tensor_hooks() -> tuple | None:
    """The pair that is on, if any: each region of non-reentrant checkpointing, and its recomputation, has its own."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


class _Pass:
    """What one pass has computed, and for what; `value` is None once it may serve no more."""

    def __init__(self, key: tuple, of: Sequence[Tensor], value: Any, member: int):
        self.key, self.value, self.asked = key, value, {member}
        self.of = [weakref.ref(t, self._ender()) for t in of]
        node = (value if isinstance(value, Tensor) else value[0]).grad_fn
        if node is not None:
            node.register_prehook(self._ender())  # a backward frees the graph that later members would join

    def serve(self, member: int, key: tuple, of: Sequence[Tensor]) -> Any:
        """The value, or None if it is not this member's."""
        value, same = self.value, self.key == key and all(ref() is t for ref, t in zip(self.of, of))
        if not same or member in self.asked:
            return None
        self.asked.add(member)
        return value

    def needed_by(self, result: Tensor) -> None:
        """The value's graph holds a whole model's activations: let go of it with the last result that needs it."""
        if isinstance(result.grad_fn, FunctionCtx):  # torch's own nodes cannot be referred to weakly
            self.node = weakref.ref(result.grad_fn, self._ender())

    def _ender(self) -> Callable[..., None]:
        """Ends the pass, if it is still there: the hook and the callbacks keep no value alive."""
        this = weakref.ref(self)

        def end(*_) -> None:
            if (alive := this()) is not None:
                alive.key = alive.value = None  # a checkpointed region's hooks in the key hold its inputs

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

    def get(self, member: int, x: Tensor, depends: Sequence[Tensor], compute: Callable[[], Any]) -> Any:
        """compute(), or what it gave to another member in this pass.

        x: the tensor whose value it is;  depends: parameters that it was computed with
        """
        of = (x, *depends)
        if self.members == 1 or torch.compiler.is_compiling() or any(t.is_inference() for t in of):
            return compute()
        modes = threading.get_ident(), torch.is_grad_enabled(), linear_dtype(x), saved_tensor_hooks()
        key = (*modes, *((t._version, t.requires_grad) for t in of))
        current = self._pass
        value = None if current is None else current.serve(member, key, of)
        if value is None:
            self._pass = None
            value = compute()
            current = _Pass(key, of, value, member)
        self._pass = None if len(current.asked) == self.members else current
        return value

    def needed_by(self, result: Tensor) -> None:
        """What the last request's value went into. Without this, a value waits for the next pass."""
        if not torch.compiler.is_compiling() and self._pass is not None:
            self._pass.needed_by(result)

    def __getstate__(self) -> dict:
        """Copies and pickles share nothing yet."""
        return {"members": self.members}

    def __setstate__(self, state: dict) -> None:
        self.__init__()
        self.__dict__.update(state)
