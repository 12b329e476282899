"""Aurora as a method of PEFT: outputs, gradients, dropout, precision and merging, against the definition."""

import copy
from collections import Counter

import pytest
import torch
from peft_aurora_cases import (
    BLOCKS,
    CORES,
    EXACT,
    Net,
    adapted,
    base,
    config,
    defined,
    delta,
    factors,
    inputs,
    peft,
    stir,
)
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import peft_kernels
from peft_kernels.integrations.peft import AuroraConfig, aurora_linear


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """Calls of our operations by the layers: a fallback that nobody notices shows there."""
    count = Counter()

    def counted(name):
        function = getattr(aurora_linear, name)

        def call(*args, **kwargs):
            count[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("lowrank_linear", "lowrank_hidden"):
        monkeypatch.setattr(aurora_linear, name, counted(name))
    return count


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["fused", "plain"])
@pytest.mark.parametrize("core", CORES)
def test_definition(core, route, calls):
    model, x = adapted(core=core, scale=0.7), inputs().requires_grad_()
    if route == "plain":
        for layer in BLOCKS:
            model.base_model.model.get_submodule(layer).base_layer.register_forward_hook(lambda *_: None)
    tensors = factors(model)
    assert len(tensors) == len(BLOCKS) + 4 + 1
    leaves = {name: p.detach().clone().requires_grad_() for name, p in tensors.items()}
    expected = defined(leaves, x, scale=0.7)
    dy = torch.randn(expected.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, [x, *leaves.values()], dy)
    y = model(x)
    torch.testing.assert_close(y, expected, **EXACT)
    for name, got, want in zip(["x", *tensors], torch.autograd.grad(y, [x, *tensors.values()], dy), wanted):
        torch.testing.assert_close(got, want, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
    # q and k read one tensor through the same U; fc1 and vision_fc1 might have, and each computes its own
    assert calls == ({"lowrank_linear": 6, "lowrank_hidden": 3} if route == "fused" else {})


@pytest.mark.parametrize("core", CORES)
def test_equals_our_own_adapter(core):
    model, net, x = adapted(core=core), base(), inputs()
    own = peft_kernels.Aurora.wrap(
        net, peft_kernels.AuroraConfig(targets=[*BLOCKS], rank=3, core=core, dropout=0.0, modules_to_save=[])
    )
    tensors = factors(model)
    state = {name: tensors[f"aurora_shared.{name.replace('.', '_')}"] for name in ("down.8x8", "down.8x12", "up.8x8")}
    state["up.8x12"] = tensors["aurora_shared.up_8x12"]
    small = "lam" if core == "cp" else "modes"
    state[small] = tensors[f"aurora_shared.{small}"]
    state["slots"] = torch.cat([tensors[f"model.{layer}.aurora_p"] for layer in BLOCKS])
    net.aurora["shared"].load_state_dict(state)
    torch.testing.assert_close(model(x), net(x), **EXACT)
    for name, layer in own.layers.items():
        peers = model.base_model.model.get_submodule(name)
        torch.testing.assert_close(peers.get_delta_weight("default"), layer.delta_weight(), **EXACT)
        assert (peers.dropout_on, layer.dropout_on) in (("rank", "rank"), ("core", "core"))
    defaults = AuroraConfig(target_modules=["q"]), peft_kernels.AuroraConfig(targets=["q"])
    assert len({(c.rank, c.core, c.scale, c.dropout) for c in defaults}) == 1


def test_parameter_count():
    with torch.device("meta"):
        net = nn.ModuleList(nn.ModuleDict({n: nn.Linear(768, 768) for n in "qkv"}) for _ in range(36))
    model = peft.get_peft_model(net, AuroraConfig(target_modules=["q", "k", "v"]), low_cpu_mem_usage=True)
    assert model.get_nb_trainable_parameters()[0] == 105_280


@pytest.mark.parametrize("core", CORES)
def test_start(core):
    model = peft.get_peft_model(base(), config(core=core, init_weights=True)).eval()
    x, tensors = inputs(), factors(model)
    assert torch.equal(model(x), base()(x))
    slots = sum(o * i for o, i in BLOCKS.values())
    for name, p in tensors.items():
        if ".up_" in name:
            assert not p.any()
        elif ".lam" in name:
            assert (p == 1).all()
        else:
            fan = 3 + (slots if core == "cp" else len(p))  # Xavier over (N, R); by layer in the released code
            fan = {"down": 6 * p.shape[1], "mode": 9 + 9}.get(name.rpartition(".")[2][:4], fan)
            bound = (6 / fan) ** 0.5
            assert 0.3 * bound < p.abs().max() <= bound, name


def test_output_may_be_written(calls):
    """nn.ReLU(inplace=True) and y += x follow linears, and autograd refuses them on a custom function's view."""
    layer = adapted().base_model.model.q
    y, again = layer(inputs()), layer(inputs())
    again += 1
    torch.testing.assert_close(nn.functional.relu(again, inplace=True), torch.relu(y + 1), **EXACT)
    again.sum().backward()
    assert calls["lowrank_linear"] == 2


# ---- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["fused", "plain"])
@pytest.mark.parametrize("layer", ["fc1", "vision_fc1"])
def test_dropout(layer, route):
    """In text one mask on x U serves the four blocks; in vision each has its own. Each mask shows, as often."""
    p, rows = 0.4, 4000
    model = adapted(core="cp", dropout=p)
    module = model.base_model.model.get_submodule(layer)
    if route == "plain":
        module.base_layer.register_forward_hook(lambda *_: None)
    x = inputs()[0, :1].expand(rows, 8)
    with torch.no_grad():
        torch.testing.assert_close(module(x), module.base_layer(x) + x @ delta(factors(model), layer).T, **EXACT)
        module.train()
        update = (module(x) - module.base_layer(x)).unflatten(1, (4, 8))
        down, up, core = module.factors("default")
        masks = torch.cartesian_prod(*[torch.tensor([0.0, 1 / (1 - p)], dtype=torch.float64)] * 3)
        found = []
        for block in range(4):
            distance, mask = torch.cdist(update[:, block], (masks * (x[0] @ down.T) * core[block, 0]) @ up.T).min(dim=1)
            assert distance.max() < 1e-4  # the masks' p is rounded to 2⁻¹⁶
            kept = (masks[mask] > 0).double().mean(0)
            assert ((kept - (1 - p)).abs() < 5 * (p * (1 - p) / rows) ** 0.5).all()
            found.append(mask)
    same = [(mask == found[0]).double().mean() for mask in found[1:]]
    assert all(each == 1 for each in same) if layer == "fc1" else all(each < 0.5 for each in same)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks(reentrant):
    model, results = adapted(torch.float32, dropout=0.5).train(), []
    for recompute in (False, True):
        torch.manual_seed(3)
        x = inputs(torch.float32).requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in factors(model).values())])
        model.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*results))


