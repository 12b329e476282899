"""The repository's shape: every operation has its whole slice, imports flow down, and no file does what it must not.

A check is a function from a repository's root to its problems. Each is run on this repository, on a small tree that is
right, and on that tree with one thing made wrong, so that no check can pass by looking at nothing.
"""

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ("torch_kernels", "cuda_kernels", "triton_kernels")
# Highest first. A module imports from lower lines only, or from its own package.
ORDER = (
    ("__main__",),  # the command, which nothing imports: `bench` calls benchmarks
    ("benchmarks", "demo"),
    ("plots",),
    ("",),  # peft_kernels/__init__.py
    ("integrations",),
    ("adapters",),
    ("layers",),
    ("objectives", "presets", "environment", "cores", "imitation", "blocks"),
    ("ops",),
    ("operator", "checks", "distance_plan", "quantized", "recomputed", "remembered", "rows"),
    ("autocast", "backend"),
    ("fastest", "kinds", "looks", "transforms"),
    BACKENDS,
    ("tables", "frozen_products"),
    ("records", "devices"),
    ("_C",),
)
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
KERNELS_KNOW = ("triton_kernels", "records", "tables", "devices", "frozen_products")
MAPPED = ("triton_kernels", "benchmarks")  # folders at the top that install inside peft_kernels


# ---- reading a tree -------------------------------------------------------------------------------------------------


def modules(root):
    """{dotted name: path} of everything that installs; a package goes by its own name."""
    found = {}
    for folder in ("peft_kernels", *MAPPED):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = ("peft_kernels", *parts) if folder in MAPPED else parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def operations(root):
    return sorted(path.stem for path in (root / "peft_kernels/ops").glob("[!_]*.py"))


def part_of(module):
    """The second component of a dotted name: "ops" of peft_kernels.ops.lowrank_linear."""
    return [*module.split("."), ""][1]


def imports(module, path, known):
    """(name, was relative) of every import in a file, those inside functions and import_module("…") included."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in known or inner == "peft_kernels._C" else base), node.level > 0
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, False


def every_import(root):
    known = modules(root)
    for module, path in known.items():
        for name, relative in imports(module, path, known):
            yield module, name, relative


def functions(path):
    """{name: "arguments with defaults"} of a file's top-level functions, annotations left out."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
            found[node.name] = ast.unparse(node.args)
    return found


def cuda_code(root):
    """(path, text without comments) of everything in csrc/."""
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix in (".cu", ".cuh", ".cpp", ".h"):
            yield path, re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


# ---- the checks -----------------------------------------------------------------------------------------------------


def slice_problems(root):
    """An operation has one name in every folder."""
    for op in operations(root):
        wanted = [
            *(f"{folder}/{op}.py" for folder in ("peft_kernels/torch_kernels", "peft_kernels/cuda_kernels")),
            *(f"triton_kernels/{op}.py", f"csrc/{op}.h", f"tests/test_{op}.py", f"benchmarks/bench_{op}.py"),
        ]
        yield from (f"{op}: no {file}" for file in wanted if not (root / file).is_file())
        if not list((root / "csrc").glob(f"{op}*.cu")):
            yield f"{op}: no csrc/{op}*.cu"
        if f"{op}_reference" not in functions(root / f"peft_kernels/ops/{op}.py"):
            yield f"{op}: no {op}_reference in peft_kernels/ops/{op}.py"


def backend_problems(root):
    """The three backends of an operation are interchangeable: the same launchers with the same arguments."""
    for op in operations(root):
        launchers = {}
        for folder in BACKENDS:
            path = root / ("" if folder in MAPPED else "peft_kernels") / folder / f"{op}.py"
            if path.is_file():
                found = functions(path)
                launchers[folder] = {name: found[name] for name in found if re.fullmatch(r"[a-z]\w*_(fwd|bwd)", name)}
        for name in sorted({name for found in launchers.values() for name in found}):
            if len(variants := {found.get(name, "missing") for found in launchers.values()}) > 1:
                yield f"{op}: {name} differs between backends: {sorted(variants)}"
        for folder, found in launchers.items():
            if f"{op}_fwd" not in found:  # a backward may be made of other operations' launchers
                yield f"{op}: no {op}_fwd in {folder}"


