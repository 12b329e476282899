"""MoIL under DistributedDataParallel: two gloo processes do what one does on the joint batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ddp_training import steady
from moil_cases import config, experts, task_loss
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from peft_kernels.adapters import MoIL

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")
STEPS = 3


def start(seed: int) -> tuple[MoIL, dict]:
    """Another seed gives other frozen weights, other adapters, other everything but the batch."""
    model, _ = experts(seed, torch.float64)
    moil = MoIL.wrap(model, config(reduction="relative"))
    _, batch = experts(0, torch.float64)
    return moil, batch


def run(moil: MoIL, model: nn.Module, batch: dict) -> dict:
    optimizer = steady(moil)
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        task_loss(model, batch).backward()
        moil.step()
        optimizer.step()
    return moil.model.state_dict()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        moil, batch = start(rank)
        names = {name for name, _ in moil.named_parameters("adapter")}
        model = DistributedDataParallel(moil.model)
        assert names <= model.parameters_to_ignore
        sent, broadcast = [], dist.broadcast

        def counted(tensor, *args, **kwargs):
            sent.append(tensor.data_ptr())
            return broadcast(tensor, *args, **kwargs)

        dist.broadcast = counted
        state = run(moil, model, {name: t.chunk(2)[rank] for name, t in batch.items()})
        teachers = sum(name.endswith(("teacher_weight", "teacher_bias")) for name in state)
        assert len(sent) == len(set(sent)) == len(names) + teachers  # once each
        torch.save(dict(state), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_are_one_on_the_joint_batch(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    moil, batch = start(0)
    whole = run(moil, moil.model, batch)
    for name, tensor in whole.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    assert all(whole[name].any() for name, _ in moil.named_parameters("adapter"))
