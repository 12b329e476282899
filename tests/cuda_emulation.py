"""Builds csrc/ with g++ on csrc/host_emulation.h: a module `peft_kernels._C` whose kernels run on the CPU."""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
KERNELS = "lowrank_linear_fwd.cu", "lowrank_linear_bwd.cu"
DEFINES = "PEFT_KERNELS_EMULATED=1", 'PEFT_KERNELS_BUILT_ARCHS="host"', 'PEFT_KERNELS_CUDA_VERSION="none"'
FLAGS = "-std=c++17 -fPIC -fno-strict-aliasing -U_FORTIFY_SOURCE -fvisibility=hidden -Wall -Wno-unknown-pragmas"


def build(replacements=(), optimize="-O1"):
    """Path of the compiled module. `replacements`, for mutants: (file, old, new), where `old` occurs once.

    Objects and modules are cached by content, so a mutant recompiles one file and an unchanged tree nothing.
    """
    sources = {
        path.name: path.read_text() for path in sorted(CSRC.iterdir()) if path.suffix in (".cu", ".cuh", ".h", ".cpp")
    }
    for file, old, new in replacements:
        assert sources[file].count(old) == 1, f"{file}: expected once: {old!r}"
        sources[file] = sources[file].replace(old, new)
    cache = Path(tempfile.gettempdir()) / f"peft_kernels_emulation_{os.getuid()}"
    cache.mkdir(exist_ok=True)
    headers = "".join(text for name, text in sources.items() if name.endswith("h"))
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several pytest workers compiles, the others wait
        objects = [_object(cache, sources, headers, name, optimize) for name in KERNELS]
        objects.append(_object(cache, sources, sources["lowrank_linear.h"], "bindings.cpp", "-O0"))
        module = cache / _digest(*map(str, objects)) / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not module.exists():
            module.parent.mkdir(exist_ok=True)
            _compile(module, "-shared", *map(str, objects))
    return module


def _object(cache, sources, headers, name, optimize):
    import pybind11

    flags = [*FLAGS.split(), optimize, *(f"-D{define}" for define in DEFINES)]
    if name == "bindings.cpp":
        flags += ["-I", pybind11.get_include(), "-I", sysconfig.get_path("include")]
    result = cache / f"{_digest(headers, sources[name], *flags)}.o"
    if not result.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            for file, text in sources.items():
                Path(folder, file).write_text(text)
            _compile(result, *flags, "-c", "-x", "c++", str(Path(folder, name)))
    return result


def _compile(result, *arguments):
    unfinished = result.with_suffix(".part")
    run = subprocess.run(
        [os.environ.get("CXX", "g++"), *arguments, "-o", str(unfinished)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    unfinished.rename(result)


def _digest(*texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def load(path):
    # Each module has a name of its own: pybind11 returns the module it has by that name, whatever the path.
    spec = importlib.util.spec_from_file_location(f"emulation_{path.parent.name}._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def installed(module):
    """Inside, `peft_kernels._C` is this module."""
    before = sys.modules.get("peft_kernels._C")
    sys.modules["peft_kernels._C"] = module
    try:
        yield module
    finally:
        if before is None:
            del sys.modules["peft_kernels._C"]
        else:
            sys.modules["peft_kernels._C"] = before
