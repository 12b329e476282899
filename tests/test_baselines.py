"""UniAdapter and full tuning, the plain baselines: their formula, what they train, and that every method learns."""

import warnings

import pytest
import torch
from adapter_cases import METHODS, adapted, assert_unchanged, snapshot, stir, wrap
from adapter_models import build, loss, output
from torch import nn

from peft_kernels.adapters import FullTuning, FullTuningConfig, UniAdapter, UniAdapterConfig


@pytest.mark.parametrize("kind", ["blip_retrieval", "vilt_vqa"])
@pytest.mark.parametrize("method", ["lora", "uniadapter", "full"])
def test_ten_steps_lower_the_loss(method, kind):
    model, batch = build(kind)
    adapter = wrap(method, model, kind)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(adapter.param_groups(1e-3))
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        value = loss(model.train(), batch)
        value.backward()
        if len(losses) == 1:  # what starts at zero has moved: gradients reach everything
            # ITM alone trains neither of the projections, and no method the position 0 of a table
            unused = {"vision_proj", "text_proj", "logit_scale", "embeddings"}
            silent = [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.any()]
            assert all(any(part in name for part in unused) for name in silent), silent
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


# ---- UniAdapter -----------------------------------------------------------------------------------------------------


def test_uniadapters_formula():
    """y + 0.1 (relu(y Dᵀ + d) Uᵀ + u), with D of the depth and U of the depth's modality."""
    adapter, _ = adapted("uniadapter", "blip_vqa", torch.float64)
    bottlenecks = dict(adapter.model.uniadapter.items())
    assert set(bottlenecks) == {"0x16", "1x16"}
    modalities = {
        "vision_model.encoder.layers.N.self_attn.projection": "vision",
        "vision_model.encoder.layers.N.mlp.fc2": "vision",
        "text_encoder.encoder.layer.N.attention.output.dense": "text",
        "text_encoder.encoder.layer.N.output.dense": "text",
        "text_encoder.encoder.layer.N.crossattention.output.dense": "cross",
        "text_decoder.bert.encoder.layer.N.attention.output.dense": "text",
        "text_decoder.bert.encoder.layer.N.output.dense": "text",
        "text_decoder.bert.encoder.layer.N.crossattention.output.dense": "cross",
    }
    assert set(adapter.layers) == {name.replace("N", str(depth)) for name in modalities for depth in (0, 1)}
    for pattern, modality in modalities.items():
        for depth in (0, 1):
            layer, own = adapter.layers[pattern.replace("N", str(depth))], bottlenecks[f"{depth}x16"]
            x = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
            y = x @ layer.weight.T + layer.bias
            inner = (y @ own.down.T + own.down_bias).clamp(min=0)
            expected = y + 0.1 * (inner @ own.up[modality].T + own.up_bias[modality])
            torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
            assert not torch.allclose(expected, y, rtol=1e-3)


def test_uniadapters_size_is_the_papers():
    """12 depths · (1 down + 3 up) · 768 · 512 = 18.9 M weights, and the biases."""
    import transformers as hf

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = hf.BlipForImageTextRetrieval(hf.BlipConfig(vision_config={"hidden_size": 768}))
    adapter = UniAdapter.wrap(model, UniAdapterConfig(preset="blip", rank=512))
    assert len(adapter.layers) == 12 * (2 + 3)
    assert adapter.num_parameters("adapter") == 12 * (4 * 768 * 512 + 512 + 3 * 768)


def test_widths_and_depths_that_differ_share_nothing():
    model, batch = build("blip_retrieval", vision=32)
    adapter = wrap("uniadapter", model, "blip_retrieval")
    shapes = {name: tuple(each.down.shape) for name, each in model.uniadapter.items()}
    assert shapes == {"0x32": (3, 32), "1x32": (3, 32), "0x16": (3, 16), "1x16": (3, 16)}
    assert set(model.uniadapter["0x32"].up) == {"vision"} and set(model.uniadapter["0x16"].up) == {"text", "cross"}
    stir(adapter)
    output(model, batch)


def test_without_uniadapter_the_model_trains_as_before():
    model, _ = build("vilt_vqa")
    assert all(p.requires_grad for p in wrap("uniadapter", model, "vilt_vqa").remove().parameters())


def test_uniadapter_on_named_layers_and_in_half_precision():
    model, batch = build("lxmert", torch.bfloat16)
    y = output(model, batch)
    config = UniAdapterConfig(targets=["output.dense"], rank=2, adapter_dtype="float32", scale=1)
    adapter = UniAdapter.wrap(model, config)
    assert torch.equal(output(model, batch), y)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    stir(adapter)
    assert output(model, batch).dtype == torch.bfloat16 and not torch.equal(output(model, batch), y)


@pytest.mark.parametrize("action", ["merge", "export_lora"])
@pytest.mark.parametrize("method", ["uniadapter", "full"])
def test_neither_is_a_change_of_linear_weights(method, action, tmp_path):
    adapter, _ = adapted(method, "vilt_vqa")
    before = snapshot(adapter.model)
    with pytest.raises(ValueError, match=r"no update of a weight|no (adapted )?linear layer"):
        getattr(adapter, action)(*[tmp_path] * (action == "export_lora"))
    assert not adapter.merged and list(tmp_path.iterdir()) == []
    assert_unchanged(adapter.model, before)


def test_a_preset_that_does_not_know_where_layers_end():
    with pytest.raises(ValueError, match=r"^preset: expected .* knows where layers end: vilt, blip, vlmo; got 'clip'"):
        UniAdapterConfig(preset="clip")
    with pytest.raises(ValueError, match=r"^preset, targets"):
        UniAdapterConfig()


# ---- full tuning ----------------------------------------------------------------------------------------------------


def test_everything_trains_or_what_is_named():
    model, _ = build("blip_vqa")
    model.requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    adapter = FullTuning.wrap(model)
    assert adapter.heads == [name for name, _ in adapter.named_parameters("head")] and set(adapter.heads) == set(names)
    assert all(p.requires_grad for p in model.parameters())
    assert adapter.num_parameters() == sum(p.numel() for p in model.parameters())
    adapter.remove()
    assert not any(p.requires_grad for p in model.parameters())
    part = FullTuning.wrap(model, FullTuningConfig(modules_to_save=["text_encoder", "post_layernorm.bias"]))
    expected = [n for n in names if n.startswith("text_encoder.") or n == "vision_model.post_layernorm.bias"]
    assert part.heads == sorted(expected, key=part.heads.index) and len(part.heads) == len(expected)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [n for n in names if n in set(expected)]


def test_tied_weights_are_written_once(tmp_path):
    from safetensors import safe_open

    adapter, batch = adapted("full", "blip_vqa")
    adapter.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "text_decoder.bert.embeddings.word_embeddings.weight" in names
    assert "text_decoder.cls.predictions.decoder.weight" not in names
    model = FullTuning.from_pretrained(build("blip_vqa", seed=9)[0], tmp_path).model
    assert torch.equal(output(model, batch), output(adapter.model, batch))


def test_full_tuning_has_no_adapters():
    for options in ({"preset": "blip"}, {"targets": ["query"]}, {"adapter_dtype": "float32"}):
        with pytest.raises(ValueError, match=rf"^{next(iter(options))}: full tuning has no adapters"):
            FullTuningConfig(**options)
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("codes", nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"codes is of torch.int8 and cannot train"):
        FullTuning.wrap(model)
    assert_unchanged(model, before)


def test_every_method_has_an_own_name():
    assert {cls.method: cls for cls, _, _ in METHODS.values()}.keys() == METHODS.keys()
