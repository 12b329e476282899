"""`python -m peft_kernels verify`: does every operation compute here what it should, on every backend that runs here?

Every result and gradient against float64, at three shapes and in every dtype: what a bug report and a first GPU need.
The table has the largest error of each operation, backend and dtype, relative to the largest value of its result.
Exit status: 1 if something was wrong or nothing was compared where something should have been. On a CPU that is torch
alone; with TRITON_INTERPRET=1 Triton's kernels are interpreted there, too, at two of the shapes, which takes longer.
"""

import argparse
import os
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from peft_kernels import environment

from .gpu.process import OPS, Run, cut
from .gpu.truth import told_by_numerics
from .gpu.work import DTYPES
from .markdown import NOTHING, markdown

SIZES = ("small", "edges", "loops")
SECONDS = 300  # far beyond what it takes: a kernel that hangs must not


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; `argv` has no options but --help."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_kernels verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    states = environment.report()["backends"]
    backends = [name for name, state in states.items() if state == environment.WORKS]
    records, ends = compared(backends)
    ok, told = told_by_numerics(records, backends, ends)
    print(table(records))
    for name, state in states.items():
        if name not in backends:
            print(f"{name}: {state}")
    print(told)
    return 0 if ok else 1


def compared(backends: Sequence[str]) -> tuple[list[dict], str]:
    """The records of all operations, each with each backend in a process of its own; and words for those that broke."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), "verify", dry=False).lasting(SECONDS)
        calls = {}
        for op in OPS:
            for backend in backends:
                interpreted = device == "cpu" and backend != "torch"
                sizes = SIZES[:2] if interpreted else SIZES
                options = ("--device", device, "--op", op, "--with", backend, "--sizes", *sizes)
                calls[op, backend] = partial(run.work, "numerics", None, *options, OMP_NUM_THREADS="1")
        found = run.together(list(calls.values()), os.cpu_count())
    records = [record for _, some, _ in found for record in some]
    ends = [f"; {backend}, {op}{cut(status)}" for (op, backend), (status, _, _) in zip(calls, found) if status != 0]
    return records, "".join(ends)


def table(records: Sequence[dict]) -> str:
    worst: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for record in records:
        if "error" in record:
            of = worst[record["op"], record["backend"]]
            of[record["dtype"]] = max(record["error"], of.get(record["dtype"], 0.0))
    rows = [
        (op, backend, *(f"{of[dtype]:.1e}" if dtype in of else NOTHING for dtype in DTYPES))
        for (op, backend), of in worst.items()
    ]
    return markdown(("operation", "backend", *DTYPES), rows)
