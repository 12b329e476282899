"""The VQA loss, recall@k and VQA accuracy against cases worked out by hand and slow definitions."""

import itertools
import math
import random

import pytest
import torch

from peft_kernels.objectives import (
    normalize_answer,
    recall_at_k,
    retrieval_ranks,
    vqa_accuracy,
    weighted_answer_loss,
)

# ---- answer-weighted loss ------------------------------------------------------------------------------------------


def slow_loss(logits, labels, weights, questions, smoothing, ignored=-100):
    total = 0.0
    for rows, tokens, weight in zip(logits.tolist(), labels.tolist(), weights.tolist()):
        for row, token in zip(rows[:-1], tokens[1:]):
            if token != ignored:
                logs = [value - math.log(sum(map(math.exp, row))) for value in row]
                total -= weight * ((1 - smoothing) * logs[token] + smoothing * sum(logs) / len(row))
    return total / questions


def test_answer_loss_by_hand():
    """Two questions, three answers; logits that make the right token 1/2, 1/4, 1/8 likely, and log 2 = 1 unit."""
    likely = torch.tensor([[2, 4, 8], [4, 2, 2], [2, 2, 8]], dtype=torch.float64)  # (answer, step): one in so many
    logits = torch.zeros(3, 4, 9, dtype=torch.float64)
    labels = torch.tensor([[0, 1, 2, 3], [0, 4, -100, -100], [0, 5, 6, -100]])
    for a, t in itertools.product(range(3), range(3)):
        logits[a, t] = torch.log((1 - 1 / likely[a, t]) / 8)
        logits[a, t, labels[a, t + 1].clamp_min(0)] = torch.log(1 / likely[a, t])
    logits[:, 3] = 1e3  # predicts what comes after the end: no effect
    weights = torch.tensor([1.0, 0.3, 0.6], dtype=torch.float64)
    units = 1.0 * (1 + 2 + 3) + 0.3 * 2 + 0.6 * (1 + 1)
    loss = weighted_answer_loss(logits, labels, weights, [1, 2], label_smoothing=0.0)
    assert loss.item() == pytest.approx(units * math.log(2) / 2, rel=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, None])
