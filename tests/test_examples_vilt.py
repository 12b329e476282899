"""ViLT with MoIL as its authors' release trains it: splits, objectives, heads, rates, images, and what is written."""

import json
import math
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
import vilt_moil  # noqa: E402
from common import data, questions, randaugment, training, vilt  # noqa: E402
from transformers import AutoProcessor  # noqa: E402

from peft_kernels import MoIL  # noqa: E402

SMALL = ("--device", "cpu", "--batch-size", "4", "--rank", "4", "--lr", "0.01", "--epochs", "1", "--accumulate", "1")
SMALL += ("--precision", "fp32", "--head-lr", "0.01", "--decay", "0.5", "--init", "default", "--dropout", "0")
VQA = ("--min-answers", "1", "--held-out", "2")
DATA = {"vqa": "vqa2", "nlvr2": "nlvr2", "retrieval": "flickr30k"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    made = {each.__name__: each(root / each.__name__) for each in (example_data.flickr30k, example_data.nlvr2)}
    made["vqa2"] = example_data.vqa2_test(example_data.vqa2(root / "vqa2"))
    return made | {"coco": example_data.coco(root / "coco"), "vilt": example_data.save_vilt(root / "vilt")}


def run(files, task, out, *options, folder=None, small=SMALL):
    argv = ["--data", files[folder or DATA[task]], "--model", files["vilt"], "--out", out, "--task", task, *small]
    return vilt_moil.main([str(part) for part in (*argv, *(VQA if task == "vqa" else ()), *options)])


def started(files, task, out, *options, **more):
    """What a run hands to the training loop, which does not run."""
    seen = {}

    def fit(args, moil, batches, loss, evaluate, *, groups, **rest):
        seen.update(args=args, moil=moil, batches=batches, loss=loss, evaluate=evaluate, groups=groups)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "fit", fit)
        run(files, task, out, *options, **more)
    return Namespace(**seen)


# ---- what trains, and how -------------------------------------------------------------------------------------------


def test_defaults_are_the_release_s(files, tmp_path):
    small = ("--device", "cpu", "--limit", "32")
    (tmp_path / "many").mkdir()
    made = {"vilt": files["vilt"], "flickr30k": example_data.flickr30k(tmp_path / "many", train=16)}
    run_ = started(made, "retrieval", tmp_path, small=small)
    args = run_.args
    assert (args.batch_size * args.accumulate, args.lr, args.head_lr, args.epochs) == (256, 1e-4, 1e-4, 10)
    assert (args.precision, args.weight_decay, args.dropout, args.augment) == ("fp16", 0.01, 0.1, "randaugment")
    config = run_.moil.config
    assert (config.rank, config.transform_rank, config.decay, config.init) == (96, 96, 0.9996, "released")
    assert (config.reduction, config.interval, config.ffn, config.loss_weight) == ("mean", 1, False, 1.0)
    assert run_.batches.dataset.augment is randaugment.rand_augment
    published = vilt_moil.PUBLISHED
    sizes = {task: each["batch_size"] * each["accumulate"] for task, each in published.items()}
    assert sizes == {"vqa": 256, "nlvr2": 128, "retrieval": 256}
    assert {task: each["head_lr"] for task, each in published.items()} == {
        "vqa": 1e-3,
        "nlvr2": 1e-4,
        "retrieval": 1e-4,
    }


