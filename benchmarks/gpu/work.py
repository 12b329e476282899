"""The work of `python -m peft_kernels.benchmarks.gpu`, each kind in processes of their own that take no other down.

    python -m peft_kernels.benchmarks.gpu.work numerics|check|kernels|once|measure|search|variants
        [--op NAME …] [--with triton cuda torch peers compiled | PROVIDER …] [--dtype NAME …]
        [--sizes small edges loops prepared peers usual] [--most N] [--from N] [--small] [--device cpu]

Every record is printed as it is found. What is wrong is a record, not an error; an error ends the process, and the run
that started it goes on behind the case that was last begun.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from peft_kernels.cuda_kernels import common, gated_query
from peft_kernels.triton_kernels import config

from .. import cases, runner
from ..__main__ import BENCHES
from ..kept import afresh
from . import search as tiles
from . import variants as choices
from .launches import counted
from .process import line_of

# One small shape of each operation, as the bench's --shapes takes it: seconds in an interpreter.
SMALL = {
    "lowrank_linear": (24, 16, 40, 4),
    "lowrank_projections": (24, 16, 40, 3, 4, 24),
    "reconstruct": (3, 24, 40, 5),
    "batched_lowrank_linear": (4, 6, 24, 40, 3, 4),
    "weight_distance": (3, 24, 5, 3),
    "gated_query": (3, 7, 24),
}
# One row or little more, and sizes and ranks that no tile divides.
EDGES = {
    "lowrank_linear": (1, 760, 63, 3),
    "lowrank_projections": (1, 760, 63, 3, 3, 65),
    "reconstruct": (2, 63, 760, 3),
    "batched_lowrank_linear": (1, 1, 63, 760, 1, 3),
    "weight_distance": (1, 63, 3, 2),
    "gated_query": (1, 2, 63),
}
# One where every loop of every kernel goes round more than once, if all rows are one strip: what a loop carries from
# one round to the next is where it may race. Rows for two tiles of 64, columns for two of 256, ranks above 32; gated
# queries walk through 16 rows and 1024 columns at a time.
LOOPS = {
    "lowrank_linear": (130, 264, 264, 40),
    "lowrank_projections": (130, 264, 264, 2, 40, 130),
    "reconstruct": (2, 130, 264, 40),
    "batched_lowrank_linear": (4, 130, 264, 264, 2, 40),
    "weight_distance": (2, 264, 40, 40),
    "gated_query": (3, 40, 1032),
}
DTYPES = ("float32", "bfloat16", "float16")
PEERS, COMPILED = "peers", "compiled"
PROFILED = 5  # calls whose kernels the profiler adds up
MOST_KERNELS = 16


@dataclass
class Work:
    """What to do it on."""

    device: torch.device
    ops: Sequence[str]
    providers: Sequence[str]
    dtypes: Sequence[str]
    sizes: Sequence[str]
    most: int | None = None
    first: int = 0
    small: bool = False
    add: Callable[[dict], None] = lambda record: print(line_of(record), flush=True)  # what becomes of a record

    def each(self, select: Callable[[list], list] = list) -> Iterator[tuple[runner.Bench, cases.Case]]:
        """Every case from the first that is wanted on, each announced before it is begun."""
        benches = [bench for op in self.ops for bench in BENCHES if bench.op == op]
        todo = [(bench, case) for bench in benches for case in select(self.cases(bench))]
        for index, (bench, case) in enumerate(todo):
            if index >= self.first:
                self.add({"begun": index, "of": len(todo)})
                yield bench, case

    def cases(self, bench: runner.Bench) -> list[cases.Case]:
        """Each once: some operations have one dtype, whatever is asked for."""
        found = {}
        for size in self.sizes:
            for dtype in self.dtypes:
                if size == "usual":
                    some = bench.cases(False, [dtype])
                else:
                    some = [case for shape in SHAPES[size].get(bench.op, ()) for case in bench.shaped(shape, dtype)]
                found |= dict.fromkeys(some[: self.most])
        return list(found)

    def wanted(self, bench: runner.Bench) -> list[str]:
        """The providers, by backend, by kind or by name; compiled ones last."""
        found = []
        for name, each in bench.providers.items():
            kind = each.backend or (COMPILED if each.compiled else PEERS)
            if name in self.providers or (kind in self.providers and (each.backend or "cuda" in each.devices)):
                found.append(name)
        return sorted(found, key=lambda name: bench.providers[name].compiled)


SHAPES = {
    "small": {op: (shape,) for op, shape in SMALL.items()},
    "edges": {op: (shape,) for op, shape in EDGES.items()},
    "loops": {op: (shape,) for op, shape in LOOPS.items()},
    "prepared": choices.SHAPES,
    "peers": {"lowrank_linear": ((9232, 768, 768), (8192, 4096, 4096)), "gated_query": ((8, 40, 768),)},
}


def dropout_first(found: list[cases.Case]) -> list[cases.Case]:
    """In the order of their shapes; of one shape with dropout, which costs the kernels more, before without."""
    plain = [replace(case, dropout=0.0) if hasattr(case, "dropout") else case for case in found]
    order = {case: index for index, case in enumerate(dict.fromkeys(plain))}
    ranks = {case: (order[like], -getattr(case, "dropout", 0)) for case, like in zip(found, plain)}
    return sorted(found, key=ranks.get)


# ---- right or wrong -------------------------------------------------------------------------------------------------

Look = Callable[[runner.Bench, str, runner.Problem], dict[str, Any]]


def every_provider(work: Work, look: Look, proof: bool = False) -> None:
    """A record for each provider in each case: what `look` finds, or why it finds nothing.

    proof: in the smaller cases that are verified where all of a case takes too long
    """
    for bench, case in work.each():
        problem = runner.pose(bench, bench.proof(case) if proof else case, work.device)
        for name in work.wanted(bench):
            record = {"op": bench.op, "case": case.title, "dtype": case.dtype, "provider": name}
            record["backend"] = bench.providers[name].backend
            try:
                record |= look(bench, name, problem)
            except cases.WrongResult as error:
                record["wrong"] = str(error)
            except Exception as error:
                if (why := runner.absence(error)) is None:
                    raise
                record["absent"] = why
            work.add(record)


def built(bench: runner.Bench, name: str, problem: runner.Problem) -> runner.Built:
    return bench.providers[name].build(problem.case, problem.tensors)


def numerics(work: Work) -> None:
    """Every result's error against float64, beside plain torch's in the same dtype."""

    def look(bench: runner.Bench, name: str, problem: runner.Problem) -> dict[str, Any]:
        return _worst(runner.verify(bench, name, problem, built(bench, name, problem)), problem.case)

    every_provider(work, look, proof=True)


def _worst(found: dict[str, tuple[float, float]], case: cases.Case) -> dict[str, Any]:
    # A sum may have no error in one run of plain torch: a unit in the last place is no finding.
    eps = torch.finfo(case.torch_dtype).eps
    ratios = {result: own / (usual + eps / 4) for result, (own, usual) in found.items()}
    worst = max(ratios, key=ratios.get)
    own, usual = found[worst]
    return {"worst": worst, "error": own, "torch_error": usual, "ratio": ratios[worst]}


def check(work: Work) -> None:
    """Each kernel once, for a sanitizer that watches: nothing is compared, whose kernels it would watch as well."""

    def look(bench: runner.Bench, name: str, problem: runner.Problem) -> dict[str, Any]:
        with one_strip(), counted() as counts:
            given, backward = problem.tensors.input, problem.case.backward
            y = runner.results(built(bench, name, problem), given, backward)["y"]
            finite = bool(y.isfinite().all())  # waits for the device
        return {"finite": finite, "launches": dict(counts)}

    every_provider(work, look)


@contextmanager
def one_strip() -> Iterator[None]:
    """Every pass over rows is one strip, as if there were no processors: its loop goes over all rows."""
    with (
        afresh(),
        mock.patch.dict(config.PROCESSORS, dict.fromkeys(config.PROCESSORS, 0)),
        mock.patch.object(common, "PROCESSORS", 0),
        mock.patch.object(gated_query, "PROCESSORS", 0),
    ):
        yield


# ---- fast or slow ---------------------------------------------------------------------------------------------------


def kernels(work: Work) -> None:
    """Microseconds of each kernel, by torch's profiler. Not verified: `measure` does that, and takes its time."""

    def look(bench: runner.Bench, name: str, problem: runner.Problem) -> dict[str, Any]:
        rows = profiled(_step(built(bench, name, problem), problem), work.device)
        return {"kernels": rows[:MOST_KERNELS], "us": sum(row["us"] for row in rows)}

    every_provider(work, look)


