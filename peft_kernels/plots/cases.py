"""What a model found, case by case: the lines of predictions.jsonl as pictures, what is right green, what is wrong red.

    text_to_image   a caption and the images found first; where the right one is not among them, it stands at the end
    image_to_text   an image and the texts found first, likewise
    answer          an image, a question, what was answered, and what would have been right

A video, or a pair of images, is a strip of frames. Half of the cases shown are right and half are wrong, as far as
there are any, evenly spread over the file: the same file gives the same picture.
"""

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image  # which matplotlib needs, too

from peft_kernels.plots.style import RIGHT, UNKNOWN, WRONG

FRAMES, _HEIGHT, _GAP = 4, 160, 6  # frames of a strip; their pixels, and those between two
_FOUND, _STRIPS = 5, 3  # images that are shown of those found, and strips
_IMAGE, _STRIP = (1.9, 2.0), (3.6, 1.5)  # inches of one of them and its text
_TEXTS = 5
_CASES = {"text_to_image": 6, "image_to_text": 6, "answer": 8}
Case = dict[str, Any]


class Pictures:
    """Reads image files, each once. missing: the files that could not be read, in order"""

    def __init__(self) -> None:
        self.missing: dict[str, None] = {}
        self._read: dict[str, np.ndarray] = {}

    def frames(self, files: Sequence[str]) -> list[np.ndarray | str]:
        """(height, width, 3) of some frames, evenly spread; of a file that cannot be read its name."""
        return [self._frame(file) for file in spread(files, FRAMES)]

    def _frame(self, file: str) -> np.ndarray | str:
        if file not in self._read and file not in self.missing:
            try:
                with Image.open(file) as image:
                    width = max(1, round(image.width * _HEIGHT / image.height))
                    self._read[file] = np.asarray(image.convert("RGB").resize((width, _HEIGHT)))
            except (OSError, ValueError):
                self.missing[file] = None
        return self._read.get(file, Path(file).name)


def spread(values: Sequence, count: int) -> list:
    """At most `count` of them, evenly spaced, the first and the last included."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / max(1, count - 1))] for i in range(count)]


def is_right(case: Case) -> bool | None:
    """Was the right one found first, or did at least half of the annotators' score come? None where nobody knows."""
    if case["kind"] == "answer":
        return None if case["score"] is None else case["score"] >= 0.5
    return case["rank"] == 1


