"""Whole models: what is fused and undone, checkpoints to and from stock PEFT, adapters that come, go and merge."""

import copy
import importlib.metadata
import io
import re
from pathlib import Path

import pytest
import torch
from adapter_models import build, loss
from peft_lora_cases import ROUTES, base, count_calls, fused, ids, pair, peft, stir, stock, wrapped
from torch import nn

import peft_kernels.integrations.peft as integration
from peft_kernels.integrations.peft import FusedLinear, accelerate, fast, restore

DOCS = Path(__file__).parents[1] / "docs" / "peft.md"


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


# ---- what is swapped, and back --------------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_report_and_restore():
    theirs = stock(target_modules=["words", "first", "second", "turned", "mha"])
    ours = copy.deepcopy(theirs)
    report = accelerate(ours)
    names = ["base_model.model.first", "base_model.model.second"]
    assert list(report.swapped) == names
    reasons = {
        "words": "Embedding, not PEFT's lora.Linear",
        "turned": "its base layer is a Conv1D, not an nn.Linear",
        "mha": "MultiheadAttention, not PEFT's lora.Linear",
        "mha.base_layer.out_proj": "nn.MultiheadAttention reads its weight",
    }
    assert len(report.left) == len(reasons)
    for name, reason in reasons.items():
        assert reason in report.left[f"base_model.model.{name}"]
        assert f"  left base_model.model.{name}: " in str(report) and reason in str(report)
    assert str(report).startswith("2 of 6 adapter layers are fused now\n")
    again = accelerate(ours)
    assert again.swapped == () and [again.left[name] for name in names] == ["it is fused already"] * 2
    assert str(again).startswith("2 of 6 adapter layers are fused now, 2 of them from before\n")
    assert str(again).count("\n") == 4 and "already" not in str(again)
    assert list(restore(ours)) == names and restore(ours) == ()
    for (name, their), (_, our) in zip(theirs.named_modules(), ours.named_modules()):
        assert type(their) is type(our), name
        assert vars(their).keys() == vars(our).keys() and type(vars(our).get("scaling", {})) is dict, name
    assert torch.equal(ours(ids()), theirs(ids()))


def test_representation_and_status():
    theirs, ours = pair()
    assert re.sub(r"\n *fused\n", "\n", repr(ours)) == repr(theirs) and repr(ours).count("fused") == 2
    assert ours.get_layer_status() == theirs.get_layer_status()
    assert ours.get_model_status() == theirs.get_model_status()


def test_other_linears_and_layers_are_left():
    def reason(change=lambda layer: None, linear=nn.Linear, **config):
        model = nn.ModuleDict({"x": linear(4, 4)})
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["x"], **config))
        change(model.base_model.model["x"])
        return accelerate(model).left.get("base_model.model.x")

    assert reason() is None
    assert "Doubled, not an nn.Linear" in reason(linear=Doubled)
    assert "variant of LoRA" in reason(use_dora=True)
    assert "lora_bias" in reason(lora_bias=True)
    assert "it has no adapter" in reason(lambda layer: layer.delete_adapter("default"))
    assert "a forward of its own" in reason(lambda layer: setattr(layer, "forward", print))
    assert "hooks" in reason(lambda layer: layer.base_layer.register_forward_pre_hook(print))
    assert "float8" in reason(lambda layer: layer.base_layer.to(torch.float8_e4m3fn))
    assert "parametrised" in reason(
        lambda layer: nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", nn.Identity())
    )
    other = peft.get_peft_model(base(), peft.AdaLoraConfig(target_modules=["first"], total_step=5, init_r=2))
    assert "adalora" in accelerate(other).left["base_model.model.first"]
    other = peft.get_peft_model(base(), peft.IA3Config(target_modules=["first"], feedforward_modules=[]))
    assert "ia3" in accelerate(other).left["base_model.model.first"]


def test_a_second_call_says_that_all_is_fused():
    model = stock(target_modules=["first", "second"])
    assert str(accelerate(model)) == "2 of 2 adapter layers are fused now"
    assert str(accelerate(model)) == "2 of 2 adapter layers are fused now: all were fused already"


