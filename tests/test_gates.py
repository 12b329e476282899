"""Aurora's gates in BLIP's layers: the formulas on what the layer's parts gave, wherever and however it runs."""

import copy
import functools
import pickle
import threading

import pytest
import torch
from adapter_models import build, loss, output
from aurora_cases import RANK, wrapped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_kernels import Aurora, AuroraConfig
from peft_kernels.adapters import gates
from peft_kernels.adapters.gates import LayerGate

MODES = pytest.mark.parametrize("mode", ["additive", "gated"])
WIDTH = 16


def gated_layer(mode: str, **options) -> nn.Module:
    _, model, _ = wrapped(gates=mode, **options)
    return model.text_encoder.encoder.layer[1]


def inputs(batch: int = 3, positions: int = 7) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(batch, n, WIDTH, dtype=torch.float64, requires_grad=True) for n in (positions, 5))


def by_hand(layer: nn.Module, x: Tensor, image: Tensor, mask: Tensor | None, real: Tensor | None) -> Tensor:
    """The layer's parts run one by one, without its forward; then docs/method.md, section 4.

    real: (B, S), 1 for real tokens
    """
    gate = layer.gated_query
    a_self = layer.attention(x, attention_mask=mask)[0]
    a_cross = layer.crossattention(a_self, encoder_hidden_states=image)[0]
    h = layer.output.LayerNorm(layer.output.dense(layer.intermediate(a_cross)) + a_cross)
    if gate.mode == "additive":
        return h + 0.1 * (a_self * gate.gamma + gate.beta) + 0.1 * (a_cross * gate.cross_gamma + gate.cross_beta)
    moved = a_self * gate.gamma + gate.beta
    total = sum(moved[:, j] * (1 if real is None else real[:, j, None]) for j in range(moved.shape[1]))
    scores = torch.stack([(h[:, i] * total).sum(-1) for i in range(h.shape[1])], dim=1)
    shares = scores.exp() if real is None else scores.exp() * real
    g = (shares / shares.sum(1, keepdim=True))[..., None]
    return g * h + (1 - g) * moved


def masks() -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """(as the layer gets it, (B, S) of real tokens)"""
    real = torch.ones(3, 7, dtype=torch.float64)
    real[1, 5:] = real[2, 2:] = 0
    added = (1 - real)[:, None, None] * -10000.0
    few = real.clone()
    few[:] = real[1]
    return {
        "none": (None, None),
        "added": (added, real),
        "infinite": (torch.zeros_like(added).masked_fill(added < 0, -torch.inf), real),
        "one for all": (added[1:2], few),
        "pairs": (added.expand(3, 1, 7, 7).clone(), real),
    }


@MODES
@pytest.mark.parametrize("kind", masks())
def test_a_layer_is_the_definition_with_its_gradients(mode, kind):
    layer, (mask, real), (x, image) = gated_layer(mode), masks()[kind], inputs()
    wanted = [x, image, *layer.gated_query.parameters()]
    results = []
    for y in (layer(x, image, attention_mask=mask), by_hand(layer, x, image, mask, real)):
        results.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    assert len(results[0]) == (7 if mode == "additive" else 5)
    for got, expected in zip(*results):
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@MODES
def test_a_text_gives_the_same_alone_and_beside_longer_ones(mode):
    _, model, batch = wrapped(gates=mode)
    batch = {name: tensor[1:2] for name, tensor in batch.items()}  # two of its seven tokens are padding
    alone = {**batch, **{name: batch[name][:, :5] for name in ("input_ids", "attention_mask")}}
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * 2]
    torch.testing.assert_close(output(model, batch), output(model, alone), rtol=1e-10, atol=1e-12)


@MODES
def test_positional_mask_and_boolean_keys(mode):
    layer, (mask, _), (x, image) = gated_layer(mode), masks()["added"], inputs()
    assert torch.equal(layer(x, image, mask), layer(x, image, attention_mask=mask))