# ---- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [True, False])
def test_half_precision(dtype, cast, calls):
    model = peft.get_peft_model(base(dtype), config(), autocast_adapter_dtype=cast)
    model.add_adapter("other", config(core="tucker"), autocast_adapter_dtype=cast)
    for name in ("default", "other"):
        assert {p.dtype for p in factors(model, name).values()} == {torch.float32 if cast else dtype}
        model.set_adapter(name)
        assert all(p.requires_grad == (own == name) for own in model.peft_config for p in factors(model, own).values())
        x = inputs(dtype)
        y = model.eval()(x)
        exact = {key: p.detach().double() for key, p in factors(model, name).items()}
        net = base(dtype).double()
        error = (y.double() - defined(exact, x.double(), net=net)).abs().max()
        assert y.dtype == dtype and error < 20 * torch.finfo(dtype).eps
        y.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in factors(model, name).values())
    assert calls["lowrank_linear"] == 2 * len(BLOCKS)


def test_autocast(calls):
    model = adapted(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(inputs(torch.float32))
    assert y.dtype == torch.bfloat16 and calls["lowrank_linear"] == len(BLOCKS)
    torch.testing.assert_close(y.float(), model(inputs(torch.float32)), rtol=0.05, atol=0.05)


def test_compiled():
    """One graph for a layer, and none anew when factors change."""
    model = adapted(torch.float32)
    layer, x, p = model.base_model.model.fc1, inputs(torch.float32), factors(model)["aurora_shared.lam"]
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(2):
        want, got = (torch.autograd.grad(each(x).square().sum(), p)[0] for each in (layer, compiled))
        torch.testing.assert_close(got, want)
        with torch.no_grad():
            p.add_(1)
    assert counter.frame_count == 1
    torch._dynamo.reset()


# ---- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("safe", [False, True])
def test_merge(core, safe, calls):
    model, x = adapted(core=core, scale=0.6), inputs()
    before = {name: p.clone() for name, p in model.named_parameters()}
    y = model(x)
    calls.clear()
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(model(x), y, **EXACT)
    assert not calls
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"base_model.model.{layer}.base_layer.weight" for layer in BLOCKS}
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=safe)
    assert type(merged) is Net and type(merged.fc2) is nn.Linear
    assert merged.state_dict().keys() == base().state_dict().keys()
    torch.testing.assert_close(merged(x), y, **EXACT)
    assert torch.equal(model.unload()(x), base()(x))


def test_safe_merge_of_a_broken_adapter():
    model = adapted()
    with torch.no_grad():
        factors(model)["aurora_shared.lam"][0] = float("nan")
    layer = model.base_model.model.q
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, base().q.weight) and not layer.merged


def test_half_precision_merges_rounded_once():
    model = adapted(torch.bfloat16)
    layer = model.base_model.model.fc1
    exact = base(torch.bfloat16).fc1.weight.double() + delta({k: p.double() for k, p in factors(model).items()}, "fc1")
    layer.merge()
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert ((layer.base_layer.weight.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-7).all()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, base(torch.bfloat16).fc1.weight)


def test_conv1d_of_transformers(calls):
    torch.manual_seed(0)
    net = nn.ModuleDict({"c_fc": Conv1D(32, 8), "other": nn.Linear(8, 8)}).double()
    model = stir(peft.get_peft_model(net, config(target_modules=["c_fc", "other"])).eval())
    layer, x = model.base_model.model["c_fc"], inputs()
    y, tensors = layer(x), {k.replace("c_fc", "fc1"): p for k, p in factors(model).items()}
    torch.testing.assert_close(y, layer.base_layer(x) + x @ delta(tensors, "fc1").T, **EXACT)
    torch.testing.assert_close(layer.get_delta_weight("default"), delta(tensors, "fc1").T, **EXACT)
    layer.merge()
    torch.testing.assert_close(layer(x), y, **EXACT)
    assert not calls