def test_models_without_a_peft_model_around(calls):
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["first"], r=2), base())
    assert accelerate(model).swapped == ("first",)
    model(ids())
    mixed = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["first"], r=2), mixed=True)
    mixed.add_adapter("other", peft.LoHaConfig(target_modules=["second"], r=2))
    mixed.add_adapter("third", peft.LoraConfig(target_modules=["second"], r=2))
    report = accelerate(mixed)
    assert len(report.swapped) == 1 and "another adapter's layer" in str(report)
    mixed(ids())
    assert calls == [2, 0]


@pytest.mark.parametrize("given", [None, nn.Linear(2, 2), "model", peft.PeftModel])
def test_what_is_no_peft_model(given):
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match=r"peft_model: expected .* got (NoneType|Linear|str|type)$"):
            function(given)


@pytest.mark.parametrize("given", [None, {"r": 8}, peft.IA3Config(), peft.AdaLoraConfig(total_step=5)])
def test_what_is_no_lora_config(given):
    with pytest.raises(TypeError, match=r"config: expected a peft\.LoraConfig, got "):
        fast(given)


def test_fast_leaves_the_given_configuration_alone():
    config = peft.LoraConfig(target_modules=["first"])
    config._register_custom_module({nn.LSTM: nn.LSTM})
    quick = fast(config)
    assert list(config._custom_modules) == [nn.LSTM] and list(quick._custom_modules) == [nn.LSTM, nn.Linear]
    assert quick.to_dict() == config.to_dict()
    assert not fused(wrapped(base(), peft.LoraConfig(target_modules=["first"])))
    assert fused(wrapped(base(), copy.deepcopy(fast(peft.LoraConfig(target_modules=["first"]))))) == ["first"]


@pytest.mark.parametrize("version", ["0.20.9", "0.9.0", None])
def test_peft_too_old_or_absent(version, monkeypatch):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(ImportError, match=rf"peft >= 0\.21.*{version or 'not installed'}"):
        integration._check_version()


@pytest.mark.parametrize("version", ["0.21.0", "0.22.1.dev0", "1.0"])
def test_peft_new_enough(version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    integration._check_version()


# ---- files ----------------------------------------------------------------------------------------------------------

SAVED = {
    "plain": {},
    "heads and biases": {"modules_to_save": ["head"], "bias": "lora_only"},
    "all kinds": {"target_modules": ["words", "conv", "first", "turned"], "use_rslora": True, "lora_dropout": 0.1},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", SAVED)
def test_checkpoints_bit_for_bit(case, route, tmp_path):
    theirs, ours = pair(torch.float32, route, **SAVED[case])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = [sorted(path.name for path in (tmp_path / who).iterdir()) for who in ("ours", "theirs")]
    assert files[0] == files[1] and "adapter_model.safetensors" in files[0]
    for name in files[0]:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    # ours into stock PEFT, theirs into fused layers
    there = peft.PeftModel.from_pretrained(base(torch.float32), tmp_path / "ours").eval()
    config = peft.LoraConfig.from_pretrained(tmp_path / "theirs")
    here = peft.PeftModel.from_pretrained(base(torch.float32), tmp_path / "theirs", config=fast(config)).eval()
    assert fused(here) and not fused(there)
    for loaded in (there, here):
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), theirs.state_dict().values()))
        torch.testing.assert_close(loaded(ids()), theirs(ids()), rtol=1e-5, atol=1e-5)


def test_the_same_start_from_the_same_seed():
    config = {"target_modules": ["first", "second"], "r": 3}
    theirs, ours = wrapped(base(), peft.LoraConfig(**config)), wrapped(base(), fast(peft.LoraConfig(**config)))
    assert len(fused(ours)) == 2
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))


def test_copies_and_pickles(calls):
    theirs, ours = pair(route="fast", lora_alpha=5)
    expected = ours(ids())
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert fused(other) == fused(ours)
        other.base_model.set_adapter("default")
        for layer in (each for each in other.modules() if isinstance(each, FusedLinear)):
            layer.scaling["default"] = 0.0
        assert not torch.equal(other(ids()), expected) and torch.equal(ours(ids()), expected)
    restore(ours)
    assert torch.equal(ours(ids()), theirs(ids())) and calls == [10, 0]


