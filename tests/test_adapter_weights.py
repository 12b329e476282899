"""What an adapter cannot read or write is named: quantised weights, layers that the model has replaced, no folder."""

import sys
import types
import warnings

import pytest
import torch
from adapter_cases import ACTIONS, MERGING, METHODS, Small, act, assert_unchanged, small, snapshot, stir, wrap
from adapter_models import blip_config, hf
from torch import nn

from peft_kernels.layers import LowRankLinear

# ---- other forms of weights -----------------------------------------------------------------------------------------


class Quantized(torch.Tensor):
    """As torchao's: a subclass that stores integers and says it is of float32."""

    @staticmethod
    def __new__(cls, dense):
        return torch.Tensor._make_wrapper_subclass(cls, dense.shape, dtype=dense.dtype, device=dense.device)

    def __init__(self, dense):
        self.stored = dense.detach().mul(10).to(torch.int8)

    def __repr__(self):
        return "Quantized()"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].stored)
        raise NotImplementedError(f"{function}")


class Packed(nn.Parameter):
    """As bitsandbytes': a Parameter like any other, but for what is in it."""


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    for kind, name in ((Quantized, "quantlib.tensors.eight"), (Packed, "bitsandbytes.nn.modules")):
        monkeypatch.setattr(kind, "__module__", name)
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


def quantize(model):
    for linear in (model.query, model.value):
        linear.weight = nn.Parameter(Quantized(linear.weight), requires_grad=False)


