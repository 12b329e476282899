"""The table of whole training steps, in docs/measured.md and where steps.py prints."""

from .markdown import filled
from .steps_methods import METHODS, MODES, RIVALS
from .steps_models import MODELS


def steps_table(run: dict) -> str:
    """Every step that was measured, and below what is absent and why; "" for a run without steps."""
    heads = ("model", "batch", "dtype", "mode", "method", "trained, M", "ms", "±", "MB peak", "launches")
    heads += tuple(f"vs {name}" for name in RIVALS)
    rows = []
    order = {"model": tuple(MODELS), "mode": MODES, "method": METHODS}
    for r in sorted(run.get("steps", ()), key=lambda r: [names.index(r[key]) for key, names in order.items()]):
        title = r["title"] if r["size"] == "base" else f"{r['title']}, {r['size']}"
        cells = [title, str(r["batch"]), r["dtype"], r["mode"], r["method"], f"{r['trained'] / 1e6:.2f}"]
        cells += [f"{r['ms']:.1f}", f"{r['spread_ms']:.1f}", f"{r['peak_bytes'] / 1e6:.0f}"]
        cells.append("–" if r["launches"] is None else str(r["launches"]))
        speeds = [r["speed_vs"].get(rival) for rival in RIVALS.values()]
        rows.append(cells + ["–" if speed is None else f"{speed:.2f}×" for speed in speeds])
    table = filled(heads, rows)
    reasons: dict[str, list[str]] = {}
    for each in run.get("absent_steps", ()):
        title = MODELS[each["model"]].title if each["model"] else None
        what = ", ".join(filter(None, (title, each["method"], each["mode"]))) or "all"
        reasons.setdefault(each["reason"], []).append(what)
    absent = "\n".join(f"- absent: {'; '.join(names)}: {reason}" for reason, names in reasons.items())
    return "\n\n".join(filter(None, (table, absent)))
