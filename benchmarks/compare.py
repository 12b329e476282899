"""Two runs of the same cases: what became faster or slower by more than both of their spreads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .results import describe, identity
from .terminal import Table

FASTER, SLOWER = "faster", "SLOWER"


class Change(NamedTuple):
    """Milliseconds of one provider in one case."""

    case: str
    provider: str
    how: str  # "eager", or "graph" in a CUDA graph
    ours: bool
    old: float
    new: float
    told: str  # FASTER, SLOWER, or empty


def load(path: Path | None, wanted: Sequence[dict]) -> dict | None:
    """A result file. Raises ValueError if it is none, or has none of the cases that are wanted."""
    if path is None:
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        known = {identity(case) for case in run["cases"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--compare: {path} is not a file of --save: {error}") from None
    if known.isdisjoint(map(identity, wanted)):
        raise ValueError(f"--compare: {path} has none of these cases")
    return run


def changes(old: dict, new: dict) -> list[Change]:
    """The change for each provider that both runs measured; in a CUDA graph, too, where both have one."""
    before = {(identity(case), row["provider"]): row for case in old["cases"] for row in case["results"]}
    found = []
    for case in new["cases"]:
        for row in case["results"]:
            was = before.get((identity(case), row["provider"]), {})
            for how, kind in (("eager", ""), ("graph", "graph_")):
                time, spread = f"{kind}ms", f"{kind}spread_ms"
                if not was.get(time) or not row[time]:
                    continue
                beyond = abs(row[time] - was[time]) > (was.get(spread) or 0) + (row.get(spread) or 0)
                told = (SLOWER if row[time] > was[time] else FASTER) if beyond else ""
                name = f"{case['op']} {case['title']}", row["provider"], how, bool(row["backend"])
                found.append(Change(*name, was[time], row[time], told))
    return found


def table(found: Sequence[Change], old: dict) -> Table:
    """The ratio is the old time to the new one: above 1 is faster."""
    rows = [[e.case, e.provider, e.how, f"{e.old:.3f}", f"{e.new:.3f}", f"{e.old / e.new:.2f}×", e.told] for e in found]
    headers = ["case", "provider", "how", "old ms", "new ms", "old / new", "beyond both spreads"]
    return Table(f"against {describe(old)}", headers, rows, [])
