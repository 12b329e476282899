"""The kernels of `lowrank_projections`; what they share with `lowrank_linear` they take from there.

A kernel gets one pointer per projection as an argument of its own, None for those that are missing, and makes tuples of
them. J projections follow one another in z (M, J·R), in the chunks of t, and in the partial sums of dA and dB.
"""
# ruff: noqa: RUF005 (Triton compiles no star inside a tuple)

import triton
import triton.language as tl

from .common import add_dot, in_eights, load_rng
from .lowrank_linear_bwd import drop_hidden, load_d_mixed
from .lowrank_linear_fwd import keep_input, load_hidden, load_up


@triton.jit
def _pick(values, j, J: tl.constexpr):
    """values[j], where j is known to the program alone."""
    value = values[0]
    for m in tl.static_range(1, J):
        value = tl.where(j == m, values[m], value)
    return value


@triton.jit
def _place(tile, widths, J: tl.constexpr, BLOCK_N: tl.constexpr):
    """-> j, the tile's number within projection j, columns of the projections before it, columns of all

    tile: its number among the column tiles of all projections
    """
    j = tl.full((), 0, tl.int32)
    first, before, total = j, j, j
    end = tl.cdiv(widths[0], BLOCK_N)
    for m in tl.static_range(1, J):
        total += widths[m - 1]
        is_past = tile >= end
        j, first, before = tl.where(is_past, m, j), tl.where(is_past, end, first), tl.where(is_past, total, before)
        end += tl.cdiv(widths[m], BLOCK_N)
    return j, (tile - first).to(tl.int64), before, total + widths[J - 1]


