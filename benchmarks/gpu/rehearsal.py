"""Runs a module as on a GPU machine, on one without a GPU: all that is called, compiled and launched, without numbers.

    python -m peft_kernels.benchmarks.gpu.rehearsal MODULE [ARGUMENT …]

torch has the GPU of pretend.py, on which nothing is computed: every result reads as 0, so that a comparison passes
and proves nothing. Triton compiles each kernel for sm_90 and driver.py checks each launch. The CUDA extension is called
up to its first launch, whose "no driver" is taken for success. torch.compile and the capture of graphs do nothing.
"""

import runpy
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from peft_kernels.cuda_kernels import extension

from .driver import checked_launches
from .pretend import pretended_gpu

NO_DRIVER = ("CUDA driver version is insufficient", "no CUDA-capable device")


@dataclass
class Rehearsed:
    """What one process compiled and launched."""

    began: float = field(default_factory=time.perf_counter)
    compiled: list[tuple[str, float]] = field(default_factory=list)  # the kernel's name, seconds
    signatures: set[tuple] = field(default_factory=set)  # triton 3.6 builds a C launcher for each, by gcc
    launches: Counter[str] = field(default_factory=Counter)
    cuda: Counter[str] = field(default_factory=Counter)

    def listen(self, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        self.signatures.add(tuple(src.signature.values()))
        if not cache_hit:
            self.compiled.append((src.fn.__name__, times.total / 1e6))

    def __str__(self) -> str:
        kernels, seconds = len(self.compiled), sum(seconds for _, seconds in self.compiled)
        return (
            f"rehearsed in {time.perf_counter() - self.began:.0f} s: {kernels} kernels compiled in {seconds:.1f} s, "
            f"{len(self.signatures)} signatures, {self.launches.total()} launches of {len(self.launches)} kernels, "
            f"{self.cuda.total()} calls of the CUDA extension"
        )


@contextmanager
def stage() -> Iterator[Rehearsed]:
    """This process has a GPU, as far as the package and its benchmarks can tell, until the block ends."""
    from triton import knobs

    done = Rehearsed()
    with ExitStack() as scenery:
        scenery.enter_context(pretended_gpu())
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


def main(argv: Sequence[str]) -> None:
    """The module's own exit status is this one's."""
    if not argv:
        sys.exit(__doc__)
    with stage() as done:
        sys.argv = list(argv)
        try:
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
        finally:
            print(done, file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
