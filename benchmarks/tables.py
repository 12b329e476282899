"""The tables that README.md has between its markers, made from the result files.

    python -m peft_kernels.benchmarks.tables [--check]

README's tables say about a GPU only what a result file of a GPU says. --check changes nothing and exits 1 if README.md
differs from what the result files say.
"""

import argparse
import pkgutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from peft_kernels import ops

from .results import HERE, RESULTS, describe, load

README = HERE.parent / "README.md"
NEVER = "not yet run on a GPU"

# What CI does with each backend of every operation.
BACKENDS = {
    "torch": ("against float64, gradcheck", "—"),
    "triton": ("interpreted, against float64", "sm_80, sm_90, sm_100"),
    "cuda": ("host emulation, against float64", "sm_80, sm_90a, sm_100"),
}


class Layout(NamedTuple):
    """The columns of one operation's tables: what tells its cases apart, its figures, and the peers in its ratios."""

    case: dict[str, Callable[[dict], object]]
    figures: tuple[str, ...]  # of FIGURES
    versus: dict[str, str]  # short name: provider; the first that was measured is the one on the terminal


TIMES = {"ms": "", "graph_ms": "graph "}  # what a result has: eager, and on a GPU in a CUDA graph; before a heading
FIGURES = {  # heading: what a result holds, its digits and unit
    "floor ms": ("floor_ms", 3, 1),
    "GB/s": ("gb_per_s", 1, 1),
    "TFLOP/s": ("tflop_per_s", 3, 1),
    "% of copy": ("percent_of_copy", 0, 1),
    "% of floor": ("percent_of_floor", 0, 1),
    "MB moved": ("bytes", 1, 1e6),
    "launches": ("launches", 0, 1),
    "MB saved": ("saved_bytes", 2, 1e6),
    "MB peak": ("peak_bytes", 1, 1e6),
}


def _pass(case: dict) -> str:
    return "fwd + bwd" if case.get("backward", True) else "fwd"


LAYOUTS = {
    "lowrank_linear": Layout(
        {
            "M × K → N": lambda case: f"{case['M']} × {case['K']} → {case['N']}",
            "rank": lambda case: case["R"],
            "dtype": lambda case: case["dtype"],
            "dropout": lambda case: f"{case['dropout']:g}",
            "pass": _pass,
        },
        (),
        {"PEFT": "PEFT", "PEFT compiled": "PEFT compiled"},
    ),
    "reconstruct": Layout(
        {
            "N × out × in": lambda case: f"{case['N']} × {case['rows']} × {case['columns']}",
            "rank": lambda case: case["R"],
            "core": lambda case: case["core"],
            "base": lambda case: "yes" if case["base"] else "no",
            "dtype": lambda case: case["dtype"],
            "pass": _pass,
        },
        ("GB/s", "% of copy"),
        {"einsum": "torch einsum", "bmm": "torch bmm", "loop": "matmul loop", "PEFT": "PEFT's merge formula"},
    ),
    "batched_lowrank_linear": Layout(
        {
            "rows × K → N": lambda case: f"{case['entries']}·{case['tokens']} × {case['K']} → {case['N']}",
            "rank": lambda case: case["R"],
            "adapters": lambda case: case["L"],
            "one per": lambda case: case["adapter_of"],
            "dtype": lambda case: case["dtype"],
            "pass": _pass,
        },
        (),
        {"loop": "loop of lowrank_linear", "PEFT": "PEFT, adapter_names", "merged weights": "merged weights"},
    ),
    "weight_distance": Layout(
        {
            "weights": lambda case: f"{3 * case['layers']} × {case['width']}²",
            "ranks": lambda case: f"{case['R']} + {case['depth']}" if case["depth"] else case["R"],
            "of": lambda case: case["kind"],
        },
        ("GB/s", "launches", "MB moved", "MB peak"),
        {
            "authors": "authors' formula",
            "W0 + B A shared": "W0 + B A shared",
            "autograd": "low-rank form, autograd",
            "lerp": "foreach lerp",
        },
    ),
    "gated_query": Layout(
        {
            "B × S × d": lambda case: f"{case['B']} × {case['S']} × {case['D']}",
            "mode": lambda case: case["mode"],
            "dtype": lambda case: case["dtype"],
            "pass": _pass,
        },
        ("GB/s", "% of copy"),
        {"eager": "formula, eager", "compiled": "formula, compiled"},
    ),
}


def operations() -> list[str]:
    """The name of every operation."""
    return sorted(module.name for module in pkgutil.iter_modules(ops.__path__) if not module.name.startswith("_"))


