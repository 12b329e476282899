"""What of MoIL is kept, moved, copied, resumed, saved and taken off again."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moil_cases import config, experts, interrupt, output, resume, scatter, student, train, training
from safetensors.torch import load_file
from torch import nn

from peft_kernels.adapters import MoIL


def wrapped(dtype=torch.float32, **options):
    model, batch = experts(dtype=dtype)
    return MoIL.wrap(model, config(**options)), batch


def optimizer_for(moil: MoIL) -> torch.optim.Optimizer:
    return torch.optim.AdamW(moil.param_groups(1e-2, adapter_eps=1e-12))


def own_dtypes(moil: MoIL) -> set[torch.dtype]:
    teachers = [t for x in moil.layers.values() for t in (x.teacher_weight, x.teacher_bias)]
    return {t.dtype for kind in ("adapter", "live") for t in moil.parameters(kind)} | {t.dtype for t in teachers}


def equal(state: dict, other: dict) -> bool:
    return state.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in state.items())


# ---- a training that is interrupted ---------------------------------------------------------------------------------


def test_resumed_is_uninterrupted_bit_for_bit(tmp_path):
    """With dropout and AdamW's moments; here and in a new process."""
    moil, optimizer, batch = training()
    train(moil, optimizer, batch, 3)
    interrupt(tmp_path / "state.pt", moil, optimizer)
    train(moil, optimizer, batch, 3)
    whole = moil.state_dict()
    assert whole["moil.steps"] == 6
    assert equal(resume(tmp_path / "state.pt", 3), whole)
    program = "import sys, torch, moil_cases as m; torch.save(m.resume(sys.argv[1], 3), sys.argv[2])"
    paths = [str(tmp_path / name) for name in ("state.pt", "end.pt")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    # Deterministic mode is on here, and takes other ways for a few operations
    program = "import torch; torch.use_deterministic_algorithms(True); " + program
    subprocess.run([sys.executable, "-c", program, *paths], check=True, env=environment)
    assert equal(torch.load(paths[1]), whole)


def test_a_model_s_state_dict_loads_without_pickle(tmp_path):
    moil, _ = wrapped()
    torch.save(moil.model.state_dict(), tmp_path / "model.pt")
    assert equal(torch.load(tmp_path / "model.pt", weights_only=True), moil.model.state_dict())


def test_a_state_holds_all_that_trains_and_nothing_frozen():
    moil, _ = wrapped()
    names = set(moil.state_dict())
    assert names == (
        {name for name, _ in moil.named_parameters()}
        | {f"{name}.teacher_{kind}" for name in moil.layers for kind in ("weight", "bias")}
        | {"moil.steps"}
    )
    state = moil.state_dict()
    state["moil.steps"] = torch.tensor(7)
    moil.load_state_dict(state)
    assert moil.steps == 7
    state.pop("blocks.0.attn.qkv.teacher_weight")
    with pytest.raises(ValueError, match="teacher_weight is missing"):
        moil.load_state_dict(state)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_hold_the_student_and_training_goes_on_from_it(tmp_path, dtype):
    moil, batch = wrapped(dtype, modules_to_save=())
    train(moil, optimizer_for(moil), batch, 6)
    moil.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == {name for name, _ in moil.named_parameters("adapter")}
    model, _ = experts(dtype=dtype)
    again = MoIL.from_pretrained(model, tmp_path)
    y = output(moil.model.eval(), batch)
    assert torch.equal(output(model.eval(), batch), y)
    assert again.steps == 0 and own_dtypes(again) == {torch.float32}
    for layer in again.layers.values():
        weight, bias = student(copy.deepcopy(layer).float())
        for kind in ("live", "teacher"):
            torch.testing.assert_close(getattr(layer, f"{kind}_weight"), weight, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(getattr(layer, f"{kind}_bias"), bias, rtol=1e-5, atol=1e-6)
    with again.evaluate("live"):
        torch.testing.assert_close(output(model, batch), y, rtol=2e-2, atol=2e-2)
    losses = train(again, optimizer_for(again), batch, 6)
    assert losses[-1] < losses[0] and again.steps == 6 and again.last_relative_error < 1


def test_a_base_loaded_after_wrapping_is_what_training_starts_from():
    moil, batch = wrapped()
    other, _ = experts(seed=5)
    moil.model.load_state_dict(other.state_dict(), strict=False)
    for mode in ("student", "live", "teacher"):
        with moil.evaluate(mode):
            assert torch.equal(output(moil.model, batch), output(other, batch))


def test_a_base_changed_between_steps_is_noticed():
    """In half precision the step holds it in float32."""
    moil, batch = wrapped(torch.bfloat16, modules_to_save=())
    train(moil, optimizer_for(moil), batch, 2)
    with torch.no_grad():
        for layer in moil.layers.values():
            layer.weight.zero_()
    assert all(not weight0.any() for group in moil.groups() for weight0 in group.weight0)


def test_transforms_that_are_replaced_get_the_gradients():
    moil, batch = wrapped()
    train(moil, optimizer_for(moil), batch, 2)
    moil.model.load_state_dict(copy.deepcopy(moil.state_dict()), strict=False, assign=True)
    train(moil, optimizer_for(moil), batch, 1)
    moil.modules["moil"].transforms[0].load_state_dict(
        copy.deepcopy(moil.modules["moil"].transforms[0].state_dict()), assign=True
    )
    before = moil.modules["moil"].transforms[0].up
    assert before.grad is None
    train(moil, optimizer_for(moil), batch, 1)
    assert before.grad.any()


# ---- moves and casts ------------------------------------------------------------------------------------------------


def cast_dtypes(moil: MoIL) -> set[torch.dtype]:
    return {layer.weight.dtype for layer in moil.layers.values()}


@pytest.mark.parametrize(
    ("cast", "base", "own"),
    [
        (lambda m: m.to(torch.bfloat16), torch.bfloat16, torch.float32),
        (lambda m: m.half(), torch.float16, torch.float32),
        (lambda m: m.half().float(), torch.float32, torch.float32),
        (lambda m: m.double(), torch.float64, torch.float64),
        (lambda m: m.double().bfloat16(), torch.bfloat16, torch.float32),
    ],
)
def test_casts_leave_what_trains_in_float32(cast, base, own):
    moil, batch = wrapped(modules_to_save=())
    train(moil, optimizer_for(moil), batch, 3)
    before = {name: t.clone() for name, t in moil.state_dict().items()}
    cast(moil.model)
    assert cast_dtypes(moil) == {base} and own_dtypes(moil) == {own}
    assert all(torch.equal(t.to(before[name].dtype), before[name]) for name, t in moil.state_dict().items())
    assert moil.modules["moil"].steps.dtype == torch.int64
    losses = train(moil, optimizer_for(moil), batch, 4)
    assert losses[-1] < losses[0]
    assert output(moil.model.eval(), batch).dtype == base


def test_moves():
    moil, _ = wrapped()
    moil.model.to("meta")
    assert all(t.is_meta for name, t in moil.state_dict().items() if name != "moil.steps")
    moil.model.to_empty(device="cpu")
    for module in moil.model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert moil.steps == 0
    for layer in moil.layers.values():
        assert torch.equal(layer.live_weight, layer.weight) and torch.equal(layer.teacher_bias, layer.bias)
        assert torch.equal(student(layer)[0], layer.weight)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_wrapping_where_no_gradients_are_recorded(mode):
    model, batch = experts()
    with mode():
        moil = MoIL.wrap(model, config(modules_to_save=()))
    losses = train(moil, optimizer_for(moil), batch, 6)
    assert losses[-1] < losses[0] and moil.last_relative_error < 1
    with mode():
        y = output(moil.model.eval(), batch)
        moil.merge()
        torch.testing.assert_close(output(moil.model, batch), y)


# ---- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_are_whole_and_apart(copied):
    moil, batch = wrapped()
    optimizer = optimizer_for(moil)
    train(moil, optimizer, batch, 3)
    model = copied(moil.model)
    for mode in (True, False):
        assert torch.equal(output(model.train(mode), batch), output(moil.model.train(mode), batch))
    assert model.blocks[0].attn.qkv.transform is model.moil.transforms[0]
    y = output(model, batch)
    other = copied(moil)
    train(moil, optimizer, batch, 3)
    assert torch.equal(output(model, batch), y)
    assert other.steps == 3 and other.model.moil is other.modules["moil"]
    copied_optimizer = optimizer_for(other)
    copied_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(other, copied_optimizer, batch, 1)
    assert other.steps == 4 and not torch.equal(output(other.model.eval(), batch), y)


def test_removing_gives_the_model_back():
    model, batch = experts()
    model.blocks[1].attn.qkv.weight.requires_grad_(False)
    model._ddp_params_and_buffers_to_ignore = ["head.bias"]
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    y, state = output(model, batch), {name: t.clone() for name, t in model.state_dict().items()}
    moil = MoIL.wrap(model, config(modules_to_save=()))
    assert {"head.bias", "moil.steps"} < set(model._ddp_params_and_buffers_to_ignore)
    train(moil, optimizer_for(moil), batch, 3)
    assert moil.remove() is model and moil.steps == 3
    with pytest.raises(ValueError, match=r"^remove: the adapter was removed"):
        moil.remove()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert model._ddp_params_and_buffers_to_ignore == ["head.bias"]
    assert equal(dict(model.state_dict()), state) and torch.equal(output(model, batch), y)
    moil = scatter(MoIL.wrap(model, config(modules_to_save=())))
    merged = output(model.eval(), batch)
    moil.merge()
    torch.testing.assert_close(output(moil.remove(), batch), merged)
    plain, _ = experts()
    MoIL.wrap(plain, config()).remove()
    assert not hasattr(plain, "_ddp_params_and_buffers_to_ignore")


def test_an_nn_sequential_and_a_module_in_two_places():
    """And a weight that is a transposed view."""
    tied = nn.Linear(16, 16)
    tied.weight = nn.Parameter(torch.randn(16, 16).t())
    model = nn.Sequential(tied, nn.GELU(), tied)
    x = torch.randn(3, 16)
    y = model(x)
    moil = MoIL.wrap(model, config(targets=("0",), modules_to_save=()))
    torch.testing.assert_close(model(x), y)
    assert model[0] is model[2]
    optimizer = torch.optim.AdamW(moil.param_groups(1e-2))
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(x).square().sum().backward()
        moil.step()
        optimizer.step()
    assert moil.last_relative_error > 0
    assert torch.equal(moil.remove()(x), y) and moil.last_relative_error is None
