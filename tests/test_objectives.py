"""Retrieval objectives against cases worked out by hand and against loops over Python floats."""

import math
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from peft_kernels.objectives import (
    MomentumQueue,
    contrastive_loss,
    enhance_context,
    matching_loss,
    matching_negatives,
    video_embedding,
)

E = math.e


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(shape, dtype=torch.float64), dim=-1).to(dtype)


# ---- contrastive loss ----------------------------------------------------------------------------------------------


def probabilities(row, others, temperature, counts):
    """Softmax of one embedding's similarities over the candidates that count."""
    sims = [sum(a * b for a, b in zip(row, other)) / temperature for other in others]
    powers = [math.exp(s) if counted else 0.0 for s, counted in zip(sims, counts)]
    return [p / sum(powers) for p in powers]


def slow_contrast(image, text, temperature, momentum=None, alpha=0.0, bank=None, ids=None, bank_ids=None):
    """The docstring's formulas, a sum at a time."""
    own = [image.tolist(), text.tolist()]
    batch, banks = len(own[0]), [[], []] if bank is None else [t.tolist() for t in bank]
    teachers = own if momentum is None else [t.tolist() for t in momentum]
    labels = list(range(batch)) if ids is None else ids.tolist()
    bank_labels = [None] * len(banks[0]) if bank_ids is None else bank_ids.tolist()
    all_labels = labels + (bank_labels if ids is not None else [None] * len(banks[0]))
    counts = [True] * batch + [label is None or label >= 0 for label in bank_labels]
    total = 0.0
    for here, there in ((0, 1), (1, 0)):
        others = teachers[there] + banks[there]
        for b in range(batch):
            p = probabilities(own[here][b], others, temperature, counts)
            hard = [float(label == labels[b]) for label in all_labels]
            soft = probabilities(teachers[here][b], others, temperature, counts)
            y = [alpha * s + (1 - alpha) * h / sum(hard) for s, h in zip(soft, hard)]
            total -= sum(weight * math.log(q) for weight, q in zip(y, p) if weight)
    return total / (2 * batch)


def test_contrast_of_two_orthogonal_pairs_by_hand():
    eye = torch.eye(2, dtype=torch.float64)
    assert contrastive_loss(eye, eye, 1.0).item() == pytest.approx(math.log(1 + 1 / E), rel=1e-14)
    assert contrastive_loss(eye, eye, 0.5).item() == pytest.approx(math.log(1 + E**-2), rel=1e-14)
    same = torch.tensor([7, 7])  # two captions of one image: half of the target on each
    assert contrastive_loss(eye, eye, 1.0, image_ids=same).item() == pytest.approx(math.log(E + 1) - 0.5, rel=1e-14)


def test_contrast_with_one_pair_in_the_bank_by_hand():
    """Similarities to the candidates: (1, 0, 1) and (0, 1, 0) one way, (1, 0, 0) and (0, 1, 1) the other way."""
    eye = torch.eye(2, dtype=torch.float64)
    loss = partial(contrastive_loss, eye, eye, 1.0, image_bank=eye[1:], text_bank=eye[:1])
    expected = (math.log(2 * E + 1) + math.log(E + 2)) / 2 - 1
    assert loss().item() == pytest.approx(expected, rel=1e-14)
    empty = {"bank_ids": torch.tensor([-1])}
    assert loss(**empty).item() == pytest.approx(math.log(1 + 1 / E), rel=1e-14)
    # the banked pair is another caption of image 3: pair 0's targets are halved and the bank's is one of them
    ids = {"image_ids": torch.tensor([3, 4]), "bank_ids": torch.tensor([3])}
    both = (math.log(2 * E + 1) - 1 + math.log(E + 2) - 1 + math.log(E + 2) - 0.5 + math.log(2 * E + 1) - 1) / 4
    assert loss(**ids).item() == pytest.approx(both, rel=1e-14)


