"""The experiment: pre-train once, adapt by every method and seed, read the test split once for each; search by another.

Everything is kept in the output folder under runs/, one folder for each run, and read from there when it is asked for
again. pretrained/, beside this file, has the folder of one pre-training: everybody's adaptations start from that.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from peft_kernels.adapters import FullTuning
from peft_kernels.adapters.checkpoint import write_atomically
from peft_kernels.demo.approximation import POINTS, Watch, start_of
from peft_kernels.demo.methods import FULL, MOIL, Method, fitting
from peft_kernels.demo.models import TASKS
from peft_kernels.demo.scenes import STORIES, Scenes, make_scenes
from peft_kernels.demo.training import Job, Result, read_result, run

COMMITTED, SHIPPED = (Path(__file__).with_name(name) for name in ("search.json", "pretrained"))
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
ADAPTER_GRID = (1e-3, 3e-3, 1e-2, 3e-2)  # of MoIL's adapters
PRETRAINING_LR, DEFAULT_LR, DEFAULT_ADAPTER_LR = 1e-3, 1e-3, 3e-3


@dataclass
class Settings:
    """out: where everything goes;  device, backend, rank: of all runs;  seeds: of the adaptations
    steps, pretraining_steps: of training;  scenes: to train on in the target domain;  evaluated: to validate or test on
    rates: the file of the learning-rate search that is used
    pretrain: train the start, even if one is shipped
    progress: called with a run's name, its step, the number of steps, a note, and whether it is done
    """

    out: Path
    device: str = "cpu"
    backend: str = "auto"
    rank: int | None = None
    seeds: Sequence[int] = (0,)
    steps: int = 300
    pretraining_steps: int = 600
    scenes: int = 512
    evaluated: int = STORIES
    rates: Path = COMMITTED
    pretrain: bool = False
    progress: Callable[[str, int, int, str, bool], None] = lambda name, step, steps, note, done: None
    bases: dict[str, tuple[nn.Module, Result]] = field(default_factory=dict, repr=False)  # what `pretrained` gave

    def data(self, split: str, domain: str = "target") -> Scenes:
        """Training splits with repeats, the others with every caption once."""
        count = {"pretraining": 8 * self.scenes, "train": self.scenes}.get(split, self.evaluated)
        return make_scenes(domain, split, count, distinct=split in ("validation", "test")).to(self.device)

    def folder(self, stem: str) -> Path:
        """Where a run is kept."""
        return self.out / "runs" / "".join(c if c.isascii() and (c.isalnum() or c in "-.") else "_" for c in stem)

    def shipped(self, task: str) -> Path | None:
        """The folder of the task's pre-training in the package, if these settings would give the same."""
        sizes = ("pretraining_steps", "scenes", "evaluated")
        same = not self.pretrain and all(getattr(self, size) == getattr(Settings, size) for size in sizes)
        return SHIPPED / task if same and (SHIPPED / task).is_dir() else None

    def run(self, name: str, stem: str, job: Job, evaluated: Scenes) -> Result:
        """name: for people;  stem: for the folder"""
        return run(job, evaluated, self.folder(stem), lambda step, *told: self.progress(name, step, job.steps, *told))


def pretrained(settings: Settings, task: str) -> tuple[nn.Module, Result]:
    """The task's model after its training in the source domain, and what that gave on the source's validation split."""
    if task in settings.bases:
        return settings.bases[task]
    torch.manual_seed(0)
    model = TASKS[task].build().to(settings.device)
    name, stem = f"pre-training, {task}", f"pretraining-{task}"
    if folder := settings.shipped(task):
        result = read_result(folder)
        settings.progress(name, 0, 0, f"mean score {result.mean:.1f}, shipped with the package", True)
    else:
        folder, train = settings.folder(stem), settings.data("pretraining", "source")
        job = Job(FULL, TASKS[task], model, train, 0, PRETRAINING_LR, "fixed", settings.pretraining_steps)
        result = settings.run(name, stem, job, settings.data("validation", "source"))
    model = FullTuning.from_pretrained(model, folder).remove().eval()
    settings.bases[task] = model, result
    return settings.bases[task]


def learning_rate(settings: Settings, task: str, method: Method) -> tuple[float, str]:
    """(lr, where it is from): the search's, that of the method it is like, or the default."""
    if method.kind is None:
        return 0.0, ""
    found = _read(settings.rates).get(task, {}).get(method.searched)
    if found is None:
        return DEFAULT_LR, "default"
    return found["lr"], "search" if method.searched == method.name else f"search of {method.searched}"