@triton.jit
def _load_down(down_ptr, offs_k, K, R, DOT: tl.constexpr, BLOCK_R: tl.constexpr):
    """A tile of A, (BLOCK_R, columns)."""
    offs_r = tl.arange(0, BLOCK_R)
    mask = (offs_r < R)[:, None] & (offs_k < K)[None, :]
    return tl.load(down_ptr + offs_r[:, None].to(tl.int64) * K + offs_k[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit(do_not_specialize=["M", "R", "stride_zm", "threshold"])
def shrink_kernel(
    x_ptr, down0_ptr, down1_ptr, down2_ptr, down3_ptr, z_ptr, rng_ptr,
    M, K, R, stride_xm, stride_zm, threshold, keep_scale,
    J: tl.constexpr, AT_ONCE: tl.constexpr, SHARED: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """z_j = drop_j(x) A_jᵀ; grid (row tiles,).

    AT_ONCE, a divisor of J: so many sums are kept in registers. Where not all fit, x is read again, from the L2.
    """
    R, stride_zm = in_eights(R, ALIGNED), in_eights(stride_zm, ALIGNED)
    downs = (down0_ptr, down1_ptr, down2_ptr, down3_ptr)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_r = rows < M, offs_r < R
    for first in tl.static_range(0, J, AT_ONCE):
        accs, rngs = (), ()
        for m in tl.static_range(AT_ONCE):
            accs = accs + (tl.zeros((BLOCK_M, BLOCK_R), tl.float32),)
            if DROPOUT == "input":
                rngs = rngs + (load_rng(rng_ptr + 2 * (first + m)),)
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            x = tl.load(
                x_ptr + rows[:, None] * stride_xm + offs_k[None, :],
                mask=mask_m[:, None] & (offs_k < K)[None, :],
                other=0.0,
            ).to(DOT)
            sums = ()
            for m in tl.static_range(AT_ONCE):
                if m == 0 or not SHARED:
                    down = _load_down(downs[0 if SHARED else first + m], offs_k, K, R, DOT, BLOCK_R)
                dropped = x
                if DROPOUT == "input":
                    dropped = tl.where(keep_input(rngs[m], rows, 0, k, K, threshold, BLOCK_M, BLOCK_K), x, 0.0)
                sums = sums + (add_dot(accs[m], dropped, tl.trans(down), PRECISION),)
            accs = sums
        for m in tl.static_range(AT_ONCE):
            acc = accs[m]
            if DROPOUT == "input":
                acc *= keep_scale
            pointers = z_ptr + rows[:, None] * stride_zm + (first + m) * R + offs_r[None, :]
            tl.store(pointers, acc.to(z_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


@triton.jit
def _load_mixed(
    z_ptr, rng_ptr, rows, j, M, R, stride_zm, threshold, keep_scale,
    ONE_Z: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """drop_j(z_j) (BLOCK_M, BLOCK_R), rounded as a tensor of it would be; ONE_Z: one z for all."""
    if not ONE_Z:
        z_ptr += j * R
    if DROPOUT == "rank":
        rng_ptr += 2 * j
    z = load_hidden(
        z_ptr, rng_ptr, rows, 0, 0, M, R, stride_zm, threshold, keep_scale, DROPOUT, BLOCK_M, BLOCK_R, BLOCK_R
    )
    return z.to(z_ptr.dtype.element_ty).to(DOT)


@triton.jit(do_not_specialize=["M", "R", "stride_zm", "threshold"])
def expand_kernel(
    z_ptr, up0_ptr, up1_ptr, up2_ptr, up3_ptr, bias0_ptr, bias1_ptr, bias2_ptr, bias3_ptr,
    scale0_ptr, scale1_ptr, scale2_ptr, scale3_ptr, y0_ptr, y1_ptr, y2_ptr, y3_ptr, rng_ptr,
    M, N0, N1, N2, N3, R, stride_zm, threshold, keep_scale,
    J: tl.constexpr, ONE_Z: tl.constexpr, STACKED: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """y_j = s_j · drop_j(z_j) B_jᵀ + b_j; grid (row tiles, column tiles of all projections).

    STACKED: the y_j are columns of one tensor.
    """
    R, stride_zm = in_eights(R, ALIGNED), in_eights(stride_zm, ALIGNED)
    widths, biases = (N0, N1, N2, N3), (bias0_ptr, bias1_ptr, bias2_ptr, bias3_ptr)
    j, tile, _, total = _place(tl.program_id(1), widths, J, BLOCK_N)
    N = _pick(widths, j, J)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mixed = _load_mixed(
        z_ptr, rng_ptr, rows, j, M, R, stride_zm, threshold, keep_scale, ONE_Z, DROPOUT, DOT, BLOCK_M, BLOCK_R
    )
    up = load_up(_pick((up0_ptr, up1_ptr, up2_ptr, up3_ptr), j, J), offs_n, mask_n, R, DOT, BLOCK_R)
    y = tl.dot(mixed, tl.trans(up), input_precision=PRECISION)
    y *= tl.load(_pick((scale0_ptr, scale1_ptr, scale2_ptr, scale3_ptr), j, J))
    for m in tl.static_range(J):
        if biases[m] is not None:
            y += tl.load(biases[m] + offs_n, mask=mask_n & (j == m), other=0.0).to(tl.float32)[None, :]
    y_ptr = _pick((y0_ptr, y1_ptr, y2_ptr, y3_ptr), j, J)
    pointers = y_ptr + rows[:, None] * (total if STACKED else N) + offs_n[None, :]
    tl.store(pointers, y.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["M", "R", "stride_zm", "threshold", "tiles"])
def up_bwd_kernel(
    dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr, up0_ptr, up1_ptr, up2_ptr, up3_ptr,
    scale0_ptr, scale1_ptr, scale2_ptr, scale3_ptr, z_ptr, rng_ptr, t_ptr, d_up_ptr,
    M, N0, N1, N2, N3, R, stride_dy0, stride_dy1, stride_dy2, stride_dy3, stride_zm, threshold, keep_scale, tiles,
    J: tl.constexpr, ONE_Z: tl.constexpr, DROPOUT: tl.constexpr, NEEDS_T: tl.constexpr, NEEDS_UP: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """One read of dy_j: t[chunk] = dy_j B_j over this chunk of columns, and s_j · dy_jᵀ drop_j(z_j) over this strip.

    t (chunks of all projections, M, R) and d_up (strips, ΣN, R) are float32 partial sums; grid (chunks, strips).
    """
    R, stride_zm = in_eights(R, ALIGNED), in_eights(stride_zm, ALIGNED)
    widths = (N0, N1, N2, N3)
    j, chunk, before, total = _place(tl.program_id(0), widths, J, BLOCK_N)
    N = _pick(widths, j, J)
    dy_ptr = _pick((dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr), j, J)
    stride_dym = _pick((stride_dy0, stride_dy1, stride_dy2, stride_dy3), j, J)
    strip = tl.program_id(1).to(tl.int64)
    offs_n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < R
    if NEEDS_T:
        up = load_up(_pick((up0_ptr, up1_ptr, up2_ptr, up3_ptr), j, J), offs_n, mask_n, R, DOT, BLOCK_R)
        t_ptr += tl.program_id(0).to(tl.int64) * M * R
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for tile in range(tiles):
        rows = (strip * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = rows < M
        dy = tl.load(
            dy_ptr + rows[:, None] * stride_dym + offs_n[None, :], mask=mask_m[:, None] & mask_n[None, :], other=0.0
        ).to(DOT)
        if NEEDS_T:
            t = tl.dot(dy, up, input_precision=PRECISION)
            tl.store(t_ptr + rows[:, None] * R + offs_r[None, :], t, mask=mask_m[:, None] & mask_r[None, :])
        if NEEDS_UP:
            mixed = _load_mixed(
                z_ptr, rng_ptr, rows, j, M, R, stride_zm, threshold, keep_scale, ONE_Z, DROPOUT, DOT, BLOCK_M, BLOCK_R
            )
            acc = add_dot(acc, tl.trans(dy), mixed, PRECISION)
    if NEEDS_UP:
        acc *= tl.load(_pick((scale0_ptr, scale1_ptr, scale2_ptr, scale3_ptr), j, J))
        pointers = d_up_ptr + (strip * total + before + offs_n[:, None]) * R + offs_r[None, :]
        tl.store(pointers, acc, mask=mask_n[:, None] & mask_r[None, :])


@triton.jit
def _load_dz(
    t_ptr, scale_ptr, rng_ptr, rows, first, chunks, M, R, threshold, keep_scale,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """dz_j of the chunks of t from number `first` on; CHUNKS: how many, or 0 where only the program knows."""
    t_ptr += tl.cast(M, tl.int64) * R * first
    total = load_d_mixed(
        t_ptr, rng_ptr, scale_ptr, 1.0, rows, 0, 0, M, R, chunks, threshold, keep_scale,
        1, DROPOUT, BLOCK_M, BLOCK_R, BLOCK_R, CHUNKS,
    )  # fmt: skip
    return drop_hidden(total, rng_ptr, rows, 0, threshold, keep_scale, DROPOUT, BLOCK_M, BLOCK_R)


@triton.jit
def _load_late_dz(
    t_ptr, scale_ptr, rng_ptr, rows, M, R, threshold, keep_scale,
    j: tl.constexpr, CHUNKS0: tl.constexpr, CHUNKS1: tl.constexpr, CHUNKS2: tl.constexpr, CHUNKS3: tl.constexpr,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dz_j, where the program is compiled for the number of everybody's chunks."""
    CHUNKS: tl.constexpr = CHUNKS0 if j == 0 else CHUNKS1 if j == 1 else CHUNKS2 if j == 2 else CHUNKS3
    first = CHUNKS0 * (j > 0) + CHUNKS1 * (j > 1) + CHUNKS2 * (j > 2)
    if DROPOUT == "rank":
        rng_ptr += 2 * j
    return _load_dz(
        t_ptr, scale_ptr, rng_ptr, rows, first, 0, M, R, threshold, keep_scale, DROPOUT, BLOCK_M, BLOCK_R, CHUNKS
    )


@triton.jit(do_not_specialize=["M", "R", "chunks0", "chunks1", "chunks2", "chunks3", "threshold"])
def hidden_bwd_kernel(
    t_ptr, dz_ptr, scale0_ptr, scale1_ptr, scale2_ptr, scale3_ptr, rng_ptr,
    M, R, chunks0, chunks1, chunks2, chunks3, threshold, keep_scale,
    J: tl.constexpr, PARTS: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """dz_j through z's mask, (M, PARTS · R); one part, their sum, where one A and one x serve all.

    grid (row tiles, PARTS)
    """
    R = in_eights(R, ALIGNED)
    chunks, scales = (chunks0, chunks1, chunks2, chunks3), (scale0_ptr, scale1_ptr, scale2_ptr, scale3_ptr)
    part = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    dz = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for added in tl.static_range(J // PARTS):
        j = part + added
        first = tl.full((), 0, tl.int32)
        for m in tl.static_range(J - 1):
            first += tl.where(m < j, chunks[m], 0)
        scale_ptr = _pick(scales, j, J)
        mask_ptr = rng_ptr
        if DROPOUT == "rank":
            mask_ptr += 2 * j
        dz += _load_dz(
            t_ptr, scale_ptr, mask_ptr, rows, first, _pick(chunks, j, J), M, R, threshold, keep_scale,
            DROPOUT, BLOCK_M, BLOCK_R, 0,
        )  # fmt: skip
    pointers = dz_ptr + rows[:, None] * (PARTS * R) + part * R + offs_r[None, :]
    tl.store(pointers, dz.to(dz_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (offs_r < R)[None, :])


@triton.jit(do_not_specialize=["M", "R", "threshold", "tiles"])
def down_bwd_kernel(
    x_ptr, dz_ptr, down0_ptr, down1_ptr, down2_ptr, down3_ptr, scale0_ptr, scale1_ptr, scale2_ptr, scale3_ptr,
    dx_ptr, d_down_ptr, rng_ptr, M, K, R, stride_xm, threshold, keep_scale, tiles,
    J: tl.constexpr, PARTS: tl.constexpr, AT_ONCE: tl.constexpr, SHARED: tl.constexpr, DROPOUT: tl.constexpr,
    NEEDS_X: tl.constexpr, NEEDS_DOWN: tl.constexpr, LATE: tl.constexpr, CHUNKS0: tl.constexpr, CHUNKS1: tl.constexpr,
    CHUNKS2: tl.constexpr, CHUNKS3: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One read of x: dz_jᵀ drop_j(x) over this strip of rows, and dx = Σ_j mask_j ∘ (dz_j A_j).

    AT_ONCE: all PARTS of dz, or one: then x is read again for each, from the L2, and so is dx, which is float32.
    LATE: dz_ptr points to t's chunks, so many of each projection, and dz is made of them as hidden_bwd makes it.
    d_down (strips, R of each A, K) holds float32 partial sums; SHARED: of one A, as many sums as passes. grid (column
    tiles, strips)
    """
    R = in_eights(R, ALIGNED)
    downs, scales = (down0_ptr, down1_ptr, down2_ptr, down3_ptr), (scale0_ptr, scale1_ptr, scale2_ptr, scale3_ptr)
    PASSES: tl.constexpr = PARTS // AT_ONCE
    SUMS: tl.constexpr = 1 if SHARED else AT_ONCE  # in each pass
    # As in lowrank_linear's: sm_100 would multiply in tf32, and sm_90 spill.
    FLIPPED: tl.constexpr = BLOCK_R >= BLOCK_K and tl.float32 == DOT and PRECISION == "ieee"
    HALF: tl.constexpr = x_ptr.dtype.element_ty if NEEDS_DOWN else dx_ptr.dtype.element_ty
    first_column = tl.program_id(0) * BLOCK_K
    strip = tl.program_id(1).to(tl.int64)
    offs_k, offs_r = first_column + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_k, mask_r = offs_k < K, offs_r < R
    for turn in range(PASSES):
        tiles_of_down, accs = (), ()
        for m in tl.static_range(SUMS):
            if NEEDS_X:
                down_ptr = _pick(downs, turn + m, 1 if SHARED else J)
                tiles_of_down = tiles_of_down + (_load_down(down_ptr, offs_k, K, R, DOT, BLOCK_R),)
            accs = accs + (tl.zeros((BLOCK_K, BLOCK_R) if FLIPPED else (BLOCK_R, BLOCK_K), tl.float32),)
        for tile in range(tiles):
            rows = (strip * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
            mask_m = rows < M
            mask = mask_m[:, None] & mask_k[None, :]
            if NEEDS_DOWN:
                x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_k[None, :], mask=mask, other=0.0).to(DOT)
            dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            if NEEDS_X and PASSES > 1:
                dx = tl.load(dx_ptr + rows[:, None] * K + offs_k[None, :], mask=mask & (turn > 0), other=0.0)
            sums = ()
            for m in tl.static_range(AT_ONCE):
                part = turn + m
                if LATE:
                    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
                    for j in tl.static_range(m, m + J // PARTS):
                        total += _load_late_dz(
                            dz_ptr, scales[j], rng_ptr, rows, M, R, threshold, keep_scale,
                            j, CHUNKS0, CHUNKS1, CHUNKS2, CHUNKS3, DROPOUT, BLOCK_M, BLOCK_R,
                        )  # fmt: skip
                    dz = total.to(HALF).to(DOT)
                else:
                    pointers = dz_ptr + rows[:, None] * (PARTS * R) + part * R + offs_r[None, :]
                    dz = tl.load(pointers, mask=mask_m[:, None] & mask_r[None, :], other=0.0).to(DOT)
                if DROPOUT == "input":
                    rng = load_rng(rng_ptr + 2 * part)  # here: its 20 round keys would take registers all the time
                    kept = keep_input(rng, rows, 0, first_column, K, threshold, BLOCK_M, BLOCK_K)
                if NEEDS_DOWN:
                    dropped = x
                    if DROPOUT == "input":
                        dropped = tl.where(kept, x, 0.0)
                    acc = sums[0] if SHARED and m > 0 else accs[m]
                    if FLIPPED:
                        acc = add_dot(acc, tl.trans(dropped), dz, PRECISION)
                    else:
                        acc = add_dot(acc, tl.trans(dz), dropped, PRECISION)
                    sums = (acc,) if SHARED else sums + (acc,)
                if NEEDS_X:
                    down = tiles_of_down[0 if SHARED else m]
                    if DROPOUT == "input":
                        dx += tl.where(kept, tl.dot(dz, down, input_precision=PRECISION), 0.0)
                    else:
                        dx = add_dot(dx, dz, down, PRECISION)
            if NEEDS_DOWN:
                accs = sums
            if NEEDS_X:
                tl.store(dx_ptr + rows[:, None] * K + offs_k[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEEDS_DOWN:
            for m in tl.static_range(SUMS):
                acc = accs[m]
                part = (strip * PASSES + turn) * SUMS + m
                pointers = d_down_ptr + (part * R + offs_r[:, None]) * K + offs_k[None, :]
                tl.store(pointers, tl.trans(acc) if FLIPPED else acc, mask=mask_r[:, None] & mask_k[None, :])
        if PASSES > 1:
            tl.debug_barrier()  # what other threads wrote of dx is read in the next pass