# ---- cells of a table -----------------------------------------------------------------------------------------------


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An aligned table: the first column to the left, figures to the right."""
    rows = [list(headers), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    numeric = [all(cell[:1].isdigit() or cell in ("–", "") for cell in column[1:]) for column in zip(*rows)]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(cells, widths, numeric)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numeric)]
    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])


def number(value: float | None, digits: int, unit: float = 1) -> str:
    return "–" if value is None else f"{value / unit:.{digits}f}"


def figures(row: dict, headings: Iterable[str]) -> list[str]:
    return [number(row.get(key), digits, unit) for key, digits, unit in map(FIGURES.get, headings)]


def speed(case: dict, row: dict, provider: str, time: str = "ms") -> str:
    """How many times as fast as a provider: by the rounds of a CPU's run, by medians where there are none."""
    ratio = row.get("speed_vs", {}).get(provider) if time == "ms" else None
    other = next((each[time] for each in case["results"] if each["provider"] == provider), None)
    if ratio is None and other and row[time]:
        ratio = other / row[time]
    return "–" if ratio is None else f"{ratio:.2f}×"


# ---- in README.md ---------------------------------------------------------------------------------------------------


def status_table(runs: Sequence[dict]) -> str:
    rows = []
    for op in operations():
        for backend, (in_ci, compiled) in BACKENDS.items():
            rows.append((f"`{op}`", backend, in_ci, compiled, _run_on_gpu(op, backend, runs)))
    return markdown(("operation", "backend", "in CI", "compiled ahead of time", "run on a GPU"), rows)


def _run_on_gpu(op: str, backend: str, runs: Sequence[dict]) -> str:
    """The devices that gave results which agree with float64, timed or not."""

    def verified(run: dict) -> bool:
        rows = [row for case in run["cases"] if case["op"] == op for row in case["results"] if row["verified"]]
        rows += [record for record in run.get("numerics", ()) if record["op"] == op and "ratio" in record]
        return run["kind"] == "gpu" and any(row["backend"] == backend for row in rows)

    return "; ".join(dict.fromkeys(f"{run['device']}, {run['date']}" for run in runs if verified(run))) or NEVER


def speed_table(runs: Sequence[dict]) -> str:
    """Per device a table for every operation; without a GPU's results only that there are none."""
    parts = [] if any(run["kind"] == "gpu" for run in runs) else [f"GPU: {NEVER}."]
    for run in (run for run in runs if run["cases"] or run.get("steps")):
        how = "; eager, calls issued back to back, and in a CUDA graph" if run["kind"] == "gpu" else ""
        parts.append(f"{describe(run)}{how}.")
        measured = {case["op"] for case in run["cases"]}
        parts += [_op_table(op, run["cases"]) for op in LAYOUTS if op in measured]
        if run.get("steps"):
            from .steps_table import steps_table  # which knows the models

            parts.append(_folded("a training step", steps_table(run)))
    return "\n\n".join(parts)


def _op_table(op: str, cases: Sequence[dict]) -> str:
    """Folded, one line for every case and backend of ours; a column that is empty throughout is left out."""
    layout = LAYOUTS[op]
    headers = [*layout.case, "ours", *(f"{how}ms" for how in TIMES.values()), *layout.figures]
    headers += [f"{how}vs {peer}" for how in TIMES.values() for peer in layout.versus]
    rows = []
    for case in (case for case in cases if case["op"] == op):
        for row in (row for row in case["results"] if row["backend"]):
            cells = [str(cell(case)) for cell in layout.case.values()]
            cells += [row["provider"].removeprefix("ours, "), *(number(row[time], 3) for time in TIMES)]
            ratios = [speed(case, row, provider, time) for time in TIMES for provider in layout.versus.values()]
            rows.append([*cells, *figures(row, layout.figures), *ratios])
    kept = [index for index, column in enumerate(zip(*rows)) if set(column) != {"–"}]
    table = markdown([headers[index] for index in kept], [[row[index] for index in kept] for row in rows])
    return _folded(f"<code>{op}</code>", table)


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"


def updated(text: str, runs: Sequence[dict]) -> str:
    """README's text with its tables made anew. Raises ValueError if a pair of markers is missing."""
    for name, table in (("status", status_table(runs)), ("speed", speed_table(runs))):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"README: expected {begin} and, after it, {end}, each once")
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m peft_kernels.benchmarks.tables", description="README's tables.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if README.md differs")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    text = arguments.readme.read_text()
    new = updated(text, load(arguments.results))
    if new == text:
        return 0
    if arguments.check:
        print(f"{arguments.readme.name} differs from the result files: run `python -m peft_kernels.benchmarks.tables`")
        return 1
    arguments.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
