"""Build shim: says where the packages lie and runs CMake on csrc/. Everything else is in pyproject.toml.

PEFT_KERNELS_CUDA        auto (default): build the CUDA kernels if there is an nvcc · require: no nvcc is an error · off
PEFT_KERNELS_CUDA_ARCHS  handed to CMakeLists.txt: "native" or a list such as "80;90a"

What is built follows from the compiler alone: neither torch nor a driver is asked.
"""

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
EXTENSION = "peft_kernels._C"
LEFT_OUT = "peft_kernels/_C.left_out"  # why, where there is no extension: pip hides what a build prints
# Upstream has a distribution named triton_kernels, which others probe for by name: ours goes inside peft_kernels.
MAPPED = {
    "peft_kernels.triton_kernels": "triton_kernels",
    "peft_kernels.benchmarks": "benchmarks",
    "peft_kernels.benchmarks.floor": "benchmarks/floor",
    "peft_kernels.benchmarks.gpu": "benchmarks/gpu",
}


def find_nvcc():
    """nvcc or None, and the words for None: $CUDACXX alone if set, else looks in $CUDA_HOME, PATH, /usr/local/cuda."""
    if named := os.environ.get("CUDACXX"):
        return shutil.which(named), f"CUDACXX={named} is not a compiler"
    folders = [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    if home := os.environ.get("CUDA_HOME"):
        folders.insert(0, str(Path(home, "bin")))
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    return found, "no nvcc in CUDA_HOME, PATH or /usr/local/cuda (CUDACXX can name one)"


def find_tool(name, bin_dir):
    """`cmake` or `ninja`: from its Python package, which a build environment has, else from the PATH."""
    try:
        folder = getattr(importlib.import_module(name), bin_dir)
    except (ImportError, AttributeError):
        folder = ""
    tool = shutil.which(name, path=folder) or shutil.which(name)
    if tool is None:
        sys.exit(f"peft_kernels: {name} not found; `pip install {name}`, or set PEFT_KERNELS_CUDA=off")
    return tool


class CMakeBuild(build_ext):
    """Builds `_C` with CMake, or leaves it out and says so."""

    def run(self):
        mode = os.environ.get("PEFT_KERNELS_CUDA", "auto").lower()
        if mode not in ("auto", "require", "off"):
            sys.exit(f"peft_kernels: PEFT_KERNELS_CUDA={mode}: expected auto, require or off")
        self.nvcc, why = (None, "PEFT_KERNELS_CUDA=off") if mode == "off" else find_nvcc()
        note = (ROOT if self.inplace else Path(self.build_lib)) / LEFT_OUT
        note.unlink(missing_ok=True)
        if self.nvcc is None:
            if mode == "require":
                sys.exit(f"peft_kernels: PEFT_KERNELS_CUDA=require, but {why}")
            print(f"peft_kernels: CUDA kernels left out: {why}", flush=True)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(why, encoding="utf-8")
            self.extensions = []
            if self.inplace:  # a library of an earlier build must not outlive the decision
                (ROOT / self.get_ext_filename(EXTENSION)).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext):
        import pybind11  # a build requirement, needed only here

        archs = os.environ.get("PEFT_KERNELS_CUDA_ARCHS", "")
        # One folder per source tree, compiler, Python and set of architectures. It outlives this build, so editable
        # installs and wheels share objects and a repeated build compiles nothing.
        key = f"{ROOT}|{self.nvcc}|{archs}|{sysconfig.get_config_var('EXT_SUFFIX')}"
        build_dir = ROOT / "build" / "cmake" / hashlib.sha256(key.encode()).hexdigest()[:12]
        cmake, ninja = find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR")
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_CUDA_COMPILER={self.nvcc}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build_dir / 'lib'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-UPEFT_KERNELS_CUDA_ARCHS",  # or an earlier default would stay in CMake's cache
        ]
        if archs:
            configure.append(f"-DPEFT_KERNELS_CUDA_ARCHS={archs}")
        print(f"peft_kernels: building CUDA kernels with {self.nvcc}, archs: {archs or 'default'}", flush=True)
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build_dir), "--target", "_C"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(
                f"peft_kernels: building the CUDA kernels failed ({error}).\n"
                "Set PEFT_KERNELS_CUDA=off to install without them, or CUDACXX to name another nvcc."
            )
        (library,) = (build_dir / "lib").glob("_C.*")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)


class CleanBuild(build):
    """Starts from an empty staging folder: a module deleted since the last build must not reach the wheel."""

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    packages=find_packages(include=["peft_kernels", "peft_kernels.*"]) + list(MAPPED),
    package_dir=MAPPED,
    ext_modules=[Extension(EXTENSION, sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