def test_answer_loss_against_loops(smoothing):
    logits, weights = torch.randn(6, 5, 7, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    labels = torch.randint(7, (6, 5)).masked_fill(torch.rand(6, 5) < 0.3, -100)
    options = {} if smoothing is None else {"label_smoothing": smoothing}
    for counts, questions in ((2, 3), ([1, 5], 2), ([0, 6, 0, 0], 4), (torch.tensor([3, 2, 1]), 3)):
        expected = slow_loss(logits, labels, weights, questions, 0.1 if smoothing is None else smoothing)
        loss = weighted_answer_loss(logits, labels, weights, counts, **options)
        assert loss.item() == pytest.approx(expected, rel=1e-12)
    other = weighted_answer_loss(logits, labels.where(labels >= 0, 3), weights, 6, ignore_index=3, label_smoothing=0.0)
    expected = slow_loss(logits, labels.where(labels >= 0, 3), weights, 1, 0.0, ignored=3)
    assert other.item() == pytest.approx(expected, rel=1e-12)


def test_answer_loss_gradients_and_dtype():
    labels = torch.tensor([[0, 1, 2], [0, 3, -100]])
    logits, weights = torch.randn(2, 3, 4, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w: weighted_answer_loss(x, labels, w, 2), (logits.requires_grad_(), weights.requires_grad_())
    )
    half = logits.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = weighted_answer_loss(half, labels, weights, 2)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(weighted_answer_loss(half.double(), labels, weights, 2).item(), rel=1e-6)


def test_no_answers_is_no_loss():
    nothing = torch.zeros(0, 3, 4), torch.zeros(0, 3).long(), torch.zeros(0)
    assert weighted_answer_loss(*nothing, [0, 0]).item() == 0


ANSWERS = (torch.zeros(4, 3, 5), torch.zeros(4, 3).long(), torch.ones(4))
BAD_LOSSES = [
    ((torch.zeros(4, 3), *ANSWERS[1:], 2), "logits"),
    ((torch.zeros(4, 1, 5), *ANSWERS[1:], 2), "logits"),
    ((ANSWERS[0], ANSWERS[1][:, :2], ANSWERS[2], 2), "labels"),
    ((ANSWERS[0], ANSWERS[1].float(), ANSWERS[2], 2), "labels"),
    ((*ANSWERS[:2], torch.ones(3), 2), "weights"),
    ((*ANSWERS[:2], torch.ones(4).long(), 2), "weights"),
    ((*ANSWERS, 3), "answers_per_question"),
    ((*ANSWERS, 0), "answers_per_question"),
    ((*ANSWERS, True), "answers_per_question"),
    ((*ANSWERS, [2, 3]), "answers_per_question"),
    ((*ANSWERS, [5, -1]), "answers_per_question"),
    ((*ANSWERS, []), "answers_per_question"),
    ((*ANSWERS, torch.ones(2, 2).long()), "answers_per_question"),
    ((*ANSWERS, torch.ones(4)), "answers_per_question"),
]


@pytest.mark.parametrize(("arguments", "name"), BAD_LOSSES)
def test_bad_answers_are_named(arguments, name):
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b"):
        weighted_answer_loss(*arguments)


def test_bad_smoothing_is_named():
    with pytest.raises(ValueError, match=r"^label_smoothing"):
        weighted_answer_loss(*ANSWERS, 2, label_smoothing=1.0)


# ---- recall --------------------------------------------------------------------------------------------------------


def slow_recall(similarity, positives, k):
    """Sort the candidates of every query, wrong ones first among equals, and look at the first k."""
    hits = 0
    for row, right in zip(similarity.tolist(), positives.tolist()):
        order = sorted(range(len(row)), key=lambda j: (-row[j], right[j]))
        hits += any(right[j] for j in order[:k])
    return hits / len(similarity)


def test_recall_by_hand():
    """Images 0 to 2; texts 0 and 1 are image 0's, 2 is image 1's, 3 is image 2's."""
    similarity = torch.tensor(
        [
            [0.1, 0.8, 0.9, 0.0],  # own text 1 comes second
            [0.2, 0.3, 0.4, 0.1],  # own text 2 first
            [0.7, 0.6, 0.5, 0.4],  # own text 3 last
        ]
    )
    recall = recall_at_k(similarity, (1, 2, 3, 4), torch.tensor([0, 0, 1, 2]))
    assert recall.image_to_text == {1: 1 / 3, 2: 2 / 3, 3: 2 / 3, 4: 1.0}
    # text 0: image 0 is last; text 1: first; text 2: image 1 is last of 0.9, 0.5, 0.4; text 3: first
    assert recall.text_to_image == {1: 0.5, 2: 0.5, 3: 1.0, 4: 1.0}
    ranks = retrieval_ranks(similarity, torch.tensor([0, 0, 1, 2]))
    assert (ranks.image_to_text.tolist(), ranks.text_to_image.tolist()) == ([2, 1, 4], [3, 1, 3, 1])


def test_recall_of_a_tie_is_a_miss():
    assert recall_at_k(torch.zeros(3, 3), (1, 2, 3)).image_to_text == {1: 0.0, 2: 0.0, 3: 1.0}
    left_out = torch.full((2, 2), -math.inf)  # what no second stage has looked at
    assert recall_at_k(left_out, (1,)) == ({1: 0.0}, {1: 0.0})
    assert recall_at_k(torch.eye(3)) == ({1: 1.0, 5: 1.0, 10: 1.0}, {1: 1.0, 5: 1.0, 10: 1.0})


@pytest.mark.parametrize("several", [False, True])
def test_recall_against_sorting(several):
    owner = torch.tensor([2, 0, 1, 2, 3, 4, 5, 0, 6, 6, 6])
    mask = torch.arange(7)[:, None] == owner
    if several:
        mask[3, 0] = mask[1, 9] = True  # a text that describes two images
    similarity = torch.randint(6, (7, 11)).double()  # many ties
    recall = recall_at_k(similarity, range(1, 11), mask if several else owner)
    for k in range(1, 11):
        assert recall.image_to_text[k] == pytest.approx(slow_recall(similarity, mask, k))
        assert recall.text_to_image[k] == pytest.approx(slow_recall(similarity.t(), mask.t(), k))


BAD_RECALLS = [
    ((torch.eye(3)[0],), "similarity"),
    ((torch.zeros(0, 3),), "similarity"),
    ((torch.eye(3).fill_diagonal_(math.nan),), "similarity"),
    ((torch.eye(3).long(),), "similarity"),
    ((torch.eye(3), (0,)), "ks"),
    ((torch.eye(3), 5), "ks"),
    ((torch.ones(3, 4),), "positives"),
    ((torch.ones(3, 4), (1,), torch.tensor([0, 1, 2, 3])), "positives"),
    ((torch.ones(3, 4), (1,), torch.tensor([0, 1, 1, 1])), "positives"),
    ((torch.ones(3, 4), (1,), torch.tensor([0, 1, 2])), "positives"),
    ((torch.ones(3, 4), (1,), torch.eye(3, 4).bool()), "positives"),
    ((torch.ones(3, 4), (1,), torch.eye(4, 3).bool()), "positives"),
    ((torch.ones(3, 4), (1,), torch.ones(4)), "positives"),
]


@pytest.mark.parametrize(("arguments", "name"), BAD_RECALLS)
def test_bad_recall_names_the_argument(arguments, name):
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b"):
        recall_at_k(*arguments)


# ---- VQA accuracy --------------------------------------------------------------------------------------------------


def test_vqa_accuracy_by_hand():
    """m of ten agree: (10 − m) sets of nine keep all of them, m sets lose one."""
    for agree, expected in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)):
        answers = ["red"] * agree + ["blue"] * (10 - agree)
        assert vqa_accuracy(["red"], [answers]) == pytest.approx(expected)
    assert vqa_accuracy(["red", "2"], [["red"] * 3 + ["blue"] * 7, ["two"] * 2 + ["3"] * 8]) == pytest.approx(0.75)