@MODES
def test_text_alone_is_unchanged(mode):
    """Bit for bit, before and after multimodal calls, after one that failed, and after a checkpointed backward."""
    adapter, model, batch = wrapped(gates=mode, dtype=torch.float32)
    _, plain, _ = wrapped(dtype=torch.float32)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "gated_query" not in k})
    alone = {**batch, "use_itm_head": False}
    expected = plain(**alone).itm_score
    assert torch.equal(model(**alone).itm_score, expected)
    assert not torch.equal(model(**batch).itm_score, plain(**batch).itm_score)
    assert torch.equal(model(**alone).itm_score, expected)
    layer = model.text_encoder.encoder.layer[0]
    stop = layer.intermediate.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        model(**batch)
    stop.remove()
    assert torch.equal(model(**alone).itm_score, expected)
    for p in adapter.parameters():  # gates that save nothing: the recomputation stops before it comes to them
        p.requires_grad_(False)
    model.aurora.requires_grad_(True)
    model._set_gradient_checkpointing(True, functools.partial(checkpoint, use_reentrant=False))
    loss(model.train(), batch).backward()
    assert torch.equal(model.eval()(**alone).itm_score, expected)


@MODES
@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_copies_have_gates_of_their_own(mode, kind):
    _, model, batch = wrapped(gates=mode, dtype=torch.float32)
    before = output(model, batch)
    other = copy.deepcopy(model) if kind == "deepcopy" else pickle.loads(pickle.dumps(model))
    ours = [module for module in model.modules() if isinstance(module, LayerGate)]
    with torch.no_grad():
        for gate in ours:
            gate.beta.add_(1)
    assert torch.equal(output(other, batch), before) and not torch.equal(output(model, batch), before)
    loss(other, batch).backward()
    assert all(p.grad is None for gate in ours for p in gate.parameters())
    theirs = [module for module in other.modules() if isinstance(module, LayerGate)]
    assert all(p.grad is not None for gate in theirs for p in gate.parameters())


def test_a_copied_adapter_takes_off_its_own_gates():
    adapter, model, batch = wrapped(gates="additive", dtype=torch.float32)
    before = output(model, batch)
    other = copy.deepcopy(adapter)
    other.remove()
    assert torch.equal(output(model, batch), before)
    assert torch.equal(output(other.model, batch), output(build("blip_retrieval")[0], batch))


@MODES
def test_remove_leaves_nothing(mode):
    model, batch = build("blip_retrieval")
    expected, keys = output(model, batch), list(model.state_dict())
    adapter = Aurora.wrap(model, AuroraConfig(preset="blip-retrieval", rank=RANK, gates=mode, dropout=0.0))
    assert sum(isinstance(module, LayerGate) for module in model.modules()) == 2
    assert not torch.equal(output(model, batch), expected)
    adapter.remove()
    assert torch.equal(output(model, batch), expected) and list(model.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@MODES
def test_files_hold_the_gates(mode, tmp_path):
    adapter, model, batch = wrapped(gates=mode, dtype=torch.float32)
    adapter.save_pretrained(tmp_path)
    other, _ = build("blip_retrieval")
    loaded = Aurora.from_pretrained(other, tmp_path)
    assert torch.equal(output(other, batch), output(model, batch))
    names = {name for name, _ in loaded.named_parameters("adapter") if "gated_query" in name}
    assert len(names) == 2 * (4 if mode == "additive" else 2) and loaded.config.gates == mode


def test_start_values():
    """γ, β of standard deviation 2e-4; the γ of "gated" around 1."""
    torch.manual_seed(0)
    for mode, at in (("additive", 0), ("gated", 1)):
        gate = LayerGate(20_000, mode)
        for name, p in gate.named_parameters():
            centre = at if name == "gamma" else 0
            assert p.std().item() == pytest.approx(2e-4, rel=0.03) and abs(p.mean().item() - centre) < 1e-5, name


@pytest.mark.parametrize("kind", ["blip_vqa", "blip_captioning"])
def test_a_causal_decoder_takes_no_mixing_of_positions(kind):
    model, batch = build(kind)
    expected, keys = output(model, batch), list(model.state_dict())
    with pytest.raises(ValueError, match=r"^gates: 'gated' mixes positions, and text_decoder\.bert\.encoder\.layer\.0"):
        Aurora.wrap(model, AuroraConfig(preset="blip-vqa", rank=RANK, gates="gated"))
    assert list(model.state_dict()) == keys
    Aurora.wrap(model, AuroraConfig(preset="blip-vqa", rank=RANK, gates="additive"))
    assert not torch.equal(output(model, batch), expected)


@pytest.mark.parametrize("kind", ["blip_vqa", "blip_captioning"])
def test_generation_with_a_cache_is_the_one_without(kind):
    _, model, _ = wrapped(kind, "blip-vqa", gates="additive")
    inner = model.text_decoder
    states = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    ids = torch.randint(5, 40, (3, 6))
    options = {"encoder_hidden_states": states, "is_decoder": True}
    whole = inner(input_ids=ids, use_cache=False, **options).logits
    first = inner(input_ids=ids[:, :4], use_cache=True, **options)
    rest = inner(
        input_ids=ids[:, 4:],
        past_key_values=first.past_key_values,
        use_cache=True,
        attention_mask=torch.ones(3, 6),
        **options,
    )
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-9, atol=1e-10)


