"""Two gloo processes of torchrun end where one process on the joint batch does."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import ddp_training
import pytest
import torch
import torch.distributed as dist
from adapter_cases import ACTIONS, MERGING, act, small, stir
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left behind, started once; pytest's workers share it, and the first of them starts them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "processes"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            command += [ddp_training.__file__, str(folder)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            (folder / "done").touch()
    return folder


def assert_both_equal(folder: Path, name: str, state: dict) -> None:
    """Bit for bit the same in both, and that of one process but for the order of sums in float64."""
    first, second = (torch.load(folder / f"{name}-{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys() == state.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    for key, tensor in state.items():
        torch.testing.assert_close(first[key], tensor, rtol=1e-9, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")


def trained(method: str) -> dict:
    adapter = ddp_training.start(method, seed=0)
    before = {name: p.clone() for name, p in adapter.named_parameters()}
    ddp_training.train(adapter, adapter.model, ddp_training.batch())
    assert all(not torch.equal(p, before[name]) for name, p in adapter.named_parameters())
    return dict(adapter.model.state_dict())


@pytest.mark.parametrize("method", ddp_training.METHODS)
def test_ddp(folder, method):
    assert_both_equal(folder, f"ddp-{method}", trained(method))


@pytest.mark.parametrize("method", ["lora", "aurora"])
def test_fsdp_sharded_at_the_root(folder, method):
    assert_both_equal(folder, f"fsdp-{method}", trained(method))


@pytest.fixture
def alone():
    """A group of this one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("outer", [False, True], ids=["root", "part of the root"])
@pytest.mark.parametrize("method", MERGING)
def test_whole_for_a_moment_is_refused(method, outer, alone, tmp_path):
    """After a forward the root's weights are whole until reshard(), which throws away what was written to them."""
    adapter, x = small(method), torch.randn(3, 32)
    stir(adapter)
    root = fully_shard(nn.Sequential(adapter.model) if outer else adapter.model, mesh=alone)
    with torch.no_grad():
        root.eval()(x)
    for action in (*ACTIONS, *["step"] * (method == "moil")):
        with pytest.raises(ValueError, match=rf"^{action}: the weights are FSDP's, which are whole for a moment only"):
            act(adapter, action, tmp_path)
    assert not adapter.merged and list(tmp_path.iterdir()) == []


def test_moil_under_fsdp_is_refused(folder):
    for rank in range(2):
        message = (folder / f"fsdp-moil-{rank}.txt").read_text()
        assert message.startswith("0 step: the weights are sharded, and it needs them whole; take Distributed")


def test_the_trainer_under_ddp(folder, tmp_path):
    moil = ddp_training.train_by_trainer(str(tmp_path), seed=0, per_device=2)
    assert moil.steps == ddp_training.STEPS and moil.last_relative_error > 0
    assert_both_equal(folder, "trainer-moil", dict(moil.model.state_dict()))
