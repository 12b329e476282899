"""LowRankLinear: takes a linear's place, keeps its keys, merges exactly and gives the original bits back."""

import copy

import pytest
import torch
from torch import nn

import peft_kernels
from peft_kernels.layers import LowRankLinear

KINDS = {
    "lora": {},
    "diagonal": {"core": "diagonal"},
    "qkv": {"core": "diagonal", "out_blocks": 3},
    "fc2": {"core": "dense", "in_blocks": 4},
    "grid": {"core": "dense", "out_blocks": 3, "in_blocks": 2},
}


def layer(kind: str = "grid", dtype=torch.float32, **options) -> LowRankLinear:
    options = {"scale": 0.5, **KINDS[kind], **options}
    adapted = LowRankLinear(nn.Linear(24, 36, dtype=dtype), 4, **options)
    with torch.no_grad():
        for factor in (adapted.up, adapted.core):
            if factor is not None:
                factor.normal_()
    return adapted


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_linear_it_replaces(kind):
    linear = nn.Linear(24, 36)
    adapted = LowRankLinear(linear, 4, **KINDS[kind])
    x = torch.randn(2, 5, 24)
    assert torch.equal(adapted(x), linear(x))
    assert adapted.weight is linear.weight and adapted.bias is linear.bias
    assert not linear.weight.requires_grad and adapted.down.requires_grad
    assert set(linear.state_dict()) <= set(adapted.state_dict())
    assert set(adapted.state_dict()) - set(linear.state_dict()) <= {"down", "up", "core"}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged_and_unmerge_gives_the_bits_back(kind):
    adapted = layer(kind).double().eval()
    x, weight = torch.randn(7, 24, dtype=torch.float64), adapted.weight.clone()
    y = adapted(x)
    adapted.merge()
    assert adapted.merged and not torch.equal(adapted.weight, weight)
    torch.testing.assert_close(adapted(x), y, rtol=1e-12, atol=1e-12)
    adapted.unmerge()
    assert torch.equal(adapted.weight, weight) and not adapted.merged
    assert torch.equal(adapted(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep_on", [None, "cpu"])
def test_half_precision_merge_rounds_the_float32_sum_once(dtype, keep_on):
    adapted = layer(dtype=dtype, adapter_dtype=torch.float32)
    original = adapted.weight.clone()
    rounded_once = (original.float() + adapted.delta_weight()).to(dtype)
    adapted.merge(keep_on)
    assert torch.equal(adapted.weight, rounded_once)
    adapted.unmerge()
    assert torch.equal(adapted.weight, original)


def test_merge_states_are_guarded():
    adapted = layer()
    with pytest.raises(ValueError, match=r"^unmerge"):
        adapted.unmerge()
    adapted.merge()
    with pytest.raises(ValueError, match=r"^merge"):
        adapted.merge()
    with pytest.raises(ValueError, match=r"^set_scale"):
        adapted.set_scale(1.0)


def test_delta_weight_is_the_definition():
    adapted = layer("grid")
    blocks = adapted.delta_weight().view(3, 12, 2, 12)
    for o in range(3):
        for i in range(2):
            expected = 0.5 * adapted.up @ adapted.core[o, i] @ adapted.down
            torch.testing.assert_close(blocks[o, :, i], expected.detach())


def test_dropout_only_in_training():
    adapted = layer("lora", dropout_p=0.5)
    x = torch.randn(5, 24)
    assert not torch.equal(adapted(x), adapted(x))
    adapted.eval()
    assert torch.equal(adapted(x), adapted(x))


def test_state_dict_round_trip_and_deepcopy():
    adapted, other, x = layer(), layer(), torch.randn(5, 24)
    other.load_state_dict(adapted.state_dict())
    assert torch.equal(adapted(x), other(x)) and torch.equal(copy.deepcopy(adapted)(x), adapted(x))


def test_casting_keeps_the_scale_exact():
    adapted = layer("lora", scale=0.1).to(torch.bfloat16)
    assert adapted.scale.dtype == torch.float32 and adapted.scale.item() == torch.tensor(0.1).item()
    assert adapted(torch.ones(2, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_set_scale_changes_the_output():
    adapted, x = layer("lora"), torch.randn(5, 24)
    base = nn.functional.linear(x, adapted.weight, adapted.bias)
    once = adapted(x) - base
    adapted.set_scale(1.0)
    torch.testing.assert_close(adapted(x) - base, 2 * once)


def test_trains_only_the_adapter():
    adapted = layer("grid")
    adapted(torch.randn(5, 24)).sum().backward()
    assert adapted.weight.grad is None and adapted.bias.grad is None
    assert all(p.grad is not None for p in (adapted.down, adapted.up, adapted.core))
    free = layer("lora", freeze=False)
    free(torch.randn(5, 24)).sum().backward()
    assert free.weight.grad is not None and free.bias.grad is not None


def test_merge_under_autocast_stays_in_float32():
    adapted, plain = layer(), layer()
    plain.load_state_dict(adapted.state_dict())
    plain.merge()
    with torch.autocast("cpu", torch.bfloat16):
        adapted.merge()
    assert torch.equal(adapted.weight, plain.weight)


def test_unmerge_refuses_to_lose_a_change():
    """Tied weights merged twice, or loaded while merged, would come back wrong."""
    linear = nn.Linear(24, 36)
    first, second = (LowRankLinear(linear, 4) for _ in range(2))
    nn.init.normal_(first.up)
    first.merge()
    second.merge()
    with pytest.raises(ValueError, match=r"^unmerge: weight or bias was changed"):
        first.unmerge()
    loaded = layer()
    loaded.merge()
    loaded.load_state_dict(layer().state_dict())
    with pytest.raises(ValueError, match=r"^unmerge: weight or bias was changed"):
        loaded.unmerge()
    moved = layer()
    original = moved.weight.clone()
    moved.merge()
    moved.double().unmerge()
    assert torch.equal(moved.weight, original.double())


def test_from_the_meta_device():
    """The two usual ways: load with assign=True, or to_empty and reset_parameters."""
    source, x = layer(dropout_p=0.0), torch.randn(5, 24)
    meta = LowRankLinear(nn.Linear(24, 36, device="meta"), 4, scale=0.5, **KINDS["grid"])
    assert meta.down.is_meta and meta(torch.empty(5, 24, device="meta")).shape == (5, 36)
    meta.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(meta(x), source(x))
    empty = LowRankLinear(nn.Linear(24, 36, device="meta"), 4, scale=0.5, **KINDS["grid"]).to_empty(device="cpu")
    empty.reset_parameters()
    assert torch.equal(empty(x), nn.functional.linear(x, empty.weight, empty.bias))
    assert empty.down.abs().max() <= (1 / 12) ** 0.5 and empty.down.std() > 0


def test_inits():
    torch.manual_seed(0)
    wide = LowRankLinear(nn.Linear(4096, 4), 64)
    assert wide.down.abs().max() <= 1 / 64 and wide.down.std().item() == pytest.approx(1 / 64 / 3**0.5, rel=0.02)
    gaussian = LowRankLinear(nn.Linear(4096, 4), 64, init="gaussian")
    assert gaussian.down.std().item() == pytest.approx(1 / 64, rel=0.02)


def test_repr_tells_rank_blocks_dropout_and_backend():
    text = repr(layer("grid", dropout_p=0.1, dropout_on="core", backend="torch"))
    for part in ("rank=4", "blocks=3x2", "dropout=0.1 on core", "backend=torch", "core=dense", "in_features=24"):
        assert part in text


def test_state_dict_is_read_by_torch_load(tmp_path):
    """weights_only refuses whatever is no tensor: a state dict's metadata must not hold the layer."""
    torch.save(layer().state_dict(), tmp_path / "layer.pt")
    assert torch.load(tmp_path / "layer.pt", weights_only=True).keys() == layer().state_dict().keys()


def _result(kind, x):
    weight, bias = torch.randn(6, 4), torch.randn(6)
    down, up = torch.randn(2, 4, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    if kind == "hidden":
        return peft_kernels.lowrank_hidden(x, down)
    if kind == "linear":
        return peft_kernels.lowrank_linear(x, weight, bias, down, up)
    if kind == "batched":
        segments = peft_kernels.adapter_segments(torch.zeros(x.numel() // 4, dtype=torch.int64), adapters=1)
        return peft_kernels.batched_lowrank_linear(x, weight, bias, down[None], up[None], segments)
    if kind == "gated":
        return peft_kernels.gated_query("gated", x, torch.randn_like(x), *torch.randn(2, 4))
    text, cross = torch.randn(2, *x.shape)
    return peft_kernels.gated_query("additive", x, text, *torch.randn(2, 4), cross, *torch.randn(2, 4))


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("kind", ["hidden", "linear", "batched", "gated", "additive"])
def test_results_may_be_written_to(kind, shape):
    """As nn.ReLU(inplace=True) and y += x do, which models have behind their linear layers."""
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    state = torch.random.get_rng_state()
    y = _result(kind, x)
    (expected,) = torch.autograd.grad((y + 1).relu().sum(), x)
    torch.random.set_rng_state(state)
    y = _result(kind, x)
    y += 1
    y.relu_()
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)
