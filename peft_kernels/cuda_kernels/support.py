"""What the CUDA kernels cannot run: limits of their code, of this build and of the GPU."""

import torch

from peft_kernels.devices import asked_once, no_gpu_for_kernels
from peft_kernels.records import MOST_PROJECTIONS, Case

from . import extension

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc's enum DType
_MOST = 2**31  # counts and thread blocks have 31 bits
_LOWRANK = ("lowrank_linear", "lowrank_projections", "lowrank_hidden", "batched_lowrank_linear")


def unsupported(case: Case) -> str | None:
    """Why these kernels cannot run such a call, or None."""
    float32_only = case.op in ("weight_distance", "momentum_weight_distance", "imitation_step")
    for dtype in (case.dtype, case.live):
        if dtype is not None and dtype not in DTYPES:
            return f"its kernels take float32, bfloat16 and float16, not {dtype}"
    if float32_only and case.dtype != torch.float32:
        return f"its kernels compute weight distances in float32, not {case.dtype}"
    if problem := missing(case.device.type):
        return problem
    return _too_large(case) or _too_much_shared_memory(case.op, case.dtype, case.rank, case.device)


def _too_large(case: Case) -> str | None:
    (rows, columns), (out_blocks, in_blocks) = case.shape, case.blocks
    if case.op in _LOWRANK:
        if case.rank > _limit("LOWRANK_LINEAR_MAX_RANK"):
            return f"its kernels take ranks up to {_limit('LOWRANK_LINEAR_MAX_RANK')}, not {case.rank}"
        if (hidden := case.rank * max(out_blocks, in_blocks)) > _limit("LOWRANK_LINEAR_MAX_HIDDEN"):
            return f"its kernels take rank × blocks up to {_limit('LOWRANK_LINEAR_MAX_HIDDEN')}, not {hidden}"
        if case.projections > MOST_PROJECTIONS:
            return f"its kernels take up to {MOST_PROJECTIONS} projections, not {case.projections}"
        return f"its kernels take fewer than 2³¹ rows, not {rows}" if rows >= _MOST else None
    if case.op == "gated_query":
        if rows * -(-columns // _limit("GATED_QUERY_COLUMNS")) >= _MOST:
            return f"its kernels take fewer than 2³¹ pieces of 256 columns, not those of {rows} x {columns}"
        return None
    if max(rows, columns) > _MOST - 256:  # 32-bit counts, up to the last tile's end
        return f"its kernels take blocks of fewer than 2³¹ rows and columns, not {rows} x {columns}"
    if case.op == "reconstruct":
        tiles = out_blocks * -(-rows // _limit("RECONSTRUCT_ROWS")) * in_blocks
        if (tiles := tiles * -(-columns // _limit("RECONSTRUCT_COLUMNS"))) >= _MOST:
            return f"its kernels take results of fewer than 2³¹ tiles, not {tiles}"
    return None


@asked_once
def _limit(name: str) -> int:
    return getattr(extension(), name)


@asked_once
def _too_much_shared_memory(op: str, dtype: torch.dtype, rank: int, device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    module = extension()
    needed = {
        "lowrank_linear": lambda: module.lowrank_linear_shared_bytes(DTYPES[dtype], rank),
        "lowrank_projections": lambda: module.lowrank_projections_shared_bytes(DTYPES[dtype], rank),
        "lowrank_hidden": lambda: module.lowrank_linear_shared_bytes(DTYPES[dtype], rank),
        "batched_lowrank_linear": lambda: module.batched_lowrank_linear_shared_bytes(DTYPES[dtype], rank),
        "reconstruct": lambda: module.reconstruct_shared_bytes(DTYPES[dtype]),
        "gated_query": lambda: 0,
    }.get(op, module.weight_distance_shared_bytes)()
    available = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if needed > available:
        return f"rank {rank} in {dtype} takes {needed} bytes of shared memory, this GPU has {available}"
    return None


@asked_once
def missing(device_type: str) -> str:
    """What this machine lacks to run them on tensors of such a device; "" for nothing."""
    if problem := no_gpu_for_kernels(device_type):
        return problem
    try:
        emulated = extension().build_info()["emulated"]
    except ImportError as error:
        return str(error)
    if device_type == "cpu" and not emulated:
        return "the tensors are on the CPU"
    return "this build of its kernels runs on a CPU" if device_type == "cuda" and emulated else ""
