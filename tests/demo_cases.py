"""The demo in a size that trains in milliseconds."""

import json
from pathlib import Path

import pytest

from peft_kernels.demo import __main__ as demo
from peft_kernels.demo import experiment, models, training
from peft_kernels.demo.experiment import Settings
from peft_kernels.demo.training import Job

SIZES = {"steps": 3, "pretraining_steps": 2, "scenes": 64, "evaluated": 6}
BATCH = 8


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch, tmp_path) -> None:
    """Models of one narrow layer, small batches, and a file of rates that is not there yet."""
    for name, value in {"WIDTH": 16, "LAYERS": 1, "HEADS": 2}.items():
        monkeypatch.setattr(models, name, value)
    monkeypatch.setattr(models.Retrieval, "candidates", 2)
    monkeypatch.setattr(training, "BATCH", BATCH)
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    for module in (demo, experiment):
        monkeypatch.setattr(module, "COMMITTED", tmp_path / "search.json")


def settings(out: Path, **options) -> Settings:
    return Settings(out, rates=out.parent / "search.json", **{**SIZES, **options})


def arguments(out: Path, *more: str) -> list[str]:
    sizes = [text for name, value in SIZES.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return ["--device", "cpu", "--out", str(out), *sizes, *more]


def job(method, task: str, steps: int = 5) -> Job:
    scenes = experiment.make_scenes("target", "train", 64)
    return Job(method, models.TASKS[task], models.TASKS[task].build(), scenes, 0, 1e-3, "default", steps)


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))
