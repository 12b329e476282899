"""Bad input to the batched operation and its helpers: an error that names the argument, before anything runs."""

import pytest
import torch

from peft_kernels import adapter_segments, batched_lowrank_linear, stack_adapters
from peft_kernels.ops import batched_lowrank_linear as op

ONES = torch.ones
FIVE = adapter_segments(torch.zeros(5, dtype=torch.int64), 3)
BAD = [
    ("x", {"x": [1.0]}, TypeError),
    ("x", {"x": ONES(5, 11)}, ValueError),
    ("weight", {"weight": ONES(8)}, ValueError),
    ("bias", {"bias": ONES(7)}, ValueError),
    ("down", {"down": ONES(2, 12)}, ValueError),
    ("down", {"down": ONES(3, 0, 12)}, ValueError),
    ("down", {"down": ONES(3, 2, 11)}, ValueError),
    ("down", {"down": ONES(3, 2, 12, dtype=torch.bfloat16)}, TypeError),
    ("up", {"up": ONES(2, 8, 2)}, ValueError),
    ("up", {"up": ONES(3, 2, 8)}, ValueError),
    ("up", {"up": ONES(3, 8, 2, device="meta")}, ValueError),
    ("scale", {"scale": ONES(2)}, ValueError),
    ("scale", {"scale": ONES(3, requires_grad=True)}, ValueError),
    ("scale", {"scale": float("inf")}, ValueError),
    ("scale", {"scale": "1"}, TypeError),
    ("adapter_index", {"adapter_index": [0] * 5}, TypeError),
    ("adapter_index", {"adapter_index": ONES(5)}, TypeError),
    ("adapter_index", {"adapter_index": torch.zeros(4, dtype=torch.int64)}, ValueError),
    ("adapter_index", {"adapter_index": torch.tensor([0, 1, 2, 3, 0])}, ValueError),
    ("adapter_index", {"adapter_index": torch.tensor([0, 1, 2, -2, 0])}, ValueError),
    ("adapter_index", {"adapter_index": adapter_segments(torch.zeros(4, dtype=torch.int64), 3)}, ValueError),
    ("adapter_index", {"adapter_index": adapter_segments(torch.zeros(5, dtype=torch.int64), 2)}, ValueError),
    ("adapter_index", {"adapter_index": FIVE._replace(tile_first=FIVE.tile_first[:1])}, ValueError),
    ("scale", {"scale": [1.0, 2.0, 3.0]}, TypeError),
    ("backend", {"backend": "cublas"}, ValueError),
]


@pytest.mark.parametrize(("argument", "change", "kind"), BAD, ids=[f"{i}-{row[0]}" for i, row in enumerate(BAD)])
def test_bad_input_names_the_argument(argument, change, kind, monkeypatch):
    monkeypatch.setattr(op, "_BatchedLowRankLinear", None)  # nothing may run
    good = {"x": ONES(5, 12), "weight": ONES(8, 12), "bias": ONES(8), "down": ONES(3, 2, 12), "up": ONES(3, 8, 2)}
    with pytest.raises(kind, match=rf"^{argument}\b"):
        batched_lowrank_linear(**good | {"adapter_index": torch.zeros(5, dtype=torch.int64)} | change)


def test_an_index_may_be_one_per_row_or_one_per_leading_entry():
    factors = {"weight": ONES(8, 12), "bias": None, "down": ONES(3, 2, 12), "up": ONES(3, 8, 2)}
    with pytest.raises(ValueError, match=r"^adapter_index: expected shape \(5, 4\) or \(5,\), got \(4,\)"):
        batched_lowrank_linear(ONES(5, 4, 12), **factors, adapter_index=torch.zeros(4, dtype=torch.int64))


def test_an_index_is_not_read_unless_asked():
    """On a CPU it always is; a tensor without values stands for one on a GPU."""
    index = torch.zeros(5, dtype=torch.int64, device="meta")
    assert adapter_segments(index, 3).order.shape == (5,)
    with pytest.raises(Exception, match="meta"):
        adapter_segments(index, 3, validate=True)


@pytest.mark.parametrize(
    "factors",
    [
        [],
        [(ONES(2, 12), ONES(8, 3))],
        [(ONES(2, 12), ONES(8, 2)), (ONES(2, 11), ONES(8, 2))],
        [(ONES(2, 12), ONES(8, 2)), (ONES(3, 12), ONES(9, 3))],
        [(ONES(2, 12), ONES(8, 2)), (ONES(3, 12).half(), ONES(8, 3))],
        [(ONES(12), ONES(8, 2))],
        [(1, 2)],
        [(ONES(2, 12), ONES(8, 2), ONES(1))],
    ],
)
def test_stack_adapters_names_the_factor(factors):
    with pytest.raises((ValueError, TypeError), match=r"^factors"):
        stack_adapters(factors)


@pytest.mark.parametrize("arguments", [(torch.zeros(2, 2, dtype=torch.int64), 3), (torch.zeros(2), 3)])
def test_adapter_segments_names_the_index(arguments):
    with pytest.raises((ValueError, TypeError), match=r"^adapter_index"):
        adapter_segments(*arguments)
    with pytest.raises(ValueError, match=r"^adapters"):
        adapter_segments(torch.zeros(2, dtype=torch.int64), 0)
