"""docs/measured.md: all that the result files say, the losing shapes first."""

import re
from collections.abc import Iterable, Sequence

from . import floor
from .__main__ import BENCHES
from .gpu.speed import COUNTERS
from .gpu.tuning import FOREIGN
from .markdown import NOTHING, figures, filled, markdown, number, speed
from .predictions import KERNELS, MISS, PREDICTIONS, fastest
from .steps_methods import AUTHORS, LORA, LORA_ALL, MOIL, PEFT, PEFT_ALL
from .steps_table import inference_table, steps_table

NEVER = "Not yet run on a GPU."
CLOCKS = {"eager": ("ms", "spread_ms"), "graph": ("graph_ms", "graph_spread_ms")}
BOUNDS = ("frozen linear", "frozen linears", "foreach lerp")  # who computes less than the operation: no peers
SHOWN = ("% of floor", "% of copy", "launches", "MB moved", "MB saved", "MB peak")
MATCHED = {LORA: PEFT, LORA_ALL: PEFT_ALL, MOIL: AUTHORS}  # who trains the same by other means
HEAD = """# Measured

Made by `make tables` from the files in `benchmarks/results/`, whatever they say. Every provider is verified against
float64 before it is timed: who is wrong or absent has no time, but a reason. On a GPU, "eager" is the time of calls
that are issued back to back and "graph" the time in a CUDA graph, both on inputs beyond the cache; ± is half the
distance between the quartiles. Only figures of one device and one run compare."""


# ---- the page -------------------------------------------------------------------------------------------------------


def page(devices: Sequence[dict]) -> str:
    gpus, parts = on_gpu(devices), [HEAD]
    if not gpus:
        parts += [NEVER, "## Predictions", predicted(None)]
    for device in devices:
        parts += [f"## {device['device']}", provenance(device)]
        sections = {"Where we lose": losing(device)}
        if device in gpus:
            sections["Against predictions"] = predicted(device)
        sections["Operations"] = operations(device, pictures(gpus, device))
        sections["Kernels"] = kernels(device)
        sections["Training steps"] = steps_table(device)
        sections["Inference"] = inference_table(device)
        sections["Numerics"] = numerics(device)
        sections["Tiles and variants"] = tuning(device)
        sections["What ran"] = ran(device)
        parts += [f"### {title}\n\n{text}" for title, text in sections.items() if text]
    return "\n\n".join(parts) + "\n"


def on_gpu(devices: Sequence[dict]) -> list[dict]:
    return [device for device in devices if device["kind"] == "gpu"]


def pictures(gpus: Sequence[dict], device: dict) -> str | None:
    """How the names of a GPU's pictures begin: only the first one's have no number."""
    if device not in gpus:
        return None
    return f"measured-{index}-" if (index := gpus.index(device)) else "measured-"


def folded(title: str, *content: str) -> str:
    text = "\n\n".join([f"<details><summary>{title}</summary>", *filter(None, content), "</details>"])
    return re.sub(r"(?<=-)-{2,}|(?<= ) +", "", text)  # no columns aligned by hundreds of spaces: it is read rendered


def reasons(pairs: Iterable[tuple[str, str]]) -> str:
    """A line for each reason, with whom it is about and how often."""
    counts: dict[tuple[str, str], int] = {}
    for pair in pairs:
        counts[pair] = counts.get(pair, 0) + 1
    return "\n".join(f"- {who}, {count} ×: {why}" for (who, why), count in counts.items())


# ---- where it ran ---------------------------------------------------------------------------------------------------


def provenance(device: dict) -> str:
    keys, rows = ("part", "date", "commit", "sources", "driver", "threads"), []
    for run in device["runs"]:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        rows.append([*(str(run.get(key) or NOTHING) for key in keys), versions])
    table = filled((*keys, "versions"), rows)
    told = {f"{key} {name}".strip(): value for key, found in (device["machine"] or {}).items()
            if key in ("gpu", "tools") for name, value in found.items()}  # fmt: skip
    lines = [f"- {name}: {value}" for name, value in told.items() if value]
    rates = {case["rates"]["source"] for case in device["cases"] if case["rates"] and device["kind"] == "gpu"}
    lines += [f"- rates of floors: {source}" for source in sorted(rates)]
    return "\n\n".join(filter(None, (table, "\n".join(lines))))


