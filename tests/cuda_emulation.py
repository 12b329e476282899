"""Builds csrc/ with g++ on csrc/host_emulation.h: a module `peft_kernels._C` whose kernels run on the CPU.

Also what every test of the CUDA kernels needs: where they run here, and memory that ends at an unmapped page.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import mmap
import multiprocessing
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

from peft_kernels.records import MOST_PROJECTIONS
from peft_kernels.triton_kernels import config

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
COMMON = ("LONGEST_CHAIN", "MOST_CHUNK_READS", "PHILOX_ROUNDS", "SEGMENT_ROWS")  # as CMakeLists.txt has them
DEFINES = (
    *("PEFT_KERNELS_EMULATED=1", 'PEFT_KERNELS_BUILT_ARCHS="host"', 'PEFT_KERNELS_CUDA_VERSION="none"'),
    *(f"PEFT_KERNELS_{name}={getattr(config, name)}" for name in COMMON),
    f"PEFT_KERNELS_MOST_PROJECTIONS={MOST_PROJECTIONS}",
)
FLAGS = "-std=c++17 -fPIC -fno-strict-aliasing -fvisibility=hidden -Wall -Wno-unknown-pragmas"

# Kernels for float32, bfloat16 and one range of ranks: a third of the time to compile all of them.
ABSENT = 'throw std::runtime_error("not compiled for this dtype or rank");'
FEW = [
    ("lowrank_linear.cuh", "else f(__half{});", f"else {ABSENT}"),
    ("lowrank_linear.cuh", "if (rank <= 32) f(type, std::integral_constant<int, 32>{});\n        else if", "if"),
    ("lowrank_linear.cuh", "else f(type, std::integral_constant<int, 128>{});", f"else {ABSENT}"),
]


# ---- building --------------------------------------------------------------------------------------------------------


def build(replacements=(), only="", watched=False, few=False, instead=None):
    """Path of the compiled module. `replacements`, for mutants: (file, old, new), where `old` occurs once; sources
    whose names do not begin with `only` keep the old text. watched: for a process with ThreadSanitizer's library.
    few: with FEW kernels. instead: a source to compile instead of those in csrc/.

    Objects and modules are cached by content, so a mutant recompiles what it changes (FEW kernels, with -O0, which is
    quicker to compile and slower to run) and an unchanged tree nothing.
    """
    sources = {path.name: path.read_text() for path in sorted(CSRC.iterdir())}
    if instead:
        sources[instead.name] = instead.read_text()
    names = (instead.name, "host_emulation.cpp") if instead else filter(re.compile(r".*\.(cu|cpp)").fullmatch, sources)
    changed = _replaced(sources, replacements)
    small = _replaced(changed, FEW)
    objects = {}
    for name in names:
        files = _read_by(name, sources)
        mutant = name.startswith(only) and _read_by(name, changed) != files
        files = _read_by(name, small) if mutant or few else files
        flags = _flags(name, quick=mutant, watched=watched)
        objects[_cached(".o", *map(str, sorted(files.items())), *flags)] = files, name, flags
    module = _cached(sysconfig.get_config_var("EXT_SUFFIX"), *map(str, objects))
    _make({path: functools.partial(_compile_source, *source) for path, source in objects.items()})
    _make({module: lambda result: _compile(result, "-shared", *map(str, objects))})
    return module


def _replaced(texts, replacements):
    texts = dict(texts)
    for file, old, new in replacements:
        assert texts[file].count(old) == 1, f"{file}: expected once: {old!r}"
        texts[file] = texts[file].replace(old, new)
    return texts


def _flags(name, quick, watched):
    flags = [*FLAGS.split(), *(f"-D{define}" for define in DEFINES)]
    if name == "bindings.cpp":
        import pybind11

        return [*flags, "-O0", "-I", pybind11.get_include(), "-I", sysconfig.get_path("include")]
    if name == "host_emulation.cpp":
        return [*flags, "-O2"]
    flags += ["-fsanitize=thread", "-g1"] if watched else []
    return [*flags, "-O0" if quick else "-O1"]


def _read_by(name, sources):
    """{file: text} of a source and of all that it includes from this folder."""
    found, unread = {}, [name]
    while unread:
        file = unread.pop()
        if file in sources and file not in found:
            found[file] = sources[file]
            unread += re.findall(r'#include "([^"]+)"', sources[file])
    return found


def _cached(suffix, *content):
    cache = Path(tempfile.gettempdir()) / f"peft_kernels_emulation_{os.getuid()}"
    cache.mkdir(exist_ok=True)
    return cache / (hashlib.sha256("\0".join(content).encode()).hexdigest()[:16] + suffix)


def _make(files):
    """Makes what is missing of {path: function of it}. Of several pytest workers each makes what no other is making,
    and then waits for the others."""
    for flags in (fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_EX):
        for path, make in files.items():
            if path.exists():
                continue
            with path.with_suffix(".lock").open("w") as lock, contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, flags)
                if not path.exists():
                    make(path)


def _compile_source(files, name, flags, result):
    with tempfile.TemporaryDirectory(dir=result.parent) as folder:
        for file, text in files.items():
            Path(folder, file).write_text(text)
        _compile(result, *flags, "-c", "-x", "c++", str(Path(folder, name)))


def _compile(result, *arguments):
    unfinished = result.with_suffix(".part")
    run = subprocess.run(
        [os.environ.get("CXX", "g++"), *arguments, "-o", str(unfinished)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    unfinished.rename(result)


# ---- running ---------------------------------------------------------------------------------------------------------


def load(path):
    # Each module has a name of its own: pybind11 returns the module it has by that name, whatever the path.
    spec = importlib.util.spec_from_file_location(f"emulation_{path.name.split('.')[0]}._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def installed(module):
    """Inside, `peft_kernels._C` is this module."""
    before = sys.modules.get("peft_kernels._C")
    sys.modules["peft_kernels._C"] = module
    forget()
    try:
        yield module
    finally:
        forget()
        if before is None:
            del sys.modules["peft_kernels._C"]
        else:
            sys.modules["peft_kernels._C"] = before


def forget():
    """What launchers and operations keep for a kind of call is of the module that was there when they first saw one."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("peft_kernels.cuda_kernels", "peft_kernels.ops")):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
            getattr(module, "_plans", {}).clear()


