"""python -m peft_kernels.demo: adapt a small vision-language model by every method, and report what it came to."""

import argparse
import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from peft_kernels.adapters.checkpoint import write_atomically
from peft_kernels.backend import BACKENDS
from peft_kernels.demo import approximation, plots, report
from peft_kernels.demo.approximation import APPROXIMATION
from peft_kernels.demo.experiment import COMMITTED, DEFAULT_LR, Settings, compare, learning_rate, search
from peft_kernels.demo.methods import ABLATIONS, FULL_METHODS, METHODS, Method, by_name
from peft_kernels.demo.models import TASKS
from peft_kernels.demo.scenes import STORIES
from peft_kernels.demo.training import Result

OPTIONS_FILE, RESULTS_FILE = "options.json", "results.json"
_PROGRESS = (TextColumn("{task.description:48}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
_SIZES = {"steps": 300, "pretraining-steps": 600, "scenes": 512, "evaluated": STORIES}  # smaller ones are for tests


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m peft_kernels.demo", description=__doc__.split(": ", 1)[1])
    add = made.add_argument
    add("--method", nargs="+", metavar="NAME", help="some methods only")
    add("--rank", type=_positive, help="of every adapter, instead of each one's own")
    add("--seed", type=int, default=0, help="the first of the seeds")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", default="auto", choices=("auto", *BACKENDS))
    add("--full", action="store_true", help="ViLT and question answering too, all variants, the search, three seeds")
    add("--ablation", choices=tuple(ABLATIONS), help="one paper's ablations, on retrieval")
    add("--approximation", action="store_true", help="how near LoRA's and MoIL's weights come to full tuning's")
    add("--search", action="store_true", help=f"search the learning rates, on validation data, for {COMMITTED.name}")
    add("--pretrain", action="store_true", help="pre-train here, and do not take the model that is shipped")
    add("--resume", action="store_true", help="go on where the last run in this folder was stopped")
    add("--out", type=Path, default=Path("demo_out"), metavar="FOLDER")
    for name, default in _SIZES.items():
        add(f"--{name}", type=_positive, default=default, help=argparse.SUPPRESS)
    return made


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a number ≥ 1, got {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where a training diverged, 2 for options that make no sense, 130 when it was stopped."""
    console = Console()
    try:
        options = prepared(argv)
        sections = chosen(options)
    except (ValueError, RuntimeError, AssertionError) as error:  # the last two: torch on a device that is not there
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    started = time.perf_counter()
    with Progress(*_PROGRESS, console=console) as progress:
        settings = Settings(
            options.out,
            options.device,
            options.backend,
            options.rank,
            range(options.seed, options.seed + (3 if options.full or options.search else 1)),
            options.steps,
            options.pretraining_steps,
            options.scenes,
            options.evaluated,
            options.out / COMMITTED.name if options.full and not options.search else COMMITTED,
            options.pretrain,
            _Bars(progress),
        )
        try:
            if options.full or options.search:
                for task, methods in sections.values():
                    search(settings, task, methods)
            tell_unsearched(settings, sections, console)
            compared = {} if options.search else sections
            found = {name: compare(settings, *each, name, options.approximation) for name, each in compared.items()}
        except KeyboardInterrupt:
            progress.stop()
            command = f"python -m peft_kernels.demo --resume --out {shlex.quote(str(options.out))}"
            console.print(f"stopped; go on with: {command}", markup=False, highlight=False, soft_wrap=True)
            return 130
        except (FloatingPointError, ValueError) as error:
            console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
            return 1
    if options.search:
        console.print(str(settings.rates), soft_wrap=True)
        return 0
    bases = {task: result for task, (_, result) in settings.bases.items()}
    for task, base in bases.items():
        told = ", ".join(f"{name} {value:.1f}" for name, value in base.scores[""].items())
        console.print(f"{task}, source domain, validation split, before any adaptation: {told}", highlight=False)
    for name, results in found.items():
        title = f"{name}: target domain, test split, {settings.evaluated} scenes"
        console.print(report.table(report.averaged(results), title))
        if options.approximation:
            console.print(approximation.table(results), markup=False, highlight=False, soft_wrap=True)
    paths = [settings.out / RESULTS_FILE]
    for name, results in found.items():
        paths += write_section(settings, name, results)
    files = [path.name for path in paths]
    report.write_json(paths[0], _plain(options), bases, found, time.perf_counter() - started, files)
    console.print("\n".join(map(str, paths)), soft_wrap=True, highlight=False)
    return 0


class _Bars:
    """A bar for the run that goes on, a line of text for each that is done."""

    def __init__(self, progress: Progress):
        self.progress, self.lines = progress, {}

    def __call__(self, name: str, step: int, steps: int, note: str, done: bool) -> None:
        if name not in self.lines and not done:
            self.lines[name] = self.progress.add_task(name, total=steps)
        if name in self.lines:
            self.progress.update(self.lines[name], completed=step, description=f"{name}: {note}")
        if done:
            self.progress.console.print(f"{name}: {note}", highlight=False)
            if name in self.lines:
                self.progress.remove_task(self.lines.pop(name))


def prepared(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; the output folder is emptied of an earlier run, or, to resume, has that run's options.

    Raises ValueError where the folder is not the demo's, and for --resume with options other than the run's.
    """
    reader = parser()
    options = reader.parse_args(argv)
    kept = options.out / OPTIONS_FILE
    if options.resume:
        if not kept.is_file():
            raise ValueError(f"--resume: {options.out} has no run of the demo")
        before = json.loads(kept.read_text(encoding="utf-8"))
        reader.set_defaults(**before)
        options = reader.parse_args(argv)
        others = [name for name, value in _plain(options).items() if value != before.get(name)]
        if others:
            told = ", ".join(f"--{name.replace('_', '-')} {before.get(name)}" for name in others)
            raise ValueError(f"--resume: the run in {options.out} has {told}; leave that out, or start anew")
    torch.empty(1, device=options.device)
    for name, least, most in (("evaluated", 2, STORIES), ("scenes", 2, math.inf)):
        if not least <= getattr(options, name) <= most:
            raise ValueError(f"--{name}: expected {least} to {most}, got {getattr(options, name)}")
    if options.search and (options.ablation or options.rank):
        raise ValueError("--search: is of the methods as they are, without --ablation and --rank")
    if options.approximation and (options.search or options.ablation or options.method or options.rank):
        raise ValueError("--approximation: has methods of its own; leave out --search, --ablation, --method and --rank")
    chosen(options)
    if not options.resume:
        if options.out.exists() and not options.out.is_dir():
            raise ValueError(f"--out: {options.out} is not a folder")
        if options.out.is_dir() and any(options.out.iterdir()) and not kept.is_file():
            raise ValueError(f"--out: {options.out} has files that are not the demo's; name another folder")
        if (options.out / RESULTS_FILE).is_file():
            for name in json.loads((options.out / RESULTS_FILE).read_text(encoding="utf-8"))["files"]:
                (options.out / Path(name).name).unlink(missing_ok=True)
        shutil.rmtree(options.out / "runs", ignore_errors=True)
        (options.out / COMMITTED.name).unlink(missing_ok=True)
        text = json.dumps(_plain(options), indent=1) + "\n"
        write_atomically(kept, lambda path: path.write_text(text, encoding="utf-8"))
    return options


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    """For JSON, and but for what a call to go on may say otherwise."""
    told = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    return {name: value for name, value in told.items() if name not in ("resume", "out")}


def chosen(options: argparse.Namespace) -> dict[str, tuple[str, Sequence[Method]]]:
    """{section: (task, methods)}"""
    if options.approximation:
        return {"approximation": ("retrieval", APPROXIMATION)}
    if options.ablation:
        known, tasks = ABLATIONS[options.ablation], {options.ablation: "retrieval"}
    else:
        known, tasks = FULL_METHODS, {task: task for task in TASKS} if options.full else {"retrieval": "retrieval"}
    methods = known if options.full or options.ablation else METHODS
    if options.method:
        methods = by_name(options.method, known)
    return {name: (task, methods) for name, task in tasks.items()}


def tell_unsearched(settings: Settings, sections: dict[str, tuple[str, Sequence[Method]]], console: Console) -> None:
    """Before time is spent: which methods run with a learning rate that nothing was searched for."""
    for task, methods in sections.values():
        names = [method.name for method in methods if learning_rate(settings, task, method)[1] == "default"]
        if names:
            told = f"{task}: {settings.rates.name} has no learning rate for {', '.join(names)}: {DEFAULT_LR:g} is taken"
            console.print(told, style="yellow", markup=False, highlight=False, soft_wrap=True)


def write_section(settings: Settings, name: str, results: Sequence[Result]) -> list[Path]:
    """A table and pictures, into the output folder; returns their paths."""
    rows, made = report.averaged(results), []

    def path(end: str) -> Path:
        made.append(settings.out / f"{name}{end}")
        return made[-1]

    path(".md").write_text(report.markdown(rows), encoding="utf-8")
    plots.plot_scores(path("-scores.png"), rows, name)
    first = [result for result in results if result.seed == settings.seeds[0]]
    if losses := {result.method: result.losses for result in first if result.losses}:
        plots.plot_curves(path("-losses.png"), losses, "task loss, mean of 10 steps", window=10)
    if errors := {result.method: result.errors for result in first if result.errors}:
        plots.plot_curves(path("-moil-error.png"), errors, "MoIL's relative error", log=True)
    if any(result.watched for result in first):
        path("-by-step.md").write_text(approximation.table(results), encoding="utf-8")
        for key, label in (("error", "‖W − W_tuned‖ / ‖W_tuned − W_0‖"), ("score", "mean score on validation, %")):
            found = {r.method: [(at["step"], at[key]) for at in r.watched] for r in first}
            plots.plot_watched(path(f"-{key}.png"), found, label)
    for result in first:
        if result.method == "Aurora":
            plots.plot_factors(path("-aurora-factors.png"), settings.folder(f"{name}-Aurora-{result.seed}"))
    found = [result for result in first if result.shown]
    if found:
        best = max(found, key=lambda result: result.mean)
        plots.plot_retrieval(path("-examples.png"), settings.data("test"), best.shown, best.method)
    return made


if __name__ == "__main__":
    sys.exit(main())
