"""Which modules a configuration means: suffixes, expressions, targets, guesses, and what is refused."""

import re

import pytest
import torch
from adapter_cases import assert_unchanged, snapshot, wrap
from adapter_models import build
from torch import nn

from peft_kernels.adapters import LoRAConfig
from peft_kernels.adapters.targets import find_targets, guess_target
from peft_kernels.presets import Target


def found(model: nn.Module, targets, **options) -> list[str]:
    return [match.name for match in find_targets(model, LoRAConfig(targets=targets, **options))]


@pytest.fixture
def tree():
    leaf = {"query": nn.Linear(4, 4), "my_query": nn.Linear(4, 4), "out": nn.Linear(4, 4)}
    layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(4, 4) for n in leaf}) for _ in range(12))
    return nn.ModuleDict({"x": nn.ModuleDict({"layer": layers}), "layer": nn.ModuleList([nn.ModuleDict(leaf)])})


def test_suffixes_are_of_whole_names(tree):
    assert found(tree, ["query"]) == [*(f"x.layer.{n}.query" for n in range(12)), "layer.0.query"]
    assert found(tree, ["layer.1.query", "out"])[:2] == ["x.layer.0.out", "x.layer.1.query"]  # and not layer 11
    assert found(tree, ["layer.0.query"]) == ["x.layer.0.query", "layer.0.query"]
    assert found(tree, ["query", "layer.0.query"]) == found(tree, {"query"})  # each once


def test_expressions_match_whole_names(tree):
    assert found(tree, r"layer\.0\.(query|out)") == ["layer.0.query", "layer.0.out"]
    assert found(tree, r".*layer\.1.\.query") == ["x.layer.10.query", "x.layer.11.query"]


def test_targets_keep_what_they_say(tree):
    target = Target(r"layer\.0\.query", "vision", "pixels", 2, "output")
    (match,) = find_targets(tree, LoRAConfig(targets=[target]))
    assert match.target is target and match.linear is tree["layer"][0]["query"]
    config = LoRAConfig(targets=[target, "out"])
    assert LoRAConfig.from_dict(config.to_dict()) == config
    assert find_targets(tree, config)[0].target.pattern == re.escape("x.layer.0.out")


def test_a_preset_with_other_targets_keeps_its_heads():
    model, _ = build("vilt_vqa")
    adapter = wrap("lora", model, preset="vilt", targets=["layer.0.output.dense"])
    assert list(adapter.layers) == ["vilt.encoder.layer.0.output.dense"] and len(adapter.heads) == 6


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("text.layer.0.self.query", (8, 8), ("text", "hidden", 1, "input")),
        ("vision.layer.0.qkv", (8, 24), ("vision", "hidden", 3, "input")),
        ("layer.0.qkv", (8, 25), ("text", "hidden", 1, "input")),
        ("decoder.crossattention.query", (8, 8), ("cross", "hidden", 1, "input")),
        ("decoder.crossattention.key", (6, 8), ("cross", "context", 1, "input")),
        ("decoder.encoder_attn.v_proj", (8, 8), ("cross", "context", 1, "input")),
        ("image.mlp.fc2", (32, 8), ("vision", "hidden", 1, "output")),
        ("image.mlp.fc1", (8, 32), ("vision", "hidden", 1, "input")),
    ],
)
def test_guesses_from_names(name, sizes, expected):
    target = guess_target("", name, nn.Linear(*sizes))
    assert (target.modality, target.input, target.projections, target.placement) == expected
    assert re.fullmatch(target.pattern, name)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"targets": ["querry"]}, r"^targets: 'querry' matches no module; nearest: vilt.*\.query"),
        ({"targets": ["query", "kye"]}, r"^targets: 'kye' matches no module; nearest: .*\.key"),
        ({"targets": ["attention"]}, r"^targets: 'attention' matches no nn.Linear, but (\w+.Vilt\w+[,;] )+nearest"),
        ({"targets": ["layernorm_before"]}, r"matches no nn.Linear, but LayerNorm; nearest"),
        ({"targets": "query"}, r"^targets: 'query' matches no module by its whole name \(a list would give suff"),
        ({"targets": "(query"}, r"^targets: '\(query' is not a regular expression"),
        ({"targets": [Target("nowhere")]}, r"^targets: 'nowhere' matches no module"),
        ({"preset": "blip"}, r"^preset: 'blip' matches no linear layer; nearest: .*query"),
    ],
)
def test_nothing_found_names_the_nearest(options, match):
    model, _ = build("vilt_vqa")
    before = snapshot(model)
    with pytest.raises(ValueError, match=match) as caught:
        wrap("lora", model, **options)
    assert len(str(caught.value)) < 600  # layers of a stack count once
    assert_unchanged(model, before)


def test_a_model_without_linear_layers():
    with pytest.raises(ValueError, match=r"the model has no nn.Linear at all$"):
        wrap("lora", nn.Sequential(nn.ReLU()), targets=["0"])
    with pytest.raises(ValueError, match=r"the model has no nn.Linear at all$"):
        wrap("lora", nn.Module(), preset="blip")


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def quantized():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    return linear


