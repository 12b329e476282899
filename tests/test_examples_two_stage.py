"""Two-stage models from end to end on tiny region features: they train, resume, reload, and read published files."""

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
import region_data  # noqa: E402
import two_stage  # noqa: E402
from common import region_models, training  # noqa: E402

SMALL = ("--device", "cpu", "--batch-size", "4", "--accumulate", "1", "--rank", "4", "--lr", "0.01", "--epochs", "2")
SMALL += ("--precision", "fp32", "--head-lr", "0.01", "--decay", "0.5", "--min-answers", "1", "--held-out", "2")
# Every kind, task and method, and both ways of keeping regions: (kind, task, method, features)
RUNS = [
    ("lxmert", "vqa", "moil", "tsv"),
    ("visualbert", "nlvr2", "aurora", "tsv"),
    ("bert", "vqa", "lora", "npz"),
    ("lxmert", "nlvr2", "lora", "npz"),
    ("visualbert", "vqa", "moil", "tsv"),
    ("bert", "nlvr2", "aurora", "npz"),
]
EVERY = [(kind, task) for kind in region_models.KINDS for task in ("vqa", "nlvr2")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return region_data.write_all(tmp_path_factory.mktemp("files"))


def run(files, kind, task, out, *options, method="lora", features="tsv"):
    name = "vqa2" if task == "vqa" else task
    argv = ["--kind", kind, "--task", task, "--method", method, "--data", files[name], "--out", out, *SMALL]
    argv += ["--model", files[kind], "--tokenizer", files[kind], "--features", files[f"{name}.{features}"], *options]
    return two_stage.main([str(part) for part in argv])


def started(files, kind, task, out, *options, **more):
    """What a run hands to the training loop, which does not run."""
    seen = {}

    def fit(args, adapter, batches, loss, evaluate, **rest):
        seen.update(args=args, adapter=adapter, batches=batches, loss=loss, evaluate=evaluate)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "fit", fit)
        run(files, kind, task, out, *options, **more)
    return Namespace(**seen)


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "task", "method", "features"), RUNS)
def test_trains_evaluates_resumes_and_reloads(files, kind, task, method, features, tmp_path, recwarn):
    how = {"method": method, "features": features}
    whole = run(files, kind, task, tmp_path / "whole", **how)
    assert [record["epoch"] for record in whole] == [1, 2] and all(math.isfinite(each["loss"]) for each in whole)
    modes = ("student_", "live_", "teacher_") if method == "moil" else ("",)
    assert {f"{mode}accuracy" for mode in modes} == {name for name in whole[-1] if name.endswith("accuracy")}
    assert not [str(each.message) for each in recwarn if "modules_to_save" in str(each.message)]

    with example_data.stopped_in_the_second_evaluation(training):
        run(files, kind, task, tmp_path / "parts", **how)
    resumed = run(files, kind, task, tmp_path / "parts", "--resume", **how)
    assert [each["loss"] for each in resumed] == [each["loss"] for each in whole]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "whole/epoch_2" / name).read_bytes() == (tmp_path / "parts/epoch_2" / name).read_bytes()

    again = run(files, kind, task, tmp_path / "again", "--evaluate", tmp_path / "whole/epoch_2", **how)
    assert again == {"accuracy": whole[-1][f"{modes[0]}accuracy"]}
    kept = (tmp_path / "whole/predictions.jsonl").read_bytes()
    assert (tmp_path / "again/predictions.jsonl").read_bytes() == kept
    assert {json.loads(line)["kind"] for line in kept.splitlines()} == {"answer"}
    official = tmp_path / "again" / ("answers_held-out.json" if task == "vqa" else "predictions_dev.csv")
    assert official.is_file()


def test_learns_what_the_regions_say(files, tmp_path):
    options = ("--epochs", "16", "--batch-size", "2", "--eval-every", "16", "--split", "val2014", "--dropout", "0")
    history = run(files, "lxmert", "vqa", tmp_path, *options)
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    assert history[-1]["accuracy"] >= 0.75  # one of four colours by guessing


