"""`reconstruct` in torch: one product per block, in float32 at least, each block rounded once into its place.

Shapes as in peft_kernels/ops/reconstruct.py. Only one block of a half-precision result is ever held in float32.
"""

import torch
from torch import Tensor


def reconstruct_fwd(
    down: Tensor, up: Tensor, core: Tensor | None, scale: float | Tensor, base: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """-> (O·NB, I·KB) in `dtype`"""
    wide = torch.promote_types(dtype, torch.float32)
    down, up = down.to(wide), up.to(wide) * scale
    out_blocks, in_blocks = (1, 1) if core is None else core.shape[:2]
    rows, columns = up.shape[0], down.shape[1]
    result = torch.empty(out_blocks * rows, in_blocks * columns, dtype=dtype, device=down.device)
    for o in range(out_blocks):
        for i in range(in_blocks):
            place = (slice(o * rows, (o + 1) * rows), slice(i * columns, (i + 1) * columns))
            left = up if core is None else _times_core(up, core[o, i].to(wide))
            under = base if base is None or (base.shape[0] == rows and in_blocks == 1) else base[place]
            if dtype == wide and under is None:
                torch.mm(left, down, out=result[place])
            elif dtype == wide:
                torch.addmm(under, left, down, out=result[place])
            else:
                block = left @ down
                result[place] = block if under is None else block.add_(under)
    return result


def _times_core(up: Tensor, core: Tensor) -> Tensor:
    return up * core if core.dim() == 1 else up @ core
