"""Tables in markdown, and the cells that several of them have."""

import re
from collections.abc import Iterable, Sequence

FIGURES = {  # heading: what a result holds, its digits and unit
    "floor ms": ("floor_ms", 3, 1),
    "GB/s": ("gb_per_s", 1, 1),
    "TFLOP/s": ("tflop_per_s", 3, 1),
    "% of copy": ("percent_of_copy", 0, 1),
    "% of floor": ("percent_of_floor", 0, 1),
    "launches": ("launches", 0, 1),
    "MB moved": ("bytes", 1, 1e6),
    "MB saved": ("saved_bytes", 2, 1e6),
    "MB peak": ("peak_bytes", 1, 1e6),
}
NOTHING = "–"
FIGURE = rf"|{NOTHING}|[\d.]+(e[-+]\d+)?×?( \(.*\))?"


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An aligned table: words to the left, figures to the right. "" without rows."""
    if not (rows := list(rows)):
        return ""
    rows = [list(headers), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    numeric = [all(re.fullmatch(FIGURE, cell) for cell in column[1:]) for column in zip(*rows)]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(cells, widths, numeric)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numeric)]
    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])


def filled(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same without the columns that are empty throughout."""
    columns = [(head, *cells) for head, cells in zip(headers, zip(*rows)) if not {*cells} <= {NOTHING, ""}]
    heads, *lines = zip(*columns) if columns else [()]
    return markdown(heads, lines)


def number(value: float | None, digits: int, unit: float = 1) -> str:
    return NOTHING if value is None else f"{value / unit:.{digits}f}"


def figures(row: dict, headings: Iterable[str]) -> list[str]:
    return [number(row.get(key), digits, unit) for key, digits, unit in map(FIGURES.get, headings)]


def speed(case: dict, row: dict, provider: str, time: str = "ms") -> str:
    """How many times as fast as a provider: by the rounds of a CPU's run, by medians where there are none."""
    ratio = row.get("speed_vs", {}).get(provider) if time == "ms" else None
    other = next((each[time] for each in case["results"] if each["provider"] == provider), None)
    if ratio is None and other and row[time]:
        ratio = other / row[time]
    return NOTHING if ratio is None else f"{ratio:.2f}×"
