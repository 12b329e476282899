"""A model that goes past adapted layers is told of, by their names, in the first forward."""

import copy
import pickle
import warnings

import pytest
import torch
from adapter_models import build, output
from torch import Tensor, nn
from vlmo_cases import Attention, Vlmo, vlmo

from peft_kernels import LoRA, LoRAConfig


class Reader(nn.Module):
    """Reads one weight, calls the other layer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"read": nn.Linear(4, 4), "called": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["called"](nn.functional.linear(x, self.inner["read"].weight))


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def reader() -> tuple[LoRA, nn.Sequential]:
    model = nn.Sequential(Reader(), Reader())
    return LoRA.wrap(model, LoRAConfig(targets=["read", "called"], rank=2)), model


SAID = r"^0.inner.read: the Reader that holds it reads the weight and does not call it: .* reads_weight=True$"


def test_the_first_forward_names_what_it_went_past():
    _, model = reader()
    with pytest.warns(UserWarning) as caught:
        model(torch.randn(2, 4))
    assert [str(w.message).partition(":")[0] for w in caught] == ["0.inner.read", "1.inner.read"]
    assert hooks(model) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 4))  # once is enough


def test_parts_of_a_model_that_run_alone_are_told_of_too():
    _, model = reader()
    with pytest.warns(UserWarning, match=SAID):
        model[0](torch.randn(2, 4))
    assert hooks(model[0]) == 0 and hooks(model[1]) > 0


def test_attention_of_the_vlmo_kind(monkeypatch):
    """Its q_bias is known, and refused; what has other names is told of."""

    class Renamed(Attention):
        def __setattr__(self, name, value):
            super().__setattr__({"q_bias": "query_bias"}.get(name, name), value)

        def __getattr__(self, name):
            return super().__getattr__({"q_bias": "query_bias"}.get(name, name))

    model, batch = vlmo()
    for block in model.transformer.blocks:
        block.attn.register_parameter("query_bias", block.attn._parameters.pop("q_bias"))
        block.attn.__class__ = Renamed
    monkeypatch.setattr("peft_kernels.adapters.targets._adds_biases_itself", lambda *_: False)
    LoRA.wrap(model, LoRAConfig(targets=["qkv"], rank=2))
    with pytest.warns(UserWarning, match=r"transformer.blocks.\d.attn.qkv: the Renamed that holds it") as caught:
        model.train()(**batch)
    assert len(caught) == 3 and isinstance(model, Vlmo)


@pytest.mark.parametrize("kind", ["blip_retrieval", "vilt_vqa", "lxmert", "clip"])
def test_models_that_call_their_layers_are_told_nothing(kind):
    """Nor of those that a forward does not need; modules that did not run keep waiting, as cross-attention for text."""
    model, batch = build(kind)
    LoRA.wrap(model, LoRAConfig(targets="all-linear", rank=2))
    assert hooks(model) > 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*reads the weight and does not call.*")
        if kind == "blip_retrieval":
            output(model, {**batch, "use_itm_head": False})
            assert hooks(model) > 0
        output(model, batch)
    if kind != "clip":
        assert hooks(model) == 0


def test_removed_and_copied():
    lora, model = reader()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.warns(UserWarning, match=SAID):
            other(torch.randn(2, 4))
        assert hooks(other) == 0
    assert hooks(model) == 2 * 2
    lora.remove()
    assert hooks(model) == 0


def test_a_forward_that_fails_tells_nothing_yet():
    lora, model = reader()
    kinds = [type(layer) for layer in lora.layers.values()]
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(2, 5))
    assert [type(layer) for layer in lora.layers.values()] == kinds and hooks(model) == 2 * 2
    with pytest.warns(UserWarning, match=SAID):
        model(torch.randn(2, 4))
    assert [type(layer) for layer in lora.layers.values()] == kinds


def test_inside_a_compiled_graph_nothing_breaks():
    _, model = reader()
    x = torch.randn(2, 4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), compiled(x))
    with pytest.warns(UserWarning, match=SAID):
        model(x)
