"""CUDA backend: launchers over the compiled module `peft_kernels._C`, one file per operation."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

_NAME = "peft_kernels._C"


def extension() -> ModuleType:
    """The compiled module `peft_kernels._C`; ImportError, saying how to get it, if there is none."""
    if (imported := sys.modules.get(_NAME)) is not None:  # which spares every launch five calls
        return imported
    try:
        return importlib.import_module(_NAME)
    except ImportError as error:
        raise ImportError(
            f"the CUDA kernels (peft_kernels._C) are not available: {why_left_out() or error}. They are built when "
            "peft_kernels is installed with nvcc on the PATH; PEFT_KERNELS_CUDA=require pip install . shows what "
            "stands in the way."
        ) from error


def why_left_out() -> str:
    """What the installation noted instead of building them; "" where it noted nothing."""
    note = Path(__file__).parents[1] / "_C.left_out"
    return f"left out of this installation, {note.read_text(encoding='utf-8')}" if note.is_file() else ""
