"""`python -m peft_kernels plots`: which pictures it draws of a folder, and what it says of the others."""

import json
import sys

import pytest
from PIL import Image
from torch import nn

from peft_kernels import LoRA, LoRAConfig, __main__
from peft_kernels.adapters.checkpoint import WEIGHTS_FILE
from peft_kernels.plots import __main__ as command
from peft_kernels.plots.runs import read_run, read_runs, score


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = value if path.suffix == ".jsonl" else [value]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_adapter(folder, rank=2):
    made = LoRA.wrap(nn.ModuleDict({"query": nn.Linear(4, 4)}), LoRAConfig(targets=["query"], rank=rank))
    made.save_pretrained(folder)


def save_run(folder, recalls=(0.2, 0.4), rank=2):
    image = folder.parent / "image.png"
    Image.new("RGB", (5, 5)).save(image)
    answer = {"kind": "answer", "images": [str(image)], "text": "?", "answer": "a", "answers": ["a"], "score": 1.0}
    caption = {"kind": "text_to_image", "text": "t", "found": [[str(image)]], "right": [str(image)], "rank": 1}
    write(folder / "predictions.jsonl", [answer, caption])
    write(folder / "predictions_live.jsonl", [answer])
    write(folder / "losses.jsonl", [{"step": step, "loss": 1 / step} for step in range(1, 5)])
    records = [
        {"epoch": i, "step": 2 * i, "loss": 1.0, "lr": 0.1, "text_to_image_recall_1": value, "live_recall_1": 0.9}
        for i, value in enumerate(recalls, start=1)
    ]
    write(folder / "results.json", records)
    for epoch in range(1, len(recalls) + 1):
        save_adapter(folder / f"epoch_{epoch}", rank)


@pytest.fixture
def saved(monkeypatch):
    """Pictures by their names, not drawn into files, which takes seconds."""
    found = {}
    monkeypatch.setattr(command, "save", lambda figure, path: found.__setitem__(path.stem, figure))
    return found


def test_a_whole_run_of_each_kind(tmp_path, saved, capsys):
    for name, rank in (("one", 2), ("two", 4)):
        save_run(tmp_path / name, rank=rank)
    write(tmp_path / "zero/evaluation.json", {"text_to_image_recall_1": 0.1})
    write(tmp_path / "zero/run.json", {"script": "blip_retrieval.py", "trained": {}})
    folders = [str(tmp_path / name) for name in ("one", "two", "zero")]
    assert __main__.main(["plots", *folders, "--out", str(tmp_path / "out")]) == 0
    own = ("factors", "answer", "text_to_image", "answer-live")
    assert set(saved) == {f"{run}-{name}" for run in ("one", "two") for name in own} | {
        *("scores", "score_by_step", "loss_by_step")
    }
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("left out")] == [
        *("left out: zero-factors: no adapter", "left out: zero-cases: no predictions.jsonl")
    ]
    assert {line for line in lines if not line.startswith("left out")} == {
        str(tmp_path / f"out/{name}.png") for name in saved
    }
    assert saved["one-answer-live"].get_suptitle() == "one, live, answer: 1 of 1 right"
    assert [text.get_text() for text in saved["one-factors"].legends[0].get_texts()] == ["epoch 1", "epoch 2"]
    axes = saved["score_by_step"].axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[2, 20], [4, 40]]] * 2
    assert axes.get_ylabel() == "mean of recalls or accuracies, %"
    axes = saved["scores"].axes[0]
    assert [tuple(each.get_offsets()[0]) for each in axes.collections if each.get_alpha()] == [(16, 40), (32, 40)]
    assert axes.lines[0].get_ydata() == [10, 10]
    axes = saved["loss_by_step"].axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[step, 1 / step] for step in range(1, 5)]