def test_vqa_accuracy_over_all_sets_that_leave_one_out():
    source = random.Random(0)
    for people in (4, 5, 10):
        answers = [source.choice("xyz") for _ in range(people)]
        sets = list(itertools.combinations(answers, people - 1))
        for prediction in "wxyz":
            slow = sum(min(subset.count(prediction) / 3, 1) for subset in sets) / len(sets)
            assert vqa_accuracy([prediction], [answers]) == pytest.approx(slow)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Yes", "yes"),
        (" The  red\ncar. ", "red car"),
        ("an apple, a pear", "apple pear"),
        ("two", "2"),
        ("None", "0"),
        ("ten dogs", "10 dogs"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        (".5", ".5"),
        ("u.s.a.", "usa"),
        ("2:50 PM", "2:50 pm"),
        ("girl's", "girl's"),
        ("t-shirt", "t shirt"),
        ('"stop!" (sign)', "stop sign"),
        ("$5", "$5"),
        ("50%", "50%"),
        ("dont know", "don't know"),
        ("cant", "can't"),
        ("its", "its"),
        ("well", "well"),
        ("theyre", "they're"),
        ("oclock", "o'clock"),
        ("Im", "i'm"),
        ("anthem", "anthem"),
        ("the", ""),
        ("", ""),
    ],
)
def test_normalized_answers(answer, normal):
    assert normalize_answer(answer) == normal
    assert normalize_answer(normal) == normal


BAD_ANSWERS = [
    (("yes", [["yes"] * 10]), "predictions"),
    ((["yes"], "yes"), "answers"),
    ((["yes"], [["yes"] * 10] * 2), "predictions"),
    (([], []), "predictions"),
    ((["yes"], ["yes yes yes"]), r"answers\[0\]"),
    ((["yes"], [["yes"] * 3]), r"answers\[0\]"),
    (([3], [["yes"] * 10]), "answer"),
    ((["yes"], [["yes"] * 9 + [None]]), "answer"),
]


@pytest.mark.parametrize(("arguments", "name"), BAD_ANSWERS)
def test_bad_accuracy_names_the_argument(arguments, name):
    with pytest.raises((ValueError, TypeError), match=rf"^{name}"):
        vqa_accuracy(*arguments)
