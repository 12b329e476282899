"""Pictures of your own runs: what their adapters hold, what they found case by case, and how they compare.

    python -m peft_kernels plots FOLDER [FOLDER ...] [--out FOLDER] [--metric NAME]

FOLDER is an OUT folder of a script of examples/, a run of the demo (demo_out/runs/…), or an adapter as save_pretrained
writes it. Whatever is there is drawn; a line for each picture, and for what is left out, says so.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from peft_kernels.plots import cases, curves, factors
from peft_kernels.plots.runs import Run, read_runs
from peft_kernels.plots.style import save

POINTS = 200  # of a curve of losses: each is the mean of as many steps as leave about so many


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 where something cannot be read or nothing is there to draw."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_kernels plots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("plots"), help="for the pictures (default: %(default)s)")
    parser.add_argument("--metric", help="what compares the runs (default: the mean of recalls, or of accuracies)")
    given = parser.parse_args(argv)
    drawn, pictures = 0, cases.Pictures()
    try:
        runs = read_runs(given.folder)
        known = list(dict.fromkeys(name for run in runs for name in run.metrics))
        if given.metric is not None and given.metric not in known:
            raise ValueError(f"--metric: no run has {given.metric!r}; there are: {', '.join(known) or 'none'}")
        for name, made in [*of_each(runs, pictures), *of_all(runs, given.metric)]:
            if isinstance(made, str):
                print(f"left out: {name}: {made}")
                continue
            path = given.out / f"{name.replace('/', '-')}.png"
            save(made(), path)
            drawn += 1
            print(path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if pictures.missing:
        first, others = next(iter(pictures.missing)), len(pictures.missing) - 1
        print(f"{first}: no image that can be read, as {others} others: empty frames stand for them", file=sys.stderr)
    if not drawn:
        print("error: there is nothing to draw", file=sys.stderr)
    return int(not drawn)


Made = Callable[[], Figure] | str  # a picture, or why there is none


def of_each(runs: Sequence[Run], pictures: cases.Pictures) -> Iterator[tuple[str, Made]]:
    """(name, picture) of what belongs to one run."""
    for run in runs:
        yield f"{run.name}-factors", _factors(run)
        if not run.cases:
            yield f"{run.name}-cases", "no predictions.jsonl"
        for (mode, kind), own in run.cases.items():
            end = f", {mode}" if mode else ""
            yield f"{run.name}-{kind}{end.replace(', ', '-')}", partial(cases.draw, own, pictures, run.name + end)


def _factors(run: Run) -> Made:
    if not run.adapters:
        return "no adapter"
    named = [(what, factors.factors(folder)) for what, folder in run.adapters]
    (first, before), (last, after) = named[0], named[-1]
    if not after:
        return "an adapter of a method without factors"
    title = f"{run.name}: learned parameters"
    if len(named) == 1:
        return partial(factors.histograms, after, title=title + (f" after {last}" if last else ""))
    return partial(factors.histograms, after, before, title=title, names=(first, last))


def of_all(runs: Sequence[Run], metric: str | None) -> Iterator[tuple[str, Made]]:
    """(name, picture) of what compares the runs; with one of them, its score and loss alone."""
    order = [run.name for run in runs]
    yield "scores", _scores(runs, metric)
    by = (
        "epoch" if any("epoch" in record and "step" not in record for run in runs for record in run.records) else "step"
    )
    curves_of = {run.name: curve for run in runs if (curve := run.scores(metric, by))}
    if any(len(curve) > 1 for curve in curves_of.values()):
        unit, label = _percent([value for curve in curves_of.values() for _, value in curve], metric)
        scaled = {name: [(at, unit * value) for at, value in curve] for name, curve in curves_of.items()}
        yield f"score_by_{by}", partial(curves.lines, scaled, label, by=by, order=order)
    else:
        yield f"score_by_{by}", "no run was evaluated twice"
    for by in ("step", "epoch"):
        losses = {run.name: run.losses for run in runs if run.losses_by == by and len(run.losses) > 1}
        if losses:
            window = max(1, max(map(len, losses.values())) // POINTS)
            label = "loss" if window == 1 else f"loss, mean of {window} {by}s"
            yield f"loss_by_{by}", partial(curves.lines, losses, label, by=by, window=window, order=order)
    if not any(len(run.losses) > 1 for run in runs):
        yield "loss_by_step", "no run has two losses"


def _scores(runs: Sequence[Run], metric: str | None) -> Made:
    scored = [(run, curve[-1][1]) for run in runs if (curve := run.scores(metric)) and run.trained is not None]
    if len(scored) < 2:
        return "takes two runs with a score whose parameters run.json or an adapter's file counts"
    unit, label = _percent([score for _, score in scored], metric)
    points = [curves.Point(run.name, run.trained, unit * score, run.stored_bytes) for run, score in scored]
    return partial(curves.bubbles, points, label, order=[run.name for run in runs])


def _percent(values: Sequence[float], metric: str | None) -> tuple[float, str]:
    """(factor, label): fractions are shown in percent."""
    label = metric or "mean of recalls or accuracies"
    return (100, f"{label}, %") if all(0 <= value <= 1 for value in values) else (1, label)


if __name__ == "__main__":
    sys.exit(main())
