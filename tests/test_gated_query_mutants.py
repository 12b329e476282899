"""The comparison with the oracle must notice a broken kernel: one piece of Triton replaced, the module reloaded."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
from gated_query_cases import Problem, assert_as_accurate_as_torch

pytest.importorskip("triton")
from triton_mutants import load

from peft_kernels.triton_kernels import gated_query as launchers
from peft_kernels.triton_kernels import gated_query_kernels as kernels

ADDITIVE, GATED, PADDED = Problem("additive"), Problem("gated"), Problem("gated", padding="some")
LONG = replace(PADDED, positions=35)  # several tiles of rows
WIDE = replace(PADDED, batch=2, width=1128)  # two tiles of columns
MUTANTS = {
    "scale missing": ("hidden + load_scale(scale_ptr, scale) * moved", "hidden + moved", ADDITIVE),
    "cross missing": ("moved += cross *", "moved = cross *", ADDITIVE),
    "scale missing backward": ("scale = load_scale(scale_ptr, scale)", "scale = 1.0", ADDITIVE),
    "gammas swapped": ("_store_rows(d_cross_ptr, dy * cross_gamma,", "_store_rows(d_cross_ptr, dy * gamma,", ADDITIVE),
    "sums of the wrong input": ("dy * _load_rows(cross_ptr,", "dy * _load_rows(text_ptr,", ADDITIVE),
    "sums of one tile": ("d_beta += dy\n    ", "d_beta = dy\n    ", ADDITIVE),
    "strips all the first": ("rows = (strip * tiles + tile)", "rows = (tile)", ADDITIVE),
    "the other beta without gradient": ("d_beta_ptr, d_cross_beta_ptr, count", "d_beta_ptr, None, count", ADDITIVE),
    "partial sums rounded": ("tl.sum(tile, 0), mask", "tl.sum(tile, 0).to(tl.float16), mask", ADDITIVE),
    "last partial sums left out": ("range(0, count, ", "range(0, count - 1, ", replace(GATED, batch=33)),
    "padding in the total": ("tl.where(_load_kept(mask_ptr, rows, mask_m)[:, None], moved, 0.0)", "moved", PADDED),
    "padding in the softmax": ("tl.where(_load_kept(mask_ptr, rows, mask_m), score", "tl.where(mask_m, score", PADDED),
    "padding has a gate": ("tl.where(_load_kept(mask_ptr, rows, mask_m), gate, 0.0)", "gate", PADDED),
    "mask of the first sequence": ("tl.load(mask_ptr + rows,", "tl.load(mask_ptr + rows % 7,", PADDED),
    "beta missing in the total": ("offs_d, D) * gamma + beta", "offs_d, D) * gamma", GATED),
    "rows of the first tile": ("range(0, S, BLOCK_M)", "range(0, BLOCK_M, BLOCK_M)", LONG),
    "maximum not carried": ("exponentials * tl.exp(largest - larger)", "exponentials", replace(LONG, spread=3.0)),
    "sum of the last tile": ("exponentials * tl.exp(largest - larger) +", "", LONG),
    "gates swapped": ("gate[:, None] * hidden + (1 - gate)", "(1 - gate)[:, None] * hidden + gate", GATED),
    "score of the first columns": ("score += tl.sum(hidden", "score = tl.sum(hidden", WIDE),
    "q of the first columns": ("q += tl.sum(dy", "q = tl.sum(dy", WIDE),
    "no mean": ("mask=mask_m, other=0.0) - mean)", "mask=mask_m, other=0.0))", GATED),
    "mean of the last tile": ("mean += tl.sum", "mean = tl.sum", LONG),
    "no gradient through the score": ("gate[:, None] * dy + ds[:, None] * total", "gate[:, None] * dy", GATED),
    "no gradient through the total": ("d_moved += tl.where(", "d_moved += 0 * tl.where(", GATED),
    "padding gets the total's gradient": (
        "tl.where(_load_kept(mask_ptr, rows, mask_m)[:, None], d_total, 0.0)",
        "tl.where(mask_m[:, None], d_total, 0.0)",
        PADDED,
    ),
    "gamma missing": ("_store_rows(d_text_ptr, d_moved * gamma,", "_store_rows(d_text_ptr, d_moved,", GATED),
    "column sums of the last tile": ("d_gamma += d_moved *", "d_gamma = d_moved *", LONG),
}  # fmt: skip


@pytest.mark.parametrize("mutated", [False, True], ids=["control", "mutant"])
@pytest.mark.parametrize("name", MUTANTS)
def test_triton_mutant_is_noticed(name, mutated, monkeypatch, device, tmp_path):
    """The control loads the same source afresh without the change, and passes. Strips have two tiles of rows."""
    good, bad, problem = MUTANTS[name]
    mutant = load(kernels, good, bad if mutated else None, tmp_path)
    for kernel in [kernel for kernel in vars(launchers) if kernel.endswith("_kernel")]:
        monkeypatch.setattr(launchers, kernel, mutant[kernel])
    monkeypatch.setattr(launchers, "strip_tiles", lambda *sizes: 2)
    with pytest.raises(AssertionError) if mutated else nullcontext():
        assert_as_accurate_as_torch(problem, device, "triton")
