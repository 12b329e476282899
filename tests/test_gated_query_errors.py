"""Bad input to `gated_query`: an error that names the argument, before anything runs."""

import pytest
import torch

from peft_kernels import gated_query
from peft_kernels.ops import gated_query as op

ONES = torch.ones
GATED = {"mode": "gated", "hidden": ONES(2, 5, 12), "text": ONES(2, 5, 12), "gamma": ONES(12), "beta": ONES(12)}
ADDITIVE = GATED | {
    "mode": "additive",
    "cross": ONES(2, 5, 12),
    "cross_gamma": ONES(12),
    "cross_beta": ONES(12),
}
HALF = torch.bfloat16
MASK = ONES(2, 5, dtype=torch.bool)
BAD = [
    (GATED, "mode", "softmax", ValueError),
    (GATED, "mode", None, ValueError),
    (GATED, "hidden", [[1.0]], TypeError),
    (GATED, "hidden", ONES(2, 5, 12, dtype=torch.int64), TypeError),
    (GATED, "hidden", ONES(12), ValueError),  # no positions
    (ADDITIVE, "hidden", torch.tensor(1.0), ValueError),
    (ADDITIVE, "hidden", ONES(2, 5, 0), ValueError),
    (GATED, "text", ONES(2, 4, 12), ValueError),
    (GATED, "text", ONES(10, 12), ValueError),
    (GATED, "text", ONES(2, 5, 12, dtype=HALF), TypeError),  # without autocast
    (GATED, "text", ONES(2, 5, 12, device="meta"), ValueError),
    (GATED, "gamma", ONES(11), ValueError),
    (GATED, "gamma", ONES(1, 12), ValueError),
    (GATED, "gamma", ONES(12, dtype=HALF), TypeError),  # under float32
    (GATED, "beta", None, TypeError),
    (GATED, "beta", ONES(12, dtype=torch.float64), TypeError),
    (GATED, "cross", ONES(2, 5, 12), ValueError),
    (GATED, "cross_gamma", ONES(12), ValueError),
    (GATED, "cross_beta", ONES(12), ValueError),
    (GATED, "padding_mask", ONES(2, 5), TypeError),
    (GATED, "padding_mask", ONES(5, dtype=torch.bool), ValueError),
    (GATED, "padding_mask", ONES(2, 5, 12, dtype=torch.bool), ValueError),
    (GATED, "padding_mask", MASK.to("meta"), ValueError),
    (GATED, "scale", 1.0, ValueError),
    (GATED, "scale", torch.tensor(0.1), ValueError),
    (ADDITIVE, "cross", None, ValueError),
    (ADDITIVE, "cross", ONES(2, 5, 11), ValueError),
    (ADDITIVE, "cross", ONES(2, 5, 12, dtype=HALF), TypeError),
    (ADDITIVE, "cross_gamma", None, ValueError),
    (ADDITIVE, "cross_gamma", ONES(5), ValueError),
    (ADDITIVE, "cross_beta", None, ValueError),
    (ADDITIVE, "cross_beta", 0.0, TypeError),
    (ADDITIVE, "padding_mask", MASK, ValueError),
    (ADDITIVE, "scale", float("nan"), ValueError),
    (ADDITIVE, "scale", "0.1", TypeError),
    (ADDITIVE, "scale", ONES(12), ValueError),
    (ADDITIVE, "scale", torch.tensor(0.1, requires_grad=True), ValueError),
    (ADDITIVE, "backend", "cublas", ValueError),
]


@pytest.mark.parametrize(
    ("good", "argument", "value", "kind"), BAD, ids=[f"{i}-{row[0]['mode']}-{row[1]}" for i, row in enumerate(BAD)]
)
def test_bad_input_names_the_argument(good, argument, value, kind, monkeypatch):
    monkeypatch.setattr(op, "_Gated", None)  # nothing may run
    monkeypatch.setattr(op, "_Additive", None)
    with pytest.raises(kind, match=rf"^{argument}\b"):
        gated_query(**good | {argument: value})


@pytest.mark.parametrize("good", [GATED, ADDITIVE], ids=lambda good: good["mode"])
def test_good_input_runs(good):
    """What the cases above change is otherwise right."""
    assert gated_query(**good).shape == (2, 5, 12)


def test_float64_takes_float64_vectors_alone():
    double = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in GATED.items()}
    with pytest.raises(TypeError, match=r"^gamma\b"):
        gated_query(**double | {"gamma": ONES(12)})
