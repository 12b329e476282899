"""What every benchmark does: build each provider, verify it, time it, and make one record per case.

bench_<op>.py says what is particular to an operation, in one `Bench`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels import BackendUnavailableError

from . import cases, floor, timing
from .cases import Case, converted

Input = tuple[Tensor | None, Tensor]  # what the forward takes, and the gradient of its result


class Absent(Exception):
    """A provider does not run a case; the message says why."""


def absence(error: Exception) -> str | None:
    """Why a provider does not run a case, or None for an error that says nothing of the kind."""
    uncompiled = torch._dynamo.exc.BackendCompilerFailed
    kinds = Absent, ImportError, BackendUnavailableError, torch.OutOfMemoryError, uncompiled
    refused = isinstance(error, ValueError) and str(error).startswith("design:")  # does not take this shape
    return _first_line(error) if refused or isinstance(error, kinds) else None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


class Built(NamedTuple):
    """A provider ready to run: its forward, and by name of their gradients the factors that it takes some for."""

    forward: Callable[[Tensor | None], Tensor]
    factors: dict[str, Tensor]
    found: Callable[[], dict[str, Tensor]] | None = None  # of a whole step, gradients included: what else it wrote


@dataclass(frozen=True)
class Provider:
    build: Callable[[Any, Any], Built]  # of the case and its tensors; may raise Absent, ImportError
    design: str | None  # as in the DESIGNS of floor/<op>.py; None where nobody models what is launched
    backend: str | None = None  # of ours
    devices: tuple[str, ...] = ("cpu", "cuda")  # where it is measured without being named
    foreign: bool = False  # never run by those who wrote its call: whatever it raises is told, and leaves it out


@dataclass
class Problem:
    """A case on a device. tensors: a NamedTuple with the property `input`."""

    case: Case
    tensors: Any
    references: dict = field(default_factory=dict)  # exact results and usual errors, kept for all providers
    proof: "Problem | None" = None  # a smaller one to verify in its stead


@dataclass(frozen=True)
class Bench:
    op: str
    providers: dict[str, Provider]
    cases: Callable[[bool, Sequence[str]], list]  # (on a CPU?, dtypes), those of --quick first
    shape: str  # the numbers of --shapes
    shaped: Callable[[Sequence[int], str], list]  # the cases of one such shape in one dtype
    tensors: Callable[[Any, torch.device], Any]
    reference: Callable[..., tuple]  # (provider, problem, built, seed) -> key of `references`, builder of exact results
    least: Callable[[Any, str | None], tuple[floor.Work, ...]]  # forward, backward
    passes: Callable[[Any, str, str], tuple]  # (case, design, device) -> forward, backward; None where not modelled
    proof: Callable[[Any], Any] = lambda case: case  # the case to verify in its stead, where all of it takes too long
    accuracy: dict[str, float] = field(default_factory=dict)  # by name of a result, instead of plain torch's
    presets: dict[str, Sequence[Sequence[int]]] = field(default_factory=dict)  # shapes that go by a model's name
    unsummed: str = "-"  # how the names of results begin that are no sums

    @property
    def peers(self) -> list[str]:
        """The providers that are not ours."""
        return [name for name, each in self.providers.items() if not each.backend]


# ---- one provider ---------------------------------------------------------------------------------------------------


def results(built: Built, given: Input, backward: bool = True) -> dict[str, Tensor]:
    """y; with backward also the gradient of the input, if it takes one, and of every factor. Of a whole step y."""
    x, dy = given
    if built.found:
        return {"y": built.forward(x)}
    if not backward:
        with torch.no_grad():
            return {"y": built.forward(x)}
    wanted = {"dx": x, **built.factors} if x is not None and x.requires_grad else built.factors
    y = built.forward(x)
    grads = torch.autograd.grad(y, tuple(wanted.values()), dy)
    return {"y": y.detach(), **dict(zip(wanted, grads))}


def verify(bench: Bench, name: str, problem: Problem, built: Built, seed: int = 1) -> dict[str, tuple[float, float]]:
    """{result: (its error, plain torch's)}. Raises WrongResult unless y and every gradient are as good as that.

    But for the order of sums, which is the machine's own. Roundings of float32 at random in every term of a sum of n
    change it as much as roundings of the inputs do, `moved`; those of its n partial sums, each as large as the terms
    before it leave it, up to sqrt(n) times as much.
    """
    case = problem.case
    key, reference = bench.reference(bench.providers[name], problem, built, seed)
    if key not in problem.references:
        wide, own = (converted(problem.tensors, dtype) for dtype in (torch.float64, case.torch_dtype))
        near = cases.rounded(wide)
        exact, usual, moved = (
            _all_results(reference(case, tensors), tensors.input, case.backward) for tensors in (wide, own, near)
        )
        usual, moved = cases.errors(usual, exact), cases.errors(moved, exact)
        deeper = cases.longest_sum(wide) ** 0.5
        order = {result: deeper * error for result, error in moved.items() if not result.startswith(bench.unsummed)}
        problem.references[key] = exact, usual, order
    torch.manual_seed(seed)
    got = _all_results(built, problem.tensors.input, case.backward)
    exact, usual, order = problem.references[key]
    found = cases.check(name, got, exact, usual, bench.accuracy, order)
    return {result: (error, usual[result]) for result, error in found.items()}


def _all_results(built: Built, given: Input, backward: bool) -> dict[str, Tensor]:
    return results(built, given, backward) | (built.found() if built.found else {})


def pose(bench: Bench, case: Case, device: torch.device) -> Problem:
    small = bench.proof(case)
    proof = None if small == case else Problem(small, bench.tensors(small, device))
    return Problem(case, bench.tensors(case, device), proof=proof)


def build(bench: Bench, name: str, problem: Problem) -> Built | str:
    """A verified provider, or why this case has none on this machine: "absent: …", or "wrong: …" and what is."""
    provider, proof = bench.providers[name], problem.proof or problem
    try:
        built = provider.build(proof.case, proof.tensors)
        verify(bench, name, proof, built)
        if built.found or problem.proof:  # its first step is still to come: what it then takes is measured
            built = provider.build(problem.case, problem.tensors)
    except cases.WrongResult as error:
        return f"wrong: {str(error).removeprefix(f'{name}: ')}"
    except Exception as error:
        why = absence(error)
        if why is None and not provider.foreign:
            raise
        return f"absent: {why or f'{type(error).__name__}: {_first_line(error)}'}"
    return built


# ---- one case -------------------------------------------------------------------------------------------------------


def measure(
    bench: Bench,
    case: Case,
    device: torch.device,
    providers: Sequence[str],
    rounds: int | None = None,
    in_graph: bool = True,
) -> dict:
    """One case: every provider verified, then timed. A JSON-ready record, where "absent" says who was not and why.

    in_graph: on a GPU in a CUDA graph, too
    """
    problem = pose(bench, case, device)
    built, absent = {}, {}
    for name in providers:
        found = build(bench, name, problem)
        (absent if isinstance(found, str) else built)[name] = found
    problem.references.clear()
    problem.proof = None
    inputs = [problem.tensors.input]
    steps = {name: lambda i, each=each: results(each, inputs[i], case.backward) for name, each in built.items()}
    values, peaks = {}, {}
    for name, step in steps.items():
        y, peaks[name] = timing.peak_bytes(lambda step=step: step(0)["y"], device)
        values |= {name: y.item()} if y.dim() == 0 else {}
        del y
    for name, reason in cases.unlike(values).items():
        absent[name] = f"wrong: {reason}"
        del built[name], steps[name]
    least = _chosen(case, bench.least(case, None))
    graphs, launches = {}, {}
    if device.type == "cpu":
        once = {name: lambda step=step: step(0) for name, step in steps.items()}
        times = timing.time_on_cpu(once | floor.cpu_probes(case.dtype), rounds, warmup=0)  # all have run
        rates = floor.cpu_record(times["copy"].median, times["matmul"].median, case.dtype)
    else:
        nbytes = sum(t.nbytes for t in _used(case, inputs[0])) or floor.total(least).bytes
        copies = timing.copies_beyond_cache(nbytes, device)
        inputs += [_another(inputs[0]) for _ in range(copies - 1)]
        times = {name: timing.time_on_gpu(step, copies) for name, step in steps.items()}
        for name, step in steps.items() if in_graph else ():
            try:
                graphs[name] = timing.time_in_graph(step, copies)
            except RuntimeError as error:
                absent[f"{name}, in a CUDA graph"] = _first_line(error)
        launches = {name: timing.count_launches(lambda step=step: step(0)) for name, step in steps.items()}
        rates = floor.gpu_record(torch.cuda.get_device_name(device), case.dtype)

    rows = []
    for name, each in built.items():
        row = _row(bench, case, name, device.type, times, graphs.get(name), rates)
        row["launches"] = launches.get(name, row["launches"])
        row["peak_bytes"] = peaks[name]
        saves = case.backward and not each.found
        row["saved_bytes"] = timing.saved_bytes(each.forward, inputs[0][0], problem.tensors) if saves else None
        rows.append(row)
    record = {"op": bench.op, **asdict(case), "title": case.title}
    return {**record, "rates": asdict(rates), "results": rows, "absent": absent}


def _row(
    bench: Bench,
    case: Case,
    name: str,
    device_type: str,
    times: dict[str, timing.Times],
    graph: timing.Times | None,
    rates: floor.Device,
) -> dict:
    """What follows from a provider's time and from its formulas. Rates are of the compulsory work alone."""
    provider, time = bench.providers[name], times[name]
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
        "speed_vs": {other: timing.speed_against(time, times[other]) for other in bench.peers if other in times},
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


def _used(case: Case, given: Input) -> list[Tensor]:
    return [t for t in (given if case.backward else given[:1]) if t is not None]


def _another(given: Input) -> Input:
    return tuple(None if t is None else torch.randn_like(t).requires_grad_(t.requires_grad) for t in given)


def providers_on(bench: Bench, device_type: str) -> list[str]:
    return [name for name, each in bench.providers.items() if device_type in each.devices]


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
