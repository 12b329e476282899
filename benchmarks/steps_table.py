"""The tables of whole training steps and of inference, in docs/measured.md and where steps.py prints."""

from collections.abc import Sequence

from .markdown import NOTHING, filled, number
from .steps_methods import BY_NAME, LORA_ALL, METHODS, MODES, PEFT_ALL, RIVALS
from .steps_models import MODELS

STEPS = 'On a CPU only methods that took turns have a "vs" of each other, the median of the rounds\' ratios.'
TURNS = 'The base took turns with every method: shown is its time beside the first, "vs base" is by that beside each.'


def steps_table(run: dict) -> str:
    """Every step that was measured; below what adapters add, and what is absent and why; "" for a run without steps."""
    heads = ("model", "batch", "dtype", "dropout", "mode", "method", "trained, M", "ms", "±", "MB peak", "launches")
    heads += tuple(f"vs {name}" for name in RIVALS)
    rows, steps = [], run.get("steps", ())
    order = {"model": tuple(MODELS), "mode": MODES, "method": (*METHODS, *BY_NAME)}
    several = len({r["dropout"] for r in steps}) > 1
    for r in sorted(steps, key=lambda r: [names.index(r[key]) for key, names in order.items()]):
        cells = [
            _title(r),
            str(r["batch"]),
            r["dtype"],
            f"{r['dropout']:g}" if several else "",
            r["mode"],
            r["method"],
            f"{r['trained'] / 1e6:.2f}",
        ]
        cells += [f"{r['ms']:.1f}", f"{r['spread_ms']:.1f}", f"{r['peak_bytes'] / 1e6:.0f}"]
        cells.append(number(r["launches"], 0))
        speeds = [r["speed_vs"].get(rival) for rival in RIVALS.values()]
        rows.append(cells + [_times(speed) for speed in speeds])
    turns = STEPS if rows and run.get("kind") == "cpu" else ""
    return "\n\n".join(filter(None, (filled(heads, rows), turns, adds(steps), _absent(run.get("absent_steps", ())))))


def adds(steps: Sequence[dict]) -> str:
    """A line for each step in which it is known: what our adapters, and PEFT's, add to a frozen model's step."""
    told = []
    same = ("model", "size", "mode", "batch", "dtype", "dropout")
    for r in (r for r in steps if r["method"] == LORA_ALL and PEFT_ALL in r["speed_vs"] and "adds_ms" in r):
        other = next(o for o in steps if o["method"] == PEFT_ALL and all(o[key] == r[key] for key in same))
        theirs = other["adds_ms"]
        ratio = f", ours / PEFT's {r['adds_ms'] / theirs:.2f}" if theirs > 0 else ""
        added = [f"{each['adds_ms']:.1f} ± {each['adds_spread_ms']:.1f} ms" for each in (r, other)]
        peaks = [each["peak_bytes"] / 1e6 for each in (r, other)]
        told.append(
            f"- {_title(r)}, {r['mode']}, {r['dtype']}, dropout {r['dropout']:g}: to a frozen step of "
            f"{r['frozen_ms']:.1f} ms adapters on all linears add {added[0]}, PEFT's {added[1]}{ratio}; "
            f"peak {peaks[0]:.0f} MB, PEFT's {peaks[1]:.0f} MB, ours / PEFT's {peaks[0] / peaks[1]:.2f}"
        )
    return "\n".join(told)


def inference_table(run: dict) -> str:
    """The same of inference, --inference: each model's base first."""
    heads = ("model", "dtype", "method", "state", "ms", "±", "vs base", "graph ms", "vs base in it", "batch")
    heads += ("examples/s", "vs base of batch", "examples/s in a graph", "stored kB")
    rows = []
    for r in run.get("inference", ()):
        cells = [_title(r), r["dtype"], r["method"] or NOTHING, r["state"], f"{r['ms']:.2f}", f"{r['spread_ms']:.2f}"]
        cells += [_times(r["vs_base"]), number(r["graph_ms"], 2), _times(r["graph_vs_base"]), str(r["batch"])]
        graph = None if r["batch_graph_ms"] is None else 1e3 * r["batch"] / r["batch_graph_ms"]
        cells += [f"{r['examples_per_s']:.1f}", _times(r["batch_vs_base"]), number(graph, 1)]
        rows.append([*cells, number(r["stored_bytes"], 0, 1e3)])
    absent = _absent(run.get("absent_inference", ()))
    return "\n\n".join(filter(None, (filled(heads, rows), TURNS if rows else "", absent)))


def _title(record: dict) -> str:
    return record["title"] if record["size"] == "base" else f"{record['title']}, {record['size']}"


def _times(speed: float | None) -> str:
    return NOTHING if speed is None else f"{speed:.2f}×"


def _absent(entries: Sequence[dict]) -> str:
    reasons: dict[str, list[str]] = {}
    for each in entries:
        title = MODELS[each["model"]].title if each["model"] else None
        what = ", ".join(filter(None, (title, each["method"], each["mode"]))) or "all"
        reasons.setdefault(each["reason"], []).append(what)
    return "\n".join(f"- absent: {'; '.join(names)}: {reason}" for reason, names in reasons.items())
