"""Races in the CUDA kernels, found on the host emulation. With any barrier of csrc/ left out, the results of the chosen
problems differ; where they do not, ThreadSanitizer must report it. It must report nothing as they are. `make races`:
ThreadSanitizer on all problems, and for every barrier left out."""

import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_emulation
import pytest
import races_cuda_cases
import torch

PLANTED = Path(__file__).with_name("races_cuda_planted.cu")


def barriers(*paths):
    """Every barrier of these sources, as "file:line"."""
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            count = len(re.findall(r"\b__sync(?:threads|warp)\(", line.split("//")[0]))
            assert count <= 1, f"{path.name}:{number}: one barrier a line, so that each has a name"
            if count:
                yield f"{path.name}:{number}"


BARRIERS = sorted(barriers(*cuda_emulation.CSRC.glob("*.cu"), *cuda_emulation.CSRC.glob("*.cuh")))


# ---- by their results ------------------------------------------------------------------------------------------------


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value or ()
    return [t for one in values for t in flat(one)]


@functools.cache
def barriers_of(operation):
    """{barrier that its chosen problems reach: do results differ without it?}"""
    with cuda_emulation.kernels_on("cpu"):
        emulation = cuda_emulation.controls(cuda_emulation.emulated_module().__file__)
        emulation.emulation_reached()  # forgets what other tests of this process have reached

        def run(case):
            return flat(races_cuda_cases.run(operation, case)), emulation.emulation_reached().decode().split()

        def notices(case, results, place):
            file, line = place.split(":")
            emulation.emulation_skip(file.encode(), int(line))
            try:
                return not all(map(torch.equal, run(case)[0], results))
            except AssertionError:  # the launchers' callers check some things themselves
                return True
            finally:
                emulation.emulation_skip(b"", 0)

        reaching = {}
        for case in races_cuda_cases.CHOSEN[operation]:
            results, paths = run(case)
            assert results and not any(t.isnan().any() for t in results)
            for place in {Path(path).name for path in paths}:
                reaching.setdefault(place, []).append((case, results))
        return {place: any(notices(*done, place) for done in reaching[place]) for place in sorted(reaching)}


@pytest.mark.parametrize("operation", races_cuda_cases.CHOSEN)
def test_missing_barriers_change_results(operation):
    """All but at most one, whose two sides random orders rarely exchange; ThreadSanitizer has to see that."""
    noticed = barriers_of(operation)
    own = [place for place in noticed if place.startswith(operation)]  # others are another operation's kernels
    assert own == [place for place in BARRIERS if place.startswith(operation)]
    assert list(noticed.values()).count(False) <= 1, noticed


# ---- by ThreadSanitizer ----------------------------------------------------------------------------------------------


def watched(command, **options):
    """Runs Python in a process that has ThreadSanitizer's library, where that can be."""
    compiler = os.environ.get("CXX", "g++")
    library = subprocess.run([compiler, "-print-file-name=libtsan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip(f"{compiler} has no ThreadSanitizer: no libtsan.so")
    options = {"halt_on_error": 1, "exitcode": 66, "report_thread_leaks": 0, "symbolize": 0} | options
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = os.environ | one | {"LD_PRELOAD": library}
    environment["TSAN_OPTIONS"] = " ".join(f"{name}={value}" for name, value in options.items())
    # It needs memory at addresses that some kernels' randomisation takes.
    for prefix in ([], [shutil.which("setarch") or "setarch", platform.machine(), "-R"]):
        python = [*prefix, sys.executable]
        try:
            trial = subprocess.run([*python, "-c", "print(1)"], env=environment, capture_output=True, text=True)
        except FileNotFoundError:
            continue
        if trial.stdout == "1\n":
            return subprocess.run(
                [*python, *command], env=environment, cwd=cuda_emulation.TESTS, capture_output=True, text=True
            )
    pytest.skip(f"ThreadSanitizer does not run on this machine: {trial.stderr.strip()[-300:]}")


def examine(cases, operations, left_out, few=False):
    task = {
        "module": str(cuda_emulation.build(watched=True, few=few)),
        "planted": str(cuda_emulation.build(watched=True, instead=PLANTED)),
        "cases": cases,
        "operations": operations,
        "barriers": left_out,
    }
    child = watched(["races_cuda.py", json.dumps(task)])
    assert child.returncode == 0, child.stderr[-3000:]
    results = json.loads(child.stdout)
    planted, kernels = results["planted"], results["kernels"]
    assert planted["reported"] is None and all(planted["faults"].values()), planted
    assert planted["barriers"] == dict.fromkeys(barriers(PLANTED), True)
    assert kernels["reported"] is None, f"{kernels['reported']}\n{child.stderr[-3000:]}"
    return kernels["barriers"]


@pytest.mark.timeout(900)
def test_chosen_problems_have_no_race_and_no_barrier_is_missed():
    left_out = [place for o in races_cuda_cases.CHOSEN for place, noticed in barriers_of(o).items() if not noticed]
    assert examine("CHOSEN", list(races_cuda_cases.CHOSEN), left_out, few=True) == dict.fromkeys(left_out, True)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("operation", races_cuda_cases.ALL)
def test_no_problem_has_a_race(operation):
    examine("ALL", [operation], [])


@pytest.mark.sweep
@pytest.mark.timeout(3600)
def test_every_missing_barrier_is_reported():
    assert examine("CHOSEN", list(races_cuda_cases.CHOSEN), None) == dict.fromkeys(BARRIERS, True)
