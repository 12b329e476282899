"""CUDA launcher of the reconstruction: one kernel writes every block, base included. Tensors in, a tensor out.

Shapes and formula: peft_kernels/ops/reconstruct.py; the params struct: csrc/reconstruct.h. Each element is summed in
float32 and rounded once; the tensor cores multiply only factors that have the result's half precision, without a core.
"""

import torch
from torch import Tensor

from . import extension
from .common import DTYPES, hand_over, launch, require, set_core, set_scale, unsupported_device, unsupported_dtype


def unsupported(
    down: Tensor, up: Tensor, dtype: torch.dtype, input_blocks: int = 1, output_blocks: int = 1
) -> str | None:
    """Why this kernel cannot make such a weight, or None. Ranks have no limit, the grid has: 2³¹ - 1 thread blocks."""
    if problem := unsupported_dtype(dtype):
        return problem
    module = extension()
    row_tiles = output_blocks * -(-up.shape[0] // module.RECONSTRUCT_ROWS)
    if (tiles := row_tiles * input_blocks * -(-down.shape[1] // module.RECONSTRUCT_COLUMNS)) >= 2**31:
        return f"the CUDA kernels take results of fewer than 2³¹ tiles, not {tiles}"
    if max(up.shape[0], down.shape[1]) > 2**31 - 256:  # 32-bit counts, up to the last tile's end
        return f"the CUDA kernels take blocks of fewer than 2³¹ rows and columns, not {up.shape[0]} x {down.shape[1]}"
    return unsupported_device(down, module.reconstruct_shared_bytes(DTYPES[dtype]), f"a result in {dtype}")


def reconstruct_fwd(down, up, core, scale, base, dtype):
    """-> (O·NB, I·KB) in `dtype`"""
    out_blocks, in_blocks = (1, 1) if core is None else core.shape[:2]
    require(unsupported(down, up, dtype, in_blocks, out_blocks))
    params = extension().Reconstruct()
    params.block_rows, params.block_cols, params.rank = up.shape[0], down.shape[1], down.shape[0]
    params.dtype = DTYPES[dtype]
    params.down_float, params.up_float = down.dtype == torch.float32, up.dtype == torch.float32
    set_core(params, core)
    set_scale(params, scale)
    out = torch.empty(out_blocks * up.shape[0], in_blocks * down.shape[1], dtype=dtype, device=down.device)
    params.base_shared = base is not None and base.shape[0] != out.shape[0]
    hand_over(params, down=down, up=up, base=base, out=out)
    launch(extension().reconstruct_fwd, params, down)
    return out
