"""What the Triton kernels cannot run; this file imports no triton, which may be what is missing."""

import os

import torch

from ..devices import asked_once, importable, no_gpu_for_kernels
from ..records import MOST_PROJECTIONS, Case
from .config import MAX_RANK

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(case: Case) -> str | None:
    """Why these kernels cannot run such a call, or None."""
    if case.dtype not in DTYPES:
        return f"its kernels take float32, bfloat16 and float16, not {case.dtype}"
    if case.rank > MAX_RANK:
        return f"its kernels take ranks up to {MAX_RANK}, not {case.rank}"
    if case.projections > MOST_PROJECTIONS:
        return f"its kernels take up to {MOST_PROJECTIONS} projections, not {case.projections}"
    return missing(case.device.type) or None


@asked_once
def missing(device_type: str) -> str:
    """What this machine lacks to run them on tensors of such a device; "" for nothing."""
    if problem := no_gpu_for_kernels(device_type):
        return problem
    if not importable("triton"):
        return "triton is not installed (pip install triton)"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are on the CPU (TRITON_INTERPRET=1, set before the first call, interprets them there)"
    return ""
