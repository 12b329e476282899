"""What Aurora's layers share: parameters, with the papers' counts, dropout places, and one x U for each tensor."""

import copy
import functools
import gc
import weakref

import pytest
import torch
from adapter_models import hf, loss, output
from aurora_cases import RANK, Products, defined_weights, parameters_of, slots_of, wrapped
from torch.utils.checkpoint import checkpoint

from peft_kernels import Aurora, AuroraConfig

LAYERS, D = 12, 768
VISION, TEXT = "vision_model.encoder.layers", "text_encoder.encoder.layer"


@functools.cache
def base_model(kind: str):
    """BLIP-base's shapes, without memory."""
    with torch.device("meta"):
        return getattr(hf, kind)(hf.BlipConfig())


def adapter_count(kind: str = "BlipForImageTextRetrieval", **options) -> int:
    adapter = Aurora.wrap(base_model(kind), AuroraConfig(**options))
    count = adapter.num_parameters("adapter")
    assert count == sum(p.numel() for n, p in adapter.model.named_parameters() if "aurora" in n or "gated" in n)
    adapter.remove()
    return count


def test_counts_of_the_paper_and_of_the_released_code():
    rank = 64
    assert adapter_count(preset="paper") == 98_304 + 64 + 108 * 64 == 105_280
    released = {"core": "tucker", "gates": "additive"}
    assert adapter_count(preset="blip-retrieval", **released) == rank**3 + 1752 * rank + 36_864 == 411_136
    assert adapter_count(preset="blip-video", **released) == 411_136
    assert adapter_count("BlipForQuestionAnswering", preset="blip-vqa", **released) == 452_608
    assert adapter_count(preset="cross") == 98_304 + 64 + 36 * 64


def test_counts_by_sharing():
    vision, text, cross = 36, 36, 36  # slots of "paper"
    factors = 2 * D * 64
    assert adapter_count(preset="paper", sharing="modality") == 3 * (factors + 64) + (vision + text + cross) * 64
    assert adapter_count(preset="paper", sharing="none") == (12 + 36 + 36) * (factors + 64) + 108 * 64
    tucker = adapter_count(preset="blip-retrieval", core="tucker", sharing="modality")
    assert tucker == 3 * (factors + 64**3) + (144 + 36 + 36) * 64


def names(kind: str, preset: str) -> set[str]:
    adapter, _, _ = wrapped(kind, preset, torch.float32)
    return set(adapter.layers)


def stack(prefix: str, *ends: str) -> set[str]:
    return {f"{prefix}.{layer}.{end}" for layer in range(2) for end in ends}


def test_presets_adapt_what_the_method_names():
    self_attention = [f"attention.self.{m}" for m in ("query", "key", "value")]
    cross = [f"cross{each}" for each in self_attention]
    text = stack(TEXT, *self_attention, *cross)
    vision = stack(VISION, "self_attn.qkv", "self_attn.projection", "mlp.fc1", "mlp.fc2")
    assert names("blip_retrieval", "blip-retrieval") == names("blip_retrieval", "blip-video") == text | vision
    decoder = stack("text_decoder.bert.encoder.layer", *self_attention, *cross)
    assert names("blip_vqa", "blip-vqa") == text | vision | decoder
    assert names("blip_retrieval", "cross") == stack(TEXT, *cross)
    assert names("blip_retrieval", "paper") == text | stack(VISION, "self_attn.qkv")


@pytest.mark.parametrize("released", [False, True])
def test_released_freezes_text_proj(released):
    adapter, model, _ = wrapped(released=released, dtype=torch.float32)
    heads = {name.partition(".")[0] for name in adapter.heads}
    assert heads == {"vision_proj", "itm_head"} | (set() if released else {"text_proj"})
    assert model.text_proj.weight.requires_grad is not released
    asked, _, _ = wrapped(released=True, dtype=torch.float32, modules_to_save=["text_proj"])
    assert {name.partition(".")[0] for name in asked.heads} == {"text_proj"}


def modality(name: str) -> str:
    return "vision" if name.startswith("vision") else "cross" if "crossattention" in name else "text"


