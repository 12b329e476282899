"""Training with Aurora: the loss falls, and resumed runs are what they were."""

import pytest
import torch
from adapter_models import build, loss, output
from aurora_cases import RANK

from peft_kernels import Aurora, AuroraConfig

VARIANTS = {
    "cp": {},
    "tucker": {"core": "tucker", "layout": "released"},
    "additive": {"core": "tucker", "gates": "additive"},
    "gated": {"gates": "gated", "sharing": "modality"},
}
PRESETS = {"blip_retrieval": "blip-retrieval", "blip_vqa": "blip-vqa", "vilt_vqa": "vilt", "vilt_retrieval": "vilt"}


def start(kind: str, **options):
    model, batch = build(kind)
    torch.manual_seed(5)
    options = {"rank": RANK, "dropout": 0.1, "backend": "torch", **options}
    adapter = Aurora.wrap(model.train(), AuroraConfig(preset=PRESETS[kind], **options))
    return adapter, model, batch, torch.optim.AdamW(adapter.param_groups(lr=2e-2))


def train(model, batch, optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


CASES = [(kind, name) for kind in PRESETS for name in VARIANTS if "blip" in kind or "gates" not in VARIANTS[name]]


@pytest.mark.parametrize(("kind", "variant"), [case for case in CASES if case != ("blip_vqa", "gated")])
def test_ten_steps_lower_the_loss(kind, variant):
    adapter, model, batch, optimizer = start(kind, modules_to_save=[], **VARIANTS[variant])
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: p.clone() for name, p in adapter.named_parameters()}
    first = loss(model.eval(), batch).item()
    losses = train(model.train(), batch, optimizer, range(10))
    assert loss(model.eval(), batch).item() < min(first, losses[0]) - 0.01
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert all(not torch.equal(p, before[name]) for name, p in adapter.named_parameters())


@pytest.mark.parametrize("variant", ["cp", "additive"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(variant):
    options = VARIANTS[variant]
    adapter, model, batch, optimizer = start("blip_retrieval", **options)
    train(model, batch, optimizer, range(3))
    state = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    optimizer_state = optimizer.state_dict()
    optimizer_state = {**optimizer_state, "state": {k: {n: v.clone() for n, v in s.items()}
                                                    for k, s in optimizer_state["state"].items()}}  # fmt: skip
    expected = train(model, batch, optimizer, range(3, 6))
    resumed, other, _, again = start("blip_retrieval", **options)
    with torch.no_grad():
        for p in resumed.parameters():
            p.add_(1)
    resumed.load_state_dict(state)
    again.load_state_dict(optimizer_state)
    assert train(other, batch, again, range(3, 6)) == expected
    for (name, own), theirs in zip(adapter.named_parameters(), resumed.parameters()):
        assert torch.equal(own, theirs), name
    assert torch.equal(output(other.eval(), batch), output(model.eval(), batch))


@pytest.mark.parametrize("gates", [None, "additive"])
def test_made_in_inference_mode_it_still_trains(gates):
    model, batch = build("blip_retrieval")
    with torch.inference_mode():
        adapter = Aurora.wrap(model, AuroraConfig(preset="blip-retrieval", rank=RANK, gates=gates))
    loss(model.train(), batch).backward()
    assert all(p.grad is not None for p in adapter.parameters("adapter"))
