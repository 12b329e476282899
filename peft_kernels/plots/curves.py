"""Several runs in one picture: scores against sizes, and anything by step."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from peft_kernels.plots.style import colour

_LARGEST = 1500  # of a bubble's area, in square points
Curve = Sequence[tuple[float, float]]  # (step, value)


class Point(NamedTuple):
    """trained: parameters, 0 for a model as it came;  stored_bytes: None for weights that no file keeps"""

    name: str
    trained: int
    score: float
    stored_bytes: int | None


def bubbles(points: Sequence[Point], label: str, title: str = "", order: Sequence[str] = ()) -> Figure:
    """Score against trained parameters. A bubble's area is what is stored; a cross stands for what is not stored, a
    dotted line for a model that nothing was trained of.

    order: all names that get a colour, so that several pictures agree; otherwise those of the points
    """
    colours = _colours(order or [point.name for point in points])
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    largest = max((point.stored_bytes or 0 for point in points), default=0) or 1
    for name, trained, score, stored in points:
        if not trained:
            axes.axhline(score, color=colours[name], linestyle=":", label=name)
        elif stored is None:
            axes.scatter(trained, score, marker="x", s=30, color=colours[name], label=f"{name}\n{trained:,} trained")
        else:
            told = f"{name}\n{trained:,} trained, {_bytes(stored)} stored"
            axes.scatter(trained, score, s=_LARGEST * stored / largest, color=colours[name], alpha=0.4, linewidths=0)
            axes.scatter(trained, score, s=16, color=colours[name], label=told)  # to be seen, however small the bubble
    if any(point.trained for point in points):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k, 1M
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="trained parameters (bubbles: bytes stored)", ylabel=label, title=title)
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    return figure


def _colours(names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    return {name: colour(index) for index, name in enumerate(names)}


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def lines(
    curves: Mapping[str, Curve],
    label: str,
    *,
    by: str = "step",
    log: bool = False,
    window: int = 1,
    order: Sequence[str] = (),
) -> Figure:
    """One line for each name. window: how many points, itself the last, a point is the mean of;  order: as above"""
    colours = _colours(order or list(curves))
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        steps, values = zip(*curve)
        marker = "o" if len(steps) <= 30 else None
        axes.plot(steps, smooth(values, window), marker=marker, markersize=4, color=colours[name], label=name)
    axes.set(xlabel=by, ylabel=label, yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    return figure


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Means of the last `window` values, of fewer at the beginning."""
    return [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]
