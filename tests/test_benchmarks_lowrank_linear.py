"""The floor and the designs of `lowrank_linear`'s benchmark, and that it refuses what is wrong."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from peft_kernels.benchmarks import bench_lowrank_linear as bench
from peft_kernels.benchmarks import cases, floor, runner, timing
from peft_kernels.benchmarks import floor_lowrank_linear as costs

CPU = torch.device("cpu")
TINY = bench.Case(24, 16, 40, 4)
DROPPED = bench.Case(24, 16, 40, 4, dropout=0.25)
EAGER = ["frozen linear", "PEFT", "torch eager", "ours, torch"]

# ---- the floor and the model ----------------------------------------------------------------------------------------

SHAPES = ((8192, 4096, 4096), (9232, 768, 768), (9232, 768, 3072), (9232, 3072, 768))
# Microseconds on an H200, bfloat16, r = 16, forward and backward, worked out by hand for the design documents.
BY_HAND = {
    "two frozen GEMMs": (696, 27.6, 110, 110),
    "floor": (704, 29.3, 115, 115),
    "low-rank first": (774, 44, 147, 157),
    "PEFT": (946, 81, 263, 223),
    "PEFT, dropout": (1024, 97, 279, 289),
}
DESIGN_OF = {"two frozen GEMMs": "linear", "low-rank first": "D1", "PEFT": "eager", "PEFT, dropout": "eager"}


@pytest.mark.parametrize("row", BY_HAND)
def test_floor_and_model_agree_with_the_table_made_by_hand(row):
    for shape, expected in zip(SHAPES, BY_HAND[row]):
        if row == "floor":
            seconds = floor.total(costs.compulsory(*shape, 16, 2)).seconds(floor.H200, "bfloat16")
        else:
            forward, backward = costs.passes(DESIGN_OF[row], *shape, 16, 2, "dropout" in row)
            seconds = floor.modelled_seconds(forward + backward, floor.H200, "bfloat16")
        assert seconds * 1e6 == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize(
    "name", ["frozen linear", "torch eager"]
)  # the counter overlooks addmm_ and trips over modules
def test_flops_of_each_design_are_those_of_its_matmuls(name):
    t = bench.make_tensors(TINY, CPU)
    provider = bench.PROVIDERS[name]
    built = provider.build(TINY, t)
    with FlopCounterMode(display=False) as counter:
        runner.results(built, t.input)
    forward, backward = bench.passes(TINY, provider.design, "cpu")
    matmuls = sum(part.flops for part in forward + backward if part.flops > TINY.M * TINY.N)  # not additions
    assert counter.get_total_flops() == matmuls
    assert counter.get_total_flops() == floor.total(bench.least(TINY, provider.design)).flops


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(("design", "gemms"), [("D1", 2), ("D3", 1)])
def test_launches_of_the_kernel_designs(design, gemms, dropout):
    from peft_kernels.triton_kernels import lowrank_linear as kernels
    from peft_kernels.triton_kernels.common import record_launches

    t = [tensor.detach() for tensor in bench.make_tensors(TINY, CPU)]
    x, weight, bias, down, up, dy = t
    rng, p = (torch.zeros(2, dtype=torch.int64), 0.25) if dropout else (None, 0.0)
    with record_launches(run=False) as launches:
        _, z = kernels.lowrank_linear_fwd(x, weight, bias, down, up, None, 2.0, None, rng, p, "input", design)
        needs = (True, True, True, False, False)
        kernels.lowrank_linear_bwd(dy, x, weight, down, up, None, 2.0, z, rng, p, "input", needs, design)
    forward, backward = costs.passes(design, TINY.M, TINY.K, TINY.N, TINY.R, 4, dropout)
    assert len(launches) + gemms + dropout == len(forward + backward)  # drawing the seed is a launch of torch


# ---- verify, then time ----------------------------------------------------------------------------------------------


def test_mask_is_recovered():
    t = bench.make_tensors(DROPPED, CPU)
    before = [tensor.clone() for tensor in t]
    mask = bench.recover_mask(bench.PROVIDERS["torch eager"].build(DROPPED, t), t, seed=5)
    torch.manual_seed(5)
    assert torch.equal(mask, F.dropout(torch.ones_like(t.x), DROPPED.dropout) != 0)
    assert 0 < mask.sum() < mask.numel()
    assert all(torch.equal(old, new) for old, new in zip(before, t))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", bench.DROPOUTS)
def test_right_providers_pass(dropout, dtype):
    case = bench.Case(50, 24, 40, 4, dtype=dtype, dropout=dropout)
    problem = runner.Problem(case, bench.make_tensors(case, CPU))
    for name in EAGER:
        runner.verify(bench.BENCH, name, problem, bench.PROVIDERS[name].build(case, problem.tensors))


def test_each_mask_has_its_reference():
    problem = runner.Problem(DROPPED, bench.make_tensors(DROPPED, CPU))
    for seed in (1, 1, 2):
        for name in ("torch eager", "PEFT"):  # draw alike
            built = bench.PROVIDERS[name].build(DROPPED, problem.tensors)
            runner.verify(bench.BENCH, name, problem, built, seed)
    assert len(problem.references) == 2


def _eager_with(change):
    def build(case, t):
        def forward(x):
            dropped = F.dropout(x, case.dropout)
            hidden = {"undropped": x, "gradient of A undropped": dropped}.get(change, dropped) @ t.down.t()
            if change == "gradient of A undropped":
                hidden = hidden + (x @ t.down.t() - (x @ t.down.t()).detach())
            y = F.linear(x, t.weight, t.bias) + (1.0 if change == "no scale" else cases.SCALE) * hidden @ t.up.t()
            return {"zeros": y * 0, "nan": y * float("nan"), "one row": _without_last_row(y)}.get(change, y)

        return runner.Built(forward, {"d_down": t.down, "d_up": t.up})

    return runner.Provider(build, "eager")


def _without_last_row(y):
    return torch.cat([y[:-1], y[-1:] * 0])


@pytest.mark.parametrize("change", ["zeros", "nan", "one row", "no scale", "undropped", "gradient of A undropped"])
def test_wrong_provider_is_refused_before_anything_is_timed(change, monkeypatch):
    wrong = dataclasses.replace(bench.BENCH, providers={**bench.PROVIDERS, "wrong": _eager_with(change)})
    monkeypatch.setattr(timing, "time_on_cpu", lambda *_: pytest.fail("timed"))
    with pytest.raises(cases.WrongResult, match=r"^wrong: "):
        runner.measure(wrong, DROPPED, CPU, ["PEFT", "wrong"], rounds=1)


@pytest.mark.parametrize("dropout", bench.DROPOUTS)
def test_what_is_saved_for_the_backward(dropout):
    case = dataclasses.replace(TINY, dropout=dropout)
    record = runner.measure(bench.BENCH, case, CPU, EAGER, rounds=1)
    saved = {row["provider"]: row["saved_bytes"] for row in record["results"]}
    assert saved["frozen linear"] == 0
    assert saved["ours, torch"] < saved["PEFT"] or dropout == 0
