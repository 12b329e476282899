"""The demo's scenes say what is in their pictures, and no split sees another's digits."""

import pytest
import torch
from demo_cases import settings
from sklearn.datasets import load_digits

from peft_kernels.demo.scenes import (
    DOMAINS,
    NUMBERS,
    SIZE,
    SPLITS,
    STORIES,
    digit_rows,
    make_scenes,
    tokenize,
    vocabulary,
    words,
)

DIGITS = torch.from_numpy(load_digits().images).float() / 16
LABELS = load_digits().target.tolist()


def places(domain: str, image: torch.Tensor) -> dict[tuple[int, int], int]:
    """{(row, column) of the 3 × 3 grid: which of scikit-learn's digits stands there}, from the pixels alone."""
    strokes = (image[0] + 1) / 2 if domain == "source" else (1 - image[0]) / 2
    found = {}
    for row in range(3):
        for column in range(3):
            cell = strokes[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            if cell.any():
                cell = cell if domain == "source" else cell.rot90(-1)
                distance = (DIGITS - cell).abs().amax((1, 2))
                assert distance.min() < 1e-6, "not a digit as scikit-learn has it"
                found[row, column] = int(distance.argmin())
    return found


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("split", SPLITS)
def test_scenes_tell_what_they_show_with_digits_of_their_split(domain, split):
    scenes, own = make_scenes(domain, split, 40), set(digit_rows(split).tolist())
    for image, tokens, question, answer, story in zip(
        scenes.images, scenes.tokens, scenes.questions, scenes.first, scenes.story().tolist()
    ):
        found = places(domain, image)
        assert len(found) == 2 and set(found.values()) <= own
        (place, near), (other, far) = sorted(found.items(), key=lambda each: sum(each[0]))
        near, far = LABELS[near], LABELS[far]
        beside = abs(place[1] - other[1]) == 2
        assert beside != (abs(place[0] - other[0]) == 2)  # along one axis from end to end, and not along the other
        assert (place < other) if not beside else place[1] < other[1]
        assert story == (near * 10 + far) * 2 + (not beside)
        name = {
            ("source", True): "a {0} left of a {1}",
            ("source", False): "a {0} above a {1}",
            ("target", True): "the {1} stands right of the {0}",
            ("target", False): "the {1} hangs beneath the {0}",
        }
        assert words(tokens) == name[domain, beside].format(NUMBERS[near], NUMBERS[far])
        asked = words(question).split()
        told = " ".join(asked[3:-2])  # between "which digit is" or "name what stands" and "the …"
        is_near = told in ("left of", "above", "over")
        assert told in (("left of", "right of") if beside else ("above", "below", "over", "beneath"))
        assert (int(answer), NUMBERS.index(asked[-1])) == ((near, far) if is_near else (far, near))


def test_splits_share_no_digit():
    rows = [set(digit_rows(split).tolist()) for split in SPLITS]
    assert sum(map(len, rows)) == len(set().union(*rows)) == len(DIGITS)
    assert len(DIGITS.unique(dim=0)) == len(DIGITS)  # nor the same picture under two numbers


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_story_of_an_evaluation_is_told_once(split):
    scenes = make_scenes("target", split, STORIES, distinct=True)
    assert len(set(scenes.story().tolist())) == STORIES
    assert len({words(tokens) for tokens in scenes.tokens}) == STORIES
    with pytest.raises(ValueError, match=r"count: expected at most 180 .* got 181"):
        make_scenes("target", split, STORIES + 1, distinct=True)


def test_scenes_are_the_same_in_every_call():
    torch.manual_seed(1)
    first = make_scenes("target", "train", 20)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, make_scenes("target", "train", 20)))
    assert not torch.equal(first.images, make_scenes("target", "validation", 20).images)


def test_evaluations_are_distinct_and_trainings_are_long(tmp_path):
    own = settings(tmp_path, scenes=64, evaluated=30)
    sizes = {split: own.data(split, "source").count() for split in SPLITS}
    assert sizes == {"pretraining": 512, "train": 64, "validation": 30, "test": 30}
    for split in ("validation", "test"):
        assert own.data(split).story().unique().numel() == 30


def test_a_batch_is_drawn_from_the_scenes_by_torchs_generator():
    scenes = make_scenes("target", "train", 30)
    torch.manual_seed(3)
    rows = torch.randint(30, (16,))
    torch.manual_seed(3)
    batch = scenes.draw(16)
    assert all(torch.equal(a, b) for a, b in zip(batch, scenes.take(rows)))
    assert batch.images.shape == (16, 3, SIZE, SIZE) and batch.count() == 16


def test_words_have_numbers_of_their_own():
    assert len(set(vocabulary())) == len(vocabulary())
    ids, mask = tokenize(["a seven", "a seven left of a three", "unheard of"])
    assert ids.shape == mask.shape == (3, 8)
    assert mask.sum(1).tolist() == [4, 8, 4] and (ids[:, 0] == 1).all()
    assert ids[2].tolist()[1] == vocabulary().index("[unk]")
    assert words(ids[1]) == "a seven left of a three"
