"""Every field of every configuration refuses, by its name, what it cannot mean; numpy's scalars are numbers."""

import dataclasses
import json

import numpy as np
import peft
import pytest
from torch import nn

from peft_kernels import (
    Aurora,
    AuroraConfig,
    FullTuningConfig,
    LoRA,
    LoRAConfig,
    MoILConfig,
    UniAdapterConfig,
)

CONFIGS = {
    LoRAConfig: {"preset": "vilt"},
    AuroraConfig: {"preset": "blip-retrieval"},
    MoILConfig: {"preset": "vilt"},
    UniAdapterConfig: {"preset": "vilt"},
    FullTuningConfig: {},
}
# Wrong for a field of such a name, whichever configuration it is in
NUMBER = [True, "1", None, float("nan"), float("inf"), -float("inf"), 1e300, 10**400, [1]]
COUNT = [True, "8", None, 8.0, 0, -1, 10**9, [8]]
FLAG = [1, 0, None, "yes"]
WORD = ["nonsense", 3, True, ["auto"], {}]
PROBABILITY = [True, "0.1", None, 1.0, -0.1, float("nan"), 2]
PATTERN = [["query"], "query", 3, {"(": 2}, {"query": "2"}, {"query": True}, {3: 4}]
WRONG = {
    "preset": WORD,
    "targets": ["", 3, [3], [""], {"query": 1}, [{"modality": "text"}], True],
    "modules_to_save": ["classifier", 3, [3], [""]],
    "adapter_dtype": [*WORD, "int8"],
    "backend": [*WORD, None],
    "rank": COUNT,
    "transform_rank": COUNT,
    "interval": COUNT,
    "alpha": NUMBER,
    "scale": NUMBER,
    "decay": [*NUMBER, -0.1, 1.1],
    "loss_weight": [*NUMBER, -1],
    "dropout": PROBABILITY,
    "rslora": FLAG,
    "ffn": FLAG,
    "released": FLAG,
    "group": FLAG,
    "stack": FLAG,
    "recompute": FLAG,
    "rank_pattern": [*PATTERN, {"query": 0}, {"query": 2.5}],
    "alpha_pattern": [*PATTERN, {"query": float("nan")}],
    "scale_pattern": [*PATTERN, {"query": float("inf")}],
    **dict.fromkeys(("init", "core", "layout", "sharing", "approximation", "teacher", "ema_per", "reduction"), WORD),
    "gates": WORD,
}
CASES = [
    (config, field.name, value)
    for config in CONFIGS
    for field in dataclasses.fields(config)
    for value in WRONG[field.name]
]


@pytest.mark.parametrize(
    ("config", "name", "value"), CASES, ids=lambda each: each.__name__ if isinstance(each, type) else repr(each)[:20]
)
def test_a_wrong_value_is_refused_by_name(config, name, value):
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b") as caught:
        config(**{**CONFIGS[config], name: value})
    assert len(str(caught.value)) < 600 and "inf]" not in str(caught.value)


@pytest.mark.parametrize("config", [LoRAConfig, AuroraConfig, MoILConfig, UniAdapterConfig])
def test_scalars_of_numpy_are_numbers(config):
    given = {"rank": np.int64(4)}
    names = {field.name for field in dataclasses.fields(config)}
    others = {"alpha": np.float32(2), "scale": np.float64(0.5), "dropout": np.float32(0.5), "decay": np.float64(0.9)}
    others |= {"rslora": np.bool_(True), "ffn": np.bool_(False), "rank_pattern": {"query": np.int32(2)}}
    given |= {name: value for name, value in others.items() if name in names}
    made = config(**CONFIGS[config], **given)
    assert type(made.rank) is int and all(getattr(made, name) == value for name, value in given.items())
    assert config.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize("method", [LoRA, Aurora])
def test_a_configuration_of_peft_is_told_where_it_goes(method):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(
        TypeError, match=r"^config: .* got LoraConfig of peft; .*accelerate and fast, and LoRA.from_peft"
    ):
        method.wrap(model, peft.LoraConfig(target_modules=["0"]))
