"""What an evaluation found, case by case: OUT/predictions.jsonl, one JSON object a line, the same for every task.

    answer          images, text (the question), answer, answers (right ones, [] if unknown), score (0 to 1, or null)
    text_to_image   text, found (the first images, each a list of files), right (files of the right one), rank (from 1)
    image_to_text   images, found (the first texts), right (all right texts), rank (from 1, of the first right one)

Every line has the data set's own key of its question, caption or image, too. Ranks are those that recall counts.
`python -m peft_kernels plots` reads it.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.data import Example
from common.training import save_lines
from peft_kernels.objectives import retrieval_ranks

MOST = 10  # candidates of a query that are kept


def save(folder: Path, rows: Iterable[dict[str, Any]], mode: str = "") -> None:
    """mode: of MoIL's weights, "live" or "teacher", in a file of its own; "" for what is kept"""
    name = f"predictions_{mode}.jsonl" if mode else "predictions.jsonl"
    save_lines(folder / name, rows)


def answer_rows(
    examples: Sequence[Example], predictions: dict[Any, str], accuracy: Callable[[Sequence[Example], dict], float]
) -> Iterable[dict[str, Any]]:
    """predictions: by the examples' keys;  accuracy: of examples with answers, in [0, 1]"""
    for example in examples:
        yield {
            "kind": "answer",
            "key": example.key,
            "images": list(example.images),
            "text": example.text,
            "answer": predictions[example.key],
            "answers": list(example.answers),
            "score": accuracy([example], predictions) if example.answers else None,
        }


def retrieval_rows(
    examples: Sequence[Example], places: dict[int, int], image_to_text: Tensor, text_to_image: Tensor
) -> Iterable[dict[str, Any]]:
    """examples: the texts, columns of both scores (images, texts);  places: {owner: row}"""
    owned: dict[int, list[int]] = {}
    for column, example in enumerate(examples):
        owned.setdefault(places[example.owner], []).append(column)
    images = {row: list(examples[columns[0]].images) for row, columns in owned.items()}
    positives = torch.tensor([places[example.owner] for example in examples])
    of_images = retrieval_ranks(image_to_text, positives).image_to_text.tolist()
    of_texts = retrieval_ranks(text_to_image, positives).text_to_image.tolist()
    for row, columns in sorted(owned.items()):
        yield {
            "kind": "image_to_text",
            "key": examples[columns[0]].key,
            "images": images[row],
            "found": [examples[column].text for column in best(image_to_text[row])],
            "right": [examples[column].text for column in columns],
            "rank": of_images[row],
        }
    for column, example in enumerate(examples):
        yield {
            "kind": "text_to_image",
            "key": example.key,
            "text": example.text,
            "found": [images[row] for row in best(text_to_image[:, column])],
            "right": images[places[example.owner]],
            "rank": of_texts[column],
        }


def best(scores: Tensor) -> list[int]:
    return scores.argsort(descending=True, stable=True)[:MOST].tolist()
