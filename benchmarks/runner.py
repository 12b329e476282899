"""What every benchmark does: build each provider, verify it, time it, and make one record per case.

bench_<op>.py says what is particular to an operation, in one `Bench`, of which everything is here by name, too.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from . import cases, floor, timing
from .cases import Case
from .providers import (
    Absent,
    Bench,
    Built,
    Input,
    Problem,
    Provider,
    absence,
    build,
    first_line,
    pose,
    providers_on,
    results,
    verify,
)

__all__ = ["Absent", "Bench", "Built", "Input", "Problem", "Provider", "absence", "build", "measure", "pose"]
__all__ += ["parametrize", "providers_on", "results", "run_test", "verify"]


IN_GRAPH = ", in a CUDA graph"  # ends the name of a provider that cannot be captured


# ---- one case -------------------------------------------------------------------------------------------------------


def measure(
    bench: Bench,
    case: Case,
    device: torch.device,
    providers: Sequence[str],
    rounds: int | None = None,
    in_graph: bool = True,
    save: Callable[[dict], object] = lambda record: None,
) -> dict:
    """One case: every provider verified, then timed. A JSON-ready record, where "absent" says who was not and why.

    in_graph: on a GPU in a CUDA graph, too
    save: takes the record as far as it has come: on a GPU after every provider, on a CPU, where they take turns, once
    Where a provider faulted the GPU the record has "fault", which says so, and nothing runs there in this process.
    """
    problem = pose(bench, case, device)
    record = {"op": bench.op, **asdict(case), "title": case.title, "rates": None, "results": [], "absent": {}}
    if device.type == "cpu":
        _measure_on_cpu(bench, problem, record, providers, rounds)
        save(record)
    else:
        _OnGpu(bench, problem, record, device, in_graph).measure(providers, save)
    return record


def _measure_on_cpu(
    bench: Bench, problem: Problem, record: dict, providers: Sequence[str], rounds: int | None
) -> None:  # fmt: skip
    """All at once: in turns, so that each strikes the same machine."""
    case, device = problem.case, torch.device("cpu")
    built, values, peaks = {}, {}, {}
    for name in providers:
        found = build(bench, name, problem)
        (record["absent"] if isinstance(found, str) else built)[name] = found
    problem.references.clear()
    problem.proof = None
    given = problem.tensors.input
    steps = {name: lambda each=each: results(each, given, case.backward) for name, each in built.items()}
    for name, step in steps.items():
        y, peaks[name] = timing.peak_bytes(lambda step=step: step()["y"], device)
        values |= {name: y.item()} if y.dim() == 0 else {}
        del y
    for name, reason in cases.unlike(values).items():
        record["absent"][name] = f"wrong: {reason}"
        del built[name], steps[name]
    times = timing.time_on_cpu(steps | floor.cpu_probes(case.dtype), rounds, warmup=0)  # all have run
    rates = floor.cpu_record(times["copy"].median, times["matmul"].median, case.dtype)
    record["rates"] = asdict(rates)
    for name, each in built.items():
        row = _row(bench, case, name, device.type, times[name], None, rates)
        others = {other: times[other] for other in bench.peers if other in built}
        row["speed_vs"] = {other: timing.speed_against(times[name], theirs) for other, theirs in others.items()}
        row["peak_bytes"], row["saved_bytes"] = peaks[name], _saved(case, each, problem, given[0])
        record["results"].append(row)


class _OnGpu:
    """One provider after the other, so that whoever faults the device takes nothing with it that was measured."""

    def __init__(self, bench: Bench, problem: Problem, record: dict, device: torch.device, in_graph: bool):
        self.bench, self.problem, self.record, self.device, self.in_graph = bench, problem, record, device, in_graph
        self.rates = floor.gpu_record(torch.cuda.get_device_name(device), problem.case.dtype)
        copies, given = timing.copies_beyond_cache(compulsory_bytes(bench, problem), device), problem.tensors.input
        self.inputs = [given, *(_another(given) for _ in range(copies - 1))]
        self.values: dict[str, float] = {}  # where all compute one number
        record["rates"] = asdict(self.rates)

    def measure(self, providers: Sequence[str], save: Callable[[dict], object]) -> None:
        for index, name in enumerate(providers):
            try:
                found = self.row(name)
            except Exception as error:
                if timing.fault(self.device) is None:
                    raise
                found = first_line(error)
            if why := timing.fault(self.device):
                self.record["fault"] = found = f"{name} faulted the device: {why}"
                self.record["absent"] |= dict.fromkeys(providers[index + 1 :], f"not run: {found}")
            if isinstance(found, str):
                self.record["absent"][name] = found
            else:
                self.record["results"].append(found)
            save(self.record)
            if why:
                return

    def row(self, name: str) -> dict | str:
        """A provider's row, or why it has none."""
        bench, case, built = self.bench, self.problem.case, build(self.bench, name, self.problem)
        if isinstance(built, str):
            return built

        def step(index: int) -> dict[str, Tensor]:
            return results(built, self.inputs[index], case.backward)

        y, peak = timing.peak_bytes(lambda: step(0)["y"], self.device)
        if y.dim() == 0:
            self.values[name] = y.item()
            if reason := cases.unlike(self.values).get(name):
                del self.values[name]
                return f"wrong: {reason}"
        del y
        saved = _saved(case, built, self.problem, self.inputs[0][0])
        time, graph = timing.time_on_gpu(step, len(self.inputs)), None
        try:
            graph = timing.time_in_graph(step, len(self.inputs)) if self.in_graph else None
        except RuntimeError as error:
            self.record["absent"][name + IN_GRAPH] = first_line(error)
        launches = timing.count_launches(lambda: step(0))
        row = _row(bench, case, name, self.device.type, time, graph, self.rates)
        return row | {"launches": launches, "peak_bytes": peak, "saved_bytes": saved}


