"""Aurora as a method of PEFT: registering, configurations, and which layers they mean."""

import copy

import pytest
from peft_aurora_cases import config, peft
from torch import nn

from peft_kernels.integrations.peft import AuroraConfig, register

CONFIGS = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
MAPPINGS = (CONFIGS, peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING)


def test_registering_again(monkeypatch):
    before = [dict(mapping) for mapping in MAPPINGS]
    register()
    assert [dict(mapping) for mapping in MAPPINGS] == before
    assert all(mapping["AURORA"] for mapping in MAPPINGS)
    monkeypatch.setitem(CONFIGS, "AURORA", peft.LoraConfig)  # a later PEFT's own
    with pytest.raises(ValueError, match="PEFT has a method named 'AURORA'"):
        register()
    monkeypatch.delitem(CONFIGS, "AURORA")
    with pytest.raises(ValueError, match="prefix"):
        register()
    with pytest.raises(ValueError, match=r"call peft_kernels' register\(\) first"):
        AuroraConfig(target_modules=["q"])


HOSTILE = {
    "rank": (0, -1, 65_537, True, 2.5, "8", None),
    "core": ("CP", None, "dense"),
    "scale": (float("nan"), float("inf"), "1", True, None),
    "dropout": (1, 1.5, -0.1, float("nan"), "0", True),
    "init_weights": (0, "yes", None),
    "target_modules": ([""], [3], 7, "("),
    "exclude_modules": ([None], 7, "["),
    "modules_to_save": ("head", [1], 7),
    "layers_to_transform": ("0", [True], [None], [0.5]),
    "layers_pattern": (["h"], 7),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values(name):
    for value in HOSTILE[name]:
        with pytest.raises((ValueError, TypeError), match=rf"^{name}: "):
            config(**{name: value})


def test_configuration_file(tmp_path):
    given = config(layers_to_transform=[0, 2], layers_pattern="layer", exclude_modules=["k"], scale=0.25)
    given.save_pretrained(tmp_path)
    again = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(again) is AuroraConfig
    assert {**again.to_dict(), "layers_pattern": "layer"} == {**given.to_dict(), "layers_pattern": "layer"}


def test_targets():
    net = nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({n: nn.Linear(4, 4) for n in "qkv"}) for _ in range(3))})
    options = {"rank": 2, "exclude_modules": ["v"]}
    found = peft.get_peft_model(copy.deepcopy(net), AuroraConfig(target_modules="all-linear", **options))
    assert found.targeted_module_names == [f"h.{i}.{n}" for i in range(3) for n in "qk"]
    options |= {"layers_to_transform": [1], "layers_pattern": "h", "target_modules": ["q", "v"]}
    net = nn.ModuleDict({"model": net})
    assert peft.get_peft_model(net, AuroraConfig(**options)).targeted_module_names == ["model.h.1.q"]


def test_layers_that_are_never_called_are_refused():
    for net in (nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2, 16)):
        net = nn.ModuleDict({"inner": net, "lin": nn.Linear(8, 8)})
        with pytest.raises(ValueError, match=r"reads its weight past any adapter.*exclude_modules"):
            peft.get_peft_model(net, AuroraConfig(target_modules="all-linear", rank=2))
    options = {"exclude_modules": ["inner.self_attn.out_proj", "linear1", "linear2"], "rank": 2}
    model = peft.get_peft_model(copy.deepcopy(net), AuroraConfig(target_modules="all-linear", **options))
    assert model.targeted_module_names[-1] == "lin"
