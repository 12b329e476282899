"""A machine where every backend can run, whatever this one has, for tests of which one is taken."""

import re
from pathlib import Path

import pytest
import torch

from peft_kernels import backend

CSRC = Path(__file__).parent.parent / "csrc"


class OnGpu:
    """As much of a tensor on a GPU as a backend is chosen by."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.device, self.dtype = torch.device("cuda"), dtype


def constant(name: str) -> int:
    """A limit of the CUDA kernels, in their source: they need not be built."""
    (found,) = {match for path in CSRC.glob("*.h") for match in re.findall(rf"\b{name} = (\d+)", path.read_text())}
    return int(found)


def everything_runs(patch: pytest.MonkeyPatch, arch: int = 90) -> None:
    """Nothing is missing, the GPU is of architecture `arch`, and the kernels have the limits of their source."""
    for name in ("triton", "cuda"):
        patch.setattr(backend.SUPPORT[name], "missing", lambda device_type: "")
    limits = {
        "LOWRANK_LINEAR_MAX_RANK": constant("kLowRankLinearMaxRank"),
        "LOWRANK_LINEAR_MAX_HIDDEN": constant("kLowRankLinearMaxHidden"),
        "GATED_QUERY_COLUMNS": constant("kGatedQueryColumns"),
        "RECONSTRUCT_ROWS": constant("kReconstructRows"),
        "RECONSTRUCT_COLUMNS": constant("kReconstructColumns"),
    }
    patch.setattr(backend.SUPPORT["cuda"], "_limit", limits.get)
    patch.setattr(backend.SUPPORT["cuda"], "_too_much_shared_memory", lambda *sizes: None)
    patch.setattr(backend, "architecture", lambda index=None: arch)
