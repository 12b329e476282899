"""The examples from end to end, on tiny files of the published formats: they train, resume, save and reload."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
hf = pytest.importorskip("transformers")
pytest.importorskip("PIL")

import blip_retrieval  # noqa: E402
import blip_video  # noqa: E402
import blip_vqa  # noqa: E402
import example_data  # noqa: E402
import vilt_moil  # noqa: E402
from common import retrieval, training, vilt  # noqa: E402

from peft_kernels.objectives import recall_at_k, retrieval_ranks  # noqa: E402

MODULES = {"retrieval": blip_retrieval, "vqa": blip_vqa, "video": blip_video, "vilt": vilt_moil}
SMALL = ("--device", "cpu", "--batch-size", "4", "--rank", "4", "--lr", "0.01", "--epochs", "2")
VILT = (*SMALL, "--accumulate", "1", "--head-lr", "0.01", "--decay", "0.5", "--min-answers", "1", "--held-out", "2")
VILT += ("--precision", "fp32", "--init", "default", "--dropout", "0")
WAYS = ("image_to_text", "text_to_image")
RECALLS = {f"{way}_recall_{k}" for way in WAYS for k in (1, 5, 10)}
RANKS = {f"{way}_{kind}_rank" for way in WAYS for kind in ("median", "mean")}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return example_data.write_all(tmp_path_factory.mktemp("files"))


# Every script and task: (module, data set, checkpoint, its options)
RUNS = {
    "flickr30k": ("retrieval", "flickr30k", "blip", (*SMALL, "--queue-size", "16")),
    "coco": ("retrieval", "coco", "blip", (*SMALL, "--batch-size", "2", "--queue-size", "0", "--alpha", "0")),
    "lora": (
        *("retrieval", "flickr30k", "blip"),
        (*SMALL, "--method", "lora", "--precision", "bf16", "--enhance", "all", "--no-augment", "--accumulate", "2"),
    ),
    "cp": (
        *("retrieval", "flickr30k", "blip"),
        (*SMALL, "--core", "cp", "--gates", "gated", "--sharing", "none", "--no-released", "--workers", "1"),
    ),
    "vqa-rank": ("vqa", "vqa2", "blip-qa", SMALL),
    "vqa-generate": ("vqa", "vqa2", "blip-qa", (*SMALL, "--inference", "generate", "--beams", "2")),
    "video": ("video", "msrvtt", "blip", (*SMALL, "--task", "retrieval", "--frames", "2", "--image-size", "48")),
    "didemo": (
        *("video", "didemo", "blip"),
        (*SMALL, "--task", "retrieval", "--dataset", "didemo", "--frames", "2", "--image-size", "48"),
    ),
    "video-qa": ("video", "msrvtt", "blip-qa", (*SMALL, "--task", "qa", "--frames", "2", "--image-size", "48")),
    "vilt-vqa": ("vilt", "vqa2", "vilt", (*VILT, "--task", "vqa")),
    "vilt-nlvr2": ("vilt", "nlvr2", "vilt", (*VILT, "--task", "nlvr2", "--batch-size", "2", "--accumulate", "2")),
    "vilt-retrieval": ("vilt", "flickr30k", "vilt", (*VILT, "--task", "retrieval", "--limit", "8")),
}


def run(files, name, out, *more):
    module, dataset, model, options = RUNS[name]
    argv = ["--data", files[dataset], "--model", files[model], "--out", out, *options, *more]
    return MODULES[module].main([str(part) for part in argv])


def metrics(record):
    return {key: value for key, value in record.items() if key not in ("epoch", "step", "loss", "lr")}


@pytest.fixture
def scores(monkeypatch):
    """All tables of scores that recalls are taken of: more to compare than the recalls."""
    seen = []

    def watched(similarity, **options):
        seen.append(similarity.clone())
        return recall_at_k(similarity, **options)

    def ranked(similarity, positives):
        seen.append(similarity.clone())
        return retrieval_ranks(similarity, positives)

    monkeypatch.setattr(retrieval, "retrieval_ranks", ranked)
    monkeypatch.setattr(vilt, "recall_at_k", watched)
    return seen


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_files(out, name, history):
    """What every run leaves for pictures: run.json, losses.jsonl, predictions.jsonl."""
    losses = lines(out / "losses.jsonl")
    steps = len(losses) // 2
    assert [row["step"] for row in losses] == list(range(1, 2 * steps + 1))
    assert [record["step"] for record in history] == [steps, 2 * steps]
    for record, first in zip(history, (0, steps)):
        mean = sum(row["loss"] for row in losses[first : first + steps]) / steps
        assert record["loss"] == pytest.approx(mean)
    about = json.loads((out / "run.json").read_text())
    method = "moil" if name.startswith("vilt") else "lora" if name == "lora" else "aurora"
    assert (about["script"], about["method"]) == (MODULES[RUNS[name][0]].__name__, method)
    assert about["trained"].keys() == {"adapter", "live", "head"} and 0 < about["trained"]["adapter"] < about["total"]
    assert about["settings"]["lr"] == "0.01"
    assert about["stored_bytes"] == sum(file.stat().st_size for file in (out / "epoch_2").iterdir())


@pytest.mark.parametrize("name", RUNS)
def test_trains_evaluates_saves_and_reloads(files, name, tmp_path, scores):
    history = run(files, name, tmp_path)
    assert [record["epoch"] for record in history] == [1, 2]
    assert history == json.loads((tmp_path / "results.json").read_text())
    if not name.startswith("vilt"):
        assert [record["lr"] for record in history] == pytest.approx([0.01, 0.005])  # a cosine's first half
    elif name == "vilt-vqa":  # the last of two steps an epoch, down from a tenth of the way
        assert [record["lr"] for record in history] == pytest.approx([0.01 * 1.5 / 1.8, 0.01 * 0.5 / 1.8])
    ranked = "accuracy" not in str(history)
    wanted = {"accuracy"} if not ranked else RECALLS if name.startswith("vilt") else RECALLS | RANKS
    check_files(tmp_path, name, history)
    for record in history:
        assert math.isfinite(record["loss"])
        found = metrics(record)
        if name.startswith("vilt"):
            assert found.pop("relative_error", 0) >= 0  # at the first step there is none
            for mode in ("live", "teacher"):
                assert {f"{mode}_{key}" for key in wanted} < found.keys()
            found = {key[8:]: value for key, value in found.items() if key.startswith("student_")}
        assert found.keys() == wanted
        assert all(0 <= value <= 1 for key, value in found.items() if key not in RANKS)
        assert all(1 <= found[key] <= 8 for key in RANKS & found.keys())

    trained = len(scores)
    again = run(files, name, tmp_path / "again", "--evaluate", tmp_path / "epoch_2")
    assert again == found
    if ranked:
        last = scores[trained - 3 :][:1] if name.startswith("vilt") else scores[trained - 2 : trained]  # the student's
        assert all(torch.equal(a, b) for a, b in zip(scores[trained:], last, strict=True))
        assert not torch.equal(scores[0], last[0]), "the second epoch has changed nothing"


@pytest.mark.parametrize("name", ["flickr30k", "vqa-rank", "video", "video-qa", "vilt-vqa"])
def test_zero_shot(files, name, tmp_path):
    results = run(files, name, tmp_path, "--zero-shot")
    assert results.keys() == ({"accuracy"} if "accuracy" in results else RECALLS | RANKS)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == results
    assert not list(tmp_path.glob("epoch_*"))


@pytest.mark.parametrize("name", ["flickr30k", "video-qa", "vilt-nlvr2"])
def test_resumed_equals_uninterrupted(files, name, tmp_path):
    options = () if name.startswith("vilt") else ("--augment",)
    whole = run(files, name, tmp_path / "whole", *options)
    with example_data.stopped_in_the_second_evaluation(training):
        run(files, name, tmp_path / "parts", *options)
    assert not (tmp_path / "parts/epoch_2").exists()
    assert run(files, name, tmp_path / "parts", *options, "--resume") == whole
    for file in ("epoch_2/adapter_model.safetensors", "epoch_2/adapter_config.json", "losses.jsonl"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    with pytest.raises(SystemExit, match=r"was trained with --lr 0\.01$"):
        run(files, name, tmp_path / "parts", *options, "--resume", "--lr", "0.02")
    (tmp_path / "parts/losses.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    with pytest.raises(SystemExit, match=r"losses\.jsonl: expected the losses of \d+ steps, got 1$"):
        run(files, name, tmp_path / "parts", *options, "--resume")


def test_accumulated_batches_are_one_large_batch(files, tmp_path):
    options = ("--method", "lora", "--limit", "4", "--epochs", "1", "--frames-drawn", "even", "--drop-path", "0")
    options += ("--dropout", "0", "--adapter-dropout", "0")
    (whole,) = run(files, "video-qa", tmp_path / "whole", *options, "--batch-size", "4")
    (parts,) = run(files, "video-qa", tmp_path / "parts", *options, "--batch-size", "2", "--accumulate", "2")
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    states = [torch.load(tmp_path / out / "state.pt")["state"]["optimizer"]["state"] for out in ("whole", "parts")]
    assert len(states[0]) == len(states[1]) > 10
    for large, summed in zip(*(state.values() for state in states)):  # Adam's mean of gradients: 0.1 of the first one
        torch.testing.assert_close(large["exp_avg"], summed["exp_avg"], rtol=1e-4, atol=1e-7)


def test_captions_of_test_videos_never_train(files, tmp_path, monkeypatch):
    captions = [(files["msrvtt"] / f"{split}.jsonl").read_text() for split in ("train", "test")]
    (files["msrvtt"] / "all.jsonl").write_text("".join(captions))
    monkeypatch.setattr(training, "fit", lambda args, adapter, batches, *rest, **more: batches.dataset.examples)
    trained = run(files, "video", tmp_path, "--train", "all.jsonl", "--batch-size", "1")
    assert [example.key for example in trained] == [f"video{number}" for number in range(6)]
    limited = run(files, "video", tmp_path, "--train", "all.jsonl", "--batch-size", "1", "--limit", "2")
    assert [example.key for example in limited] == ["video0", "video1"]
    with pytest.raises(SystemExit, match="more than the 0 examples"):
        run(files, "video", tmp_path, "--train", "test.jsonl", "--limit", "1")


def test_runs_from_the_command_line(files, tmp_path):
    argv = ["--data", files["vqa2"], "--model", files["blip-qa"], "--out", tmp_path, "--device", "cpu", "--zero-shot"]
    done = subprocess.run([sys.executable, ROOT / "examples/blip_vqa.py", *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in json.loads(done.stdout.splitlines()[-1])
    rows = json.loads((tmp_path / "answers_val2014.json").read_text())
    assert [row["question_id"] for row in rows] == [9000, 9001, 9002, 9003]
    assert {row["answer"] for row in rows} <= set(example_data.NAMES)
    cases = lines(tmp_path / "predictions.jsonl")
    assert [(case["key"], case["answer"]) for case in cases] == [(row["question_id"], row["answer"]) for row in rows]
    assert sum(case["score"] for case in cases) / len(cases) == pytest.approx(
        json.loads(done.stdout.splitlines()[-1])["accuracy"]
    )