def _saved(case: Case, built: Built, problem: Problem, x: Tensor | None) -> int | None:
    """What the forward keeps for its backward; None where there is no backward, or a whole step."""
    return timing.saved_bytes(built.forward, x, problem.tensors) if case.backward and not built.found else None


def compulsory_bytes(bench: Bench, problem: Problem) -> int:
    """Bytes of the inputs that change from call to call; without any, bytes of all that is read and written."""
    case = problem.case
    given = tree_leaves(problem.tensors.input[: 2 if case.backward else 1])
    return sum(t.nbytes for t in given if t is not None) or floor.total(_chosen(case, bench.least(case, None))).bytes


def _row(
    bench: Bench,
    case: Case,
    name: str,
    device_type: str,
    time: timing.Times,
    graph: timing.Times | None,
    rates: floor.Device,
) -> dict:
    """What follows from a provider's time and from its formulas. Rates are of the compulsory work alone."""
    provider = bench.providers[name]
    work = _chosen(case, bench.passes(case, provider.design, device_type)) if provider.design else [None]
    work = None if None in work else [part for parts in work for part in parts]
    best = min(time.median, graph.median if graph else time.median)
    least = floor.total(_chosen(case, bench.least(case, provider.design)))
    seconds = least.seconds(rates, case.dtype)
    return {
        "provider": name,
        "backend": provider.backend,
        "design": provider.design,
        "verified": True,
        "ms": time.median * 1e3,
        "spread_ms": time.spread * 1e3,
        "graph_ms": graph and graph.median * 1e3,
        "graph_spread_ms": graph and graph.spread * 1e3,
        "floor_ms": seconds and seconds * 1e3,
        "percent_of_floor": seconds and 100 * seconds / best,
        "gb_per_s": least.bytes / best / 1e9,
        "percent_of_copy": 100 * least.bytes / best / rates.bytes_per_s,
        "tflop_per_s": least.flops / best / 1e12,
        "flops": work and floor.total(work).flops,
        "bytes": work and floor.total(work).bytes,
        "launches": work and len(work),
    }


def _chosen(case: Case, parts: Sequence) -> Sequence:
    """Of (forward, backward), what the case measures."""
    return parts if case.backward else parts[:1]


def _another(given: Input) -> Input:
    return tree_map(lambda t: None if t is None else torch.randn_like(t).requires_grad_(t.requires_grad), given)


# ---- pytest-benchmark, whose tests in bench_<op>.py call these -------------------------------------------------------


def parametrize(metafunc: Any, bench: Bench) -> None:
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    found = bench.cases(device_type == "cpu", ["float32" if device_type == "cpu" else "bfloat16"])
    names = ["-".join(map(str, asdict(case).values())) for case in found]
    metafunc.parametrize("case", found, ids=names)
    metafunc.parametrize("provider", providers_on(bench, device_type))


def run_test(benchmark: Any, bench: Bench, case: Case, provider: str) -> None:
    import pytest

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = pose(bench, case, device)
    built = build(bench, provider, problem)
    if isinstance(built, str):
        (pytest.fail if built.startswith("wrong") else pytest.skip)(built)

    def step() -> None:
        results(built, problem.tensors.input, case.backward)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{bench.op} {case.title}"
    benchmark(step)
