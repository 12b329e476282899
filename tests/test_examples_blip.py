"""What the BLIP examples compute, against transformers' own forwards of the same model."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
hf = pytest.importorskip("transformers")
pytest.importorskip("PIL")

import example_data  # noqa: E402
from common import answering, blip, data, retrieval  # noqa: E402

from peft_kernels import Aurora, AuroraConfig  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return example_data.write_all(tmp_path_factory.mktemp("files"))


# ---- retrieval ------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(files):
    """(arguments, adapter whose update is not zero, batches, four test examples of different images)"""
    args = Namespace(device="cpu", batch_size=2, workers=0, beta=0.0, k_test=99, temperature=0.07, enhance=None)
    vars(args).update(queue_size=0, alpha=0.0, precision="fp32", seed=0, beams=1)
    model, processor = blip.load(Namespace(model=files["blip"], device="cpu"), hf.BlipForImageTextRetrieval)
    adapter = Aurora.wrap(model, AuroraConfig(preset="blip-retrieval", rank=4, gates="additive"))
    with torch.no_grad():
        for parameter in adapter.parameters("adapter"):
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval()
    examples = data.read_karpathy(files["flickr30k"])["test"]
    return args, adapter, blip.Batches(processor), examples


def loaded(batches, examples):
    return batches([data.Examples(examples)[n] for n in range(len(examples))])


def pairs(model, batch):
    """Transformers' own (matching logits of every pair (images, texts, 2), similarities), [CLS] made [ENC]."""
    ids = batch["input_ids"].clone()
    ids[:, 0] = model.config.text_config.vocab_size - 1
    match = []
    for pixels in batch["pixels"]:
        tokens = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
        match.append(model(**tokens, pixel_values=pixels.expand(len(ids), -1, -1, -1)).itm_score)
    tokens["input_ids"] = batch["input_ids"]
    similarity = model(**tokens, pixel_values=batch["pixels"].flatten(0, 1), use_itm_head=False).itm_score
    return torch.stack(match), similarity


def test_retrieval_is_ranked_as_transformers_scores_it(adapted, monkeypatch):
    args, adapter, batches, examples = adapted
    scores, recall = [], retrieval.recall_at_k
    monkeypatch.setattr(retrieval, "recall_at_k", lambda s, **options: scores.append(s.clone()) or recall(s, **options))
    batch = loaded(batches, examples)
    batch["pixels"] = batch["pixels"][::2]  # two captions to an image
    with torch.no_grad():
        match, similarity = pairs(adapter.model, batch)
        args.beta = 0.5
        retrieval.RetrievalTest(args, adapter.model, batches, examples)()
        wanted = match[..., 1] + 0.5 * similarity
        torch.testing.assert_close(scores[0], wanted)
        torch.testing.assert_close(scores[1], wanted)
        args.k_test = 2
        retrieval.RetrievalTest(args, adapter.model, batches, examples)()
    for table, axis in zip(scores[2:], (1, 0)):
        near = torch.zeros_like(similarity, dtype=torch.bool).scatter_(axis, similarity.topk(2, axis).indices, True)
        torch.testing.assert_close(table, wanted.masked_fill(~near, -torch.inf))


def test_retrieval_loss_is_contrast_and_matching(adapted, monkeypatch):
    args, adapter, batches, examples = adapted
    seen, draw = [], retrieval.matching_negatives
    monkeypatch.setattr(retrieval, "matching_negatives", lambda *drawn: seen.extend(drawn) or draw(*drawn))
    batch = loaded(batches, [examples[0], examples[2]])  # of two pairs, the other one is the negative
    with torch.no_grad():
        loss = retrieval.RetrievalLoss(args, adapter)
        adapter.model.eval()
        match, similarity = pairs(adapter.model, batch)
        cross = torch.nn.functional.cross_entropy
        logits, right = similarity / 0.07, torch.arange(2)
        contrast = (cross(logits, right) + cross(logits.t(), right)) / 2
        chosen = torch.cat([match[[0, 1], [0, 1]], match[[0, 1], [1, 0]], match[[1, 0], [0, 1]]])
        matching = cross(chosen, torch.tensor([1, 1, 0, 0, 0, 0]))
        torch.testing.assert_close(loss(batch, 0.0), contrast + matching)
    for drawn, wanted in zip(seen, (logits, logits.t(), torch.tensor([0, 1])), strict=True):  # by likelihood
        torch.testing.assert_close(drawn, wanted)


