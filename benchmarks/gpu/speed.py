"""The second run: what everything takes. Kernel by kernel first, which decides what is looked at after it."""

import csv
import importlib.util
import json
from collections.abc import Sequence
from typing import Any

from .process import OPS, PYTHON, NotHere, Run, cut
from .truth import Told, tool

WATCHED = "_(shrink|up_bwd|down_bwd|sum)_kernel"  # the kernels of lowrank_linear
COUNTERS = {  # their names in Nsight Compute, and ours
    "gpu__time_duration.sum": "ns",
    "dram__bytes.sum": "bytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of memory",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "% of processors",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% of warps",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "programs",
}
ALL = ("peers", "torch", "triton", "cuda")


def dtype(run: Run, ops: Sequence[str] = ()) -> tuple[str, ...]:
    """The first operation is measured in float32, too."""
    first = ops == OPS[:1]
    return "--dtype", *([] if run.dry else ["bfloat16"]), *(["float32"] if run.dry or first else [])


def sizes(run: Run) -> tuple[str, str]:
    return "--sizes", "small" if run.dry else "usual"


# ---- kernels --------------------------------------------------------------------------------------------------------


def kernels(run: Run) -> Told:
    """Microseconds of every kernel at every shape: ours, PEFT's, the bare linear's."""
    ends = by_operation(run, "kernels", "profile")
    records = [record for record in run.content["profile"] if "us" in record]
    lines = []
    for op, case in dict.fromkeys((record["op"], record["case"]) for record in records):
        same = [record for record in records if (record["op"], record["case"]) == (op, case)]
        lines.append(f"  {op} {case}: " + ", ".join(f"{record['provider']} {record['us']:.1f}" for record in same))
    return not ends, "\n".join([f"µs of {len(records)} calls by torch's profiler{ends}", *lines])


def by_operation(run: Run, kind: str, key: str, providers: Sequence[str] = ALL) -> str:
    """One kind of work, a process for each operation; how those ended that did not end well."""
    ends, most = "", ("--most", 1) if run.dry else ()
    for turn, ops in run.in_turn(run.groups()):
        status, _, _ = turn.work(kind, key, "--op", *ops, "--with", *providers, *sizes(run), *dtype(run, ops), *most)
        ends += f"; {', '.join(ops)}{cut(status)}" if status != 0 else ""
    return ends


# ---- operations -----------------------------------------------------------------------------------------------------


def timings(run: Run) -> Told:
    """Every operation against its peers, but for those of a compiler: verified, then timed eager and in a graph."""
    return told_by_cases(run.content["cases"], by_operation(run, "measure", "cases"))


def told_by_cases(cases: Sequence[dict], ends: str) -> Told:
    absent = [(case, name, why) for case in cases for name, why in case["absent"].items()]
    wrong = [f"  {case['op']} {case['title']}, {name}: {why}" for case, name, why in absent if why.startswith("wrong:")]
    lines = []
    for case in cases:
        times = [f"{row['provider']} {_microseconds(row)}" for row in case["results"]]
        lines.append(f"  {case['op']} {case['title']}: " + ", ".join(times))
    told = f"{len(cases)} cases, {len(wrong)} wrong{ends}; µs in a graph, or / eager:"
    return not ends and not wrong, "\n".join([told, *wrong, *lines])


def _microseconds(row: dict) -> str:
    times = (row.get("graph_ms"), row.get("ms"))
    return "/".join("–" if time is None else f"{time * 1e3:.0f}" for time in times)


# ---- whole steps ----------------------------------------------------------------------------------------------------


def steps(run: Run) -> Told:
    """Training steps of BLIP-base and ViLT-B: in a CUDA graph first, then eager."""
    modes = ("eager",) if run.dry else ("graph", "eager")
    return of_models(run, "steps", ("mode", "method"), "--mode", *modes, "--seconds", max(1, int(run.left)))


def inference(run: Run) -> Told:
    """The same models without an adapter, with one, and merged."""
    return of_models(run, "inference", ("method", "state"), "--inference")


def of_models(run: Run, key: str, names: Sequence[str], *options: object) -> Told:
    """steps.py in a process of its own; its section `key`, of which every record is told by `names` and its time."""
    if importlib.util.find_spec("transformers") is None:
        raise NotHere("no transformers, which has the models")
    small = ("--size", "tiny", "--rounds", 1, "--model", "vilt", "--method", "our LoRA") if run.dry else ()
    file = run.out / "steps.json"  # beside the results: a run that is killed leaves it there
    command = (*PYTHON, "peft_kernels.benchmarks.steps", "--save", file, "--device", run.device, *options, *small)
    status, text = run.call(command)
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        run.content |= {each: found.get(each, []) for each in (key, f"absent_{key}")}
        run.save()
        file.unlink()
    done = run.content[key]
    why = f": {text.strip().splitlines()[-1]}" if status == 1 and text.strip() else ""
    lines = [f"  {', '.join(r[n] or 'none' for n in ('title', *names))}: {r['ms']:.1f} ms" for r in done]
    return status == 0 and bool(done), "\n".join([f"{len(done)} measured{cut(status)}{why}", *lines])


# ---- counters -------------------------------------------------------------------------------------------------------


def counters(run: Run) -> Told:
    """Nsight Compute on the kernels that the most depends on."""
    path = tool("ncu")
    if path is None or run.dry:
        raise NotHere("no ncu on the PATH or in /usr/local/cuda" if path is None else "needs a GPU")
    options = ("--profile-from-start", "off", "--clock-control", "none", "--csv", "--metrics", ",".join(COUNTERS))
    watched = (path, *options, "--kernel-name", f"regex:{WATCHED}")
    work = ("--op", "lowrank_linear", "--with", "ours, triton passes", *dtype(run), "--most", 1)
    status, _, text = run.work("once", None, *work, under=watched)
    rows = read_counters(text)
    run.content["counters"] = {"lowrank_linear": rows}
    run.save()
    lines = [f"  {row['kernel']}: " + ", ".join(f"{row[name]:g} {name}" for name in COUNTERS.values() if name in row)
             for row in rows]  # fmt: skip
    return status == 0 and bool(rows), "\n".join([f"{len(rows)} launches by ncu{cut(status)}", *lines])


def read_counters(text: str) -> list[dict[str, Any]]:
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


# ---- all ------------------------------------------------------------------------------------------------------------

STEPS = (
    ("kernels", kernels, 90, ("profile",)),
    ("timings", timings, 260, ("cases",)),
    ("steps", steps, 130, ("steps", "absent_steps")),
    ("counters", counters, 40, ("counters",)),
)
