"""What is kept of a call of `lowrank_projections` for the next one of its kind, as test_replay_calls.py has it."""

import pytest
import torch
from replay_cases import (
    check,
    laid,
    launcher,  # noqa: F401
    multiplying,
    nothing_kept,  # noqa: F401
)

from peft_kernels import lowrank_projections
from peft_kernels.ops import lowrank_projections as op

SETTINGS = {  # each with its usual value first
    "rows": (5, 16, 37),
    "dtype": (torch.float32, torch.bfloat16),
    "widths": ((48, 16, 32), (32, 32, 32), (16, 48, 32), (48, 16)),
    "shared": (False, True),
    "stacked": (False, True),
    "x": ("plain", "sliced", "transposed", "offset"),
    "biases": ("plain", "none", "one for all", "offset"),
    "downs": ("plain", "one for all", "transposed", "offset"),
    "scales": ("number", "another number", "numbers", "one tensor", "tensors", "two tensors"),
    "p": (0.0, 0.1, 0.5),
    "place": ("input", "rank"),
    "used": ((0, 1), (0,), (1,)),
    "dys": ("plain", "sliced", "expanded", "offset"),
    "grads": ("all", "x", "ups", "downs"),
    "tf32": ("ieee", "tf32"),
    "plain": (True, False),  # a weight of a type of its own takes the way without a memo
}
USUAL = {name: values[0] for name, values in SETTINGS.items()}
SLOW = {"x": ("sliced", "offset"), "biases": ("offset",), "downs": ("offset",), "dys": ("sliced", "offset")}


class Tensor(torch.Tensor):
    pass


def checked(given: dict) -> tuple[list, bool]:
    widths, dtype, width, rank = given["widths"], given["dtype"], 32, 4
    count = len(widths)
    x = laid((given["rows"], width), dtype, given["x"])
    weights = [torch.zeros(n, width, dtype=dtype) for n in widths]
    if given["stacked"]:
        weights = list(torch.zeros(sum(widths), width, dtype=dtype).split(widths))
    if not given["plain"]:
        weights[0] = weights[0].as_subclass(Tensor)
    biases = [None if given["biases"] == "none" else laid((n,), dtype, given["biases"]) for n in widths]
    if given["biases"] == "one for all":
        biases = [biases[0] if n == widths[0] else bias for n, bias in zip(widths, biases)]
    downs = [laid((rank, width), dtype, given["downs"]) for _ in range(1 if given["shared"] else count)]
    if given["downs"] == "one for all":
        downs = downs[:1] * len(downs)
    ups, numbers = [torch.zeros(n, rank, dtype=dtype) for n in widths], [torch.ones(()) for _ in widths]
    scales = {
        "number": [2.0] * count, "another number": [0.5] * count, "numbers": [2.0, 0.5, 1.0][:count],
        "one tensor": numbers[:1] * count, "tensors": numbers, "two tensors": [*numbers[:1], *numbers[:-1]],
    }[given["scales"]]  # fmt: skip
    parts = {"x": [x], "downs": downs, "ups": ups}
    leaves = list({id(t): t for name, ts in parts.items() if given["grads"] in ("all", name) for t in ts}.values())
    for leaf in leaves:
        leaf.requires_grad_()
    t = {f"{name}{j}": each for name, ts in (*parts.items(), ("bias", biases)) for j, each in enumerate(ts)}
    wide = [op.scale_tensor(scale, torch.float32, x.device) for scale in scales]  # numbers', too
    t |= {f"scale{j}": scale for j, scale in enumerate(wide)}
    for j in given["used"]:
        shape = given["rows"], widths[j]
        one = given["dys"] == "expanded"
        t[f"dy{j}"] = torch.zeros((), dtype=dtype).expand(shape) if one else laid(shape, dtype, given["dys"])

    def step():
        with multiplying(given["tf32"]):
            ys = lowrank_projections(
                x, weights, biases, downs[0] if given["shared"] else downs, ups, scales=scales, dropout_p=given["p"],
                dropout_on=given["place"], backend="triton",
            )  # fmt: skip
            used = given["used"]
            grads = torch.autograd.grad([ys[j] for j in used], leaves, [t[f"dy{j}"] for j in used], allow_unused=True)
        return *ys, *grads

    return check(step, t)


BASES = {
    "lora": {},
    "dropped": {"dtype": torch.bfloat16, "p": 0.1},
    "aurora": {"shared": True, "p": 0.1, "place": "rank", "stacked": True, "scales": "one tensor"},
    "others": {"plain": False, "used": (1,)},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("base", BASES)
def test_one_change_after_the_other(base, name):
    """Every setting's values, there and back again."""
    values = SETTINGS[name]
    for value in (*values, values[0]):
        checked(USUAL | BASES[base] | {name: value})


def test_most_calls_are_made_again():
    for base in ({}, {"stacked": True}, {"plain": False}):
        for name, values in SETTINGS.items():
            for value in values:
                _, again = checked(USUAL | base | {name: value})
                assert again == (value not in SLOW.get(name, ())) or name == "plain", (base, name, value)


@pytest.mark.parametrize(("name", "value"), [("rows", 37), ("stacked", True), ("tf32", "tf32"), ("grads", "x")])
def test_a_change_that_no_key_tells_is_noticed(name, value, monkeypatch):
    """The comparison can fail: here the keys tell forward from backward alone."""
    from peft_kernels.triton_kernels import lowrank_projections as launchers
    from peft_kernels.triton_kernels import replay

    def forgetful(memo, key, function, tensors):
        return replay.replayed(memo, key[0] == "fwd", function, tensors)

    monkeypatch.setattr(launchers, "replayed", forgetful)
    checked(USUAL)
    checked(USUAL)
    with pytest.raises(AssertionError):
        checked(USUAL | {name: value})


def test_one_output_is_not_another():
    """Its width is in no key of a plan."""
    widths = {"widths": (48, 16, 48)}
    for used in ((0,), (1,), (2,), (0, 1), (1, 2)):
        checked(USUAL | widths | {"used": used})
    assert len(op._plans) == 1
