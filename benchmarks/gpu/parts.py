"""The parts of `python -m peft_kernels.benchmarks.gpu`: what each runs, and what it makes of the output.

Each returns whether all went well, words for people, and what the result file gets.
"""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = (sys.executable, "-m")
WORK = (*PYTHON, "peft_kernels.benchmarks.gpu.work")
VALUE = ("lowrank_linear", "weight_distance", "batched_lowrank_linear", "reconstruct", "gated_query")  # first the most
KERNELS = ("lowrank_linear", "weight_distance", "reconstruct")  # the main three
COUNTERS = {  # of Nsight Compute
    "gpu__time_duration.sum": "ns",
    "dram__bytes.sum": "bytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of memory",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "% of processors",
    "launch__registers_per_thread": "registers",
}


class NotHere(Exception):
    """A part cannot run on this machine; the message says why."""


@dataclass
class Run:
    """What every part is given: where to write, and until when."""

    out: Path
    dry: bool
    deadline: float = 0.0  # of the part, by time.monotonic()

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def small(self) -> tuple[str, ...]:
        return ("--small",) if self.dry else ()

    def groups(self) -> Iterator[tuple["Run", Sequence[str]]]:
        """The operations, each in a process and with a deadline that leaves an eighth of the time to each after it."""
        if self.dry:
            yield self, VALUE  # a process for each would mean five times torch's import
            return
        whole = self.deadline - time.monotonic()
        for index, op in enumerate(VALUE):
            yield replace(self, deadline=self.deadline - (len(VALUE) - 1 - index) * whole / 8), (op,)

    def call(self, command: Sequence[object], **environment: str) -> tuple[int | None, str]:
        """(exit status or None where time was up, output); everything it started ends with it."""
        settings = {**os.environ, **({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if self.dry else {})}
        settings |= {"PYTHONUNBUFFERED": "1", **environment}
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=REPOSITORY,
                env=settings,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(max(0.0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                status = None
            finally:  # also of Ctrl-C
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            output.seek(0)
            text = output.read()
        with (self.out / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(map(str, command))}\n{text[-1_000_000:]}\n[exit status {status}]\n\n")
        return status, text

    def work(
        self, kind: str, *options: object, under: Sequence[object] = (), **environment: str
    ) -> tuple[int | None, list[dict], str]:
        """One kind of work.py: (exit status, records, output). under: the tool that runs it, and its options"""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "records.json")
            command = (*under, *WORK, kind, "--save", file, "--device", self.device, *self.small, *options)
            status, text = self.call(command, **environment)
            return status, json.loads(file.read_text(encoding="utf-8")) if file.exists() else [], text


# ---- the parts ------------------------------------------------------------------------------------------------------

Found = tuple[bool, str, dict[str, Any]]


def tests(run: Run) -> Found:
    """The test suite on real kernels, those of the operations first."""
    folder = REPOSITORY / "tests"
    if not folder.is_dir():
        raise NotHere("no tests/ beside benchmarks/")
    files = [path.relative_to(REPOSITORY) for path in sorted(folder.glob("test_*.py"))]
    first = [file for file in files if any(op in file.stem for op in (*VALUE, "imitation", "layers", "per_pass"))]
    turns = (first, [file for file in files if file not in first])
    workers = ("-n", min(12, os.cpu_count() or 1), "--dist", "worksteal")
    if run.dry:
        turns, workers = ([Path("tests/test_backend.py")],), ("-n", 0)
    texts, statuses = [], []
    for turn in turns:
        command = (*PYTHON, "pytest", *turn, "-v", "--tb=short", "-p", "no:cacheprovider", *workers)
        status, text = run.call(command, **({} if run.dry else {"OMP_NUM_THREADS": "2"}))
        texts.append(text)
        statuses.append(status)
    return told_by_pytest(statuses, "\n".join(texts))


def told_by_pytest(statuses: Sequence[int | None], text: str) -> Found:
    """Of its -v output, which a run that was cut short has, too."""
    # With workers "[gw1] [ 5%] PASSED tests/…", without them "tests/… PASSED [ 5%]".
    pattern = r"^(?:\[gw\d+\] \[ *\d+%\] (\w+) (\S+.*)|(\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR)\b.*)$"
    ends = [(one or other, (first or second).strip()) for one, first, second, other in re.findall(pattern, text, re.M)]
    counts = Counter(end.lower() for end, _ in ends)
    bad = [name for end, name in ends if end in ("FAILED", "ERROR")]
    told = ", ".join(f"{number} {end}" for end, number in sorted(counts.items())) or "no test ran"
    told += "".join(dict.fromkeys(map(_cut, statuses)))
    content = {"counts": dict(counts), "failed": bad[:200], "complete": None not in statuses}
    return not any(statuses) and None not in statuses and bool(ends), told, {"tests": content}


def sanitizer(run: Run) -> Found:
    """The CUDA kernels on small shapes, watched for wrong accesses and for races."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None or run.dry:
        raise NotHere("no compute-sanitizer on the PATH or in /usr/local/cuda" if tool is None else "needs a GPU")
    reports = {}
    for check in ("memcheck", "racecheck"):
        # An allocation for each tensor: whatever lies behind its end belongs to nobody.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if check == "memcheck" else {}
        watched = (tool, "--tool", check, "--error-exitcode", 99)
        half = replace(run, deadline=(time.monotonic() + run.deadline) / 2) if check == "memcheck" else run
        reports[check] = told_by_sanitizer(*half.work("check", "--small", "--backend", "cuda", under=watched, **alone))
    told = "; ".join(f"{check}: {each}" for check, each in reports.items())
    return all(each.startswith("0 ") for each in reports.values()), told, {"sanitizer": reports}


def told_by_sanitizer(status: int | None, records: Sequence[dict], text: str) -> str:
    """Its summary, "0 errors" or the like, if the kernels of all operations ran and gave what they should."""
    summary = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.*)$", text, re.M)
    if status != 0:
        return "time was up" if status is None else f"exit status {status}" + "".join(f", {s}" for s in summary[-1:])
    missing = [op for op in VALUE if not any(record["op"] == op and "ratio" in record for record in records)]
    reasons = dict.fromkeys(record["absent"] for record in records if "absent" in record)
    if missing:
        return "; ".join([f"nothing ran of {', '.join(missing)}", *reasons])
    return summary[-1] if summary else "no summary"


def numerics(run: Run) -> Found:
    """Every backend and dtype against float64."""
    status, records, _ = run.work("numerics", *(("--dtype", "float32", "float16") if run.dry else ()))
    wrong = [record["wrong"] for record in records if "wrong" in record]
    worst = {}
    for record in records:
        if "ratio" in record:
            worst[record["backend"]] = max(record["ratio"], worst.get(record["backend"], 0))
    verified = {(record["op"], record["backend"]) for record in records if "ratio" in record}
    backends = ("torch", "triton") if run.dry else ("torch", "triton", "cuda")
    missing = [f"{op} {backend}" for op in VALUE for backend in backends if (op, backend) not in verified]
    told = f"{len(records)} cases, {len(wrong)} wrong; largest error against torch's own: "
    told += ", ".join(f"{backend} {ratio:.2f}×" for backend, ratio in worst.items())
    told += f"; nothing of {', '.join(missing)}" if missing else ""
    return status == 0 and not missing, told + _cut(status), {"numerics": records}


def bench(run: Run) -> Found:
    """Every operation against its peers."""
    found, cut = _by_operation(run, "measure")
    absent = [(case["op"], name, why) for case in found for name, why in case["absent"].items()]
    wrong = [f"  {op}, {name}: {why}" for op, name, why in absent if why.startswith("wrong:")]
    told = f"{len(found)} cases, {len(wrong)} wrong{cut}"
    return not cut and not wrong, "\n".join([told, *wrong]), {"cases": found}


def search(run: Run) -> Found:
    """Tiles: those that beat config.py's, as rows for it."""
    found, cut = _by_operation(run, "search")
    better = [f"  {r['op']}, {r['case']}: {r['kernel']}={r['to']}" for r in found if r["to"] != r["from"]]
    told = f"{len(found)} kernels, {len(better)} tiles to change{cut}"
    return not cut, "\n".join([told, *better]), {"search": found}


def _by_operation(run: Run, kind: str) -> tuple[list[dict], str]:
    found, cut = [], ""
    for part, ops in run.groups():
        status, records, _ = part.work(kind, "--op", *ops, "--dtype", "float32" if run.dry else "bfloat16")
        found += records
        cut += f"; {', '.join(ops)}{_cut(status)}" if status != 0 else ""
    return found, cut


def steps(run: Run) -> Found:
    """Whole training steps of BLIP-base and ViLT-B."""
    size = ("--size", "tiny", "--mode", "eager", "--rounds", 1) if run.dry else ("--size", "base")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "steps.json")
        command = (*PYTHON, "peft_kernels.benchmarks.steps", "--save", file, "--device", run.device, *size)
        status, text = run.call(command)
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    kept = {name: content[name] for name in ("steps", "absent_steps") if name in content}
    told = f"{len(kept.get('steps', ()))} steps measured" + _cut(status)
    return status == 0, told + (f": {text.strip().splitlines()[-1]}" if status == 1 else ""), kept


def profile(run: Run) -> Found:
    """The kernels of the three main operations, by hardware counters where Nsight Compute is."""
    options = ("--op", *KERNELS, "--backend", "triton", "--dtype", "float32" if run.dry else "bfloat16")
    status, records, _ = run.work("once", *options)
    found: dict[str, Any] = {"profile": records}
    told = f"{sum(len(record.get('kernels', ())) for record in records)} kernels by torch's profiler"
    tool = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if tool and not run.dry and status == 0:
        found["counters"] = {op: _counted(run, tool, op) for op in KERNELS}
        told += ", " + ", ".join(f"{len(rows)} of {op} by ncu" for op, rows in found["counters"].items())
    return status == 0, told + _cut(status), found


def _counted(run: Run, tool: str, op: str) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        work = (*WORK, "once", "--save", f"{folder}/x.json", "--op", op, "--dtype", "bfloat16", "--backend", "triton")
        options = ("--profile-from-start", "off", "--clock-control", "none", "--csv", "--metrics", ",".join(COUNTERS))
        _, text = run.call((tool, *options, *work))
    return counters(text)


def counters(text: str) -> list[dict]:
    """ncu's CSV, which has a line for each kernel and counter, as one record for each launch."""
    lines = text.splitlines()
    begin = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), None)
    rows: dict[str, dict] = {}
    for line in csv.DictReader(lines[begin:]) if begin is not None else ():
        if line.get("Metric Name") in COUNTERS:
            row = rows.setdefault(line["ID"], {"kernel": line["Kernel Name"]})
            row[COUNTERS[line["Metric Name"]]] = float(line["Metric Value"].replace(",", ""))
            row["unit"] = {**row.get("unit", {}), COUNTERS[line["Metric Name"]]: line["Metric Unit"]}
    return list(rows.values())


def _cut(status: int | None) -> str:
    """What there is to say of an exit status: nothing of 0."""
    return "; time was up" if status is None else f"; exit status {status}" if status else ""


# Seconds that a part may take; one that ends early leaves the rest to those after it.
PARTS: dict[str, tuple[Callable[[Run], Found], int]] = {
    "tests": (tests, 170),
    "sanitizer": (sanitizer, 60),
    "numerics": (numerics, 45),
    "bench": (bench, 110),
    "search": (search, 50),
    "steps": (steps, 80),
    "profile": (profile, 40),
}
