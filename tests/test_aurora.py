"""Aurora against its definition written out, and the identities that hold for it: docs/method.md, sections 4 and 5."""

import copy

import pytest
import torch
from adapter_models import MODELS, PRESET, build, loss, output
from aurora_cases import CORES, RANK, defined_weights, kind_of, parameters_of, scramble, wrapped
from torch import nn

from peft_kernels import Aurora, AuroraConfig
from peft_kernels.layers.mode_linear import Decomposition, ModeLinear, SharedCores

DECOMPOSED = pytest.mark.parametrize(("core", "layout"), CORES)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("core", ["cp", "tucker"])
def test_fresh_is_the_base_bit_for_bit(kind, core):
    model, batch = build(kind)
    before = output(model, batch)
    preset = "blip-retrieval" if PRESET[kind] == "blip" else PRESET[kind]
    Aurora.wrap(model, AuroraConfig(preset=preset, rank=RANK, core=core, backend="torch"))
    assert torch.equal(output(model, batch), before)


@DECOMPOSED
@pytest.mark.parametrize("vision", [16, 24])
def test_every_kind_of_layer_is_its_definition(core, layout, vision):
    """qkv, projection, fc1, fc2, text, cross-attention; vision 24 beside text 16 makes keys and values rectangular."""
    adapter, model, _ = wrapped(core=core, layout=layout, vision=vision, scale=0.7)
    expected = defined_weights(adapter, layout)
    assert {kind_of(name)[:2] for name in expected} == {(1, 1), (3, 1), (4, 1), (1, 4)}
    for name, layer in adapter.layers.items():
        x = torch.randn(2, 5, layer.in_features, dtype=torch.float64)
        update = expected[name] - layer.weight
        assert update.abs().max() > 0.01, name
        torch.testing.assert_close(layer.delta_weight(), update.detach(), rtol=1e-12, atol=1e-13)
        y = nn.functional.linear(x, expected[name], layer.bias)
        torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)
    pairs = {f"{vision}x{vision}", "16x16"} | ({f"{vision}x16"} if vision != 16 else set())
    assert set(model.aurora["shared"].down) == set(model.aurora["shared"].up) == pairs


@DECOMPOSED
@pytest.mark.parametrize(("kind", "vision"), [("blip_retrieval", 24), ("blip_vqa", 16)])
def test_model_equals_a_plain_one_with_the_defined_weights_and_merged(kind, vision, core, layout):
    adapter, model, batch = wrapped(kind, core=core, layout=layout, vision=vision)
    plain, _ = build(kind, torch.float64, vision=vision)
    before = {name: layer.weight.clone() for name, layer in adapter.layers.items()}
    with torch.no_grad():
        fresh = output(plain, batch)
        for name, weight in defined_weights(adapter, layout).items():
            plain.get_submodule(name).weight.copy_(weight)
    expected, got = output(plain, batch), output(model, batch)
    assert (expected - fresh).abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    adapter.merge()
    torch.testing.assert_close(output(model, batch), expected, rtol=1e-11, atol=1e-11)
    adapter.unmerge()
    assert all(torch.equal(layer.weight, before[name]) for name, layer in adapter.layers.items())
    assert torch.equal(output(model, batch), got)


