"""What each of two processes of torchrun does: train under DDP, under FSDP2 and by HF's Trainer, and keep the result.

    torchrun --standalone --nproc-per-node=2 tests/ddp_training.py FOLDER

The same functions without a process group train on the joint batch in one process.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import adapter_cases
import pytest
import torch
import torch.distributed as dist
from moil_cases import WIDTH, experts, task_loss
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from peft_kernels.adapters import Adapter, MoIL

METHODS = ("lora", "aurora", "moil")
STEPS, ROWS, MICRO_BATCHES = 3, 8, 2
TARGETS = {"targets": ("qkv", "fc1", "fc2"), "modules_to_save": ("head",)}
OPTIONS = {"moil": {"decay": 0.9, "reduction": "relative"}, "lora": {}, "aurora": {}}


def start(method: str, seed: int) -> Adapter:
    """Another seed gives other frozen weights, other adapters, other everything."""
    model, _ = experts(seed, torch.float64)
    return adapter_cases.wrap(method, model.train(), **TARGETS, **OPTIONS[method])


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(20, (ROWS, 3), generator=generator)
    image = torch.randn(ROWS, 4, WIDTH, generator=generator, dtype=torch.float64)
    return {"text": text, "image": image, "labels": torch.arange(ROWS) % 4}


def steady(adapter: Adapter) -> torch.optim.AdamW:
    """Adam divides a gradient by its own size plus eps: 1e-10 would magnify the last bits of the tiny ones, whose order
    of sums is the CPU's. Everything else moves as it would."""
    return torch.optim.AdamW([group | {"eps": 1e-3} for group in adapter.param_groups(1e-2)])


def train(adapter: Adapter, model: nn.Module, rows: dict[str, Tensor]) -> None:
    """In micro-batches, of which DDP reduces the last one's gradients."""
    optimizer = steady(adapter)
    parts = [{name: t.chunk(MICRO_BATCHES)[i] for name, t in rows.items()} for i in range(MICRO_BATCHES)]
    for _ in range(STEPS):
        optimizer.zero_grad()
        for part in parts:
            waiting = part is not parts[-1] and isinstance(model, DistributedDataParallel)
            with model.no_sync() if waiting else contextlib.nullcontext():
                (task_loss(model, part) / MICRO_BATCHES).backward()
        if isinstance(adapter, MoIL):
            adapter.step(micro_batches=MICRO_BATCHES)
        optimizer.step()


def train_by_trainer(folder: str, seed: int, per_device: int) -> Adapter:
    from adapter_models import build
    from transformers import Trainer, TrainingArguments

    from peft_kernels.integrations.transformers import MoILCallback

    model, rows = build("vilt_vqa", torch.float64, seed=seed)
    # Not "relative": a bias of keys has no gradient but rounding, which that reduction would divide by itself
    moil = adapter_cases.wrap("moil", model, "vilt_vqa", decay=0.9, reduction="sum")
    model.accepts_loss_kwargs = False  # see docs/trainer.md
    _, rows = build("vilt_vqa", torch.float64)
    Trainer(
        model=model,
        args=TrainingArguments(
            **{"output_dir": folder, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": STEPS},
            **{"per_device_train_batch_size": per_device, "lr_scheduler_type": "constant", "save_strategy": "no"},
        ),
        train_dataset=[{name: t[0] if i % 2 else t[2] for name, t in rows.items()} for i in range(4)],
        callbacks=[MoILCallback(moil)],
        optimizers=(steady(moil), None),
    ).train()
    return moil


@contextlib.contextmanager
def counted_broadcasts() -> Iterator[list[int]]:
    """The addresses of what `dist.broadcast` sends inside."""
    sent, broadcast = [], dist.broadcast

    def counted(tensor, *args, **kwargs):
        sent.append(tensor.data_ptr())
        return broadcast(tensor, *args, **kwargs)

    with mock.patch.object(dist, "broadcast", counted):
        yield sent


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    own = {name: t.chunk(world)[rank] for name, t in batch().items()}
    for method in METHODS:
        adapter = start(method, seed=rank)
        model = DistributedDataParallel(adapter.model)
        with counted_broadcasts() as sent:
            train(adapter, model, own)
        if method == "moil":  # DDP would wait for gradients that no backward brings
            adapters = {name for name, _ in adapter.named_parameters("adapter")}
            teachers = [name for name in adapter.model.state_dict() if "teacher_" in name]
            assert adapters <= model.parameters_to_ignore and teachers
            assert len(sent) == len(set(sent)) == len(adapters) + len(teachers)  # once each
        torch.save(dict(adapter.model.state_dict()), folder / f"ddp-{method}-{rank}.pt")
    for method in ("lora", "aurora"):
        adapter = start(method, seed=0)
        fully_shard(adapter.model)
        assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in adapter.parameters())
        for action in ("merge", "save_pretrained", "export_lora"):
            with pytest.raises(ValueError, match=f"{action}: the weights are sharded"):
                getattr(adapter, action)(*([folder] if action != "merge" else []))
        train(adapter, adapter.model, own)
        whole = get_model_state_dict(adapter.model, options=StateDictOptions(full_state_dict=True))
        torch.save(whole, folder / f"fsdp-{method}-{rank}.pt")
    moil = start("moil", seed=0)
    fully_shard(moil.model)
    try:
        train(moil, moil.model, own)
    except ValueError as error:
        (folder / f"fsdp-moil-{rank}.txt").write_text(f"{moil.steps} {error}")
    moil = train_by_trainer(str(folder), seed=rank, per_device=1)
    torch.save(dict(moil.model.state_dict()), folder / f"trainer-moil-{rank}.pt")
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    # Once in a while a thread of gloo's aborts the process while it is taken down, when all has been written.
    sys.stdout.flush()
    os._exit(0)