def test_two_images_are_told_apart_and_heads_train_at_their_own_rate(files, tmp_path, recwarn):
    run_ = started(files, "nlvr2", tmp_path, "--head-lr", "0.5", "--adapter-lr", "0.25", "--adapter-eps", "1e-12")
    assert not [str(each.message) for each in recwarn if "modules_to_save" in str(each.message)]
    known = hf.ViltModel.from_pretrained(files["vilt"]).embeddings.token_type_embeddings.weight
    told = run_.moil.model.vilt.embeddings.token_type_embeddings.weight
    assert torch.equal(told, known[[0, 1, 1]]) and not told.requires_grad
    rates = {id(p): {**group, "params": None} for group in run_.groups for p in group["params"]}
    for name, parameter in run_.moil.named_parameters():
        group = rates.pop(id(parameter))
        is_head, is_live = name.startswith("classifier"), "live_" in name
        assert group["lr"] == (0.5 if is_head else 0.01 if is_live else 0.25), name
        assert group.get("eps") == (None if is_head or is_live else 1e-12)
        # As the release's list of names has it: the scale of the classifier's LayerNorm decays
        decays = parameter.dim() > 1 or name == "classifier.1.weight"
        assert group["weight_decay"] == (0.01 if decays else 0.0), name
    assert not rates
    assert not any("pooler" in name for name in run_.moil.heads)


def test_dropout_is_where_vilt_has_it(files, tmp_path):
    """Of the states and between the two layers of the feed-forward part; not of the attention's probabilities."""
    model = started(files, "vqa", tmp_path, "--dropout", "0.5").moil.model.train()
    layer = model.vilt.encoder.layer[0]
    assert model.vilt.embeddings.dropout.p == layer.attention.output.dropout.p == layer.output.dropout.p == 0.5
    assert model.vilt.embeddings.text_embeddings.dropout.p == 0.5
    assert layer.attention.attention.dropout.p == 0.0
    states = torch.randn(4, 16)
    assert 0.3 < (layer.intermediate(states) == 0).float().mean() < 0.7
    assert (layer.eval().intermediate(states) != 0).all()


# ---- the head of retrieval ------------------------------------------------------------------------------------------


class WithMatchingHead(hf.ViltForMaskedLM):
    def __init__(self, config):
        super().__init__(config)
        self.itm_score = torch.nn.ModuleDict({"fc": torch.nn.Linear(config.hidden_size, 2)})


def test_ranking_starts_from_the_matching_head(files, tmp_path, capsys):
    model = WithMatchingHead.from_pretrained(files["vilt"])
    torch.nn.init.normal_(model.itm_score["fc"].bias)
    matching = example_data.save_checkpoint(tmp_path / "matching", model, "Vilt")
    head = {f"itm_score.fc.{name}": p.detach() for name, p in model.itm_score["fc"].named_parameters()}
    torch.save({"state_dict": {**head, "pooler.dense.bias": torch.zeros(3)}, "epoch": 3}, tmp_path / "vilt.ckpt")
    for made, options in (({"vilt": matching}, ()), ({}, ("--itm-head", tmp_path / "vilt.ckpt"))):
        run_ = started(files | made, "retrieval", tmp_path, *options)
        assert torch.equal(run_.moil.model.rank_output.weight, head["itm_score.fc.weight"][1:])
        assert torch.equal(run_.moil.model.rank_output.bias, head["itm_score.fc.bias"][1:])
        assert run_.moil.heads == ["rank_output.weight", "rank_output.bias"]
        assert not hasattr(run_.moil.model, "itm_score")
    assert "starts at random" not in capsys.readouterr().err
    started(files, "retrieval", tmp_path)
    assert "rank_output starts at random" in capsys.readouterr().err
    torch.save({"itm_score.fc.weight": torch.zeros(2, 7), "itm_score.fc.bias": torch.zeros(2)}, tmp_path / "wide.ckpt")
    (tmp_path / "text.ckpt").write_text("no tensors")
    for file, message in (("wide", r"expected itm_score.fc of \(2, 16\), got \(2, 7\)"), ("text", "expected tensors")):
        with pytest.raises(SystemExit, match=rf"^error: --itm-head: .*{file}.ckpt: {message}"):
            run(files, "retrieval", tmp_path, "--itm-head", tmp_path / f"{file}.ckpt")


