"""Adapters in models that read `layer.weight` past the layer, on one of the VLMo kind."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from vlmo_cases import task_loss, vlmo

from peft_kernels import Aurora, AuroraConfig, LoRA, LoRAConfig, MoIL, MoILConfig
from peft_kernels.adapters import UniAdapter, UniAdapterConfig
from peft_kernels.backend import explain
from peft_kernels.presets import Target

QKV = "transformer.blocks.1.attn.qkv"
CONFIGS = {
    "lora": (LoRA, LoRAConfig(preset="vlmo", rank=3, alpha=6.0)),
    "aurora": (Aurora, AuroraConfig(preset="vlmo", rank=3, dropout=0.0)),
    "tucker": (Aurora, AuroraConfig(preset="vlmo", rank=3, core="tucker", dropout=0.0)),
    "moil": (MoIL, MoILConfig(preset="vlmo", rank=3, transform_rank=2, decay=0.5, reduction="sum")),
    "moil, experts too": (MoIL, MoILConfig(preset="vlmo", rank=3, transform_rank=2, decay=0.5, ffn=True)),
}
KINDS = pytest.mark.parametrize("kind", CONFIGS)


def wrapped(kind: str, dtype: torch.dtype = torch.float64):
    """(adapter with values that show, batch)"""
    method, config = CONFIGS[kind]
    model, batch = vlmo(dtype=dtype)
    adapter = method.wrap(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*adapter.parameters("adapter"), *adapter.parameters("live")):
            parameter += (0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)).to(dtype)
    return adapter, batch


@KINDS
def test_a_fresh_adapter_changes_no_bit_and_a_trained_one_does(kind):
    method, config = CONFIGS[kind]
    model, batch = vlmo()
    before = model(**batch)
    adapter = method.wrap(model.eval(), config)
    assert len([name for name in adapter.layers if name.endswith("attn.qkv")]) == 3
    assert torch.equal(model(**batch), before)
    assert not torch.allclose(wrapped(kind)[0].model.eval()(**batch), before, rtol=1e-3)


@KINDS
def test_merged_is_unmerged(kind):
    adapter, batch = wrapped(kind)
    y, frozen = adapter.model.eval()(**batch), adapter.layers[QKV].base_weight.clone()
    with pytest.warns(UserWarning, match="learned nothing") if "moil" in kind else contextlib.nullcontext():
        adapter.merge()
    torch.testing.assert_close(adapter.model(**batch), y, rtol=1e-11, atol=1e-12)
    adapter.unmerge()
    assert torch.equal(adapter.layers[QKV].base_weight, frozen)
    assert torch.equal(adapter.model(**batch), y)


def updates(adapter) -> dict[str, Tensor]:
    """Each layer's update by its definition, differentiable in the adapter's parameters."""
    if isinstance(adapter, LoRA):
        return {name: 2.0 * layer.up @ layer.down for name, layer in adapter.layers.items()}
    of = adapter.model.aurora.shared
    cores = of.lam * of.slots if of.core == "cp" else torch.einsum("abc,kc->kba", of.modes, of.slots)
    cores = torch.diag_embed(cores) if of.core == "cp" else cores
    parts = torch.einsum("na,kab,bi->kni", of.up["16x16"], cores, of.down["16x16"]).unflatten(0, (-1, 3))
    return {name: part.flatten(0, 1) for name, part in zip(adapter.layers, parts, strict=True)}


@pytest.mark.parametrize("kind", ["lora", "aurora", "tucker"])
def test_gradients_are_those_of_the_definition(kind):
    adapter, batch = wrapped(kind)
    plain, _ = vlmo()
    weights = {f"{name}.weight": plain.get_parameter(f"{name}.weight") + new for name, new in updates(adapter).items()}
    heads = {name: adapter.model.get_parameter(name) for name in adapter.heads}
    wanted = functional_call(plain, {**weights, **heads}, (), batch)
    got = adapter.model.train()(**batch)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    trained = list(adapter.parameters())
    assert len(trained) == {"lora": 6, "aurora": 4, "tucker": 4}[kind] + 4
    for ours, exact in zip(
        torch.autograd.grad(got.square().sum(), trained), torch.autograd.grad(wanted.square().sum(), trained)
    ):
        assert exact.abs().max() > 1e-4
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


def test_moil_trains_the_weights_that_are_read():
    """The task's gradient is the plain model's; it reaches no adapter. Then a step imitates."""
    adapter, batch = wrapped("moil")
    plain, _ = vlmo()
    for name, layer in adapter.layers.items():
        plain.get_submodule(name).weight.data.copy_(layer.live_weight.detach())
    task_loss(adapter.model.train(), batch).backward()
    task_loss(plain, batch).backward()
    for name, layer in adapter.layers.items():
        torch.testing.assert_close(layer.live_weight.grad, plain.get_submodule(name).weight.grad, rtol=1e-9, atol=1e-13)
    assert all(p.grad is None for p in adapter.parameters("adapter"))
    adapter.step()
    adapter.step()
    assert all(p.grad is not None for p in adapter.parameters("adapter"))


def test_moils_three_weights():
    adapter, batch = wrapped("moil")
    layer = adapter.layers[QKV]
    adapter.model.eval()
    seen = {mode: (y, layer.weight) for mode in ("student", "live", "teacher") for y in [under(adapter, mode, batch)]}
    assert not torch.allclose(seen["student"][0], seen["live"][0])
    assert not torch.allclose(seen["student"][0], seen["teacher"][0])
    with adapter.evaluate("live"):
        assert torch.equal(layer.weight, layer.live_weight)
    assert layer.weight.requires_grad is False and layer.bias is None
    torch.testing.assert_close(layer.weight, layer.base_weight + layer.delta_weight(), rtol=1e-12, atol=1e-13)


def under(adapter, mode: str, batch: dict) -> Tensor:
    with adapter.evaluate(mode):
        return adapter.model(**batch)


@KINDS
def test_training_lowers_the_loss(kind):
    adapter, batch = wrapped(kind, torch.float32)
    optimizer = torch.optim.AdamW(adapter.param_groups(1e-2, adapter_eps=1e-12, weight_decay=0.0))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = task_loss(adapter.model.train(), {**batch, "patches": batch["patches"].float()})
        loss.backward()
        if isinstance(adapter, MoIL):
            adapter.step()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@KINDS
def test_files_state_and_copies(kind, tmp_path):
    adapter, batch = wrapped(kind)
    y = adapter.model.eval()(**batch)
    plain, _ = vlmo()
    assert set(plain.state_dict()) <= set(adapter.model.state_dict())
    with pytest.warns(UserWarning, match="learned nothing") if "moil" in kind else contextlib.nullcontext():
        adapter.save_pretrained(tmp_path)
    type(adapter).from_pretrained(plain, tmp_path)
    torch.testing.assert_close(plain.eval()(**batch), y, rtol=1e-12, atol=1e-13)
    for other in (copy.deepcopy(adapter.model), pickle.loads(pickle.dumps(adapter.model))):
        assert torch.equal(other(**batch), y)
    adapter.remove()
    assert type(adapter.model.get_submodule(QKV)) is nn.Linear
    assert set(adapter.model.state_dict()) == set(vlmo()[0].state_dict())


@pytest.mark.parametrize("kind", ["lora", "moil"])
def test_under_autocast_in_bfloat16_and_compiled(kind):
    adapter, batch = wrapped(kind, torch.float32)
    batch["patches"] = batch["patches"].float()
    model = adapter.model.train()
    y = model(**batch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch), y)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(**batch).float(), y, rtol=0.1, atol=0.1)
    model.to(torch.bfloat16)
    low = model(**{**batch, "patches": batch["patches"].bfloat16()})
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), y, rtol=0.2, atol=0.2)


def test_triton_reconstructs_what_is_read():
    model, batch = vlmo(dtype=torch.float32)
    batch["patches"] = batch["patches"].float()
    adapter = LoRA.wrap(model, LoRAConfig(preset="vlmo", rank=3, backend="triton"))
    torch.nn.init.normal_(adapter.layers[QKV].up, std=0.1)
    assert {str(choice.name) for choice in explain(model).values()} == {"triton"}
    y = model(**batch)
    y.sum().backward()
    grads = [p.grad.clone() for p in adapter.parameters("adapter")]
    model.zero_grad()
    for layer in adapter.layers.values():
        layer.backend = "torch"
    other = model(**batch)
    other.sum().backward()
    torch.testing.assert_close(other, y, rtol=1e-4, atol=1e-5)
    for p, grad in zip(adapter.parameters("adapter"), grads):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-5)


def test_a_layer_that_is_called_after_all():
    """Its forward is the fused one, and the same."""
    linear = nn.Linear(6, 4, dtype=torch.float64)
    model = nn.ModuleDict({"a": linear})
    LoRA.wrap(model, LoRAConfig(targets=(Target("a", reads_weight=True),), rank=2))
    nn.init.normal_(model["a"].up)
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(model["a"](x), nn.functional.linear(x, model["a"].weight, model["a"].bias))


def test_out_proj_of_multihead_attention():
    """It is read by name; in_proj_weight is no linear layer."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    model, x = nn.ModuleDict({"attention": attention}), torch.randn(2, 5, 8, dtype=torch.float64)
    before = attention(x, x, x)[0]
    lora = LoRA.wrap(model, LoRAConfig(targets=(Target(r".*out_proj", reads_weight=True),), rank=2))
    torch.testing.assert_close(attention(x, x, x)[0], before)
    nn.init.normal_(lora.layers["attention.out_proj"].up)
    y = attention(x, x, x)[0]
    lora.merge()
    torch.testing.assert_close(attention(x, x, x)[0], y)
    assert not torch.allclose(y, before)


def test_a_baseline_behind_attention_and_experts():
    """UniAdapter needs outputs, which the preset knows."""
    model, batch = vlmo()
    before = model(**batch)
    adapter = UniAdapter.wrap(model, UniAdapterConfig(preset="vlmo", rank=2))
    assert len(adapter.layers) == 3 + 3 * 2 + 1 and torch.equal(model(**batch), before)
    task_loss(model.train(), batch).backward()
    assert any(p.grad.any() for p in adapter.parameters("adapter") if p.grad is not None)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"^dropout: expected 0 where a model reads the weight"):
        Aurora.wrap(vlmo()[0], AuroraConfig(preset="vlmo"))
    with pytest.raises(ValueError, match=r"^targets: transformer.blocks.0.attn.qkv is not called"):
        UniAdapter.wrap(vlmo()[0], UniAdapterConfig(targets=(Target(r".*qkv", reads_weight=True),)))
    with pytest.raises(ValueError, match=r"^targets: transformer.blocks.0.attn.qkv is part of a Attention that reads"):
        LoRA.wrap(vlmo()[0], LoRAConfig(targets=["qkv"]))
    with pytest.raises((TypeError, ValueError), match="reads_weight"):
        Target("qkv", reads_weight="yes")
