"""Pictures of the runs, as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from safetensors import safe_open

from peft_kernels.adapters.checkpoint import WEIGHTS_FILE
from peft_kernels.demo.report import Row
from peft_kernels.demo.scenes import Scenes, words

matplotlib.use("Agg")


def plot_scores(path: Path, rows: Sequence[Row], title: str) -> None:
    """Mean score against trained parameters; a bubble's area is what is stored, a cross is of weights that are not."""
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for row in rows:
        score = mean(row["scores"].values())
        if not row["trained"]:
            axes.axhline(score, color="grey", linestyle=":", label=row["method"])
            continue
        if not row["kept"]:
            axes.scatter(row["trained"], score, marker="x", s=25, label=row["method"])
            continue
        axes.scatter(row["trained"], score, s=20 + row["stored_bytes"] / 1e3, alpha=0.5)
        axes.annotate(row["method"], (row["trained"], score), fontsize=8, ha="right", va="bottom")
    axes.set(xscale="log", xlabel="trained parameters", ylabel="mean score, %", title=title)
    axes.margins(0.15)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    _save(figure, path)


def plot_curves(path: Path, curves: dict[str, Sequence[float]], label: str, log: bool = False, window: int = 1) -> None:
    """One line for each name, by step; window: how many steps a point averages."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name, values in curves.items():
        smooth = [mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
        axes.plot(range(1, len(values) + 1), smooth, label=name)
    axes.set(xlabel="step", ylabel=label, yscale="log" if log else "linear")
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_factors(path: Path, run: Path) -> None:
    """How the factors of an Aurora run are distributed after training: U, V and what scales each slot.

    run: its folder
    """
    with safe_open(run / WEIGHTS_FILE, "pt") as file:
        own = {name: file.get_tensor(name) for name in file.keys() if name.startswith("aurora.shared.")}  # noqa: SIM118
    of = {kind: [t for name, t in own.items() if f".{kind}" in name] for kind in ("down.", "up.", "lam", "slots")}
    factors = {"U": of["down."][0], "V": of["up."][0], "λ ∘ P": of["lam"][0] * of["slots"][0]}
    figure = Figure(figsize=(4 * len(factors), 3.2))
    for axes, (name, values) in zip(figure.subplots(1, len(factors)), factors.items()):
        axes.hist(values.flatten().numpy(), bins=60)
        axes.set(title=name, yticks=[])
    _save(figure, path)


def plot_retrieval(path: Path, scenes: Scenes, shown: Sequence[Sequence[int]], method: str) -> None:
    """For the first captions the images that a method finds first; a green frame is the right one."""
    columns = len(shown[0])
    figure = Figure(figsize=(2.3 * columns, 2.4 * len(shown)))
    figure.suptitle(method)
    panels = figure.subplots(len(shown), columns, squeeze=False)
    for text, found in enumerate(shown):
        for axes, image in zip(panels[text], found):
            axes.imshow(scenes.images[image, 0].cpu().numpy(), cmap="gray", vmin=-1, vmax=1)
            for side in axes.spines.values():
                side.set(color="green" if image == text else "lightgrey", linewidth=4 if image == text else 1)
            axes.set(xticks=[], yticks=[])
        panels[text][columns // 2].set_title(words(scenes.tokens[text]), fontsize=9)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
