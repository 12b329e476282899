"""Three runs for a GPU that is at hand for minutes: `make gpu` installs, then calls this. docs/gpu.md tells more.

    python -m peft_kernels.benchmarks.gpu --out FOLDER [truth] [speed] [tuning] [--seconds 520] [--dry]

    truth    what the machine has; every kernel against float64; the operations' tests; the sanitizer
    speed    every kernel by a profiler; operations and whole training steps against their peers; hardware counters
    tuning   tiles, prepared variants, peers that compile; what adapted and merged models cost to run

Each is whole alone and takes at most nine minutes; its steps come in order of their worth, and one that ends early
leaves its time to those after it. What is found goes into FOLDER's result file of the run at once; a step that a file
of the same sources has whole is not run again. Copy the files to benchmarks/results/ and `make tables` makes
docs/measured.md of them. --dry runs every step on tiny shapes on a CPU, with Triton's interpreter.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import results
from ..markdown import markdown
from . import speed, truth, tuning
from .process import NotHere, Run

PARTS = {"truth": truth.STEPS, "speed": speed.STEPS, "tuning": tuning.STEPS}  # (name, what it does, seconds, its keys)
SECONDS = 520


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where a step found something wrong or was cut short, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all of them")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for each part; {SECONDS}")
    parser.add_argument("--began", type=float, metavar="TIME", help="when installing began: the first part's begin")
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args(argv)
    if unknown := [name for name in given.part if name not in PARTS]:
        parser.error(f"PART: expected some of {', '.join(PARTS)}; got {', '.join(unknown)}")
    if not given.dry and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; --dry tries every part on a CPU", file=sys.stderr)
        return 2
    if given.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything asks whether Triton runs on a CPU
    given.out.mkdir(parents=True, exist_ok=True)
    spent = max(0.0, time.time() - given.began) if given.began else 0.0
    ok = True
    for part in (name for name in PARTS if name in (given.part or PARTS)):
        run = Run(given.out, part, given.dry)
        run.content = begun(run)
        ok &= perform(run, time.monotonic() + given.seconds - spent)
        spent = 0.0
    return int(not ok)


def begun(run: Run) -> dict[str, Any]:
    """What the result file of this device, day and part has from an earlier call on the same sources."""
    run.content = results.provenance(torch.device(run.device)) | {"part": run.part, "ran": {}}
    if run.dry:
        run.content["kind"] = "dry"  # never a source of tables
    if run.file.exists():
        old = json.loads(run.file.read_text(encoding="utf-8"))
        if old["sources"] == run.content["sources"]:
            return old
        print(f"{run.file.name} is of sources {old['sources']}: it is begun anew")
    return run.content


def perform(run: Run, end_of_all: float) -> bool:
    """Every step that is not there yet; whether all are well."""
    steps, ran = PARTS[run.part], run.content["ran"]
    later = sum(seconds for _, _, seconds, _ in steps)
    print(f"== {run.part}", flush=True)
    for name, step, seconds, keys in steps:
        later -= seconds
        if ran.get(name, {}).get("whole"):
            continue
        for key in keys:
            run.content.pop(key, None)
        run.content |= {key: [] for key in keys if key in LISTS}
        began = time.monotonic()
        deadline = min(end_of_all, max(began + seconds, end_of_all - later))  # what earlier steps left over, too
        ran[name] = {"ok": False, "told": "the run ended before", "seconds": 0.0, "whole": False}
        run.save()
        given = replace(run, deadline=deadline, cut_short=[])
        ok, told = one(step, given) if began < deadline else (False, "not run: time was up")
        whole = began < deadline and not given.cut_short
        ran[name] = {"ok": ok, "told": told, "seconds": round(time.monotonic() - began, 1), "whole": whole}
        run.save()
        print(f"{name}, {ran[name]['seconds']:.0f} s{'' if ok else ', LOOK'}: {told}", flush=True)
    rows = [(name, "ok" if each["ok"] else "LOOK", f"{each['seconds']:.0f}", each["told"].partition("\n")[0][:100])
            for name, each in ran.items()]  # fmt: skip
    print(f"{markdown(('step', '', 's', 'found'), rows)}\n{run.file}\n", flush=True)
    return all(each["ok"] for each in ran.values())


def one(step: Any, run: Run) -> tuple[bool, str]:
    """A step that breaks takes no other with it."""
    try:
        return step(run)
    except NotHere as error:
        return True, f"absent: {error}"
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"


LISTS = ("numerics", "profile", "cases", "steps", "absent_steps", "search", "variants", "foreign")
LISTS += ("inference", "absent_inference")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started ends with it
    sys.exit(main())
