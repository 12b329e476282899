"""`reconstruct` in torch: products in float32 at least, each block rounded once into its place.

Shapes as in peft_kernels/ops/reconstruct.py. On a CPU block by block; a half-precision result is summed in float32 a
few rows at a time. Elsewhere a launch costs more than a block, and one product is of all blocks that memory allows.
"""

import torch
from torch import Tensor

from peft_kernels.records import Factors

_STRIP = 2**18  # elements: 1 MiB of float32
_BATCH = 2**26  # elements: 256 MiB of float32


def reconstruct_fwd(factors: Factors, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    """-> (O·NB, I·KB) in `dtype`; base (NB, KB) under every block of a stack, or as large as the result"""
    wide, core, (out_blocks, in_blocks) = torch.promote_types(dtype, torch.float32), factors.core, factors.blocks
    down, up = factors.down.to(wide), factors.up.to(wide) * factors.scale
    rows, columns = up.shape[0], down.shape[1]
    result = torch.empty(out_blocks * rows, in_blocks * columns, dtype=dtype, device=down.device)
    if result.device.type != "cpu":
        _in_batches(result, down, up, core, base)
        return result
    for o in range(out_blocks):
        for i in range(in_blocks):
            place = (slice(o * rows, (o + 1) * rows), slice(i * columns, (i + 1) * columns))
            left = up if core is None else _times_core(up, core[o, i].to(wide))
            under = base if base is None or (base.shape[0] == rows and in_blocks == 1) else base[place]
            if dtype != wide:
                _sum_and_round(result[place], under, left, down)
            elif under is None:
                torch.mm(left, down, out=result[place])
            else:
                torch.addmm(under, left, down, out=result[place])
    return result


def reconstruct_composed(factors: Factors, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`reconstruct_fwd` by differentiable operations alone, none in place"""
    wide, core = torch.promote_types(dtype, torch.float32), factors.core
    up = factors.up.to(wide) * factors.scale
    left = up[None, :, None] if core is None else _times_cores(up, core.to(wide))
    result = (left @ factors.down.to(wide)).flatten(2)  # (O, NB, I·KB)
    result = result if base is None else base.unflatten(0, (-1, up.shape[0])) + result
    return result.flatten(0, 1).to(dtype)


def _in_batches(result: Tensor, down: Tensor, up: Tensor, core: Tensor | None, base: Tensor | None) -> None:
    """result = base + up core down, of as many output blocks at a time as _BATCH allows.

    Row n of up · core[o, i] for every i, one after another, times down is row n of output block o.
    """
    out_blocks, in_blocks = (1, 1) if core is None else core.shape[:2]
    blocks = result.view(out_blocks, up.shape[0] * in_blocks, down.shape[1])
    size = max(1, _BATCH // (blocks.shape[1] * blocks.shape[2]))
    cores = [None] if core is None else core.to(up.dtype).split(size)
    bases = [None] * len(cores) if base is None else base.view(-1, *blocks.shape[1:]).expand_as(blocks).split(size)
    for place, part, under in zip(blocks.split(size), cores, bases):
        left = (up if part is None else _times_cores(up, part)).reshape(*place.shape[:2], up.shape[1])
        right = down.expand(len(place), -1, -1)
        if place.dtype != down.dtype:
            sums = torch.bmm(left, right)
            place.copy_(sums) if under is None else torch.add(sums, under, out=place)
        elif under is None:
            torch.bmm(left, right, out=place)
        else:
            torch.baddbmm(under, left, right, out=place)


def _times_cores(up: Tensor, core: Tensor) -> Tensor:
    """(O, NB, I, R)"""
    return up[:, None] * core[:, None] if core.dim() == 3 else (up @ core).transpose(1, 2)


def _sum_and_round(result: Tensor, base: Tensor | None, left: Tensor, down: Tensor) -> None:
    """result = base + left · down, in float32, by strips that stay in a CPU's cache: 3 times as fast at 4096²."""
    strip = max(1, _STRIP // down.shape[1])
    sums = left.new_empty(min(strip, result.shape[0]), down.shape[1])
    for first in range(0, result.shape[0], strip):
        rows = slice(first, first + strip)
        part = torch.mm(left[rows], down, out=sums[: left[rows].shape[0]])
        result[rows] = part if base is None else part.add_(base[rows])


def _times_core(up: Tensor, core: Tensor) -> Tensor:
    return up * core if core.dim() == 1 else up @ core
