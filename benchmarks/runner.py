"""What every benchmark does: build each provider, verify it, time it, and make one record per case.

bench_<op>.py says what is particular to an operation, in one `Bench`.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels import BackendUnavailableError

from . import cases, floor, tables, timing
from .cases import Case, converted

Input = tuple[Tensor | None, Tensor]  # what the forward takes, and the gradient of its result


class Absent(Exception):
    """A provider does not run a case; the message says why."""


def absence(error: Exception) -> str | None:
    """Why a provider does not run a case, or None for an error that says nothing of the kind."""
    kinds = Absent, ImportError, BackendUnavailableError, torch._dynamo.exc.BackendCompilerFailed
    refused = isinstance(error, ValueError) and str(error).startswith("design:")  # does not take this shape
    return str(error).splitlines()[0] if refused or isinstance(error, kinds) else None


class Built(NamedTuple):
    """A provider ready to run: its forward, and by name of their gradients the factors that it takes some for."""

    forward: Callable[[Tensor | None], Tensor]
    factors: dict[str, Tensor]
    found: Callable[[], dict[str, Tensor]] | None = None  # of a whole step, gradients included: what else it wrote


@dataclass(frozen=True)
class Provider:
    build: Callable[[Any, Any], Built]  # of the case and its tensors; may raise Absent, ImportError
    design: str | None  # as in floor_<op>.DESIGNS; None where nobody models what is launched
    backend: str | None = None  # of ours
    devices: tuple[str, ...] = ("cpu", "cuda")  # where it is measured without being named


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
    shape: str  # the numbers of --shape
    shaped: Callable[[Sequence[int], str], list]  # the cases of one such shape in one dtype
    tensors: Callable[[Any, torch.device], Any]
    reference: Callable[..., tuple]  # (provider, problem, built, seed) -> key of `references`, builder of exact results
    least: Callable[[Any, str | None], tuple[floor.Work, ...]]  # forward, backward
    passes: Callable[[Any, str, str], tuple]  # (case, design, device) -> forward, backward; None where not modelled
    proof: Callable[[Any], Any] = lambda case: case  # the case to verify in its stead, where all of it takes too long
    accuracy: dict[str, float] = field(default_factory=dict)  # by name of a result, instead of plain torch's


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
    """{result: (its error, plain torch's)}. Raises cases.WrongResult unless y and every gradient are as good as that."""
    case = problem.case
    key, reference = bench.reference(bench.providers[name], problem, built, seed)
    if key not in problem.references:
        wide, own = (converted(problem.tensors, dtype) for dtype in (torch.float64, case.torch_dtype))
        exact = _all_results(reference(case, wide), wide.input, case.backward)
        usual = _all_results(reference(case, own), own.input, case.backward)
        problem.references[key] = exact, cases.errors(usual, exact)
    torch.manual_seed(seed)
    got = _all_results(built, problem.tensors.input, case.backward)
    exact, usual = problem.references[key]
    found = cases.check(name, got, exact, usual, bench.accuracy)
    return {result: (error, usual[result]) for result, error in found.items()}


def _all_results(built: Built, given: Input, backward: bool) -> dict[str, Tensor]:
    return results(built, given, backward) | (built.found() if built.found else {})


def pose(bench: Bench, case: Case, device: torch.device) -> Problem:
    small = bench.proof(case)
    proof = None if small == case else Problem(small, bench.tensors(small, device))
    return Problem(case, bench.tensors(case, device), proof=proof)


def build(bench: Bench, name: str, problem: Problem) -> Built | str:
    """A verified provider, or the reason why this case has none on this machine."""
    make, proof = bench.providers[name].build, problem.proof or problem
    try:
        built = make(proof.case, proof.tensors)
        verify(bench, name, proof, built)
        if built.found or problem.proof:  # its first step is still to come: what it then takes is measured
            built = make(problem.case, problem.tensors)
    except Exception as error:
        if (why := absence(error)) is None:
            raise
        return f"absent: {why}"
    return built


# ---- one case -------------------------------------------------------------------------------------------------------


def measure(
    bench: Bench, case: Case, device: torch.device, providers: Sequence[str], rounds: int | None = None
) -> dict:
    """One case: every provider verified, then timed. A JSON-ready record."""
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
    cases.check_alike(values)
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
        for name, step in steps.items():
            try:
                graphs[name] = timing.time_in_graph(step, copies)
            except RuntimeError as error:
                absent[f"{name}, in a CUDA graph"] = str(error).splitlines()[0]
        launches = {name: timing.count_launches(lambda step=step: step(0)) for name, step in steps.items()}
        rates = floor.gpu_record(torch.cuda.get_device_name(device), case.dtype)

    rows = []
    for name, each in built.items():
        design = bench.providers[name].design
        work = _chosen(case, bench.passes(case, design, device.type)) if design else [None]
        work = None if None in work else [part for parts in work for part in parts]
        time, graph = times[name], graphs.get(name)
        best = min(time.median, graph.median if graph else time.median)
        least = floor.total(_chosen(case, bench.least(case, design)))
        seconds = least.seconds(rates, case.dtype)
        rivals = [other for other in tables.LAYOUTS[bench.op].versus.values() if other in built]
        x, tensors = inputs[0][0], problem.tensors
        rows.append(
            {
                "provider": name,
                "backend": bench.providers[name].backend,
                "design": design,
                "verified": True,
                "ms": time.median * 1e3,
                "spread_ms": time.spread * 1e3,
                "graph_ms": graph and graph.median * 1e3,
                "speed_vs": {other: timing.speed_against(time, times[other]) for other in rivals},
                "floor_ms": seconds and seconds * 1e3,
                "percent_of_floor": seconds and 100 * seconds / best,
                "gb_per_s": least.bytes / best / 1e9,
                "percent_of_copy": 100 * least.bytes / best / rates.bytes_per_s,
                "flops": work and floor.total(work).flops,
                "bytes": work and floor.total(work).bytes,
                "launches": launches.get(name, work and len(work)),
                "peak_bytes": peaks[name],
                "saved_bytes": timing.saved_bytes(each.forward, x, tensors)
                if case.backward and not each.found
                else None,
            }
        )
    record = {"op": bench.op, **asdict(case), "title": case.title}
    return {**record, "rates": asdict(rates), "results": rows, "absent": absent}


def _chosen(case: Case, parts: Sequence) -> Sequence:
    """Of (forward, backward), what the case measures."""
    return parts if case.backward else parts[:1]


def _used(case: Case, given: Input) -> list[Tensor]:
    return [t for t in (given if case.backward else given[:1]) if t is not None]


def _another(given: Input) -> Input:
    return tuple(None if t is None else torch.randn_like(t).requires_grad_(t.requires_grad) for t in given)


# ---- the commands ---------------------------------------------------------------------------------------------------


def main(benches: Sequence[Bench], description: str, argv: Sequence[str] | None = None) -> None:
    """The cases of every bench, as tables, and with --save all of them in one file."""
    alone = benches[0] if len(benches) == 1 else None
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two cases of each dtype, few rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", help="bfloat16 on a GPU, float32 and bfloat16 on a CPU; or float16")
    if alone:
        parser.add_argument("--shape", nargs="+", type=_shape, metavar=alone.shape, help="instead of the usual ones")
        names = ", ".join(alone.providers)
        parser.add_argument("--providers", nargs="+", choices=alone.providers, metavar="NAME", help=names)
    parser.add_argument("--rounds", type=int, help="on a CPU: turns of every provider; usually what fits into seconds")
    parser.add_argument("--threads", type=int, help="on a CPU")
    parser.add_argument("--save", metavar="FILE.json")
    given = parser.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    dtypes = given.dtype or (["float32", "bfloat16"] if device.type == "cpu" else ["bfloat16"])
    rounds = given.rounds or (3 if given.quick else None)

    run = tables.provenance(device)
    print(tables.describe(run), end="\n\n")
    for bench in benches:
        providers = (alone and given.providers) or providers_on(bench, device.type)
        chosen = {}  # in order, each once: some operations have one dtype alone, whatever is asked for
        for dtype in dtypes:
            usual = bench.cases(device.type == "cpu", [dtype])[: 2 if given.quick else None]
            shapes = alone and given.shape
            chosen |= dict.fromkeys([c for shape in shapes for c in bench.shaped(shape, dtype)] if shapes else usual)
        for case in chosen:
            record = measure(bench, case, device, providers, rounds)
            print(tables.case_table(record), end="\n\n", flush=True)
            run["cases"].append(record)
    if given.save:
        tables.save(run, given.save)


def providers_on(bench: Bench, device_type: str) -> list[str]:
    return [name for name, each in bench.providers.items() if device_type in each.devices]


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(map(int, text.split(",")))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers like 24,16,40, got {text}")
    return sizes


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
        pytest.skip(built)

    def step() -> None:
        results(built, problem.tensors.input, case.backward)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{bench.op} {case.title}"
    benchmark(step)
