"""Checkpoints of peft that LoRA.from_peft refuses, by name and with the model untouched, and LoRA's own options."""

import json

import pytest
import torch
from adapter_cases import assert_unchanged, snapshot, wrap
from adapter_models import build, output
from safetensors.torch import load_file, save_file
from torch import nn

from peft_kernels.adapters import LoRA, LoRAConfig
from peft_kernels.adapters.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from peft_kernels.adapters.lora_files import _KNOWN, _PLAIN

peft = pytest.importorskip("peft")

LAYER = "vilt.encoder.layer.1.attention.attention.query"
STORED = f"base_model.model.{LAYER}"


def write(folder, model=None, **options):
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["query"], **options}
    model = build("vilt_vqa")[0] if model is None else model
    peft.get_peft_model(model, peft.LoraConfig(**options)).save_pretrained(folder)


def refused(folder, error, match, model=None):
    model = build("vilt_vqa")[0] if model is None else model
    before = snapshot(model)
    with pytest.raises(error, match=match):
        LoRA.from_peft(model, folder)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' is not supported"),
        ({"target_modules": ["query", "word_embeddings"]}, r"embeddings.lora_embedding_[AB] is not part of a LoRA"),
        ({"target_modules": ["query", "projection"]}, r"projection.lora_[AB].weight is not part of a LoRA"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=.* is not supported"),
        ({"target_parameters": ["classifier.0.weight"]}, "target_parameters=.* is not supported"),
    ],
)
def test_kinds_that_are_no_lora_of_linear_layers(options, match, tmp_path):
    write(tmp_path, **options)
    refused(tmp_path, ValueError, rf"{CONFIG_FILE}: .*{match}")


def test_every_option_of_peft_is_judged(tmp_path):
    """What peft leaves at its default is known or empty; an option that is new, and used, is refused."""
    write(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert all(name in _KNOWN or config[name] in _PLAIN.get(name, (None, False, [], {})) for name in config)
    LoRA.from_peft(build("vilt_vqa")[0], tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, "use_something": {"new": 1}}))
    refused(tmp_path, ValueError, rf"{CONFIG_FILE}: use_something=.* is not supported; merge it with peft")


def test_what_a_file_leaves_out_is_as_in_peft(tmp_path):
    write(tmp_path, lora_alpha=peft.LoraConfig().lora_alpha)
    whole = LoRA.from_peft(build("vilt_vqa")[0], tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["query"]}))
    short = LoRA.from_peft(build("vilt_vqa")[0], tmp_path)
    assert short.config == whole.config and short.config.dropout == 0 and short.config.alpha == 8
    assert [layer.scale for layer in short.layers.values()] == [2.0] * len(whole.layers)


@pytest.mark.parametrize("read", [LoRA.from_peft, LoRA.from_pretrained])
def test_pickles_and_hubs_are_never_read(read, tmp_path):
    write(tmp_path)
    (tmp_path / WEIGHTS_FILE).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=rf"{WEIGHTS_FILE}: no such file. adapter_model.bin is there, but pick"):
        read(build("vilt_vqa")[0], tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such folder. A local one is read; .*snapshot_download"):
        read(build("vilt_vqa")[0], "someone/of-a-hub")


ENTRIES = [
    ("peft_type", "IA3", ValueError, "expected peft_type 'LORA', got 'IA3'"),
    ("r", 5, ValueError, r"r, rank_pattern: 5 for .*, whose lora_A.weight has rank 4"),
    ("r", "4", ValueError, "r, rank_pattern: 4 for"),
    ("lora_alpha", None, TypeError, "lora_alpha: expected a number"),
    ("lora_alpha", 1e300, ValueError, "lora_alpha: expected a number up to .* where float32 overflows"),
    ("lora_alpha", float("nan"), ValueError, "lora_alpha: expected a finite number"),
    ("lora_dropout", 1.0, ValueError, "lora_dropout: expected a probability"),
    ("lora_dropout", "0.1", TypeError, "lora_dropout: expected a number"),
    ("use_rslora", "yes", TypeError, "use_rslora: expected True or False"),
    ("alpha_pattern", {"(": 2}, ValueError, r"alpha_pattern: '\(' is not a regular expression"),
    ("alpha_pattern", {"query": "2"}, TypeError, r"alpha_pattern\['query'\]: expected a number"),
    ("alpha_pattern", ["query"], TypeError, "alpha_pattern: expected a dictionary"),
    ("rank_pattern", {"query": 3}, ValueError, "r, rank_pattern: 3 for"),
]


@pytest.mark.parametrize(("key", "value", "error", "match"), ENTRIES, ids=range(len(ENTRIES)))
def test_wrong_entries(key, value, error, match, tmp_path):
    write(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, key: value}))
    refused(tmp_path, error, rf"{CONFIG_FILE}: .*{match}")


