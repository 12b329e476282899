"""Launches that do nothing, so that all the host does for one can be counted and timed without a GPU."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from peft_kernels.backend import SUPPORT
from peft_kernels.cuda_kernels import extension
from peft_kernels.devices import asked_once, importable

from .kept import afresh

KERNELS = {"triton": "triton", "cuda": "peft_kernels._C"}  # what each backend cannot do without


@contextmanager
def launching_nothing() -> Iterator[Counter[str]]:
    """Both kernel backends take CPU tensors, and launch nothing, until the block ends.

    Yields how often, by name of Triton's kernel, or of the CUDA extension's function, which launches several; take the
    difference between two times. Triton compiles for sm_90, keeps and finds kernels and calls its own launcher, in
    which only the compiled function at the end is another. A GPU adds that function's 3 to 6 µs, and what torch.cuda
    does to name and to change device and stream. Results are whatever lay in memory.

    Raises RuntimeError in a process with TRITON_INTERPRET=1, whose kernels never reach a launcher.
    """
    counts: Counter[str] = Counter()
    with ExitStack() as patches:
        patches.enter_context(afresh())
        for name, launching in (("triton", _triton), ("cuda", _cuda)):
            problem = "" if importable(KERNELS[name]) else f"there is no {KERNELS[name]} here"
            answer = asked_once(lambda device_type, told=problem: told)  # in which a profiler sees the same calls
            patches.enter_context(mock.patch.object(SUPPORT[name], "missing", answer))
            if not problem:
                patches.enter_context(launching(counts))
        yield counts


def _counting(counts: Counter[str], name: str) -> Callable[..., None]:
    """A profiler sees one call, as of the compiled function in whose place this is."""
    counts.setdefault(name, 0)

    def launch(*_, **__) -> None:
        counts[name] += 1

    return launch


@contextmanager
def _cuda(counts: Counter[str]) -> Iterator[None]:
    module = extension()
    info = {**module.build_info(), "emulated": True}  # which makes the launchers take CPU tensors
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(module, "build_info", lambda: info))
        for name in filter(lambda name: name.endswith(("_fwd", "_bwd")), dir(module)):
            patches.enter_context(mock.patch.object(module, name, _counting(counts, name)))
        yield


@contextmanager
def _triton(counts: Counter[str]) -> Iterator[None]:
    from peft_kernels.triton_kernels import common

    if common.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1: interpreted kernels are not launched; run this without it")
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    from .gpu.driver import Driver

    class Utils(Driver.utils):
        """The compiled module of Triton 3.7; of 3.6, the one that it compiles for each launcher, too."""

        launch = None  # set for each launcher

        @staticmethod
        def build_signature_metadata(signature: list) -> bytes:
            return bytes(len(signature))

        @staticmethod
        def load_binary(*_) -> tuple[int, int, int, int, int]:
            return 1, 1, 32, 0, 1024

    class Launcher(nvidia.CudaLauncher):
        def __init__(self, src, metadata):
            Utils.launch = staticmethod(_counting(counts, metadata.name))
            super().__init__(src, metadata)

    class Nothing(Driver):
        utils, launcher_cls = Utils, Launcher

    compiled = {"compile_module_from_src": lambda **_: Utils, "library_dirs": list, "PyKernelArg": dict}
    with ExitStack() as patches:
        for name, replacement in compiled.items():
            patches.enter_context(mock.patch.object(nvidia, name, replacement, create=True))
        patches.enter_context(mock.patch.object(driver, "_active", Nothing()))
        yield
