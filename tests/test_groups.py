"""Layers that read one tensor run as one call: what they compute, when they do not, and what users see of it."""

import copy
import functools
import gc
import pickle
import threading
import weakref

import pytest
import torch
from adapter_models import PRESET, build, loss
from group_cases import Attention, D, calls_of, equal, gradients, make
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_kernels import Aurora, AuroraConfig, LoRA, LoRAConfig, MoIL, MoILConfig, explain
from peft_kernels.layers.group import PATIENCE, LinearGroup


@pytest.fixture
def calls(monkeypatch):
    return calls_of(monkeypatch)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["lora", "aurora", "moil", "peft"])
def test_a_group_gives_what_its_layers_give_one_by_one(kind, dropout, calls):
    """The same bits but for sums over projections. Elsewhere what is scaled rounds in another order: Aurora's core is
    multiplied into B first, and PEFT's scale into z."""
    model, alone = make(kind, dropout), make(kind, dropout, group=False)
    for seed in range(3):
        found, expected = gradients(model, seed), gradients(alone, seed)
        assert found.keys() == expected.keys() and len(found) > 4
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-13, msg=name)
            if kind in ("lora", "moil") and name != "x":
                assert torch.equal(found[name], expected[name]), name
    # `output` reads another tensor; MoIL gives a key without a bias a transform of its own
    together = 2 if kind == "moil" else 3
    assert calls == {"together": [together] * 3, "alone": (4 - together) * 3 + 4 * 3}


def test_only_what_reads_one_tensor_is_together(calls):
    """Cross-attention's keys and values are; its query reads another tensor, and nothing is computed for nothing."""
    model = make("lora", crossing=True)
    gradients(model)
    assert calls == {"together": [2], "alone": 2}
    told = {name: choice.reason for name, choice in explain(model).items()}
    assert told["crossattention.key"].endswith("one call with value")
    assert "no neighbour reads the same tensor" in told["crossattention.query"]
    assert "its name is not one of layers that read one tensor" in told["crossattention.output"]


def test_off_by_an_option(calls, tmp_path):
    model, alone = make("lora"), make("lora", group=False)
    gradients(alone)
    assert calls == {"together": [], "alone": 4}
    assert all("as the configuration asks" in choice.reason for choice in explain(alone).values())
    wrapped, other = (small(group=group) for group in (True, False))
    wrapped.save_pretrained(tmp_path / "a")
    other.save_pretrained(tmp_path / "b")
    assert wrapped.state_dict().keys() == other.state_dict().keys()
    for file in ("adapter_config.json", "adapter_model.safetensors"):  # how it runs is not what it is
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    for group in (True, False):
        base = small(group).remove()
        back = LoRA.from_pretrained(base, tmp_path / "a", group=group)
        assert back.config.group is group is (back.layers["key"].group is not None)
    assert model.state_dict().keys() == alone.state_dict().keys()


def small(group: bool) -> LoRA:
    torch.manual_seed(0)
    return LoRA.wrap(Attention(), LoRAConfig(targets=["key", "value"], group=group))


@pytest.mark.parametrize("used", [("query",), ("query", "value"), ("value",)])
def test_outputs_that_nothing_uses_cost_no_gradient(used):
    model, alone = make("lora", 0.2), make("lora", 0.2, group=False)
    equal(gradients(model, used=used), gradients(alone, used=used))


@pytest.mark.filterwarnings("ignore")  # torch warns that sizes are tensors then
def test_torch_jit_traces_layers_one_by_one(calls):
    model, x = make("lora").requires_grad_(False), torch.randn(2, 5, D, dtype=torch.float64)
    traced = torch.jit.trace(model, x, check_trace=False)
    assert calls["together"] == []
    equal(*({str(place): y for place, y in enumerate(run(x))} for run in (traced, model)))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_region_draws_its_masks_again(use_reentrant):
    model, alone = make("lora", 0.3), make("lora", 0.3, group=False)
    run = functools.partial(checkpoint, use_reentrant=use_reentrant)
    for seed in range(2):
        equal(gradients(model, seed, run), gradients(alone, seed))
    group = model.query.group[0]
    assert group.not_recomputed == 0 and not group.dissolved


def test_no_group_dissolves_between_a_forward_and_its_recomputation(calls):
    """After PATIENCE passes of the query alone it is time; but a region is still to be recomputed, with its masks."""
    model = make("lora", 0.3)
    group, x = model.query.group[0], torch.randn(2, 5, 8, dtype=torch.float64)

    def waste():
        for _ in range(PATIENCE + 2):
            model.query(x)

    def run(model, x):
        ys = checkpoint(model, x, use_reentrant=False)
        waste()
        assert group.wasted > PATIENCE and not group.dissolved
        return ys

    equal(gradients(model, run=run), gradients(make("lora", 0.3, group=False)))
    assert group.not_recomputed == 0
    waste()
    assert group.dissolved


