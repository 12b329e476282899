"""Aurora as a method of PEFT: files, several adapters, and what PEFT does to the modules."""

import copy
import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from peft_aurora_cases import BLOCKS, CORES, EXACT, adapted, base, config, defined, delta, factors, inputs, peft, stir
from safetensors.torch import load_file
from torch import nn

from peft_kernels import explain
from peft_kernels.integrations.peft.aurora_linear import AuroraLinear

LAYERS = {f"base_model.model.{layer}.aurora_p" for layer in BLOCKS}
SHARED = {f"base_model.aurora_shared.{way}_8x{rows}" for way in ("down", "up") for rows in (8, 12)}


def load(folder, dtype=torch.float64, **options):
    return peft.PeftModel.from_pretrained(base(dtype), folder, **options).eval()


def layers(model):
    return [module for module in model.modules() if isinstance(module, AuroraLinear)]


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", CORES)
def test_shared_factors_are_stored_once(core, tmp_path):
    model, x = adapted(core=core, modules_to_save=["head"]), inputs()
    model.save_pretrained(tmp_path)
    small = f"base_model.aurora_shared.{'lam' if core == 'cp' else 'modes'}"
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored.keys() == LAYERS | SHARED | {small} | {f"base_model.model.head.{n}" for n in ("weight", "bias")}
    assert sum(t.numel() for t in stored.values()) == model.get_nb_trainable_parameters()[0]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "AURORA"
    for low in (False, True):
        again = load(tmp_path, low_cpu_mem_usage=low)
        torch.testing.assert_close(again(x), model(x), **EXACT)
        assert not any(p.requires_grad for p in again.parameters())
        again.load_adapter(tmp_path, adapter_name="default_2", low_cpu_mem_usage=low, is_trainable=True)
        assert all(p.requires_grad for p in factors(again, "default_2").values())
        for name, p in factors(model).items():
            assert torch.equal(factors(again, "default_2")[name], p)
        again.set_adapter("default_2")
        torch.testing.assert_close(again(x), model(x), **EXACT)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("cast", [True, False])
def test_loading_in_half_precision(low, cast, tmp_path):
    model = adapted(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, torch.bfloat16, low_cpu_mem_usage=low, autocast_adapter_dtype=cast)
    dtype = torch.float32 if cast else torch.bfloat16
    for name, p in factors(model).items():
        p = p.bfloat16() if low else p  # so does PEFT to LoRA's
        assert torch.equal(factors(again)[name], p.to(dtype)) and factors(again)[name].dtype == dtype
        assert not factors(again)[name].requires_grad


def test_each_adapter_in_its_own_folder(tmp_path):
    model, x = adapted(), inputs()
    model.add_adapter("other", config(target_modules=["q", "wide"], rank=5, core="tucker"))
    stir(model)
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = model(x)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "other" / "adapter_model.safetensors")) == 2 + 4 + 1
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        torch.testing.assert_close(load(folder)(x), expected[name], **EXACT)


