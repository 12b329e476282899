"""What LoRA, MoIL and Aurora have in common, on nine tiny models: wrapping, taking off, parameters, heads and state."""

import pytest
import torch
from adapter_cases import MERGING, METHODS, adapted, assert_unchanged, snapshot, stir, wrap
from adapter_models import MODELS, build, output
from torch import nn

from peft_kernels.adapters import LoRA, MoILConfig

ALL = [(method, kind) for method in MERGING for kind in MODELS]
SOME = [(method, kind) for method in MERGING for kind in ("blip_retrieval", "vilt_vqa")]


@pytest.fixture
def small():
    """Two attention-like layers and a head with running statistics."""
    blocks = nn.ModuleList(nn.ModuleDict({n: nn.Linear(8, 8) for n in ("query", "value")}) for _ in range(2))
    head = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False))
    return nn.ModuleDict({"blocks": blocks, "head": head})


# ---- wrapping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "kind"), ALL)
def test_wrapping_keeps_keys_tensors_and_output_and_remove_undoes_it(method, kind):
    model, batch = build(kind)
    model.get_parameter(next(iter(dict(model.named_parameters())))).requires_grad_(False)
    before, y, state = snapshot(model), output(model, batch), model.state_dict(keep_vars=True)
    adapter = wrap(method, model, kind)
    wrapped = model.state_dict(keep_vars=True)
    assert all(wrapped[name] is tensor for name, tensor in state.items())
    assert torch.equal(output(model, batch), y)
    assert adapter.layers and all(model.get_submodule(name) is layer for name, layer in adapter.layers.items())
    stir(adapter)
    assert not torch.allclose(output(model, batch), y, rtol=1e-3)
    with torch.no_grad():
        for name in adapter.heads:
            model.get_parameter(name).copy_(before[1][name])
    assert adapter.remove() is model
    assert_unchanged(model, before)
    assert torch.equal(output(model, batch), y)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("action", ["state_dict", "save_pretrained", "export_lora", "merge", "remove"])
def test_after_remove_nothing_is_done(method, action, tmp_path):
    adapter, _ = adapted(method, "vilt_vqa")
    adapter.save_pretrained(tmp_path)
    adapter.remove()
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=rf"^{action}|^export_lora: gates|was removed"):
        getattr(adapter, action)(*[tmp_path] * (action in ("save_pretrained", "export_lora")))
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}  # the last good save is whole


