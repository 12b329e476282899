"""Presets mean the modules that they should: names written by hand, as transformers gives them."""

import re
import warnings

import pytest
import torch
from adapter_cases import assert_unchanged, snapshot, wrap
from adapter_models import PRESET, build
from torch import nn

from peft_kernels.adapters import LoRA, LoRAConfig, heads
from peft_kernels.adapters.targets import find_targets
from peft_kernels.presets import PRESETS

QKV, ATT = "{query,key,value}", "attention.self.{query,key,value}"
BLIP_VISION = ["vision_model.encoder.layers.*.self_attn.qkv"]
BLIP_TEXT = [f"text_encoder.encoder.layer.*.{block}.self.{QKV}" for block in ("attention", "crossattention")]
BLIP_DECODER = [f"text_decoder.bert.encoder.layer.*.{block}.self.{QKV}" for block in ("attention", "crossattention")]
BLIP_MLP = ["vision_model.encoder.layers.*.mlp.{fc1,fc2}"]
BRIDGE = ["bridgetower.text_model.encoder.layer.*", "bridgetower.cross_modal_{image,text}_layers.*"]
CLIP = "{vision,text}_model.encoder.layers.*"
LXMERT, X = "lxmert.encoder", "lxmert.encoder.x_layers.*"
# kind of model: (always, with the feed-forward layers), as transformers names them
EXPECTED = {
    "blip_retrieval": (
        BLIP_VISION + BLIP_TEXT,
        [*BLIP_MLP, "text_encoder.encoder.layer.*.{intermediate,output}.dense"],
    ),
    "blip_vqa": (
        BLIP_VISION + BLIP_TEXT + BLIP_DECODER,
        [*BLIP_MLP, "{text_encoder,text_decoder.bert}.encoder.layer.*.{intermediate,output}.dense"],
    ),
    "blip_captioning": (
        BLIP_VISION + BLIP_DECODER,
        [*BLIP_MLP, "text_decoder.bert.encoder.layer.*.{intermediate,output}.dense"],
    ),
    "vilt_vqa": (
        [f"vilt.encoder.layer.*.attention.attention.{QKV}"],
        ["vilt.encoder.layer.*.{intermediate,output}.dense"],
    ),
    "vilt_retrieval": (
        [f"vilt.encoder.layer.*.attention.attention.{QKV}"],
        ["vilt.encoder.layer.*.{intermediate,output}.dense"],
    ),
    "bridgetower": (
        [*(f"{layer}.{ATT}" for layer in BRIDGE), f"{BRIDGE[1]}.crossattention.self.{QKV}"],
        [f"{layer}.{{intermediate,output}}.dense" for layer in BRIDGE],
    ),
    "visualbert": (
        [f"visual_bert.encoder.layer.*.{ATT}"],
        ["visual_bert.encoder.layer.*.{intermediate,output}.dense"],
    ),
    "lxmert": (
        [
            f"{LXMERT}.{{layer,r_layers}}.*.{ATT}",
            f"{X}.{{lang,visn}}_self_att.self.{QKV}",
            f"{X}.visual_attention.att.{QKV}",
        ],
        [f"{LXMERT}.{{layer,r_layers}}.*.{{intermediate,output}}.dense", f"{X}.{{lang,visn}}_{{inter,output}}.dense"],
    ),
    "clip": ([f"{CLIP}.self_attn.{{q,k,v}}_proj"], [f"{CLIP}.mlp.{{fc1,fc2}}"]),
}
HEADS = {
    "blip_retrieval": {"vision_proj", "text_proj", "itm_head"},
    "vilt_vqa": {"classifier.0", "classifier.1", "classifier.3"},
    "vilt_retrieval": {"rank_output"},
    "bridgetower": {
        *("bridgetower.cross_modal_image_pooler.dense", "bridgetower.cross_modal_text_pooler.dense"),
        "itm_score.fc",
    },
    "visualbert": {"cls"},
    "lxmert": {f"answer_head.logit_fc.{layer}" for layer in (0, 2, 3)},
    "clip": {"visual_projection", "text_projection"},
}


def expand(pattern: str, layers: int = 2) -> set[str]:
    """Names of a pattern in the way of a shell: {a,b} are choices, * is the number of a layer."""
    if choice := re.search(r"\{([^{}]*)\}", pattern):
        start, end = choice.span()
        return set().union(*(expand(pattern[:start] + each + pattern[end:], layers) for each in choice[1].split(",")))
    return {pattern.replace("*", str(number)) for number in range(layers)}