def test_a_model_that_ranks_already_keeps_its_head(files, tmp_path, capsys):
    ranks = hf.ViltForImageAndTextRetrieval.from_pretrained(files["vilt"])
    made = {"vilt": example_data.save_checkpoint(tmp_path / "ranks", ranks, "Vilt")}
    run_ = started(files | made, "retrieval", tmp_path)
    assert torch.equal(run_.moil.model.rank_output.weight, ranks.rank_output.weight)
    assert "starts at random" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "folder", "options", "augmented"),
    [
        ("vqa", "vqa2", (), False),
        ("retrieval", "coco", ("--batch-size", "1"), False),
        ("retrieval", "flickr30k", ("--augment", "none"), False),
        ("vqa", "vqa2", ("--augment", "randaugment"), True),
    ],
)
def test_images_change_only_where_asked_for(files, tmp_path, task, folder, options, augmented):
    dataset = started(files, task, tmp_path, *options, folder=folder).batches.dataset
    assert (dataset.augment is randaugment.rand_augment) == augmented
    torch.manual_seed(0)
    example, images = dataset[0]
    assert (example, len(images)) == (dataset.examples[0], 1) and len(dataset) == len(dataset.examples)
    (plain,) = map(data.load_image, example.images)
    assert any(dataset[0][1][0].tobytes() != plain.tobytes() for _ in range(10)) == augmented


# ---- splits and labels ----------------------------------------------------------------------------------------------


