"""What is installed: the wheel's contents and behaviour from an empty directory, the editable install, and the choices
that PEFT_KERNELS_CUDA makes.

Packages are built without isolation and go into environments that see this one's packages through a .pth file, so that
nothing is downloaded. CMake's folder under build/ is shared with the install being tested: nothing is compiled twice.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
OFF = {"PEFT_KERNELS_CUDA": "off"}
NO_NVCC = {"PEFT_KERNELS_CUDA": "auto", "CUDACXX": "/nonexistent/nvcc"}
NOT_A_COMPILER = {"PEFT_KERNELS_CUDA": "auto", "CUDACXX": shutil.which("false") or "false"}
# Does a plain build here have CUDA kernels? The same places as in setup.py.
NVCC_PLACES = [os.environ.get("CUDA_HOME", "") + "/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
HAS_NVCC = os.environ.get("PEFT_KERNELS_CUDA") != "off" and any(
    map(shutil.which, [os.environ["CUDACXX"]] if os.environ.get("CUDACXX") else NVCC_PLACES)
)
pytestmark = pytest.mark.timeout(900)  # the first build may have to compile every kernel


def run(*command, cwd, **environment):
    """(exit status, output) of a command in this process's environment, changed by `environment`."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET", "PEFT_KERNELS_BACKEND")}
    ran = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=900,
    )
    return ran.returncode, ran.stdout


def pip(*arguments, python=sys.executable, cwd=ROOT, **environment):
    """One at a time, whatever the number of pytest workers: builds share folders under build/."""
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return run(python, "-m", "pip", *arguments, cwd=cwd, **environment)


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


def clean_environment(folder):
    """The Python of a new environment that has this one's packages, except peft_kernels in whatever form."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)[1].strip())
    others = folder / "others"
    others.mkdir()
    places = [Path(place) for place in sys.path if re.search(r"/(site|dist)-packages$", place)]
    for entry in (entry for place in places if place.is_dir() for entry in place.iterdir()):
        link = others / entry.name
        if not re.search(r"peft[_-]kernels", entry.name) and entry.suffix != ".pth" and not link.is_symlink():
            link.symlink_to(entry)
    (packages / "others.pth").write_text(f"{others}\n")
    return python, packages


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    status, output = pip("wheel", "-v", "--no-deps", "--no-build-isolation", "-w", folder, ".")
    assert status == 0, output[-2000:]
    (path,) = folder.glob("*.whl")
    return path, output


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    python, packages = clean_environment(tmp_path_factory.mktemp("clean"))
    status, output = pip("install", "--no-deps", "--no-index", wheel[0], python=python)
    assert status == 0, output[-2000:]
    return python, packages


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, so that an editable install does not touch the one under test."""
    folder = tmp_path_factory.mktemp("checkout")
    skip = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.egg-info", "*.so", "results")
    shutil.copytree(ROOT, folder, ignore=skip, dirs_exist_ok=True)
    return folder


