"""One adaptation: train, evaluate, save, measure what it costs. A run that was stopped goes on from its checkpoint."""

import contextlib
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.adapters import Adapter, MoIL
from peft_kernels.adapters.checkpoint import WEIGHTS_FILE, write_atomically
from peft_kernels.demo.methods import Method
from peft_kernels.demo.models import Task
from peft_kernels.demo.scenes import Scenes
from peft_kernels.demo.state import load_training, save_training

BATCH, WARMUP, WEIGHT_DECAY = 64, 20, 0.05
CHECKPOINT_EVERY = 25  # steps
_EPS = 1e-10  # Adam's for MoIL's adapters, whose gradients begin below its 1e-8
RESULT_FILE, CHECKPOINT_FILE = "result.json", "stopped.safetensors"


@dataclass
class Result:
    """What one run gives.

    scores: in percent, by mode ("" for all but MoIL) and name;  shown: as `Evaluation` has it, of the first mode
    lr_from: "search" | "search of …" | "default";  adapter_lr: of MoIL's adapters, whose loss is not the task's
    trained: parameters;  stored_bytes: of the adapter's file
    step_ms: median;  activation_bytes: kept by the forward for the backward;  backend: of its layers, in evaluation
    losses, errors: by step, of the task, and MoIL's relative error;  watched: what the job's watch gave
    """

    method: str
    seed: int
    lr: float
    lr_from: str
    adapter_lr: float | None = None
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    shown: list[list[int]] = field(default_factory=list)
    trained: int = 0
    stored_bytes: int = 0
    step_ms: float = 0.0
    activation_bytes: int = 0
    backend: str = ""
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    watched: list[dict[str, float]] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Of all scores of the first mode: what the search maximises."""
        first = next(iter(self.scores.values()))
        return sum(first.values()) / len(first)


@dataclass
class Job:
    """What to run: a method on a copy of the pre-trained model, on one task's scenes.

    watch: called after every `watch.every` steps with the step, the method, the task, model and adapter
    """

    method: Method
    task: Task
    model: nn.Module
    train: Scenes
    seed: int
    lr: float
    lr_from: str
    steps: int
    rank: int | None = None
    backend: str = "auto"
    adapter_lr: float | None = None
    watch: Any = None

    def loss(self, model: nn.Module) -> Tensor:
        return self.task.loss(model, self.train.draw(BATCH), enhance=self.method.enhance)


def factor(step: int, steps: int) -> float:
    """Of the learning rate: linear warm-up, then half a cosine."""
    return min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / steps)))


Report = Callable[[int, str, bool], None]  # step, what it came to, is the run done?


def run(job: Job, evaluated: Scenes, folder: Path, progress: Report = lambda step, note, done: None) -> Result:
    """Train and evaluate, or read the result if `folder` has it.

    folder: gets the trained adapter, as `save_pretrained` writes it, and result.json, the sign that the run is done;
        until then a checkpoint every 25 steps, from which another call goes on
    progress: called after each step, and at the end
    Raises FloatingPointError where the loss is not finite.
    """
    if (folder / RESULT_FILE).exists():
        result = read_result(folder)
        progress(job.steps, f"mean score {result.mean:.1f}, from an earlier call", True)
        return result
    torch.manual_seed(job.seed)
    model = copy.deepcopy(job.model)
    adapter = job.method.wrap(model, job.task.preset, job.rank, job.backend)
    result = Result(job.method.name, job.seed, job.lr, job.lr_from, job.adapter_lr)
    if adapter is not None:
        _train(job, model, adapter, result, folder / CHECKPOINT_FILE, progress)
        adapter.save_pretrained(folder)
        result.stored_bytes = (folder / WEIGHTS_FILE).stat().st_size
    model.eval()
    for mode in job.method.modes:
        with adapter.evaluate(mode) if mode else contextlib.nullcontext():
            evaluation = job.task.evaluate(model, evaluated)
        result.scores[mode] = evaluation.scores
        result.shown = result.shown or evaluation.shown
    result.backend = ", ".join(sorted({c.name for c in adapter.explain().values()} or {"torch"})) if adapter else ""
    text = json.dumps(asdict(result), ensure_ascii=False)
    write_atomically(folder / RESULT_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
    progress(job.steps, f"mean score {result.mean:.1f}", True)
    return result


def read_result(folder: Path) -> Result:
    """What `run` has left in the folder at its end."""
    return Result(**json.loads((folder / RESULT_FILE).read_text(encoding="utf-8")))


def _train(job: Job, model: nn.Module, adapter: Adapter, result: Result, checkpoint: Path, progress: Report) -> None:
    own = {"adapter_lr": job.adapter_lr, "adapter_eps": _EPS} if isinstance(adapter, MoIL) else {}
    optimizer = torch.optim.AdamW(adapter.param_groups(job.lr, weight_decay=WEIGHT_DECAY, **own), fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    record: dict[str, Any] = {"step": 0, "losses": [], "errors": [], "seconds": [], "watched": []}
    if job.watch is not None:
        torch.manual_seed(job.seed)  # methods that are told apart step by step draw the same batches
    if checkpoint.exists():
        record = load_training(checkpoint, model, optimizer)
    model.train()
    for step in range(record["step"], job.steps):
        started = time.perf_counter()
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * factor(step, job.steps)
        loss = job.loss(model)
        optimizer.zero_grad()
        loss.backward()
        if isinstance(adapter, MoIL):
            moved = adapter.step() is not None  # not at the first step, nor between two intervals
            last = record["errors"][-1] if record["errors"] else 1.0
            record["errors"].append(adapter.last_relative_error if moved else last)
        optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"{job.method.name}, lr {job.lr:g}: the loss of step {step + 1} is {value}")
        record["losses"].append(value)
        record["seconds"].append(time.perf_counter() - started)
        record["step"] = step + 1
        if job.watch is not None and (step + 1) % job.watch.every == 0:
            record["watched"].append(job.watch(step + 1, job.method, job.task, model, adapter))
        if (step + 1) % CHECKPOINT_EVERY == 0:
            save_training(checkpoint, model, optimizer, record)
        progress(step + 1, f"loss {value:.2f}", False)
    result.losses, result.errors, result.watched = record["losses"], record["errors"], record["watched"]
    result.trained = adapter.num_parameters()
    result.step_ms = 1000 * median(record["seconds"])
    with torch.random.fork_rng():
        result.activation_bytes = saved_bytes(job.loss(model), model)


def saved_bytes(loss: Tensor, model: nn.Module) -> int:
    """What the graph behind `loss` keeps for its backward, parameters apart; every storage counts once.

    Read from the graph: under saved-tensor hooks layers that share values in a pass would not.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    seen, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for tensor in _saved(node):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
        nodes.extend(next_node for next_node, _ in node.next_functions)
    return sum(kept.values())


def _saved(node: Any) -> Iterator[Tensor]:
    """A node of Python shows its tensors under one name, one of torch's own under many."""
    values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
    for value in values:
        yield from (t for t in (value if isinstance(value, tuple | list) else (value,)) if isinstance(t, Tensor))