def test_soft_targets_by_hand():
    """Teacher and model agree, so that alpha = 1 leaves the entropy of (s, 1 − s)."""
    eye, s = torch.eye(2, dtype=torch.float64), E / (E + 1)
    entropy, hard = -s * math.log(s) - (1 - s) * math.log(1 - s), -math.log(s)
    momentum = {"momentum_image": eye, "momentum_text": eye}
    assert contrastive_loss(eye, eye, 1.0, **momentum, alpha=1).item() == pytest.approx(entropy, rel=1e-14)
    published = contrastive_loss(eye, eye, 1.0, **momentum).item()
    assert published == pytest.approx(0.4 * entropy + 0.6 * hard, rel=1e-14)
    alpha = torch.tensor(0.25)
    assert contrastive_loss(eye, eye, 1.0, **momentum, alpha=alpha).item() == pytest.approx(entropy / 4 + 0.75 * hard)


CASES = {
    "batch": {},
    "ids": {"ids": True},
    "bank": {"bank": True},
    "bank-holes": {"bank": True, "bank_ids": True},
    "momentum": {"momentum": True},
    "all": {"ids": True, "bank": True, "bank_ids": True, "momentum": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [1, 5])
def test_contrast_against_loops(batch, case):
    has = CASES[case].get
    image, text, *momentum = (unit(batch, 6) for _ in range(4))
    bank = unit(7, 6), unit(7, 6)
    ids = torch.tensor([4, 9, 4, 0, 2])[:batch]
    bank_ids = torch.tensor([9, -1, 4, 0, -1, 4, 8])
    expected = slow_contrast(
        image,
        text,
        0.3,
        momentum if has("momentum") else None,
        0.4 if has("momentum") else 0.0,
        bank if has("bank") else None,
        ids if has("ids") else None,
        bank_ids if has("bank_ids") else None,
    )
    options = dict(zip(("momentum_image", "momentum_text"), momentum)) if has("momentum") else {}
    options |= dict(zip(("image_bank", "text_bank"), bank)) if has("bank") else {}
    options |= {"image_ids": ids} if has("ids") else {}
    options |= {"bank_ids": bank_ids} if has("bank_ids") else {}
    loss = contrastive_loss(image, text, 0.3, **options)
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(expected, rel=1e-12)


def test_contrast_gradients():
    ids, bank_ids = torch.tensor([4, 9, 4]), torch.tensor([9, -1, 4, 1])
    momentum = {"momentum_image": unit(3, 5), "momentum_text": unit(3, 5)}
    bank = {"image_bank": unit(4, 5), "text_bank": unit(4, 5), "bank_ids": bank_ids}
    inputs = (unit(3, 5).requires_grad_(), unit(3, 5).requires_grad_())
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(contrastive_loss, (*inputs, temperature))
    with_all = partial(contrastive_loss, **momentum, **bank, image_ids=ids)
    assert torch.autograd.gradcheck(lambda a, b: with_all(a, b, 0.4), inputs)
    assert torch.autograd.gradcheck(lambda t: with_all(*inputs, t, alpha=0.0), (temperature,))


def test_soft_targets_are_constants_for_a_learned_temperature():
    features, momentum, temperature = unit(2, 3, 5), unit(2, 3, 5), torch.tensor(0.4, dtype=torch.float64)
    momentum = {"momentum_image": momentum[0], "momentum_text": momentum[1]}
    teachers, others = list(momentum.values()), list(momentum.values())[::-1]
    targets = [0.4 * (t @ o.t() / 0.4).softmax(1) + 0.6 * torch.eye(3).double() for t, o in zip(teachers, others)]
    temperature.requires_grad_()
    logs = [(f @ o.t() / temperature).log_softmax(1) for f, o in zip(features, others)]
    expected = -sum((y * log).sum() for y, log in zip(targets, logs)) / 6
    loss = contrastive_loss(*features, temperature, **momentum)
    grads = [torch.autograd.grad(each, temperature)[0] for each in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


def test_momentum_features_get_no_gradient():
    image, text, momentum_image, momentum_text = (unit(3, 5).requires_grad_() for _ in range(4))
    contrastive_loss(image, text, 0.1, momentum_image=momentum_image, momentum_text=momentum_text).backward()
    assert image.grad.abs().sum() > 0 and text.grad.abs().sum() > 0
    assert momentum_image.grad is None and momentum_text.grad is None


def test_the_queue_may_change_before_the_backward():
    queue, image, text = MomentumQueue(6, 5).double(), unit(3, 5).requires_grad_(), unit(3, 5)
    queue.enqueue(unit(4, 5), unit(4, 5))
    loss = contrastive_loss(image, text, 0.1, **queue.bank())
    (expected,) = torch.autograd.grad(loss, image, retain_graph=True)
    queue.enqueue(unit(4, 5), unit(4, 5))
    assert torch.equal(torch.autograd.grad(loss, image)[0], expected)


def test_similarities_are_float32_under_autocast():
    """Products rounded to bfloat16 would be off by 2^-9 / 0.01 = 0.2 in a logit; the inputs' rounding is not ours."""
    image, text = unit(8, 64, dtype=torch.bfloat16), unit(8, 64, dtype=torch.bfloat16)
    expected = contrastive_loss(image.double(), text.double(), 0.01)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(image, text, 0.01)
        wide = contrastive_loss(image.float(), text.float(), 0.01)
    assert loss.dtype == torch.float32
    assert loss.item() == wide.item() == pytest.approx(expected.item(), rel=1e-5)


# ---- matching ------------------------------------------------------------------------------------------------------


def test_targets_loss_by_hand():
    """Odds of 3 to 1 for a match: −log 3/4 for the positive, −log 1/4 for the negatives."""
    logits = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
    expected = -(math.log(3 / 4) + 2 * math.log(1 / 4)) / 3
    assert matching_loss(logits[None], logits.expand(2, 2)).item() == pytest.approx(expected, rel=1e-14)
    random = torch.randn(3, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    slow = [math.log(sum(map(math.exp, row))) - row[label] for label in (1, 0) for row in random[1 - label].tolist()]
    assert matching_loss(*random).item() == pytest.approx(sum(slow) / 9, rel=1e-13)
    assert torch.autograd.gradcheck(matching_loss, tuple(t.requires_grad_() for t in random))
    assert matching_loss(logits[None].bfloat16(), logits[None].bfloat16()).dtype == torch.float32


def frequencies(similarity, other, draws=4000, **options):
    """Of every index in every row, (B, B), for both results."""
    counts = torch.zeros(2, *similarity.shape, dtype=torch.float64)
    rows = torch.arange(similarity.shape[0])
    for _ in range(draws):
        for count, index in zip(counts, matching_negatives(similarity, other, **options)):
            count[rows, index] += 1
    return counts / draws


@pytest.mark.parametrize("ids", [None, [3, 5, 3, 8]])
def test_negatives_are_drawn_by_softmax_without_the_own_image(ids):
    similarities = torch.randn(2, 4, 4, dtype=torch.float64)
    ids = None if ids is None else torch.tensor(ids)
    found = frequencies(*similarities, image_ids=ids)
    labels = list(range(4)) if ids is None else ids.tolist()
    for similarity, frequency in zip(similarities.tolist(), found):
        for b in range(4):
            powers = [0.0 if labels[j] == labels[b] else math.exp(similarity[b][j]) for j in range(4)]
            for j in range(4):
                p = powers[j] / sum(powers)
                # five standard deviations of 4,000 draws; exactly zero where nothing may be drawn
                assert abs(frequency[b, j].item() - p) <= 5 * math.sqrt(p * (1 - p) / 4000)


def test_negatives_of_one_generator_repeat_and_take_no_gradient():
    similarity = torch.randn(6, 6, requires_grad=True)
    runs = [matching_negatives(similarity, similarity, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert all(map(torch.equal, *runs)) and runs[0][0].dtype == torch.int64
    assert not torch.equal(*runs[0])  # two draws, not one used twice


def test_negatives_without_weight_are_drawn_all_the_same():
    """The own pair ahead by 1e4 leaves the others a softmax of 0 in float32."""
    similarity = 1e4 * torch.eye(3)
    for texts, images in (matching_negatives(similarity, similarity) for _ in range(50)):
        assert (texts != torch.arange(3)).all() and (images != torch.arange(3)).all()


# ---- context and video ---------------------------------------------------------------------------------------------


def test_enhanced_context_by_hand():
    fused = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    text = torch.tensor([[10.0, 0.0], [20.0, -10.0]], dtype=torch.float64)  # mean (15, −5)
    shifted = torch.tensor([[2.5, 1.5], [4.5, 3.5], [6.5, 5.5]], dtype=torch.float64)
    torch.testing.assert_close(enhance_context(fused, text), torch.cat([shifted[:2], fused[2:]]))
    torch.testing.assert_close(enhance_context(fused[:2], text), shifted[:2])
    torch.testing.assert_close(enhance_context(fused, text, to="all"), shifted)
    torch.testing.assert_close(enhance_context(fused, text, 0.2, to="all"), 2 * shifted - fused)
    assert enhance_context(fused, text, training=False) is fused
    assert enhance_context(fused[:0], text[:0]).shape == (0, 2)


def test_enhanced_context_gradients_and_dtype():
    fused, text = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    for to in ("positives", "all"):
        assert torch.autograd.gradcheck(
            partial(enhance_context, to=to), (fused.requires_grad_(), text.requires_grad_())
        )
    mixed = enhance_context(fused.bfloat16(), text.float(), to="all")  # a linear's output, a LayerNorm's under autocast
    assert mixed.dtype == torch.bfloat16


def test_video_is_its_frames_mean():
    frames = torch.tensor([[[6.0, 0.0], [0.0, 8.0]], [[1.0, 1.0], [9.0, 9.0]]], dtype=torch.float64)  # mean (3, 4)
    half = math.sqrt(0.5)
    expected = torch.tensor([[0.6, 0.8], [half, half]], dtype=torch.float64)
    torch.testing.assert_close(video_embedding(frames), expected)
    frames[0, 1] = math.nan
    mask = torch.tensor([[True, False], [False, False]])
    expected = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(video_embedding(frames, mask), expected)


def test_video_gradients_and_dtype():
    frames, mask = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([[True, True, False], [True, True, True]])
    assert torch.autograd.gradcheck(partial(video_embedding, mask=mask), (frames.requires_grad_(),))
    padded = frames.detach().masked_fill(~mask[..., None], math.nan).requires_grad_()
    video_embedding(padded, mask).sum().backward()
    assert padded.grad.isfinite().all() and (padded.grad[0, 2] == 0).all()
    assert video_embedding(frames.bfloat16()).dtype == torch.float32


def test_nothing_waits_for_the_device():
    """Fake tensors have no values: reading one raises, as on a GPU it would wait. Captions of one image do wait."""
    with FakeTensorMode():
        ids, queue, pair = torch.arange(4), MomentumQueue(6, 5), (torch.ones(4, 5), torch.ones(4, 5))
        queue.enqueue(*pair, ids)
        momentum = dict(zip(("momentum_image", "momentum_text"), pair))
        contrastive_loss(*pair, torch.ones(()), **momentum, **queue.bank(), image_ids=ids)
        matching_negatives(torch.ones(4, 4), torch.ones(4, 4))
        matching_loss(torch.ones(4, 2), torch.ones(8, 2))
        enhance_context(torch.ones(12, 5), pair[1])
        video_embedding(torch.ones(4, 3, 5), torch.ones(4, 3).bool())
        with pytest.raises(DataDependentOutputException):
            matching_negatives(torch.ones(4, 4), torch.ones(4, 4), ids)
