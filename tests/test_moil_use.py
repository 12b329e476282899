"""MoIL in use: what a forward runs on, and what is refused before anything changes."""

import warnings

import pytest
import torch
from moil_cases import config, experts, output, pull, scatter, task_loss, wrapped
from torch import nn

from peft_kernels.adapters import MoIL
from peft_kernels.presets import Target


def test_modes():
    moil, batch = wrapped()
    scatter(moil)
    model, y = moil.model, {}
    for mode in ("student", "live", "teacher"):
        with moil.evaluate(mode) as inside:
            assert inside is model
            y[mode] = output(model, batch)
            assert torch.equal(output(model.eval(), batch), output(model.train(), batch))
    assert len({float(each.detach().sum()) for each in y.values()}) == 3
    assert torch.equal(output(model.eval(), batch), y["student"])
    assert torch.equal(output(model.train(), batch), y["live"])
    with moil.evaluate("teacher"):
        with moil.evaluate("live"):
            assert torch.equal(output(model, batch), y["live"])
        assert torch.equal(output(model, batch), y["teacher"])
        with pytest.raises(RuntimeError, match="stop"), moil.evaluate():
            raise RuntimeError("stop")
        assert torch.equal(output(model, batch), y["teacher"])
    assert torch.equal(output(model, batch), y["live"])
    with pytest.raises(ValueError, match=r"^mode: expected one of"), moil.evaluate("best"):
        pass
    moil.merge()
    for mode in ("live", "teacher"):
        with moil.evaluate(mode):
            assert torch.equal(output(model, batch), y[mode])
    for name, layer in moil.layers.items():
        assert torch.equal(layer.teacher_weight, dict(model.named_buffers())[f"{name}.teacher_weight"])


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_step_tells_that_no_layer_is_left():
    moil, batch = wrapped()
    pull(moil, batch)
    for name in moil.layers:
        moil.model.set_submodule(name, nn.Identity())
    with pytest.warns(UserWarning, match=r"^step: .* of the adapter are no longer in the model") as told:
        moil.step()
    assert told[0].filename == __file__


def test_steps_that_are_refused_count_nothing():
    moil, batch = wrapped()
    moil.model.train()
    with pytest.raises(ValueError, match=r"^step: no live weight has a gradient; call it after .* in training"):
        moil.step()
    task_loss(moil.model.eval(), batch).backward()
    with pytest.raises(ValueError, match=r"^step: no live weight .* the model is in evaluation mode, .* in training"):
        moil.step()
    pull(moil, batch)
    with pytest.raises(ValueError, match=r"^loss_scale: expected a finite number, got inf"):
        moil.step(loss_scale=float("inf"))
    with pytest.raises(TypeError, match=r"^micro_batches: expected an integer"):
        moil.step(micro_batches=1.5)
    moil.merge()
    with pytest.raises(ValueError, match=r"^step: the model is merged"):
        moil.step()
    moil.unmerge()
    assert moil.steps == 0 and moil.step() is None and moil.steps == 1
    moil.remove()
    with pytest.raises(ValueError, match=r"^step: the adapter was removed"):
        moil.step()


def test_what_cannot_be_wrapped():
    model, _ = experts()
    model.blocks[1].mlp_text.fc1.weight = model.blocks[0].mlp_text.fc1.weight
    with pytest.raises(ValueError, match=r"^targets: blocks.1\S+fc1 and blocks.0\S+fc1 share their weight"):
        MoIL.wrap(model, config())
    model, _ = experts()
    model.blocks[1].mlp_text.fc1.bias = model.blocks[0].mlp_text.fc1.bias
    with pytest.raises(ValueError, match="share their bias, and would train apart"):
        MoIL.wrap(model, config())
    model.blocks[1].mlp_text.fc1.bias = None
    model.moil = None
    with pytest.raises(ValueError, match="has an attribute 'moil' already"):
        MoIL.wrap(model, config())
    del model.moil
    fused = (Target(r".*fc1", projections=2, placement="output"),)
    with pytest.raises(ValueError, match=r"^placement: fused projections"):
        MoIL.wrap(model, config(targets=fused))
    assert not any("live" in name for name in model.state_dict())
    with pytest.raises(ValueError, match=r"^decay"):
        config(decay=1.5)
    with pytest.raises(ValueError, match=r"^adapter_dtype: MoIL's adapters are float32"):
        config(adapter_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"^set_scale: MoIL's update has no scale"):
        wrapped()[0].layers["blocks.0.attn.qkv"].set_scale(0.5)


def test_outputs_have_transforms_of_their_own():
    """Two layers beside each other whose results differ in width."""
    model = nn.ModuleDict({"a": nn.Linear(8, 6), "b": nn.Linear(8, 4)}).double()
    moil = MoIL.wrap(model, config(targets=(Target("a|b", placement="output"),), modules_to_save=()))
    assert [len(t.up) for t in moil.modules["moil"].transforms] == [6, 4]
    for name in ("a", "b"):
        assert model[name](torch.randn(2, 8, dtype=torch.float64)).shape == (2, moil.layers[name].out_features)


def test_compiled_whole():
    """One graph in each mode, of layers that share a transform."""
    moil, _ = wrapped("bert", torch.float32)
    attention, x = scatter(moil).model.encoder["layer"][0].attention["self"], torch.randn(2, 5, 16)
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    for mode in ("student", "live", "teacher"):
        with moil.evaluate(mode):
            torch.testing.assert_close(compiled(x), attention(x))
    compiled.train()(x).square().sum().backward()
    moil.step()
    assert attention.query.live_weight.grad.any() and attention.query.down[0].grad is None


@pytest.mark.parametrize("action", ["save_pretrained", "export_lora", "merge"])
def test_training_without_a_step_is_told_when_its_student_is_kept(action, tmp_path):
    """Nothing of it is in the student: a Trainer without a callback would lose all without a word."""
    moil = wrapped()[0]
    arguments = () if action == "merge" else (tmp_path,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(moil, action)(*arguments)
    if action == "merge":
        moil.unmerge()
    with torch.no_grad():
        next(moil.parameters("live")).add_(1)
    with pytest.warns(UserWarning, match=rf"^{action}: live weights were trained, but step\(\) was never called"):
        getattr(moil, action)(*arguments)
