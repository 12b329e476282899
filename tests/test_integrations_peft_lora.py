"""A fused layer is PEFT's layer: outputs, gradients, dtypes and scaling, in every configuration of the model."""

import copy
import os

import pytest
import torch
from peft_lora_cases import EXACT, ROUTES, TWO, both, change, count_calls, fused, ids, layers, pair
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_kernels import explain, use_backend
from peft_kernels.integrations.peft import accelerate, fused_linear, restore


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


# ---- whole models, by configuration: options, layers that are fused, calls of a forward -----------------------------

MODELS = {
    "plain": ({"lora_alpha": 7}, ["first", "second"], 2),
    "rslora": ({"lora_alpha": 7, "use_rslora": True}, ["first", "second"], 2),
    "patterns": ({"rank_pattern": {"second": 5}, "alpha_pattern": {"first": 1}}, ["first", "second"], 2),
    "base bias": ({"bias": "lora_only"}, ["first", "second"], 2),
    "all biases": ({"bias": "all"}, ["first", "second"], 2),
    "heads": ({"modules_to_save": ["head"]}, ["first", "second"], 2),
    "embedding, convolution": ({"target_modules": ["words", "conv", "first"]}, ["first"], 1),
    "Conv1D": ({"target_modules": ["turned", "second"], "fan_in_fan_out": True}, ["second"], 1),
    "attention": ({"target_modules": ["mha", "first"]}, ["first"], 1),
    "attention's out_proj": ({"target_modules": ["out_proj", "first"]}, ["first"], 1),
    "gaussian": ({"init_lora_weights": "gaussian", "r": 11}, ["first", "second"], 2),
}
STOCK = {
    "dora": ({"use_dora": True}, "variant of LoRA"),
    "biases of adapters": ({"lora_bias": True}, "lora_bias"),
    "embedding": ({"target_modules": ["words"]}, "Embedding, not PEFT's lora.Linear"),
    "convolution": ({"target_modules": ["conv"]}, "Conv1d, not PEFT's lora.Linear"),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", MODELS)
def test_model(case, route, calls):
    options, names, per_forward = MODELS[case]
    theirs, ours = pair(route=route, **options)
    assert fused(ours) == names and not fused(theirs)
    assert [(n, p.requires_grad) for n, p in ours.named_parameters()] == [
        (n, p.requires_grad) for n, p in theirs.named_parameters()
    ]
    both(theirs, ours, ids(), **EXACT)
    assert calls == [per_forward, 0]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", STOCK)
def test_model_that_is_left_to_peft(case, route, calls):
    options, reason = STOCK[case]
    theirs, ours = pair(route=route, **options)
    both(theirs, ours, ids(), rtol=0, atol=0)
    assert calls == [0, 0]
    if route == "accelerate":
        left = accelerate(ours).left
        assert fused(ours) == [] and left and all(reason in each for each in left.values()), left
    else:
        assert all("PEFT's own forward" in choice.reason for choice in explain(ours).values())


# ---- numbers --------------------------------------------------------------------------------------------------------


def run(layer, x, dy):
    x = x.clone().requires_grad_()
    y = layer(x)
    layer.zero_grad()
    y.backward(dy.to(y.dtype))
    return [y.detach(), x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]


def worst(results, oracle):
    return [((r.double() - o).abs().max() / o.abs().max()).item() for r, o in zip(results, oracle)]


PRECISIONS = {
    # of the model, of the adapters, of autocast, adapters of the stock layer that is as exact
    "float32": (torch.float32, torch.float32, None, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16, None, torch.bfloat16),
    "float16": (torch.float16, torch.float16, None, torch.float16),
    "bfloat16, float32 adapters": (torch.bfloat16, torch.float32, None, torch.bfloat16),
    "float16, float32 adapters": (torch.float16, torch.float32, None, torch.float16),
    "autocast": (torch.float32, torch.float32, torch.bfloat16, torch.float32),
    "autocast over bfloat16": (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("case", PRECISIONS)
def test_as_exact_as_peft(case, calls):
    """Against float64, output and gradients: at most 1.25 × the error of PEFT's layer and a rounding; 2 × in halves.

    Under half precision PEFT multiplies with float32 adapters in float32. Fused it is the model's dtype, as under
    autocast: there the measure is PEFT's layer with adapters in that dtype."""
    dtype, factors, autocast, peers = PRECISIONS[case]
    torch.manual_seed(1)
    x, dy = torch.randn(64, 6).to(dtype), torch.randn(64, 5).to(dtype)
    exact, _ = layers()
    for module in (exact.base_layer, exact.lora_A["default"], exact.lora_B["default"]):
        module.to(dtype).double()  # what every precision below can hold
    oracle = run(exact, x.double(), dy.double())
    theirs, ours = layers(dtype)
    errors = {}
    for name, layer, each in (("theirs", theirs, peers), ("ours", ours, factors)):
        layer.lora_A.to(each), layer.lora_B.to(each)
        layer.load_state_dict({key: value.to(layer.state_dict()[key]) for key, value in exact.state_dict().items()})
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            results = run(layer, x, dy)
        assert [r.dtype for r in results] == [autocast or dtype, dtype, each, each]
        errors[name] = worst(results, oracle)
    assert calls == [1, 0]
    computed = autocast or dtype
    slack = torch.finfo(computed).eps
    ratio = 1.25 if computed == torch.float32 else 2
    assert all(our <= ratio * their + slack for our, their in zip(errors["ours"], errors["theirs"])), errors


@pytest.mark.parametrize("shape", [(6,), (1, 6), (4, 6), (0, 6), (2, 0, 6), (2, 3, 6), (2, 1, 3, 6)])
def test_shapes(shape, calls):
    theirs, ours = layers()
    both(theirs, ours, torch.randn(shape, dtype=torch.float64), **EXACT)
    assert calls == [1, 0]


def test_strides(calls):
    theirs, ours = layers()
    for x in (torch.randn(6, 4).t(), torch.randn(4, 12)[:, ::2], torch.randn(1, 6).expand(4, 6), torch.randn(2, 6, 3)):
        x = x.double().transpose(1, 2) if x.dim() == 3 else x.double()
        torch.testing.assert_close(ours(x), theirs(x), **EXACT)
    assert calls == [4, 0]


def test_output_may_be_written(calls):
    """nn.ReLU(inplace=True) and y += x follow linears, and autograd refuses them on a custom function's view."""
    adapters = {"a": {}, "b": {}}
    for options in ({}, {"adapter_names": ["a", "b"]}):
        theirs, ours = layers(adapters=adapters)
        x = torch.randn(2, 4, 6, dtype=torch.float64)
        both(lambda_module(theirs, options), lambda_module(ours, options), x, **EXACT)
    assert calls == [1, 1]


class lambda_module(nn.Module):
    def __init__(self, layer, options):
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, x):
        self.layer.set_adapter(["a"])
        y = self.layer(x, **self.options)
        y += 1
        return nn.functional.relu(y, inplace=True)


# ---- dropout --------------------------------------------------------------------------------------------------------


def test_dropout_has_pefts_distribution(calls):
    """On the input of the update alone: each row's update is that of x under one of the 2⁶ masks, each as often."""
    p = 0.4
    theirs, ours = layers(adapters={"default": {"lora_dropout": p, "lora_alpha": 6}})
    x = torch.randn(1, 6, dtype=torch.float64).expand(4000, 6)
    with torch.no_grad():
        update = 2.0 * ours.lora_B["default"].weight @ ours.lora_A["default"].weight
        masks = torch.cartesian_prod(*[torch.tensor([0.0, 1 / (1 - p)], dtype=torch.float64)] * 6)
        counts = []
        for layer in (theirs.train(), ours.train()):
            delta = layer(x) - layer.base_layer(x)
            distance, mask = torch.cdist(delta, (masks * x[0]) @ update.T).min(dim=1)
            assert distance.max() < 1e-4  # the masks' p is rounded to 2⁻¹⁶
            counts.append((masks[mask] > 0).double().mean(0))
        assert ((counts[0] - counts[1]).abs() < 5 * (2 * p * (1 - p) / len(x)) ** 0.5).all()
        assert torch.equal(ours(x[:3]), ours(x[:3])) is False
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), **EXACT)
        ours.train().lora_dropout.eval()  # what counts is the dropout module's own mode, as in PEFT
        torch.testing.assert_close(ours(x), theirs(x), **EXACT)
    assert calls[0] == 5