def argument_problems(root):
    """What belongs together is passed together: nobody has to give another module's function more than six in order."""
    for module, path in modules(root).items():
        if part_of(module) in ("benchmarks", "demo"):
            continue
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            demanded = len(node.args.posonlyargs) + len(node.args.args) - len(node.args.defaults)
            if demanded > 6 and not is_kernel:
                yield f"{module}: {node.name} takes {demanded} arguments in order"


def flow_problems(root):
    """Imports go down the list."""
    for module, name, _ in every_import(root):
        if part_of(module) not in RANK:
            yield f"{module}: {part_of(module)} has no place in the order of this test"
            continue
        elsewhere = name.split(".")[0] == "peft_kernels" and part_of(name) != part_of(module)
        if elsewhere and RANK.get(part_of(name), -1) <= RANK[part_of(module)]:
            yield f"{module} imports {name}, which is not below it"


def foreign_import_problems(root):
    """Kernels know torch, triton and what is passed to them; only kernels know triton, only integrations peft."""
    for module, name, relative in every_import(root):
        part, top = part_of(module), name.split(".")[0]
        if part == "triton_kernels":
            below = tuple(f"peft_kernels.{name}" for name in KERNELS_KNOW)
            inside = relative and name.startswith(below)
            if not inside and top not in {"torch", "triton", *sys.stdlib_module_names}:
                yield f"{module} imports {name}: torch, triton and relative imports of itself and records only"
        elif top == "triton" and part != "benchmarks":
            yield f"{module} imports triton"
        elif top in ("peft", "transformers") and part not in ("integrations", "benchmarks", "demo"):
            yield f"{module} imports {top}"


def package_problems(root):
    """setup.py finds packages by their __init__.py: a folder without one would be missing from wheels."""
    for path in modules(root).values():
        if not (path.parent / "__init__.py").is_file():
            yield f"{path.parent.relative_to(root)} has no __init__.py"


