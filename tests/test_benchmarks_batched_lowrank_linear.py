"""The floor and the designs of `batched_lowrank_linear`'s benchmark, and that it refuses what is wrong."""

import dataclasses

import pytest
import torch
from benchmark_cases import reason
from torch.utils.flop_counter import FlopCounterMode

from peft_kernels import adapter_segments
from peft_kernels.benchmarks import bench_batched_lowrank_linear as bench
from peft_kernels.benchmarks import cases, floor, runner
from peft_kernels.benchmarks.floor import batched_lowrank_linear as costs
from peft_kernels.benchmarks.floor import lowrank_linear
from peft_kernels.ops.batched_lowrank_linear import batched_lowrank_linear_reference

CPU = torch.device("cpu")
CASES = [
    bench.Case(4, 6, 24, 40, L, 4, adapter_of=adapter_of, backward=backward)
    for L, adapter_of in ((1, "entry"), (3, "entry"), (9, "entry"), (3, "row"), (40, "row"))
    for backward in (False, True)
]
ON_CPU = runner.providers_on(bench.BENCH, "cpu")


def _title(case):
    return f"{case.L}-{case.adapter_of}-{'both' if case.backward else 'forward'}"


# ---- the floor and the model ----------------------------------------------------------------------------------------


def test_floor_of_one_adapter_is_that_of_lowrank_linear():
    assert costs.compulsory(9232, 768, 768, 16, 1, 1, 2) == lowrank_linear.compulsory(9232, 768, 768, 16, 2)
    one, few, all_ = (costs.compulsory(9232, 768, 768, 16, 32, used, 2) for used in (1, 16, 32))
    factors = 16 * (768 + 768) * 2
    assert few[0].bytes - one[0].bytes == few[1].bytes - one[1].bytes == 15 * factors
    assert all_[0].flops == one[0].flops


@pytest.mark.parametrize("case", CASES, ids=_title)
def test_flops_of_each_design_are_those_of_its_matmuls(case):
    t = bench.make_tensors(case, CPU)
    names = ["ours, torch, order given"] + ([] if case.backward else ["merged weights"])  # addmm_ is not counted
    for name in names:
        provider = bench.PROVIDERS[name]
        built = provider.build(case, t)
        with FlopCounterMode(display=False) as counter:
            runner.results(built, t.input, case.backward)
        parts = bench.passes(case, provider.design, "cpu")[: 2 if case.backward else 1]
        elementwise = ("times s", "dx += dz A_l", "y += s z B_lᵀ")
        matmuls = [part for each in parts for part in each if part.name not in elementwise]
        assert counter.get_total_flops() == floor.total(matmuls).flops, name
        if name != "merged weights":
            least = bench.least(case, provider.design)[: 2 if case.backward else 1]
            assert counter.get_total_flops() == floor.total(least).flops


@pytest.mark.parametrize(("M", "L"), [(256, 2), (24, 400)])
def test_launches_of_the_kernels(M, L):
    from peft_kernels.records import Factors
    from peft_kernels.triton_kernels import batched_lowrank_linear as kernels
    from peft_kernels.triton_kernels.common import record_launches

    case = bench.Case(1, M, 24, 40, L, 4, adapter_of="row")
    x, weight, bias, down, up, index, dy = (t.detach() for t in bench.make_tensors(case, CPU))
    x, dy, factors, segments = x[0], dy[0], Factors(down, up, scale=2.0), adapter_segments(index[0], L)
    with record_launches(run=False) as launches:
        _, z = kernels.batched_lowrank_linear_fwd(x, weight, bias, factors, segments)
        kernels.batched_lowrank_linear_bwd(dy, x, weight, factors._replace(z=z), segments, (True,) * 3)
    forward, backward = bench.passes(case, "segments", "cuda")
    gemms, sums = 2, 2 if L == 400 else 0  # a gram of one strip needs no sum
    assert len(launches) == len(forward + backward) - gemms - sums


def test_thin_passes_by_hand():
    """Each thin pass of 9232 rows moves x or y once: 14 MB, plus the factors of the adapters that have rows."""
    forward, backward = costs.passes("segments", 9232, 768, 768, 16, 32, 16, 2)
    wide, thin, factor = 9232 * 768 * 2, 9232 * 16 * 2, 16 * 768 * 2
    expected = [wide + thin + 16 * factor] * 2
    assert [part.bytes for part in forward[:2]] == expected
    assert [part.bytes for part in backward if part.name.startswith(("shrink", "expand"))] == expected
    assert [part.bytes for part in backward if part.name.startswith("gram")] == [wide + thin + 32 * factor] * 2
    with pytest.raises(ValueError, match="design"):
        costs.passes("unknown", 9232, 768, 768, 16, 32, 16, 2)


def test_what_differs_on_a_gpu_is_not_modelled():
    assert bench.passes(CASES[0], "torch", "cuda") == bench.passes(CASES[0], "loop", "cuda") == (None, None)


# ---- the cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=_title)
def test_every_adapter_that_can_have_rows_has_some(case):
    t = bench.make_tensors(case, CPU)
    counts = t.row_index.bincount(minlength=case.L)
    assert (counts > 0).sum() == case.used and counts.sum() == case.M
    step = case.tokens if case.adapter_of == "entry" else 1
    assert counts[counts > 0].max() - counts[counts > 0].min() <= step
    assert case.used == 1 or (t.row_index.diff() < 0).any()  # in no order


@pytest.mark.parametrize("case", CASES, ids=_title)
def test_reference_is_the_definition(case):
    t = cases.converted(bench.make_tensors(case, CPU), torch.float64)
    built = bench.reference(None, None, None, 0)[1](case, t)
    index = t.row_index.view(t.x.shape[:-1])
    exact = batched_lowrank_linear_reference(t.x, t.weight, t.bias, t.down, t.up, index, scale=cases.SCALE)
    torch.testing.assert_close(built.forward(t.x), exact, rtol=1e-12, atol=1e-12)


# ---- verify, then time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=_title)
def test_right_providers_pass(case, dtype):
    case = dataclasses.replace(case, dtype=dtype)
    record = runner.measure(bench.BENCH, case, CPU, ON_CPU, rounds=1)
    expected = {"loop of lowrank_linear", "ours, torch", "ours, torch, order given"}
    expected |= set() if case.backward else {"merged weights"}
    expected |= {"PEFT, adapter_names"} if case.adapter_of == "entry" and not case.backward else set()
    assert {row["provider"] for row in record["results"]} == expected
    assert all("forward only" in reason or "per entry" in reason for reason in record["absent"].values())


def _loop_with(change):
    def build(case, t):
        index = {"another adapter": (t.index + 1) % case.L, "sorted rows": t.index.sort().values}.get(change, t.index)
        built = bench.PROVIDERS["loop of lowrank_linear"].build(case, t._replace(index=index))
        if change == "no gradient of x":
            return built._replace(forward=lambda x: built.forward(x.detach()) + 0 * x.sum())
        return built

    return runner.Provider(build, None)


@pytest.mark.parametrize("change", ["another adapter", "sorted rows", "no gradient of x"])
@pytest.mark.parametrize("adapter_of", ["entry", "row"])
def test_wrong_provider_is_refused(change, adapter_of):
    case = bench.Case(4, 6, 24, 40, 3, 4, adapter_of=adapter_of)
    assert reason(bench.BENCH, _loop_with(change), case).startswith("wrong: ")