def test_answers_for_the_server(files, tmp_path):
    run(files, "lxmert", "vqa", tmp_path, "--epochs", "1")
    again = ("--evaluate", tmp_path / "epoch_1", "--split", "test-dev2015")
    assert run(files, "lxmert", "vqa", tmp_path / "test", *again) == {"answered": 3}
    rows = json.loads((tmp_path / "test/answers_test-dev2015.json").read_text())
    assert [row["question_id"] for row in rows] == [90_000, 90_001, 90_002]


# ---- models ---------------------------------------------------------------------------------------------------------


def batch_of(run_, count=3):
    """Of the first examples, whose images have different numbers of regions."""
    dataset = run_.batches.dataset
    return run_.batches.collate_fn([dataset[number] for number in range(count)])


@pytest.mark.parametrize(("kind", "task"), EVERY)
def test_padding_changes_nothing_and_every_image_counts(files, kind, task, tmp_path):
    run_ = started(files, kind, task, tmp_path, "--dropout", "0")
    model, logits = run_.adapter.model.eval(), region_models.KINDS[kind][-1]
    assert model.config.hidden_dropout_prob == 0
    batch, dataset = batch_of(run_), run_.batches.dataset
    assert len(set(batch["region_mask"].sum(dim=2).flatten().tolist())) > 1
    together = logits(model, batch)
    assert together.shape == (3, 4 if task == "vqa" else 2)
    for number in range(3):
        alone = logits(model, run_.batches.collate_fn([dataset[number]]))[0]
        torch.testing.assert_close(alone, together[number], rtol=1e-4, atol=1e-5)
    for image in range(batch["boxes"].shape[1]):
        features = batch["features"].clone()
        features[:, image] += batch["region_mask"][:, image, :, None]
        assert not torch.allclose(logits(model, {**batch, "features": features}), together, atol=1e-5)
    if task == "nlvr2":
        swapped = {name: batch[name].flip(1) for name in ("features", "boxes", "region_mask")}
        assert not torch.allclose(logits(model, {**batch, **swapped}), together, atol=1e-5)


@pytest.mark.parametrize("kind", ["lxmert", "visualbert"])
def test_answers_are_transformers_own(files, kind, tmp_path):
    run_ = started(files, kind, "vqa", tmp_path)
    model, batch = run_.adapter.model.eval(), batch_of(run_)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    seen, boxes, mask = (batch[name][:, 0] for name in ("features", "boxes", "region_mask"))
    if kind == "lxmert":
        own = model(**text, visual_feats=seen, visual_pos=boxes, visual_attention_mask=mask).question_answering_score
    else:
        own = model(**text, visual_embeds=seen, visual_attention_mask=mask).logits
    torch.testing.assert_close(region_models.KINDS[kind][-1](model, batch), own)
    labels = batch["labels"]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(own, labels, reduction="none").sum(dim=1).mean()
    torch.testing.assert_close(run_.loss(batch, 0.0), expected)


@pytest.mark.parametrize("box", [6, 4, 0])
def test_bert_reads_regions_as_oscar_does(files, box, tmp_path):
    """Boxes behind the features, no positions, its names of modules: its checkpoint needs no new part but the head."""
    config = hf.BertConfig(**region_data.SIZES, num_hidden_layers=1)
    config.img_feature_dim, config.num_images, config.use_img_layernorm = region_data.WIDTH + box, 1, 1
    config.img_layer_norm_eps = 1e-12
    oscar = region_models.RegionBertForAnswers(config)
    made = {**files, "bert": region_data.checkpoint(tmp_path / "oscar", oscar)}
    new, run_ = started(files, "bert", "vqa", tmp_path), started(made, "bert", "vqa", tmp_path)
    assert sorted(new.adapter.heads) == [
        *("bert.img_embedding.bias", "bert.img_embedding.weight", "classifier.bias", "classifier.weight"),
    ]
    assert run_.adapter.heads == ["classifier.weight", "classifier.bias"]
    model, batch = run_.adapter.model.eval(), batch_of(run_, 1)
    loaded = model.bert
    assert torch.equal(loaded.img_embedding.weight, oscar.bert.img_embedding.weight)
    logits = region_models.bert_logits(model, batch)
    backwards = {name: batch[name].flip(2) for name in ("features", "boxes")}
    torch.testing.assert_close(region_models.bert_logits(model, {**batch, **backwards}), logits, rtol=1e-4, atol=1e-5)
    left, top, right, bottom = batch["boxes"][0, 0].unbind(-1)
    numbers = torch.stack([left, top, right, bottom, right - left, bottom - top], dim=-1)[:, :box]
    regions_ = torch.cat([batch["features"][0, 0], numbers], dim=-1)
    seen = loaded.LayerNorm(loaded.img_embedding(regions_))
    states = torch.cat([loaded.embeddings(input_ids=batch["input_ids"])[0], seen])[None]
    expected = model.classifier(loaded.pooler(loaded.encoder(states)[0]))
    torch.testing.assert_close(logits, expected)