# ---- the wheel ------------------------------------------------------------------------------------------------------


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel[0]).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"peft_kernels"}
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "peft_kernels").rglob("*.py")}
    for folder in ("triton_kernels", "benchmarks"):
        wanted |= {f"peft_kernels/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == wanted
    demo = {"search.json", *(f"pretrained/retrieval/{name}" for name in ("adapter_model.safetensors", "result.json"))}
    assert demo <= {name.removeprefix("peft_kernels/demo/") for name in names}
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    assert [name for name in names if name.endswith(".so")] == ([f"peft_kernels/_C{EXT_SUFFIX}"] if HAS_NVCC else [])
    assert not [name for name in names if name.endswith((".cu", ".cuh", ".o"))]


def test_wheel_works_from_an_empty_directory(installed, empty):
    python, packages = installed
    code = """
import json
from importlib.util import find_spec
import peft_kernels, peft_kernels.triton_kernels, peft_kernels.benchmarks
print(json.dumps([peft_kernels.__file__, peft_kernels.triton_kernels.__file__, peft_kernels.__version__]))
print(json.dumps([find_spec(name) for name in ("triton_kernels", "benchmarks", "csrc", "tests")]))
"""
    status, output = run(python, "-c", code, cwd=empty)
    assert status == 0, output[-2000:]
    version = re.search(r'^version = "(.*?)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    inside = packages / "peft_kernels"
    found = [json.loads(line) for line in output.splitlines()]
    assert found[0] == [str(inside / "__init__.py"), str(inside / "triton_kernels" / "__init__.py"), version]
    assert found[1] == [None] * 4, "only peft_kernels may be at the top of site-packages"


def test_a_checkout_works_beside_the_installation(installed, checkout):
    """Python that is started in the repository's root imports the checkout, whose folders nothing maps."""
    python, packages = installed
    settings = {"PYTHONDONTWRITEBYTECODE": "1"}
    code = "import peft_kernels.triton_kernels as t, peft_kernels.benchmarks.floor as f; print(t.__file__, f.__file__)"
    status, output = run(python, "-c", code, cwd=checkout, **settings)
    places = [str(checkout / folder / "__init__.py") for folder in ("triton_kernels", "benchmarks/floor")]
    assert (status, output.split()) == (0, places), output
    status, output = run(python, "-m", "peft_kernels", "env", cwd=checkout, **settings)
    told = f"{checkout / 'peft_kernels'}, and not {packages / 'peft_kernels'}, which is installed"
    assert status == 0 and told in output, output[-2000:]


@pytest.mark.skipif(not HAS_NVCC, reason="no nvcc: the wheel holds no _C")
def test_extension_is_independent_of_torch_and_driver(installed, empty):
    python, packages = installed
    status, output = run(python, "-c", "import peft_kernels._C as c; print(c.build_info())", cwd=empty)
    assert status == 0 and "lowrank_linear" in output, output[-2000:]
    library = packages / "peft_kernels" / f"_C{EXT_SUFFIX}"
    status, output = run("readelf", "-d", library, cwd=empty)
    assert status == 0, output[-2000:]
    needed = re.findall(r"\(NEEDED\)\s+Shared library: \[(.*?)\]", output)
    allowed = re.compile(r"(libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux[\w-]*)\.so")
    assert needed and not [name for name in needed if not allowed.match(name)]
    assert "RPATH" not in output and "RUNPATH" not in output
    status, output = run("nm", "-D", "--undefined-only", "-C", library, cwd=empty)
    assert status == 0, output[-2000:]
    assert not re.findall(r"\b(?:c10|at|torch|caffe2)::\w+|\b(?:aoti_)?torch_\w+|\bcu(?:da)?[A-Z]\w+", output)


def test_sdist_holds_what_a_build_needs(checkout, tmp_path):
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    status, output = run(sys.executable, "-c", code, cwd=checkout)
    assert status == 0, output[-2000:]
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE"}
    for folder in ("csrc", "peft_kernels", "triton_kernels", "benchmarks"):
        wanted |= {path.relative_to(checkout).as_posix() for path in (checkout / folder).rglob("*.[pch]*")}
    assert wanted <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


# ---- PEFT_KERNELS_CUDA ----------------------------------------------------------------------------------------------


def build(folder, **environment):
    """(exit status, output, names in the wheel) of a wheel built with these settings."""
    status, output = pip("wheel", "-v", "--no-deps", "--no-build-isolation", "-w", folder, ".", **environment)
    names = [name for path in folder.glob("*.whl") for name in zipfile.ZipFile(path).namelist()]
    return status, output, names


def test_build_says_what_it_did(wheel):
    assert f"peft_kernels: {'building CUDA kernels with' if HAS_NVCC else 'CUDA kernels left out'}" in wheel[1]


@pytest.mark.parametrize(
    ("settings", "why"),
    [(OFF, "PEFT_KERNELS_CUDA=off"), (NO_NVCC, "CUDACXX=/nonexistent/nvcc is not a compiler")],
    ids=["off", "no nvcc"],
)
def test_kernels_left_out(tmp_path, settings, why):
    status, output, names = build(tmp_path, **settings)
    assert status == 0, output[-2000:]
    assert f"peft_kernels: CUDA kernels left out: {why}" in output
    assert {"peft_kernels/__init__.py", "peft_kernels/_C.left_out"} <= {*names}
    assert not [name for name in names if name.endswith(".so")]
    (path,) = tmp_path.glob("*.whl")
    assert zipfile.ZipFile(path).read("peft_kernels/_C.left_out").decode() == why


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (NO_NVCC | {"PEFT_KERNELS_CUDA": "require"}, "PEFT_KERNELS_CUDA=require, but CUDACXX=/nonexistent/nvcc is not"),
        ({"PEFT_KERNELS_CUDA": "yes"}, "PEFT_KERNELS_CUDA=yes: expected auto, require or off"),
        (NOT_A_COMPILER, "Set PEFT_KERNELS_CUDA=off to install without them"),
    ],
    ids=["require", "unknown value", "failing compiler"],
)
def test_build_refuses(tmp_path, settings, message):
    status, output, names = build(tmp_path, **settings)
    assert status != 0 and names == []
    assert message in output


# ---- the editable install -------------------------------------------------------------------------------------------


def test_editable_install(checkout, tmp_path, empty):
    python, _ = clean_environment(tmp_path / "clean")
    stale = checkout / "peft_kernels" / f"_C{EXT_SUFFIX}"
    stale.write_bytes(b"the library of an earlier build")
    command = ("install", "--no-deps", "--no-index", "--no-build-isolation", "-e", ".")
    status, output = pip(*command, python=python, cwd=checkout, **OFF)
    assert status == 0, output[-2000:]
    assert not stale.exists(), "a library that was left out must not be importable"
    status, output = run(python, "-m", "peft_kernels", "env", cwd=empty)
    assert (status, "left out of this installation, PEFT_KERNELS_CUDA=off" in output) == (0, True), output[-2000:]
    code = "import peft_kernels.triton_kernels as t, peft_kernels.benchmarks as b; print(t.__file__, b.__file__)"
    for cwd in (empty, checkout):
        status, output = run(python, "-c", code, cwd=cwd)
        places = [str(checkout / folder / "__init__.py") for folder in ("triton_kernels", "benchmarks")]
        assert (status, output.split()) == (0, places), output
    code = "import importlib.util; print(importlib.util.find_spec('triton_kernels'))"
    assert run(python, "-c", code, cwd=empty) == (0, "None\n")


# ---- importing ------------------------------------------------------------------------------------------------------


def test_import_adds_little_to_torch(empty):
    """No kernels, no integration and no other package: torch's own import takes ten times as long as what is left."""
    code = "import sys, torch; before = set(sys.modules); import peft_kernels; print(*(set(sys.modules) - before))"
    status, output = run(sys.executable, "-c", code, cwd=empty)
    assert status == 0, output[-2000:]
    added = {name.split(".")[0] for name in output.split()} - set(sys.stdlib_module_names)
    assert added - {"safetensors"} == {"peft_kernels"}
    asked = {"triton_kernels.support", "triton_kernels.config", "cuda_kernels.support"}  # what a backend cannot run
    names = [name.partition(".")[2] for name in output.split()]
    unwanted = ("triton_kernels.", "cuda_kernels.", "_C", "integrations")
    assert {name for name in names if name.startswith(unwanted)} <= asked
