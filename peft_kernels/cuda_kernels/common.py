"""What the launchers share: which calls can run at all, and how tensors reach csrc's params structs and its kernels."""

import torch
from torch import Tensor

from . import extension

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc's enum DType
_CORES = {3: 1, 4: 2}  # dimensions of the core -> enum Core
PROCESSORS = 132  # as an H200 has; strips are planned for it everywhere, so that sums repeat


def unsupported_dtype(dtype: torch.dtype) -> str | None:
    """Why there are no CUDA kernels, or none for results of this dtype, or None."""
    try:
        extension()
    except ImportError as error:
        return str(error)
    return None if dtype in DTYPES else f"the CUDA kernels take float32, bfloat16 and float16, not {dtype}"


def unsupported_device(like: Tensor, shared_bytes: int, what: str) -> str | None:
    """Why these kernels cannot run where this tensor lies; one of them has blocks with so much shared memory."""
    if like.device.type != ("cpu" if extension().build_info()["emulated"] else "cuda"):
        return f"the CUDA kernels need a tensor on a CUDA device, not on {like.device}"
    if like.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(like.device)
        if gpu.major < 8:
            return f"the CUDA kernels need compute capability 8.0 or later, not {gpu.major}.{gpu.minor}"
        available = gpu.shared_memory_per_block_optin
        if shared_bytes > available:
            return f"{what} takes {shared_bytes} bytes of shared memory, this GPU has {available}"
    return None


def require(problem: str | None) -> None:
    if problem:
        raise ValueError(f"backend: 'cuda' cannot run this call: {problem}")


def hand_over(params, **tensors: Tensor | None) -> None:
    """Tensors by address, and their row strides where the struct has a field for them."""
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(params, name, tensor.data_ptr())
            if hasattr(params, f"{name}_stride"):
                setattr(params, f"{name}_stride", tensor.stride(0))


def set_scale(params, scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):
        params.scale_ptr = scale.data_ptr()
    else:
        params.scale = scale


def set_core(params, core: Tensor | None) -> None:
    """(O, I, R) or (O, I, R, R); the numbers of blocks are 1 unless it says otherwise."""
    if core is not None:
        params.out_blocks, params.in_blocks = core.shape[:2]
        params.core_kind, params.core_float = _CORES[core.dim()], core.dtype == torch.float32
        hand_over(params, core=core)


def resident(dtype: torch.dtype, rank: int) -> int:
    """Thread blocks that a multiprocessor runs at a time: what registers allow the pass that takes most of them."""
    return 2 if dtype != torch.float32 and rank <= 64 else 1


def strips(like: Tensor, rank: int, block_columns: int, blocks: int) -> int:
    """Into how many row strips a pass is split, so that all its thread blocks run at a time.

    A pure function of shape and dtype, and with it the order of every sum.
    """
    module, programs = extension(), PROCESSORS * resident(like.dtype, rank)
    tiles, chunks = -(-like.shape[0] // module.LOWRANK_LINEAR_ROWS), -(-block_columns // module.LOWRANK_LINEAR_COLUMNS)
    return max(1, min(tiles, programs // (chunks * blocks)))


def floats(like: Tensor, count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device=like.device)


def launch(launcher, params, like: Tensor) -> None:
    """On the current stream of the tensor's device; on the CPU if the module is the host emulation."""
    if like.device.type == "cuda":
        with torch.cuda.device(like.device):
            launcher(params, torch.cuda.current_stream().cuda_stream)
    else:
        launcher(params, 0)
