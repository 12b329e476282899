"""README's table of versions: how whole runs of the tests ended, each in a file that `make test RECORD=1` writes."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .markdown import markdown
from .results import RESULTS, provenance, save

TESTS = RESULTS / "tests"  # a folder of their own: they measure nothing
PARTS = {"tests": "", "static": "static checks: "}  # as pytest's --record names them, and as the table does
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
SAME = ("kind", "device", "versions", "commit", "sources")  # what the two parts of one run agree in


def record(part: str, counts: Mapping[str, int], folder: Path = TESTS) -> Path:
    """Writes how one part of a run ended, beside an earlier part of the same run. counts: by pytest's outcomes

    Another run's file with the same versions is replaced. Raises ValueError if the part has another name.
    """
    if part not in PARTS:
        raise ValueError(f"part: expected one of {', '.join(PARTS)}, got {part!r}")
    run = provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    del run["cases"]
    torch_version, triton_version, python_version = _versions(run)
    names = (run["kind"], f"torch-{torch_version}", f"triton-{triton_version}", f"python-{python_version}.json")
    path = folder / "-".join(names)
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    others = earlier["counts"] if all(earlier.get(key) == run[key] for key in SAME) else {}
    told = {outcome: counts[outcome] for outcome in OUTCOMES if counts.get(outcome)}
    folder.mkdir(parents=True, exist_ok=True)
    save({**run, "counts": {**others, part: told}}, path)
    return path


def load(folder: Path = TESTS) -> list[dict]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def table(recorded: Sequence[dict], devices: Sequence[dict]) -> str:
    """One row for each recorded run of the tests and each that was part of a GPU's measurements, newest torch first."""
    rows = [(*_versions(run), f"`make test`, {_place(run)}: {_parts(run['counts'])}") for run in recorded]
    for run in (run for device in devices for run in device["runs"] if run.get("tests")):
        whole = "the operations' tests" if run["tests"].get("complete") else "the operations' tests, not all"
        rows.append((*_versions(run), f"{whole}, {_place(run)}: {_outcomes(run['tests']['counts'])}"))
    newest = sorted(rows, key=lambda row: [int(part) for part in re.findall(r"\d+", row[0])], reverse=True)
    return markdown(("torch", "triton", "Python", "what ran"), newest)


def _versions(run: dict) -> list[str]:
    return [run["versions"].get(name, "none") for name in ("torch", "triton", "python")]


def _place(run: dict) -> str:
    device = run["device"] if run["kind"] == "gpu" else "on a CPU"
    return f"{device}, {run['date']}, commit {run['commit'] or 'unknown'}"


def _parts(counts: dict) -> str:
    told = {part: _outcomes(counts[part]) if part in counts else "not run" for part in PARTS}
    return "; ".join(f"{said}{told[part]}" for part, said in PARTS.items())


def _outcomes(counts: dict) -> str:
    return ", ".join(f"{counts[outcome]:,} {outcome}" for outcome in OUTCOMES if counts.get(outcome)) or "none ran"
