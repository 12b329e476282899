"""What `batched_lowrank_linear` costs, by formula: peft_kernels/ops/batched_lowrank_linear.py.

Sizes: M rows, all with an adapter, K in features, N out features, R rank, L adapters of which `used` have rows, as
evenly as can be; `size` bytes per element. The order of the rows is taken as given.
"""

from . import Pass, Work, lowrank_linear

DESIGNS = ("segments", "torch", "loop", "PEFT", "merged")


def compulsory(M: int, K: int, N: int, R: int, L: int, used: int, size: int) -> tuple[Work, Work]:
    """(forward, backward): what no design can avoid: the products of `lowrank_linear`, factors with rows read once.

    The gradients of adapters without rows are written, too.
    """
    forward, backward = lowrank_linear.compulsory(M, K, N, R, size)
    factors = R * (K + N) * size
    forward = Work(forward.flops, forward.bytes + (used - 1) * factors)
    return forward, Work(backward.flops, backward.bytes + (used + L - 2) * factors)


def passes(
    design: str, M: int, K: int, N: int, R: int, L: int, used: int, size: int
) -> tuple[list[Pass], list[Pass] | None]:
    """(forward, backward) of one design; None where it has no backward.

    Partial sums of the kernels are taken to stay in the L2 cache; a gram with one strip needs no sum.
    """
    x, y, z, weight, down, up = (n * size for n in (M * K, M * N, M * R, N * K, R * K, N * R))
    thin_x, thin_y, gemm = 2 * M * R * K, 2 * M * R * N, 2 * M * N * K
    linear, linear_bwd = Pass("x Wᵀ + b", gemm, x + weight + y), Pass("dy W", gemm, y + weight + x)
    gather_x, put_y = Pass("x in order", 0, 2 * x), Pass("y out of order", 0, 2 * y)
    sizes = [M // used + (index < M % used) for index in range(used)]

    if design == "segments":
        forward = [
            Pass("shrink: z = x A_lᵀ", thin_x, x + used * down + z),
            Pass("expand: y = s z B_lᵀ + b", thin_y, z + used * up + y),
            Pass("y += x Wᵀ", gemm, x + weight + 2 * y),
        ]
        backward = [
            Pass("gram: dB_l", thin_y, y + z + L * up),
            Pass("sum of dB_l", 0, L * up),
            Pass("shrink: dz = s dy B_l", thin_y, y + used * up + z),
            Pass("gram: dA_l", thin_x, x + z + L * down),
            Pass("sum of dA_l", 0, L * down),
            Pass("expand: dx = dz A_l", thin_x, z + used * down + x),
            Pass("dx += dy W", gemm, y + weight + 2 * x),
        ]
        return forward, backward

    if design == "torch":
        forward, backward = [linear], [linear_bwd, Pass("zeros", 0, L * (down + up))]
        for rows in sizes:
            xs, ys, zs = (n * size for n in (rows * K, rows * N, rows * R))
            of_x, of_y = 2 * rows * R * K, 2 * rows * R * N
            forward += [
                *(Pass("x in order", 0, 2 * xs), Pass("z = x A_lᵀ", of_x, xs + down + zs), Pass("z kept", 0, 2 * zs)),
                *(Pass("z B_lᵀ", of_y, zs + up + ys), Pass("times s", rows * N, 2 * ys)),
                Pass("y += s z B_lᵀ", rows * N, 3 * ys),
            ]
            backward += [
                *(Pass("dy in order", 0, 2 * ys), Pass("z in order", 0, 2 * zs), Pass("dB_l", of_y, ys + zs + up)),
                *(Pass("times s", N * R, 2 * up), Pass("dB_l kept", 0, 2 * up)),
                *(Pass("dz", of_y, ys + up + zs), Pass("times s", rows * R, 2 * zs), Pass("x in order", 0, 2 * xs)),
                *(Pass("dA_l", of_x, xs + zs + down), Pass("dA_l kept", 0, 2 * down)),
                *(Pass("dz A_l", of_x, zs + down + xs), Pass("dx += dz A_l", rows * K, 3 * xs)),
            ]
        return forward, backward

    if design == "loop":  # one order for all, then `lowrank_linear` in torch for each adapter
        each = [lowrank_linear.passes("torch", rows, K, N, R, size, False) for rows in sizes]
        forward = [gather_x, *(part for parts, _ in each for part in parts), Pass("all y", 0, 2 * y), put_y]
        backward = [Pass("dy in order", 0, 2 * y), *(part for _, parts in each for part in parts)]
        backward += [Pass("all dx", 0, 2 * x), Pass("zeros", 0, x), Pass("dx out of order", 0, 3 * x)]
        return forward, [*backward, Pass("all dA_l", 0, 2 * L * down), Pass("all dB_l", 0, 2 * L * up)]

    if design == "PEFT":
        forward = [linear]
        for rows in sizes:
            xs, ys, zs = (n * size for n in (rows * K, rows * N, rows * R))
            forward += [
                *(Pass("x in order", 0, 2 * xs), Pass("z = x A_lᵀ", 2 * rows * R * K, xs + down + zs)),
                *(Pass("z B_lᵀ", 2 * rows * R * N, zs + up + ys), Pass("times s", rows * N, 2 * ys)),
                *(Pass("y in order", 0, 2 * ys), Pass("add", rows * N, 3 * ys), Pass("y out of order", 0, 2 * ys)),
            ]
        return forward, None

    if design == "merged":
        each = [Pass("x W_lᵀ + b", 2 * rows * N * K, rows * K * size + weight + rows * N * size) for rows in sizes]
        return [gather_x, *each, put_y], None

    raise ValueError(f"design: expected one of {DESIGNS}, got {design!r}")