@pytest.mark.parametrize(("alpha", "progress", "weight"), [(0, 3, 0), (0.4, 0, 0), (0.4, 0.5, 0.2), (0.4, 3, 0.4)])
@torch.no_grad()
def test_captions_of_one_image_are_all_right_and_soft_targets_grow(adapted, alpha, progress, weight):
    args, adapter, batches, examples = adapted
    args.alpha = alpha
    loss = retrieval.RetrievalLoss(args, adapter)
    adapter.model.eval()
    if loss.teacher is not None:
        loss.teacher.eval()
    batch = loaded(batches, examples[:4])
    _, similarity = pairs(adapter.model, batch)
    hard, wanted = torch.block_diag(*[torch.full((2, 2), 0.5)] * 2), 0.0
    for logits in (similarity / 0.07, similarity.t() / 0.07):  # the momentum encoder is still the model
        targets = weight * logits.softmax(1) + (1 - weight) * hard
        wanted += torch.nn.functional.cross_entropy(logits, targets) / 2
    image = blip.embed_images(adapter.model, blip.see(adapter.model, batch["pixels"]))
    _, text = blip.read(adapter.model, batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(loss.contrast(batch, image, text, progress), wanted)


@torch.no_grad()
def test_another_caption_in_the_queue_is_right_too(adapted):
    args, adapter, batches, examples = adapted
    args.queue_size = 8
    loss = retrieval.RetrievalLoss(args, adapter)
    adapter.model.eval()
    loss.teacher.eval()
    first, second = loaded(batches, examples[0:4:2]), loaded(batches, examples[1:4:2])  # two captions of two images
    image = blip.embed_images(adapter.model, blip.see(adapter.model, first["pixels"]))
    texts = [blip.read(adapter.model, batch["input_ids"], batch["attention_mask"])[1] for batch in (first, second)]
    loss.contrast(first, image, texts[0], 1.0)
    targets = torch.eye(2).repeat(1, 2) / 2
    wanted = torch.nn.functional.cross_entropy(image @ torch.cat(texts[::-1]).t() / 0.07, targets)
    wanted += torch.nn.functional.cross_entropy(texts[1] @ image.repeat(2, 1).t() / 0.07, targets)
    torch.testing.assert_close(loss.contrast(second, image, texts[1], 1.0), wanted / 2)


def test_momentum_encoder_follows_and_fills_the_queue(adapted):
    args, adapter, batches, examples = adapted
    vars(args).update(queue_size=8, alpha=0.4, momentum=0.5)
    loss = retrieval.RetrievalLoss(args, adapter)
    batch = loaded(batches, examples[:4])
    before = loss.state_dict()["teacher"]
    assert before.keys() == {name for name, _ in adapter.named_parameters()}
    before = {name: value.clone() for name, value in before.items()}
    loss(batch, 1.0).backward()
    assert loss.queue.ids.tolist() == [0, 0, 1, 1, -1, -1, -1, -1]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(1.0)
    loss.after_step()
    for name, value in loss.state_dict()["teacher"].items():
        torch.testing.assert_close(value, before[name] + 0.5)


# ---- answers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def answerer(files):
    args = Namespace(device="cpu", batch_size=2, workers=0, k_test=99, beams=1)
    model, processor = blip.load(Namespace(model=files["blip-qa"], device="cpu"), hf.BlipForQuestionAnswering)
    task = answering.Answering(args, model.eval(), processor.tokenizer)
    batch = loaded(blip.Batches(processor), data.read_vqa(files["vqa2"], "val2014"))
    ids = batch["input_ids"].clone()
    ids[:, 0] = model.config.text_config.vocab_size - 1
    inputs = {"input_ids": ids, "attention_mask": batch["attention_mask"], "pixel_values": batch["pixels"][:, 0]}
    return task, batch, inputs


def likelihood(task, inputs, answer):
    """Transformers' own loss of an answer for every question, summed over its tokens."""
    ids = task.tokenizer(answer, return_tensors="pt")["input_ids"]
    ids[:, 0] = task.model.config.text_config.bos_token_id
    rows = [{name: value[n : n + 1] for name, value in inputs.items()} for n in range(len(inputs["input_ids"]))]
    return torch.stack([task.model(**row, labels=ids).loss * (ids.shape[1] - 1) for row in rows])


@torch.no_grad()
def test_answers_are_weighted_and_ranked_as_transformers_likes_them(answerer):
    task, batch, inputs = answerer
    candidates = ["red", "green", "blue picture", "the white dog", "two"]
    table = torch.stack([likelihood(task, inputs, answer) for answer in candidates], dim=1)
    assert len(table.unique()) == table.numel()
    assert task.answer(batch, candidates) == [candidates[best] for best in table.argmin(dim=1)]
    task.args.k_test = 1  # by the first token alone
    first = task.model.text_decoder(
        input_ids=torch.full((4, 1), task.model.config.text_config.bos_token_id),
        **dict(zip(("encoder_hidden_states", "encoder_attention_mask"), task.question(batch))),
    ).logits[:, 0]
    starts = task.tokenizer.convert_tokens_to_ids([answer.split()[0] for answer in candidates])
    assert task.answer(batch, candidates) == [candidates[best] for best in first[:, starts].argmax(dim=1)]

    task.model.text_decoder.label_smoothing = 0.1
    wanted = 0.0
    for n, colour in enumerate(example_data.NAMES):
        for answer, weight in ((colour, 0.8), ("dog", 0.1), (f"the {colour}", 0.1)):
            wanted += weight * likelihood(task, {name: v[n : n + 1] for name, v in inputs.items()}, answer)[0] / 4
    torch.testing.assert_close(task.loss(batch, 0.0), wanted)


@torch.no_grad()
def test_generation_is_transformers_own(answerer):
    task, batch, inputs = answerer
    inputs = {name: value[:1] for name, value in inputs.items()}  # without padding, which theirs attends to
    written = task.model.generate(**inputs, max_new_tokens=9, do_sample=False, num_beams=1)
    wanted = task.tokenizer.batch_decode(written[:, 1:], skip_special_tokens=True)
    assert task.answer({name: value[:1] for name, value in batch.items()}, None) == wanted


@torch.no_grad()
def test_frames_are_read_one_after_the_other_or_as_their_mean(answerer):
    task, batch, _ = answerer
    frames = torch.cat([batch["pixels"], batch["pixels"].flip(0)], dim=1)
    one, _ = task.question(batch)
    two, _ = task.question({**batch, "pixels": frames})
    assert not torch.allclose(one, two, rtol=1e-2)
    swapped, _ = task.question({**batch, "pixels": frames.flip(1)})
    torch.testing.assert_close(two, swapped)  # cross-attention has no order
    task.frames = "mean"
    states = blip.see(task.model, frames)
    wanted = blip.fuse(task.model, batch["input_ids"], batch["attention_mask"], states.sum(1, keepdim=True) / 2)
    torch.testing.assert_close(task.question({**batch, "pixels": frames})[0], wanted)
    same, _ = task.question({**batch, "pixels": batch["pixels"].repeat(1, 2, 1, 1, 1)})
    torch.testing.assert_close(same, one)
