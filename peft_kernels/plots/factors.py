"""How the factors of a trained adapter are distributed, as the figures of Aurora's and MoIL's papers show them.

    Aurora       U and V of each pair of block widths, and what scales the slots: λ ∘ P ("cp"), or P and C ("tucker");
                 apart for each modality with sharing "modality", all layers' together with "none"
    LoRA         A, B;  of the peft library's checkpoints, too
    MoIL         A, B of the pairs, A_d, B_d of the transforms
    UniAdapter   D, and U of all modalities together

Heads, gates and biases are left out. MoIL's W̄ - W0 is not drawn: no adapter's file has W0.
"""

import math
import re
from collections.abc import Mapping
from os import PathLike

import torch
from matplotlib.figure import Figure
from torch import Tensor

from peft_kernels.adapters.checkpoint import Checkpoint
from peft_kernels.plots.style import AFTER, BEFORE

BINS, _COLUMNS = 60, 4  # bins at most
# {method: {factor: names of its tensors}}
_NAMES = {
    "lora": {"A": r".+\.down", "B": r".+\.up"},
    "peft": {"A": r".+\.lora_A(\.\w+)?\.weight", "B": r".+\.lora_B(\.\w+)?\.weight"},
    "moil": {
        "A": r"(?!moil\.transforms\.).+\.down\.\d+",
        "B": r"(?!moil\.transforms\.).+\.up\.\d+",
        "A_d": r"moil\.transforms\.\d+\.down",
        "B_d": r"moil\.transforms\.\d+\.up",
    },
    "uniadapter": {"D": r"uniadapter\..+\.down", "U": r"uniadapter\..+\.up\.\w+"},
}


def factors(folder: str | PathLike) -> dict[str, Tensor]:
    """{factor: all of its values, float32, in one row} of what `save_pretrained` wrote; {} for a method without.

    Raises FileNotFoundError or ValueError, naming the file, as `Checkpoint` does.
    """
    checkpoint = Checkpoint(folder)
    method = checkpoint.config.get("method", "peft" if "peft_type" in checkpoint.config else None)
    if method == "aurora":
        found = _aurora(checkpoint)
    else:
        found = {}
        for factor, names in _NAMES.get(method, {}).items():
            own = [checkpoint.value(name) for name in sorted(checkpoint.shapes) if re.fullmatch(names, name)]
            found |= {factor: own} if own else {}
    return {factor: torch.cat([each.float().flatten() for each in own]) for factor, own in found.items()}


def _aurora(checkpoint: Checkpoint) -> dict[str, list[Tensor]]:
    """By factor, the decompositions' own ones behind each other."""
    scopes: dict[str, dict[str, Tensor]] = {}
    for name in sorted(checkpoint.shapes):
        if match := re.fullmatch(r"aurora\.(.+)\.(down\.\w+|up\.\w+|slots|lam|modes)", name):
            scopes.setdefault(match[1], {})[match[2]] = checkpoint.value(name)
    by_modality = checkpoint.config.get("sharing") == "modality"
    pairs = {kind.partition(".")[2] for own in scopes.values() for kind in own if "." in kind}
    found: dict[str, list[Tensor]] = {}
    for scope, own in scopes.items():
        for kind, value in own.items():
            letter, _, pair = kind.partition(".")
            if letter == "lam":
                continue
            if letter == "slots" and "lam" in own:
                letter, value = "λ ∘ P", own["lam"] * value
            title = {"down": "U", "up": "V", "slots": "P", "modes": "C"}.get(letter, letter)
            title += f", {pair.replace('x', ' → ')}" if pair and len(pairs) > 1 else ""
            title += f", {scope}" if by_modality else ""
            found.setdefault(title, []).append(value)
    order = ("U", "V", "λ ∘ P", "P", "C")
    return dict(sorted(found.items(), key=lambda item: order.index(item[0].partition(",")[0])))


def histograms(
    after: Mapping[str, Tensor], before: Mapping[str, Tensor] | None = None, *, title: str = "", names: tuple = ()
) -> Figure:
    """A panel for each factor. before: the same factors earlier, as an outline;  names: of (before, after)"""
    columns = min(_COLUMNS, len(after))
    rows = math.ceil(len(after) / columns)
    figure = Figure(figsize=(max(5.0, 3.1 * columns), 0.8 + 2.6 * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08)
    figure.suptitle(title, fontsize=11, parse_math=False)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (factor, values) in zip(panels, after.items()):
        earlier = before.get(factor) if before else None
        both = values if earlier is None else torch.cat([values, earlier])
        reach = (both.min().item(), both.max().item())
        bins = min(BINS, 5 + int(values.numel() ** 0.5))
        axes.hist(values.numpy(), bins=bins, range=reach, color=AFTER, alpha=0.75)
        if earlier is not None:
            axes.hist(earlier.numpy(), bins=bins, range=reach, color=BEFORE, histtype="step", linewidth=1.3)
        axes.set_title(factor, fontsize=11)
        axes.set_xlabel(f"{values.numel():,} values, σ = {values.std(correction=0):.2g}", fontsize=8)
        axes.set_yticks([])
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=5)
    for axes in panels[len(after) :]:
        axes.remove()
    if before:
        patches = [figure.axes[0].patches[-1], figure.axes[0].patches[0]]  # outline, bars
        figure.legend(patches, names, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure
