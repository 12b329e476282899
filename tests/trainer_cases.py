"""A tiny ViLT under each adapter, a few examples, and the loop by hand that every trainer must agree with."""

import contextlib
from collections.abc import Iterator

import adapter_cases
import torch
from adapter_models import SIZE, TEXT, build
from torch import Tensor, nn

from peft_kernels.adapters import Adapter, MoIL

EXAMPLES, BATCH = 10, 2
OPTIONS = {"moil": {"decay": 0.9, "reduction": "relative"}, "lora": {"dropout": 0.1}, "aurora": {"dropout": 0.1}}


def start(method: str, seed: int = 0, repeat: bool = True, **options) -> tuple[Adapter, torch.optim.Optimizer]:
    """repeat: every forward draws the same order of patches and the same dropout, whatever was drawn before it"""
    model, _ = build("vilt_vqa", seed=seed, dropout=0.1)
    adapter = adapter_cases.wrap(method, model.train(), "vilt_vqa", **{**OPTIONS[method], **options})
    if repeat:
        model.register_forward_pre_hook(lambda *_: torch.manual_seed(7) and None)
    return adapter, torch.optim.AdamW(adapter.param_groups(1e-2, adapter_eps=1e-12))


def examples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "input_ids": torch.randint(5, 40, (TEXT,), generator=generator),
            "pixel_values": torch.randn(3, SIZE, SIZE, generator=generator),
            "labels": torch.eye(4)[index % 4],
        }
        for index in range(EXAMPLES)
    ]


def batches() -> list[dict[str, Tensor]]:
    rows = examples()
    return [
        {name: torch.stack([row[name] for row in rows[i : i + BATCH]]) for name in rows[0]}
        for i in range(0, EXAMPLES, BATCH)
    ]


def updates(accumulate: int = 1, epochs: int = 2, count: int = EXAMPLES // BATCH) -> Iterator[list[dict[str, Tensor]]]:
    """The micro-batches of each optimizer step; the last one of an epoch takes what is left.

    count: of the batches in an epoch
    """
    for _ in range(epochs):
        each = batches()[:count]
        yield from (each[i : i + accumulate] for i in range(0, len(each), accumulate))


def clipped(adapter: Adapter) -> list[nn.Parameter]:
    """All that has a gradient from the task's backward."""
    imitating = {id(p) for p in adapter.parameters("adapter")} if isinstance(adapter, MoIL) else set()
    return [p for p in adapter.model.parameters() if p.requires_grad and id(p) not in imitating]


def loop(
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    accumulate: int = 1,
    epochs: int = 2,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    scale: float = 1.0,
    count: int = EXAMPLES // BATCH,
) -> dict[str, Tensor]:
    """scale: of the loss in the backward, taken out of the gradients before anything reads them"""
    for micro_batches in updates(accumulate, epochs, count):
        optimizer.zero_grad()
        for batch in micro_batches:
            with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
                loss = adapter.model(**batch).loss
            (loss / len(micro_batches) * scale).backward()
        for p in clipped(adapter):
            p.grad /= scale
        if clip:
            nn.utils.clip_grad_norm_(clipped(adapter), clip)
        if isinstance(adapter, MoIL):
            adapter.step(micro_batches=len(micro_batches))
        optimizer.step()
    return copied(adapter)


def copied(adapter: Adapter) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapter.state_dict().items()}


def assert_same(state: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert state.keys() == other.keys()
    assert [name for name, tensor in state.items() if not torch.equal(tensor, other[name])] == []