def names(patterns: list[str], model: nn.Module) -> set[str]:
    every = set().union(*map(expand, patterns))
    return {name for name in every if name in dict(model.named_modules())}


@pytest.mark.parametrize("kind", EXPECTED)
def test_presets_mean_these_modules_and_no_others(kind):
    model, _ = build(kind)
    always, ffn = (names(patterns, model) for patterns in EXPECTED[kind])
    config = LoRAConfig(preset=PRESET[kind])
    assert {match.name for match in find_targets(model, config)} == always
    assert {match.name for match in find_targets(model, config, ffn=True)} == always | ffn
    for patterns in EXPECTED[kind]:  # each says something of this model
        assert all(names([pattern], model) for pattern in patterns)
    adapter = wrap("lora", model, kind)
    assert {name.rpartition(".")[0] for name in adapter.heads} == HEADS.get(kind, set())


@pytest.mark.parametrize("kind", EXPECTED)
def test_presets_tell_queries_from_contexts_and_outputs_from_inputs(kind):
    model, _ = build(kind)
    for match in find_targets(model, LoRAConfig(preset=PRESET[kind]), ffn=True):
        crossing = re.search(r"crossattention|visual_attention", match.name)
        assert (match.target.input == "context") == bool(crossing and match.name.endswith(("key", "value")))
        is_output = match.name.endswith(("fc2", "output.dense")) and not match.name.endswith("attention.output.dense")
        assert (match.target.placement == "output") == is_output
        assert match.target.projections == (3 if match.name.endswith("qkv") else 1)
        if match.name.startswith(("vision_model", "lxmert.encoder.r_layers")) or ".visn_" in match.name:
            assert match.target.modality == "vision"


@pytest.mark.parametrize(
    ("preset", "patterns"),
    [
        ("cross", [BLIP_TEXT[1], BLIP_DECODER[1]]),
        ("paper", [*BLIP_VISION, *BLIP_TEXT, *BLIP_DECODER]),
        *(
            (
                released,
                [
                    *("vision_model.encoder.layers.*.self_attn.{qkv,projection}", *BLIP_MLP),
                    *(*BLIP_TEXT, *BLIP_DECODER),
                ],
            )
            for released in ("blip-retrieval", "blip-vqa", "blip-video")
        ),
    ],
)
def test_presets_of_aurora(preset, patterns):
    model, _ = build("blip_vqa")
    assert {match.name for match in find_targets(model, LoRAConfig(preset=preset))} == names(patterns, model)


def test_generic_presets():
    """The names of BERT, ViT and timm."""
    import transformers as hf

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bert = hf.BertModel(hf.BertConfig(**sizes, vocab_size=30))
        vit = hf.ViTModel(hf.ViTConfig(**sizes, image_size=32, patch_size=16))
    found = {match.name for match in find_targets(bert, LoRAConfig(preset="bert"), ffn=True)}
    assert found == names([f"encoder.layer.*.{ATT}", "encoder.layer.*.{intermediate,output}.dense"], bert)
    attention = ["layers.*.attention.{q,k,v}_proj", f"encoder.layer.*.attention.attention.{QKV}"]  # of 5.x, of 4.x
    ffn = ["layers.*.mlp.{fc1,fc2}", "encoder.layer.*.{intermediate,output}.dense"]
    found = {match.name for match in find_targets(vit, LoRAConfig(preset="vit"), ffn=True)}
    assert len(found) == 10 and found == names(attention + ffn, vit)
    block = {"attn": nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})}
    block["mlp"] = nn.ModuleDict({"fc1": nn.Linear(8, 32), "fc2": nn.Linear(32, 8)})
    timm = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict(block)]), "head": nn.Linear(8, 2)})
    found = {match.name: match.target for match in find_targets(timm, LoRAConfig(preset="vit"), ffn=True)}
    assert set(found) == {"blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"}
    assert found["blocks.0.attn.qkv"].projections == 3 and found["blocks.0.mlp.fc2"].placement == "output"


def classifier(kind: str) -> nn.Module:
    import transformers as hf

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "vit":
        return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=32, patch_size=16))
    if kind == "clip":
        return hf.CLIPForImageClassification(build("clip")[0].config)
    if kind == "timm":
        block = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(8, 24)})})
        return nn.ModuleDict({"blocks": nn.ModuleList([block]), "head": nn.Linear(8, 2)})
    return getattr(hf, kind)(hf.BertConfig(**sizes, vocab_size=30))