@pytest.mark.parametrize("method", METHODS)
def test_a_second_adapter_is_refused(method):
    adapter, _ = adapted("lora", "vilt_vqa")
    before = snapshot(adapter.model)
    with pytest.raises(ValueError, match=r"^model: has an adapter already"):
        wrap(method, adapter.model, "vilt_vqa")
    assert_unchanged(adapter.model, before)


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"^model: expected an nn.Module, got dict"):
        LoRA.wrap({})
    with pytest.raises(TypeError, match=r"^model: is an nn.Linear itself"):
        LoRA.wrap(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"^config: expected LoRAConfig, got MoILConfig"):
        LoRA.wrap(nn.Sequential(nn.Linear(2, 2)), MoILConfig(targets=["0"]))
    with pytest.raises(ValueError, match=r"^preset, targets"):
        LoRA.wrap(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("method", MERGING)
def test_a_tied_module_is_swapped_in_all_its_places(method):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = self.alias = nn.Linear(8, 8)
            self.inner = nn.ModuleDict({"query": self.query})

    model = Tied().eval()
    linear, keys = model.query, set(model.state_dict())
    adapter = wrap(method, model, targets=["query"])
    assert len(adapter.layers) == 1
    assert model.query is model.alias is model.inner["query"] is adapter.layers["query"]
    assert keys <= set(model.state_dict())
    adapter.merge()
    adapter.unmerge()
    adapter.remove()
    assert model.query is model.alias is model.inner["query"] is linear


@pytest.mark.parametrize("method", MERGING)
def test_hooks_of_a_swapped_linear_go_on(method, small):
    seen = []
    linear = small["blocks"][0]["query"]
    handle = linear.register_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
    linear.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    x = torch.randn(3, 8)
    expected = linear(x)
    adapter = wrap(method, small.eval(), targets=["query", "value"])
    assert torch.equal(small["blocks"][0]["query"](x), expected)
    assert seen == ["Linear", type(adapter.layers["blocks.0.query"]).__name__]
    handle.remove()
    small["blocks"][0]["query"](x)
    assert len(seen) == 2
    adapter.remove()
    assert torch.equal(small["blocks"][0]["query"](x), expected) and len(seen) == 2


# ---- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "kind"), ALL)
def test_each_trained_parameter_is_in_one_group(method, kind):
    model, _ = build(kind)
    base = {id(p) for p in model.parameters()}
    adapter = wrap(method, model, kind)
    named = dict(adapter.named_parameters())
    assert {id(p) for p in named.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(model.get_parameter(name) is p for name, p in named.items())
    kinds = {each: list(adapter.parameters(each)) for each in ("adapter", "live", "head")}
    assert sum(map(len, kinds.values())) == len(named) == len(set(map(id, named.values())))
    assert {id(p) for p in kinds["head"]} == {id(p) for p in named.values()} & base
    assert bool(kinds["live"]) == (method == "moil")
    assert adapter.num_parameters() == sum(p.numel() for p in model.parameters() if p.requires_grad)

    groups = adapter.param_groups(1e-3, adapter_lr=1e-2, adapter_eps=1e-12, weight_decay=0.1)
    placed = {id(p): group for group in groups for p in group["params"]}
    assert len(placed) == sum(len(group["params"]) for group in groups) == len(named)
    for name, p in named.items():
        group, is_adapter = placed[id(p)], id(p) in {id(q) for q in kinds["adapter"]}
        assert group["weight_decay"] == (0.1 if p.dim() > 1 else 0.0), name
        assert group["lr"] == (1e-2 if is_adapter else 1e-3), name
        assert group.get("eps") == (1e-12 if is_adapter else None), name
    torch.optim.AdamW(groups)
    assert {group["lr"] for group in adapter.param_groups(1e-3)} == {1e-3}
    with pytest.raises(ValueError, match=r"^kind: expected one of"):
        list(adapter.named_parameters("heads"))


def test_printed_numbers_are_right(small, capsys):
    adapter = wrap("lora", small, targets=["query"], modules_to_save=["head"])
    adapter.print_trainable_parameters()
    base = 4 * (64 + 8) + 36 + 8  # four linears; the head's linear and its one affine BatchNorm
    trained = 2 * 2 * 3 * 8 + 44
    line = f"trained: {trained} (adapter 96, head 44) of {base + 96} parameters, {100 * trained / (base + 96):.4f} %\n"
    assert capsys.readouterr().out == line
    assert repr(adapter).startswith("LoRA(2 layers, 140 trained, LoRAConfig(")


@pytest.mark.parametrize(("method", "kind"), SOME)
def test_explain_names_every_layer(method, kind):
    adapter, _ = adapted(method, kind)
    choices = adapter.explain()
    assert set(adapter.layers) <= set(choices)
    assert all(choice.name == "torch" and choice.reason for choice in choices.values())
    adapter.merge()
    assert all("merged" in adapter.explain()[name].reason for name in adapter.layers)


# ---- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", MERGING)
def test_a_head_trains_with_its_buffers(method, small):
    adapter = wrap(method, small, targets=["query", "value"], modules_to_save=["head"])
    assert adapter.heads == ["head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"]
    state = adapter.state_dict()
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        assert {f"head.1.{buffer}", f"head.2.{buffer}"} <= set(state)


def test_heads_by_module_parameter_or_part_of_a_name():
    model, _ = build("clip")
    adapter = wrap("lora", model, "clip", modules_to_save=["logit_scale", "vision_model.embeddings.class_embedding"])
    assert adapter.heads == ["logit_scale", "vision_model.embeddings.class_embedding"]
    extra = [name for name in adapter.state_dict() if not name.endswith((".down", ".up"))]
    assert extra == adapter.heads  # not the frozen neighbours in vision_model.embeddings
    model, _ = build("vilt_vqa")
    adapter = wrap("lora", model, "vilt_vqa", modules_to_save=["pooler", "pooler.dense", "classifier.0"])
    assert adapter.heads == [
        *("vilt.pooler.dense.weight", "vilt.pooler.dense.bias"),
        *("classifier.0.weight", "classifier.0.bias"),
    ]
    adapter.remove()
    assert wrap("lora", model, "vilt_vqa", modules_to_save=[]).heads == []


def test_a_tied_head_goes_by_its_first_name():
    model, _ = build("blip_vqa")
    decoder, words = model.text_decoder.cls.predictions.decoder, model.text_decoder.bert.embeddings.word_embeddings
    assert decoder.weight is words.weight
    adapter = wrap("lora", model, "blip_vqa", modules_to_save=["predictions.decoder"])
    assert words.weight.requires_grad
    assert len(adapter.heads) == 2 and adapter.heads[0].endswith("word_embeddings.weight")


@pytest.mark.parametrize(
    ("heads", "error", "match"),
    [
        (["pooller"], ValueError, r"^modules_to_save: 'pooller' holds no parameter of the model; nearest: .*pooler"),
        (["ooler"], ValueError, r"^modules_to_save: 'ooler' holds no parameter of the model; nearest: .*pooler"),
        (["attention"], ValueError, r"^modules_to_save: 'attention' holds vilt.*query, which gets an adapter"),
        (["query.bias"], ValueError, r"^modules_to_save: 'query.bias' holds vilt.*query, which gets an adapter"),
        (["counts"], TypeError, r"^modules_to_save: counts is of torch.uint8 and cannot train"),
        ("pooler", TypeError, r"^modules_to_save: expected names, got 'pooler'"),
        ([""], TypeError, r"^modules_to_save: expected names"),
    ],
)
def test_wrong_heads(heads, error, match):
    model, _ = build("vilt_vqa")
    model.register_parameter("counts", nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False))
    before = snapshot(model)
    with pytest.raises(error, match=match):
        wrap("lora", model, "vilt_vqa", modules_to_save=heads)
    assert_unchanged(model, before)


# ---- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "kind"), ALL)
def test_state_round_trip(method, kind):
    adapter, batch = adapted(method, kind)
    model, _ = build(kind)
    other = wrap(method, model, kind)
    state = adapter.state_dict()
    assert not any(tensor.requires_grad for tensor in state.values())
    assert set(state) <= set(adapter.model.state_dict())
    other.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    assert torch.equal(output(other.model, batch), output(adapter.model, batch))


def test_wrong_state_changes_nothing(small):
    adapter = wrap("lora", small, targets=["query"], modules_to_save=["head"])
    good = {name: tensor + 1 for name, tensor in adapter.state_dict().items()}
    name, before = "blocks.1.query.up", snapshot(small)
    for state, match in [
        ({n: t for n, t in good.items() if n != name}, rf"^state: {name} is missing"),
        ({**good, "other": torch.zeros(1)}, r"^state: other is not expected"),
        ({**good, name: torch.zeros(8, 4)}, rf"^state: {name} has shape \(8, 4\), expected \(8, 3\)"),
        ({**good, name: torch.zeros(8, 3, dtype=torch.int64)}, rf"^state: {name} has dtype torch.int64, expected"),
        ({**good, name: torch.zeros(8, 3, device="meta")}, r"^state: a tensor on the meta device"),
    ]:
        with pytest.raises(ValueError, match=match):
            adapter.load_state_dict(state)
    with pytest.raises(TypeError, match=r"^state: expected tensors"):
        adapter.load_state_dict({**good, name: [1.0]})
    assert_unchanged(small, before)
    adapter.merge()
    with pytest.raises(ValueError, match=r"^load_state_dict: the model is merged"):
        adapter.load_state_dict(good)
