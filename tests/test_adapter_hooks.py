"""Models that accelerate dispatches or offloads by hooks: wrapped before, they work or say what to do."""

import pytest
import torch
from adapter_cases import ACTIONS, MERGING, METHODS, Small, act, small, stir, wrap
from torch import nn

from peft_kernels.layers import LowRankLinear

accelerate = pytest.importorskip("accelerate")


def offload(model, folder):
    accelerate.cpu_offload(model, execution_device="cpu")


def offload_to_disk(model, folder):
    places = {name: "cpu" for name, _ in model.named_children()} | {"value": "disk"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder / "away"))


def dispatch(model, folder):
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def take_hooks_off(model):
    accelerate.hooks.remove_hook_from_submodules(model)


@pytest.mark.parametrize("hooks", [offload, offload_to_disk, dispatch])
@pytest.mark.parametrize("method", MERGING)
def test_a_model_with_hooks_is_wrapped_without_them(method, hooks, tmp_path):
    model, plain = Small(), small(method)
    small(method, Small()).save_pretrained(tmp_path / "saved")
    hooks(model, tmp_path)
    with pytest.raises(ValueError, match=r"^targets: query: linear: has a hook of accelerate, .*remove_hook_from_subm"):
        small(method, model)
    with pytest.raises(ValueError, match=r"has a hook of accelerate, .*remove_hook_from_submodules"):
        METHODS[method][0].from_pretrained(model, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"^linear: has a hook of accelerate, .*remove_hook_from_submodules"):
        LowRankLinear(model.query, 4)
    take_hooks_off(model)
    adapter = small(method, model)
    adapter.load_state_dict(plain.state_dict())
    x = torch.randn(2, 32)
    assert torch.equal(model.eval()(x), plain.model.eval()(x))


def test_a_block_that_is_offloaded_as_a_whole_is_not_wrapped():
    hooks = accelerate.hooks
    model = nn.Sequential(Small())
    hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook("cpu", offload=True, place_submodules=True))
    assert model[0].query.weight.is_meta and "_hf_hook" not in vars(model[0].query)
    with pytest.raises(ValueError, match=r"^model: 0.query.weight is offloaded by hooks of accelerate; .*remove_hook"):
        wrap("lora", model, targets=["query"])


@pytest.mark.parametrize("method", MERGING)
def test_dispatched_after_wrapping_it_trains_and_merges(method, tmp_path):
    adapter, plain, x = small(method), small(method), torch.randn(3, 32)
    stir(adapter)
    plain.load_state_dict(adapter.state_dict())
    dispatch(adapter.model, tmp_path)
    for each in (adapter, plain):
        optimizer = torch.optim.SGD(each.param_groups(0.1))
        for _ in range(2):
            optimizer.zero_grad()
            each.model.train()(x).square().sum().backward()
            if method == "moil":
                each.step()
            optimizer.step()
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in adapter.state_dict().items())
    assert torch.equal(adapter.model.eval()(x), plain.model.eval()(x))
    adapter.merge()
    adapter.unmerge()
    with pytest.raises(ValueError, match=r"^remove: query has a hook of accelerate; .*remove_hook_from_submodules"):
        adapter.remove()
    take_hooks_off(adapter.model)
    assert torch.equal(adapter.model(x), plain.model(x))
    assert type(adapter.remove().query) is nn.Linear


@pytest.mark.parametrize("hooks", [offload, offload_to_disk])
@pytest.mark.parametrize("method", MERGING)
def test_offloaded_after_wrapping_it_is_refused(method, hooks, tmp_path):
    adapter, x = small(method), torch.randn(3, 32)
    stir(adapter)
    y, state = adapter.model.eval()(x), adapter.state_dict()
    hooks(adapter.model, tmp_path)
    if method == "lora":
        assert torch.equal(adapter.model(x), y)  # evaluation needs no gradient
    own_factors = () if method == "aurora" else ("train",)
    trained = () if method == "aurora" and hooks is offload_to_disk else ("param_groups",)  # its factors stay here
    for action in (*ACTIONS, "remove", *own_factors, *trained):
        with pytest.raises(ValueError, match=rf"^{action}: .* hooks? of accelerate.*remove_hook_from_submodules"):
            if action == "train":
                adapter.model.train()
            elif action == "param_groups":
                adapter.param_groups(1e-3)
            else:
                act(adapter, action, tmp_path / "saved")
    if not trained:
        adapter.model.train()(x).square().sum().backward()
        assert all(p.grad is not None for p in adapter.parameters())
    if method == "moil":
        with pytest.raises(ValueError, match=r"^step: .* is offloaded by hooks of accelerate; .*remove_hook"):
            adapter.step()
        assert adapter.steps == 0
    assert not (tmp_path / "saved").exists()
    take_hooks_off(adapter.model)
    assert all(torch.equal(t, state[name]) for name, t in adapter.state_dict().items())
    assert torch.equal(adapter.model.eval()(x), y)
    adapter.model.train()
    adapter.merge()


@pytest.mark.parametrize("method", MERGING)
def test_a_model_merged_before_it_is_offloaded_stays_merged(method, tmp_path):
    adapter, x = small(method), torch.randn(3, 32)
    stir(adapter)
    adapter.merge()
    y = adapter.model.eval()(x)
    offload(adapter.model, tmp_path)
    assert torch.equal(adapter.model(x), y)
    with pytest.raises(ValueError, match=r"^unmerge: .* is offloaded by hooks of accelerate"):
        adapter.unmerge()