@pytest.mark.parametrize(
    ("kind", "preset", "heads"),
    [
        ("BertForSequenceClassification", "bert", {"classifier"}),
        ("BertForTokenClassification", "bert", {"classifier"}),
        ("BertForQuestionAnswering", "bert", {"qa_outputs"}),
        ("vit", "vit", {"classifier"}),
        ("timm", "vit", {"head"}),
        ("clip", "clip", {"classifier"}),
    ],
)
def test_heads_of_tasks_train(kind, preset, heads):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = LoRA.wrap(classifier(kind), LoRAConfig(preset=preset))
    assert {name.rpartition(".")[0] for name in adapter.heads} == heads


@pytest.mark.parametrize(
    ("name", "labels", "count"),
    [
        ("ViltForImageAndTextRetrieval", 2, 768 + 1),
        ("ViltForQuestionAnswering", 3129, 768 * 1536 + 1536 + 2 * 1536 + 1536 * 3129 + 3129),
    ],
)
def test_heads_of_vilt_are_those_that_moil_trains(name, labels, count):
    """Without the pooler, which its authors freeze."""
    import transformers as hf

    with torch.device("meta"):
        model = getattr(hf, name)(hf.ViltConfig(num_labels=labels))
    assert LoRA.wrap(model, LoRAConfig(preset="vilt")).num_parameters("head") == count


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("BertForSequenceClassification", {"targets": ["query"]}, "classifier"),
        ("BertForSequenceClassification", {"targets": ["query"], "modules_to_save": []}, None),
        ("BertForSequenceClassification", {"targets": ["query"], "modules_to_save": ["classifier"]}, None),
        ("BertModel", {"targets": ["query"]}, None),
        ("BertForMaskedLM", {"targets": ["query"]}, None),
        ("timm", {"targets": ["qkv"]}, "head"),
    ],
)
def test_a_head_that_stays_frozen_is_named(kind, options, told):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LoRA.wrap(classifier(kind), LoRAConfig(**options))
    said = [warning for warning in caught if "modules_to_save" in str(warning.message)]
    assert [str(each.message).split()[1] for each in said] == ([f"{told}:"] if told else [])
    assert all(each.filename == __file__ for each in said)


@pytest.mark.parametrize(("count", "told"), [(5, "4: frozen"), (7, "4 and 2 more: frozen")])
def test_many_frozen_heads_are_counted(count, told, monkeypatch):
    monkeypatch.setattr(heads, "_frozen_heads", lambda model: [f"head{i}" for i in range(count)])
    with pytest.warns(UserWarning, match=rf"head3, head{told}"):
        LoRA.wrap(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(targets=["0"]))


def test_what_from_pretrained_made_anew_is_named(tmp_path):
    """Where transformers marks what it has loaded (5 does), a classifier with values is not taken for a new one."""
    import transformers as hf

    def said(model) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            LoRA.wrap(model, LoRAConfig(targets=["query"]))
        return [str(each.message) for each in caught if "modules_to_save" in str(each.message)]

    model = classifier("BertForSequenceClassification")
    model.bert.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "tuned")
    (told,) = said(hf.BertForSequenceClassification.from_pretrained(tmp_path / "base"))
    assert told.startswith("modules_to_save: classifier: frozen")
    if int(hf.__version__.partition(".")[0]) >= 5:
        assert said(hf.BertForSequenceClassification.from_pretrained(tmp_path / "tuned")) == []
        (told,) = said(hf.BertForMaskedLM.from_pretrained(tmp_path / "base"))
        assert "cls.predictions" in told


@pytest.mark.parametrize(
    ("kind", "preset", "expected"),
    [
        ("clip", "blip-retrieval", r"crossattention.*itm_head"),
        ("blip_retrieval", "lxmert", "visual_attention"),
        ("bridgetower", "lxmert", "x_layers"),
    ],
)
def test_a_preset_that_fits_in_part_is_refused(kind, preset, expected):
    model, _ = build(kind)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"^preset: '{preset}' is for another model: it expects .*{expected}"):
        LoRA.wrap(model, LoRAConfig(preset=preset))
    assert_unchanged(model, before)


def test_every_preset_is_a_set_of_expressions():
    for preset in PRESETS.values():
        for target in (*preset.targets, *preset.ffn, *preset.outputs):
            re.compile(target.pattern)