FORMS = {
    "a Quantized of quantlib; dequantize the model": Quantized,
    "a Packed of bitsandbytes; dequantize the model": lambda w: Packed(w.detach().byte(), requires_grad=False),
    "layout torch.sparse_coo; make it dense": lambda w: w.detach().to_sparse(),
    "layout torch._mkldnn; make it dense": lambda w: w.detach().to_mkldnn(),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_weights_are_refused_by_their_library(form):
    model, linear = Small(), nn.Linear(32, 32)
    for each in (model.query, model.value, linear):
        each._parameters["weight"] = FORMS[form](each.weight)
    with pytest.raises(TypeError, match=rf"^linear: weight: expected a dense Tensor, got {form}"):
        LowRankLinear(linear, 4)
    for method in METHODS.keys() - {"full"}:
        with pytest.raises(TypeError, match=rf"^targets: query: linear: weight: expected a dense Tensor, got {form}"):
            small(method, model)
    assert type(model.query) is nn.Linear


def test_a_parameter_of_a_class_of_ones_own_is_as_good_as_any():
    class Tagged(nn.Parameter):
        pass

    model = Small()
    model.query.weight = Tagged(model.query.weight.detach())
    adapter = small("lora", model)
    model(torch.randn(2, 32)).sum().backward()
    adapter.merge()


@pytest.mark.parametrize("method", MERGING)
def test_quantised_after_wrapping(method, tmp_path):
    adapter = small(method)
    quantize(adapter.model)
    for action in ACTIONS:
        with pytest.raises(TypeError, match=rf"^{action}: query.weight: expected a dense Tensor, got a Quantized"):
            act(adapter, action, tmp_path)
    with pytest.raises(TypeError, match=r"^merge: weight: expected a dense Tensor, got a Quantized"):
        adapter.layers["query"].merge()
    if method == "moil":
        with pytest.raises(TypeError, match=r"^step: query.weight: expected a dense Tensor, got a Quantized"):
            adapter.step()
        assert adapter.steps == 0
    assert not adapter.merged and list(tmp_path.iterdir()) == []
    adapter = small(method)
    adapter.merge()
    quantize(adapter.model)  # what is deployed; the original bits would not fit into it
    with pytest.raises(TypeError, match=r"^unmerge: query.weight: expected a dense Tensor, got a Quantized"):
        adapter.unmerge()


@pytest.mark.parametrize("method", MERGING)
def test_torchao(method, tmp_path):
    ao = pytest.importorskip("torchao.quantization")
    model = Small()
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    with pytest.raises(TypeError, match=r"^targets: query: linear: weight: expected a dense Tensor, got torchao's \w+"):
        small(method, model)
    adapter = small(method)
    ao.quantize_(adapter.model, ao.Int8WeightOnlyConfig())
    for action in ACTIONS:
        with pytest.raises(TypeError, match=rf"^{action}: query.weight: expected a dense Tensor, got torchao's"):
            act(adapter, action, tmp_path)
    adapter = small(method)
    stir(adapter)
    adapter.merge()
    x = torch.randn(4, 32)
    y = adapter.model.eval()(x)
    ao.quantize_(adapter.remove(), ao.Int8WeightOnlyConfig())
    torch.testing.assert_close(adapter.model(x), y, rtol=0.1, atol=0.1)


# ---- layers that the model has replaced -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", MERGING)
def test_a_resized_lm_head_is_no_longer_adapted(method, tmp_path):
    model = hf.BlipForConditionalGeneration(blip_config())
    decoder = "text_decoder.cls.predictions.decoder"
    model.text_decoder.cls.predictions.decoder.weight = nn.Parameter(torch.randn(40, 16))  # not tied to the words
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    adapter = wrap(method, model.train(), targets=["decoder", "attention.self.query"])
    model.text_decoder.resize_token_embeddings(44)
    assert type(model.get_submodule(decoder)) is nn.Linear
    for action in ACTIONS:
        with pytest.raises(ValueError, match=rf"^{action}: {decoder} of the adapter is no longer in the model"):
            act(adapter, action, tmp_path)
    assert list(tmp_path.iterdir()) == [] and not adapter.merged
    with pytest.warns(UserWarning, match=rf": {decoder} of the adapter is no longer in the model") as told:
        if method == "moil":
            next(iter(adapter.layers.values())).live_weight.grad = torch.zeros(16, 16)
            adapter.step()
        adapter.print_trainable_parameters()
        adapter.param_groups(1e-3)
    assert len(told) == 1
    new = model.get_submodule(decoder)
    assert adapter.remove() is model and model.get_submodule(decoder) is new
    act(wrap(method, model, targets=["decoder"]), "save_pretrained", tmp_path)


@pytest.mark.parametrize(("method", "module"), [("aurora", "aurora"), ("moil", "moil")])
def test_shared_modules_that_are_no_longer_there(method, module, tmp_path):
    adapter = small(method)
    delattr(adapter.model, module)
    for action in ACTIONS:
        with pytest.raises(ValueError, match=rf"^{action}: {module} of the adapter is no longer in the model"):
            act(adapter, action, tmp_path)
    assert type(adapter.remove().query) is nn.Linear


def test_many_lost_layers_are_counted():
    adapter = wrap("lora", nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))), targets=r"\d")
    for i in range(5):
        adapter.model[i] = nn.Identity()
    with pytest.raises(ValueError, match=r"^merge: 0, 1, 2 and 2 more of the adapter are no longer in the model"):
        adapter.merge()


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_on", ["gpu", "meta", "cuda:99", 3.5, torch.device("meta")], ids=str)
def test_originals_are_kept_where_they_can_be(keep_on):
    adapter = small("lora")
    stir(adapter)
    before = snapshot(adapter.model)
    for merge in (adapter.merge, adapter.layers["value"].merge):
        with pytest.raises(ValueError, match=r"^keep_on: (expected a device of this machine or None|the meta dev)"):
            merge(keep_on)
    assert not adapter.merged
    assert_unchanged(adapter.model, before)


@pytest.mark.parametrize("state", [[1], [("a", torch.zeros(1))], None, 3], ids=str)
def test_a_state_is_a_dictionary(state):
    with pytest.raises(TypeError, match=r"^state: expected tensors by name, got (list|NoneType|int)"):
        small("lora").load_state_dict(state)


@pytest.mark.parametrize("method", MERGING)
@pytest.mark.parametrize("action", ["save_pretrained", "export_lora"])
def test_no_folder_is_not_the_current_one(method, action, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = small(method)
    with pytest.raises(ValueError, match=r"^folder: expected the path of a folder, got ''"):
        getattr(adapter, action)("")
    with pytest.raises(TypeError, match=r"^folder: expected a path, got NoneType"):
        getattr(adapter, action)(None)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_said_where_nothing_is_wrong(tmp_path):
    adapter = small("lora")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.print_trainable_parameters()
        adapter.save_pretrained(tmp_path)