def test_pictures_are_files_and_the_same_every_time(tmp_path, capsys):
    save_run(tmp_path / "run")
    for out in ("a", "b"):
        assert command.main([str(tmp_path / "run"), "--out", str(tmp_path / out)]) == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "run-factors.png" in names and "scores.png" not in names
    for name in names:
        first = (tmp_path / "a" / name).read_bytes()
        assert first[:4] == b"\x89PNG" and first == (tmp_path / "b" / name).read_bytes()
    assert "left out: scores: takes two runs" in capsys.readouterr().out


def test_an_adapter_alone(tmp_path, saved):
    save_adapter(tmp_path / "run/epoch_3")
    assert command.main([str(tmp_path / "run/epoch_3")]) == 0
    assert list(saved) == ["epoch_3-factors"] and not saved["epoch_3-factors"].legends


def test_a_run_of_the_demo(tmp_path, saved):
    result = {"method": "MoIL", "trained": 50, "stored_bytes": 99, "losses": [3.0, 1.0]}
    scores = {"student": {"i→t R@1": 30.0, "t→i R@1": 50.0}, "live": {"i→t R@1": 90.0, "t→i R@1": 90.0}}
    write(tmp_path / "retrieval-MoIL-0/result.json", {**result, "scores": scores})
    write(
        tmp_path / "retrieval-zero-0/result.json",
        {**result, "trained": 0, "losses": [], "scores": {"": scores["live"]}},
    )
    moil = read_run(tmp_path / "retrieval-MoIL-0", "moil")
    assert (moil.trained, moil.stored_bytes, moil.losses) == (50, 99, [(1, 3.0), (2, 1.0)])
    assert moil.scores(None) == [(0, pytest.approx(0.4))]
    assert command.main([str(tmp_path / "retrieval-MoIL-0"), str(tmp_path / "retrieval-zero-0")]) == 0
    assert set(saved) == {"scores", "loss_by_step"}


def test_parameters_are_counted_in_the_adapter_s_file_unless_the_run_says(tmp_path):
    save_run(tmp_path / "run")
    run = read_run(tmp_path / "run", "run")
    assert run.trained == 2 * 2 * 4 and run.stored_bytes == (tmp_path / "run/epoch_2" / WEIGHTS_FILE).stat().st_size
    write(tmp_path / "run/run.json", {"trained": {"adapter": 16, "live": 100}, "stored_bytes": 7})
    run = read_run(tmp_path / "run", "run")
    assert (run.trained, run.stored_bytes) == (116, 7)


def test_epochs_are_ordered_by_number(tmp_path):
    for epoch in (2, 10, 9):
        save_adapter(tmp_path / f"epoch_{epoch}")
    (tmp_path / "epoch_11").mkdir()  # begun, not written
    assert [what for what, _ in read_run(tmp_path, "run").adapters] == ["epoch 2", "epoch 10"]


def test_scores_without_a_name_are_of_what_is_kept():
    both = {
        "epoch": 1,
        "loss": 9.0,
        "accuracy": 0.5,
        "student_recall_1": 0.2,
        "student_recall_5": 0.4,
        "live_recall_1": 1,
    }
    assert score(both, None) == pytest.approx(0.3) and score(both, "accuracy") == 0.5
    assert score({"accuracy": 0.5, "teacher_accuracy": 1.0}, None) == 0.5
    assert score({"loss": 1.0, "answered": 3}, None) is None and score({"loss": 1.0}, "loss") is None


def test_a_metric_by_name(tmp_path, saved, capsys):
    save_run(tmp_path / "run")
    write(tmp_path / "run/losses.jsonl", [])
    assert command.main([str(tmp_path / "run"), "--metric", "live_recall_1"]) == 0
    axes = saved["score_by_step"].axes[0]
    assert axes.get_ylabel() == "live_recall_1, %" and axes.lines[0].get_ydata().tolist() == [90, 90]
    assert command.main([str(tmp_path / "run"), "--metric", "recall"]) == 1
    assert "there are: text_to_image_recall_1, live_recall_1" in capsys.readouterr().err