def chosen(cases: Sequence[Case], count: int) -> list[Case]:
    """Right ones first. Of each sort half of `count`, or more where the other has fewer."""
    right = [case for case in cases if is_right(case) is not False]
    wrong = [case for case in cases if is_right(case) is False]
    rights = min(len(right), max((count + 1) // 2, count - len(wrong)))
    return spread(right, rights) + spread(wrong, count - rights)


def draw(cases: Sequence[Case], pictures: Pictures, name: str = "") -> Figure:
    """Of cases of one kind. name: the run's, which the title begins with"""
    kind = cases[0]["kind"]
    known = [right for case in cases if (right := is_right(case)) is not None]
    told = "right" if kind == "answer" else "found right at the first place"
    title = f"{name}, {kind.replace('_', ' ')}" + (f": {sum(known):,} of {len(known):,} {told}" if known else "")
    return _DRAWN[kind](chosen(cases, _CASES[kind]), pictures, title)


# ---- retrieval ------------------------------------------------------------------------------------------------------


def _images_of_texts(cases: Sequence[Case], pictures: Pictures, title: str) -> Figure:
    strips = any(len(found) > 1 for case in cases for found in case["found"])
    shown = _STRIPS if strips else _FOUND
    rows = []
    for case in cases:
        row = [(pictures.frames(found), found == case["right"], "") for found in case["found"][:shown]]
        if case["rank"] > shown:
            row.append((pictures.frames(case["right"]), True, f"right: {_place(case['rank'])}"))
        rows.append((case["text"], row))
    return image_rows(rows, title, _STRIP if strips else _IMAGE)


def image_rows(
    rows: Sequence[tuple[str, Sequence[tuple[list[np.ndarray | str], bool, str]]]],
    title: str,
    size: tuple[float, float] = _IMAGE,
) -> Figure:
    """rows: each a text above its images, which are (frames, is it right?, a word below);  size: of one, in inches"""
    columns = max(len(row) for _, row in rows)
    width, height = size
    figure = _figure(width * columns, height * len(rows), title)
    for part, (text, row) in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows):
        fitting = _fitting(text, int(11 * width * columns))
        part.suptitle(fitting, x=0.01, ha="left", fontsize=9, parse_math=False)
        panels = part.subplots(1, columns, squeeze=False)[0]
        for axes, (frames, right, below) in zip(panels, row):
            show(axes, frames, RIGHT if right else WRONG)
            axes.set_xlabel(below, fontsize=8, color=RIGHT)
        for axes in panels[len(row) :]:
            axes.set_axis_off()
    return figure


def _texts_of_images(cases: Sequence[Case], pictures: Pictures, title: str) -> Figure:
    strips = [pictures.frames(case["images"]) for case in cases]
    width = 4.4 if max(map(len, strips)) > 1 else 2.2
    figure = _figure(width + 6.3, 1.6 * len(cases), title)
    panels = figure.subplots(len(cases), 2, squeeze=False, width_ratios=(width, 6.3))
    for (left, right), case, frames in zip(panels, cases, strips):
        show(left, frames, RIGHT if is_right(case) else WRONG)
        texts = [(f"{i}. {text}", text in case["right"]) for i, text in enumerate(case["found"][:_TEXTS], start=1)]
        if case["rank"] > _TEXTS:
            texts.append((f"right: {_place(case['rank'])}, {case['right'][0]}", True))
        right.set_axis_off()
        for line, (text, good) in enumerate(texts):
            text = textwrap.shorten(text, 95, placeholder=" …")
            height = 1 - (line + 0.5) / max(len(texts), _TEXTS)
            colour = RIGHT if good else WRONG
            right.text(0, height, text, fontsize=9, color=colour, va="center", parse_math=False)
    return figure


def _place(rank: int) -> str:
    return f"number {rank:,}"


# ---- answers --------------------------------------------------------------------------------------------------------


def _answers(cases: Sequence[Case], pictures: Pictures, title: str) -> Figure:
    strips = [pictures.frames(case["images"]) for case in cases]
    several = max(map(len, strips)) > 1
    columns, width, height = (2, 5.0, 2.3) if several else (4, 2.7, 3.0)
    columns = min(columns, len(cases))
    rows = -(-len(cases) // columns)
    figure = _figure(width * columns, height * rows, title)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    letters = int(13 * width)
    for axes, case, frames in zip(panels, cases, strips):
        colour = {True: RIGHT, False: WRONG, None: UNKNOWN}[is_right(case)]
        show(axes, frames, colour)
        axes.set_title(_fitting(case["text"], letters), fontsize=9, parse_math=False)
        told = [_fitting(f"said: {case['answer']}", letters)]
        if case["answers"]:
            most = [answer for answer, _ in Counter(case["answers"]).most_common(3)]
            told.append(_fitting(f"right: {', '.join(most)}", letters))
        if 0 < (case["score"] or 0) < 1:
            told.append(f"score: {case['score']:.1f}")
        axes.set_xlabel("\n".join(told), fontsize=9, color=colour, parse_math=False)
    for axes in panels[len(cases) :]:
        axes.remove()
    return figure


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(max(width, 4.5), height + 0.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def _fitting(text: str, letters: int) -> str:
    """In at most two lines."""
    return textwrap.fill(textwrap.shorten(text, 2 * letters - 8, placeholder=" …"), letters)


_DRAWN: dict[str, Callable[[Sequence[Case], Pictures, str], Figure]] = {
    "text_to_image": _images_of_texts,
    "image_to_text": _texts_of_images,
    "answer": _answers,
}


# ---- one image ------------------------------------------------------------------------------------------------------


def show(axes: Axes, frames: Sequence[np.ndarray | str], colour: str) -> None:
    """Frames side by side in a coloured frame; of what could not be read an empty one with its name."""
    parts = [np.full((_HEIGHT, _HEIGHT, 3), 238, np.uint8) if isinstance(f, str) else f for f in frames]
    left = 0
    gap = np.full((_HEIGHT, _GAP, 3), 255, np.uint8)
    for part, frame in zip(parts, frames):
        if isinstance(frame, str):
            name = "\n".join(textwrap.wrap(frame, 14))
            axes.text(left + _HEIGHT / 2, _HEIGHT / 2, name, ha="center", va="center", fontsize=6, parse_math=False)
        left += part.shape[1] + _GAP
    axes.imshow(np.concatenate([piece for part in parts for piece in (gap, part)][1:], axis=1))
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(color=colour, linewidth=3)
