"""The kernels of `gated_query`; launchers and shapes in gated_query.py. All arithmetic is float32."""

import triton
import triton.language as tl

from .common import load_scale


@triton.jit
def _load_vector(vector_ptr, offs_d, D):
    """(1, BLOCK_D) of a parameter."""
    return tl.load(vector_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _load_rows(x_ptr, stride, rows, mask_m, offs_d, D):
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    return tl.load(x_ptr + rows[:, None] * stride + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(x_ptr, value, rows, mask_m, offs_d, D):
    """Into memory without gaps."""
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    tl.store(x_ptr + rows[:, None] * D + offs_d[None, :], value.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_sum(partial_ptr, part, tile, offs_d, D):
    """A tile's column sums, as row `part` of the partial sums."""
    tl.store(partial_ptr + part * D + offs_d, tl.sum(tile, 0), mask=offs_d < D)


# ---- additive -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M"])
def additive_fwd_kernel(
    hidden_ptr, text_ptr, gamma_ptr, beta_ptr, cross_ptr, cross_gamma_ptr, cross_beta_ptr, out_ptr, scale_ptr, scale,
    M, D, stride_hm, stride_tm, stride_cm, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = h + s (a_s ∘ γ + β) + s (a_c ∘ γ_c + β_c) for one tile; grid (row tiles · column tiles,)."""
    column_tiles = tl.cdiv(D, BLOCK_D)
    rows = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(0) % column_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_m = rows < M
    hidden = _load_rows(hidden_ptr, stride_hm, rows, mask_m, offs_d, D)
    text = _load_rows(text_ptr, stride_tm, rows, mask_m, offs_d, D)
    cross = _load_rows(cross_ptr, stride_cm, rows, mask_m, offs_d, D)
    moved = text * _load_vector(gamma_ptr, offs_d, D) + _load_vector(beta_ptr, offs_d, D)
    moved += cross * _load_vector(cross_gamma_ptr, offs_d, D) + _load_vector(cross_beta_ptr, offs_d, D)
    _store_rows(out_ptr, hidden + load_scale(scale_ptr, scale) * moved, rows, mask_m, offs_d, D)


@triton.jit(do_not_specialize=["M", "tiles"])
def additive_bwd_kernel(
    dy_ptr, text_ptr, gamma_ptr, cross_ptr, cross_gamma_ptr, d_text_ptr, d_cross_ptr,
    d_gamma_ptr, d_beta_ptr, d_cross_gamma_ptr, scale_ptr, scale, M, D, stride_dym, stride_tm, stride_cm, tiles,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d_text = s dy ∘ γ and d_cross = s dy ∘ γ_c over a strip of rows, and its sums of s dy ∘ a_s, s dy and s dy ∘ a_c.

    d_gamma, d_beta and d_cross_gamma (strips, D) hold float32 partial sums; what has no pointer is not computed, and a
    text or cross without one not read. Grid (column tiles, strips).
    """
    strip = tl.program_id(1).to(tl.int64)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    scale = load_scale(scale_ptr, scale)
    if d_text_ptr is not None:
        gamma = _load_vector(gamma_ptr, offs_d, D)
    if d_cross_ptr is not None:
        cross_gamma = _load_vector(cross_gamma_ptr, offs_d, D)
    d_gamma = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    d_beta = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    d_cross_gamma = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for tile in range(tiles):
        rows = (strip * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = rows < M
        dy = _load_rows(dy_ptr, stride_dym, rows, mask_m, offs_d, D) * scale
        if d_text_ptr is not None:
            _store_rows(d_text_ptr, dy * gamma, rows, mask_m, offs_d, D)
        if d_cross_ptr is not None:
            _store_rows(d_cross_ptr, dy * cross_gamma, rows, mask_m, offs_d, D)
        if d_gamma_ptr is not None:
            d_gamma += dy * _load_rows(text_ptr, stride_tm, rows, mask_m, offs_d, D)
        if d_beta_ptr is not None:
            d_beta += dy
        if d_cross_gamma_ptr is not None:
            d_cross_gamma += dy * _load_rows(cross_ptr, stride_cm, rows, mask_m, offs_d, D)
    if d_gamma_ptr is not None:
        _store_sum(d_gamma_ptr, strip, d_gamma, offs_d, D)
    if d_beta_ptr is not None:
        _store_sum(d_beta_ptr, strip, d_beta, offs_d, D)
    if d_cross_gamma_ptr is not None:
        _store_sum(d_cross_gamma_ptr, strip, d_cross_gamma, offs_d, D)


# ---- gated ----------------------------------------------------------------------------------------------------------


@triton.jit
def _load_kept(mask_ptr, rows, mask_m):
    """m (BLOCK_M,): False beyond the last position."""
    if mask_ptr is not None:
        return tl.load(mask_ptr + rows, mask=mask_m, other=0).to(tl.int1)
    return mask_m


@triton.jit(do_not_specialize=["S"])
def gated_fwd_kernel(
    hidden_ptr, text_ptr, gamma_ptr, beta_ptr, mask_ptr, out_ptr, score_ptr, gate_ptr, total_ptr,
    S, D, stride_hm, stride_tm, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """τ, then the scores ⟨f_i, τ⟩ with their maximum and the sum of their exponentials, then g and the result.

    score and gate (B, S), total (B, D); grid (B,). A barrier lies between writing τ or the scores and reading them.
    """
    batch = tl.program_id(0).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    for chunk in tl.static_range(CHUNKS):
        offs_d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        gamma, beta = _load_vector(gamma_ptr, offs_d, D), _load_vector(beta_ptr, offs_d, D)
        total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for first in range(0, S, BLOCK_M):
            rows, mask_m = batch * S + first + offs_m, first + offs_m < S
            moved = _load_rows(text_ptr, stride_tm, rows, mask_m, offs_d, D) * gamma + beta
            total += tl.where(_load_kept(mask_ptr, rows, mask_m)[:, None], moved, 0.0)
        _store_sum(total_ptr, batch, total, offs_d, D)
    tl.debug_barrier()

    largest = tl.full((), -3.0e38, tl.float32)  # not −inf, whose difference to itself, where all is padding, is NaN
    exponentials = tl.zeros((), tl.float32)
    for first in range(0, S, BLOCK_M):
        rows, mask_m = batch * S + first + offs_m, first + offs_m < S
        score = tl.zeros((BLOCK_M,), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            offs_d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
            hidden = _load_rows(hidden_ptr, stride_hm, rows, mask_m, offs_d, D)
            score += tl.sum(hidden * _load_vector(total_ptr + batch * D, offs_d, D), 1)
        score = tl.where(_load_kept(mask_ptr, rows, mask_m), score, float("-inf"))
        tl.store(score_ptr + rows, score, mask=mask_m)
        larger = tl.maximum(largest, tl.max(score, 0))
        exponentials = exponentials * tl.exp(largest - larger) + tl.sum(tl.exp(score - larger), 0)
        largest = larger
    tl.debug_barrier()

    for first in range(0, S, BLOCK_M):
        rows, mask_m = batch * S + first + offs_m, first + offs_m < S
        gate = tl.exp(tl.load(score_ptr + rows, mask=mask_m, other=0.0) - largest) / exponentials
        gate = tl.where(_load_kept(mask_ptr, rows, mask_m), gate, 0.0)
        tl.store(gate_ptr + rows, gate, mask=mask_m)
        for chunk in tl.static_range(CHUNKS):
            offs_d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
            hidden = _load_rows(hidden_ptr, stride_hm, rows, mask_m, offs_d, D)
            text = _load_rows(text_ptr, stride_tm, rows, mask_m, offs_d, D)
            moved = text * _load_vector(gamma_ptr, offs_d, D) + _load_vector(beta_ptr, offs_d, D)
            out = gate[:, None] * hidden + (1 - gate)[:, None] * moved
            _store_rows(out_ptr, out, rows, mask_m, offs_d, D)


@triton.jit(do_not_specialize=["S"])
def gated_bwd_kernel(
    dy_ptr, hidden_ptr, text_ptr, gamma_ptr, beta_ptr, mask_ptr, gate_ptr, total_ptr, q_ptr,
    d_hidden_ptr, d_text_ptr, d_gamma_ptr, d_beta_ptr, S, D, stride_dym, stride_hm, stride_tm,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """q and Σ g q; then of each chunk of columns dτ = Σ ds_i f_i, d_hidden = g dy + ds τ, dt' = (1 − g) dy + m dτ,
    d_text = γ ∘ dt' and the sums of t ∘ dt' and dt'.

    q (B, S) is scratch; d_gamma and d_beta (B, D) hold float32 partial sums; what has no pointer is not computed. Grid
    (B,). A barrier lies between writing q and reading it.
    """
    batch = tl.program_id(0).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    mean = tl.zeros((), tl.float32)
    for first in range(0, S, BLOCK_M):
        rows, mask_m = batch * S + first + offs_m, first + offs_m < S
        q = tl.zeros((BLOCK_M,), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            offs_d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
            dy = _load_rows(dy_ptr, stride_dym, rows, mask_m, offs_d, D)
            text = _load_rows(text_ptr, stride_tm, rows, mask_m, offs_d, D)
            moved = text * _load_vector(gamma_ptr, offs_d, D) + _load_vector(beta_ptr, offs_d, D)
            q += tl.sum(dy * (_load_rows(hidden_ptr, stride_hm, rows, mask_m, offs_d, D) - moved), 1)
        tl.store(q_ptr + rows, q, mask=mask_m)
        mean += tl.sum(tl.load(gate_ptr + rows, mask=mask_m, other=0.0) * q, 0)
    tl.debug_barrier()

    for chunk in tl.static_range(CHUNKS):
        offs_d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        d_total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        if d_text_ptr is not None or d_gamma_ptr is not None or d_beta_ptr is not None:
            for first in range(0, S, BLOCK_M):
                rows, mask_m = batch * S + first + offs_m, first + offs_m < S
                _, ds = _load_ds(gate_ptr, q_ptr, mean, rows, mask_m)
                d_total += ds[:, None] * _load_rows(hidden_ptr, stride_hm, rows, mask_m, offs_d, D)
        d_total = tl.sum(d_total, 0)[None, :]
        total = _load_vector(total_ptr + batch * D, offs_d, D)
        if d_text_ptr is not None:
            gamma = _load_vector(gamma_ptr, offs_d, D)
        d_gamma = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        d_beta = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for first in range(0, S, BLOCK_M):
            rows, mask_m = batch * S + first + offs_m, first + offs_m < S
            gate, ds = _load_ds(gate_ptr, q_ptr, mean, rows, mask_m)
            dy = _load_rows(dy_ptr, stride_dym, rows, mask_m, offs_d, D)
            if d_hidden_ptr is not None:
                _store_rows(d_hidden_ptr, gate[:, None] * dy + ds[:, None] * total, rows, mask_m, offs_d, D)
            d_moved = (1 - gate)[:, None] * dy
            d_moved += tl.where(_load_kept(mask_ptr, rows, mask_m)[:, None], d_total, 0.0)
            if d_text_ptr is not None:
                _store_rows(d_text_ptr, d_moved * gamma, rows, mask_m, offs_d, D)
            if d_gamma_ptr is not None:
                d_gamma += d_moved * _load_rows(text_ptr, stride_tm, rows, mask_m, offs_d, D)
            if d_beta_ptr is not None:
                d_beta += d_moved
        if d_gamma_ptr is not None:
            _store_sum(d_gamma_ptr, batch, d_gamma, offs_d, D)
        if d_beta_ptr is not None:
            _store_sum(d_beta_ptr, batch, d_beta, offs_d, D)


@triton.jit
def _load_ds(gate_ptr, q_ptr, mean, rows, mask_m):
    """g and ds = g (q − Σ g q), (BLOCK_M,)"""
    gate = tl.load(gate_ptr + rows, mask=mask_m, other=0.0)
    return gate, gate * (tl.load(q_ptr + rows, mask=mask_m, other=0.0) - mean)


# ---- the vectors' gradients -----------------------------------------------------------------------------------------


@triton.jit
def _store_total(partial_ptr, grad_ptr, twin_ptr, count, offs_d, D, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    if partial_ptr is not None:
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for first in range(0, count, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            acc += _load_rows(partial_ptr, D, rows.to(tl.int64), rows < count, offs_d, D)
        total = tl.sum(acc, 0)
        if grad_ptr is not None:
            tl.store(grad_ptr + offs_d, total.to(grad_ptr.dtype.element_ty), mask=offs_d < D)
        if twin_ptr is not None:
            tl.store(twin_ptr + offs_d, total.to(twin_ptr.dtype.element_ty), mask=offs_d < D)


@triton.jit(do_not_specialize=["count"])
def finish_kernel(
    gamma_ptr, beta_ptr, cross_gamma_ptr, d_gamma_ptr, d_beta_ptr, d_cross_gamma_ptr, d_cross_beta_ptr, count, D,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial sums (count, D) of up to three vectors, added in one order; β's total goes to both betas, being the same.

    grid (column tiles, 3)
    """
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    vector = tl.program_id(1)
    if vector == 0:
        _store_total(gamma_ptr, d_gamma_ptr, None, count, offs_d, D, BLOCK_M, BLOCK_D)
    elif vector == 1:
        _store_total(beta_ptr, d_beta_ptr, d_cross_beta_ptr, count, offs_d, D, BLOCK_M, BLOCK_D)
    else:
        _store_total(cross_gamma_ptr, d_cross_gamma_ptr, None, count, offs_d, D, BLOCK_M, BLOCK_D)
