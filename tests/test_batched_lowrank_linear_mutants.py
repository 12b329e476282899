"""The comparison with the oracle must notice a broken kernel: one piece of Triton replaced, the module reloaded."""

from contextlib import nullcontext

import pytest
from batched_cases import Problem, assert_as_accurate_as_torch

pytest.importorskip("triton")
from triton_mutants import load

from peft_kernels.triton_kernels import batched_lowrank_linear as kernels

SCALES = Problem(scale=None)
SCALED = " * _load_scale(scale_ptr, scale, adapter)"
MUTANTS = {
    "scale of the first adapter": ("tl.load(scale_ptr + adapter)", "tl.load(scale_ptr)", SCALES),
    "scale missing in y": (SCALED, "", SCALES),
    "scale missing in dz": (f"acc{SCALED.replace('*', '*=')}\n    pointers = thin_ptr", "pointers = thin_ptr", SCALES),
    "scale missing in dB": (f"acc{SCALED.replace('*', '*=')}\n    if UP", "if UP", SCALES),
    "rows not gathered": ("tl.load(order_ptr + places, mask=mask_m, other=0), mask_m", "places, mask_m", Problem()),
    "rows not gathered in gradients": (
        "rows = tl.load(order_ptr + places, mask=mask_m, other=0)",
        "rows = tl.where(mask_m, places, 0)",
        Problem(),
    ),
    "an adapter's last row lost": ("places < tl.load(", "places + 1 < tl.load(", Problem()),
    "later parts of a tile lost": (" + tl.program_id(0) % parts * BLOCK_M", "", Problem()),
    "down of the first adapter": ("(adapter * R + offs_r[:, None]) * W", "(offs_r[:, None]) * W", Problem()),
    "up of the first adapter": ("factor_ptr + adapter * W * R", "factor_ptr", Problem()),
    "rows without an adapter left alone": ("if adapter >= 0:", "if adapter < 0:\n        return\n    else:", Problem()),
    "bias missing": ("acc += tl.load(bias_ptr", "_ = tl.load(bias_ptr", Problem()),
    "column tiles all the same": ("tl.program_id(1) * BLOCK_W", "0", Problem(outputs=72)),
    "tail of the width lost": ("range(0, W, BLOCK_W)", "range(0, W - BLOCK_W + 1, BLOCK_W)", Problem(inputs=72)),
    "strips overlap": ("end = tl.minimum(end, begin + height)", "pass", Problem()),
    "strips all the same": ("begin += strip * height", "pass", Problem()),
    "strips taken for adapters": ("part % adapters, part // adapters", "part // strips, part % strips", Problem()),
    "dA laid out as dB": (
        "(part * R + offs_r[None, :]) * W + offs_w[:, None]",
        "(part * W + offs_w[:, None]) * R + offs_r[None, :]",
        Problem(),
    ),
}


@pytest.mark.parametrize("mutated", [False, True], ids=["control", "mutant"])
@pytest.mark.parametrize("name", MUTANTS)
def test_triton_mutant_is_noticed(name, mutated, monkeypatch, device, tmp_path):
    """The control loads the same source afresh without the change, and passes."""
    good, bad, problem = MUTANTS[name]
    mutant = load(kernels, good, bad if mutated else None, tmp_path)
    for launcher in ("batched_lowrank_linear_fwd", "batched_lowrank_linear_bwd"):
        monkeypatch.setattr(kernels, launcher, mutant[launcher])
    with pytest.raises(AssertionError) if mutated else nullcontext():
        assert_as_accurate_as_torch(problem, device, "triton")