TENSORS = [
    (lambda t: {n: v for n, v in t.items() if n != f"{STORED}.lora_B.weight"}, rf"{LAYER}.up is missing"),
    (lambda t: {**t, f"{STORED}.lora_A.weight": torch.zeros(4, 17)}, rf"{LAYER}.down has shape \(4, 17\), expected"),
    (lambda t: {**t, f"{STORED}.lora_A.weight": torch.zeros(0, 16)}, r"r, rank_pattern: 4 for .* has rank 0"),
    (lambda t: {**t, f"{STORED}.lora_B.weight": torch.full((16, 4), torch.nan)}, r"lora_B.weight holds values"),
    (lambda t: {**t, f"{STORED}.lora_A.weight": torch.zeros(4, 16).int()}, r"down has dtype torch.int32"),
    (lambda t: {**t, f"{STORED}.lora_magnitude_vector": torch.zeros(16)}, r"magnitude_vector is not part of a LoRA"),
    (lambda t: {**t, f"{STORED}.lora_B.bias": torch.zeros(16)}, r"lora_B.bias is not part of a LoRA"),
    (lambda t: {**t, "base_model.model.classifier.0.bias": torch.zeros(32)}, r"classifier.0.bias is of no adapter"),
    (lambda t: {**t, "base_model.model.nothing.weight": torch.zeros(2)}, r"nothing.weight is of no adapter"),
    (lambda t: {**t, "base_model.model.scale": torch.zeros(2)}, r"scale is of no adapter"),
    (lambda t: {}, r"holds no lora_A.weight"),
]


@pytest.mark.parametrize(("change", "match"), TENSORS, ids=range(len(TENSORS)))
def test_wrong_tensors(change, match, tmp_path):
    write(tmp_path)
    save_file(change(load_file(tmp_path / WEIGHTS_FILE)), tmp_path / WEIGHTS_FILE)
    refused(tmp_path, ValueError, rf"({CONFIG_FILE}|{WEIGHTS_FILE}): .*{match}")


def test_another_model(tmp_path):
    write(tmp_path)
    refused(tmp_path, ValueError, r"^model: has no nn.Linear named vilt\.", build("visualbert")[0])
    with pytest.raises(ValueError, match=r"^model: is on the meta device"):
        LoRA.from_peft(build("vilt_vqa")[0].to("meta"), tmp_path)


def test_options_of_our_own(tmp_path):
    base, batch = build("vilt_vqa")
    write(tmp_path, lora_dropout=0.2)
    adapter = LoRA.from_peft(base, tmp_path, dropout=0.0, backend="torch")
    assert adapter.config.dropout == 0.0 and adapter.config.backend == "torch"
    assert torch.equal(output(base.train(), batch), output(base, batch))
    with pytest.raises(TypeError, match="rank"):  # which the file alone says
        LoRA.from_peft(build("vilt_vqa")[0], tmp_path, rank=3)


# ---- LoRA's configuration -------------------------------------------------------------------------------------------


def test_ranks_and_scales():
    config = LoRAConfig(targets="x", rank=4, alpha=6, rank_pattern={"a": 9}, scale_pattern={"b": 0.1})
    assert (config.layer("x"), config.layer("a"), config.layer("b")) == ((4, 1.5), (9, 6 / 9), (4, 0.1))
    assert LoRAConfig(targets="x", rank=4, alpha=6, rslora=True, rank_pattern={"a": 9}).layer("a") == (9, 2.0)


def test_the_commonest_rank_is_written_and_the_others_as_patterns(tmp_path):
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in "abc"})
    wrap("lora", model, targets=["a", "b", "c"], rank=4, rank_pattern={"a": 3}).export_lora(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"^a": 3}


