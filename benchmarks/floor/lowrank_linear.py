"""What `lowrank_linear` costs, by formula: peft_kernels/ops/lowrank_linear.py with O = I = 1 and no core.

Sizes: M rows, K in features, N out features, R rank, `size` bytes per element.
"""

import torch

from peft_kernels.triton_kernels.config import MAX_RANK, LowRankShape, down_bwd_makes_dz, lowrank_linear_config

from . import Pass, Work

# "eager" is a LoRA written down as in its paper, PEFT's too; "unsloth" adds to what is there, and has neither bias nor
# dropout; "tail", whose GEMMs go on over the rank, is not built.
DESIGNS = ("linear", "eager", "unsloth", "torch", "passes", "tail", "fused")


def compulsory(M: int, K: int, N: int, R: int, size: int) -> tuple[Work, Work]:
    """(forward, backward): what no design can avoid. R = 0 is the frozen linear alone.

    The six thin products are x Aᵀ and S Bᵀ; G B, Gᵀ S, dzᵀ x and dz A.
    """
    gemm, thin = 2 * M * N * K, 2 * M * R * (K + N)
    parameters = N * K + R * (K + N)
    forward = M * K + parameters + M * (N + R)  # read x; write y and z
    backward = M * (N + K + R) + parameters + M * K + R * (K + N)  # read dy, x, z; write dx, dA, dB
    if R == 0:
        backward -= M * K  # nothing needs x
    return Work(gemm + thin, forward * size), Work(gemm + 2 * thin, backward * size)


def passes(design: str, M: int, K: int, N: int, R: int, size: int, dropout: bool) -> tuple[list[Pass], list[Pass]]:
    """(forward, backward) of one design.

    Partial sums of the kernels are taken to stay in the L2 cache: their passes count as launches of few bytes.
    """
    x, y, z, weight, down, up = (n * size for n in (M * K, M * N, M * R, N * K, R * K, N * R))
    mask = M * K if dropout else 0  # one byte per element of x
    gemm, thin_x, thin_y = 2 * M * N * K, 2 * M * R * K, 2 * M * R * N
    linear = Pass("x Wᵀ + b", gemm, x + weight + y)
    linear_bwd = Pass("dy W", gemm, y + weight + x)

    if design == "linear":
        return [linear], [linear_bwd]

    if design == "eager":
        forward = [
            linear,
            Pass("z = x Aᵀ", thin_x, x + down + z),
            Pass("z Bᵀ", thin_y, z + up + y),
            Pass("times s", M * N, 2 * y),
            Pass("add", M * N, 3 * y),
        ]
        backward = [
            Pass("dy times s", M * N, 2 * y),
            Pass("dB", thin_y, y + z + up),
            Pass("dz", thin_y, y + up + z),
            Pass("dA", thin_x, x + z + down),
            Pass("dz A", thin_x, z + down + x),
            linear_bwd,
            Pass("add", M * K, 3 * x),
        ]
        if dropout:
            forward.insert(1, Pass("dropped x, mask", M * K, 2 * x + mask))
            backward.insert(5, Pass("masked", M * K, 2 * x + mask))
        return forward, backward

    if design == "torch":
        forward = [
            linear,
            Pass("z = x Aᵀ", thin_x, x + down + z),
            Pass("y += s z Bᵀ", thin_y, z + up + 2 * y),
        ]
        backward = [
            Pass("dB", thin_y, y + z + up),
            Pass("dz", thin_y, y + up + z),
            Pass("dz times s", M * R, 2 * z),
            linear_bwd,
            Pass("dA", thin_x, x + z + down),
            Pass("dx += dz A", thin_x, z + down + 2 * x),
        ]
        if dropout:
            forward[1:1] = [Pass("mask", M * K, mask), Pass("x times mask", M * K, 2 * x + mask)]
            backward[4:4] = [Pass("x times mask", M * K, 2 * x + mask)]
            backward[-1:] = [
                Pass("dz A", thin_x, z + down + x),
                Pass("dx += mask · dz A", M * K, 3 * x + mask),
            ]
        return forward, backward

    if design == "unsloth":
        forward = [linear, Pass("z = x Aᵀ", thin_x, x + down + z), Pass("y += s z Bᵀ", thin_y, z + up + 2 * y)]
        backward = [
            Pass("dy B", thin_y, y + up + z),
            Pass("dA", thin_x, x + z + down),
            Pass("A xᵀ", thin_x, x + down + z),
            Pass("dB", thin_y, y + z + up),
            linear_bwd,
            Pass("dy B again", thin_y, y + up + z),
            Pass("dx += s dy B A", thin_x, z + down + 2 * x),
        ]
        return forward, backward

    if design in ("passes", "tail", "fused"):
        shrink = Pass("shrink: z = drop(x) Aᵀ", thin_x, x + down + z)
        expand = Pass("expand: y = s z Bᵀ + b", thin_y, z + up + y)
        tiles = -(-N // 128)  # of columns: fused forms x Aᵀ again for each of them, at no traffic
        forward = {
            "passes": [shrink, expand, Pass("y += x Wᵀ", gemm, x + weight + 2 * y)],
            "tail": [shrink, Pass("y = x Wᵀ + s z Bᵀ + b", gemm + thin_y, x + weight + z + up + y)],
            "fused": [Pass("fused", gemm + thin_x * tiles + thin_y, x + weight + down + up + y + z)],
        }[design]
        backward = [Pass("up_bwd: dy B, dB", 2 * thin_y, y + z + up), Pass("sums of dB and dA", 0, up + down)]
        if design == "tail" or not dz_in_down_bwd(K, N, R, size, dropout):
            backward.insert(1, Pass("hidden_bwd: dz", M * R, z))
            z_read = z
        else:
            z_read = 0  # down_bwd reads the chunks of dy B instead
        if design == "tail":
            backward += [Pass("dA", thin_x, x + z + down)]
            backward += [Pass("dx = dy W + mask · dz A", gemm + thin_x, y + weight + z + down + x)]
        else:
            backward += [Pass("down_bwd: mask · dz A, dA", 2 * thin_x, x + z_read + down + x)]
            backward += [Pass("dx += dy W", gemm, y + weight + 2 * x)]
        if dropout:
            forward.insert(0, Pass("seed", 0, 16))
        return forward, backward

    raise ValueError(f"design: expected one of {DESIGNS}, got {design!r}")


def dz_in_down_bwd(K: int, N: int, R: int, size: int, dropout: bool) -> bool:
    """No launch makes dz alone: on an H200, whose tiles the model takes for every GPU."""
    if R > MAX_RANK:
        return False
    dtype = torch.float32 if size == 4 else torch.bfloat16
    return down_bwd_makes_dz(lowrank_linear_config(LowRankShape(0, N, R, dropout=dropout), dtype, 90), K, N)