def patched():
    linear = nn.Linear(4, 4)
    linear.forward = lambda x: x
    return linear


@pytest.mark.parametrize("method", ["lora", "moil", "aurora", "uniadapter"])
@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (quantized, TypeError, r"^targets: b: linear: expected a floating-point weight, got torch.uint8"),
        (lambda: Twice(4, 4), TypeError, r"^targets: b: linear: expected the forward of nn.Linear, Twice has its own"),
        (patched, TypeError, r"^targets: b: linear: expected the forward of nn.Linear, Linear has its own"),
        (lambda: nn.LazyLinear(4), TypeError, r"^targets: b: linear: expected a plain weight Parameter, LazyLinear"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), TypeError, r"^targets: b: linear: "),
        (lambda: nn.Conv2d(3, 3, 1), ValueError, r"^targets: 'b' matches no nn.Linear, but Conv2d; peft adapts"),
    ],
)
def test_linear_layers_that_take_no_adapter(method, make, error, match):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": make()})
    modules, flags = list(model.modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=match):
        wrap(method, model, targets=["a", "b"])
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (lambda: nn.MultiheadAttention(8, 2), "out_proj"),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16), "linear1"),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), "linear2"),
    ],
)
def test_modules_that_read_their_weights_past_an_adapter(make, target):
    model = nn.Sequential(make())
    before = snapshot(model)
    told = rf"{target} is part of an nn.\w+, which reads its weight past any adapter; peft adapts an nn.MultiheadAtt"
    with pytest.raises(ValueError, match=told):
        wrap("lora", model, targets=[target])
    assert_unchanged(model, before)


class Linear(nn.Module):
    """A layer of another library, with a name like torch's."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape or (4, 4)))


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(4, 4)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: nn.MultiheadAttention(8, 2), "but MultiheadAttention; peft adapts an nn.MultiheadAttention that is"),
        (lambda: nn.Embedding(4, 4), "but Embedding; peft adapts such layers, and .*accelerate then fuses the linear"),
        (conv1d, r"but transformers.Conv1D; peft adapts such layers"),
        (lambda: Linear(2, 4, 4), r"but test_targets.Linear; .*target_parameters"),
        (Linear, r"but test_targets.Linear; peft adapts such layers"),
        (lambda: nn.Conv1d(3, 3, 1), "but Conv1d; peft adapts such layers"),
        (nn.ReLU, "but ReLU; nearest: a"),
    ],
)
def test_other_layers_are_told_what_takes_them(make, told):
    with pytest.raises(ValueError, match=rf"^targets: 'b' matches no nn.Linear, {told}"):
        wrap("lora", nn.ModuleDict({"a": nn.Linear(4, 4), "b": make()}), targets=["b"])


@pytest.mark.parametrize("kind", ["sequence classification", "causal language model", "ViLT"])
def test_all_linear_is_what_peft_takes(kind):
    import peft
    import transformers as hf

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    makes = {
        "sequence classification": lambda: hf.BertForSequenceClassification(hf.BertConfig(**sizes, vocab_size=40)),
        "causal language model": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, vocab_size=40)),
        "ViLT": lambda: build("vilt_vqa")[0].vilt,
    }
    task = {"sequence classification": "SEQ_CLS"}.get(kind)
    theirs = peft.get_peft_model(makes[kind](), peft.LoraConfig(target_modules="all-linear", task_type=task))
    names = [name.removesuffix(".lora_A") for name, module in theirs.named_modules() if name.endswith(".lora_A")]
    assert found(makes[kind](), "all-linear") == [name.removeprefix("base_model.model.") for name in names]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, ValueError, r"^preset, targets: expected one of vilt, "),
        ({"targets": []}, ValueError, r"^preset, targets"),
        ({"preset": "vilt", "targets": ()}, ValueError, r"^preset, targets"),
        ({"targets": ""}, TypeError, r"^targets: expected names"),
        ({"targets": 3}, TypeError, r"^targets: expected names, got 3"),
        ({"targets": ["a", 3]}, TypeError, r"^targets: expected names"),
        ({"targets": [{"modality": "text"}]}, ValueError, r"^targets: expected some of pattern, .*, and the first"),
        ({"targets": [{"pattern": "a", "colour": 1}]}, ValueError, r"^targets: expected some of pattern"),
        ({"targets": [{"pattern": 3}]}, TypeError, r"^pattern: expected a string, got 3"),
        ({"targets": [{"pattern": "a", "input": []}]}, TypeError, r"^input: expected a string"),
        ({"targets": [{"pattern": "a", "modality": "smell"}]}, ValueError, r"^modality: expected one of"),
        ({"targets": [{"pattern": "a", "projections": 0}]}, ValueError, r"^projections: expected an integer ≥ 1"),
        ({"preset": "blipp"}, ValueError, r"^preset: expected one of .*'blip'"),
    ],
)
def test_wrong_configurations(options, error, match):
    with pytest.raises(error, match=match):
        LoRAConfig(**options)
