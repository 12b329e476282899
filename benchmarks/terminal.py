"""What a run shows: tables of rich on a terminal, the same in markdown where it is piped or rich is not installed."""

import sys
from typing import NamedTuple

from .markdown import figures, markdown, number, speed

SHOWN = ("floor ms", "GB/s", "TFLOP/s", "% of floor", "launches", "MB saved", "MB peak")  # of markdown.FIGURES
VERSUS = {  # each operation's peers by short names: the first that was measured is the one in a ratio
    "lowrank_linear": {"PEFT": "PEFT", "PEFT compiled": "PEFT compiled"},
    "lowrank_projections": {"PEFT": "PEFT", "one by one": "one by one, triton"},
    "reconstruct": {
        "einsum": "torch einsum",
        "bmm": "torch bmm",
        "loop": "matmul loop",
        "PEFT": "PEFT's merge formula",
    },
    "batched_lowrank_linear": {
        "loop": "loop of lowrank_linear",
        "PEFT": "PEFT, adapter_names",
        "merged weights": "merged weights",
    },
    "weight_distance": {
        "authors": "authors' formula",
        "W0 + B A shared": "W0 + B A shared",
        "autograd": "low-rank form, autograd",
        "lerp": "foreach lerp",
    },
    "gated_query": {"eager": "formula, eager", "compiled": "formula, compiled"},
}


class Table(NamedTuple):
    title: str
    headers: list[str]
    rows: list[list[str]]
    notes: list[str]

    def __str__(self) -> str:
        return "\n".join([self.title, markdown(self.headers, self.rows), *self.notes])


def case_table(case: dict) -> Table:
    """One case. Launches are the design's on a CPU, counted on a GPU; ratios to the first peer that was measured.

    ms: eager; on a GPU calls are issued back to back, and beside that stands the time in a CUDA graph
    """
    in_graph = any(row["graph_ms"] for row in case["results"])
    measured = [row["provider"] for row in case["results"] if not row["backend"]]
    known = {provider: peer for peer, provider in VERSUS[case["op"]].items() if provider in measured}
    provider = next(iter([*known, *measured]), None)
    ratio = [f"vs {known.get(provider, provider)}"] if provider else []
    rows = []
    for row in case["results"]:
        cells = [row["provider"], number(row["ms"], 3), number(row["spread_ms"], 3)]
        cells += [speed(case, row, provider)] if provider else []
        if in_graph:
            cells += [number(row["graph_ms"], 3), number(row["graph_spread_ms"], 3)]
            cells += [speed(case, row, provider, "graph_ms")] if provider else []
        rows.append([*cells, *figures(row, SHOWN)])
    headers = ["provider", "ms", "±", *ratio, *(["graph ms", "±", *ratio] if in_graph else []), *SHOWN]
    notes = [f"{name}: {reason}" for name, reason in case["absent"].items()]
    return Table(f"{case['op']} {case['title']}", headers, rows, notes)


def show(table: Table) -> None:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table as Rich
        from rich.text import Text
    except ImportError:
        Console = None
    if Console is None or not sys.stdout.isatty():
        print(table, end="\n\n", flush=True)
        return
    made = Rich(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, head in enumerate(table.headers):
        made.add_column(head, justify="left" if index == 0 else "right")
    for row in table.rows:
        made.add_row(*map(Text, row))
    console = Console()
    console.print(made)
    for note in table.notes:
        console.print(Text(note, style="yellow"))