def test_checkpointing_draws_the_same_masks():
    _, layer = layers(adapters={"default": {"lora_dropout": 0.5}})
    layer.train()
    x, results = torch.randn(7, 6, dtype=torch.float64), []
    for recompute in (False, True):
        torch.manual_seed(3)
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        y.square().sum().backward()
        results.append([y.detach(), layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad])
        layer.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*results))


# ---- scaling --------------------------------------------------------------------------------------------------------


def test_scaling(calls):
    theirs, ours = layers(adapters={"default": {"lora_alpha": 7, "use_rslora": True}})
    x = torch.randn(3, 6, dtype=torch.float64)
    before = ours(x)
    for step in (
        *(lambda layer: layer.set_scale("default", 0.3), lambda layer: layer.scale_layer(5.0)),
        *(lambda layer: layer.unscale_layer(2.0), lambda layer: layer.unscale_layer()),
        lambda layer: layer.scaling.update({"default": 1.5}),
        lambda layer: change(layer, scaling={"default": 0.5}),
        lambda layer: change(layer, scaling={"default": torch.tensor(0.25)}),  # as PEFT's hot-swapping does
    ):
        step(theirs), step(ours)
        torch.testing.assert_close(ours(x), theirs(x), **EXACT)
        assert {k: float(v) for k, v in ours.scaling.items()} == {k: float(v) for k, v in theirs.scaling.items()}
        assert {k: float(v) for k, v in ours.scaling.tensors.items()} == {k: float(v) for k, v in ours.scaling.items()}
    assert calls == [8, 0] and not torch.allclose(before, ours(x))


