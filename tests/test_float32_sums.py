"""Errors of float32 sums, from the order in which kernels add: no GPU is needed to see that ours stay below cuBLAS's.

A product in float32 has no tensor cores: each of its sums is a chain of fused multiply-adds, and the error of a chain
grows as the root of its length. cuBLAS slices long sums among threads, warps and blocks; ours begin a new chain at
every step of a loop. Both are simulated here term by term, in the tests' limits: 1.25 × cuBLAS's error + half an ulp.
Tensor cores, where three tf32 products stand for one of float32, add eight terms at a time and cut off what is below
the last bits of the largest. How many they keep beyond float32's 24 is not documented; none, the worst, is simulated.
"""

from functools import partial

import cuda_emulation
import numpy
import pytest
import torch
from lowrank_cases import ULP, error
from torch import Tensor
from torch.nn.functional import pad

from peft_kernels.cuda_kernels import common as cuda
from peft_kernels.cuda_kernels import lowrank_linear as cuda_kernels
from peft_kernels.triton_kernels.config import (
    LONGEST_CHAIN,
    LONGEST_RUN,
    LowRankShape,
    batched_config,
    lowrank_linear_config,
    strip_tiles,
    weight_distance_config,
)

SLICES = (8, 16, 32)  # how many a sum has, from a block's warps to all that a sum of thousands is split into
MARGIN = 0.9  # a share of the limit: real inputs differ
H100 = 90


def operands(terms: int) -> tuple[Tensor, Tensor]:
    """The same on every CPU, as each step below is."""
    draw = numpy.random.default_rng(terms)
    return tuple(torch.from_numpy(draw.standard_normal((terms, n), dtype=numpy.float32)) for n in (24, 16))


def chains(left: Tensor, right: Tensor, length: int) -> Tensor:
    """leftᵀ right of every `length` terms, each element one chain of fused multiply-adds: (chains, 24, 16)"""
    rest = -left.shape[0] % length
    left, right = (pad(t, (0, 0, 0, rest)).unflatten(0, (-1, length)).double() for t in (left, right))
    total = torch.zeros(left.shape[0], left.shape[2], right.shape[2])
    for k in range(length):
        total = (total + left[:, k, :, None] * right[:, k, None, :]).float()
    return total


def in_order(parts: Tensor) -> Tensor:
    total = torch.zeros_like(parts[0])
    for part in parts:
        total += part
    return total


def summed(left: Tensor, right: Tensor, length: int, per_strip: int | None = None) -> Tensor:
    """Chains added in order; or those of every strip first, and then the strips."""
    parts = chains(left, right, length)
    if per_strip is not None:
        parts = torch.stack([in_order(strip) for strip in parts.split(per_strip)])
    return in_order(parts)


def tensor_cores(left: Tensor, right: Tensor, length: int, afresh: bool = True) -> Tensor:
    """leftᵀ right by three tf32 products of `length` terms at a time, each sum beginning afresh, or handed on."""
    high, low = zip(*map(tf32_parts, (left, right)))
    total, acc = torch.zeros(2, left.shape[1], right.shape[1])
    for first in range(0, left.shape[0], length):
        acc = torch.zeros_like(acc) if afresh else acc
        for a, b in ((low[0], high[1]), (high[0], low[1]), high):
            for k in range(first, min(first + length, left.shape[0]), 8):
                acc = added(acc, a[k : k + 8, :, None].double() * b[k : k + 8, None, :].double())
        total = total + acc
    return total if afresh else acc


def tf32_parts(t: Tensor) -> tuple[Tensor, Tensor]:
    def rounded(t: Tensor) -> Tensor:
        return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    return rounded(t), rounded(t - rounded(t))


def added(acc: Tensor, products: Tensor) -> Tensor:
    """Their sum, each of them and the sum itself cut off after 24 bits of the largest."""
    parts = torch.cat((acc[None].double(), products))
    unit = torch.ldexp(torch.ones_like(products[0]), torch.frexp(parts.abs().amax(0)).exponent - 24)
    total = ((parts / unit).trunc() * unit).sum(0)
    unit = torch.ldexp(torch.ones_like(total), torch.frexp(total).exponent - 24)
    return ((total / unit).trunc() * unit).float()


def relative_error(total: Tensor, left: Tensor, right: Tensor) -> float:
    return error(total, left.double().t() @ right.double())