def test_without_steps_epochs_are_drawn_and_losses_of_records(tmp_path, saved):
    records = [{"epoch": epoch, "loss": 1 / epoch, "accuracy": 0.1 * epoch} for epoch in (1, 2)]
    write(tmp_path / "run/results.json", records)
    assert command.main([str(tmp_path / "run")]) == 0
    assert saved["score_by_epoch"].axes[0].get_xlabel() == "epoch"
    assert saved["loss_by_epoch"].axes[0].lines[0].get_xydata().tolist() == [[1, 1], [2, 0.5]]


def test_names_tell_folders_apart(tmp_path):
    for name in ("a/run", "b/run"):
        write(tmp_path / name / "evaluation.json", {"accuracy": 1.0})
    found = read_runs([tmp_path / "a/run", tmp_path / "b/run", tmp_path / "a/../a/run"])
    assert [run.name for run in found] == ["a/run", "b/run"]


def test_missing_images_are_told_once(tmp_path, saved, capsys):
    save_run(tmp_path / "run")
    (tmp_path / "image.png").unlink()
    assert command.main([str(tmp_path / "run")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/image.png: no image that can be read, as 0 others")


# ---- what is wrong --------------------------------------------------------------------------------------------------

CASE = {"kind": "answer", "images": ["a"], "text": "?", "answer": "a", "answers": [], "score": None}
WRONG = [
    ({}, "nothing of a run is there, expected results.json"),
    ({"runs/a/result.json": "{}"}, "the demo's runs are"),
    ({"results.json": "[{"}, "results.json: not JSON: "),
    ({"results.json": "{}"}, 'results.json: expected a list of records, each with an "epoch"'),
    ({"results.json": '[{"epoch": "one"}]'}, "results.json: expected a number as epoch, got 'one'"),
    ({"evaluation.json": "3"}, "evaluation.json: expected a JSON object, got int"),
    ({"evaluation.json": "{}", "run.json": '{"trained": 3}'}, "run.json: trained: expected a JSON object, got int"),
    ({"evaluation.json": "{}", "run.json": '{"trained": {"a": "b"}}'}, "run.json: trained: expected a number"),
    ({"losses.jsonl": '{"step": 1, "loss": 2}\n\n{"step": 2}'}, "losses.jsonl, line 3: expected numbers"),
    ({"predictions.jsonl": json.dumps(CASE) + "\n{\n"}, "predictions.jsonl, line 2: not JSON: "),
    (
        {"predictions.jsonl": '{"kind": "video"}'},
        "line 1: expected one of the kinds text_to_image, image_to_text, answer",
    ),
    (
        {"predictions.jsonl": json.dumps(CASE | {"images": "a"})},
        "line 1: not of the format of predictions: images is 'a'",
    ),
    (
        {"predictions.jsonl": json.dumps(CASE | {"images": []})},
        "line 1: not of the format of predictions: images is []",
    ),
    ({"result.json": '{"scores": []}'}, "result.json: not a result of the demo"),
    ({f"epoch_1/{WEIGHTS_FILE}": "x"}, f"{WEIGHTS_FILE}: not a whole safetensors file"),
    ({"results.json": "[]", "losses.jsonl": ""}, "nothing of a run is there"),
    ({"results.json": '[{"epoch": 1}]'}, "there is nothing to draw"),
]


@pytest.mark.parametrize(("files", "told"), WRONG, ids=[told for _, told in WRONG])
def test_what_cannot_be_read_is_one_line(tmp_path, saved, capsys, files, told):
    for name, text in files.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    (tmp_path / "run").mkdir(exist_ok=True)
    assert command.main([str(tmp_path / "run")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and told in line and not saved


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert command.main([str(tmp_path / "no")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/no: no such folder\n"


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("peft_kernels.plots")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"matplotlib.*pip install 'peft_kernels\[plots\]'"):
        __main__.main(["plots", "."])
