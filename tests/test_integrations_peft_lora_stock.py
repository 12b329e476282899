"""Where fusing would mean something else than PEFT does, PEFT's own forward runs, and later the fused one again."""

import pytest
import torch
from peft_lora_cases import EXACT, TWO, change, count_calls, layers
from torch import nn
from torch.autograd import forward_ad


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


class Shouting(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Square(nn.Module):
    def forward(self, weight):
        return weight * weight


def hooked(module):
    module.register_forward_hook(lambda module, args, result: 3 * result)


CHANGES = {
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "several active": lambda layer: layer.set_adapter(["a", "b"]),
    "absent": lambda layer: layer.set_adapter(["c"]),
    "none": lambda layer: layer.set_adapter([]),
    "hook on base": lambda layer: hooked(layer.base_layer),
    "hook on A": lambda layer: hooked(layer.lora_A["a"]),
    "hook on B": lambda layer: hooked(layer.lora_B["a"]),
    "hook on dropout": lambda layer: hooked(layer.lora_dropout["a"]),
    "own forward": lambda layer: change(layer.base_layer, forward=lambda x: 2 * nn.Linear.forward(layer.base_layer, x)),
    "another base class": lambda layer: change(layer.base_layer, __class__=Shouting),
    "another A": lambda layer: change(layer.lora_A["a"], __class__=Shouting),
    "parametrised base": lambda layer: nn.utils.parametrize.register_parametrization(
        layer.base_layer, "weight", Square()
    ),
    "parametrised B": lambda layer: nn.utils.parametrize.register_parametrization(
        layer.lora_B["a"], "weight", Square()
    ),
    "a bias of B": lambda layer: change(layer.lora_B["a"], bias=nn.Parameter(torch.ones(5, dtype=torch.float64))),
    "another dropout": lambda layer: layer.lora_dropout.update({"a": nn.Tanh()}),
    "trained scale": lambda layer: layer.scaling.update(a=torch.tensor(2.0, dtype=torch.float64, requires_grad=True)),
    "infinite scale": lambda layer: layer.scaling.update(a=float("inf")),
}


@pytest.mark.parametrize("case", CHANGES)
def test_falls_back(case, calls):
    theirs, ours = layers(adapters=TWO)
    x = torch.randn(3, 6, dtype=torch.float64)
    plain = ours(x)
    assert calls == [1, 0]
    for layer in (theirs, ours):
        CHANGES[case](layer)
    expected = theirs(x)
    assert torch.equal(ours(x), expected) or expected.isnan().any()
    assert not torch.equal(expected, plain) and calls == [1, 0]
    assert ours.why_stock(x)


def test_comes_back(calls):
    theirs, ours = layers(adapters=TWO)
    x = torch.randn(3, 6, dtype=torch.float64)
    for step in (
        *(lambda layer: layer.enable_adapters(False), lambda layer: layer.enable_adapters(True)),
        *(lambda layer: layer.merge(), lambda layer: layer.unmerge()),
        *(lambda layer: layer.set_adapter(["a", "b"]), lambda layer: layer.set_adapter("b")),
        *(lambda layer: layer.set_adapter(["c", "b"]), lambda layer: layer.delete_adapter("a")),
    ):
        step(theirs), step(ours)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-12)  # unmerging leaves roundings
    assert calls == [5, 0]


def test_what_looks_inside_sees_pefts_modules(calls):
    theirs, ours = layers()
    x = torch.randn(3, 6, dtype=torch.float64)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
    torch.testing.assert_close(ours(x), theirs(x), **EXACT)
    handle.remove()
    assert len(seen) == 10 and calls == [0, 0]  # base, dropout, A, B and the layer, twice
    with torch.no_grad():
        traced = torch.jit.trace(ours, x, check_trace=False)
    torch.testing.assert_close(traced(2 * x), theirs(2 * x), **EXACT)

    def energy(weight, layer):
        return torch.func.functional_call(layer, {"lora_B.default.weight": weight}, (x,)).square().sum()

    weight = ours.lora_B["default"].weight.detach()
    ours_grad, theirs_grad = (torch.func.grad(energy)(weight, layer) for layer in (ours, theirs))
    torch.testing.assert_close(ours_grad, theirs_grad, **EXACT)
    with forward_ad.dual_level():
        tangents = [forward_ad.unpack_dual(each(forward_ad.make_dual(x, x))).tangent for each in (ours, theirs)]
    torch.testing.assert_close(*tangents, **EXACT)
    assert calls == [0, 0] and ours(x) is not None and calls == [1, 0]


DTYPES = {
    "half adapters, float32 input": (torch.float32, torch.bfloat16, torch.float32, True),
    "input of another dtype": (torch.float32, torch.float32, torch.bfloat16, True),
    "casting disabled": (torch.bfloat16, torch.float32, torch.bfloat16, False),
    "float32 adapters, float64 input": (torch.float64, torch.float32, torch.float64, True),
    "integers": (torch.float32, torch.float32, torch.int64, True),
    "too wide": (torch.float32, torch.float32, None, True),
}


@pytest.mark.parametrize("case", DTYPES)
def test_dtypes_are_pefts_affair(case, calls):
    dtype, factors, given, casts = DTYPES[case]
    x = torch.ones(3, 7) if given is None else torch.randn(3, 6).to(given)
    results = []
    for layer in layers(dtype):
        layer.lora_A.to(factors), layer.lora_B.to(factors)
        layer.cast_input_dtype_enabled = casts
        try:
            results.append(layer(x))
        except RuntimeError as error:
            results.append(str(error))
    theirs, ours = results
    assert type(theirs) is type(ours) and calls == [0, 0]
    assert theirs == ours if isinstance(theirs, str) else torch.equal(theirs, ours)
