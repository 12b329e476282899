"""Adapters merged, copied, pickled, on the meta device and on other backends: the same function, or a refusal."""

import copy
import io
import pickle

import pytest
import torch
from adapter_cases import MERGING, METHODS, adapted, assert_unchanged, snapshot, stir, wrap
from adapter_models import MODELS, build, output
from torch import nn

from peft_kernels.backend import status
from peft_kernels.layers.adapted_linear import AdaptedLinear

ALL = [(method, kind) for method in MERGING for kind in MODELS]
SOME = [(method, kind) for method in MERGING for kind in ("blip_retrieval", "vilt_vqa")]


@pytest.mark.parametrize(("method", "kind"), ALL)
def test_merged_equals_unmerged_and_bits_come_back(method, kind):
    adapter, batch = adapted(method, kind, torch.float64)
    model = adapter.model
    y, before = output(model, batch), snapshot(model)  # the first forward takes off what watches it
    assert not adapter.merged
    adapter.merge()
    assert adapter.merged and all(layer.merged for layer in adapter.layers.values())
    assert any(not torch.equal(layer.weight, before[1][f"{name}.weight"]) for name, layer in adapter.layers.items())
    torch.testing.assert_close(output(model, batch), y, rtol=1e-11, atol=1e-11)
    adapter.unmerge()
    assert_unchanged(model, before)
    assert torch.equal(output(model, batch), y)
    with pytest.raises(ValueError, match=r"^unmerge: the model is not merged"):
        adapter.unmerge()


@pytest.mark.parametrize(("method", "kind"), SOME)
def test_removed_while_merged_the_model_keeps_the_sums(method, kind):
    adapter, batch = adapted(method, kind, torch.float64)
    y = output(adapter.model, batch)
    adapter.merge("cpu")
    model = adapter.remove()
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    torch.testing.assert_close(output(model, batch), y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", MERGING)
def test_one_failing_layer_leaves_all_unmerged(method, monkeypatch):
    model, _ = build("vilt_vqa")
    adapter = wrap(method, model, "vilt_vqa")
    stir(adapter)
    before = snapshot(model)
    third = list(adapter.layers.values())[2]

    def fail(keep_on=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(third, "merge", fail)
    with pytest.raises(KeyboardInterrupt):
        adapter.merge()
    monkeypatch.undo()
    assert not adapter.merged
    assert_unchanged(model, before)


class Shared(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.query, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        if how == "weight":
            self.other.weight = self.query.weight
        elif how == "bias":
            self.other.bias = self.query.bias
        elif how == "embedding":
            self.words = nn.Embedding(8, 8)
            self.words.weight = self.query.weight
        else:
            self.other.weight.data = self.query.weight.data


@pytest.mark.parametrize("method", MERGING)
@pytest.mark.parametrize("how", ["weight", "bias", "embedding", "memory"])
def test_shared_weights_are_not_merged(method, how):
    model = Shared(how)
    adapter = wrap(method, model, targets=["query"])
    stir(adapter)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^merge: the (weight|bias) of query is shared with (other|words)\."):
        adapter.merge()
    assert_unchanged(model, before)


# ---- copies and devices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "kind"), SOME)
@pytest.mark.parametrize("merged", [False, True])
def test_copies_stand_on_their_own(method, kind, merged):
    adapter, batch = adapted(method, kind)
    y = output(adapter.model, batch)
    if merged:
        adapter.merge()
    shown = output(adapter.model, batch)
    stored = io.BytesIO()
    torch.save(adapter, stored)
    stored.seek(0)
    for other in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter)), torch.load(stored, weights_only=False)):
        assert torch.equal(output(other.model, batch), shown)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in adapter.parameters()}
        assert [name for name, _ in other.named_parameters()] == [name for name, _ in adapter.named_parameters()]
        if merged:
            other.unmerge()
            assert torch.equal(output(other.model, batch), y)
        stir(other, seed=2)
        assert not torch.equal(output(other.model, batch), y)
        other.remove()
        assert torch.equal(output(adapter.model, batch), shown)


@pytest.mark.parametrize("method", METHODS)
def test_on_the_meta_device(method, tmp_path):
    with torch.device("meta"):
        model, _ = build("vilt_vqa")
    adapter = wrap(method, model, "vilt_vqa")
    real = wrap(method, build("vilt_vqa")[0], "vilt_vqa")
    assert adapter.num_parameters() == real.num_parameters()
    assert all(p.is_meta for p in adapter.parameters())
    with pytest.raises(ValueError, match=r"^save_pretrained: the model is on the meta device"):
        adapter.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^state: a tensor on the meta device"):
        adapter.load_state_dict(real.state_dict())
    assert list(tmp_path.iterdir()) == []
    real.save_pretrained(tmp_path)
    with torch.device("meta"):
        model, _ = build("vilt_vqa")
    with pytest.raises(ValueError, match=r"^model: is on the meta device"):
        type(real).from_pretrained(model, tmp_path)


@pytest.mark.parametrize("method", MERGING)
@pytest.mark.parametrize("kind", ["blip_retrieval", "vilt_vqa"])
def test_backends_agree(method, kind):
    """The interpreted Triton kernels, where tests run so, and torch."""
    if torch.cuda.is_available() or status()["triton"]:
        pytest.skip("needs TRITON_INTERPRET=1 and no GPU")
    adapter, batch = adapted(method, kind, backend="triton")
    plain, _ = adapted(method, kind, backend="torch")
    assert {choice.name for choice in adapter.explain().values()} == {"triton"}
    ours, theirs = output(adapter.model, batch), output(plain.model, batch)
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