@pytest.mark.parametrize("sharing", ["global", "modality", "none"])
@pytest.mark.parametrize("core", ["cp", "tucker"])
def test_scopes_share_only_among_themselves(sharing, core):
    """A changed V of one scope changes its layers' updates, and no other's; each layer has its own rows of P."""
    adapter, model, batch = wrapped(sharing=sharing, core=core)
    scope = {"global": lambda _: "shared", "modality": modality, "none": lambda name: name.replace(".", "/")}[sharing]
    assert set(model.aurora) == {scope(name) for name in adapter.layers}
    before = {name: layer.delta_weight() for name, layer in adapter.layers.items()}
    changed = next(iter(model.aurora))
    with torch.no_grad():
        for up in model.aurora[changed].up.values():
            up.mul_(2)
    for name, layer in adapter.layers.items():
        factor = 2 if scope(name) == changed else 1
        torch.testing.assert_close(layer.delta_weight(), factor * before[name])
    places = {}
    for name in model.aurora:
        own = [layer for layer in adapter.layers if scope(layer) == name]
        places |= {layer: (name, first) for layer, first in slots_of(own).items()}
    loss(model, batch).backward()
    for name, (own, first) in places.items():
        row = parameters_of(model, own)["slots"].grad[first]
        assert row.abs().max() > 0, name
    last = list(adapter.layers)[-1]
    own, first = places[last]
    with torch.no_grad():
        before = {name: layer.delta_weight() for name, layer in adapter.layers.items()}
        parameters_of(model, own)["slots"][first] += 1
    assert {n for n, layer in adapter.layers.items() if not torch.equal(layer.delta_weight(), before[n])} == {last}


@pytest.mark.parametrize("preset", ["blip-retrieval", "blip-vqa"])
def test_dropout_by_modality_with_a_mask_for_each_projection(preset, monkeypatch):
    """On "core" in vision, O · R columns; on "rank" in text and cross-attention, I · R. In evaluation nowhere."""
    kind = "blip_vqa" if preset == "blip-vqa" else "blip_retrieval"
    adapter, model, batch = wrapped(kind, preset, torch.float32, dropout=0.3)
    count = Products(monkeypatch)
    loss(model, batch)
    assert all(rng is None for rng, _, _ in count.masks)
    model.train()
    count.masks.clear()
    called = []
    for name, layer in adapter.layers.items():
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
    loss(model, batch)
    assert set(called) == set(adapter.layers) and len(called) == len(count.masks)
    seen = []
    for name, (mask, p, place) in zip(called, count.masks):
        layer, vision = adapter.layers[name], name.startswith("vision")
        assert (p, place) == (0.3, "core" if vision else "rank"), name
        assert mask.shape[1] == RANK * (layer.out_blocks if vision else layer.in_blocks), name
        assert not any(mask.shape == other.shape and torch.equal(mask, other) for other in seen), name
        seen.append(mask)
    dropped = 1 - torch.cat([mask.flatten() for mask in seen]).float().mean()
    assert dropped.item() == pytest.approx(0.3, abs=0.03)


def test_a_dropped_layer_is_the_definition_with_its_mask(monkeypatch):
    """fc1 (vision) drops S in each of its 4 output blocks, a query drops z: seen on masks that were really drawn."""
    adapter, model, _ = wrapped(core="tucker", dropout=0.4)
    parameters, places = parameters_of(model), slots_of(list(adapter.layers))
    count = Products(monkeypatch)
    for name in (f"{VISION}.0.mlp.fc1", f"{TEXT}.0.attention.self.query"):
        layer = adapter.layers[name].train()
        x = torch.randn(40, 16, dtype=torch.float64)
        base, y = torch.nn.functional.linear(x, layer.weight, layer.bias), layer(x)
        drop = count.masks[-1][0].double() / (1 - count.masks[-1][1])
        U, V = parameters["down.16x16"].t(), parameters["up.16x16"]
        update = []
        for s in range(layer.out_blocks):
            K = torch.einsum("abc,c->ab", parameters["modes"], parameters["slots"][places[name] + s])
            if layer.out_blocks == 1:
                update.append((x @ U * drop) @ K @ V.t())
            else:
                update.append((x @ U @ K * drop[:, s * RANK : (s + 1) * RANK]) @ V.t())
        torch.testing.assert_close(y, base + torch.cat(update, 1), rtol=1e-12, atol=1e-12)


def shared_and_alone(sharing: str) -> tuple[int, int]:
    """Of two BLIP layers in each tower: q, k, v of a text layer are one product; keys and values of the image one in
    all; vision's four and cross-attention's queries read a tensor alone."""
    return {"global": (3, 8 + 2), "modality": (3, 8 + 2), "none": (0, 8 + 12)}[sharing]


@pytest.mark.parametrize("sharing", ["global", "modality", "none"])
@pytest.mark.parametrize("training", [False, True])
def test_one_product_for_each_tensor(sharing, training, monkeypatch):
    _, model, batch = wrapped(sharing=sharing, dtype=torch.float32)
    model.train(training)
    count = Products(monkeypatch)
    for grad in (training, False, training):
        with torch.set_grad_enabled(grad):
            output(model, batch)
        assert count.take() == shared_and_alone(sharing)