def controls(path):
    """The emulation's own functions in that module: emulation_seed, emulation_skip, emulation_reached and
    emulation_launched."""
    library = ctypes.CDLL(path)
    library.emulation_reached.restype = ctypes.c_char_p
    return library


@functools.cache
def emulated_module():
    return load(build())


def _real_module():
    try:
        module = importlib.import_module("peft_kernels._C")
    except ImportError:
        return None
    return None if module.build_info()["emulated"] else module


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() and _real_module() else ["cpu"]


@contextlib.contextmanager
def kernels_on(device):
    """Inside, the CUDA kernels run there: emulated on the CPU, in orders that repeat, or the real ones."""
    if device != "cpu":
        yield device
        return
    controls(emulated_module().__file__).emulation_seed(0)
    with installed(emulated_module()):
        yield device


# ---- bounds ----------------------------------------------------------------------------------------------------------


def guarded(shape, dtype, at_end):
    """A NaN-filled tensor that begins, or ends, at an unmapped page."""
    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    libc.mmap.restype, libc.mmap.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long],
    )
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    count = max(1, torch.Size(shape).numel())
    used = count * dtype.itemsize
    whole = -(-used // page) * page
    base = libc.mmap(None, whole + 2 * page, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    libc.mprotect(base + page, whole, mmap.PROT_READ | mmap.PROT_WRITE)
    memory = (ctypes.c_char * used).from_address(base + page + (whole - used if at_end else 0))
    return (
        torch.frombuffer(memory, dtype=dtype)
        .fill_(torch.nan if dtype.is_floating_point else 1)[: torch.Size(shape).numel()]
        .view(shape)
    )


def fenced(value, at_end):
    """Tensors, alone or in a tuple, a record, a list or a dictionary, as copies that are guarded; the rest as it is."""
    if isinstance(value, torch.Tensor):
        return guarded(value.shape, value.dtype, at_end).copy_(value)
    if hasattr(value, "_fields"):
        return type(value)(*(fenced(one, at_end) for one in value))
    if isinstance(value, dict):
        return {name: fenced(one, at_end) for name, one in value.items()}
    return type(value)(fenced(one, at_end) for one in value) if isinstance(value, (tuple, list)) else value


def assert_inside_bounds(call):
    """call(at_end) with all new memory guarded, at either end. In a process of its own: whatever a kernel sees is
    fenced, and an access beyond it is a segmentation fault."""
    process = multiprocessing.get_context("fork").Process(target=_run_fenced, args=(call, emulated_module()))
    process.start()
    process.join()
    assert process.exitcode == 0, f"exit code {process.exitcode}"


def _run_fenced(call, module):
    torch.set_num_threads(1)  # OpenMP's other threads were left behind
    sys.modules["peft_kernels._C"] = module
    for at_end in (True, False):
        torch.empty = lambda *shape, dtype=torch.float32, device=None: guarded(shape, dtype, at_end)  # noqa: B023
        torch.empty_like = lambda t: guarded(t.shape, t.dtype, at_end)  # noqa: B023
        torch.Tensor.new_empty = lambda t, *shape: guarded(shape, t.dtype, at_end)  # noqa: B023
        call(at_end)