def test_scales_are_exact_in_float64():
    """A float32 0.1 is off by 1e-9."""
    linear = nn.Linear(4, 4, dtype=torch.float64)
    adapter = wrap("lora", nn.Sequential(linear), targets=["0"], rank=1, alpha=0.1)
    layer, x = adapter.layers["0"], torch.randn(3, 4, dtype=torch.float64)
    nn.init.normal_(layer.up)
    expected = linear(x) + 0.1 * (x @ layer.down.T @ layer.up.T)
    torch.testing.assert_close(layer(x), expected, rtol=1e-15, atol=1e-15)
    assert adapter.model.float().get_submodule("0").scale.dtype == torch.float32


def test_patterns_must_mean_a_layer():
    model, _ = build("vilt_vqa")
    before = snapshot(model)
    for name in ("rank_pattern", "alpha_pattern", "scale_pattern"):
        with pytest.raises(ValueError, match=rf"^{name}: 'querry' gets no adapter; nearest: vilt.*query"):
            wrap("lora", model, "vilt_vqa", **{name: {"querry": 2}})
    assert_unchanged(model, before)


def test_patterns_mean_what_they_mean_in_peft():
    """By a whole name, by the end of one, or by an expression for that; the first that matches counts."""
    ranks = {"layer.1.attention.attention.query": 2, "value": 5, r"layer\.\d.attention.attention.(query|key)": 3}
    alphas = {r"layer.\d.attention.attention.value": 3, "key": 7}
    options = {"r": 4, "lora_alpha": 6, "rank_pattern": ranks, "alpha_pattern": alphas}
    theirs = peft.get_peft_model(
        build("vilt_vqa")[0], peft.LoraConfig(target_modules=["query", "key", "value"], **options)
    )
    ours = wrap("lora", build("vilt_vqa")[0], "vilt_vqa", rank=4, alpha=6, rank_pattern=ranks, alpha_pattern=alphas)
    for name, layer in ours.layers.items():
        stock = theirs.get_submodule(f"base_model.model.{name}")
        assert (layer.rank, layer.scale.item()) == (stock.r["default"], pytest.approx(stock.scaling["default"])), name


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_an_lm_head_that_was_resized(tied, tmp_path):
    """peft saves embeddings that were resized, with the adapter, and loads them into the base."""
    import transformers as hf

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

    def language_model():
        torch.manual_seed(1)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, vocab_size=40, tie_word_embeddings=tied))
        model.resize_token_embeddings(44)
        return model.eval()

    theirs = peft.get_peft_model(
        language_model(), peft.LoraConfig(target_modules=["lm_head", "q_proj"], r=4, init_lora_weights=False)
    )
    with torch.no_grad():  # as if they had been trained elsewhere
        theirs.base_model.model.lm_head.base_layer.weight.mul_(2)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = language_model()
    adapter = LoRA.from_peft(model, tmp_path)
    assert set(adapter.layers) == {"lm_head", "model.layers.0.self_attn.q_proj"} and adapter.heads == []
    ids = torch.arange(5)[None]
    again = peft.PeftModel.from_pretrained(language_model(), tmp_path).eval()
    torch.testing.assert_close(model(ids).logits, again(ids).logits)
    torch.testing.assert_close(model(ids).logits, theirs.eval()(ids).logits)
    assert not model.get_input_embeddings().weight.requires_grad
    smaller = language_model()
    smaller.resize_token_embeddings(42)
    before = snapshot(smaller)
    with pytest.raises(ValueError, match=r"^model: expected .*weight of shape \(44, 16\), .*resize_token_embeddings"):
        LoRA.from_peft(smaller, tmp_path)
    assert_unchanged(smaller, before)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_inits_are_pefts(init):
    """The same distribution of A as peft's, by its mean square; B starts at zero."""
    torch.manual_seed(0)
    ours = wrap("lora", nn.Sequential(nn.Linear(512, 512)), targets=["0"], rank=64, init=init).layers["0"]
    options = {"r": 64, "target_modules": ["0"], "init_lora_weights": True if init == "kaiming" else init}
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(512, 512)), peft.LoraConfig(**options)).base_model.model[0]
    theirs = theirs.lora_A["default"].weight
    assert ours.down.square().mean().item() == pytest.approx(theirs.square().mean().item(), rel=0.03)
    tail = 0.01 if init == "kaiming" else 0.3
    assert ours.down.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=tail)
    assert not ours.up.any()


def test_made_in_inference_mode_it_still_trains():
    model, batch = build("vilt_vqa")
    with torch.inference_mode():
        adapter = wrap("lora", model, "vilt_vqa")
    output(model, batch).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters("adapter"))
