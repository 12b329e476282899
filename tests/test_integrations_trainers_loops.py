"""Accelerate, and loops by hand with a scaler, autocast, clipping or an interruption: where the plain loop ends."""

import contextlib
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from trainer_cases import BATCH, assert_same, batches, clipped, copied, examples, loop, start, updates

from peft_kernels import MoIL

METHODS = ("moil", "lora", "aurora")


# ---- Accelerate -----------------------------------------------------------------------------------------------------


def prepared(method, precision="no", **options):
    AcceleratorState._reset_state(True)  # other tests have one, of another precision
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    adapter, optimizer = start(method, **options)
    loader = torch.utils.data.DataLoader(examples()[: 4 * BATCH], BATCH)
    return accelerator, adapter, *accelerator.prepare(adapter.model, optimizer, loader)


def accelerated(accelerator, adapter, model, optimizer, loader):
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                if isinstance(adapter, MoIL):
                    adapter.step(micro_batches=2)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(("method", "precision"), [("moil", "no"), ("moil", "bf16"), ("lora", "no"), ("lora", "bf16")])
def test_accelerate(method, precision):
    own = {"ema_per": "micro_batch"} if method == "moil" else {}
    parts = prepared(method, precision, **own)
    for _ in range(2):
        accelerated(*parts)
    autocast = torch.bfloat16 if precision == "bf16" else None
    assert_same(copied(parts[1]), loop(*start(method, **own), accumulate=2, clip=0.5, autocast=autocast, count=4))


@pytest.mark.parametrize("method", ["moil", "lora"])
def test_accelerate_resumed_is_uninterrupted(method, tmp_path):
    whole = prepared(method, repeat=False)
    accelerated(*whole)
    whole[0].save_state(str(tmp_path))
    accelerated(*whole)
    state = copied(whole[1])
    resumed = prepared(method, seed=9, repeat=False)
    resumed[0].load_state(str(tmp_path))
    accelerated(*resumed)
    assert_same(copied(resumed[1]), state)


# ---- loops by hand --------------------------------------------------------------------------------------------------


def scaled_loop(adapter, optimizer, unscale, scaler, autocast=torch.float16, clip=None):
    """unscale: before MoIL's step, which then needs to know of no scale;  clip: of what is unscaled"""
    for (batch,) in updates():
        optimizer.zero_grad()
        with torch.autocast("cpu", autocast):
            loss = adapter.model(**batch).loss
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_(clipped(adapter), clip)
        if isinstance(adapter, MoIL):
            adapter.step(loss_scale=1.0 if unscale else scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    return copied(adapter)


@pytest.mark.parametrize(
    ("method", "unscale", "clip"),
    [("moil", True, None), ("moil", True, 0.5), ("moil", False, None), ("lora", True, 0.5), ("aurora", False, None)],
)
def test_a_scaler_by_hand(method, unscale, clip):
    """Scales are powers of two, and leave no trace in float32."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4)
    state = scaled_loop(*start(method), unscale, scaler, clip=clip)
    assert scaler.get_scale() == 2.0**14
    assert_same(state, loop(*start(method), autocast=torch.float16, clip=clip, scale=2.0**12))


def test_an_update_that_a_scaler_skips():
    """It leaves all as it is, but for the teachers, which move to the live weights once more."""
    moil, optimizer = start("moil")
    before = loop(moil, optimizer, epochs=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = moil.model(**batches()[0]).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    moil.step()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    changed = {name for name, tensor in copied(moil).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "teacher_" in name} | {"moil.steps"}
    assert all(tensor.isfinite().all() for tensor in moil.state_dict().values())


def test_an_imitation_inside_autocast_is_the_same():
    states = []
    for inside in (torch.autocast("cpu", torch.bfloat16), contextlib.nullcontext()):
        moil, optimizer = start("moil")
        loop(moil, optimizer, epochs=1, autocast=torch.bfloat16)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = moil.model(**batches()[0]).loss
        loss.backward()
        with inside:
            moil.step()
        states.append({name: p.grad.clone() for name, p in moil.named_parameters("adapter")})
    assert_same(*states)


def test_clipping_after_the_step_would_change_the_imitation():
    """Before it, no gradient of the imitation is in the norm, nor does the norm change one."""
    gradients = []
    for order in ("none", "before", "after"):
        moil, optimizer = start("moil")
        loop(moil, optimizer, epochs=1)
        optimizer.zero_grad()
        moil.model(**batches()[0]).loss.backward()
        if order == "before":
            nn.utils.clip_grad_norm_(moil.model.parameters(), 0.5)
        moil.step()
        if order == "after":
            nn.utils.clip_grad_norm_(moil.model.parameters(), 0.5)
        else:
            norm = math.hypot(*(p.grad.norm() for p in clipped(moil)))
            assert norm == pytest.approx(0.5, rel=1e-4) if order == "before" else norm > 1
        gradients.append({name: p.grad.clone() for name, p in moil.named_parameters("adapter")})
    none, before, after = gradients
    assert_same(none, before)
    assert all(after[name].norm() < 0.9 * none[name].norm() for name in none if none[name].any())


@pytest.mark.parametrize("method", METHODS)
def test_resumed_by_hand(method, tmp_path):
    adapter, optimizer = start(method, repeat=False)
    loop(adapter, optimizer, epochs=1)
    state = {"adapter": adapter.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    torch.save(state, tmp_path / "training.pt")
    whole = loop(adapter, optimizer, epochs=1)
    adapter, optimizer = start(method, repeat=False)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(1)
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    adapter.load_state_dict(state["adapter"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    assert_same(loop(adapter, optimizer, epochs=1), whole)
