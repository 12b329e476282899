"""What all benchmarks share: the floor, and that nothing wrong is ever timed."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from benchmark_cases import TINY, reason

from peft_kernels import BackendUnavailableError
from peft_kernels.benchmarks import __main__ as every
from peft_kernels.benchmarks import bench_reconstruct, cases, floor, runner, terminal, timing

CPU = torch.device("cpu")
BENCH = bench_reconstruct.BENCH
STACK = bench_reconstruct.Case(*TINY["reconstruct"], base=True)

# ---- the floor ------------------------------------------------------------------------------------------------------


def test_floor_takes_the_slower_of_arithmetic_and_memory():
    device = floor.Device("toy", bytes_per_s=10.0, flops_per_s={"float32": 100.0}, source="")
    assert floor.Work(flops=1000, bytes=10).seconds(device, "float32") == 10
    assert floor.Work(flops=10, bytes=1000).seconds(device, "float32") == 100
    assert floor.Work(flops=10, bytes=1000).seconds(device, "bfloat16") is None


def test_rates_of_a_cpu_follow_from_its_probes():
    record = floor.cpu_record(copy_seconds=0.5, matmul_seconds=2.0, dtype="float32")
    assert record.bytes_per_s == 16 * floor.PROBE_COPY
    assert record.flops_per_s == {"float32": floor.PROBE_MATMUL**3}
    for name, known in (("NVIDIA H200", floor.H200), ("NVIDIA H100 80GB HBM3", floor.H100)):
        assert floor.gpu_record(name, "bfloat16") is known


def test_what_has_no_record_is_measured(monkeypatch):
    """Another H100 has another memory; and no record has float32."""
    monkeypatch.setattr(floor, "_probes", lambda *_: {"copy": 0.5, "matmul": 2.0})
    monkeypatch.setitem(sys.modules, "triton.testing", SimpleNamespace(do_bench=lambda probe, return_mode: 1e3 * probe))
    monkeypatch.setattr(floor, "_measured", floor._measured.__wrapped__)
    for name, dtype in (("NVIDIA H100 PCIe", "bfloat16"), ("NVIDIA H200", "float32")):
        record = floor.gpu_record(name, dtype)
        assert record.name == name and record.flops_per_s == {dtype: floor.GPU_PROBE_MATMUL**3}
        assert record.bytes_per_s == 16 * floor.GPU_PROBE_COPY


@pytest.mark.parametrize("bench", every.BENCHES, ids=lambda bench: bench.op)
def test_every_modelled_design_is_at_least_the_floor(bench):
    """But for merged weights: without a low-rank path, whose products they avoid."""
    for case in bench.shaped(TINY[bench.op], "float32"):
        for name, provider in bench.providers.items():
            if provider.design in (None, "merged"):
                continue
            for least, parts in zip(bench.least(case, provider.design), bench.passes(case, provider.design, "cpu")):
                if parts is not None:
                    assert floor.total(parts).flops >= least.flops, name
                    assert floor.total(parts).bytes >= least.bytes, name


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)

    def forward(x):
        hidden = torch.tanh(x @ weight)  # saved by tanh, and twice by the product
        return hidden * hidden

    assert timing.saved_bytes(forward, x, (weight,)) == 8 * 4 * 4


def test_peak_is_of_what_lives_at_once():
    def step():
        first = torch.ones(1000)
        second = first + 1
        del first
        return (second * 2).sum()  # 4000 bytes each of second and its double

    y, peak = timing.peak_bytes(step, CPU)
    assert y == 4000 and 8000 <= peak < 8200
    kept = []
    assert timing.peak_bytes(lambda: kept.append(torch.ones(500)) or kept[0].sum(), CPU)[1] >= 2000
    assert timing.peak_bytes(lambda: kept[0].sum(), CPU)[1] < 100  # only its first call took memory


def test_profiler_says_nothing_on_stderr(capfd):
    timing.peak_bytes(lambda: torch.ones(3), CPU)
    assert capfd.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):
        timing.peak_bytes(lambda: 1 / 0, CPU)
    print("seen", file=sys.stderr)
    assert "seen" in capfd.readouterr().err


# ---- verify, then time ----------------------------------------------------------------------------------------------


def _provider(build, foreign=False):
    return runner.Provider(build, None, foreign=foreign)


def _plus_one(case, t):
    return runner.Built(lambda base: base + 1, {})


def test_wrong_provider_is_told_and_not_timed(monkeypatch):
    timed, clock = [], timing.time_on_cpu

    def watched(steps, *args, **options):
        timed.append(set(steps))
        return clock(steps, *args, **options)

    monkeypatch.setattr(timing, "time_on_cpu", watched)
    case = dataclasses.replace(STACK, backward=False)
    assert reason(BENCH, _provider(_plus_one), case, "torch einsum").startswith("wrong: y is off")
    assert timed == [{"torch einsum", "copy", "matmul"}]
    with pytest.raises(cases.WrongResult, match=r"^new: y is off"):
        problem = runner.pose(BENCH, case, CPU)
        wrong = dataclasses.replace(BENCH, providers={"new": _provider(_plus_one)})
        runner.verify(wrong, "new", problem, _plus_one(case, problem.tensors))


def test_verifying_tells_the_errors_and_the_usual_ones():
    problem = runner.pose(BENCH, STACK, CPU)
    built = BENCH.providers["torch bmm"].build(STACK, problem.tensors)
    found = runner.verify(BENCH, "torch bmm", problem, built)
    assert found.keys() == {"y", "d_down", "d_up", "d_core"}
    assert all(0 <= error <= 2 * usual + 1e-6 and usual < 1e-5 for error, usual in found.values())


def test_a_result_that_is_missing_is_wrong():
    exact = {name: torch.ones(3, dtype=torch.float64) for name in ("y", "dx")}
    with pytest.raises(cases.WrongResult, match=r"^wrong: no dx"):
        cases.check("wrong", {"y": torch.ones(3)}, exact, {"y": 0.0, "dx": 0.0})


def test_an_accuracy_takes_the_place_of_the_usual_error():
    exact, y = {"y": torch.ones(3, dtype=torch.float64)}, {"y": torch.full((3,), 1 + 1e-5)}
    cases.check("right", y, exact, {"y": 0.0}, {"y": 2e-5})
    for usual, accuracy in (({"y": 1.0}, {"y": 5e-6}), ({"y": 0.0}, {"dx": 1.0})):
        with pytest.raises(cases.WrongResult, match=r"^wrong: y is off"):
            cases.check("wrong", y, exact, usual, accuracy)


def test_one_number_is_the_same_for_all():
    assert cases.unlike({"a": 2.0, "b": 2.0 + 1e-6, "c": 2.0 - 1e-6}) == cases.unlike({}) == {}
    for wrong in (2.0 + 3e-6, float("nan")):
        assert cases.unlike({"a": 2.0, "b": wrong, "c": 2.0}) == {"b": f"y is {wrong!r}, and 2.0 by a"}


def test_right_numbers_in_another_shape_are_wrong():
    y = {"y": torch.ones(2, 3, dtype=torch.float64)}
    cases.check("right", y, y, {"y": 0.0})
    with pytest.raises(cases.WrongResult, match=r"^wrong: y has shape \(3,\)"):
        cases.check("wrong", {"y": torch.ones(3)}, y, {"y": 0.0})


@pytest.mark.parametrize("place", [0, 2**18, -1])  # of the first, a middle and the last piece
def test_errors_are_found_wherever_they_are(place):
    exact = {"y": torch.linspace(-4, 2, 2**19 + 7, dtype=torch.float64)}
    for value, expected in ((exact["y"][place] + 1, 0.25), (float("nan"), float("nan"))):
        y = exact["y"].clone()
        y[place] = value
        assert cases.errors({"y": y}, exact) == {"y": pytest.approx(expected, nan_ok=True)}


@pytest.mark.parametrize("error", [ImportError, runner.Absent, BackendUnavailableError])
def test_absent_peer_is_named(error):
    def build(case, t):
        raise error("No module named 'peer'")

    bench = dataclasses.replace(BENCH, providers={**BENCH.providers, "peer": _provider(build)})
    record = runner.measure(bench, STACK, CPU, ["torch bmm", "peer"], rounds=1)
    assert "peer: absent: No module named 'peer'" in str(terminal.case_table(record))
    assert [row["speed_vs"] for row in record["results"]] == [{"torch bmm": 1.0}]


def test_any_other_error_is_absence_of_what_nobody_could_try_alone():
    def build(case, t):
        raise TypeError("a mistake\nin a call")

    with pytest.raises(TypeError, match="a mistake"):
        reason(BENCH, _provider(build), STACK)
    assert reason(BENCH, _provider(build, foreign=True), STACK, "torch bmm") == "absent: TypeError: a mistake"
    wrong = dataclasses.replace(STACK, backward=False)
    assert reason(BENCH, _provider(_plus_one, foreign=True), wrong).startswith("wrong: y is off")


def test_the_reference_is_computed_once_for_providers_that_share_it():
    calls = []

    def reference(*arguments):
        key, build = bench_reconstruct.reference(*arguments)
        return key, lambda case, t: calls.append(t.down.dtype) or build(case, t)

    bench = dataclasses.replace(BENCH, reference=reference)
    runner.measure(bench, STACK, CPU, ["torch einsum", "torch bmm", "ours, torch"], rounds=1)
    assert calls == [torch.float64, torch.float32, torch.float64]  # exact, usual, and of rounded inputs


def test_forward_runs_without_a_graph():
    seen = []
    built = runner.Built(lambda x: seen.append(torch.is_grad_enabled()) or x * 2, {})
    x = torch.ones(3, requires_grad=True)
    assert runner.results(built, (x, x.detach()), backward=False).keys() == {"y"}
    assert runner.results(built, (x, x.detach())).keys() == {"y", "dx"}
    assert seen == [False, True]
