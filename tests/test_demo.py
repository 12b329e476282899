"""`python -m peft_kernels.demo` as a user calls it, in small: every kind of run, its files, stopping and going on."""

import argparse
import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from demo_cases import SIZES, arguments, results, tiny_models  # noqa: F401
from safetensors.torch import load_file

from peft_kernels.demo import __main__ as demo
from peft_kernels.demo import approximation, experiment, plots, report, training
from peft_kernels.demo.experiment import Settings
from peft_kernels.demo.methods import ABLATIONS, FULL_METHODS, METHODS, fitting
from peft_kernels.demo.models import TASKS
from peft_kernels.demo.training import Result

COMMITTED = Path(experiment.__file__).with_name("search.json")


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Empty pictures: drawing takes longer than training."""
    monkeypatch.setattr(plots, "_save", lambda figure, path: path.write_bytes(b""))


def test_default_run(out, capsys):
    assert demo.main(arguments(out)) == 0
    told, found = capsys.readouterr().out, results(out)
    section = found["sections"]["retrieval"]
    files = ["results.json", "retrieval.md"]
    files += [f"retrieval-{name}.png" for name in ("scores", "losses", "moil-error", "aurora-factors", "examples")]
    for name in files:
        assert str(out / name) in told.split()
        assert not name.endswith("png") or (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert found["files"] == files
    assert found["settings"] | SIZES == found["settings"] and found["settings"]["device"] == "cpu"
    assert found["environment"]["torch"] == torch.__version__
    assert list(found["pretraining"]) == ["retrieval"] and len(found["pretraining"]["retrieval"]["losses"]) == 2
    assert [run["method"] for run in section["runs"]] == [method.name for method in METHODS]
    rows = {row["method"]: row for row in section["table"]}
    assert list(rows)[-3:] == ["MoIL, student", "MoIL, live", "MoIL, teacher"]
    assert [name for name, row in rows.items() if not row["kept"]] == ["MoIL, live", "MoIL, teacher"]
    for run in section["runs"]:
        row = rows[f"{run['method']}, student" if run["errors"] else run["method"]]
        assert row["scores"] == next(iter(run["scores"].values()))
        assert row["trained"] == run["trained"]
        assert set(row["scores"]) == {"i→t R@1", "i→t R@5", "t→i R@1", "t→i R@5"}
        assert all(0 <= value <= 100 for value in row["scores"].values())
        folder = out / "runs" / f"retrieval-{run['method'].replace(' ', '_')}-0"
        if run["trained"]:
            stored = load_file(folder / training.WEIGHTS_FILE)
            assert row["stored_bytes"] == (folder / training.WEIGHTS_FILE).stat().st_size
            if run["method"] != "MoIL":  # whose live weights train and are not kept
                assert sum(t.numel() for t in stored.values()) == run["trained"]
            assert run["lr"] == experiment.DEFAULT_LR and run["lr_from"] == "default"
            assert len(run["losses"]) == SIZES["steps"] and row["activation_bytes"] > 0
    assert "has no learning rate for attention tuning, LoRA, Aurora, MoIL: 0.001 is taken" in told
    assert report.UNSEARCHED in told and "from an earlier call" not in told
    table = (out / "retrieval.md").read_text(encoding="utf-8").splitlines()
    assert len([line for line in table if line.startswith("|")]) == 2 + len(rows)


def test_results_of_the_committed_search_are_used(out, tmp_path, capsys, undrawn):
    text = json.dumps({"retrieval": {"LoRA": {"lr": 0.025, "validation": {}}}})
    (tmp_path / "search.json").write_text(text)
    assert demo.main(arguments(out, "--method", "lora")) == 0
    (run,) = results(out)["sections"]["retrieval"]["runs"]
    assert (run["lr"], run["lr_from"]) == (0.025, "search")
    assert "has no learning rate" not in capsys.readouterr().out
    assert (tmp_path / "search.json").read_text() == text


def stop_at(monkeypatch, run: str, step: int) -> None:
    """Ctrl-C in a step of a run."""
    call = demo._Bars.__call__

    def stopping(self, name, now, *rest):
        call(self, name, now, *rest)
        if name.startswith(run) and now == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(demo._Bars, "__call__", stopping)


def comparable(out: Path) -> dict:
    """All results but times."""
    found = results(out)
    for each in (*found["sections"]["retrieval"]["runs"], *found["sections"]["retrieval"]["table"]):
        del each["step_ms"]
    return {name: found[name] for name in ("settings", "sections")}


@pytest.mark.parametrize("where", [("pre-training", 1), ("LoRA", 3), ("MoIL", 2)], ids=lambda where: where[0])
def test_ctrl_c_leaves_what_resume_goes_on_from(out, tmp_path, monkeypatch, capsys, undrawn, where):
    names = ("--method", "LoRA", "MoIL", "--seed", "3")
    assert demo.main(arguments(tmp_path / "whole", *names)) == 0
    assert demo.main(arguments(out, "--method", "zero-shot")) == 0  # of which nothing is left when another run begins
    (out / "notes.md").write_text("mine")
    with monkeypatch.context() as patched:
        stop_at(patched, *where)
        assert demo.main(arguments(out, *names)) == 130
    left = {path.name for path in out.iterdir() if path.is_file()}
    assert left == {"options.json", "notes.md"} and not (out / "runs/retrieval-zero-shot-0").exists()
    assert f"--resume --out {out}\n" in capsys.readouterr().out  # to be copied, however long it is
    torch.manual_seed(99)
    assert demo.main(["--resume", "--out", str(out)]) == 0  # with the options of the run
    assert comparable(out) == comparable(tmp_path / "whole")
    for name in ("pretraining-retrieval", "retrieval-LoRA-3", "retrieval-MoIL-3"):
        pair = [load_file(folder / "runs" / name / training.WEIGHTS_FILE) for folder in (out, tmp_path / "whole")]
        assert pair[0].keys() == pair[1].keys() and all(torch.equal(pair[0][key], pair[1][key]) for key in pair[0])


def test_resume_refuses_other_options_and_a_new_run_starts_anew(out, capsys, undrawn):
    assert demo.main(arguments(out, "--method", "LoRA")) == 0
    first, before = comparable(out), (out / "runs/retrieval-LoRA-0/result.json").stat().st_mtime_ns
    capsys.readouterr()
    assert demo.main(["--resume", "--out", str(out), "--rank", "2"]) == 2
    assert "--resume: the run in" in (told := capsys.readouterr().out) and "has --rank None" in told
    assert demo.main(["--resume", "--out", str(out), "--method", "LoRA"]) == 0
    assert (out / "runs/retrieval-LoRA-0/result.json").stat().st_mtime_ns == before and comparable(out) == first
    assert demo.main(arguments(out, "--method", "LoRA", "--rank", "2")) == 0
    ranks = [found["sections"]["retrieval"]["runs"][0]["trained"] for found in (first, comparable(out))]
    assert ranks[0] > ranks[1]  # the earlier run's result is gone


def test_search_writes_the_rates_that_later_runs_take(out, tmp_path, monkeypatch, undrawn):
    monkeypatch.setattr(demo, "search", lambda *a: experiment.search(*a, grid=(1e-2, 1e-3)))
    assert demo.main(arguments(out, "--search", "--method", "LoRA")) == 0
    found = json.loads((tmp_path / "search.json").read_text())["retrieval"]["LoRA"]
    assert list(found["validation"]) == ["0.01", "0.001"] and found["lr"] in (1e-2, 1e-3)
    assert not (out / "results.json").exists()
    assert demo.main(arguments(out, "--method", "LoRA")) == 0
    assert results(out)["sections"]["retrieval"]["runs"][0]["lr"] == found["lr"]


def test_full_run(out, tmp_path, monkeypatch):
    """Both tasks, three seeds, and a search of its own."""
    monkeypatch.setattr(demo, "search", lambda *a: experiment.search(*a, grid=(2e-3,)))
    assert demo.main(arguments(out, "--full", "--steps", "1", "--pretraining-steps", "1")) == 0
    found = results(out)["sections"]
    assert list(found) == ["retrieval", "answering"] and not (tmp_path / "search.json").exists()
    for task, preset in (("retrieval", "blip"), ("answering", "vilt")):
        methods = fitting(FULL_METHODS, preset)
        runs = [(run["method"], run["seed"]) for run in found[task]["runs"]]
        assert runs == [(m.name, seed) for m in methods for seed in (range(3) if m.kind else (0,))]
        assert {run["lr"] for run in found[task]["runs"]} == {0.0, 2e-3}
        for row in found[task]["table"]:
            assert (row["seeds"] == 3) == (None not in row["spread"].values())
        assert (out / f"{task}-scores.png").exists() and (out / f"{task}.md").exists()
    assert "±" in (out / "answering.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations(out, undrawn, name):
    assert demo.main(arguments(out, "--ablation", name, "--steps", "1", "--pretraining-steps", "1")) == 0
    (section,) = results(out)["sections"].values()
    assert [run["method"] for run in section["runs"]] == [method.name for method in ABLATIONS[name]]
    assert (out / f"{name}-scores.png").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--method", "lara"), "--method: expected some of 'zero-shot'"),
        (("--device", "nothing"), "nothing"),
        (("--evaluated", "181"), "--evaluated: expected 2 to 180, got 181"),
        (("--scenes", "1"), "--scenes: expected 2"),
        (("--search", "--ablation", "moil"), "--search: is of the methods as they are"),
        (("--search", "--rank", "2"), "--search: is of the methods as they are"),
        (("--resume",), "has no run of the demo"),
        (("--ablation", "moil", "--method", "LoRA"), "--method: expected some of 'MoIL'"),
    ],
)
def test_options_that_make_no_sense(out, capsys, options, told):
    assert demo.main(arguments(out, *options)) == 2
    assert told in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize("options", [("--rank", "0"), ("--steps", "-1"), ("--backend", "numpy"), ("--ablation", "x")])
def test_options_that_cannot_be_read(out, options):
    with pytest.raises(SystemExit) as error:
        demo.main(arguments(out, *options))
    assert error.value.code == 2


def test_backend_that_cannot_run_is_an_error(out, capsys):
    assert demo.main(arguments(out, "--method", "LoRA", "--backend", "cuda")) == 1
    assert "cuda" in capsys.readouterr().out


def test_folder_of_others_is_left_alone(tmp_path, capsys):
    for name in ("runs/a.txt", "mine.safetensors"):
        (tmp_path / "mine" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "mine" / name).write_text("mine")
    assert demo.main(arguments(tmp_path / "mine")) == 2
    assert "has files that are not the demo's" in " ".join(capsys.readouterr().out.split())
    assert len([path for path in (tmp_path / "mine").rglob("*") if path.is_file()]) == 2
    assert demo.main(arguments(tmp_path / "mine/mine.safetensors")) == 2


def test_training_that_diverges_is_told(out, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "run", lambda own, *_: (_ for _ in ()).throw(FloatingPointError("the loss is nan")))
    assert demo.main(arguments(out)) == 1
    assert "the loss is nan" in capsys.readouterr().out


# ---- the report -----------------------------------------------------------------------------------------------------


def test_rows_are_means_over_seeds():
    def result(method, seed, *values, mode="", lr_from="search"):
        rates = {"lr": 0.003, "lr_from": lr_from, "adapter_lr": 0.01 if mode else None}
        return Result(method, seed, **rates, scores={mode: {"accuracy": values[0]}}, trained=1234, step_ms=10.0 + seed)

    rows = report.averaged([result("a", 0, 40.0), result("b", 0, 7.0, mode="live"), result("a", 1, 50.0)])
    assert [row["method"] for row in rows] == ["a", "b, live"]
    assert rows[0]["scores"] == {"accuracy": 45.0} and rows[0]["step_ms"] == 10.5
    assert rows[0]["spread"]["accuracy"] == pytest.approx(statistics.stdev([40.0, 50.0]))
    assert rows[1]["spread"]["accuracy"] is None
    assert report.cells(rows[0])[:3] == ["a", "45.0 ± 7.1", "1,234"]
    assert report.cells(rows[1])[1] == "7.0" and report.cells(rows[0])[-2] == "0.003"
    assert report.cells(rows[1])[-2] == "0.003, 0.01"  # of MoIL's live weights, and of its adapters
    assert report.notes(rows) is None and report.UNSEARCHED not in report.markdown(rows)
    rows = report.averaged([result("a", 0, 1.0, lr_from="default")])
    assert report.cells(rows[0])[-2] == "0.003*" and r"\* not in the search" in report.markdown(rows)
    assert report.markdown(rows).splitlines()[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"


# ---- the committed search -------------------------------------------------------------------------------------------


def test_committed_search_is_of_the_settings_that_run():
    found = json.loads(COMMITTED.read_text(encoding="utf-8"))
    defaults = Settings(Path("."), rates=COMMITTED)
    for name in ("steps", "pretraining_steps", "scenes", "evaluated"):
        assert found["settings"][name] == getattr(defaults, name)
    shown = {action.dest: action.default for action in demo.parser()._actions if action.help == argparse.SUPPRESS}
    assert shown == {name: getattr(defaults, name) for name in SIZES}
    for method in METHODS:
        if method.kind is not None:
            assert experiment.learning_rate(defaults, "retrieval", method)[1].startswith("search")
    for task in found.keys() - {"settings"}:
        for name, entry in found[task].items():
            assert name in {method.name for method in FULL_METHODS}
            scores = {float(lr): score for lr, score in entry["validation"].items()}
            grid, rate = (experiment.ADAPTER_GRID, "adapter_lr") if name == "MoIL" else (experiment.GRID, "lr")
            assert tuple(sorted(scores)) == grid and entry[rate] == experiment.best(scores, name)
            if name in ("attention tuning", "MoIL"):
                assert entry["lr"] == found[task]["attention tuning"]["lr"] and len(entry["seeds"]) == 3


# ---- the page of results --------------------------------------------------------------------------------------------


def test_the_tables_of_documents_are_the_committed_results():
    """docs/demo.json: of the runs' results.json the tables, and where they ran."""
    docs = Path(__file__).parents[1] / "docs"
    text = "\n".join(path.read_text(encoding="utf-8") for path in (docs / "demo.md", docs.parent / "README.md"))
    found = json.loads((docs / "demo.json").read_text(encoding="utf-8"))
    assert set(found["sections"]) == {*TASKS, *ABLATIONS}
    for name, rows in found["sections"].items():
        assert len(rows) > 5 and min(row["seeds"] for row in rows if row["trained"]) >= 3
        table = report.markdown(rows, without=("step ms", "backend"))
        assert table in text, f"{name}: the committed results make\n{table}"
    table = approximation.table([SimpleNamespace(**each) for each in found["approximation"]])
    assert table in text, f"the committed distances make\n{table}"


# ---- approximation --------------------------------------------------------------------------------------------------


def test_approximation_is_told_by_step(tmp_path):
    out = tmp_path / "out"
    assert demo.main([*arguments(out, "--approximation"), "--steps", "12"]) == 0
    runs = {run["method"]: run["watched"] for run in results(out)["sections"]["approximation"]["runs"]}
    assert list(runs) == ["attention tuning", "LoRA", "LoRA by imitation", "MoIL"]
    for name, watched in runs.items():
        assert [at["step"] for at in watched] == [2, 4, 6, 8, 10, 12]
        assert all(at["error"] == 0 for at in watched) == (name == "attention tuning")
    names = {Path(name).name for name in results(out)["files"]}
    assert {"approximation-by-step.md", "approximation-error.png", "approximation-score.png"} <= names
    assert "| MoIL |" in (out / "approximation-by-step.md").read_text()
    assert demo.main([*arguments(out, "--approximation", "--method", "LoRA")]) == 2
