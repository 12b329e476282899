"""A pytest plugin: the tests that run an operation's kernels, and nothing else; it says of each where they ran.

    python -m pytest -p real_kernels tests/test_gated_query.py

On a GPU machine the GPU is what is scarce: plain torch, the emulation of CUDA on a CPU, the mutants and what never gets
to a launch are run elsewhere, and counted here. Every test prints a record that `peft_kernels.benchmarks.gpu` reads,
with workers, too; a worker whose GPU has faulted ends, and another one takes over.
"""

import json
import os
from collections import Counter

import pytest

ELSEWHERE = {"_mutants": "mutants", "_errors": "bad input, which nothing is launched for"}  # by how a file's name ends


def why_left_out(stem: str, parameters: dict, marked: bool | None = None) -> str | None:
    """Why a test has no kernels of a GPU to run, by its file, its marker if it has one, or its parameters; or None."""
    for ending, why in ELSEWHERE.items():
        if stem.endswith(ending):
            return why
    if marked is not None:
        return None if marked else "nothing to launch"
    named = {name: str(value) for name, value in parameters.items()}
    if "_cuda" in stem:
        return None if named.get("device") == "cuda" else "CUDA's kernels emulated on a CPU, or none"
    design = parameters.get("backend_design")
    backend = named.get("backend") or (design[0] if design else None)
    if backend == "torch":
        return "torch's own kernels"
    return None if backend in ("triton", "cuda") else "names no backend"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Kernels(config))


class Kernels:
    """Selects and counts where tests run; tells where they are started from, which with workers is elsewhere."""

    def __init__(self, config: pytest.Config):
        self.config, self.told = config, set()
        self.left_out, self.launched = Counter(), Counter()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        kept, gone = [], []
        for item in items:
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            marker = item.get_closest_marker("kernels")
            why = why_left_out(item.path.stem, parameters, marker and marker.kwargs.get("run", True))
            (gone if why else kept).append(item)
            self.left_out.update([why] if why else [])
        items[:] = kept
        config.hook.pytest_deselected(items=gone)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        import torch  # only where tests run

        from peft_kernels.benchmarks.gpu.launches import counted

        with counted() as self.launched:
            result = yield
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:  # every later test of this process would fail for this one
                os._exit(3)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        report.user_properties = [("launches", dict(self.launched)), ("left_out", dict(self.left_out))]
        return report

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.tell(report, "error" if report.failed and report.when in ("setup", "teardown") else report.outcome)

    def pytest_collectreport(self, report):
        """Called for a file that cannot be collected; every worker says it."""
        if not report.passed and report.nodeid not in self.told:
            self.told.add(report.nodeid)
            self.tell(report, "error" if report.failed else report.outcome)

    def tell(self, report, outcome: str) -> None:
        if hasattr(self.config, "workerinput"):
            return
        found = dict(getattr(report, "user_properties", ()))
        if "left_out" in found and "left_out" not in self.told:
            self.told.add("left_out")
            self._print({"left_out": found["left_out"]})
        reason = report.longrepr[2].removeprefix("Skipped: ") if outcome == "skipped" else None
        record = {"test": report.nodeid, "outcome": outcome, "reason": reason}
        self._print(record | {"launches": found.get("launches", {})})

    def _print(self, record: dict) -> None:
        self.config.get_terminal_writer().line(f"\nrecord {json.dumps(record)}")