def _step(ready: runner.Built, problem: runner.Problem) -> Callable[[], None]:
    def step() -> None:
        runner.results(ready, problem.tensors.input, problem.case.backward)

    return step


def profiled(step: Callable[[], None], device: torch.device) -> list[dict]:
    """Each kernel of one call, the longest first: how often, and microseconds of all of them."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    calls = PROFILED if on_gpu else 1
    for _ in range(2 if on_gpu else 0):  # compiles, and warms up
        step()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        for _ in range(calls):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    rows = []
    for event in profiler.key_averages():
        if event.device_type == kind:
            total = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            rows.append({"kernel": event.key, "calls": event.count / calls, "us": total / calls})
    return sorted(rows, key=lambda row: -row["us"])


def once(work: Work) -> None:
    """One call of the first case between marks, for a profiler around this process."""
    for bench, case in work.each(lambda found: found[:1]):
        problem = runner.pose(bench, case, work.device)
        step = _step(built(bench, work.wanted(bench)[0], problem), problem)
        step()
        torch.cuda.profiler.start()
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def measure(work: Work) -> None:
    """The benchmark's own records: verified, then timed; a case's is printed after every provider."""
    for bench, case in work.each():
        rounds = 1 if work.small else None
        record = runner.measure(bench, case, work.device, work.wanted(bench), rounds, save=work.add)
        if record.get("fault"):
            sys.exit(record["fault"])  # nothing runs on the device any more in this process
        if spoiled := [name for name in record["absent"] if name.endswith(runner.IN_GRAPH)]:
            sys.exit(f"not captured: {', '.join(spoiled)}")  # nothing is any more, and random numbers fail


def search(work: Work) -> None:
    """Tiles: see search.py."""
    for bench, case in work.each(tiles.cases_of):
        for record in tiles.search(bench, case, work.device, limit=1 if work.small else None):
            work.add(record)


def variants(work: Work) -> None:
    """Prepared choices against what is: see variants.py."""
    for bench, case in work.each(dropout_first):
        for record in choices.compare(bench, case, work.device, most=2 if work.small else None):
            work.add(record)


KINDS = {work.__name__: work for work in (numerics, check, kernels, once, measure, search, variants)}


def main(argv: Sequence[str] | None = None, add: Callable[[dict], None] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    several = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--op", choices=SMALL, default=list(SMALL), **several)
    parser.add_argument("--with", dest="providers", default=["torch", "triton", "cuda"], **several)
    parser.add_argument("--dtype", choices=DTYPES, default=list(DTYPES), **several)
    parser.add_argument("--sizes", choices=(*SHAPES, "usual"), default=["usual"], **several)
    parser.add_argument("--most", type=int, help="cases of each operation, size and dtype")
    parser.add_argument("--from", dest="first", type=int, default=0, help="number of the first case")
    parser.add_argument("--small", action="store_true", help="as little work as shows that it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(argv)
    options = {name: value for name, value in vars(given).items() if name not in ("kind", "device", "op", "dtype")}
    options |= {"add": add} if add else {}
    KINDS[given.kind](Work(torch.device(given.device), given.op, dtypes=given.dtype, **options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
