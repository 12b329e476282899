"""What a run's folder holds: of a script of examples/ (OUT), of the demo (demo_out/runs/…), or an adapter alone.

    results.json          a record of each evaluation: "epoch", "step" where it is newer, "loss", "lr", metrics
    evaluation.json       metrics alone, of a run that only evaluates
    run.json              "trained": parameters by kind, "stored_bytes"; without it the adapter's file is asked
    losses.jsonl          "step", "loss" a line
    predictions*.jsonl    cases, see examples/common/predictions.py; predictions_live.jsonl and others by mode
    epoch_N/              adapters
    result.json           the demo's: all of that but cases

Wherever something cannot be read: ValueError, naming the file and what is wrong in it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_kernels.adapters.checkpoint import WEIGHTS_FILE, Checkpoint

RESULTS, EVALUATION, RUN, LOSSES, DEMO = "results.json", "evaluation.json", "run.json", "losses.jsonl", "result.json"
_EXPECTED = f"{RESULTS}, {EVALUATION}, {LOSSES}, predictions.jsonl, epoch_N/, {WEIGHTS_FILE} or the demo's {DEMO}"
_NO_METRICS = ("epoch", "step", "loss", "lr")
_NOT_KEPT = ("live_", "teacher_")  # of MoIL, beside the student's metrics, whose weights are stored
_TELLING = ("recall", "R@", "accuracy")  # what a run's score is the mean of: the first of them that it has
Curve = list[tuple[float, float]]


@dataclass
class Run:
    """name: for titles and files;  records: {"epoch", "step", metric, …} of each evaluation
    losses: (step or epoch, loss) and which of the two;  cases: lines of predictions by (mode, kind)
    adapters: (what, folder) of the first and the last one;  trained, stored_bytes: None where nothing says
    """

    folder: Path
    name: str
    records: list[dict[str, Any]] = field(default_factory=list)
    losses: Curve = field(default_factory=list)
    losses_by: str = "step"
    cases: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)
    adapters: list[tuple[str, Path]] = field(default_factory=list)
    trained: int | None = None
    stored_bytes: int | None = None

    @property
    def metrics(self) -> list[str]:
        names = dict.fromkeys(name for record in self.records for name in record)
        return [name for name in names if any(_is_metric(name, record.get(name)) for record in self.records)]

    def scores(self, metric: str | None, by: str | None = None) -> Curve:
        """(step or epoch, score) of every record that has both; by=None: numbers of records instead."""
        places = enumerate(self.records) if by is None else [(r[by], r) for r in self.records if by in r]
        return [(at, value) for at, record in places if (value := score(record, metric)) is not None]


def score(record: dict[str, Any], metric: str | None) -> float | None:
    """One metric, or without a name the mean of the recalls or accuracies of what is kept."""
    if metric is not None:
        return record[metric] if _is_metric(metric, record.get(metric)) else None
    own = {n: v for n, v in record.items() if _is_metric(n, v) and not n.startswith(_NOT_KEPT)}
    for word in _TELLING:
        if values := [value for name, value in own.items() if word in name]:
            return math.fsum(values) / len(values)
    return None


def _is_metric(name: str, value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return number and name not in _NO_METRICS


# ---- reading --------------------------------------------------------------------------------------------------------


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Each folder once, with names that tell them apart."""
    folders = list({folder.resolve(): folder for folder in folders})
    return [read_run(folder, name) for folder, name in zip(folders, _names(folders))]


def _names(folders: Sequence[Path]) -> list[str]:
    """The ends of their paths: as few parts as tell them apart."""
    parts = 1
    while True:
        names = ["/".join(folder.parts[-parts:]).strip("/") or "run" for folder in folders]
        if len(set(names)) == len(names):
            return names
        parts += 1


def read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    run = Run(folder, name)
    if (folder / DEMO).is_file():
        _read_demo(run)
    elif (folder / RESULTS).is_file():
        run.records = _records(folder / RESULTS)
        run.losses, run.losses_by = [(r["epoch"], r["loss"]) for r in run.records if "loss" in r], "epoch"
    elif (folder / EVALUATION).is_file():
        run.records = [_object(read(folder / EVALUATION), folder / EVALUATION)]
    if (folder / LOSSES).is_file():
        by_step = dict(_loss(line, f"{folder / LOSSES}, line {i}") for i, line in _lines(folder / LOSSES))
        run.losses, run.losses_by = sorted(by_step.items()), "step"
    for path in sorted(folder.glob("predictions*.jsonl")):
        mode = path.stem.removeprefix("predictions").strip("_")
        for number, line in _lines(path):
            case = _case(line, f"{path}, line {number}")
            run.cases.setdefault((mode, case["kind"]), []).append(case)
    run.adapters = _adapters(folder)
    _count(run)
    if not (run.records or run.losses or run.cases or run.adapters):
        hint = f"; the demo's runs are {folder}/runs/*" if (folder / "runs").is_dir() else ""
        raise ValueError(f"{folder}: nothing of a run is there, expected {_EXPECTED}{hint}")
    return run


