"""What the runs came to: a table, and a JSON of everything. Pictures are in plots.py."""

import json
import platform
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich import box
from rich.table import Table

from peft_kernels.adapters.checkpoint import write_atomically
from peft_kernels.demo.training import Result

Row = dict[str, Any]
UNSEARCHED = "* not in the search: the default learning rate"


def averaged(results: Sequence[Result]) -> list[Row]:
    """One row for each method and mode: means over seeds, and the standard deviation of the scores.

    kept: is it the first mode, that of what is stored?
    """
    rows = []
    for name in dict.fromkeys(result.method for result in results):
        own = [result for result in results if result.method == name]
        for index, mode in enumerate(own[0].scores):
            scores = {key: [r.scores[mode][key] for r in own] for key in own[0].scores[mode]}
            rows.append(
                {
                    "method": f"{name}, {mode}" if mode else name,
                    "kept": index == 0,
                    "seeds": len(own),
                    "scores": {key: mean(values) for key, values in scores.items()},
                    "spread": {key: stdev(values) if len(values) > 1 else None for key, values in scores.items()},
                    "trained": own[0].trained,
                    "stored_bytes": own[0].stored_bytes,
                    "step_ms": mean(r.step_ms for r in own),
                    "activation_bytes": own[0].activation_bytes,
                    "lr": own[0].lr,
                    "adapter_lr": own[0].adapter_lr,
                    "lr_from": own[0].lr_from,
                    "backend": own[0].backend,
                }
            )
    return rows


def heads(rows: Sequence[Row]) -> list[str]:
    return ["method", *rows[0]["scores"], "trained", "stored kB", "step ms", "saved MB", "lr", "backend"]


def cells(row: Row) -> list[str]:
    """Of one row, in the order of `heads`."""
    scores = [
        f"{value:.1f}" + (f" ± {row['spread'][key]:.1f}" if row["spread"][key] is not None else "")
        for key, value in row["scores"].items()
    ]
    if not row["trained"]:
        return [row["method"], *scores, *["–"] * 6]
    sizes = f"{row['stored_bytes'] / 1e3:,.0f}", f"{row['step_ms']:.0f}", f"{row['activation_bytes'] / 1e6:.1f}"
    rates = (row["lr"], row.get("adapter_lr"))  # the second is MoIL's adapters'
    lr = ", ".join(f"{rate:g}" for rate in rates if rate is not None) + "*" * (row["lr_from"] == "default")
    return [row["method"], *scores, f"{row['trained']:,}", *sizes, lr, row["backend"]]


def notes(rows: Sequence[Row]) -> str | None:
    return UNSEARCHED if any(row["lr_from"] == "default" for row in rows) else None


def table(rows: Sequence[Row], title: str) -> Table:
    """For the terminal: with one seed it fits into 80 columns, heads in two lines."""
    made = Table(title=title, caption=notes(rows), box=box.SIMPLE_HEAD, padding=0)
    for index, head in enumerate(heads(rows)):
        made.add_column(head.replace(" ", "\n"), justify="left" if index == 0 or head == "backend" else "right")
    for row in rows:
        made.add_row(*cells(row))
    return made


def markdown(rows: Sequence[Row], without: Collection[str] = ()) -> str:
    """For a document. without: heads of columns that are left out, as times are that other work on the machine moved"""
    kept = [index for index, head in enumerate(heads(rows)) if head not in without]
    rules = ["---"] + ["---:"] * (len(heads(rows)) - 2) + ["---"]
    lines = [[line[index] for index in kept] for line in (heads(rows), rules, *map(cells, rows))]
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return text + (f"\n{notes(rows)}\n".replace("*", r"\*") if notes(rows) else "")


def environment(device: str) -> dict[str, Any]:
    from peft_kernels import __version__

    is_cuda = torch.device(device).type == "cuda"
    return {
        "peft_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def write_json(
    path: Path,
    settings: Row,
    pretraining: dict[str, Result],
    sections: dict[str, Sequence[Result]],
    seconds: float,
    files: Sequence[str],
) -> None:
    """Everything: what was asked for, where it ran, and of each section the table's rows and every run.

    pretraining: by task;  seconds: of this call;  files: all that were written
    """
    content = {
        "settings": settings,
        "environment": environment(settings["device"]),
        "seconds": round(seconds, 1),
        "files": list(files),
        "pretraining": {task: asdict(result) for task, result in pretraining.items()},
        "sections": {
            name: {"table": averaged(results), "runs": [asdict(result) for result in results]}
            for name, results in sections.items()
        },
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda new: new.write_text(text, encoding="utf-8"))
