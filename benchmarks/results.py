"""Result files: where and with what a run was made, and what several of them say together."""

import hashlib
import json
import subprocess
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import torch

import peft_kernels
from peft_kernels import environment, triton_kernels
from peft_kernels.adapters.checkpoint import write_atomically
from peft_kernels.devices import architecture

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SECTIONS = ("cases", "numerics", "steps", "absent_steps", "profile", "counters", "search", "variants", "foreign")
SECTIONS += ("inference", "absent_inference", "machine", "tests", "sanitizer")  # what docs/measured.md is made of
NO_RESULTS = ("dry", "rehearsal")  # kinds of runs
MEASURED = ("title", "rates", "results", "absent", "fault")  # what a case's record has beyond the case itself
FOLDERS = {  # where sources lie, by their name in the hash: an installed package has them elsewhere
    "peft_kernels": Path(peft_kernels.__file__).parent,
    "triton_kernels": Path(triton_kernels.__file__).parent,
    "benchmarks": HERE,
    "csrc": HERE.parent / "csrc",
}
STATUS = ["status", "--porcelain", "--untracked-files=no", "--", ":/", f":!{RESULTS.name}"]
KINDS = (".py", ".cu", ".cuh", ".cpp", ".h")


# ---- one ------------------------------------------------------------------------------------------------------------


def provenance(device: torch.device) -> dict:
    """Where and with what a run is made; its `cases` are still to be added. Names no host and no path."""
    report = environment.report()
    on_gpu = device.type == "cuda"
    return {
        "schema": 1,
        "kind": "gpu" if on_gpu else "cpu",
        "device": torch.cuda.get_device_name(device) if on_gpu else report["machine"]["processor"],
        "driver": report["gpu"].get("driver") if on_gpu else None,
        "architecture": architecture(device.index) if on_gpu else None,
        "threads": None if on_gpu else torch.get_num_threads(),
        "versions": {name: version for name, version in report["versions"].items() if version},
        "commit": _commit(),
        "sources": sources(),  # says more than the commit: of a tree with changes, and where there is no .git
        "date": date.today().isoformat(),
        "cases": [],
    }


def _commit() -> str | None:
    """The checkout's commit, with "+" if tracked files other than results differ from it; None outside a checkout."""
    answers = []
    for command in (["rev-parse", "--short=12", "HEAD"], STATUS):
        try:
            done = subprocess.run(["git", "-C", HERE, *command], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        answers.append(done.stdout.strip())
    return answers[0] + ("+" if answers[1] else "")


def sources(folders: dict[str, Path] = FOLDERS) -> str:
    """12 digits of a hash of every file's name and text."""
    found = hashlib.sha256()
    for name, folder in folders.items():
        inner = [other for other in folders.values() if folder in other.parents]  # counted by their own names
        for path in sorted(path for path in folder.rglob("*") if path.suffix in KINDS):
            if not any(other in path.parents for other in inner):
                found.update(f"{name}/{path.relative_to(folder).as_posix()}\0".encode())
                found.update(path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def save(run: dict, path: str | Path) -> None:
    text = json.dumps(run, indent=1) + "\n"
    write_atomically(Path(path), lambda new: new.write_text(text, encoding="utf-8"))


def describe(run: dict) -> str:
    threads = f", threads: {run['threads']}" if run["threads"] else ""
    versions = ", ".join(
        f"{name} {run['versions'][name]}" for name in ("torch", "triton", "peft") if name in run["versions"]
    )
    return f"{run['device']}{threads}; {versions}; {run['date']}"


# ---- several --------------------------------------------------------------------------------------------------------


def load(folder: Path = RESULTS) -> list[dict]:
    """The latest results of every device, GPUs first.

    What a run has not is an earlier one's, and cases that were measured on the same sources are one run's.
    """
    runs, kept = [], []
    for path in sorted(folder.glob("*.json")):
        runs.append(json.loads(path.read_text(encoding="utf-8")))
        if runs[-1]["kind"] in NO_RESULTS:
            raise ValueError(f"{path.name} is of a {runs[-1]['kind']} run, which measures nothing")
    for run in sorted(runs, key=lambda run: run["date"])[::-1]:
        newer = [each for each in kept if (each["kind"], each["device"]) == (run["kind"], run["device"])]
        for other in newer:
            if run.get("sources") and run["sources"] == other.get("sources"):
                other["cases"] = joined([*run["cases"], *other["cases"]])
            run |= {key: [] for key in SECTIONS if other.get(key)}
        if not newer or any(run.get(key) for key in SECTIONS):
            kept.append(run)
    return sorted(kept, key=lambda run: (run["kind"] != "gpu", run["device"]))


def by_device(runs: Iterable[dict]) -> list[dict]:
    """What `load` has found as one record for each device, in which `runs` says where its sections come from."""
    found: dict[tuple[str, str], dict] = {}
    for run in runs:
        record = found.setdefault((run["kind"], run["device"]), {**run, "runs": []})
        record["runs"].append(run)
        record["ran"] = run.get("ran", {}) | record.get("ran", {})
        record |= {key: record.get(key) or run.get(key) or [] for key in SECTIONS}  # `load` leaves each to one
    return list(found.values())


def identity(case: dict) -> frozenset:
    """What tells a case from all others."""
    return frozenset((key, value) for key, value in case.items() if key not in MEASURED)


def join(cases: list[dict], case: dict) -> None:
    """Adds a case, or to the one that is there what others measured; who is in both has the new figures."""
    for old in cases:
        if identity(old) == identity(case):
            named = {*case["absent"], *(row["provider"] for row in case["results"])}
            kept = [row for row in old["results"] if row["provider"] not in named]
            absent = {name: why for name, why in old["absent"].items() if name not in named}
            old |= case | {"results": kept + case["results"], "absent": absent | case["absent"]}
            return
    cases.append(dict(case))


def joined(cases: Iterable[dict]) -> list[dict]:
    found: list[dict] = []
    for case in cases:
        join(found, case)
    return found
