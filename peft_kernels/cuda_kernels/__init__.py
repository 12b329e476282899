"""CUDA backend: launchers over the compiled module `peft_kernels._C`, one file per operation."""

import importlib
import sys
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
            "the CUDA kernels (peft_kernels._C) are not available: "
            f"{error}. They are built when peft-kernels is installed with nvcc on the PATH; "
            "PEFT_KERNELS_CUDA=require pip install . shows what stands in the way."
        ) from error
