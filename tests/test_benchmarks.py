"""What all benchmarks share: the floor, clocks that are fair, and that nothing wrong is ever timed."""

import contextlib
import copy
import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from benchmark_cases import EAGER, TINY, reason

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
    for name, dtype in (("NVIDIA H100 PCIe", "bfloat16"), ("NVIDIA H200", "float32")):
        record = floor.gpu_record.__wrapped__(name, dtype)
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
    assert calls == [torch.float64, torch.float32]


def test_forward_runs_without_a_graph():
    seen = []
    built = runner.Built(lambda x: seen.append(torch.is_grad_enabled()) or x * 2, {})
    x = torch.ones(3, requires_grad=True)
    assert runner.results(built, (x, x.detach()), backward=False).keys() == {"y"}
    assert runner.results(built, (x, x.detach())).keys() == {"y", "dx"}
    assert seen == [False, True]


class _Gpu:
    type = "cuda"


@pytest.mark.parametrize("op", TINY)
def test_a_gpu_run_takes_turns_with_its_inputs(op, monkeypatch):
    """Everything of it but the clocks: on the CPU."""
    bench = next(bench for bench in every.BENCHES if bench.op == op)
    on_cpu = dataclasses.replace(bench, tensors=lambda case, device: bench.tensors(case, CPU))
    seen = []

    def clock(step, copies):
        seen.append([step(index)["y"] for index in range(copies)])
        return timing.Times.of([float(len(seen))])

    def graph_clock(step, copies):
        if len(seen) % 3 == 1:  # of every other provider
            raise RuntimeError("operation not permitted\nwhen a stream is capturing")
        return clock(step, copies)

    monkeypatch.setattr(timing, "fault", lambda device: None)
    monkeypatch.setattr(timing, "copies_beyond_cache", lambda nbytes, device: 3 if nbytes > 0 else 0)
    monkeypatch.setattr(timing, "time_on_gpu", clock)
    monkeypatch.setattr(timing, "time_in_graph", graph_clock)
    monkeypatch.setattr(timing, "count_launches", lambda step: step() and 7)
    monkeypatch.setattr(timing, "peak_bytes", lambda step, device: (step(), 11))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    wide = dataclasses.replace(floor.H200, flops_per_s=floor.H200.flops_per_s | {"float32": 1e12})  # of one dtype alone
    monkeypatch.setattr(floor, "RECORDS", (wide,))
    names = sorted(EAGER & bench.providers.keys())
    for case in bench.shaped(TINY[op], "bfloat16"):
        seen.clear()
        torch.manual_seed(1)  # the first set of inputs is drawn from seed 0
        record = runner.measure(on_cpu, case, _Gpu(), names)
        rows = record["results"]
        clocks = [1000.0 * (index + 1) for index in range(len(seen))]  # one provider's after the other's
        assert [ms for row in rows for ms in (row["ms"], row["graph_ms"]) if ms] == clocks
        assert record["rates"]["name"] == "NVIDIA H200" and all(row["launches"] == 7 for row in rows)
        assert {row["graph_ms"] is None for row in rows} <= {True, False} and all(
            row["peak_bytes"] == 11 for row in rows
        )
        assert "operation not permitted" in str(terminal.case_table(record))
        if bench is BENCH:
            alone = runner.measure(on_cpu, case, _Gpu(), names, in_graph=False)
            assert {row["graph_ms"] for row in alone["results"]} == {None} and not alone["absent"].keys() - names
        for ys in seen:
            assert len(ys) == 3
            # Else nothing takes turns but the gradients, or nothing at all.
            if case.base if op == "reconstruct" else op != "weight_distance" or case.kind == "imitation step":
                assert not torch.equal(ys[0], ys[1]) and not torch.equal(ys[1], ys[2])


def on_a_gpu(bench, monkeypatch, **clocks):
    """The bench, and what a run of it on a GPU asks for."""
    usual = {"copies_beyond_cache": lambda *_: 2, "count_launches": lambda step: 7, "fault": lambda device: None}
    usual |= {"time_on_gpu": lambda step, copies: timing.Times.of([1.0]), "peak_bytes": lambda step, _: (step(), 11)}
    usual |= {"time_in_graph": usual["time_on_gpu"]}
    for name, clock in {**usual, **clocks}.items():
        monkeypatch.setattr(timing, name, clock)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(floor, "gpu_record", lambda *_: dataclasses.replace(floor.H200, flops_per_s={"float32": 1e12}))
    return dataclasses.replace(bench, tensors=lambda case, device: bench.tensors(case, CPU))


def test_on_a_gpu_every_provider_is_saved(monkeypatch):
    bench, saved = on_a_gpu(BENCH, monkeypatch), []

    def build(case, t):
        raise RuntimeError("a mistake")

    broken = dataclasses.replace(bench, providers={**bench.providers, "broken": _provider(build)})
    names = ["torch einsum", "absent", "ours, torch", "broken"]
    broken.providers["absent"] = runner.Provider(_absent, None)
    with pytest.raises(RuntimeError, match="a mistake"):
        runner.measure(broken, STACK, _Gpu(), names, save=lambda record: saved.append(copy.deepcopy(record)))
    assert [[row["provider"] for row in each["results"]] for each in saved] == [
        ["torch einsum"],
        ["torch einsum"],
        ["torch einsum", "ours, torch"],
    ]
    assert saved[0]["absent"] == {} and saved[1]["absent"] == saved[2]["absent"] == {"absent": "absent: not here"}
    assert saved[0]["rates"]["name"] == "NVIDIA H200" and "fault" not in saved[2]