def ran(device: dict) -> str:
    """A line for each step of `make gpu`, and what the sanitizer has to say."""
    rows = []
    for name, each in device["ran"].items():
        told = each["told"].partition("\n")[0].replace("|", "\\|")
        rows.append((name, "ok" if each["ok"] else "LOOK", number(each["seconds"], 0), told))
    watched = [(f"{turn}, {op}", why) for turn, each in (device["sanitizer"] or {}).items() for op, why in each.items()]
    told = reasons((who, why) for who, why in watched if not why.startswith("0 "))
    return "\n\n".join(filter(None, (markdown(("step", "outcome", "s", "found"), rows), told)))


# ---- losses ---------------------------------------------------------------------------------------------------------


def own(device: dict) -> tuple[str, ...]:
    """The backends to be judged: on a CPU, where there are no kernels, plain torch's."""
    return KERNELS if device["kind"] == "gpu" else ("torch",)


def losses(device: dict) -> list[tuple[float, tuple[str, ...]]]:
    """Wherever a peer, or plain torch by our own backend, is faster than the fastest kernel of ours: the worst first.

    How many times as fast the fastest other is comes before the cells; infinity where no kernel of ours runs.
    """
    backends, found = own(device), []
    for case in (case for case in [*device["cases"], *device["foreign"]] if _reached(case)):
        for clock, (time, _) in CLOCKS.items():
            best = fastest(case, time, backends)
            others = {row["provider"]: row[time] / best[time] if best else 0.0 for row in case["results"]
                      if row["backend"] not in backends and row["provider"] not in BOUNDS and row[time]}  # fmt: skip
            faster = {name: ratio for name, ratio in sorted(others.items(), key=lambda item: item[1]) if ratio < 1}
            if faster:
                names = ", ".join(f"{name} {1 / ratio:.2f}×" if ratio else name for name, ratio in faster.items())
                worst = 1 / next(iter(faster.values())) if best else float("inf")
                ours = (best["provider"], number(best[time], 1, 1e-3)) if best else ("none", NOTHING)
                found.append((worst, (case["op"], case["title"], clock, *ours, names)))
    for step in device["steps"]:
        rival = MATCHED.get(step["method"])
        if (ratio := step["speed_vs"].get(rival, 1)) < 1:
            what = ("training step", f"{step['title']}, batch {step['batch']}, {step['dtype']}", step["mode"])
            ours = (step["method"], number(step["ms"], 1, 1e-3))
            found.append((1 / ratio, (*what, *ours, f"{rival} {1 / ratio:.2f}×")))
    return sorted(found, key=lambda loss: -loss[0])


def _reached(case: dict) -> bool:
    """Whether time lasted until one of ours had its turn, or was absent for a reason."""
    return any(name.startswith("ours") for name in (*case["absent"], *(row["provider"] for row in case["results"])))


def losing(device: dict) -> str:
    if not device["cases"] and not device["steps"]:
        return ""
    rows = [cells for _, cells in losses(device)]
    who = "our fastest kernel" if device["kind"] == "gpu" else "our torch backend"
    if not rows:
        return f"Nowhere: nobody is faster than {who} in any case."
    told = f"Who is faster than {who} and how many times as fast, the worst first."
    return f"{told}\n\n{markdown(('operation', 'case', 'clock', 'ours', 'µs', 'faster'), rows)}"


# ---- predictions ----------------------------------------------------------------------------------------------------