# ---- adapters that come, go and merge -------------------------------------------------------------------------------


def other_adapter(model, targets=("first", "head"), **config):
    torch.manual_seed(2)
    model.add_adapter("other", peft.LoraConfig(target_modules=list(targets), r=3, **config))
    stir(model)


def weighted(model):
    other_adapter(model, ["first", "second"])
    model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "mixed", combination_type="linear")
    model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "long", combination_type="cat")
    model.set_adapter("mixed")


def both_merged(model):
    other_adapter(model)
    model.merge_adapter(["default", "other"])
    model.unmerge_adapter()


# what is done, and how often lowrank_linear then runs in a forward
DONE = {
    "another adapter": (other_adapter, 2),
    "another that is active": (lambda m: (other_adapter(m), m.set_adapter("other")), 1),  # `head` is PEFT's
    "both active": (lambda m: (other_adapter(m), m.base_model.set_adapter(["default", "other"])), 1),  # on `second`
    "a DoRA beside it": (lambda m: (other_adapter(m, use_dora=True), m.set_adapter("other")), 0),
    "weighted": (weighted, 2),
    "weighted, concatenated": (lambda m: (weighted(m), m.set_adapter("long")), 2),
    "deleted": (lambda m: (other_adapter(m), m.set_adapter("other"), m.delete_adapter("default")), 1),
    "merged": (lambda m: m.merge_adapter(), 0),
    "merged and unmerged": (both_merged, 2),
    "scaled": (lambda m: [each.scale_layer(3.0) for each in m.modules() if hasattr(each, "scale_layer")], 2),
}


@pytest.mark.parametrize("case", DONE)
def test_adapters(case, calls):
    do, per_forward = DONE[case]
    theirs, ours = pair()
    do(theirs), do(ours)
    calls[:] = [0, 0]
    torch.testing.assert_close(ours(ids()), theirs(ids()), rtol=1e-10, atol=1e-11)
    assert calls == [per_forward, 0]
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("way", ["merge_and_unload", "unload"])
def test_unloading(way):
    theirs, ours = (getattr(model, way)() for model in pair())
    assert not any(isinstance(module, FusedLinear) for module in ours.modules())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))


def test_disabling(calls):
    theirs, ours = pair()
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(ids()), theirs(ids())) and torch.allclose(ours(ids()), base()(ids()))
    assert calls == [0, 0] and not torch.allclose(ours(ids()), base()(ids())) and calls == [2, 0]


# ---- models of transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["vilt_vqa", "blip_captioning"])
def test_training(kind, checkpointing, route, calls):
    """Three steps of AdamW end with stock PEFT's weights."""
    config = {"target_modules": ["query", "value", "qkv"], "r": 3, "lora_alpha": 5}
    trained = []
    for make in (peft.LoraConfig, lambda **c: fast(peft.LoraConfig(**c)) if route == "fast" else peft.LoraConfig(**c)):
        model, batch = build(kind, torch.float64)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, make(**config))
        if trained and route == "accelerate":
            accelerate(model)
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            model.get_base_model().disable_input_require_grads()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            torch.manual_seed(0)  # ViLT draws the order of its patches
            loss(model.train(), batch).backward()
            optimizer.step()
        trained.append({name: p for name, p in model.named_parameters() if p.requires_grad})
    theirs, ours = trained
    assert theirs.keys() == ours.keys() and calls[0] >= 3 * len(fused(model)) > 0
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-8, atol=1e-10, msg=lambda m, name=name: name + m)


def test_documentation(tmp_path, monkeypatch, capsys, calls):
    monkeypatch.chdir(tmp_path)
    block = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)[0]  # the next is Aurora's
    names = {}
    exec(compile(block, str(DOCS.name), "exec"), names)
    assert "4 of 4 adapter layers are fused now" in capsys.readouterr().out and calls[0] == 4
    assert len(fused(names["model"])) == 4