def test_scaling_is_a_dictionary_with_tensors():
    plain = {"a": 1.0, "b": 2.0}
    scaling = fused_linear.Scaling(plain, torch.empty(1))
    for step in (
        lambda d: d.update(c=3.0), lambda d: d.setdefault("e", 5.0), lambda d: d.setdefault("a", 9.0),
        lambda d: d.pop("a"), lambda d: d.pop("no", None), lambda d: d.__ior__({"b": 7.0}),
        lambda d: d.__delitem__("c"), lambda d: d.popitem() and None, lambda d: d.__setitem__("f", 1), dict.copy,
    ):  # fmt: skip
        step(plain), step(scaling)
        for each in (scaling, copy.deepcopy(scaling)):
            assert len(each) == len(plain) == len(each.tensors)
            assert {k: v.item() for k, v in each.tensors.items()} == each
    assert copy.deepcopy(scaling).tensors["f"] is not scaling.tensors["f"]
    assert type(scaling.copy()) is dict
    scaling.clear()
    assert not scaling and not scaling.tensors


def test_scaling_follows_the_weight():
    _, ours = layers(torch.float32)
    ours.double()
    assert ours.scaling.tensors["default"].dtype == torch.float64
    ours.to("meta")
    assert ours.scaling.tensors["default"].device.type == "meta"
    _, other = layers(torch.float32)
    ours.load_state_dict(other.state_dict(), assign=True)
    x = torch.randn(2, 6)
    assert torch.equal(ours(x), other(x)) and ours.scaling.tensors["default"].device.type == "cpu"


# ---- backends -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1", reason="nothing runs Triton here"
)
def test_triton(device):
    theirs, ours = layers(torch.float32, adapters=TWO)
    theirs.to(device), ours.to(device)
    x = torch.randn(5, 6, device=device)
    with use_backend("triton"):
        both(theirs, ours, x, rtol=1e-5, atol=1e-5)
        mixed = ours(x, adapter_names=["a", "b", "__base__", "a", "b"])
        assert explain(nn.ModuleDict({"x": ours}))["x"].name == "triton"
    torch.testing.assert_close(mixed, theirs(x, adapter_names=["a", "b", "__base__", "a", "b"]), rtol=1e-5, atol=1e-5)


def test_explain():
    _, ours = pair()
    assert {choice.name for choice in explain(ours).values()} == {"torch"} and len(explain(ours)) == 2
    with ours.disable_adapter():
        assert all("adapters are disabled" in choice.reason for choice in explain(ours).values())
    restore(ours)
    assert explain(ours) == {}