def predicted(device: dict | None) -> str:
    """Without a device nothing is measured."""
    rows = []
    for each in PREDICTIONS:
        value = each.find(device) if device else None
        cells = ("not measured", NOTHING, "")
        if value is not None:
            told = f"{number(value, 0 if value >= 100 else 2)}{each.unit}"
            cells = (told, number(each.ratio(value), 2), each.verdict(value))
        rows.append((each.name, str(each), *cells))
    told = f"""Estimates and targets from before the first run, for an H100, bfloat16 and rank 16. Kernels are Triton's
of design "passes", whole operations forward and backward in a graph, and "ours" is our fastest kernel. A miss by more
than {MISS:g} × is marked, and explained in a sentence or called unexplained."""
    return f"{told}\n\n{markdown(('prediction', 'predicted', 'measured', 'measured / predicted', 'verdict'), rows)}"


# ---- operations -----------------------------------------------------------------------------------------------------


def operations(device: dict, prefix: str | None) -> str:
    ops = dict.fromkeys(case["op"] for case in device["cases"])
    if not ops:
        return ""
    parts = ["× says how many times as fast the fastest of ours is, by the clock before it."]
    if prefix:
        parts.append(f"![all operations beside the roofs]({prefix}roofline.png)")
    for op in ops:
        picture = f"![{op}]({prefix}{op}.png)" if prefix else ""
        parts.append(folded(f"<code>{op}</code>", picture, _op([c for c in device["cases"] if c["op"] == op], device)))
    if device["foreign"]:
        parts.append(folded(f"beside {', '.join(FOREIGN)}", _op(device["foreign"], device)))
    return "\n\n".join(parts)


def _op(cases: Sequence[dict], device: dict) -> str:
    """Every provider a line."""
    rows = []
    for case in cases:
        best = {time: fastest(case, time, own(device)) for time, _ in CLOCKS.values()}
        for index, row in enumerate(case["results"]):
            cells = ["" if index else case["title"], row["provider"]]
            for keys in CLOCKS.values():
                cells += [number(row.get(key), 1, 1e-3) for key in keys]
                ours = best[keys[0]]
                cells.append(speed(case, ours, row["provider"], keys[0]) if ours else NOTHING)
            rows.append([*cells, *figures(row, SHOWN)])
    heads = ["case", "provider"] + [head for clock in CLOCKS for head in (f"{clock} µs", "±", "×")]
    absent = [(name, why) for case in cases for name, why in case["absent"].items()]
    return "\n\n".join(filter(None, (filled((*heads, *SHOWN), rows), reasons(absent))))


# ---- kernels --------------------------------------------------------------------------------------------------------


def kernels(device: dict) -> str:
    """What torch's profiler says: of ours each kernel, of others the sum."""
    parts = []
    for op in dict.fromkeys(record["op"] for record in device["profile"]):
        rows, last = [], None
        for r in (r for r in device["profile"] if r["op"] == op and "us" in r):
            each = _kernels(r, device) if r["backend"] in KERNELS else NOTHING
            rows.append(("" if r["case"] == last else r["case"], r["provider"], number(r["us"], 1), each))
            last = r["case"]
        absent = [(r["provider"], r["absent"]) for r in device["profile"] if r["op"] == op and "absent" in r]
        heads = ("case", "provider", "µs", "kernels of ours, µs (% of the kernel's floor)")
        parts.append(folded(f"<code>{op}</code>", markdown(heads, rows), reasons(absent)))
    for op, rows in (device["counters"] or {}).items():
        cells = [[short(row["kernel"]), *(number(row.get(name), 1) for name in COUNTERS.values())] for row in rows]
        table = filled(("kernel", *COUNTERS.values()), cells)
        parts.append(folded(f"counters of <code>{op}</code>, by Nsight Compute", table))
    told = "Microseconds of all kernels of one call, by torch's profiler; the floor of a kernel where it is modelled."
    return "\n\n".join([told, *parts]) if parts else ""


