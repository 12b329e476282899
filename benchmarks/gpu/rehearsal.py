"""Runs a module as on a GPU machine, on one without a GPU: all that is called, compiled and launched, without numbers.

    python -m peft_kernels.benchmarks.gpu.rehearsal MODULE [ARGUMENT …]

torch has the GPU of pretend.py, on which nothing is computed: every result reads as 0, so that a comparison passes
and proves nothing. Triton compiles each kernel for sm_90 and driver.py checks each launch. The CUDA extension is called
up to its first launch, whose "no driver" is taken for success. torch.compile and the capture of graphs do nothing, and
neither do compute-sanitizer and ncu. `make gpu-rehearsal` runs all of `make gpu` so.
"""

import os
import runpy
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from peft_kernels.cuda_kernels import common, extension

from .. import results, steps_methods
from ..kept import afresh
from . import process
from .driver import checked_launches
from .pretend import pretended_gpu

NO_DRIVER = ("CUDA driver version is insufficient", "no CUDA-capable device")
# In the place of what watches a process on a GPU: runs the process, and says what that would say of one without fault.
TOOL = """#!/bin/sh
while [ $# -gt 0 ] && [ "$1" != "{python}" ]; do shift; done
"$@"
status=$?
echo '{told}'
exit $status
"""
TOOLS = {
    "compute-sanitizer": "========= ERROR SUMMARY: 0 errors",
    "ncu": '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    '"0","none: a rehearsal","gpu__time_duration.sum","ns","0"',
}


@dataclass
class Rehearsed:
    """What one process compiled and launched."""

    began: tuple[float, float] = field(default_factory=lambda: _now())
    compiled: list[tuple[str, float]] = field(default_factory=list)  # the kernel's name, seconds
    signatures: set[tuple] = field(default_factory=set)  # triton 3.6 builds a C launcher for each, by gcc
    launches: Counter[str] = field(default_factory=Counter)
    cuda: Counter[str] = field(default_factory=Counter)

    def listen(self, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        self.signatures.add(tuple(src.signature.values()))
        if not cache_hit:
            self.compiled.append((src.fn.__name__, times.total / 1e6))

    def __str__(self) -> str:
        kernels, compiling = len(self.compiled), sum(seconds for _, seconds in self.compiled)
        seconds, busy = (now - then for now, then in zip(_now(), self.began))
        return (
            f"rehearsed in {seconds:.0f} s, {busy:.0f} s of a core: {kernels} kernels compiled in {compiling:.0f} s, "
            f"{len(self.signatures)} signatures, {self.launches.total()} launches of {len(self.launches)} kernels, "
            f"{self.cuda.total()} calls of the CUDA extension"
        )


def _now() -> tuple[float, float]:
    """Time, and that of cores that this process and its children have used: assemblers, for the most part."""
    used = os.times()
    return time.perf_counter(), used.user + used.system + used.children_user + used.children_system


@contextmanager
def stage() -> Iterator[Rehearsed]:
    """This process has a GPU, as far as the package and its benchmarks can tell, until the block ends."""
    from triton import knobs

    from peft_kernels.triton_kernels import replay

    done = Rehearsed()
    with ExitStack() as scenery:
        scenery.enter_context(afresh())
        scenery.enter_context(pretended_gpu())
        for module in (replay, common):  # what torch knows of CUDA itself, if it does
            scenery.enter_context(mock.patch.object(module, "_current_device", lambda: 0))
            scenery.enter_context(mock.patch.object(module, "_raw_stream", lambda index: 0))
        done.launches = scenery.enter_context(checked_launches())
        scenery.enter_context(mock.patch.object(knobs.compilation, "listener", done.listen))
        scenery.enter_context(_called_up_to_the_launch(done.cuda))
        yield done


@contextmanager
def _called_up_to_the_launch(counted: Counter[str]) -> Iterator[None]:
    try:
        module = extension()
    except ImportError:
        yield
        return

    def tried(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> None:
            counted[name] += 1
            try:
                function(*args)
            except RuntimeError as error:
                if not any(words in str(error) for words in NO_DRIVER):
                    raise

        return call

    with ExitStack() as patches:
        for name in [name for name in dir(module) if name.endswith(("_fwd", "_bwd")) or name == "philox_mask"]:
            patches.enter_context(mock.patch.object(module, name, tried(name, getattr(module, name))))
        yield


# ---- processes ------------------------------------------------------------------------------------------------------


@contextmanager
def _cast() -> Iterator[None]:
    """What `python -m peft_kernels.benchmarks.gpu` starts is on the stage, too; its files are a rehearsal's."""
    on_gpu = results.provenance
    with (
        mock.patch.object(process, "PYTHON", (sys.executable, "-m", __spec__.name)),
        mock.patch.object(results, "provenance", lambda device: on_gpu(device) | {"kind": "rehearsal"}),
        mock.patch.object(steps_methods, "_check_forward", lambda *_: None),  # transformers' ViLT reads its masks
        tempfile.TemporaryDirectory() as folder,
    ):
        for name, told in TOOLS.items():
            tool = Path(folder, name)
            tool.write_text(TOOL.format(python=sys.executable, told=told), encoding="utf-8")
            tool.chmod(0o755)
        with mock.patch.dict(os.environ, PATH=f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"):
            yield


def pytest_configure(config: Any) -> None:
    """As pytest's plugin: each of its workers is a process that has to be set up."""
    if hasattr(config, "workerinput"):
        on_stage = stage()
        done = on_stage.__enter__()
        config.add_cleanup(lambda: print(done, file=sys.__stderr__))
        config.add_cleanup(lambda: on_stage.__exit__(None, None, None))


def main(argv: Sequence[str]) -> None:
    """The module's own exit status is this one's."""
    if not argv:
        sys.exit(__doc__)
    name, *options = argv
    plugin = ["-p", __spec__.name] if name == "pytest" else []
    with stage() as done, _cast():
        sys.argv = [name, *plugin, *options]
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        finally:
            print(done, file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
