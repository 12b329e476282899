"""How benchmarks time: a GPU's run with its inputs and faults, and clocks that are fair."""

import contextlib
import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from benchmark_cases import EAGER, TINY

from peft_kernels.benchmarks import __main__ as every
from peft_kernels.benchmarks import bench_reconstruct, floor, runner, terminal, timing

CPU = torch.device("cpu")
BENCH = bench_reconstruct.BENCH
STACK = bench_reconstruct.Case(*TINY["reconstruct"], base=True)


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

    broken = dataclasses.replace(bench, providers={**bench.providers, "broken": runner.Provider(build, None)})
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
    providers = {**bench.providers, "new": runner.Provider(build, None, foreign=where == "foreign")}
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
    more = timing.beyond(timing.Times.of([5.0, 9.0, 7.0]), timing.Times.of([1.0, 2.0, 6.0]))
    assert more.samples == [4.0, 7.0, 1.0] and more.median == 4.0  # 5.0 by medians


def test_rounds_follow_from_the_time_they_take(monkeypatch):
    now = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now) / 100)  # a step takes 10 ms
    counts = {}
    for seconds in (0.0, 0.5, 1e9):
        monkeypatch.setattr(timing, "SECONDS", seconds)
        counts[seconds] = len(timing.time_on_cpu({"a": lambda: None}, warmup=0)["a"].samples)
    assert counts[0.0] == timing.FEWEST_ROUNDS < counts[0.5] < counts[1e9] == timing.MOST_ROUNDS
