"""Bad input: a ValueError or TypeError that names the argument, before anything runs."""

import pytest
import torch

from peft_kernels import lowrank_hidden, lowrank_linear
from peft_kernels.layers import LowRankLinear
from peft_kernels.ops import lowrank_linear as op


def good() -> dict:
    return {
        "x": torch.ones(5, 12),
        "weight": torch.ones(8, 12),
        "bias": torch.ones(8),
        "down": torch.ones(2, 12),
        "up": torch.ones(8, 2),
    }


BAD = [
    ("x", {"x": torch.ones(5, 11)}, ValueError),
    ("x", {"x": torch.tensor(1.0)}, ValueError),
    ("x", {"x": torch.ones(5, 12, dtype=torch.int64)}, TypeError),
    ("x", {"x": [[1.0] * 12]}, TypeError),
    ("weight", {"weight": torch.ones(8, 12, 1)}, ValueError),
    ("weight", {"weight": torch.ones(8, 12, dtype=torch.float16)}, TypeError),
    ("weight", {"weight": "int4"}, TypeError),
    ("weight", {"weight": torch.ones(8, 12, device="meta")}, ValueError),
    ("weight", {"weight": torch.ones(0, 12), "bias": torch.ones(0)}, ValueError),
    ("weight", {"x": torch.ones(5, 0), "weight": torch.ones(8, 0), "down": torch.ones(2, 0)}, ValueError),
    ("bias", {"bias": torch.ones(7)}, ValueError),
    ("bias", {"bias": torch.ones(8, 1)}, ValueError),
    ("bias", {"bias": torch.ones(8, dtype=torch.float64)}, TypeError),
    ("down", {"down": torch.ones(2, 11)}, ValueError),
    ("down", {"down": torch.ones(12)}, ValueError),
    ("down", {"down": torch.ones(0, 12), "up": torch.ones(8, 0)}, ValueError),
    ("down", {"down": torch.ones(2, 12, dtype=torch.float16)}, TypeError),
    ("down", {"down": None}, TypeError),
    ("up", {"up": torch.ones(8, 3)}, ValueError),
    ("up", {"up": torch.ones(7, 2)}, ValueError),
    ("up", {"up": torch.ones(8, 2, device="meta")}, ValueError),
    ("core", {"core": torch.ones(3)}, ValueError),
    ("core", {"core": torch.ones(2, 3)}, ValueError),
    ("core", {"core": torch.ones(1, 1, 2, 3)}, ValueError),
    ("core", {"core": torch.ones(1, 1, 1, 2, 2)}, ValueError),
    ("core", {"core": torch.ones(0, 1, 2)}, ValueError),
    ("core", {"core": torch.tensor(1.0)}, ValueError),
    ("core", {"core": torch.ones(2, dtype=torch.float64)}, TypeError),
    ("down", {"core": torch.ones(1, 3, 2)}, ValueError),
    ("up", {"core": torch.ones(3, 1, 2)}, ValueError),
    ("scale", {"scale": "1"}, TypeError),
    ("scale", {"scale": True}, TypeError),
    ("scale", {"scale": float("nan")}, ValueError),
    ("scale", {"scale": 10**400}, ValueError),
    ("scale", {"scale": torch.ones(1)}, ValueError),
    ("scale", {"scale": torch.tensor(1.0, requires_grad=True)}, ValueError),
    ("scale", {"scale": torch.tensor(1.0, device="meta")}, ValueError),
    ("dropout_p", {"dropout_p": 1.0}, ValueError),
    ("dropout_p", {"dropout_p": -0.1}, ValueError),
    ("dropout_p", {"dropout_p": float("nan")}, ValueError),
    ("dropout_p", {"dropout_p": "0.1"}, TypeError),
    ("dropout_on", {"dropout_on": "output"}, ValueError),
    ("hidden", {"hidden": torch.ones(5, 3)}, ValueError),
    ("hidden", {"hidden": torch.ones(4, 2)}, ValueError),
    ("hidden", {"hidden": torch.ones(5, 2, dtype=torch.float16)}, TypeError),
    ("hidden", {"hidden": torch.ones(5, 2), "dropout_p": 0.1}, ValueError),
    ("design", {"design": "D9"}, ValueError),
    ("design", {"design": "tail"}, ValueError),
    ("design", {"design": "fused", "backend": "torch"}, ValueError),
    ("backend", {"backend": "cublas"}, ValueError),
]


