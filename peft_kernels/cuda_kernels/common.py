"""What the launchers share: how tensors reach csrc's params structs and its kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import extension
from .support import DTYPES

CORES = {3: 1, 4: 2}  # dimensions of the core -> enum Core
NULL = torch.empty(0)  # in the place of a tensor that is not there: its address is 0
PROCESSORS = 132  # as an H200 has; strips are planned for it everywhere, so that sums repeat


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
        params.core_kind, params.core_float = CORES[core.dim()], core.dtype == torch.float32
        hand_over(params, core=core)


def strips(like: Tensor, rank: int, block_columns: int, blocks: int) -> int:
    """Into how many row strips a pass is split, so that all its thread blocks run at a time.

    A pure function of shape and dtype, and with it the order of every sum.
    """
    return extension().row_strips(DTYPES[like.dtype], rank, like.shape[0], block_columns, blocks, PROCESSORS)


def floats(like: Tensor, count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device=like.device)


def launch(launcher: Callable, params: Any, like: Tensor, *more: Any) -> None:
    """launcher(params, stream, *more) on the current stream of the tensor's device, or on the CPU if it is emulated."""
    device = like.device
    if device.type != "cuda":
        launcher(params, 0, *more)
    elif device.index == _current_device():
        launcher(params, _raw_stream(device.index), *more)
    else:
        with torch.cuda.device(device):
            launcher(params, _raw_stream(device.index), *more)


_current_device = getattr(torch._C, "_cuda_getDevice", None)  # both missing where torch has no CUDA
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
