"""`reconstruct` on the chosen backend. Shapes as in peft_kernels/ops/reconstruct.py, whose adjoint needs no more than
`lowrank_hidden`'s launchers."""

import torch
from torch import Tensor

from peft_kernels.autocast import autocast_off
from peft_kernels.dispatch.common import as_operator, kernels, tensor_scale
from peft_kernels.torch_kernels import reconstruct as torch_kernels


@torch.library.custom_op("peft_kernels::reconstruct_fwd", mutates_args=())
def _fwd_op(
    down: Tensor, up: Tensor, core: Tensor | None, scale: Tensor, base: Tensor | None, dtype: torch.dtype, backend: str
) -> Tensor:
    return kernels(backend, "reconstruct").reconstruct_fwd(down, up, core, scale, base, dtype)


@_fwd_op.register_fake
def _(down, up, core, scale, base, dtype, backend):
    out_blocks, in_blocks = (1, 1) if core is None else core.shape[:2]
    return down.new_empty(out_blocks * up.shape[0], in_blocks * down.shape[1], dtype=dtype)


def reconstruct_fwd(
    backend: str,
    down: Tensor,
    up: Tensor,
    core: Tensor | None,
    scale: float | Tensor,
    base: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """-> (O·NB, I·KB) in `dtype`"""
    with autocast_off(down):
        if as_operator(backend):
            return _fwd_op(down, up, core, tensor_scale(scale, down), base, dtype, backend)
        module = torch_kernels if backend == "torch" else kernels(backend, "reconstruct")
        return module.reconstruct_fwd(down, up, core, scale, base, dtype)
