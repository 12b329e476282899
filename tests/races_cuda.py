"""The process that has ThreadSanitizer's library: runs the CUDA kernels on the host emulation and prints, as JSON, what
was reported. Each run has a process of its own, forked from this one, that ends at the first report.

    python races_cuda.py '{"module": ..., "planted": ..., "cases": "CHOSEN" or "ALL", "operations": ...,
                           "barriers": those to leave out in turn; null: all that are reached}'
"""

import ctypes
import functools
import json
import os
import sys
import time
import traceback
from pathlib import Path

import cuda_emulation
import races_cuda_cases
import torch

REPORTED = 66  # the exit status, as the test asks ThreadSanitizer for
FAULTS = "two blocks write", "one block reads what another writes"
HARMLESS = *FAULTS, "warps exchange", "shuffle", "multiply matrices", "load matrices"


def apart(work, quiet=True):
    """(was something reported?, what work() printed) of a forked process. No kernel may have run before in this one:
    its threads would be there still, and ThreadSanitizer ignores a process forked from one with threads."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(writing, 1)
            if quiet:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        printed = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, REPORTED), f"a run ended with {status}"
    return status == REPORTED, printed


def examine(library, runs, barriers=None):
    """Runs each {name: function}. Returns the name that was reported, and {barrier: was its absence reported?} for the
    barriers that were reached, or for those asked for."""

    def unchanged():
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            places = {Path(place).name for place in library.emulation_reached().decode().split()}
            print(json.dumps([time.perf_counter() - begin, name, sorted(places)]), flush=True)

    def noticed(place):
        file, line = place.split(":")
        library.emulation_skip(file.encode(), int(line))
        return any(apart(runs[name])[0] for _, name, places in done if place in places)

    wrong, printed = apart(unchanged, quiet=False)
    done = [json.loads(line) for line in printed.splitlines()]
    if wrong:
        return {"reported": list(runs)[len(done)]}
    done.sort()
    reached = {place for *_, places in done for place in places}
    noticed_barriers = {place: noticed(place) for place in sorted(reached if barriers is None else barriers)}
    library.emulation_skip(b"", 0)
    return {"reported": None, "barriers": noticed_barriers}


def examine_kernels(path, cases, barriers):
    with cuda_emulation.installed(cuda_emulation.load(Path(path))) as module:
        library = cuda_emulation.controls(module.__file__)
        runs = {f"{o} {case}": functools.partial(races_cuda_cases.run, o, case) for o in cases for case in cases[o]}
        return examine(library, runs, barriers)


def examine_planted(path):
    library = cuda_emulation.controls(path)
    out = (ctypes.c_int * 128)()
    calls = {name: functools.partial(library.launch, name.encode(), out) for name in HARMLESS}
    results = examine(library, {name: functools.partial(call, False) for name, call in calls.items()})
    return results | {"faults": {name: apart(functools.partial(calls[name], True))[0] for name in FAULTS}}


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    torch.use_deterministic_algorithms(True)
    cases = getattr(races_cuda_cases, task["cases"])
    cases = {operation: cases[operation] for operation in task["operations"]}
    results = {"planted": examine_planted(task["planted"])}
    results["kernels"] = examine_kernels(task["module"], cases, task["barriers"])
    print(json.dumps(results))
