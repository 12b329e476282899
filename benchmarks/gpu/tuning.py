"""The third run: what could be faster. Tiles, prepared variants, peers that take long to compile; then inference."""

import importlib.util
from collections.abc import Sequence

from .process import Run, cut
from .speed import by_operation, dtype, inference, told_by_cases
from .truth import Told
from .work import SHAPES

# Never run by those who wrote their calls, and importing one may change other libraries: alone, beside one of ours.
FOREIGN = {"unsloth": "unsloth", "axolotl": "axolotl", "LoRAFusion": "lorafusion", "chalk": "chalk"}
BESIDE = ("PEFT", "ours, triton passes")
GAIN = 1.02  # times as fast: what is told as better


def tiles(run: Run) -> Told:
    """The tile of every kernel against its neighbours: those that beat config.py's, as rows for it."""
    ends = by_operation(run, "search", "search", ("triton",))
    found = run.content["search"]
    better = [
        f"  {r['op']}, {r['case']}: {r['kernel']}={r['to']}, {r['us_from']:.2f} → {r['us_to']:.2f} µs"
        for r in found
        if r["to"] != r["from"]
    ]
    return not ends, "\n".join([f"{len(found)} kernels, {len(better)} tiles to change{ends}", *better])


def variants(run: Run) -> Told:
    """Prepared choices against what is."""
    size = ("--sizes", "small" if run.dry else "prepared")
    status, _, _ = run.work("variants", "variants", "--op", "lowrank_linear", *size, *dtype(run))
    return told_by_variants(run.content["variants"], cut(status))


def told_by_variants(records: Sequence[dict], ends: str) -> Told:
    timed = [record for record in records if "ratio" in record]
    wrong = [record for record in records if record.get("absent", "").startswith("wrong:")]
    lines = [f"  {r['case']}: {r['variant']}: {r['base_us']:.1f} → {r['variant_us']:.1f} µs, {r['ratio']:.3f}×"
             for r in sorted(timed, key=lambda r: -r["ratio"])]  # fmt: skip
    lines += [f"  {r['case']}: {r['variant']}: {r['absent']}" for r in records if "absent" in r]
    better = sum(record["ratio"] > GAIN for record in timed)
    told = f"{len(timed)} comparisons, {better} faster by more than {GAIN - 1:.0%}, {len(wrong)} wrong{ends}"
    return bool(timed) and not wrong and not ends, "\n".join([told, *lines])


def peers(run: Run) -> Told:
    """What torch.compile makes of the peers, beside all others, at few shapes; then libraries that are here by luck."""
    kinds = ("torch", "triton", "peers", *([] if run.dry else ["compiled"]))
    shapes = ("--sizes", "small" if run.dry else "peers", *dtype(run))
    here = [name for name, module in FOREIGN.items() if importlib.util.find_spec(module) is not None]
    foreign, ends = [] if run.dry else here, ""
    compiled = run.groups() if run.dry else [(op,) for op in SHAPES["peers"]]
    for turn, ops in run.within(0.7 if foreign else 1.0).in_turn(compiled):
        status, _, _ = turn.work("measure", "cases", "--op", *ops, "--with", *kinds, *shapes)
        ends += f"; {', '.join(ops)}{cut(status)}" if status != 0 else ""
    for turn, (name,) in run.in_turn([(name,) for name in foreign]):
        options = ("--op", "lowrank_linear", "--with", name, *BESIDE, *shapes)
        status, _, _ = turn.work("measure", "foreign", *options)
        ends += f"; {name}{cut(status)}" if status != 0 else ""
    ok, told = told_by_cases(run.content["cases"], ends)
    absent = [name for name in FOREIGN if name not in here]
    return ok, told + (f"\n  not installed: {', '.join(absent)}" if absent else "")


STEPS = (
    ("tiles", tiles, 180, ("search",)),
    ("variants", variants, 60, ("variants",)),
    ("peers", peers, 220, ("cases", "foreign")),
    ("inference", inference, 60, ("inference", "absent_inference")),
)