def _absent(case, t):
    raise runner.Absent("not here")


@pytest.mark.parametrize("where", ["build", "forward", "later", "foreign"])
def test_a_fault_takes_nothing_with_it(where, monkeypatch):
    """Wherever it shows, nothing else runs, and what was measured before stays."""
    state, ran, saved = [], [], []

    def fault(*_):
        state.append("CUDA error: an illegal memory access was encountered")
        if where != "later":
            raise torch.AcceleratorError(state[0] + "\nCompile with TORCH_USE_CUDA_DSA")

    def build(case, t):
        if where in ("build", "foreign"):
            fault()
        right = BENCH.providers["torch bmm"].build(case, t)
        return right._replace(forward=lambda base: right.forward(base) if where == "later" else fault())

    def clock(step, copies):
        ran.append(1)
        if len(ran) == 3:  # the second provider's: it shows when the device is waited for
            fault()
        return timing.Times.of([1.0])

    clocks = {"time_on_gpu": clock, "time_in_graph": clock} if where == "later" else {}
    bench = on_a_gpu(BENCH, monkeypatch, fault=lambda device: state[0] if state else None, **clocks)
    providers = {**bench.providers, "new": _provider(build, foreign=where == "foreign")}
    bench = dataclasses.replace(bench, providers=providers)
    record = runner.measure(bench, STACK, _Gpu(), ["torch einsum", "new", "ours, torch"], save=saved.append)
    assert [row["provider"] for row in record["results"]] == ["torch einsum"] and len(saved) == 2
    told = "new faulted the device: CUDA error: an illegal memory access was encountered"
    assert record["fault"] == told and record["absent"] == {"new": told, "ours, torch": f"not run: {told}"}
    assert told in str(terminal.case_table(record))


class Clocked:
    """A GPU's events and the host's clock: a step takes the host `host` and then the device `device` seconds.

    The host waits for nothing but `synchronize`; the device begins what was issued, in order.
    """

    def __init__(self, monkeypatch, host, device):
        self.now = self.free = 0.0
        self.host, self.device, self.calls = host, device, []
        outer = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(outer.now, outer.free)

            def synchronize(self):
                outer.now = max(outer.now, self.at)

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(
            torch.cuda, "synchronize", lambda device=None: setattr(self, "now", max(self.now, self.free))
        )

    def step(self, index):
        self.calls.append(index)
        self.now += self.host
        self.free = max(self.now, self.free) + self.device


@pytest.mark.parametrize(("host", "device"), [(1e-4, 1e-5), (1e-5, 1e-4), (1e-4, 1e-4), (1e-4, 0.2)])
def test_eager_time_is_of_the_slower_of_host_and_device(host, device, monkeypatch):
    clocked = Clocked(monkeypatch, host, device)
    times = timing.time_on_gpu(clocked.step, copies=3)
    slower, faster = max(host, device), min(host, device)
    assert slower <= times.median <= slower + faster / min(timing.CALLS, 3 if device > 0.1 else 99) * 1.001
    assert times.spread < 1e-9 and len(times.samples) >= timing.FEWEST_SAMPLES
    assert clocked.calls == [index % 3 for index in range(len(clocked.calls))]  # every set in its turn
    assert device < 0.1 or len(clocked.calls) < 25  # whole steps


class Graph:
    """A capture counts calls; a replay takes the device the time of what was captured, and the host nearly none."""

    def __init__(self, clocked):
        self.clocked, self.captured = clocked, 0

    def __enter__(self):
        self.before = len(self.clocked.calls)

    def __exit__(self, *_):
        self.captured = len(self.clocked.calls) - self.before

    def replay(self):
        self.clocked.now += 1e-6
        self.clocked.free = max(self.clocked.now, self.clocked.free) + self.captured * self.clocked.device


def test_graphed_time_is_the_device_s_alone(monkeypatch):
    clocked = Clocked(monkeypatch, host=1e-4, device=1e-5)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(clocked))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    times = timing.time_in_graph(clocked.step, copies=4)
    assert times.median == pytest.approx(1e-5, rel=0.01) and len(times.samples) == timing.SAMPLES
    assert clocked.calls == [0, 1, 2, 3] * 2  # once to warm up, once captured


def test_turns_alternate():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = timing.time_on_cpu(steps, rounds=4, warmup=0)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 12, 3)]
    assert [sorted(each) for each in rounds] == [["a", "b", "c"]] * 4
    assert [rounds[1], rounds[3]] == [rounds[0][::-1], rounds[2][::-1]]
    assert {len(each.samples) for each in times.values()} == {4}
    slow, fast = timing.Times.of([2.0, 40.0, 4.0]), timing.Times.of([1.0, 20.0, 1.0])
    assert timing.speed_against(fast, slow) == 2.0  # by rounds; 4.0 by medians


def test_rounds_follow_from_the_time_they_take(monkeypatch):
    now = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now) / 100)  # a step takes 10 ms
    counts = {}
    for seconds in (0.0, 0.5, 1e9):
        monkeypatch.setattr(timing, "SECONDS", seconds)
        counts[seconds] = len(timing.time_on_cpu({"a": lambda: None}, warmup=0)["a"].samples)
    assert counts[0.0] == timing.FEWEST_ROUNDS < counts[0.5] < counts[1e9] == timing.MOST_ROUNDS
