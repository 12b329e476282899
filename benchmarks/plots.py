"""Pictures of a run, as PNG files: for each operation how near to the floor everyone comes, and a roofline of all."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image  # which matplotlib needs, too

from .results import describe


def plot(run: dict, folder: Path, prefix: str = "") -> list[Path]:
    """Returns the paths of what it has drawn into `folder`, which is made if it is not there."""
    cases = [case for case in run["cases"] if case["results"]]
    paths = {op: folder / f"{prefix}{op}.png" for op in dict.fromkeys(case["op"] for case in cases)}
    folder.mkdir(parents=True, exist_ok=True)
    for op, path in paths.items():
        bars(path, [case for case in cases if case["op"] == op], f"{op}\n{describe(run)}")
    if not cases:
        return []
    roofline = folder / f"{prefix}roofline.png"
    _roofline(roofline, cases, describe(run))
    return [*paths.values(), roofline]


def bars(path: Path, cases: Sequence[dict], title: str) -> None:
    """A panel for each case: milliseconds of every provider, and the floor as a line; ours are dark.

    On a GPU a bar is the time in a CUDA graph, and beside it in words the eager one, which is many times as long where
    the host is slow.
    """
    figure = Figure(figsize=(8, 1 + sum(0.7 + 0.25 * len(case["results"]) for case in cases)))
    heights = [2 + len(case["results"]) for case in cases]
    for axes, case in zip(figure.subplots(len(cases), squeeze=False, height_ratios=heights)[:, 0], cases):
        rows = case["results"][::-1]
        times = [row["graph_ms"] or row["ms"] for row in rows]
        colors = ["tab:blue" if row["backend"] else "lightsteelblue" for row in rows]
        axes.barh([row["provider"] for row in rows], times, color=colors)
        for index, (row, time) in enumerate(zip(rows, times)):
            share = f" ({row['percent_of_floor']:.0f} % of its floor)" if row["percent_of_floor"] else ""
            eager = f", eager {row['ms']:.3g}" if row["graph_ms"] else ""
            axes.text(time, index, f" {time:.3g}{share}{eager}", va="center", fontsize=7)
        if floors := [row["floor_ms"] for row in rows if row["backend"] and row["floor_ms"]]:
            axes.axvline(floors[0], color="tab:red", linestyle=":")
        axes.set_title(case["title"], fontsize=8, loc="left")
        axes.tick_params(labelsize=7)
        axes.set_xlim(0, 1.6 * max(times))
    graphs = any(row["graph_ms"] for case in cases for row in case["results"])
    axes.set_xlabel(f"ms{' in a CUDA graph' if graphs else ''}; red: the floor", fontsize=8)
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


def _roofline(path: Path, cases: Sequence[dict], title: str) -> None:
    """Rates of the compulsory work against FLOP per compulsory byte: ours filled, peers hollow; a roof per dtype."""
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    ops = list(dict.fromkeys(case["op"] for case in cases))
    points = [(case, row) for case in cases for row in case["results"]]
    reach = [1e3 * row["tflop_per_s"] / row["gb_per_s"] for _, row in points]  # FLOP per byte
    for (case, row), intensity in zip(points, reach):
        color = f"C{ops.index(case['op'])}"
        fill = color if row["backend"] else "none"
        axes.scatter(intensity, row["tflop_per_s"], s=18, edgecolors=color, facecolors=fill)
    for index, op in enumerate(ops):
        axes.scatter([], [], color=f"C{index}", label=op)
    bandwidth = median(case["rates"]["bytes_per_s"] for case in cases)
    for dtype in dict.fromkeys(case["dtype"] for case in cases):
        peaks = [case["rates"]["flops_per_s"].get(dtype) for case in cases if case["dtype"] == dtype]
        if None in peaks:
            continue
        ridge = median(peaks) / bandwidth
        roof = sorted({min(reach) / 2, ridge, max(*reach, ridge) * 2})
        axes.plot(roof, [min(bandwidth * x, median(peaks)) / 1e12 for x in roof], color="grey", linewidth=1)
        axes.text(roof[-1], median(peaks) / 1e12, dtype, fontsize=7, ha="right", va="bottom")
    axes.set(xscale="log", yscale="log", xlabel="compulsory FLOP / byte", ylabel="TFLOP/s", title=title)
    axes.title.set_fontsize(9)
    axes.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(32).save(path, optimize=True)
