"""The BLIP examples' defaults, which are Aurora's release's, and adapters that are trained here and judged there."""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
pytest.importorskip("transformers")
pytest.importorskip("PIL")

import blip_retrieval  # noqa: E402
import blip_video  # noqa: E402
import blip_vqa  # noqa: E402
import example_data  # noqa: E402
import torch  # noqa: E402
from common import training  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return example_data.write_all(tmp_path_factory.mktemp("files"))


VIDEOS = ("--task", "retrieval")
# (script, data set, checkpoint, its options)
RUNS = {
    "flickr30k": (blip_retrieval, "flickr30k", "blip", ()),
    "coco": (blip_retrieval, "coco", "blip", ()),
    "vqa": (blip_vqa, "vqa2", "blip-qa", ()),
    "msrvtt": (blip_video, "msrvtt", "blip", VIDEOS),
    "didemo": (blip_video, "didemo", "blip", (*VIDEOS, "--dataset", "didemo")),
    "msrvtt-qa": (blip_video, "msrvtt", "blip-qa", ("--task", "qa")),
}


def run(files, name, out, *more):
    script, dataset, model, options = RUNS[name]
    argv = ["--data", files[dataset], "--model", files[model], "--out", out, "--device", "cpu", "--batch-size", "2"]
    return script.main([str(part) for part in (*argv, *options, *more)])


# What a script takes if it is told nothing but its data: the release's configurations and scripts have these values
EVERYWHERE = {"core": "tucker", "layout": "released", "gates": "additive", "sharing": "global", "dropout": 0.1}
RETRIEVAL = {"enhance": "positives", "queue_size": 57_600, "queue_start": "random", "alpha": 0.4, "momentum": 0.995}
RETRIEVAL |= {"momentum_of": "layers", "temperature": 0.07, "drop_path": 0.0}
ANSWERS = {"label_smoothing": 0.0, "lr": 2e-5, "epochs": 5, "rank": 32, "drop_path": 0.1, "k_test": 128, "beams": 1}
VIDEO = {"lr": 1e-4, "epochs": 5, "rank": 64, "k_test": 128, "beta": 1.0, "frame_aware": True, "augment": False}
VIDEO |= {"image_size": 224, "frames": 8}
DEFAULTS = {
    "flickr30k": {**RETRIEVAL, "lr": 1e-4, "epochs": 4, "k_test": 128, "rank": 32, "beta": 0.0, "augment": True},
    "coco": {**RETRIEVAL, "lr": 1e-5, "epochs": 6, "k_test": 256, "rank": 32, "beta": 0.0, "augment": True},
    "vqa": {**ANSWERS, "inference": "rank", "augment": True},
    "msrvtt": {**RETRIEVAL, **VIDEO, "frames_drawn": "random", "crop": False, "normalize": True},
    "didemo": {**RETRIEVAL, **VIDEO, "frames_drawn": "clip", "crop": True, "normalize": False},
    "msrvtt-qa": {**ANSWERS, "inference": "generate", "loss_scale": 0.05 / 8, "image_size": 224, "augment": False},
}
# Questions lose their punctuation, captions get spaces for it; those of MSRVTT-QA stay; so many words are read
TEXTS = {"flickr30k": ("a", 30), "coco": ("a", 30), "vqa": ("ab", 50), "msrvtt": ("a", 40), "didemo": ("a", 40)}
TEXTS |= {"msrvtt-qa": ("a.b", 61)}
# of each GPU
BATCHES = {"flickr30k": 16, "coco": 16, "vqa": 16, "msrvtt": 8, "didemo": 8, "msrvtt-qa": 12}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_the_releases(files, name, tmp_path, monkeypatch):
    seen = {}

    def stops(args, adapter, batches, loss, evaluate, *, groups, **more):
        seen.update(args=vars(args), config=adapter.config.to_dict(), groups=groups, batches=batches, loss=loss)

    monkeypatch.setattr(training, "fit", stops)
    run(files, name, tmp_path)
    args, config = seen["args"], seen["config"]
    assert {key: args[key] for key in DEFAULTS[name]} == DEFAULTS[name]
    assert {key: config[key] for key in EVERYWHERE} == EVERYWHERE
    assert (args["weight_decay"], args["dropout"], args["accumulate"], config["rank"]) == (0.05, 0.1, 1, args["rank"])
    assert {(group["lr"], group["weight_decay"]) for group in seen["groups"]} == {(args["lr"], 0.05)}
    assert config["released"] and seen["batches"].drop_last
    # what the options do not say: how texts are cleaned, what is done to images, and to the loss
    clean, augment = seen["batches"].collate_fn.clean, seen["batches"].dataset.augment
    assert clean("a.b" + " c" * 60).split()[0] == TEXTS[name][0]
    assert len(clean("a" + " c" * 60).split()) == TEXTS[name][1]
    assert (type(augment).__name__, getattr(augment, "side", None)) == (
        ("Augment", example_data.SIZE) if args["augment"] else ("NoneType", None)
    )
    if "qa" in name:
        assert seen["loss"].__self__.scale == args.get("loss_scale", 1.0)
    else:
        assert seen["loss"].aware == (name in ("msrvtt", "didemo"))
    batch = next(iter(seen["batches"]))
    side = args["image_size"] or example_data.SIZE
    assert batch["pixels"].shape[1:] == (args.get("frames", 1), 3, side, side)


@pytest.mark.parametrize("target", ["flickr30k", "msrvtt", "didemo"])
def test_an_adapter_of_one_data_set_is_judged_on_another(files, target, tmp_path, monkeypatch):
    """Zero-shot transfer: trained on COCO, judged on what another script reads."""
    if not (files["coco"] / "adapter").is_dir():
        run(files, "coco", tmp_path / "coco", "--epochs", "1", "--rank", "4", "--lr", "0.1", "--queue-size", "8")
        (tmp_path / "coco/epoch_1").rename(files["coco"] / "adapter")
    loaded, measure = [], training.measure
    monkeypatch.setattr(
        training, "measure", lambda args, model, test: loaded.append(model) or measure(args, model, test)
    )
    results = run(files, target, tmp_path / "out", "--evaluate", files["coco"] / "adapter")
    assert json.loads((tmp_path / "out/evaluation.json").read_text()) == results
    stored = safetensors.torch.load_file(files["coco"] / "adapter/adapter_model.safetensors")
    own = dict(loaded[0].named_parameters())
    assert stored and all(torch.equal(own[name], value) for name, value in stored.items())
    rows = (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    ranks = [row["rank"] for row in map(json.loads, rows) if row["kind"] == "text_to_image"]
    assert sum(ranks) / len(ranks) == pytest.approx(results["text_to_image_mean_rank"])


@pytest.mark.parametrize("name", BATCHES)
def test_batches_are_the_releases(files, name, tmp_path, monkeypatch):
    """More than the tiny files have."""
    script, dataset, model, options = RUNS[name]
    argv = ["--data", files[dataset], "--model", files[model], "--out", tmp_path, "--device", "cpu", *options]
    with pytest.raises(SystemExit, match=f"--batch-size: {BATCHES[name]} is more than"):
        script.main([str(part) for part in argv])