def test_new_process(tmp_path):
    """Loads after `register()`; before, the message is PEFT's, and names the method."""
    model, x = adapted(torch.float32), inputs(torch.float32)
    model.save_pretrained(tmp_path)
    torch.save((base(torch.float32).state_dict(), x, model(x).detach()), tmp_path / "data.pt")
    program = f"""
import torch, peft
from torch import nn
state, x, y = torch.load({str(tmp_path / "data.pt")!r})
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        for key, value in state.items():
            if key.endswith("weight"):
                name = key.removesuffix(".weight")
                setattr(self, name, nn.Linear(value.shape[1], value.shape[0], bias=f"{{name}}.bias" in state))
    def forward(self, x):
        x = torch.tanh(self.q(x)) * self.k(x)
        x = x + self.fc2(torch.relu(self.fc1(x)))
        return self.head(torch.cat([self.vision_fc1(x), self.wide(x)], dim=-1))
net = Net()
net.load_state_dict(state)
try:
    peft.PeftModel.from_pretrained(net, {str(tmp_path)!r})
except KeyError as error:
    assert "AURORA" in str(error), error
else:
    raise AssertionError("loaded without register()")
from peft_kernels.integrations.peft import register
register()
model = peft.PeftModel.from_pretrained(net, {str(tmp_path)!r}).eval()
torch.testing.assert_close(model(x), y)
assert type(model.peft_config["default"]).__module__ == "peft_kernels.integrations.peft.aurora"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_copies_and_pickles():
    model, x = adapted(), inputs()
    y = model(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), y)
        tuner = again.base_model
        assert all(layer.aurora_shared is tuner.aurora_shared for layer in layers(again))
        with torch.no_grad():
            factors(again)["aurora_shared.up_8x8"].zero_()
        assert torch.equal(model(x), y) and not torch.equal(again(x), y)


# ---- several adapters -----------------------------------------------------------------------------------------------


def several():
    """Adapters one, on all layers, and two, on two of them."""
    model = peft.get_peft_model(base(), config(), "one").eval()
    model.add_adapter("two", config(target_modules=["q", "wide"], rank=5, core="tucker", scale=0.5))
    return stir(model)


def both_weights(model, layer):
    weight = base().get_submodule(layer).weight + delta(factors(model, "one"), layer)
    return weight + (0.5 * delta(factors(model, "two"), layer) if layer in ("q", "wide") else 0)


def test_several_active_adapters():
    model, x = several(), inputs()
    expected = {
        "one": defined(factors(model, "one"), x),
        "two": defined(factors(model, "two"), x, scale=0.5, layers=("q", "wide")),
        "none": base()(x),
    }
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        torch.testing.assert_close(model(x), expected[name], **EXACT)
        assert {n for n in ("one", "two") for p in factors(model, n).values() if p.requires_grad} == {name}
    with model.disable_adapter():
        assert torch.equal(model(x), expected["none"])
        assert not any(p.requires_grad for p in model.parameters())
    model.base_model.set_adapter(["one", "two"])
    together = torch.func.functional_call(base(), {f"{n}.weight": both_weights(model, n) for n in BLOCKS}, (x,))
    torch.testing.assert_close(model(x), together, **EXACT)
    assert "2 active" in explain(model)["base_model.model.q"].reason
    model.merge_adapter(["one"])
    model.merge_adapter(["two"])
    torch.testing.assert_close(model(x), together, **EXACT)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.q.base_layer.weight, base().q.weight)
    model.merge_adapter()
    with model.disable_adapter():  # PEFT's layers unmerge then, for good
        assert torch.equal(model(x), expected["none"])


def test_deleting():
    model, x = several(), inputs()
    y = model(x)
    model.delete_adapter("two")
    assert torch.equal(model(x), y) and not any(".two" in name for name in model.state_dict())
    assert all("two" not in layer._all_available_adapter_names() for layer in layers(model))
    model.add_adapter("two", config(target_modules=["fc1"], rank=2))
    model.set_adapter("two")
    shared = {f"aurora_shared.{name}" for name in ("down_8x8", "up_8x8", "lam")}
    assert factors(model, "two").keys() == {"model.fc1.aurora_p", *shared}
    assert model(x).isfinite().all()
    assert {layer.name: layer.available_adapters for layer in model.get_layer_status()}["model.q"] == ["one"]
    model.delete_adapter("one")
    assert not any(layer.aurora_hidden for layer in layers(model))
    model.delete_adapter("two")
    assert torch.equal(model.base_model(x), base()(x))  # PEFT's own model raises without any adapter, LoRA's too


def test_a_failed_adapter_leaves_nothing():
    model, x = adapted(), inputs()
    y, names = model(x), set(model.state_dict())
    own = factors(model)["aurora_shared.lam"].requires_grad_(False)
    net = model.base_model.model
    net.words = nn.Embedding(3, 8)
    with pytest.raises(TypeError, match="target_modules: words is of class Embedding"):
        model.add_adapter("bad", config(target_modules=["q", "words"]))
    del net.words
    assert list(model.peft_config) == ["default"] and set(model.state_dict()) == names and torch.equal(model(x), y)
    model.add_adapter("good", config())
    assert not own.requires_grad and factors(model)["aurora_shared.up_8x8"].requires_grad


def test_mixed_batches_are_refused():
    model, x = several(), inputs()
    with pytest.raises(ValueError, match="adapter_names"):
        model(x, adapter_names=["one", "two", "one", "two", "__base__"])


def test_training_moves_all_of_the_adapter_and_nothing_else():
    model = peft.get_peft_model(base(), config(init_weights=True, modules_to_save=["head"])).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs()).square().sum().backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, _ in model.named_parameters() if "aurora_" in name or "modules_to_save" in name}


def test_heads_of_several_modules_are_unloaded():
    net = base()
    net.head = nn.Sequential(nn.Linear(44, 4), nn.Linear(4, 3)).double()
    model, x = stir(peft.get_peft_model(net, config(modules_to_save=["head"])).eval()), inputs()
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"][1].bias.add_(1)
    y = model(x)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), y, **EXACT)
    assert type(merged.head) is nn.Sequential


def test_names_of_adapters_that_look_like_ours(tmp_path):
    """PEFT removes an adapter's name from keys; layers and factors may be called the same."""
    for name in ("q", "lam", "model", "shared"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = stir(peft.get_peft_model(base(), config(), name).eval())
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(load(tmp_path / name)(inputs()), model(inputs()), **EXACT)


def test_sharing_lasts_as_long_as_the_adapter():
    layer = several().base_model.model.q
    assert layer.aurora_hidden.keys() == {"one"}  # in two no other layer reads what q does
    with pytest.raises(ValueError, match="shared state"):
        peft.inject_adapter_in_model(config(), base())
