"""What operations keep for calls of one kind: plans, and launches with the tiles and the driver of the first call."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from peft_kernels.ops import lowrank_linear, lowrank_projections


@contextmanager
def afresh() -> Iterator[None]:
    """Nothing that was kept before is used inside the block, and nothing of the block is used after it.

    For whoever changes tiles, kernels or the driver under the operations.
    """
    plans = lowrank_linear._plans, lowrank_projections._plans
    with mock.patch.dict(plans[0], clear=True), mock.patch.dict(plans[1], clear=True):
        _forget_launches()
        try:
            yield
        finally:
            _forget_launches()


def _forget_launches() -> None:
    """Triton may be missing, or not be needed."""
    if (replay := sys.modules.get("peft_kernels.triton_kernels.replay")) is not None:
        replay.forget()