def adapter_learning_rate(settings: Settings, task: str, method: Method) -> float | None:
    """Of MoIL's adapters; None for other methods."""
    if method.kind is not MOIL.kind:
        return None
    return _read(settings.rates).get(task, {}).get(MOIL.name, {}).get("adapter_lr", DEFAULT_ADAPTER_LR)


def compare(
    settings: Settings, task: str, methods: Sequence[Method], section: str, watched: bool = False
) -> list[Result]:
    """Results of every method and seed on the test split.

    watched: the first method is full tuning of the attention, and others' distance from it is told as they train
    """
    (base, _), train, test = pretrained(settings, task), settings.data("train"), settings.data("test")
    results = []
    for method in fitting(methods, TASKS[task].preset):
        for seed in settings.seeds if method.kind else settings.seeds[:1]:
            lr, lr_from = learning_rate(settings, task, method)
            steps = settings.steps if method.kind else 0
            job = Job(method, TASKS[task], base, train, seed, lr, lr_from, steps, settings.rank, settings.backend)
            job.adapter_lr = adapter_learning_rate(settings, task, method)
            if watched:
                kept, start = settings.folder(f"{section}-weights-{seed}"), start_of(base, TASKS[task].preset)
                job.watch = Watch(max(1, steps // POINTS), kept, settings.data("validation"), start)
            name = f"{method.name}, {task}" + (f", seed {seed}" if len(settings.seeds) > 1 else "")
            results.append(settings.run(name, f"{section}-{method.name}-{seed}", job, test))
    return results


def search(settings: Settings, task: str, methods: Sequence[Method], grid: Sequence[float] = GRID) -> dict[str, Any]:
    """For each method with a learning rate of its own the best one on the validation split over all seeds, and all
    scores; for MoIL, whose live weights take attention tuning's, that of its adapters."""
    found = {}
    for method in fitting(methods, TASKS[task].preset):
        if method.name == MOIL.name:
            lr = learning_rate(settings, task, method)[0]
            scores = {own: _validated(settings, task, method, lr, own) for own in ADAPTER_GRID}
            found[method.name] = {"adapter_lr": best(scores, method.name), "lr": lr}
        elif method.kind is None or method.like:
            continue
        else:
            scores = {lr: _validated(settings, task, method, lr) for lr in grid}
            found[method.name] = {"lr": best(scores, method.name)}
        found[method.name] |= {"seeds": list(settings.seeds), "validation": {f"{lr:g}": s for lr, s in scores.items()}}
        write_search(settings, task, found)
    return found


def _validated(
    settings: Settings, task: str, method: Method, lr: float, adapter_lr: float | None = None
) -> float | None:
    """The mean score over the seeds on the validation split; None where a training diverged."""
    (base, _), train, validation = pretrained(settings, task), settings.data("train"), settings.data("validation")
    scores = []
    for seed in settings.seeds:
        job = Job(method, TASKS[task], base, train, seed, lr, "search", settings.steps, None)
        job.backend, job.adapter_lr = settings.backend, adapter_lr
        tried = f"{lr:g}" if adapter_lr is None else f"{lr:g}-{adapter_lr:g}"
        name = f"search, {task}: {method.name}, lr {tried}, seed {seed}"
        try:
            scores.append(settings.run(name, f"search-{task}-{method.name}-{tried}-{seed}", job, validation).mean)
        except FloatingPointError:
            return None
    return mean(scores)


def best(scores: dict[float, float | None], name: str) -> float:
    """The learning rate with the highest score, the smallest of equals. Raises ValueError if all have diverged."""
    finite = {lr: score for lr, score in sorted(scores.items()) if score is not None}
    if not finite:
        raise ValueError(f"{name}: diverges with every learning rate of {', '.join(f'{lr:g}' for lr in scores)}")
    return max(finite, key=finite.get)


def write_search(settings: Settings, task: str, found: dict[str, Any]) -> None:
    """Into the file of rates, whose other entries stay, if they are of the same settings."""
    own = {name: getattr(settings, name) for name in ("steps", "pretraining_steps", "scenes", "evaluated")}
    own["score"] = "mean of all on the validation split and over the seeds, in percent"
    earlier = _read(settings.rates)
    if earlier.get("settings") != own:
        earlier = {}
    content = {"settings": own, **earlier, task: {**earlier.get(task, {}), **found}}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(settings.rates, lambda path: path.write_text(text, encoding="utf-8"))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
