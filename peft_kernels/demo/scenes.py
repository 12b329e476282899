"""Scenes of two real handwritten digits with captions and questions, in two domains, and splits that share no digit.

    source    bright strokes at the ends of the middle row or column     "a seven left of a three"
    target    dark strokes, each digit turned by a quarter, one of       "the three stands right of the seven"
              them a row or column off

Captions begin with the left or upper digit in the source domain, with the other one in the target domain. A digit's
image occurs in one split only, and no two scenes of a validation or test split have the same story, that is caption:
a retrieval has one answer.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

SIZE = 24  # pixels; a digit has 8 × 8
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = ("left", "right", "above", "below")
STORIES = 180  # 10 · 9 pairs of different digits, along two axes
DOMAINS = ("source", "target")
SPLITS = ("pretraining", "train", "validation", "test")
_SHARES = (900, 400, 200, 297)  # of 1,797 digits
_SPECIAL = ("[pad]", "[cls]", "[sep]", "[unk]")
# Side by side, one over the other; {0} is the left or upper digit
_CAPTIONS = {
    "source": ("a {0} left of a {1}", "a {0} above a {1}"),
    "target": ("the {1} stands right of the {0}", "the {1} hangs beneath the {0}"),
}
_QUESTIONS = {"source": "which digit is {} the {}", "target": "name what stands {} the {}"}
_PLACES = {
    "source": ("left of", "right of", "above", "below"),
    "target": ("left of", "right of", "over", "beneath"),
}
Place = tuple[int, int]  # of a digit's upper left pixel: row, column


class Scenes(NamedTuple):
    """images: (N, 3, 24, 24) in [-1, 1];  tokens, mask: (N, T) captions
    questions, question_mask: (N, Tq) which digit stands so to `second`;  the answer is `first`
    first, second, relation: (N,) two digits, and how the first stands to the second: an index into RELATIONS
    """

    images: Tensor
    tokens: Tensor
    mask: Tensor
    questions: Tensor
    question_mask: Tensor
    first: Tensor
    second: Tensor
    relation: Tensor

    def take(self, rows: Tensor) -> "Scenes":
        return Scenes(*(each[rows] for each in self))

    def to(self, device: torch.device | str) -> "Scenes":
        return Scenes(*(each.to(device) for each in self))

    def count(self) -> int:
        return self.images.shape[0]

    def story(self) -> Tensor:
        """(N,) one number for scenes of one caption: the left or upper digit, the other one, the axis."""
        swapped = self.relation % 2 == 1  # right, below
        near, far = torch.where(swapped, self.second, self.first), torch.where(swapped, self.first, self.second)
        return (near * 10 + far) * 2 + self.relation // 2

    def draw(self, batch: int) -> "Scenes":
        """A batch, by the CPU's generator on every device."""
        return self.take(torch.randint(self.count(), (batch,)).to(self.images.device))


def vocabulary() -> list[str]:
    texts = [text for domain in DOMAINS for text in (*_CAPTIONS[domain], _QUESTIONS[domain], *_PLACES[domain])]
    words = {word for text in texts for word in text.split() if "{" not in word}
    return [*_SPECIAL, *NUMBERS, *sorted(words)]


_INDEX = {word: index for index, word in enumerate(vocabulary())}


def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
    """(ids, mask), each (N, T) with T the longest text's, [cls] first and [sep] last"""
    rows = [[1, *(_INDEX.get(word, 3) for word in text.split()), 2] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, (ids != 0).long()


def words(ids: Tensor) -> str:
    """The text of one row of `tokenize`."""
    return " ".join(vocabulary()[i] for i in ids.tolist() if i > 2)


@cache
def digit_rows(split: str) -> Tensor:
    """Which of scikit-learn's digits belong to a split: the same ones for every seed."""
    order = torch.randperm(sum(_SHARES), generator=torch.Generator().manual_seed(0))
    return order.split(_SHARES)[SPLITS.index(split)]


@cache
def _digits(split: str) -> tuple[Tensor, list[int]]:
    """(images (n, 8, 8) in [0, 1], labels) of one split."""
    from sklearn.datasets import load_digits

    data, rows = load_digits(), digit_rows(split)
    return torch.from_numpy(data.images).float()[rows] / 16, data.target[rows.numpy()].tolist()


def make_scenes(domain: str, split: str, count: int, distinct: bool = False) -> Scenes:
    """The same scenes in every call.

    domain: of DOMAINS;  split: of SPLITS;  count: how many scenes;  distinct: no story twice
    Raises ValueError where there are not that many stories.
    """
    if distinct and count > STORIES:
        raise ValueError(f"count: expected at most {STORIES} scenes of distinct stories, got {count}")
    images, labels = _digits(split)
    generator = torch.Generator().manual_seed(SPLITS.index(split))

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    canvas, facts, seen = torch.zeros(count, SIZE, SIZE), [], set()
    while len(facts) < count:
        near, far, axis = draw(len(labels)), draw(len(labels)), draw(2)
        story = labels[near], labels[far], axis
        if labels[near] == labels[far] or (distinct and story in seen):
            continue
        seen.add(story)
        places = _source_places(axis) if domain == "source" else _target_places(axis, draw)
        for digit, (row, column) in zip((near, far), places):
            stroke = images[digit] if domain == "source" else images[digit].rot90()
            canvas[len(facts), row : row + 8, column : column + 8] = stroke
        facts.append((*story, draw(2)))
    if domain == "target":
        canvas = 1 - canvas
    captions = [_CAPTIONS[domain][axis].format(NUMBERS[near], NUMBERS[far]) for near, far, axis, _ in facts]
    # Asked for the near digit, or for the far one
    asked = [(far, near, 2 * axis + 1) if other else (near, far, 2 * axis) for near, far, axis, other in facts]
    questions = [_QUESTIONS[domain].format(_PLACES[domain][r], NUMBERS[b]) for _, b, r in asked]
    pixels = (2 * canvas - 1)[:, None].expand(-1, 3, -1, -1).contiguous()
    return Scenes(pixels, *tokenize(captions), *tokenize(questions), *(torch.tensor(each) for each in zip(*asked)))


def _source_places(axis: int) -> tuple[Place, Place]:
    """The ends of the middle row or column."""
    return ((8, 0), (8, 16)) if axis == 0 else ((0, 8), (16, 8))


def _target_places(axis: int, draw: Callable[[int], int]) -> tuple[Place, Place]:
    """The opposite ends of two neighbouring rows (columns)."""
    near, far = ((0, 8), (8, 0), (8, 16), (16, 8))[draw(4)]
    return ((near, 0), (far, 16)) if axis == 0 else ((0, near), (16, far))