def _kernels(record: dict, device: dict) -> str:
    least, told = _floors(record, device), []
    for row in record["kernels"]:
        name = short(row["kernel"])
        share = f" ({100 * least[name] / row['us']:.0f} %)" if least.get(name) and row["us"] else ""
        told.append(f"{name} {row['us']:.1f}{share}")
    return ", ".join(told)


def short(kernel: str) -> str:
    """A kernel's name without what templates and namespaces add."""
    name = re.match(r"(?:void )?([^<(]*)", kernel.replace("(anonymous namespace)::", "")).group(1)
    return name.split("::")[-1].strip("_ ").removesuffix("_kernel").removeprefix("batched_")[:40]


def _floors(record: dict, device: dict) -> dict[str, float]:
    """Microseconds of the passes that go by a kernel's name."""
    bench = next(bench for bench in BENCHES if bench.op == record["op"])
    case = next((c for c in bench.cases(False, [record["dtype"]]) if c.title == record["case"]), None)
    design = bench.providers[record["provider"]].design if record["provider"] in bench.providers else None
    rates = next((c["rates"] for c in device["cases"] if c["rates"] and c["dtype"] == record["dtype"]), None)
    found: dict[str, float] = {}
    if case and design and rates:
        for each in (each for parts in bench.passes(case, design, "cuda") for each in parts or ()):
            seconds = floor.Work(each.flops, each.bytes).seconds(floor.Device(**rates), record["dtype"])
            name = each.name.partition(":")[0]
            found[name] = found.get(name, 0) + 1e6 * (seconds or 0)
    return found


# ---- numerics, tiles, variants --------------------------------------------------------------------------------------


def numerics(device: dict) -> str:
    """The worst of each operation, backend and dtype."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for record in (record for record in device["numerics"] if "ratio" in record):
        groups.setdefault((record["op"], record["backend"], record["dtype"]), []).append(record)
    rows = []
    for group, records in sorted(groups.items()):
        worst = max(records, key=lambda record: record["ratio"])
        values = (f"{worst['ratio']:.2f}", f"{worst['error']:.1e}", f"{worst['torch_error']:.1e}")
        rows.append((*group, str(len(records)), *values, f"{worst['worst']} of {worst['case']}"))
    others = [(f"{r['op']}, {r['provider']}", f"{key}: {r[key]}")
              for key in ("wrong", "absent") for r in device["numerics"] if key in r]  # fmt: skip
    if not device["numerics"]:
        return ""
    told = "Largest errors against float64, relative to the largest value, beside plain torch's in the same dtype."
    heads = ("operation", "backend", "dtype", "results", "× torch's", "error", "torch's", "where")
    return "\n\n".join(filter(None, (told, markdown(heads, rows), reasons(others))))


def tuning(device: dict) -> str:
    tiles = []
    for r in device["search"]:
        to = "kept" if r["to"] == r["from"] else r["to"].removeprefix("Tile")
        times = [number(r[key], 2) for key in ("us_from", "us_to", "spread_us")]
        refused = (str(r["tried"]), str(len(r["left_out"])))
        tiles.append((r["op"], r["case"], r["kernel"], r["from"].removeprefix("Tile"), to, *times, *refused))
    heads = ("operation", "case", "kernel", "tile", "better", "µs", "then µs", "±", "tried", "unfit")
    parts = [folded("tiles against their neighbours", markdown(heads, tiles))] if tiles else []
    timed = sorted((r for r in device["variants"] if "ratio" in r), key=lambda r: -r["ratio"])
    keys = ("base_us", "base_spread_us", "variant_us", "variant_spread_us")
    rows = [(r["case"], r["variant"], *(number(r[key], 2) for key in keys), f"{r['ratio']:.3f}×") for r in timed]
    absent = [(r["variant"], r["absent"]) for r in device["variants"] if "absent" in r]
    if device["variants"]:
        table = markdown(("case", "variant", "µs as it is", "±", "µs of the variant", "±", "times as fast"), rows)
        parts.append(folded("variants of <code>lowrank_linear</code>", table, reasons(absent)))
    return "\n\n".join(parts)
