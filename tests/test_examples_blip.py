"""What the BLIP examples compute, against transformers' own forwards of the same model."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
hf = pytest.importorskip("transformers")
pytest.importorskip("PIL")

import example_data  # noqa: E402
from common import answering, blip, data, hooks, retrieval  # noqa: E402

from peft_kernels import Aurora, AuroraConfig  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return example_data.write_all(tmp_path_factory.mktemp("files"))


# ---- retrieval ------------------------------------------------------------------------------------------------------


def plain(folder, **options):
    """blip.load's options, without dropout."""
    return Namespace(**{"model": folder, "device": "cpu", "dropout": 0.0, "drop_path": 0.0, **options})


@pytest.fixture
def adapted(files, tmp_path):
    """(arguments, adapter whose update is not zero, batches, four test examples of different images)"""
    args = Namespace(device="cpu", batch_size=2, workers=0, beta=0.0, k_test=99, temperature=0.07, enhance="none")
    vars(args).update(queue_size=0, alpha=0.0, precision="fp32", seed=0, beams=1, out=tmp_path)
    vars(args).update(queue_start="empty", momentum_of="all")
    model, processor = blip.load(plain(files["blip"]), hf.BlipForImageTextRetrieval)
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
    scores, ranks = [], retrieval.retrieval_ranks
    monkeypatch.setattr(retrieval, "retrieval_ranks", lambda s, right: scores.append(s.clone()) or ranks(s, right))
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
        found = retrieval.RetrievalTest(args, adapter.model, batches, examples)()
    rows = [json.loads(line) for line in (args.out / "predictions.jsonl").read_text().splitlines()]
    for way, table, axis in zip(("image_to_text", "text_to_image"), scores[2:], (1, 0)):
        near = torch.zeros_like(similarity, dtype=torch.bool).scatter_(axis, similarity.topk(2, axis).indices, True)
        torch.testing.assert_close(table, torch.where(near, wanted, similarity - 100))
        ranks = torch.tensor([row["rank"] for row in rows if row["kind"] == way]).double()
        assert len(ranks) == similarity.shape[1 - axis]
        assert found[f"{way}_mean_rank"] == pytest.approx(ranks.mean().item())
        assert found[f"{way}_median_rank"] == ranks.quantile(0.5).item()
        assert found[f"{way}_recall_5"] == (ranks <= 5).double().mean().item()


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


@pytest.mark.parametrize("momentum_of", ["layers", "all"])
def test_momentum_encoder_follows_and_fills_the_queue(adapted, momentum_of):
    args, adapter, batches, examples = adapted
    vars(args).update(queue_size=8, alpha=0.4, momentum=0.5, momentum_of=momentum_of)
    loss = retrieval.RetrievalLoss(args, adapter)
    batch = loaded(batches, examples[:4])
    before = loss.state_dict()["teacher"]
    trained = dict(adapter.named_parameters())
    live = {f"aurora.shared.{name}" for name in ("down.16x16", "up.16x16", "lam")}
    live = live if momentum_of == "layers" else set()
    assert before.keys() == trained.keys() - live and "aurora.shared.slots" in before
    assert all(loss.teacher.get_parameter(name) is trained[name] for name in live)
    assert all(p.requires_grad for p in trained.values())
    before = {name: value.clone() for name, value in before.items()}
    loss(batch, 1.0).backward()
    assert loss.queue.ids.tolist() == [0, 0, 1, 1, -1, -1, -1, -1]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(1.0)
    loss.after_step()
    for name, value in loss.state_dict()["teacher"].items():
        torch.testing.assert_close(value, before[name] + 0.5)


def test_queue_starts_with_random_wrong_candidates(adapted):
    args, adapter, *_ = adapted
    vars(args).update(queue_size=6, queue_start="random")
    queue = retrieval.RetrievalLoss(args, adapter).queue
    torch.testing.assert_close(torch.cat([queue.image, queue.text]).norm(dim=1), torch.ones(12))
    assert len(queue.image.unique()) == queue.image.numel() and not torch.equal(queue.image, queue.text)
    assert (queue.ids > 1_000_000).all() and queue.position.item() == 0