@pytest.mark.parametrize(("argument", "change", "kind"), BAD, ids=[f"{i}-{row[0]}" for i, row in enumerate(BAD)])
def test_lowrank_linear_names_the_argument(argument, change, kind, monkeypatch):
    monkeypatch.setattr(op, "_LowRankLinear", None)  # nothing may run
    with pytest.raises(kind, match=rf"^{argument}\b"):
        lowrank_linear(**good() | change)


WARM = good() | {"core": torch.ones(2), "hidden": torch.ones(5, 2), "scale": torch.tensor(1.0)}
OTHERWISE = {
    "device": lambda t: t.to("meta"),
    "dtype": torch.Tensor.cfloat,
    "layout": torch.Tensor.to_sparse,
    "dimensions": lambda t: t[..., None],
}


@pytest.mark.parametrize("other", OTHERWISE)
@pytest.mark.parametrize("name", sorted(WARM.keys() - {"x"}))
def test_a_call_like_a_right_one_but_for_one_tensor(name, other):
    lowrank_linear(**WARM)  # whose checks are remembered
    with pytest.raises((TypeError, ValueError), match=rf"^{name}\b"):
        lowrank_linear(**WARM | {name: OTHERWISE[other](WARM[name])})


def test_a_hiddens_checks_are_made_once(monkeypatch):
    x, down = torch.ones(3, 7), torch.ones(2, 7)
    z = lowrank_hidden(x, down)
    monkeypatch.setattr(op, "resolve", None)
    assert torch.equal(lowrank_hidden(x, down), z)


def test_rows_of_another_width_after_a_right_call():
    batch = {"x": torch.ones(5, 4, 12), "hidden": torch.ones(5, 4, 2)}
    lowrank_linear(**WARM | batch)
    with pytest.raises(ValueError, match=r"^x\b"):
        lowrank_linear(**WARM | batch | {"x": torch.ones(5, 4, 11)})


@pytest.mark.parametrize(
    ("design", "change"),
    [
        ("fused", {"core": torch.ones(1, 2, 2), "down": torch.ones(2, 6)}),
        ("fused", {"down": torch.ones(33, 12), "up": torch.ones(8, 33)}),
        ("fused", {"hidden": torch.ones(5, 2)}),
    ],
)
def test_a_design_that_cannot_run_is_refused(design, change):
    with pytest.raises(ValueError, match=r"^design"):
        lowrank_linear(**good() | change, design=design, backend="triton")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((torch.ones(5, 12), torch.ones(2, 11)), "down"),
        ((torch.ones(5, 12), torch.ones(0, 12)), "down"),
        ((torch.ones(5, 12), torch.ones(12)), "down"),
        ((torch.ones(5, 12), torch.ones(2, 6), 0), "input_blocks"),
        ((torch.ones(5, 12), torch.ones(2, 6), 1.5), "input_blocks"),
        ((torch.ones(5, 12), torch.ones(2, 6), 3), "down"),
        ((torch.ones(5, 12, dtype=torch.int32), torch.ones(2, 12)), "x"),
    ],
)
def test_lowrank_hidden_names_the_argument(arguments, name):
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b"):
        lowrank_hidden(*arguments)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 2.0}, "rank"),
        ({"core": "tucker"}, "core"),
        ({"out_blocks": 3, "core": "diagonal"}, "out_blocks"),
        ({"in_blocks": 0, "core": "diagonal"}, "in_blocks"),
        ({"out_blocks": 2}, "core"),
        ({"init": "pissa"}, "init"),
        ({"dropout_p": 1.5}, "dropout_p"),
        ({"dropout_on": "x"}, "dropout_on"),
        ({"adapter_dtype": torch.float16}, "adapter_dtype"),
        ({"scale": float("inf")}, "scale"),
        ({"backend": "gpu"}, "backend"),
        ({"design": "D7"}, "design"),
    ],
)
def test_layer_names_the_argument(change, name):
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b"):
        LowRankLinear(torch.nn.Linear(12, 8), **{"rank": 2} | change)


def test_layer_takes_only_plain_linears():
    parametrized = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4))
    integer = torch.nn.Linear(4, 4)
    integer.weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    for module in (torch.nn.Conv1d(4, 4, 1), parametrized, torch.nn.LazyLinear(4), integer):
        with pytest.raises(TypeError, match=r"^linear"):
            LowRankLinear(module, 2)
    with pytest.raises(ValueError, match=r"^linear: is a LowRankLinear already"):
        LowRankLinear(LowRankLinear(torch.nn.Linear(4, 4), 2), 2)
