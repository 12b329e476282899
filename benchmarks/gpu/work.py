"""The work of `python -m peft_kernels.benchmarks.gpu`, each kind in a process of its own that cannot take others down.

    python -m peft_kernels.benchmarks.gpu.work check|numerics|measure|search|once --save FILE.json
        [--op NAME …] [--dtype NAME …] [--backend NAME …] [--small] [--device cpu]

Every kind writes its records to the file as it goes: what is stopped leaves what it has found.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import cases, runner
from ..__main__ import BENCHES
from . import search as tiles

# One small shape of each operation, as the bench's --shapes takes it: seconds under a sanitizer or an interpreter.
SMALL = {
    "lowrank_linear": (24, 16, 40, 4),
    "reconstruct": (3, 24, 40, 5),
    "batched_lowrank_linear": (4, 6, 24, 40, 3, 4),
    "weight_distance": (3, 24, 5, 3),
    "gated_query": (3, 7, 24),
}
DTYPES = ("float32", "bfloat16", "float16")
MOST = 6  # cases of each operation and dtype in `numerics`


@dataclass
class Work:
    """What to do it on, and where the records go."""

    save: Path
    device: torch.device
    ops: Sequence[str]
    dtypes: Sequence[str]
    backends: Sequence[str]
    small: bool
    records: list[dict] = field(default_factory=list)

    def add(self, record: dict) -> None:
        self.records.append(record)
        self.save.write_text(json.dumps(self.records) + "\n", encoding="utf-8")
        print(json.dumps(record), flush=True)

    def benches(self) -> Iterator[runner.Bench]:
        yield from (bench for bench in BENCHES if bench.op in self.ops)

    def cases(self, bench: runner.Bench) -> list[cases.Case]:
        """Each once: some operations have one dtype, whatever is asked for."""
        found = {}
        for dtype in self.dtypes:
            usual = bench.shaped(SMALL[bench.op], dtype) if self.small else bench.cases(False, [dtype])
            found |= dict.fromkeys(usual)
        return list(found)

    def ours(self, bench: runner.Bench) -> list[str]:
        return [name for name, each in bench.providers.items() if each.backend in self.backends]


def numerics(work: Work) -> None:
    """Every result's error against float64, beside plain torch's in the same dtype."""
    for bench in work.benches():
        counted: dict[str, int] = {}
        for case in work.cases(bench):
            counted[case.dtype] = counted.get(case.dtype, 0) + 1
            if counted[case.dtype] <= MOST:
                _verify(work, bench, case)


def check(work: Work) -> None:
    """The same on every small case, for a sanitizer that watches."""
    for bench in work.benches():
        for case in work.cases(bench):
            _verify(work, bench, case)


def _verify(work: Work, bench: runner.Bench, case: cases.Case) -> None:
    problem = runner.pose(bench, bench.proof(case), work.device)
    for name in work.ours(bench):
        provider = bench.providers[name]
        record: dict[str, Any] = {"op": bench.op, "case": case.title, "dtype": case.dtype, "provider": name}
        record["backend"] = provider.backend
        try:
            built = provider.build(problem.case, problem.tensors)
            found = runner.verify(bench, name, problem, built)
        except cases.WrongResult as error:
            record["wrong"] = str(error)
        except Exception as error:
            if (why := runner.absence(error)) is None:
                raise
            record["absent"] = why
        else:
            # A sum may have no error in one run of plain torch: a unit in the last place is no finding.
            eps = torch.finfo(case.torch_dtype).eps
            ratios = {result: own / (usual + eps / 4) for result, (own, usual) in found.items()}
            worst = max(ratios, key=ratios.get)
            own, usual = found[worst]
            record |= {"worst": worst, "error": own, "torch_error": usual, "ratio": ratios[worst]}
        work.add(record)


def measure(work: Work) -> None:
    """The benchmark's own records, one for each case."""
    for bench in work.benches():
        providers = runner.providers_on(bench, work.device.type)
        if work.small:  # what takes seconds to compile tells nothing about shapes of nothing
            providers = [name for name in providers if "compiled" not in name]
        for case in work.cases(bench)[: 1 if work.small else None]:
            work.add(runner.measure(bench, case, work.device, providers, 2 if work.small else None))


def search(work: Work) -> None:
    """Tiles: see search.py."""
    for bench in work.benches():
        for case in tiles.cases_of(work.cases(bench))[: 1 if work.small else None]:
            for record in tiles.search(bench, case, work.device, limit=1 if work.small else None):
                work.add(record)


def once(work: Work) -> None:
    """Each kernel of the first case, by torch's profiler, and once between marks for a profiler around this process."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = work.device.type == "cuda"
    for bench in work.benches():
        case, (name, *_) = work.cases(bench)[0], work.ours(bench)
        problem = runner.pose(bench, case, work.device)
        built = runner.build(bench, name, problem)
        if isinstance(built, str):
            work.add({"op": bench.op, "case": case.title, "provider": name, "absent": built})
            continue
        step = _step(built, problem, on_gpu)
        step()
        if on_gpu:
            torch.cuda.profiler.start()
            step()
            torch.cuda.profiler.stop()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
            step()
        kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
        rows = [
            {"kernel": event.key, "calls": event.count, "us": _microseconds(event, on_gpu)}
            for event in profiler.key_averages()
            if event.device_type == kind
        ]
        rows.sort(key=lambda row: -row["us"])
        work.add({"op": bench.op, "case": case.title, "provider": name, "kernels": rows[:12]})


def _step(built: runner.Built, problem: runner.Problem, on_gpu: bool) -> Callable[[], None]:
    def step() -> None:
        runner.results(built, problem.tensors.input, problem.case.backward)
        if on_gpu:
            torch.cuda.synchronize()

    return step


def _microseconds(event: Any, on_gpu: bool) -> float:
    return event.self_device_time_total if on_gpu else event.self_cpu_time_total


KINDS = {work.__name__: work for work in (check, numerics, measure, search, once)}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--save", type=Path, required=True)
    parser.add_argument("--op", nargs="+", choices=SMALL, default=list(SMALL), metavar="NAME")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="NAME")
    parser.add_argument("--backend", nargs="+", default=["torch", "triton", "cuda"], metavar="NAME")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(argv)
    work = Work(given.save, torch.device(given.device), given.op, given.dtype, given.backend, given.small)
    KINDS[given.kind](work)
    return int(any("wrong" in record for record in work.records))


if __name__ == "__main__":
    sys.exit(main())
