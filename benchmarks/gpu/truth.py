"""The first run: what the machine has, and whether the kernels compute what they should.

Each step returns whether all went well, and words for people; what it found is in the result file already.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from importlib import metadata

from peft_kernels import environment

from .process import OPS, PYTHON, REPOSITORY, NotHere, Run, cut

BACKENDS = ("triton", "cuda", "torch")
MOST_NUMERICS = 6  # cases of each operation, size and dtype
OUGHT = re.compile(r"_C\b|triton|gpu|cuda|nvcc|driver", re.IGNORECASE)  # what a GPU machine lacks only by mistake
LEAST_FOR_RACES = 20  # seconds, without which Triton's kernels are not watched for races
WATCHES = (  # in this order, each for a share of the time that is then left
    ("memcheck", "triton", 0.4),
    ("memcheck", "cuda", 0.4),
    ("racecheck", "cuda", 0.6),
    ("racecheck", "triton", 1.0),
)
Told = tuple[bool, str]


# ---- the machine ----------------------------------------------------------------------------------------------------


def machine(run: Run) -> Told:
    """Device, driver, compilers, packages: read by the run that needs them, not by one of its own."""
    report = environment.report()
    tools = {name: tool(name) for name in ("nvcc", "compute-sanitizer", "ncu")}
    packages = sorted(f"{each.metadata['Name']} {each.version}" for each in metadata.distributions())
    found = {"gpu": report["gpu"], "cores": report["machine"]["cores"], "backends": report["backends"]}
    found |= {"cuda_kernels": report["cuda_kernels"], "tools": {name: _version(path) for name, path in tools.items()}}
    run.content["machine"] = found | {"packages": packages}
    run.save()
    lacking = [f"{name} {why}" for name, why in report["backends"].items() if why != environment.WORKS]
    lacking += [f"no {name}" for name, path in tools.items() if path is None]
    missing = [name for name in ("peft", "transformers", "pytest", "xdist") if importlib.util.find_spec(name) is None]
    lacking += [f"no {name}" for name in missing]
    versions = ", ".join(f"{name} {version}" for name, version in run.content["versions"].items())
    told = f"{run.content['device']}, driver {run.content['driver']}, {found['cores']} cores; {versions}; "
    told += f"commit {run.content['commit']}, sources {run.content['sources']}"
    lines = [f"  {name}: {version}" for name, version in found["tools"].items()]
    return run.dry or not lacking, "\n".join([told + "".join(f"; {each}" for each in lacking), *lines])


def tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")


def _version(path: str | None) -> str | None:
    """The last line that says a version of what is asked for it."""
    if path is None:
        return None
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return type(error).__name__
    return next((line.strip() for line in reversed(text.splitlines()) if re.search(r"\d+\.\d+", line)), None)


# ---- numerics -------------------------------------------------------------------------------------------------------


def numerics(run: Run) -> Told:
    """Every backend and dtype against float64: a process for each operation and backend, Triton's before CUDA's."""
    phases = [BACKENDS] if run.dry else [(backend,) for backend in BACKENDS]
    sizes = ("small",) if run.dry else ("small", "usual")
    dtypes = ("float32",) if run.dry else ("bfloat16", "float32", "float16")
    options = ("--sizes", *sizes, "--dtype", *dtypes, "--most", 1 if run.dry else MOST_NUMERICS)
    ends = ""
    for index, backends in enumerate(phases):
        phase = run.within(1.0 if index == len(phases) - 1 else 0.6)
        groups = run.groups()
        calls = [partial(phase.work, "numerics", "numerics", "--op", *ops, "--with", *backends, *options)
                 for ops in groups]  # fmt: skip
        for ops, (status, _, _) in zip(groups, run.together(calls)):
            ends += f"; {', '.join((*backends, *ops))}{cut(status)}" if status != 0 else ""
    return told_by_numerics(run.content["numerics"], BACKENDS[::2] if run.dry else BACKENDS, ends)


def told_by_numerics(records: Sequence[dict], backends: Iterable[str], ends: str) -> Told:
    """Something must have been compared for every operation and backend."""
    wrong = [f"  {record['op']}, {record['case']}: {record['wrong']}" for record in records if "wrong" in record]
    worst: dict[str, float] = {}
    for record in records:
        if "ratio" in record:
            worst[record["backend"]] = max(record["ratio"], worst.get(record["backend"], 0))
    compared = {(record["op"], record["backend"]) for record in records if "ratio" in record}
    missing = [f"{op} {backend}" for op in OPS for backend in backends if (op, backend) not in compared]
    told = f"{len(records)} results, {len(wrong)} wrong; largest error against torch's own: "
    told += ", ".join(f"{backend} {ratio:.2f}×" for backend, ratio in worst.items())
    told += f"; nothing of {', '.join(missing)}" if missing else ""
    return not (wrong or missing or ends), "\n".join([told + ends, *wrong])


# ---- the tests ------------------------------------------------------------------------------------------------------


def tests(run: Run) -> Told:
    """The operations' tests that run kernels: tests/real_kernels.py chooses them, and says where each of them ran."""
    folder = REPOSITORY / "tests"
    if not folder.is_dir():
        raise NotHere("no tests/ beside benchmarks/")
    files = sorted(folder.glob("test_*.py"))
    chosen = [path for path in files if path.stem.startswith(tuple(f"test_{op}" for op in (*OPS, "imitation")))]
    workers = ("-n", max(1, min(14, (os.cpu_count() or 1) - 2)), "--dist", "worksteal")
    # A hanging kernel is waited for in C, where no signal gets through: its process ends, and another takes over.
    options = ("-q", "--tb=short", "-p", "no:cacheprovider", "--timeout", 100, "--timeout-method", "thread")
    if run.dry:
        chosen, workers = [folder / "test_gated_query.py"], ("-n", 0, "-k", "test_result_and_gradients and float32")
    found = run.content.setdefault("tests", {})
    found |= {"counts": {}, "ran": {}, "left_out": {}, "skipped": {}, "failed": [], "elsewhere": [], "nowhere": []}
    found |= {"other_files": len(files) - len(chosen), "complete": False}
    command = (*PYTHON, "pytest", "-p", "real_kernels", *options, *workers, *(f"tests/{path.name}" for path in chosen))
    environment = {} if run.dry else {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

    def take(record: dict) -> None:
        add_test(found, record, run.device)
        run.save()

    status, _ = run.call(command, take, PYTHONPATH=str(folder), **environment)
    found["complete"] = status is not None
    return told_by_tests(found, status, () if run.dry else ("triton", "cuda"))


def add_test(found: dict, record: dict, device: str) -> None:
    """One record of tests/real_kernels.py."""
    if "left_out" in record:
        found["left_out"] = record["left_out"]
        return
    outcome, name = record["outcome"], record["test"]
    found["counts"][outcome] = found["counts"].get(outcome, 0) + 1
    if outcome == "skipped":
        found["skipped"][record["reason"]] = found["skipped"].get(record["reason"], 0) + 1
    elif outcome != "passed":
        found["failed"].append(name)
    else:
        places = {where.split(" on ")[1] for where in record["launches"]}
        for where in record["launches"]:
            found["ran"][where] = found["ran"].get(where, 0) + 1
        if not places:
            found["nowhere"].append(name)
        elif places != {device}:
            found["elsewhere"].append(name)


def told_by_tests(found: dict, status: int | None, backends: Sequence[str]) -> Told:
    """backends: those whose kernels must have run in some test"""
    lines = [f"  failed: {name}" for name in found["failed"][:20]]
    lines += [f"  {number} skipped: {reason}" for reason, number in sorted(found["skipped"].items())]
    lines += [f"  {number} left out: {reason}" for reason, number in sorted(found["left_out"].items())]
    ought = [reason for reason in found["skipped"] if OUGHT.search(reason)]
    wrong = [f"  LOOK: skipped for what this machine ought to have: {reason}" for reason in ought]
    wrong += [f"  LOOK: no test ran a kernel of {name}" for name in backends if not found["ran"].get(f"{name} on cuda")]
    wrong += [f"  LOOK: ran on the wrong device: {name}" for name in found["elsewhere"]]
    wrong += [f"  LOOK: passed without a kernel: {name}" for name in found["nowhere"]]
    told = ", ".join(f"{number} {outcome}" for outcome, number in sorted(found["counts"].items())) or "no test ran"
    told += "".join(f"; {number} with {where}" for where, number in sorted(found["ran"].items()))
    told += f"; {sum(found['left_out'].values())} left out, and {found['other_files']} files of other tests"
    ok = status == 0 and bool(found["counts"]) and not wrong
    return ok, "\n".join([told + cut(status), *wrong, *lines])


# ---- the sanitizer --------------------------------------------------------------------------------------------------


def sanitizer(run: Run) -> Told:
    """Wrong accesses, then races, on shapes that take every loop round more than once, all rows in one strip."""
    path = tool("compute-sanitizer")
    if path is None or run.dry:
        raise NotHere("no compute-sanitizer on the PATH or in /usr/local/cuda" if path is None else "needs a GPU")
    reports = run.content.setdefault("sanitizer", {})
    for check, backend, share in WATCHES:
        if (check, backend) == ("racecheck", "triton") and run.left < LEAST_FOR_RACES:
            reports[f"{check} {backend}"] = {"all": "left out: no time was left"}
            continue
        turn, groups = run.within(share), run.groups()
        # An allocation for each tensor: whatever lies behind its end belongs to nobody.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if check == "memcheck" else {}
        watched = (path, "--tool", check, "--error-exitcode", 99)
        options = ("--with", backend, "--sizes", "loops", "--dtype", "bfloat16", "float32")
        calls = [partial(turn.work, "check", None, "--op", *ops, *options, under=watched, **alone) for ops in groups]
        found = zip(groups, run.together(calls))
        reports[f"{check} {backend}"] = {op: told_by_sanitizer(op, *each) for (op,), each in found}
        run.save()
    return told_by_sanitizers(reports)


def told_by_sanitizers(reports: dict[str, dict[str, str]]) -> Told:
    clean = {turn: all(why.startswith(("0 ", "left out")) for why in each.values()) for turn, each in reports.items()}
    lines = [f"  {turn}, {op}: {why}" for turn, each in reports.items() for op, why in each.items()
             if not why.startswith("0 ")]  # fmt: skip
    told = "; ".join(f"{turn}: {'clean' if ok else 'LOOK'}" for turn, ok in clean.items())
    return all(clean.values()), "\n".join([told, *lines])


def told_by_sanitizer(op: str, status: int | None, records: Sequence[dict], text: str) -> str:
    """Its summary, "0 errors" or the like, if kernels of the operation ran and gave numbers."""
    summary = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.*)$", text, re.M)
    counts = Counter()
    for record in records:
        counts.update(record.get("launches", {}))
    if status != 0:
        told = "time was up" if status is None else f"exit status {status}" + "".join(f", {s}" for s in summary[-1:])
        return f"{told}; {len(records)} results"
    if not any(where.endswith("on cuda") for where in counts):
        reasons = dict.fromkeys(record["absent"] for record in records if "absent" in record)
        return "; ".join([f"no kernel of {op} ran", *reasons])
    if any(record.get("finite") is False for record in records):
        return "a result is not finite"
    return summary[-1] if summary else "no summary"


# ---- all ------------------------------------------------------------------------------------------------------------

STEPS = (
    ("machine", machine, 10, ("machine",)),
    ("numerics", numerics, 60, ("numerics",)),
    ("tests", tests, 200, ("tests",)),
    ("sanitizer", sanitizer, 180, ("sanitizer",)),
)