def test_a_group_whose_members_read_apart_dissolves(calls):
    model = make("lora")
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    alone = make("lora", group=False)
    for _ in range(PATIENCE + 2):
        for layer, other in zip(model.children(), alone.children()):
            own = x.clone()
            assert torch.equal(layer(own), other(own))
    assert model.query.group[0].dissolved
    assert "by itself, since key, value read other tensors" in explain(model)["query"].reason
    calls["together"].clear()
    gradients(model)
    assert calls["together"] == []


def test_one_whole_pass_forgives_those_that_were_cut_short(calls):
    model, x = make("lora"), torch.randn(2, 5, 8, dtype=torch.float64)
    for _ in range(2 * PATIENCE):
        model.query(x)
        model(x)
        model(x)
    assert not model.query.group[0].dissolved


def test_a_member_called_twice_begins_another_pass(calls):
    model, alone = make("lora", 0.2), make("lora", 0.2, group=False)
    results = []
    for each in (model, alone):
        x = torch.linspace(-1, 1, 40, dtype=torch.float64).view(5, 8).requires_grad_()
        torch.manual_seed(3)
        first, again, key = each.query(x), each.query(x), each.key(x)
        first.sum().backward()  # its graph is its own
        (again.sum() + key.square().sum()).backward()
        results.append((first, x.grad.isfinite().all()))
    assert calls["together"] == [3, 3] and torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("what", ["x", "weight", "down", "replaced"])
def test_what_changes_in_place_between_members_is_seen(what):
    model, alone = make("lora"), make("lora", group=False)
    results = []
    for each in (model, alone):
        x = torch.linspace(-1, 1, 40, dtype=torch.float64).view(5, 8)
        query = each.query(x)
        with torch.no_grad():
            if what == "x":
                x.mul_(2)
            elif what == "replaced":
                each.key.weight = nn.Parameter(each.key.weight * 2, requires_grad=False)
            else:
                getattr(each.key, what).mul_(2)
        results.append((query, each.key(x), each.value(x)))
    for one, other in zip(*results):
        assert torch.equal(one, other)