def atomic_problems(root):
    """Sums have a fixed order: no atomics in kernels."""
    for path in sorted((root / "triton_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", getattr(node, "id", None))
            if isinstance(name, str) and name.startswith("atomic_"):
                yield f"{path.relative_to(root)}:{node.lineno}: {name}"
    for path, code in cuda_code(root):
        for found in re.findall(r"\batomic[A-Z]\w*|\b(?:atom|red)\.\w+", code):
            yield f"{path.relative_to(root)}: {found}"


def torch_header_problems(root):
    """csrc/ does not depend on torch, so that one build serves every torch."""
    for path, code in cuda_code(root):
        for found in re.findall(r"#\s*include\s*[<\"]((?:torch|ATen|c10|caffe2)/[^>\"]*)", code):
            yield f"{path.relative_to(root)} includes {found}"


def build_requirement_problems(root):
    """Makefile installs what pyproject.toml builds with (it builds without isolation to keep objects)."""
    listed = re.search(r"^BUILD_REQUIRES := (.*)$", (root / "Makefile").read_text(), re.MULTILINE)[1]
    wanted = re.search(r"^requires = \[(.*)\]$", (root / "pyproject.toml").read_text(), re.MULTILINE)[1]
    if sorted(listed.replace('"', "").split()) != sorted(wanted.replace('"', "").replace(",", " ").split()):
        yield f"Makefile: {listed}; pyproject.toml: {wanted}"
    if re.search(r"\b(torch|triton)\b", wanted):
        yield f"a build requirement on torch or triton: {wanted}"


CHECKS = [value for name, value in list(globals().items()) if name.endswith("_problems")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_repository(check):
    assert list(check(ROOT)) == []


def test_something_is_checked():
    assert "lowrank_linear" in operations(ROOT)
    assert {"peft_kernels", "peft_kernels.triton_kernels.lowrank_linear"} <= modules(ROOT).keys()


# ---- that each check can fail ---------------------------------------------------------------------------------------

LAUNCHERS = "def double_fwd(x, scale=1.0):\n    pass\n\n\ndef double_bwd(dy, scale=1.0):\n    pass\n"
RIGHT = {
    "Makefile": 'BUILD_REQUIRES := "setuptools>=77" ninja\n',
    "pyproject.toml": '[build-system]\nrequires = ["setuptools>=77", "ninja"]\n',
    "benchmarks/__init__.py": "",
    "benchmarks/bench_double.py": "import peft\nfrom peft_kernels import double\n",
    "csrc/double.cu": '// no atomicAdd here\n#include "double.h"\n',
    "csrc/double.h": "",
    "peft_kernels/__init__.py": "from peft_kernels.ops.double import double\n",
    "peft_kernels/backend.py": "import torch\n",
    "peft_kernels/cuda_kernels/__init__.py": "from peft_kernels import _C\n",
    "peft_kernels/cuda_kernels/double.py": LAUNCHERS,
    "peft_kernels/integrations/__init__.py": "import peft\n",
    "peft_kernels/layers/__init__.py": "",
    "peft_kernels/layers/double.py": "from ..ops.double import double\n",
    "peft_kernels/ops/__init__.py": "",
    "peft_kernels/ops/double.py": "from peft_kernels import backend\n\n\ndef double_reference(x):\n    pass\n",
    "peft_kernels/torch_kernels/__init__.py": "",
    "peft_kernels/torch_kernels/double.py": LAUNCHERS.replace("scale=", "scale: float = "),
    "tests/test_double.py": "",
    "triton_kernels/__init__.py": "",
    "triton_kernels/common.py": "import math\n\nimport torch\nimport triton.language as tl\n",
    "triton_kernels/double.py": "from .common import tl\n\n\n" + LAUNCHERS,
}
# (check, file, its text or None to remove it)
WRONG = [
    *((slice_problems, file, None) for file in ("triton_kernels/double.py", "csrc/double.cu", "csrc/double.h")),
    *((slice_problems, f"peft_kernels/{folder}/double.py", None) for folder in ("torch_kernels", "cuda_kernels")),
    *((slice_problems, file, None) for file in ("tests/test_double.py", "benchmarks/bench_double.py")),
    (slice_problems, "peft_kernels/ops/double.py", "def double(x):\n    pass\n"),
    (slice_problems, "peft_kernels/ops/triple.py", "def triple_reference(x):\n    pass\n"),
    (backend_problems, "triton_kernels/double.py", LAUNCHERS.replace("scale=1.0", "scale=2.0")),
    (backend_problems, "triton_kernels/double.py", LAUNCHERS.replace("double_bwd(dy", "double_bwd(grad")),
    (backend_problems, "triton_kernels/double.py", LAUNCHERS + "\n\ndef other_fwd(x):\n    pass\n"),
    (backend_problems, "peft_kernels/cuda_kernels/double.py", ""),
    (argument_problems, "peft_kernels/rows.py", "def join(a, b, c, d, e, f, g):\n    pass\n"),
    (flow_problems, "peft_kernels/backend.py", "import peft_kernels.ops.double\n"),
    (flow_problems, "peft_kernels/backend.py", "def late():\n    from .layers import double\n"),
    (flow_problems, "peft_kernels/backend.py", "from . import layers\n"),
    (flow_problems, "peft_kernels/backend.py", "import importlib\nimportlib.import_module('peft_kernels.ops')\n"),
    (flow_problems, "peft_kernels/layers/double.py", "from peft_kernels import double\n"),
    (flow_problems, "peft_kernels/torch_kernels/double.py", "from ..cuda_kernels import double\n"),
    (flow_problems, "peft_kernels/utils.py", "import torch\n"),
    (foreign_import_problems, "triton_kernels/common.py", "import numpy\n"),
    (foreign_import_problems, "triton_kernels/common.py", "from peft_kernels.triton_kernels import double\n"),
    (foreign_import_problems, "triton_kernels/common.py", "from .. import backend\n"),
    (foreign_import_problems, "peft_kernels/ops/double.py", "def f():\n    import triton.language\n"),
    (foreign_import_problems, "peft_kernels/layers/double.py", "from transformers import Trainer\n"),
    (foreign_import_problems, "peft_kernels/ops/double.py", "import peft.tuners\n"),
    (package_problems, "peft_kernels/layers/__init__.py", None),
    (package_problems, "triton_kernels/__init__.py", None),
    (atomic_problems, "triton_kernels/double.py", "tl.atomic_add(p, 1)\n"),
    (atomic_problems, "triton_kernels/double.py", "atomic_max(p, 1)\n"),
    (atomic_problems, "csrc/double.cu", "atomicAdd(p, 1.f);\n"),
    (atomic_problems, "csrc/double.cu", 'asm("red.global.add.f32 [%0], %1;");\n'),
    (torch_header_problems, "csrc/double.h", "#include <torch/extension.h>\n"),
    (torch_header_problems, "csrc/double.cu", '#  include "c10/cuda/CUDAStream.h"\n'),
    (build_requirement_problems, "Makefile", 'BUILD_REQUIRES := "setuptools>=77"\n'),
    (build_requirement_problems, "pyproject.toml", 'requires = ["setuptools>=77", "ninja", "torch"]\n'),
]


@pytest.fixture
def tree(tmp_path):
    for file, text in RIGHT.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    return tmp_path


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_right_tree_has_no_problem(tree, check):
    assert list(check(tree)) == []


@pytest.mark.parametrize(("check", "file", "text"), WRONG)
def test_wrong_tree_is_caught(tree, check, file, text):
    (tree / file).unlink() if text is None else (tree / file).write_text(text)
    assert list(check(tree)), f"{check.__name__} missed {file}: {text!r}"


def test_every_check_has_a_wrong_tree():
    assert {check for check, _, _ in WRONG} == set(CHECKS)


# ---- what users read ------------------------------------------------------------------------------------------------


def documentation_problems(name, value, is_operation):
    """A public name says what it is; an operation names its parameters, with shapes for the first, not counting a mode,
    and the result."""
    text = value.__doc__
    if not text:
        yield f"{name} has no docstring"
    elif is_operation:
        parameters = list(inspect.signature(value).parameters)
        yield from (f"{name}: nothing about {p}" for p in parameters if not re.search(rf"\b{p}\b", text))
        for what in (next(p for p in parameters if p != "mode"), r"returns[ \w]*"):
            if not re.search(rf"\b{what}: \(", text):
                yield f"{name}: no shape for {what}"


def test_public_names_are_documented():
    import peft_kernels

    assert peft_kernels.__all__
    problems = []
    for name in peft_kernels.__all__:
        value = getattr(peft_kernels, name)
        ours = tuple(f"peft_kernels.{part}" for part in ("ops.", "blocks", "cores", "imitation"))
        is_operation = inspect.isfunction(value) and value.__module__.startswith(ours)
        problems += documentation_problems(name, value, is_operation)
    assert problems == []


def test_documentation_check_can_fail():
    def bare(x, scale):
        pass

    def shapeless(x, scale):
        """x: a tensor; scale: a number. returns y: a tensor"""

    def silent(x, scale):
        """x: (rows, columns) returns y: (rows,)"""

    def right(x, scale):
        """x: (rows, columns); scale: a number. returns y: (rows,)"""

    def shapeless_mode(mode, x):
        """mode: (a name); x: a tensor. returns y: (rows,)"""

    def right_mode(mode, x):
        """mode: a name; x: (rows, columns). returns y: (rows,)"""

    assert all(list(documentation_problems("f", f, True)) for f in (bare, shapeless, silent, shapeless_mode))
    assert not any(list(documentation_problems("f", f, True)) for f in (right, right_mode))