def _adapters(folder: Path) -> list[tuple[str, Path]]:
    if (folder / WEIGHTS_FILE).is_file():
        return [("", folder)]
    numbers = [each.name.removeprefix("epoch_") for each in folder.glob("epoch_*") if (each / WEIGHTS_FILE).is_file()]
    epochs = sorted(int(number) for number in numbers if number.isdecimal())
    return [(f"epoch {epoch}", folder / f"epoch_{epoch}") for epoch in dict.fromkeys((*epochs[:1], *epochs[-1:]))]


def _count(run: Run) -> None:
    """Parameters and bytes: what the run has written of itself, or else the last adapter's file."""
    told = _object(read(run.folder / RUN), run.folder / RUN) if (run.folder / RUN).is_file() else {}
    if "trained" in told:
        counts = _object(told["trained"], f"{run.folder / RUN}: trained")
        if not all(isinstance(count, int) for count in counts.values()):
            raise ValueError(f"{run.folder / RUN}: trained: expected a number of parameters by kind, got {counts}")
        run.trained = sum(counts.values())
    run.stored_bytes = told.get("stored_bytes", run.stored_bytes)
    if run.adapters:
        path = run.adapters[-1][1] / WEIGHTS_FILE
        run.stored_bytes = path.stat().st_size if run.stored_bytes is None else run.stored_bytes
        if run.trained is None:
            run.trained = sum(math.prod(shape) for shape in Checkpoint(path.parent).shapes.values())


def _read_demo(run: Run) -> None:
    path = run.folder / DEMO
    result = _object(read(path), path)
    try:
        modes, losses = list(result["scores"].items()), result["losses"]
        record = {f"{mode}_{name}" if index else name: value / 100 for index, (mode, scores) in enumerate(modes)
                  for name, value in scores.items()}  # fmt: skip
        run.trained, run.stored_bytes = int(result["trained"]), int(result["stored_bytes"])
        run.losses = [(step, float(loss)) for step, loss in enumerate(losses, start=1)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not a result of the demo: {error!r}") from None
    run.records = [{"step": len(losses), **record}]


def _records(path: Path) -> list[dict[str, Any]]:
    found = read(path)
    if not isinstance(found, list) or not all(isinstance(each, dict) and "epoch" in each for each in found):
        hint = f"; the demo's runs are {path.parent}/runs/*" if (path.parent / "runs").is_dir() else ""
        raise ValueError(f'{path}: expected a list of records, each with an "epoch"{hint}')
    for record in found:
        for key in _NO_METRICS:
            if key in record and not isinstance(record[key], int | float):
                raise ValueError(f"{path}: expected a number as {key}, got {record[key]!r}")
    return found


def _loss(line: dict[str, Any], where: str) -> tuple[float, float]:
    values = line.get("step"), line.get("loss")
    if not all(isinstance(value, int | float) for value in values):
        raise ValueError(f'{where}: expected numbers as "step" and "loss", got {line}')
    return values


def _texts(value: Any) -> bool:
    """One or more."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def _strips(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_texts, value))


def _rank(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def _text(value: Any) -> bool:
    return isinstance(value, str)


_CASES = {
    "text_to_image": {"text": _text, "found": _strips, "right": _texts, "rank": _rank},
    "image_to_text": {"images": _texts, "found": _texts, "right": _texts, "rank": _rank},
    "answer": {
        **{"images": _texts, "text": _text, "answer": _text},
        "answers": lambda value: value == [] or _texts(value),
        "score": lambda value: value is None or isinstance(value, int | float),
    },
}


def _case(line: dict[str, Any], where: str) -> dict[str, Any]:
    wanted = _CASES.get(line.get("kind"))
    if wanted is None:
        raise ValueError(f"{where}: expected one of the kinds {', '.join(_CASES)}, got {line.get('kind')!r}")
    for key, fits in wanted.items():
        if key not in line or not fits(line[key]):
            raise ValueError(f"{where}: not of the format of predictions: {key} is {line.get(key, 'missing')!r}")
    return line


# ---- JSON -----------------------------------------------------------------------------------------------------------


def read(path: Path) -> Any:
    return _parsed(_read_text(path), str(path))


def _lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(number, object) of each line that is not empty."""
    found = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            found.append((number, _object(_parsed(line, where), where)))
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None


def _object(value: Any, where: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value
