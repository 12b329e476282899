"""What launches have covered of the source of their kernels: every kernel, loop, dimension of a grid and choice."""

import ast
import operator
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from triton.runtime import interpreter

KERNELS = Path(__file__).parent.parent / "triton_kernels"


def launched(path: Path) -> set[str]:
    """The kernels that a file hands to whatever launches them."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = {getattr(arg, "id", "") for call in calls for arg in call.args}
    return {name for name in names if name.endswith("_kernel")}


def dimensions(function: ast.FunctionDef) -> int:
    """Of a kernel's grid: those that it asks for its place in, and the first, which helpers may ask for."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    return 1 + max((call.args[0].value for call in calls if ast.unparse(call.func) == "tl.program_id"), default=0)


def jitted(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            yield node


class Census:
    """Counts while it is open, in the kernels of `modules`; `problems` compares with their source."""

    def __init__(self, modules: list[ModuleType], patch: pytest.MonkeyPatch):
        self.paths = [Path(module.__file__) for module in modules]
        self.launches, self.longest = [], {}
        for module in modules:
            patch.setattr(module, "range", self._range, raising=False)
        patch.setattr(interpreter, "range", lambda *bounds: self._range(*bounds, caller=3), raising=False)  # tl.range's

    def _range(self, *bounds, caller: int = 1) -> range:
        """Kernels find this one in their module's names, before Python's own."""
        found, frame = range(*map(operator.index, bounds)), sys._getframe(caller)
        place = Path(frame.f_code.co_filename).name, frame.f_lineno
        self.longest[place] = max(len(found), self.longest.get(place, 0))
        return found

    def problems(self) -> Iterator[str]:
        kernels = set().union(*map(launched, self.paths))
        sizes = {function.name: dimensions(function) for path in self.paths for function in jitted(path)}
        for name in kernels:
            seen = [launch.grid[: sizes[name]] for launch in self.launches if launch.kernel == name]
            if not seen:
                yield f"{name} was not launched"
            elif 1 in map(max, zip(*seen)):
                yield f"{name}: one program in a dimension of every grid: {seen}"
        constants: dict[str, set] = {}
        for launch in self.launches:
            for name, value in launch.constants.items():
                constants.setdefault(name, set()).add(value)
        for path in self.paths:
            for function in jitted(path):
                for node in ast.walk(function):
                    yield from self._node_problems(f"{path.name}: {function.name}", path, node, constants)

    def _node_problems(self, where: str, path: Path, node: ast.AST, constants: dict[str, set]) -> Iterator[str]:
        if isinstance(node, ast.For) and ast.unparse(node.iter.func) in ("range", "tl.range"):
            if self.longest.get((path.name, node.lineno), 0) < 2:
                yield f"{where}, line {node.lineno}: no second iteration"
        elif isinstance(node, ast.For):  # tl.static_range of a launch's constant, or of what a helper is told
            names = [part.id for part in ast.walk(node.iter.args[0]) if isinstance(part, ast.Name)]
            if any(max(constants[name]) < 2 for name in names if name in constants):
                yield f"{where}, line {node.lineno}: no second iteration"
        elif isinstance(node, ast.Compare) and isinstance(node.comparators[0], ast.Constant):
            name, value = getattr(node.left, "id", None), node.comparators[0].value
            if isinstance(value, str) and value not in constants.get(name, ()):
                yield f"{where}: never with {name} = {value}"
            if isinstance(value, int) and name in constants:
                yield from _missing(f"{where}: never with {name} == {value}:", {value == v for v in constants[name]})
        elif isinstance(node, ast.If | ast.IfExp) and getattr(node.test, "id", None) in constants:
            yield from _missing(f"{where}: never with {node.test.id} =", set(map(bool, constants[node.test.id])))


def _missing(what: str, seen: set[bool]) -> Iterator[str]:
    yield from (f"{what} {value}" for value in (True, False) if value not in seen)