def test_where_gates_cannot_stand():
    for options in ({"preset": "vilt"}, {"targets": ["query"]}):
        with pytest.raises(ValueError, match=r"^gates: expected a preset that knows the layers"):
            AuroraConfig(gates="additive", **options)
    with pytest.raises(ValueError, match=r"^gates: expected one of"):
        AuroraConfig(preset="paper", gates="multiplied")
    model, _ = build("blip_retrieval")
    for layer in model.text_encoder.encoder.layer:
        layer.chunk_size_feed_forward = 2
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"^gates: .* in chunks"):
        Aurora.wrap(model, AuroraConfig(preset="paper", rank=RANK, gates="additive"))
    for layer in model.text_encoder.encoder.layer:
        layer.chunk_size_feed_forward = 0
        del layer.crossattention
    with pytest.raises(ValueError, match=r"^gates: the model has no layer with cross-attention"):
        Aurora.wrap(model, AuroraConfig(preset="paper", targets=["query"], rank=RANK, gates="additive"))
    assert [k for k in keys if "crossattention" not in k] == list(model.state_dict())


def test_parts_of_a_layer_called_alone():
    layer, (x, image) = gated_layer("additive"), inputs()
    vars(gates._running).clear()  # as in a new thread
    for _ in range(2):  # the second time after a whole layer
        layer.crossattention(x, encoder_hidden_states=image)
        y = layer.output(layer.intermediate(x), x)
        assert torch.equal(y, layer.output.LayerNorm(layer.output.dense(layer.intermediate(x)) + x))
        layer(x, image)


def test_threads_gate_their_own_layers():
    layer = gated_layer("additive", dtype=torch.float32).requires_grad_(False)
    wrong = []

    def run(seed: int):
        generator = torch.Generator().manual_seed(seed)
        x, image = (torch.randn(2, n, WIDTH, generator=generator) for n in (7, 5))
        with torch.no_grad():
            expected = by_hand(layer, x, image, None, None)
            for _ in range(50):
                wrong.extend([seed] * (not torch.allclose(layer(x, image), expected, atol=1e-5)))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


@MODES
def test_half_precision_and_autocast(mode):
    """Under autocast LayerNorms give float32, whatever the attention blocks computed in."""
    _, model, batch = wrapped(gates=mode, dtype=torch.float32)
    expected = output(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        got = output(model, batch)
        loss(model, batch).backward()
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.1)
    assert all(p.grad is not None for n, p in model.named_parameters() if "gated_query" in n)


@MODES
def test_backends_agree(mode):
    _, model, batch = wrapped(gates=mode, dtype=torch.float32, backend="triton", preset="cross", layers=1)
    _, other, _ = wrapped(gates=mode, dtype=torch.float32, preset="cross", layers=1)
    other.load_state_dict(model.state_dict())
    results = []
    for each in (model, other):
        loss(each, batch).backward()
        grads = [p.grad for n, p in each.named_parameters() if "gated_query" in n]
        results.append([output(each, batch), *grads])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
