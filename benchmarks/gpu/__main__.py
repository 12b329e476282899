"""Everything worth doing on a GPU, in one command of at most nine minutes: `make gpu` installs, then calls it.

    python -m peft_kernels.benchmarks.gpu --out FOLDER [PART …] [--seconds 500] [--dry]

The parts run one after the other, each in a process of its own, the most valuable first. What a part found goes into
FOLDER's one result file as soon as the part ends or its time is up; a part that is there already is not run again
unless it is named. Copy the file to benchmarks/results/ and `make tables` makes README's tables of it. FOLDER/log.txt
has what the parts printed. --dry runs every part on tiny shapes on a CPU, with Triton's interpreter.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peft_kernels.adapters.checkpoint import write_atomically

from .. import tables
from .parts import PARTS, NotHere, Run


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where a part found something wrong or was cut short, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=500, help="for all parts together")
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args(argv)
    if unknown := [name for name in given.part if name not in PARTS]:
        parser.error(f"PART: expected some of {', '.join(PARTS)}; got {', '.join(unknown)}")
    if not given.dry and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; --dry tries every part on a CPU", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    file, content = begun(given.out, given.dry)
    run, end = Run(given.out, given.dry), time.monotonic() + given.seconds
    later = sum(seconds for _, seconds in PARTS.values())
    for name, (part, seconds) in PARTS.items():
        later -= seconds
        if name not in (given.part or PARTS.keys() - content["parts"].keys()):
            continue
        began = time.monotonic()
        # What earlier parts left over, too; those that are named may take all of the time.
        run.deadline = end if given.part else min(end, max(began + seconds, end - later))
        try:
            ok, told, found = part(run) if began < end else (False, "not run: time was up", {})
        except NotHere as error:
            ok, told, found = True, f"absent: {error}", {}
        except Exception as error:  # a part that breaks takes no other with it
            ok, told, found = False, f"{type(error).__name__}: {error}", {}
        content |= found
        content["parts"][name] = {"ok": ok, "told": told, "seconds": round(time.monotonic() - began, 1)}
        text = json.dumps(content, indent=1) + "\n"
        write_atomically(file, lambda path, text=text: path.write_text(text, encoding="utf-8"))
        print(f"{name}: {told}", flush=True)
    done = content["parts"]
    rows = [(name, "ok" if each["ok"] else "LOOK", f"{each['seconds']:.0f}", each["told"].splitlines()[0])
            for name, each in done.items()]  # fmt: skip
    print(f"{tables.markdown(('part', '', 's', 'found'), rows)}\n{file}")
    return int(not all(each["ok"] for each in done.values()))


def begun(out: Path, dry: bool) -> tuple[Path, dict[str, Any]]:
    """The result file of this device and day, and what is in it from an earlier call on the same commit."""
    fresh = tables.provenance(torch.device("cpu" if dry else "cuda")) | {"parts": {}}
    if dry:
        fresh["kind"] = "dry"  # never a source of tables
    words = "dry" if dry else re.sub(r"[^a-z0-9]+", "-", fresh["device"].lower()).strip("-")
    file = out / f"{words}-{fresh['date']}.json"
    if not file.exists():
        return file, fresh
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["commit"] == fresh["commit"]:
        return file, content
    print(f"{file.name} is of commit {content['commit']}: it is begun anew")
    return file, fresh


if __name__ == "__main__":
    sys.exit(main())
