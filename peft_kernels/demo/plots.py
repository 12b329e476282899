"""Pictures of the runs, as PNG files: what `peft_kernels.plots` draws, of the demo's own rows, runs and scenes."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from torch import Tensor

from peft_kernels.demo.report import Row
from peft_kernels.demo.scenes import Scenes, words
from peft_kernels.plots import cases, curves, factors
from peft_kernels.plots.style import save as _save


def plot_scores(path: Path, rows: Sequence[Row], title: str) -> None:
    """Mean score against trained parameters; a bubble's area is what is stored, a cross is of weights that are not."""
    points = [
        curves.Point(
            row["method"], row["trained"], mean(row["scores"].values()), row["stored_bytes"] if row["kept"] else None
        )
        for row in rows
    ]
    _save(curves.bubbles(points, "mean score, %", title), path)


def plot_curves(path: Path, found: dict[str, Sequence[float]], label: str, log: bool = False, window: int = 1) -> None:
    """One line for each name, by step; window: how many steps a point averages."""
    by_step = {name: list(enumerate(values, start=1)) for name, values in found.items()}
    _save(curves.lines(by_step, label, log=log, window=window), path)


def plot_watched(path: Path, found: dict[str, Sequence[tuple[float, float]]], label: str) -> None:
    """One line for each name, through (step, value)."""
    _save(curves.lines(found, label), path)


def plot_factors(path: Path, run: Path) -> None:
    """How the factors of a run's adapter are distributed after training. run: its folder"""
    _save(factors.histograms(factors.factors(run)), path)


def plot_retrieval(path: Path, scenes: Scenes, shown: Sequence[Sequence[int]], method: str) -> None:
    """For the first captions the images that a method finds first; a green frame is the right one."""
    rows = [
        (words(scenes.tokens[text]), [([_pixels(scenes.images[image])], image == text, "") for image in found])
        for text, found in enumerate(shown)
    ]
    _save(cases.image_rows(rows, method), path)


def _pixels(image: Tensor) -> np.ndarray:
    """(3, height, width) from -1 to 1 -> (height, width, 3) bytes"""
    return ((image.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).cpu().numpy()