@torch.no_grad()
def test_texts_attend_more_to_frames_like_them(adapted):
    """The keys of a frame's patches are scaled, its [CLS]'s and all values are not: written out for one layer."""
    _, adapter, *_ = adapted
    attention = adapter.model.text_encoder.encoder.layer[1].crossattention.self
    hidden, states = torch.randn(2, 5, attention.query.in_features), torch.randn(2, 3 * 4, attention.key.in_features)
    weights, size = torch.rand(2, 3), attention.attention_head_size
    unweighed = attention(hidden, encoder_hidden_states=states)[0]
    with hooks.frame_aware(adapter.model, weights):
        found = attention(hidden, encoder_hidden_states=states)[0]
    scale = torch.cat([torch.ones(2, 3, 1), weights[:, :, None].expand(2, 3, 3)], dim=2).flatten(1)
    query, key, value = (
        layer(x).unflatten(-1, (-1, size)).transpose(1, 2)
        for layer, x in ((attention.query, hidden), (attention.key, states), (attention.value, states))
    )
    scores = query @ (key * scale[:, None, :, None]).transpose(-1, -2) / size**0.5
    torch.testing.assert_close(found, (scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    assert not torch.allclose(found, unweighed)
    assert torch.equal(attention(hidden, encoder_hidden_states=states)[0], unweighed)  # outside of the block again


@torch.no_grad()
def test_training_on_videos_weighs_frames_by_their_similarity(adapted, monkeypatch):
    args, adapter, batches, examples = adapted
    seen = []
    monkeypatch.setattr(retrieval, "frame_aware", lambda model, w: seen.append(w) or hooks.frame_aware(model, w))
    loss, unaware = (retrieval.RetrievalLoss(args, adapter, aware) for aware in (True, False))
    adapter.model.eval()
    batch = loaded(batches, [examples[0], examples[2]])
    batch["pixels"] = torch.cat([batch["pixels"], batch["pixels"].flip(0) + 1], dim=1)
    values = loss(batch, 0.0), unaware(batch, 0.0)
    assert not torch.allclose(*values, rtol=1e-5) and seen[1] is None
    cosines = [pairs(adapter.model, {**batch, "pixels": batch["pixels"][:, f : f + 1]})[1] for f in (0, 1)]
    each = torch.stack(cosines)  # (frames, images, texts)
    wanted = torch.stack([each[:, i, t] for t, i in ((0, 0), (1, 1), (1, 0), (0, 1), (0, 1), (1, 0))])
    torch.testing.assert_close(seen[0], 2 * (wanted / 4).softmax(dim=1))


# ---- what trains, and how -------------------------------------------------------------------------------------------


def test_drop_path_leaves_out_branches_in_training(files):
    model, _ = blip.load(plain(files["blip"], drop_path=0.5), hf.BlipForImageTextRetrieval)
    layers = model.vision_model.encoder.layers
    x = torch.randn(400, 5, model.config.vision_config.hidden_size)
    for layer, p in zip(layers, (0.0, 0.5), strict=True):  # rising from 0
        for branch in (lambda layer=layer: layer.self_attn(x)[0], lambda layer=layer: layer.mlp(x)):
            layer.eval()
            whole = branch()
            layer.train()
            torch.manual_seed(0)
            found = branch()
            left_out = (found == 0).flatten(1).all(dim=1)
            torch.testing.assert_close(found[~left_out], whole[~left_out] / (1 - p))
            assert left_out.double().mean().item() == pytest.approx(p, abs=0.1)


def test_texts_drop_out_as_blip_trained_and_not_as_the_hub_says(files):
    for model_class, name in ((hf.BlipForImageTextRetrieval, "blip"), (hf.BlipForQuestionAnswering, "blip-qa")):
        model, _ = blip.load(plain(files[name], dropout=0.25), model_class)
        rates = {n: m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and "text_" in n}
        assert len(rates) > 10 and set(rates.values()) == {0.25}
        assert ("text_decoder" if name == "blip-qa" else "text_encoder") in {n.partition(".")[0] for n in rates}


def test_vectors_decay_too_as_released(adapted):
    _, adapter, *_ = adapted
    for decays, wanted in ((True, {0.05}), (False, {0.05, 0.0})):
        made = blip.groups(Namespace(lr=1e-4, weight_decay=0.05, decay_vectors=decays), adapter)
        assert {group["weight_decay"] for group in made} == wanted
        assert sum(len(group["params"]) for group in made) == len(list(adapter.parameters()))


# ---- answers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def answerer(files):
    args = Namespace(device="cpu", batch_size=2, workers=0, k_test=99, beams=1, label_smoothing=0.0)
    model, processor = blip.load(plain(files["blip-qa"]), hf.BlipForQuestionAnswering)
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

    for smoothing, task.scale in ((0.0, 1.0), (0.1, 1.0), (0.0, 0.05 / 8)):
        task.model.text_decoder.label_smoothing = task.args.label_smoothing = smoothing
        wanted = 0.0
        for n, colour in enumerate(example_data.NAMES):
            for answer, weight in ((colour, 0.8), ("dog", 0.1), (f"the {colour}", 0.1)):
                wanted += weight * likelihood(task, {name: v[n : n + 1] for name, v in inputs.items()}, answer)[0] / 4
        torch.testing.assert_close(task.loss(batch, 0.0), wanted * task.scale)


@torch.no_grad()
def test_padding_of_questions_changes_nothing(answerer):
    task, batch, _ = answerer
    for parameter in task.model.text_decoder.bert.encoder.layer[0].crossattention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that what answers read matters
    longer = {name: F.pad(batch[name], (0, 3)) for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(task.loss({**batch, **longer}, 0.0), task.loss(batch, 0.0))
    states, mask = task.question(batch)
    padded, seen = F.pad(states, (0, 0, 0, 3), value=5.0), F.pad(mask, (0, 3))
    assert task.generate(padded, seen) == task.generate(states, mask)


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