def limit(left: Tensor, right: Tensor, slices: int) -> float:
    """What tests allow beside a cuBLAS that adds so many slices."""
    cublas = summed(left, right, -(-left.shape[0] // slices))
    return 1.25 * relative_error(cublas, left, right) + ULP[torch.float32] / 2


def tiles(rank: int):
    return lowrank_linear_config(LowRankShape(0, 0, rank), torch.float32, H100)


def down_strips(rows: int, width: int, rank: int) -> partial:
    """dA and dB, whose partial sums leave one program for each strip of rows."""
    tile = tiles(rank).down_bwd
    return partial(summed, length=tile.rows, per_strip=strip_tiles(rows, tile, -(-width // tile.columns), H100))


def up_strips(rows: int, width: int, rank: int) -> partial:
    tile = tiles(rank).up_bwd
    return partial(summed, length=tile.rows, per_strip=strip_tiles(rows, tile, -(-width // tile.columns), H100))


def imitation() -> partial:
    return partial(tensor_cores, length=weight_distance_config(H100).product.depth)


SUMS = {  # (terms, the order in which they are added), in the sizes of the tests and the benchmarks
    **{f"z-{width}": (width, partial(summed, length=tiles(16).shrink.columns)) for width in (760, 768, 3072, 4096)},
    **{f"dz-{width}": (width, partial(summed, length=tiles(16).up_bwd.columns)) for width in (768, 3072, 4096)},
    **{f"fused-{width}": (width, partial(summed, length=tiles(16).fused.depth)) for width in (760, 768)},
    **{f"dA-9232x768-{rank}": (9232, down_strips(9232, 768, rank)) for rank in (16, 64)},
    **{f"dA-8192x4096-{rank}": (8192, down_strips(8192, 4096, rank)) for rank in (16, 64)},
    "dB-9232x768": (9232, up_strips(9232, 768, 16)),
    "dB-8192x4096": (8192, up_strips(8192, 4096, 16)),
    "batched-dA-of-one-strip": (2308, partial(summed, length=batched_config(16, torch.float32, H100).gram.rows)),
    **{f"imitation-{width}": (width, imitation()) for width in (97, 768, 3072)},
}


@pytest.mark.parametrize("name", SUMS)
def test_our_order_is_as_accurate_as_slices(name):
    terms, add = SUMS[name]
    left, right = operands(terms)
    ours = relative_error(add(left, right), left, right)
    for slices in SLICES:
        assert ours <= MARGIN * limit(left, right, slices), slices


def test_no_program_adds_up_more_tiles_than_are_accurate():
    """At rank 64 one strip of 8,192 rows is 512 tiles of 16: added one after another they err far more than in runs."""
    tile, (left, right) = tiles(64).down_bwd, operands(8192)
    assert strip_tiles(10**6, tile, 10**6, H100) == LONGEST_RUN
    whole, runs = (
        relative_error(summed(left, right, tile.rows, per_strip), left, right) for per_strip in (None, LONGEST_RUN)
    )
    assert whole > 1.5 * runs


def test_one_chain_would_not_be():
    """What a kernel computes that hands its sum from product to product."""
    left, right = operands(4096)
    one_chain = relative_error(summed(left, right, 4096), left, right)
    assert all(one_chain > limit(left, right, slices) for slices in SLICES)


def test_tensor_cores_that_hand_their_sum_on_would_not_be():
    left, right = operands(768)
    handed_on = relative_error(tensor_cores(left, right, 16, afresh=False), left, right)
    assert all(handed_on > 2 * limit(left, right, slices) for slices in SLICES)


def test_tiles_make_short_chains():
    """Every loop over a product takes this many terms at a time."""
    for arch in (80, 90, 100):
        for rank in (16, 32, 64):
            config = lowrank_linear_config(LowRankShape(0, 0, rank), torch.float32, arch)
            batched = batched_config(rank, torch.float32, arch)
            lengths = [config.shrink.columns, config.fused.depth, config.up_bwd.rows, config.up_bwd.columns]
            lengths += [config.core_bwd.rows, config.down_bwd.rows, batched.shrink.columns, batched.gram.rows]
            assert max(lengths) <= LONGEST_CHAIN


# ---- the CUDA kernels' order, as they run --------------------------------------------------------------------------


@pytest.fixture(params=cuda_emulation.DEVICES)
def device(request):
    with cuda_emulation.kernels_on(request.param):
        yield request.param


def test_cuda_kernels_add_short_chains(device, monkeypatch):
    """z over 4096 columns, and dA over 4096 rows in one strip."""
    monkeypatch.setattr(cuda, "PROCESSORS", 0)
    left, right = operands(4096)
    x, down, wide, thin = (t.to(device) for t in (left.t().contiguous(), right.t().contiguous(), left, right))
    z = cuda_kernels.lowrank_hidden_fwd(x, down, 1)
    _, d_down = cuda_kernels.lowrank_hidden_bwd(thin, wide, down[:, :24].contiguous(), (False, True))
    for ours in (z, d_down.t()):
        assert relative_error(ours.cpu(), left, right) <= MARGIN * limit(left, right, max(SLICES))
