"""What retrieval and question answering are judged by: ranks and recall@k both ways, VQA accuracy.

    rank        the place of a query's best positive among all candidates, from 1
    recall@k    the fraction of queries whose rank is k or less
    accuracy    min(annotators who gave the answer / 3, 1), averaged over the sets that leave one annotator out

Sources: the VQA challenge's evaluation, https://visualqa.org/evaluation.html; recall@k as ALBEF and BLIP report it.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.checks import check_shape, check_tensor


class Recall(NamedTuple):
    """{k: a fraction in [0, 1]} of both directions; with videos for images, of video-text retrieval."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


class Ranks(NamedTuple):
    """(images,) and (texts,) int64, from 1: where each query finds its best positive."""

    image_to_text: Tensor
    text_to_image: Tensor


def _positive_mask(similarity: Tensor, positives: Tensor | None) -> Tensor:
    images, texts = similarity.shape
    if positives is None:
        if images != texts:
            raise ValueError(f"positives: expected for a similarity that is not square, got None and {images, texts}")
        return torch.eye(images, dtype=torch.bool, device=similarity.device)
    check_tensor("positives", positives, similarity, dtypes=(torch.bool, torch.int64))
    if positives.dtype == torch.bool:
        check_shape("positives", positives, (images, texts), "that of similarity")
    else:
        check_shape("positives", positives, (texts,), "one image for each text")
        if ((positives < 0) | (positives >= images)).any():
            raise ValueError(f"positives: expected images 0 to {images - 1}, got {positives.aminmax()}")
        positives = torch.arange(images, device=similarity.device)[:, None] == positives
    for name, axis in (("image", 1), ("text", 0)):
        alone = (~positives.any(dim=axis)).nonzero()
        if len(alone):
            raise ValueError(f"positives: expected one for every {name}, {name} {alone[0].item()} has none")
    return positives


def _ranks(similarity: Tensor, positives: Tensor) -> Tensor:
    best = similarity.masked_fill(~positives, -torch.inf).amax(dim=1, keepdim=True)
    return 1 + ((similarity >= best) & ~positives).sum(dim=1)


@torch.no_grad()
def retrieval_ranks(similarity: Tensor, positives: Tensor | None = None) -> Ranks:
    """Ranks of images finding texts and of texts finding images: their median and mean are published beside recall.

    similarity, positives: as of `recall_at_k`
    returns ranks: (image_to_text, text_to_image); an image is found by any of its texts

    A wrong candidate as similar as the best right one comes before it: of a constant similarity every rank is the last.
    Raises ValueError or TypeError, naming the argument; ValueError for NaN and for a query without positive.
    """
    check_tensor("similarity", similarity)
    if similarity.dim() != 2 or 0 in similarity.shape:
        raise ValueError(f"similarity: expected shape (images, texts), neither 0, got {tuple(similarity.shape)}")
    positives = _positive_mask(similarity, positives)
    if similarity.isnan().any():
        raise ValueError(f"similarity: expected no NaN, got {similarity.isnan().sum().item()} of them")
    return Ranks(_ranks(similarity, positives), _ranks(similarity.t(), positives.t()))


@torch.no_grad()
def recall_at_k(similarity: Tensor, ks: Sequence[int] = (1, 5, 10), positives: Tensor | None = None) -> Recall:
    """Recall@k of images finding texts and of texts finding images.

    similarity: (images, texts), any scale, larger is more similar; -inf for pairs that a second stage left out
    ks: integers ≥ 1
    positives: (texts,) int64, the image that each text describes; or (images, texts) bool; None: text i is image i's
    returns recalls: (image_to_text, text_to_image), each {k: fraction}; an image is found by any of its texts

    A wrong candidate as similar as the best right one comes before it: a constant similarity has a recall of 0.
    Raises ValueError or TypeError, naming the argument; ValueError for NaN and for a query without positive.
    """
    if not isinstance(ks, Sequence) or not all(isinstance(k, int) and not isinstance(k, bool) and k >= 1 for k in ks):
        raise ValueError(f"ks: expected integers ≥ 1, got {ks!r}")
    both = retrieval_ranks(similarity, positives)
    return Recall(*({k: (ranks <= k).double().mean().item() for k in ks} for ranks in both))


_DIGITS = {
    "none": "0",
    **{"zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"},
    **{"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_ARTICLES = {"a", "an", "the"}
# Contractions whose letters are no other word: its, ill, well, wed, were, hell and shell stay as they are.
_SHORTENED = {
    "n't": "do does did is are was were have has had ca could wo would should must need might ai",
    "'s": "he she that there what when where who how",
    "'m": "i",
    "'re": "they you what who",
    "'ve": "i they we you could should would might",
    "'ll": "it they you what who that",
    "'d": "they you it who",
}
_CONTRACTIONS = {"oclock": "o'clock", "maam": "ma'am", "yall": "y'all"}
for _end, _words in _SHORTENED.items():
    _CONTRACTIONS |= {f"{word}{_end}".replace("'", ""): f"{word}{_end}" for word in _words.split()}


def normalize_answer(answer: str) -> str:
    """An answer as the VQA challenge compares it: "The 1,000 dogs." and "1000 dogs" are the same.

    Lower case; without articles; zero to ten (and none) as digits; without commas inside numbers, and without full
    stops but before a digit; other punctuation as spaces, but for ' and : and signs such as $ and %; common
    contractions with their apostrophe; single spaces. Written from the challenge's description: the script that it
    released treats some rare punctuation (a hyphen beside a space) otherwise.
    """
    if not isinstance(answer, str):
        raise TypeError(f"answer: expected a str, got {type(answer).__name__}")
    answer = re.sub(r"(?<=\d),(?=\d)|\.(?!\d)", "", answer.lower())
    words = re.sub(r"[][(){}<>;,?!/\\\"`@_=+-]", " ", answer).split()
    words = (_DIGITS.get(word, word) for word in words if word not in _ARTICLES)
    return " ".join(_CONTRACTIONS.get(word, word) for word in words)


def vqa_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """The VQA challenge's accuracy, a fraction in [0, 1]: with ten annotators, 1, 2 or 3 who agree give 0.3, 0.6, 0.9.

    predictions: one answer for each question
    answers: for each question those of its annotators, at least 4 (VQA has 10); the same answer once for each
    Both are compared by `normalize_answer`. Raises ValueError or TypeError, naming the argument.
    """
    for name, value in (("predictions", predictions), ("answers", answers)):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"{name}: expected a list with one entry for each question, got {type(value).__name__}")
    if len(predictions) != len(answers) or not answers:
        raise ValueError(f"predictions: expected {len(answers)} (≥ 1), as answers, got {len(predictions)}")
    total = 0.0
    for index, (prediction, given) in enumerate(zip(predictions, answers)):
        if isinstance(given, str) or not isinstance(given, Sequence) or len(given) < 4:
            raise ValueError(f"answers[{index}]: expected a list of at least 4, got {given!r}")
        prediction, people = normalize_answer(prediction), len(given)
        agree = sum(normalize_answer(answer) == prediction for answer in given)
        kept, left = min(agree / 3, 1.0), min((agree - 1) / 3, 1.0)  # without one who disagrees; without one who agrees
        total += ((people - agree) * kept + agree * left) / people
    return total / len(answers)