@DECOMPOSED
def test_gradients_are_autograds_of_the_definition(core, layout):
    """Through a whole model, training, with every product shared: U, V, P and λ or C."""
    adapter, model, batch = wrapped(core=core, layout=layout, vision=24)
    model.train()
    loss(model, batch).backward()
    parameters = parameters_of(model)
    got = {name: p.grad for name, p in parameters.items()}
    plain, _ = build("blip_retrieval", torch.float64, vision=24)

    class Defined(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = plain.train()

        def forward(self):
            return loss(self.plain, batch)

    weights = {f"plain.{name}.weight": weight for name, weight in defined_weights(adapter, layout).items()}
    expected = torch.autograd.grad(torch.func.functional_call(Defined(), weights), parameters.values())
    for (name, grad), own in zip(got.items(), expected):
        assert own.abs().max() > 1e-4, name
        torch.testing.assert_close(grad, own, rtol=1e-9, atol=1e-11)


def test_superdiagonal_tucker_is_cp():
    _, model, batch = wrapped(core="cp")
    _, other, _ = wrapped(core="tucker")
    source, target = parameters_of(model), parameters_of(other)
    with torch.no_grad():
        for name in target:
            if name == "modes":
                target[name].zero_()
                target[name][range(RANK), range(RANK), range(RANK)] = source["lam"]
            else:
                target[name].copy_(source[name])
    torch.testing.assert_close(output(other, batch), output(model, batch), rtol=1e-12, atol=1e-12)


@DECOMPOSED
@pytest.mark.parametrize("vision", [16, 24])
def test_stock_peft_loads_the_export(tmp_path, core, layout, vision):
    peft = pytest.importorskip("peft")
    adapter, model, batch = wrapped(core=core, layout=layout, vision=vision, scale=0.7)
    with torch.no_grad():
        model.itm_head.weight.add_(0.1)
    expected = output(model, batch)
    adapter.export_lora(tmp_path)
    plain, _ = build("blip_retrieval", torch.float64, vision=vision)
    assert (output(plain, batch) - expected).abs().max() > 1e-3
    stock = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(output(stock.base_model.model, batch), expected, rtol=1e-12, atol=1e-12)


def test_export_refuses_active_gates_unless_told(tmp_path):
    peft = pytest.importorskip("peft")
    adapter, model, batch = wrapped(gates="additive")
    with pytest.raises(ValueError, match=r"^export_lora: gates are no LoRA"):
        adapter.export_lora(tmp_path)
    assert not list(tmp_path.iterdir())
    adapter.export_lora(tmp_path, leave_out_gates=True)
    plain, _ = build("blip_retrieval", torch.float64)
    stock = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    _, without, _ = wrapped()
    assert not torch.allclose(output(model, batch), output(without, batch))
    without.load_state_dict({k: v for k, v in model.state_dict().items() if "gated_query" not in k})
    torch.testing.assert_close(output(stock.base_model.model, batch), output(without, batch), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("core", ["cp", "tucker"])
def test_start_values(core):
    """V = 0; U uniform ±1/√d_in; λ = 1 and P Xavier over (N, R); tucker: C Xavier, p ±√(6 / (R + n)), n = 1, 4 or 8."""
    model, _ = build("blip_retrieval", vision=64, layers=6)
    rank = 32
    adapter = Aurora.wrap(model, AuroraConfig(preset="blip-retrieval", rank=rank, core=core))
    parameters = parameters_of(model)
    bounds = {f"down.{k}x{n}": k**-0.5 for k, n in ((16, 16), (64, 16), (64, 64))}
    P = parameters["slots"]
    vision = [(3, 4), (1, 4), (4, 8), (4, 8)] * 6  # (slots, n) of qkv, projection, fc1, fc2
    (decomposition,) = adapter.modules["aurora"].values()
    assert sorted(decomposition.fans) == sorted([*vision, *[(1, 1)] * 36])
    if core == "cp":
        assert torch.equal(parameters["lam"], torch.ones(rank))
        bounds["slots"] = (6 / sum(P.shape)) ** 0.5
    else:
        bounds["modes"] = (6 / (2 * rank**2)) ** 0.5
        for n in (1, 4, 8):
            rows = torch.cat([torch.full((slots,), own == n) for slots, own in [*vision, *[(1, 1)] * 36]])
            bound = (6 / (rank + n)) ** 0.5
            assert 0.98 * bound < P[rows].abs().max() <= bound and P[rows].mean().abs() < 0.1 * bound, n
    assert len(P) == 6 * 12 + 6 * 6
    for name, bound in bounds.items():
        own = parameters[name]
        assert 0.98 * bound < own.abs().max() <= bound, name
        assert own.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
    assert all(not up.any() for name, up in parameters.items() if name.startswith("up."))


def test_released_order_needs_the_tucker_core():
    with pytest.raises(ValueError, match=r"^layout: "):
        AuroraConfig(preset="paper", layout="released")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_masters_under_half_precision_and_autocast(dtype):
    """Cores of float32 masters are built in float32 whatever autocast says: a merge under it is the one without it."""
    adapter, _, _ = wrapped(core="tucker", dtype=dtype, adapter_dtype="float32")
    assert {p.dtype for p in adapter.parameters("adapter")} == {torch.float32}
    weights = defined_weights(adapter)
    with torch.autocast("cpu", torch.bfloat16):
        adapter.merge()
    for name, layer in adapter.layers.items():
        error = (layer.weight.double() - weights[name].double()).abs().max() / weights[name].double().abs().max()
        assert layer.weight.dtype == dtype and error < torch.finfo(dtype).eps, name


def test_wrong_dtypes_and_devices_are_told_before_anything_changes():
    model, _ = build("blip_retrieval", torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=r"^adapter_dtype: "):
        Aurora.wrap(model, AuroraConfig(preset="paper", rank=RANK, adapter_dtype="float16"))
    model.vision_model.to("meta")
    with pytest.raises(ValueError, match=r"^sharing: layers on cpu and meta"):
        Aurora.wrap(model, AuroraConfig(preset="paper", rank=RANK))
    assert list(model.state_dict()) == list(before) and type(model.itm_head) is nn.Linear
    Aurora.wrap(model, AuroraConfig(preset="paper", rank=RANK, sharing="none"))


def test_layers_of_several_half_precisions_share_float32():
    model, _ = build("blip_retrieval")
    model.vision_model.to(torch.bfloat16)
    adapter = Aurora.wrap(model, AuroraConfig(preset="paper", rank=RANK))
    assert {p.dtype for p in adapter.parameters("adapter")} == {torch.float32}
    vision, text = model.vision_model.encoder.layers[0].self_attn.qkv, model.text_encoder.encoder.layer[0]
    assert vision(torch.randn(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert text.attention.self.query(torch.randn(2, 16)).dtype == torch.float32


def test_keys_and_values_of_another_modality_are_one_slot():
    """48 is three times 16, and yet a key is no fc2."""
    adapter, _, _ = wrapped(preset="cross", vision=48)
    for name, layer in adapter.layers.items():
        assert (layer.out_blocks, layer.in_blocks) == (1, 1), name
    assert set(adapter.model.aurora["shared"].down) == {"16x16", "48x16"}


def test_a_layer_alone_tells_its_shape_and_errors():
    cores = SharedCores(Decomposition([(8, 8)], [(3, 4)], 2, "tucker"))
    layer = ModeLinear(nn.Linear(8, 24), cores, 0, out_blocks=3)
    for part in ("rank=2", "core=tucker", "blocks=3x1"):
        assert part in repr(layer)
    with pytest.raises(ValueError, match=r"^out_blocks: "):
        ModeLinear(nn.Linear(8, 24), cores, 0, out_blocks=5)
    with pytest.raises(ValueError, match=r"^layout: "):
        ModeLinear(nn.Linear(8, 24), cores, 0, out_blocks=3, layout="fc2")
    with pytest.raises(ValueError, match=r"^core: "):
        Decomposition([(8, 8)], [(1, 1)], 2, "dense")


def test_reset_parameters_starts_afresh():
    adapter, model, batch = wrapped(core="tucker")
    plain, _ = build("blip_retrieval", torch.float64)
    assert not torch.equal(output(model, batch), output(plain, batch))
    model.aurora["shared"].reset_parameters()
    assert torch.equal(output(model, batch), output(plain, batch))
    scramble(adapter)
    assert not torch.equal(output(model, batch), output(plain, batch))


SLOTS = [((8, 128), 16), ((128, 8), 16), ((8, 136), 1), ((136, 8), 1), ((8, 100), 1)]


@pytest.mark.parametrize(("shape", "slots"), SLOTS)
def test_a_head_is_no_row_of_slots(shape, slots):
    """Cut into blocks as wide as it is high, x U of a head of few classes would be many times as large as x."""
    model = nn.ModuleDict({"linear": nn.Linear(*shape)})
    aurora = Aurora.wrap(model, AuroraConfig(targets=("linear",), rank=4))
    layer, x = model["linear"], torch.randn(3, shape[0])
    (rows,) = (p for name, p in aurora.named_parameters() if name.endswith("slots"))
    assert rows.shape == (slots, 4)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
