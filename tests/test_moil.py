"""MoIL by its definitions: student, teacher, loss and gradients, on a small modality-expert transformer."""

import copy

import pytest
import torch
from moil_cases import (
    KINDS,
    adapter_gradients,
    experts,
    imitation_loss,
    output,
    pull,
    relative,
    scatter,
    step,
    student,
    task_loss,
    train,
    wrapped,
)
from torch import nn

from peft_kernels.adapters import MoIL, MoILConfig


def teachers(moil: MoIL) -> list[torch.Tensor]:
    both = [t for layer in moil.layers.values() for t in (layer.teacher_weight, layer.teacher_bias)]
    return [t.clone() for t in both if t is not None]


def lives(moil: MoIL) -> list[torch.Tensor]:
    both = [t for layer in moil.layers.values() for t in (layer.live_weight, layer.live_bias)]
    return [t.detach().clone() for t in both if t is not None]


# ---- identities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapters_change_no_bit(kind, dtype):
    moil, batch = wrapped(kind, dtype)
    plain, _ = experts(dtype=dtype, **{k: v for k, v in KINDS[kind].items() if k in ("style", "bias")})
    for mode in (True, False):
        moil.model.train(mode)
        assert torch.equal(output(moil.model, batch), output(plain, batch))


def test_the_released_initialisation_starts_away_from_the_base():
    """By about 11 % at ViLT's width; transforms are N(0, 0.02²), biases zeros, pairs as always."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(768, 768))
    moil = MoIL.wrap(model, MoILConfig(targets=("0",), init="released"))
    transform, layer = moil.modules["moil"].transforms[0], moil.layers["0"]
    assert transform.down.std().item() == pytest.approx(0.02, rel=0.02)
    assert transform.up.std().item() == pytest.approx(0.02, rel=0.02)
    assert not transform.down_bias.any() and not transform.up_bias.any() and not layer.up[0].any()
    moved = layer.delta_weight().norm() / layer.weight.norm()
    assert 0.09 < moved < 0.13


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_is_its_definition_merged_or_not(kind):
    """Fused qkv, fc1, fc2 with the transform on its output; then the original bits come back."""
    moil, batch = wrapped(kind)
    scatter(moil)
    model = moil.model.eval()
    y, frozen = output(model, batch), {n: (x.weight.clone(), x.bias) for n, x in moil.layers.items()}
    by_hand = copy.deepcopy(model)
    for name, layer in moil.layers.items():
        own = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=torch.float64)
        weight, bias = student(layer)
        own.weight.data = weight.detach()
        if bias is not None:
            own.bias.data = bias.detach()
        by_hand.set_submodule(name, own)
    torch.testing.assert_close(y, output(by_hand, batch), rtol=1e-12, atol=1e-12)
    biases = {name: None if bias is None else bias.clone() for name, (_, bias) in frozen.items()}
    moil.merge()
    torch.testing.assert_close(output(model, batch), y, rtol=1e-12, atol=1e-12)
    moil.unmerge()
    for name, layer in moil.layers.items():
        assert torch.equal(layer.weight, frozen[name][0])
        assert layer.bias is None or torch.equal(layer.bias, biases[name])
    assert torch.equal(output(model, batch), y)


def test_projections_without_biases_take_no_shift():
    """Merged, they could not hold one: the transform has no a_d and c_d there."""
    moil, batch = wrapped("vit, no bias")
    assert not [name for name, _ in moil.named_parameters("adapter") if "bias" in name]
    optimizer = torch.optim.AdamW(moil.param_groups(1e-2, adapter_eps=1e-12))
    train(moil, optimizer, batch, 4)
    y = output(moil.model.eval(), batch)
    moil.merge()
    torch.testing.assert_close(output(moil.model, batch), y, rtol=1e-12, atol=1e-12)


# ---- the step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "relative"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_autograd_of_the_definition(kind, reduction):
    moil, batch = wrapped(kind, reduction=reduction, loss_weight=0.7)
    scatter(moil)
    loss = step(moil, batch, loss_scale=32.0)
    assert loss.item() == pytest.approx(0.7 * imitation_loss(moil, reduction).item(), rel=1e-12)
    for adapter, grad in zip(moil.parameters("adapter"), adapter_gradients(moil, reduction)):
        assert relative(adapter.grad, 32 * 0.7 * grad) < 1e-11


@pytest.mark.parametrize("reduction", ["mean", "relative"])
def test_a_step_per_micro_batch_is_the_mean_over_the_teachers_on_their_way(reduction):
    moil, batch = wrapped(reduction=reduction, decay=0.6, ema_per="micro_batch")
    scatter(moil)
    by_hand, losses, gradients = copy.deepcopy(moil), [], []
    for _ in range(4):
        for layer in by_hand.layers.values():
            layer.teacher_weight.lerp_(layer.live_weight.detach(), 0.4)
            layer.teacher_bias.lerp_(layer.live_bias.detach(), 0.4)
        losses.append(imitation_loss(by_hand, reduction).item())
        gradients.append(adapter_gradients(by_hand, reduction))
    loss = step(moil, batch, loss_scale=8.0, micro_batches=4)
    assert loss.item() == pytest.approx(sum(losses) / 4, rel=1e-12)
    for adapter, *parts in zip(moil.parameters("adapter"), *gradients):
        assert relative(adapter.grad, 8 * sum(parts) / 4) < 1e-11
        assert relative(adapter.grad, 8 * parts[-1]) > 0.01  # what one loss at the end would give
    for ours, hand in zip(teachers(moil), teachers(by_hand)):
        torch.testing.assert_close(ours, hand, rtol=1e-13, atol=1e-14)


def test_task_and_imitation_train_apart():
    moil, batch = wrapped()
    scatter(moil)
    task_loss(moil.model.train(), batch).backward()
    assert all(p.grad is None for p in moil.parameters("adapter"))
    before = {name: p.grad.clone() for name, p in moil.model.named_parameters() if p.grad is not None}
    assert set(before) == {name for kind in ("live", "head") for name, _ in moil.named_parameters(kind)}
    moil.modules["moil"].steps += 1
    moil.step()
    after = {name: p.grad for name, p in moil.model.named_parameters() if p.grad is not None}
    assert set(after) - set(before) == {name for name, _ in moil.named_parameters("adapter")}
    assert all(torch.equal(after[name], grad) for name, grad in before.items())
    assert not any(t.requires_grad for layer in moil.layers.values() for t in layer.buffers())
    moil.model.zero_grad()
    with moil.evaluate("student"):
        task_loss(moil.model, batch).backward()
    assert all(p.grad is None for kind in ("adapter", "live") for p in moil.parameters(kind))


def test_the_distance_stays_above_the_tail_of_the_singular_values():
    """Pairs alone: no rank-R matrix is nearer than Σ_{i>R} σ_i², and enough steps come near that."""
    moil, batch = wrapped(approximation="lora", rank=3, targets=("qkv", "fc1"), decay=1.0, reduction="sum")
    torch.manual_seed(0)
    floor = 0
    with torch.no_grad():
        for layer in moil.layers.values():
            layer.live_bias.copy_(layer.bias)
            layer.teacher_weight += 0.1 * torch.randn_like(layer.weight)
            for part in (layer.teacher_weight - layer.weight).chunk(layer.projections):
                floor += torch.linalg.svdvals(part)[3:].square().sum().item()
    pull(moil, batch)
    moil.modules["moil"].steps += 1
    adapters = list(moil.parameters("adapter"))
    optimizer = torch.optim.Adam(adapters, lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        optimizer.zero_grad()
        reached = moil.step().item()
        optimizer.step()
        schedule.step()
        assert reached >= floor * (1 - 1e-12)
    assert reached < 1.05 * floor


# ---- teachers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "micro", "decay"),
    [
        ({}, 1, 0.9),
        ({}, 3, 0.9),
        ({"ema_per": "micro_batch"}, 3, 0.9**3),
        ({"ema_per": "micro_batch"}, None, 0.9),
        ({"teacher": "live"}, 1, 0.0),
        ({"interval": 2}, 1, 0.9),
    ],
)
def test_teachers_follow_the_hand_formula(options, micro, decay):
    moil, batch = wrapped(reduction="sum", **options)
    optimizer = torch.optim.AdamW(moil.param_groups(1e-2))
    by_hand, interval = teachers(moil), options.get("interval", 1)
    for count in range(6):
        optimizer.zero_grad()
        for _ in range(micro or 1):
            task_loss(moil.model.train(), batch).backward()
        idle = count == 0 or count % interval
        if not idle:
            by_hand = [decay * t + (1 - decay) * live for t, live in zip(by_hand, lives(moil))]
        assert (moil.step(**{"micro_batches": micro} if micro else {}) is None) == bool(idle)
        assert all((p.grad is None) == bool(idle) for p in moil.parameters("adapter"))
        for ours, hand in zip(teachers(moil), by_hand):
            torch.testing.assert_close(ours, hand, rtol=1e-13, atol=1e-14)
        optimizer.step()
    assert moil.steps == 6
    if options.get("teacher") == "live":
        with moil.evaluate("live"):
            live = output(moil.model, batch)
        step(moil, batch)
        with moil.evaluate("teacher"):
            assert torch.equal(output(moil.model, batch), live)


def test_relative_errors_by_hand():
    moil, batch = wrapped()
    assert moil.last_relative_error is None and moil.relative_errors() == {}
    scatter(moil)
    step(moil, batch)
    by_hand, above, below = {}, 0, 0
    for name, layer in moil.layers.items():
        for m, (t, s, w) in enumerate(
            zip(*(x.chunk(layer.projections) for x in (layer.teacher_weight, student(layer)[0], layer.weight)))
        ):
            far, moved = (t - s).square().sum().item(), (t - w).square().sum().item()
            by_hand[f"{name}.{m}" if layer.projections > 1 else name] = far / moved
            above, below = above + far, below + moved
    assert moil.relative_errors() == pytest.approx(by_hand, rel=1e-12)
    assert moil.last_relative_error == pytest.approx(above / below, rel=1e-12)


def test_one_projection_that_never_moved_does_not_hide_the_others_error():
    moil, batch = wrapped("bert")
    scatter(moil)
    with torch.no_grad():
        for layer in list(moil.layers.values())[:1]:
            layer.live_weight.copy_(layer.weight)
            layer.teacher_weight.copy_(layer.weight)
    step(moil, batch)
    assert max(moil.relative_errors().values()) > 1e9 and moil.last_relative_error < 100


def test_the_error_stays_a_number_where_no_teacher_has_moved():
    """As after a warm-up's first step at a rate of 0, with students that start away from the base."""
    moil, batch = wrapped(init="released")
    step(moil, batch)
    far = sum((student(layer)[0] - layer.weight).square().sum().item() for layer in moil.layers.values())
    bases = sum(layer.weight.square().sum().item() for layer in moil.layers.values())
    assert moil.last_relative_error == pytest.approx(far / (1e-12 * bases), rel=1e-9)
