"""The plugin that chooses the tests of a GPU machine: which tests it takes, and what it says of those that ran."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from real_kernels import why_left_out

TESTS = Path(__file__).parent
# Collected as where a GPU is: the CUDA kernels' tests then have a real device beside the emulated one.
COLLECT = """
import cuda_emulation, json, pytest, sys
cuda_emulation.DEVICES = ["cpu", "cuda"]

class Seen:
    def pytest_collection_finish(self, session):
        self.items = [(item.path.stem, getattr(getattr(item, "callspec", None), "id", "")) for item in session.items]

seen = Seen()
pytest.main(["-p", "real_kernels", "--collect-only", "-qq", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[seen])
print("seen", json.dumps(seen.items))
"""


@pytest.mark.parametrize(
    ("stem", "parameters", "marked", "left_out"),
    [
        ("test_reconstruct", {"backend": "triton", "dtype": "x"}, None, None),
        ("test_reconstruct", {"backend": "torch"}, None, "torch's own kernels"),
        ("test_lowrank_linear", {"backend_design": ("triton", "fused")}, None, None),
        ("test_lowrank_linear", {"backend_design": ("torch", None)}, None, "torch's own kernels"),
        ("test_lowrank_linear", {"dtype": "x"}, None, "names no backend"),
        ("test_lowrank_linear", {}, True, None),
        ("test_lowrank_linear", {"backend": "triton"}, False, "nothing to launch"),
        ("test_lowrank_linear_cuda", {"device": "cuda"}, None, None),
        ("test_lowrank_linear_cuda", {"device": "cuda"}, False, "nothing to launch"),
        ("test_lowrank_linear_cuda", {"device": "cpu"}, None, "CUDA's kernels emulated on a CPU, or none"),
        ("test_lowrank_linear_cuda", {"mutant": 1}, None, "CUDA's kernels emulated on a CPU, or none"),
        ("test_lowrank_linear_mutants", {"backend": "triton"}, True, "mutants"),
        ("test_lowrank_linear_errors", {"backend": "triton"}, None, "bad input, which nothing is launched for"),
    ],
)
def test_why_a_test_is_left_out(stem, parameters, marked, left_out):
    assert why_left_out(stem, parameters, marked) == left_out


def started(*command):
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    settings = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=TESTS.parent, env=settings, capture_output=True, text=True)


def test_what_is_collected_runs_kernels_alone():
    done = started("-c", COLLECT, "tests/test_gated_query.py", "tests/test_gated_query_cuda.py")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("seen")]
    items = json.loads(line.removeprefix("seen"))
    triton = [name for stem, name in items if stem == "test_gated_query"]
    cuda = [name for stem, name in items if stem == "test_gated_query_cuda"]
    assert len(triton) > 50 and not any("torch-" in f"{name}-" for name in triton if "triton" not in name)
    assert len(cuda) > 20 and all(name.startswith("cuda") or "-cuda" in name for name in cuda)


FAULTY = """
import os, pytest
from quick_interpreter import quicken
quicken()  # as conftest.py does for its own folder
pytestmark = pytest.mark.kernels

def test_that_launches():
    import torch
    from peft_kernels.triton_kernels.common import sum_partials
    sum_partials([(torch.ones(2, 3), torch.ones(3))])

def test_that_does_not():
    pass

def test_that_skips():
    pytest.skip("no reason")

@pytest.mark.kernels(run=False)
def test_left_out():
    raise AssertionError

def test_that_faults():
    os._exit(3)  # as a worker does whose GPU has faulted
"""


def test_every_test_is_told_of_whatever_becomes_of_the_workers(tmp_path):
    path = tmp_path / "test_faulty.py"
    path.write_text(FAULTY)
    command = ("-m", "pytest", "-p", "real_kernels", "-q", "-n", "1", "-p", "no:cacheprovider")
    done = started(*command, "-c", str(TESTS.parent / "pyproject.toml"), "--rootdir", str(tmp_path), str(path))
    lines = [line.partition("record ")[2] for line in done.stdout.splitlines() if line.startswith("record ")]
    records = [json.loads(line) for line in lines]
    assert {"left_out": {"nothing to launch": 1}} in records, done.stdout + done.stderr
    keys = ("outcome", "reason", "launches")
    ends = {record["test"].split("_")[-1]: [record[key] for key in keys] for record in records if "test" in record}
    assert ends == {
        "launches": ["passed", None, {"triton on cpu": 1}],
        "not": ["passed", None, {}],
        "skips": ["skipped", "no reason", {}],
        "faults": ["failed", None, {}],
    }
