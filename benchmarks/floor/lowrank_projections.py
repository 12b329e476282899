"""What `lowrank_projections` costs, by formula: peft_kernels/ops/lowrank_projections.py, with an A_j each.

Sizes: M rows, K in features, `widths` N_1 … N_J, R rank, `size` bytes per element.
"""

from collections.abc import Sequence
from itertools import chain

from . import Pass, Work, lowrank_linear

# "eager" is PEFT's layers; "one by one" calls `lowrank_linear` J times, and autograd adds what they give to dx;
# "unsloth" is its node for q, k and v, without bias or dropout. "stacked": the frozen weights lie in one memory.
ONE_BY_ONE, ONE_BY_ONE_IN_TORCH = "one by one", "one by one, torch"
OF_EACH = {name: name for name in ("linear", "eager", "unsloth")} | {ONE_BY_ONE: "passes", ONE_BY_ONE_IN_TORCH: "torch"}
DESIGNS = (*OF_EACH, "torch", "torch, stacked", "passes", "passes, stacked")


def compulsory(M: int, K: int, widths: Sequence[int], R: int, size: int) -> tuple[Work, Work]:
    """(forward, backward): what no design can avoid. R = 0 are the frozen linears alone.

    x is read once each way, dx written once.
    """
    J, N = len(widths), sum(widths)
    gemm, thin = 2 * M * N * K, 2 * M * R * (J * K + N)
    parameters = N * K + R * (J * K + N)
    forward = M * K + parameters + M * (N + J * R)  # read x; write y_j and z_j
    backward = M * (N + K + J * R) + parameters + M * K + R * (J * K + N)  # read dy_j, x, z_j; write dx, dA_j, dB_j
    if R == 0:
        backward -= M * K  # nothing needs x
    return Work(gemm + thin, forward * size), Work(gemm + 2 * thin, backward * size)


def passes(
    design: str, M: int, K: int, widths: Sequence[int], R: int, size: int, dropout: bool
) -> tuple[list[Pass], list[Pass]]:
    """(forward, backward) of one design.

    Partial sums of the kernels are taken to stay in the L2 cache: their passes count as launches of few bytes.
    """
    if design not in DESIGNS:
        raise ValueError(f"design: expected one of {DESIGNS}, got {design!r}")
    J, N = len(widths), sum(widths)
    x, y, z, weight, down, up = (n * size for n in (M * K, M * N, J * M * R, N * K, J * R * K, N * R))
    if design in OF_EACH:
        each = [lowrank_linear.passes(OF_EACH[design], M, K, width, R, size, dropout) for width in widths]
        forward, backward = (list(chain(*parts)) for parts in zip(*each))
        if design != "unsloth":
            return forward, backward + [Pass("add", M * K, 3 * x)] * (J - 1)
        firsts = [True, *[False] * (J - 1)]  # the first product writes dx, to which all others add
        return forward, [
            part._replace(bytes=part.bytes + x) if part.name == "dy W" and not firsts.pop(0) else part
            for part in backward
        ]

    kind, _, stacked = design.partition(", ")
    gemm, thin_x, thin_y = 2 * M * K, 2 * M * R * K, 2 * M * R
    frozen = [Pass("y_j += x W_jᵀ", gemm * n, x + (n * K + 2 * M * n) * size) for n in widths]
    frozen = [Pass("y += x Wᵀ", gemm * N, x + weight + 2 * y)] if stacked else frozen
    frozen_bwd = [Pass("dx += dy_j W_j", gemm * n, 2 * x + (n * K + M * n) * size) for n in widths]

    if kind == "passes":
        forward = [
            *([Pass("seeds", 0, 16 * J)] if dropout else []),
            Pass("shrink: z_j = drop_j(x) A_jᵀ", J * thin_x, x + down + z),
            Pass("expand: y_j = s_j z_j B_jᵀ + b_j", thin_y * N, z + up + y),
        ]
        late = lowrank_linear.dz_in_down_bwd(K, N, R, size, dropout)  # of the chunks of dy_j B_j
        backward = [
            Pass("up_bwd: dy_j B_j, dB_j", 2 * thin_y * N, y + z + up),
            *([] if late else [Pass("hidden_bwd: dz_j", J * M * R, z)]),
            Pass("down_bwd: Σ mask_j · dz_j A_j, dA_j", 2 * J * thin_x, x + (0 if late else z) + down + x),
            Pass("sums of dB_j and dA_j", 0, up + down),
        ]
        return forward + frozen, backward + frozen_bwd

    z, down, mask = z // J, down // J, M * K  # of one projection; one byte per element of x
    dropped = [Pass("x times mask", M * K, 2 * x + mask)] if dropout else []
    forward = [Pass("masks", J * M * K, J * mask)] if dropout else []
    forward += [*dropped, Pass("z_j = x A_jᵀ", thin_x, x + down + z)] * J
    forward += [Pass("z together", 0, 2 * J * z)] if J > 1 else []
    if stacked:
        forward += [Pass("y_j = b_j", 0, M * n * size) for n in widths] + frozen
    else:
        forward += [part._replace(bytes=part.bytes - M * n * size) for part, n in zip(frozen, widths)]  # with the bias
    for n in widths:
        forward += [Pass("times s", M * R, 2 * z)]
        forward += [Pass("y_j += s z_j B_jᵀ", thin_y * n, z + (n * R + 2 * M * n) * size)]
    backward = [Pass("dB_j", thin_y * n, z + (n * R + M * n) * size) for n in widths]
    backward += [frozen_bwd[0]._replace(bytes=frozen_bwd[0].bytes - x), *frozen_bwd[1:]]
    for n in widths:
        backward += [Pass("dz_j", thin_y * n, z + (n * R + M * n) * size), Pass("times s", M * R, 2 * z)]
    backward += [*dropped, Pass("dA_j", thin_x, x + z + down)] * J
    if dropout:
        backward += [Pass("dz_j A_j", thin_x, z + down + x), Pass("dx += mask · dz_j A_j", M * K, 3 * x + mask)] * J
    else:
        backward += [Pass("dx += dz_j A_j", thin_x, z + down + 2 * x)] * J
    return forward, backward + [Pass("all dB_j and dA_j", 0, 2 * (up + J * down))] * (J > 1)