def test_vqa_trains_on_most_of_the_validation_split(files, tmp_path):
    run_ = started(files, "vqa", tmp_path)
    train = [example.images[0].name for example in run_.batches.dataset.examples]
    assert [name[5:] for name in train[:8]] == [f"train2014_{9 + n:012d}.jpg" for n in range(8)]
    assert len(train) == 10 and all("val2014" in name for name in train[8:])
    metrics = run_.evaluate()
    assert set(metrics) == {f"{mode}_accuracy" for mode in ("student", "live", "teacher")}
    answered = json.loads((tmp_path / "answers_held-out.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    tested = [Path(row["images"][0]).name for row in rows]
    assert [row["question_id"] for row in answered] == [row["key"] for row in rows] and len(rows) == 2
    assert not set(tested) & set(train) and set(tested) | set(train[8:]) == {
        f"COCO_val2014_{9 + n:012d}.jpg" for n in range(4)
    }
    for mode in ("live", "teacher"):
        assert len((tmp_path / f"predictions_{mode}.jsonl").read_text().splitlines()) == 2
    again = questions.held_out(data.read_vqa(files["vqa2"], "val2014"), 2)[1]
    assert [example.key for example in again] == [row["key"] for row in rows]  # the same, whatever the seed
    whole = started(files, "vqa", tmp_path, "--split", "val2014").batches.dataset.examples
    assert len(whole) == 8
    with pytest.raises(SystemExit, match=r"^error: --held-out: expected 1 to 3 of the 4 images of val2014, got 4"):
        run(files, "vqa", tmp_path, "--held-out", "4")


def test_all_questions_about_an_image_are_held_out_together():
    examples = [data.Example("", (Path(f"{n % 10}.jpg"),), n) for n in range(30)]
    rest, test = questions.held_out(examples, 4)
    assert len(test) == 12 and len({example.images for example in test}) == 4
    assert sorted(rest + test, key=lambda example: example.owner) == examples
    assert {example.images for example in test} != {(Path(f"{n}.jpg"),) for n in range(4)}


def test_labels_are_answers_that_annotators_agree_on(tmp_path):
    for split, agreed in (("train2014", ["Red.", "two", "two", "a dog", ""]), ("val2014", ["red", "dog", "cat", ""])):
        rows = [{"multiple_choice_answer": answer, "answers": [{"answer": "blue"}]} for answer in agreed]
        example_data.write_json(tmp_path / f"v2_mscoco_{split}_annotations.json", {"annotations": rows})
    both = ("train2014", "val2014")
    assert questions.frequent_answers(tmp_path, both, 2) == ["red", "2", "dog"]
    assert questions.frequent_answers(tmp_path, both[:1], 1) == ["red", "2", "dog"]
    assert questions.frequent_answers(tmp_path, both, 3) == []
    examples = [data.Example(answer, (), answers=(answer, "blue")) for answer in ("dog", "Dog", "a dog")]
    assert questions.answerable(examples, ["dog"]) == examples[:1]


def test_answers_without_known_ones(files, tmp_path):
    """test-dev's: for the challenge's server."""
    run(files, "vqa", tmp_path)
    again = ("--evaluate", tmp_path / "epoch_1", "--split", "test-dev2015")
    assert run(files, "vqa", tmp_path / "test", *again) == {"answered": 3}
    rows = json.loads((tmp_path / "test/answers_test-dev2015.json").read_text())
    assert [row["question_id"] for row in rows] == [90_000, 90_001, 90_002]
    assert {row["answer"] for row in rows} <= set(example_data.NAMES)
    lines = [json.loads(line) for line in (tmp_path / "test/predictions.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == [row["answer"] for row in rows]
    assert all(line["answers"] == [] and line["score"] is None for line in lines)
    with pytest.raises(SystemExit, match=r"^error: --split: the answers of test-dev2015 are not public"):
        run(files, "vqa", tmp_path, "--split", "test-dev2015")
    with pytest.raises(SystemExit, match=r"^error: --split: expected nlvr2's dev, test1, got 'val2014'"):
        run(files, "nlvr2", tmp_path, "--split", "val2014")


@pytest.mark.parametrize(
    ("folder", "split", "trains", "tested"),
    [("flickr30k", "test", 14, 8), ("flickr30k", "val", 12, 2), ("coco", "test", 2, 2)],
)
def test_captions_of_the_validation_split_train_where_the_release_lets_them(files, folder, split, trains, tested):
    args = Namespace(data=files[folder], images=None, split=split, limit=None, task="retrieval")
    train, test = vilt_moil.read_captions(args)
    assert (len(train), len(test)) == (trains, tested)
    owners = {example.owner: example.images for example in train}
    assert len(set(owners.values())) == len(owners)  # two splits, no owner twice
    assert not {example.images for example in train} & {example.images for example in test}


def test_the_same_caption_twice_is_one(tmp_path):
    folder = example_data.flickr30k(tmp_path, train=2, test=1)
    path = folder / "dataset_flickr30k.json"
    value = json.loads(path.read_text())
    for image in value["images"]:
        image["sentences"][1]["raw"] = "the same"
        image["sentences"].append(image["sentences"][1])
    path.write_text(json.dumps(value))
    args = Namespace(data=folder, images=None, split="test", limit=None, task="retrieval")
    train, test = vilt_moil.read_captions(args)
    assert [example.text for example in train][1::2] == ["the same"] * 3 and len(test) == 2


# ---- batches, losses, metrics ---------------------------------------------------------------------------------------


def test_wrong_captions_are_of_other_images():
    examples = [data.Example(f"text {n}", (), owner=n // 2) for n in range(6)]
    texts = vilt.Batches(None, wrong=examples).wrong_texts(examples[2])
    assert len(texts) == 15 and set(texts) == {"text 0", "text 1", "text 4", "text 5"}


def test_soft_scores():
    """By how many annotators gave an answer, letter for letter, as the release counts them."""
    answers = ("red", "red", "a red", "two", "2", "TWO", "cat", "cat", "cat", "cat")
    scores = questions.soft_scores(data.Example("", (), answers=answers), {"red": 0, "2": 1, "cat": 2, "dog": 3})
    assert scores.tolist() == pytest.approx([0.6, 0.3, 1.0, 0.0])


def test_statements_about_two_images(tmp_path, files):
    examples = data.read_nlvr2(example_data.nlvr2(tmp_path, test=3), "dev")
    args = Namespace(task="nlvr2", device="cpu", batch_size=2, workers=0, out=tmp_path, split="dev")
    seen = []

    def model(**batch):  # "yes" to everything
        seen.append(batch)
        return Namespace(logits=torch.tensor([[0.0, 1.0]]).expand(len(batch["input_ids"]), 2))

    task = vilt.Task(args, model, AutoProcessor.from_pretrained(files["vilt"]), examples, [])
    assert task.evaluate() == {"accuracy": pytest.approx(2 / 3)}
    assert [tuple(batch["pixel_values"].shape[:3]) for batch in seen] == [(2, 2, 3), (1, 2, 3)]
    labels = [batch["labels"].tolist() for batch in task.loader]
    assert labels == [[1, 0], [1]]
    given = (tmp_path / "predictions_dev.csv").read_text().splitlines()
    assert given == ["dev-100-0-0,True", "dev-101-0-0,True", "dev-102-0-0,True"]
    left, right = seen[0]["pixel_values"][1, :, :, 0, 0]
    assert left.argmax() == 1 and right.argmax() == 2  # the first one green, the second one blue


def test_captions_are_ranked_and_trained_against_wrong_ones(tmp_path, files):
    splits = data.read_karpathy(files["flickr30k"])
    processor = AutoProcessor.from_pretrained(files["vilt"])
    words = torch.tensor(processor.tokenizer.convert_tokens_to_ids(example_data.NAMES))
    colours = torch.tensor(list(example_data.COLOURS.values())) / 255 * 4 - 2  # as the processor normalises

    def model(input_ids, pixel_values, **_):  # 5 where the text names the picture's colour
        named = (input_ids[:, :, None] == words).any(dim=1).long().argmax(dim=1)
        seen = torch.cdist(pixel_values[:, :, 0, 0], colours).argmin(dim=1)
        return Namespace(logits=5.0 * (named == seen)[:, None])

    args = Namespace(task="retrieval", device="cpu", batch_size=3, workers=0, out=tmp_path)
    task = vilt.Task(args, model, processor, splits["test"], [])
    assert set(task.evaluate("live").values()) == {1.0}
    rows = [json.loads(line) for line in (tmp_path / "predictions_live.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in rows] == [1] * (4 + 8)
    assert rows[0]["right"] == ["A blue picture.", "The picture is blue"] == rows[0]["found"][:2]
    train = splits["train"][:8]  # of four colours
    batch = vilt.Batches(processor, wrong=train)(list(data.Examples(train)))
    assert batch["input_ids"].shape[0] == 8 * 16 and batch["pixel_values"].shape[0] == 8
    assert task.loss(batch, 0.0).item() == pytest.approx(math.log(1 + 15 * math.exp(-5)), rel=1e-5)


def test_moil_learns_and_the_student_follows(files, tmp_path):
    options = ("--epochs", "16", "--batch-size", "2", "--lr", "0.02", "--head-lr", "0.02", "--eval-every", "16")
    history = run(files, "vqa", tmp_path, *options, "--split", "val2014")
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[-1]["student_accuracy"] >= 0.75  # one of four colours by guessing
    assert history[-1]["relative_error"] < 0.3
    peft = pytest.importorskip("peft")
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert sorted(answers) == sorted(example_data.NAMES)
    batch = torch.arange(8).view(2, 4) + 4, torch.randn(2, 3, 32, 32)
    logits = []
    for make in (lambda m: MoIL.from_pretrained(m, tmp_path / "epoch_16").model, None):
        model = hf.ViltForQuestionAnswering.from_pretrained(files["vilt"], num_labels=4, ignore_mismatched_sizes=True)
        model = make(model) if make else peft.PeftModel.from_pretrained(model, tmp_path / "lora")
        torch.manual_seed(0)  # the order of patches
        logits.append(model.eval()(input_ids=batch[0], pixel_values=batch[1]).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
