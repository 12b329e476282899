"""CUDA launcher of the reconstruction: one kernel writes every block, base included. Tensors in, a tensor out.

Shapes and formula: peft_kernels/ops/reconstruct.py; the params struct: csrc/reconstruct.h. Each element is summed in
float32 and rounded once; the tensor cores multiply only factors that have the result's half precision, without a core.
"""

import torch
from torch import Tensor

from peft_kernels.records import Factors

from . import extension
from .common import DTYPES, hand_over, launch, set_core, set_scale


def reconstruct_fwd(factors: Factors, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    """-> (O·NB, I·KB) in `dtype`; base (NB, KB) under every block of a stack, or as large as the result"""
    down, up, core, scale, _ = factors
    out_blocks, in_blocks = factors.blocks
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
