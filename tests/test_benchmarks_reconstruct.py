"""The floor and the designs of `reconstruct`'s benchmark, and that it refuses what is wrong."""

import dataclasses

import pytest
import torch
from benchmark_cases import reason
from torch.utils.flop_counter import FlopCounterMode

from peft_kernels.benchmarks import bench_reconstruct as bench
from peft_kernels.benchmarks import cases, floor, runner
from peft_kernels.benchmarks.floor import reconstruct as costs

CPU = torch.device("cpu")
SHAPES = {"none": (1, 24, 40, 6), "diagonal": (3, 24, 40, 6), "dense": (3, 24, 40, 6)}
CASES = [
    bench.Case(*shape, core, base, backward=backward)
    for core, shape in SHAPES.items()
    for base in (False, True)
    for backward in (False, True)
]
ON_CPU = runner.providers_on(bench.BENCH, "cpu")


def _title(case):
    return f"{case.core}-{'base' if case.base else 'alone'}-{'both' if case.backward else 'forward'}"


# ---- the floor and the model ----------------------------------------------------------------------------------------


def test_floor_by_hand():
    """36 matrices of 768², rank 64: 42.5 MB each way in bfloat16, which 4.3 TB/s writes in 9.9 µs."""
    forward, backward = costs.compulsory(36, 768, 768, 64, "diagonal", False, 2)
    parameters = 64 * (768 + 768) + 36 * 64
    assert forward == (2 * 36 * 768 * 768 * 64, (36 * 768 * 768 + parameters) * 2)
    assert backward == (2 * forward.flops, (36 * 768 * 768 + 2 * parameters) * 2)
    assert forward.seconds(floor.H200, "bfloat16") == pytest.approx(9.92e-6, rel=1e-2)
    on_base = costs.compulsory(36, 768, 768, 64, "diagonal", True, 2)[0]
    assert on_base.bytes - forward.bytes == 36 * 768 * 768 * 2 and on_base.flops == forward.flops
    dense = costs.compulsory(36, 768, 768, 64, "dense", False, 2)[0]
    assert dense.flops - forward.flops == 2 * 36 * 768 * 64 * 64


@pytest.mark.parametrize("case", CASES, ids=_title)
def test_flops_of_the_floor_are_those_of_its_matmuls(case):
    t = bench.make_tensors(case, CPU)
    built = bench.PROVIDERS["torch bmm"].build(case, t)
    with FlopCounterMode(display=False) as counter:
        runner.results(built, t.input, case.backward)
    parts = bench.least(case, None) if case.backward else bench.least(case, None)[:1]
    assert counter.get_total_flops() == floor.total(parts).flops


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [case for case in CASES if not case.backward], ids=_title)
def test_flops_of_each_design_are_those_of_its_matmuls(case, dtype):
    case = dataclasses.replace(case, dtype=dtype)
    t = bench.make_tensors(case, CPU)
    for name, provider in bench.PROVIDERS.items():
        if provider.design in (None, "fused") or (provider.design == "formula" and not case.base):
            continue
        with FlopCounterMode(display=False) as counter:
            runner.results(provider.build(case, t), t.input, False)
        # Scaling, adding and products with a diagonal are arithmetic of the design and not of a matmul.
        matmuls = [part for part in bench.passes(case, provider.design, "cpu")[0] if "core A" in part.name]
        folds = [part for part in bench.passes(case, provider.design, "cpu")[0] if part.name == "B core"]
        assert counter.get_total_flops() == floor.total(matmuls + folds * (case.core == "dense")).flops, name


@pytest.mark.parametrize("core", SHAPES)
def test_kernels_launch_once(core):
    from peft_kernels.records import Factors
    from peft_kernels.triton_kernels.common import record_launches
    from peft_kernels.triton_kernels.reconstruct import reconstruct_fwd

    case = bench.Case(*SHAPES[core], core, base=True, backward=False)
    t = cases.converted(bench.make_tensors(case, CPU), torch.bfloat16)
    factors = Factors(t.down.detach(), t.up.detach(), None if t.core is None else t.core.detach()[:, None], 2.0)
    with record_launches(run=False) as launches:
        reconstruct_fwd(factors, t.base.flatten(0, -2), torch.bfloat16)
    assert len(launches) == len(bench.passes(case, "fused", "cuda")[0]) == 1


def test_designs_of_a_loop_and_of_a_batch_move_the_same_bytes():
    sizes = (36, 768, 768, 64, "diagonal", True, 2)
    loop, bmm, formula = (floor.total(costs.passes(design, *sizes)[0]) for design in ("loop", "bmm", "formula"))
    assert loop.flops == bmm.flops and loop.bytes == pytest.approx(bmm.bytes, rel=1e-5)  # shares are whole bytes
    assert formula.bytes > bmm.bytes
    with pytest.raises(ValueError, match="design"):
        costs.passes("unknown", *sizes)


# ---- verify, then time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=_title)
def test_right_providers_pass(case, dtype):
    case = dataclasses.replace(case, dtype=dtype)
    record = runner.measure(bench.BENCH, case, CPU, ON_CPU, rounds=1)
    expected = {"torch einsum", "torch bmm", "ours, torch"}
    expected |= set() if case.backward else {"matmul loop"}
    expected |= {"PEFT's merge formula"} if case.base and not case.backward else set()
    assert {row["provider"] for row in record["results"]} == expected
    assert all("forward only" in reason or "needs a base" in reason for reason in record["absent"].values())


def _bmm_with(change):
    def build(case, t):
        built = bench.PROVIDERS["torch bmm"].build(case, t)

        def forward(base):
            y = built.forward(base)
            if change == "no base":
                return y - base
            if change == "last of the stack missing":
                return torch.cat([y[:-1], base[-1:]])
            return y if change == "no gradient of the cores" else y * 1.01

        factors = dict(built.factors)
        if change == "no gradient of the cores":
            factors["d_core"] = t.down
        return runner.Built(forward, factors)

    return runner.Provider(build, None)


@pytest.mark.parametrize(
    "change", ["no base", "last of the stack missing", "one percent", "no gradient of the cores"]
)  # the last asks for a gradient that is not the cores'
def test_wrong_provider_is_refused(change):
    case = bench.Case(3, 24, 6, 6, "dense", base=True)
    assert reason(bench.BENCH, _bmm_with(change), case).startswith("wrong: ")
