"""A Triton module loaded afresh with one piece of its source replaced, or as it is: the control."""

from pathlib import Path
from types import ModuleType


def load(module: ModuleType, good: str, bad: str | None, folder: Path) -> dict:
    """The names that `module` would define with `bad` in the place of `good`; bad=None: unchanged."""
    source = Path(module.__file__).read_text()
    assert good in source, "the mutant's line is gone; write it anew"
    path = folder / "mutant.py"  # Triton reads a kernel's source from its file
    path.write_text(source if bad is None else source.replace(good, bad))
    namespace = {"__name__": module.__name__, "__package__": module.__package__, "__file__": str(path)}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    return namespace