# ---- what is wrong is told -------------------------------------------------------------------------------------------


def test_wrong_features_are_told(files, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "nowhere.tsv", r"--features: .*nowhere.tsv: No such file"),
        (tmp_path / "empty", r"--features: .*empty: no .npz files in this folder"),
        (tmp_path / "regions.h5", r"--features: .*regions.h5: expected a .tsv file, or a folder of .npz files"),
    ):
        with pytest.raises(SystemExit, match=rf"^error: {message}"):
            run({**files, "vqa2.tsv": path}, "bert", "vqa", tmp_path)
    for kind in ("lxmert", "visualbert"):
        made = region_data.write_npz(tmp_path / kind, [])
        for name in files["vqa2.tsv"].read_text().splitlines():
            region_data.np.savez(made / f"{name.split()[0]}.npz", **region_data.regions(name.split()[0], 5))
        with pytest.raises(SystemExit, match=r"^error: --features: regions have 5 numbers, .* reads 8$"):
            run({**files, "vqa2.tsv": made}, kind, "vqa", tmp_path)


def test_wrong_checkpoints_are_told(files, tmp_path):
    with pytest.raises(
        SystemExit, match=r"^error: --model: .*: expected a checkpoint of visual_bert, got one of lxmert"
    ):
        run({**files, "visualbert": files["lxmert"]}, "visualbert", "vqa", tmp_path)
    deep = hf.BertConfig(**region_data.SIZES, num_hidden_layers=1)
    made = region_data.checkpoint(tmp_path / "shallow", hf.BertModel(deep))
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(
        SystemExit, match=r"^error: --model: .*: no values for bert.*layer.1.*: is it a checkpoint of bert"
    ):
        run({**files, "bert": made}, "bert", "vqa", tmp_path)
    with pytest.raises(SystemExit, match=r"^error: --tokenizer: .*nowhere: "):
        run(files, "bert", "vqa", tmp_path, "--tokenizer", tmp_path / "nowhere")
    with pytest.raises(SystemExit, match=r"^error: --model: .*nowhere: "):
        run(files, "bert", "vqa", tmp_path, "--model", tmp_path / "nowhere")


def test_defaults_are_one_recipe(files, tmp_path):
    argv = ["--kind", "bert", "--task", "vqa", "--data", files["vqa2"], "--features", files["vqa2.tsv"], "--limit", "9"]
    argv += ["--model", files["bert"], "--out", tmp_path, "--device", "cpu", "--min-answers", "1", "--held-out", "2"]
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_stage, "loader", lambda *args, **more: None)
        patch.setattr(training, "fit", lambda args, adapter, *rest, **more: seen.update(args=args, adapter=adapter))
        two_stage.main([str(part) for part in argv])
    args, config = seen["args"], seen["adapter"].config
    assert (args.batch_size * args.accumulate, args.lr, args.head_lr, args.weight_decay) == (256, 1e-4, 1e-3, 0.01)
    assert (args.precision, args.epochs, args.regions, args.max_tokens) == ("fp16", 10, 50, 40)
    assert (args.method, config.rank) == ("moil", 96)
    assert seen["adapter"].model.config.hidden_dropout_prob == 0.1  # the checkpoint's