@pytest.mark.parametrize("how", ["merged", "training", "dtype", "half trained"])
def test_members_that_differ_run_by_themselves(how):
    model, alone = make("lora", 0.2), make("lora", 0.2, group=False)
    for each in (model, alone):
        if how == "merged":
            each.key.merge()
        elif how == "training":
            each.key.eval()
        elif how == "dtype":
            each.key.float()
        else:
            each.key.up.requires_grad_(False)
    if how == "dtype":
        x = torch.randn(5, 8, dtype=torch.float64)
        torch.manual_seed(0)
        query = model.query(x)
        torch.manual_seed(0)
        assert torch.equal(query, alone.query(x))
        return
    for seed in range(2):
        equal(gradients(model, seed), gradients(alone, seed))


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "autocast", "threads"])
def test_modes(mode, calls):
    model, alone = make("lora").eval(), make("lora", group=False).eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    if mode == "autocast":
        model, alone, x = model.float(), alone.float(), x.float()
    around = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "threads": torch.no_grad,
    }[mode]

    def run():
        with around():
            found.append((model(x.clone()), alone(x.clone())))

    found = []
    threads = [threading.Thread(target=run) for _ in range(4 if mode == "threads" else 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in found:
        for one, other in zip(ours, theirs):
            assert torch.equal(one, other)
    if mode in ("no_grad", "autocast"):
        assert calls["together"] == [3]


def test_interleaved_passes():
    """Two inputs go through the members in turns, as a pipeline's do."""
    model, alone = make("lora"), make("lora", group=False)
    xs = [torch.randn(5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    found = [[layer(x) for layer in each.children() for x in xs] for each in (model, alone)]
    for one, other in zip(*found):
        assert torch.equal(one, other)
    grads = [torch.autograd.grad(sum(y.square().sum() for y in ys), xs) for ys in found]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_separate_backwards_as_of_layers_that_share():
    model = make("lora")
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    query, key, value, _ = model(x)
    query.sum().backward(retain_graph=True)
    (key.sum() + value.sum()).backward()
    query = model.query(x)
    query.sum().backward()  # frees the graph that the others would join
    model.key(x).sum().backward()


def test_models_may_write_into_an_output():
    """As q *= scale does; the others' outputs stay what they are."""
    model, alone = make("lora"), make("lora", group=False)
    results = []
    for each in (model, alone):
        x = torch.linspace(-1, 1, 40, dtype=torch.float64).view(5, 8).requires_grad_()
        query, key, value, _ = each(x)
        query *= 3
        key += 1
        (query.square().sum() + key.square().sum() + value.square().sum()).backward()
        results.append((query.detach(), key.detach(), value.detach(), x.grad))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_nothing_is_left_behind():
    model = make("lora")
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    inner = x * 2
    ref = weakref.ref(inner)
    ys = model(inner)
    del ys, inner
    gc.collect()
    assert ref() is None


def test_copies_and_pickles_have_groups_of_their_own(calls):
    model = make("lora")
    gradients(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.query.group[0] is twin.key.group[0] is not model.query.group[0]
        assert twin.query.group[0].layers[0] is twin.query
        calls["together"].clear()
        equal(gradients(twin), gradients(model))
        assert calls["together"] == [3, 3]


def test_what_is_cast_moved_or_loaded_stays_together(calls):
    model = make("lora").float().double()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    for layer in (model.query, model.key, model.value):
        layer.requires_grad_(True)
    gradients(model)
    assert calls["together"] == [3]


@pytest.mark.parametrize("kind", ["lora", "aurora", "peft"])
def test_stacked_weights(kind):
    """One memory and one product; the same Parameters, keys, values and bytes."""
    model, alone = make(kind, 0.2, stack=True), make(kind, 0.2, stack=False)
    first, second = (weights_of(each)[:2] for each in (model, alone))
    assert first[0].untyped_storage().data_ptr() == first[1].untyped_storage().data_ptr()
    assert second[0].untyped_storage().data_ptr() != second[1].untyped_storage().data_ptr()
    assert explain(model)["query"].reason.endswith("one call with key, value, weights stacked")
    for seed in range(2):
        equal(gradients(model, seed), gradients(alone, seed))
    assert model.state_dict().keys() == alone.state_dict().keys()
    assert all(torch.equal(t, alone.state_dict()[name]) for name, t in model.state_dict().items())


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [layer.reads()["weight"] for layer in (model.query, model.key, model.value)]


@pytest.mark.parametrize("how", ["moved", "one cast", "assigned", "copied", "replaced"])
def test_weights_that_left_the_stack_are_multiplied_one_by_one(how):
    model, alone = make("lora", stack=True), make("lora")
    for each in (model, alone):
        if how == "moved":
            each.float().double()
        elif how == "one cast":
            each.key.weight.data = each.key.weight.data.clone()
        elif how == "assigned":
            each.load_state_dict({k: v.clone() for k, v in each.state_dict().items()}, assign=True)
            each.output.requires_grad_(False)
        elif how == "replaced":
            each.key.weight = nn.Parameter(each.key.weight.detach() * 2, requires_grad=False)
    model = copy.deepcopy(model) if how == "copied" else model
    assert not model.query.group[0].stacked and "stacked" not in explain(model)["query"].reason
    equal(gradients(model), gradients(alone))


def test_a_tied_weight_is_not_stacked():
    model = Attention()
    model.other = nn.Linear(8, 8, dtype=torch.float64)
    model.other.weight = model.key.weight
    wrapped = LoRA.wrap(model, LoRAConfig(targets=["query", "key", "value"], stack=True))
    assert not wrapped.layers["query"].group[0].stacked
    assert model.other.weight is model.key.weight


def test_a_stacked_model_is_saved_byte_by_byte_as_any(tmp_path):
    from transformers import BertConfig, BertModel

    files = []
    for stack in (False, True):
        torch.manual_seed(0)
        sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
        model = BertModel(BertConfig(vocab_size=20, **sizes))
        adapter = LoRA.wrap(model, LoRAConfig(preset="bert", stack=stack))
        assert any(layer.group[0].stacked for layer in adapter.layers.values()) is stack
        adapter.save_pretrained(tmp_path / f"adapter {stack}")
        adapter.remove().save_pretrained(tmp_path / f"base {stack}")
        names = (f"adapter {stack}/adapter_model.safetensors", f"base {stack}/model.safetensors")
        files.append([(tmp_path / name).read_bytes() for name in names])
    assert files[0] == files[1]


def test_taken_off_with_the_adapter():
    wrapped = LoRA.wrap(Attention(), LoRAConfig(targets=["query", "key", "value"]))
    model = wrapped.remove()
    assert all(type(layer) is nn.Linear for layer in model.children()) and explain(model) == {}


def test_a_group_has_two_to_four_members():
    layers = [make("lora").query for _ in range(5)]
    for count in (1, 5):
        with pytest.raises(ValueError, match=r"^layers: expected 2 to 4"):
            LinearGroup(layers[:count], ["query"] * count)


@pytest.mark.parametrize("kind", ["vilt_vqa", "blip_retrieval", "clip", "lxmert", "bridgetower"])
@pytest.mark.parametrize("method", [LoRA, Aurora, MoIL])
def test_every_group_of_a_models_preset_is_used(kind, method, calls):
    """No pass is cut short, and the model's loss and gradients are those without groups."""
    configs = {LoRA: LoRAConfig, Aurora: AuroraConfig, MoIL: MoILConfig}
    found = []
    for wanted in (True, False):
        model, batch = build(kind, torch.float64)
        torch.manual_seed(1)
        options = {"dropout": 0.0} if method is Aurora else {}  # CLIP calls q, k, v in another order than it has them
        adapter = method.wrap(model, configs[method](preset=PRESET[kind], group=wanted, **options))
        with torch.no_grad():
            for parameter in adapter.parameters("adapter"):
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.train(method is not MoIL)
        torch.manual_seed(2)
        value = loss(model, batch)
        value.backward()
        found.append([value.detach(), *(p.grad for p in adapter.parameters() if p.grad is not None)])
        groups = {layer.group[0] for layer in adapter.layers.values() if layer.group is not None}
        assert bool(groups) is wanted and bool(calls["together"]) is wanted
        assert not any(group.wasted or group._here.current is not None for group in groups)
        calls["together"].clear()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