def test_captions_and_answers_share_too(monkeypatch):
    _, model, batch = wrapped("blip_vqa", "blip-vqa", torch.float32)
    count = Products(monkeypatch)
    model.train()
    loss(model, batch).backward()
    assert count.take() == (2 * 3, 8 + 2 * 2)  # the question's encoder and the answer's decoder, each 2 + 1
    with torch.inference_mode():  # counts no changes in place, so that nothing is shared, but fused
        model.eval().generate(batch["input_ids"], batch["pixel_values"], batch["attention_mask"], max_length=4)


def test_one_image_for_several_texts(monkeypatch):
    """Cached features: the text encoder runs over and over with them, trained in between, then they change in place."""
    adapter, model, _ = wrapped(core="tucker")
    optimizer = torch.optim.AdamW(adapter.parameters("adapter"), lr=0.05, fused=True)
    twin, text = copy.deepcopy(model), model.text_encoder
    image = torch.randn(3, 5, 16, dtype=torch.float64)
    count = Products(monkeypatch)
    for step in range(4):
        twin.load_state_dict(model.state_dict())
        ids = torch.randint(5, 40, (3, 7))
        y, z = (text(ids, encoder_hidden_states=image).last_hidden_state for _ in range(2))
        assert count.take()[0] == 2 * 3
        expected = twin.text_encoder(ids, encoder_hidden_states=image.clone()).last_hidden_state
        assert torch.equal(y, expected) and torch.equal(z, expected)
        optimizer.zero_grad()
        y.square().sum().backward()
        z.sum().backward()
        optimizer.step()
        image.mul_(1 + step)
        count.take()


@pytest.mark.parametrize("kind", ["blip_retrieval", "lxmert", "bridgetower"])
def test_a_forward_without_backward_leaves_nothing_behind(kind):
    """LXMERT's and BridgeTower's contexts change from layer to layer: most passes through them stay unfinished."""
    adapter, model, batch = wrapped(kind, "paper" if "blip" in kind else kind, torch.float32)
    seen = []
    for layer in adapter.layers.values():
        layer.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    result = model(**batch)
    assert sum(ref() is not None for ref in seen) > len(adapter.layers) / 2
    del result
    gc.collect()
    assert not any(ref() is not None for ref in seen)


def test_towers_have_graphs_of_their_own():
    """Run backward one after the other, as a model's that shares nothing."""
    _, model, batch = wrapped(core="tucker")
    towers = model.vision_model(batch["pixel_values"]), model.text_encoder(batch["input_ids"])
    for tower in towers:
        tower.last_hidden_state.square().sum().backward()


def gradients(model, adapter, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    loss(model, batch).backward()
    return {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", [{"core": "cp"}, {"core": "tucker", "gates": "additive"}, {"gates": "gated"}])
def test_checkpointing_changes_no_gradient(use_reentrant, options, monkeypatch):
    adapter, model, batch = wrapped(dropout=0.2, **options)
    model.train()
    for embeddings in (model.text_encoder.embeddings, model.vision_model.embeddings):  # reentrant regions need it
        embeddings.register_forward_hook(lambda _, args, out: out.requires_grad_())
    expected = gradients(model, adapter, batch)
    count = Products(monkeypatch)
    model._set_gradient_checkpointing(True, functools.partial(checkpoint, use_reentrant=use_reentrant))
    for _ in range(2):
        got = gradients(model, adapter, batch)
        assert expected.keys() == got.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-13, msg=name)
    region = 2 * 2  # two layers of text: q, k, v are one product, key and value another
    # `loss` runs the model twice and goes back once. Reentrant: the forward shares as it does without a graph
    assert count.take()[0] / 2 == (2 * 3 if use_reentrant else 2 * region) + region


def test_transformers_own_switch_works():
    """It also makes embeddings require gradients, which BLIP's text encoder then adds to in place: that is undone."""
    adapter, model, batch = wrapped(core="tucker", gates="additive")
    expected = gradients(model.train(), adapter, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
    got = gradients(model, adapter, batch)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-13, msg=name)


def test_compiled_gradients_are_the_eager_ones():
    adapter, model, _ = wrapped(core="tucker", gates="additive", dtype=torch.float32, layers=1)
    layer, mask = model.text_encoder.encoder.layer[0], torch.zeros(3, 1, 1, 7)
    x, image = torch.randn(3, 7, 16), torch.randn(3, 5, 16)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        y = run(x, image, attention_mask=mask)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in adapter.parameters("adapter") if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 5
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_backends_agree():
    adapter, model, batch = wrapped(dtype=torch.float32, core="tucker", gates="additive", backend="triton")
    other, twin, _ = wrapped(dtype=torch.float32, core="tucker", gates="additive")
    assert torch.equal(defined_weights(adapter)[f"{VISION}.0.mlp.fc2"], defined_weights(other)[f"{VISION}.0.mlp.fc2"])
    torch.testing.assert_close(output(model, batch), output(twin, batch), rtol=1e-4, atol=1e-5)
