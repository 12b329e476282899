"""Shared set-up: where kernels run here, and uninitialised memory full of NaN."""

import gc
import os

import pytest
import torch
from quick_interpreter import quicken

quicken()
if not torch.cuda.is_available():  # torch notes the caller's stack at every seed, for when there will be a GPU
    torch.cuda.manual_seed_all = lambda seed: None

# Deterministic mode fills every torch.empty with NaN: whatever a kernel forgets to write shows.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Inductor would compile and import a library, in 7 s, to see whether the compiler knows the vectors that the CPU has.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


def pytest_addoption(parser):
    parser.addoption("--record", metavar="PART", help="keep how this whole run ended, for README's table of versions")


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    part = config.getoption("--record")
    if part and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        from peft_kernels.benchmarks import verified

        counts = {outcome: len(found) for outcome, found in terminalreporter.stats.items()}
        terminalreporter.write_line(f"recorded in {verified.record(part, counts)}")


def pytest_collection_finish():
    """What has been imported and collected stays: no later collection of garbage goes through it again,
    and there are fewer of them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def small_probes(request, monkeypatch):
    """The benchmark's tests measure nothing: the machine's rates are taken from probes of next to no size."""
    if request.module.__name__.startswith("test_benchmarks"):
        from peft_kernels.benchmarks import floor

        monkeypatch.setattr(floor, "PROBE_COPY", 2**12)
        monkeypatch.setattr(floor, "PROBE_MATMUL", 32)


if os.environ.get("ATEN_CPU_CAPABILITY") == "default":  # which has no vectors, and inductor writes code for them
    import torch._inductor.config

    torch._inductor.config.cpp.simdlen = 1


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(
    params=[("torch", None), ("triton", None), ("triton", "fused")], ids=lambda p: "-".join(filter(None, p))
)
def backend_design(request) -> tuple[str, str | None]:
    return request.param
