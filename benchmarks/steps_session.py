"""How steps.py measures trainings: built, verified, their first steps taken, and then timed."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.checks import check_choice, check_probability

from . import steps_methods, timing
from .cases import WrongResult
from .steps_methods import Training
from .steps_models import MODELS, SIZES, Batch

BATCH, CPU_BATCH = {"blip": 16, "vilt": 32}, 2
CPU_ROUNDS, GPU_SECONDS = 3, 65.0
WARMUP, COMPARED = 2, 4  # steps before a graph is captured: MoIL's imitation begins with the second; losses compared
# A loss may differ from eager training's, whose masks are others, by a quarter of how far that has come, or by rounding
ROUNDING, OF_THE_WAY = {"float32": 1e-3, "bfloat16": 0.03}, 0.25


@dataclass(frozen=True)
class Options:
    """batch: None for BATCH or CPU_BATCH;  rounds: on a CPU;  seconds: no timing begins after so many, or None"""

    device: torch.device
    size: str = "base"
    batch: int | None = None
    dtype: str = "float32"
    dropout: float = 0.1
    rounds: int = CPU_ROUNDS
    seconds: float | None = None

    def __post_init__(self):
        check_choice("size", self.size, tuple(SIZES))
        check_choice("dtype", self.dtype, tuple(ROUNDING))
        check_probability("dropout", self.dropout)
        for name in ("batch", "rounds", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a number above 0, got {value}")

    def batch_of(self, model: str) -> int:
        return self.batch or (CPU_BATCH if self.device.type == "cpu" else BATCH[model])


class Absent(Exception):
    """A step that is not measured here; the message says why."""


class Faulted(Exception):
    """A step did something to the GPU after which nothing runs there in this process; the message says what."""


def begin(mode: str, make: Callable[[], Training], device: torch.device) -> tuple[Training, list[float], int]:
    """A training after its first steps, their losses, and the bytes that it holds at its peak."""

    def first() -> tuple[Training, list[Tensor]]:
        training = make()
        if mode == "compiled":
            training.compile()
        side = None
        if mode == "graph":  # a backward keeps to the stream that its graph was built on
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            return training, [training.run().clone() for _ in range(WARMUP)]

    if device.type == "cpu":  # where only the profiler knows what is held
        (training, losses), peak = timing.peak_bytes(first, device)
    else:
        before = torch.cuda.memory_allocated(device)
        training, losses = first()
        held = torch.cuda.memory_allocated(device) - before
        loss, more = timing.peak_bytes(training.capture if mode == "graph" else training.run, device)
        losses += [] if loss is None else [loss.clone()]
        peak = held + more
    losses += [training.run().clone() for _ in range(COMPARED - len(losses))]
    return training, [loss.item() for loss in losses], peak


def compare(losses: Sequence[float], expected: Sequence[float], dtype: str) -> None:
    """Raises WrongResult unless training comes down the same way."""
    for index, (loss, other) in enumerate(zip(losses, expected)):
        tolerated = max(ROUNDING[dtype] * abs(expected[0]), OF_THE_WAY * abs(other - expected[0]))
        if not abs(loss - other) <= tolerated:  # NaN, too
            raise WrongResult(f"the loss of step {index + 1} is {loss:.5g}, and {other:.5g} is right")


class Model(NamedTuple):
    """What all trainings of a model begin with, its loss before the first step, and the methods that are wrong."""

    base: nn.Module
    batch: Batch
    loss: float
    wrong: dict[str, str]
    seconds: dict[str, float]


class Session:
    """Begins trainings, each on its own copy of the same weights, and times what has begun."""

    def __init__(self, options: Options, methods: Sequence[str]):
        self.options, self.methods = options, methods
        self.models: dict[str, Model] = {}
        self.losses: dict[tuple[str, str], list[float]] = {}  # what eager training lost, step by step
        self.spent = 0.0  # seconds, on timing alone

    def model(self, name: str) -> Model:
        """Built and verified when it is first asked for."""
        if name not in self.models:
            of, size, options, watch = MODELS[name], SIZES[self.options.size], self.options, Watch()
            device, dtype = options.device, getattr(torch, options.dtype)
            base, batch = of.build(size, device, dtype), of.batch(size, options.batch_of(name), device, dtype)
            with torch.no_grad():
                loss = of.loss(base, batch).item()
            seconds = {"build_s": watch.lap()}
            wrong = steps_methods.verify(of, self.methods, device)
            self.models[name] = Model(base, batch, loss, wrong, seconds | {"verify_s": watch.lap()})
        return self.models[name]

    def begin(self, name: str, method: str, mode: str) -> tuple[Training, dict]:
        """After its first steps, with all of its record but the times. From now on its weights stand.

        Raises Absent, Faulted, or WrongResult before anything wrong is timed.
        """
        options, model = self.options, self.model(name)
        if method in model.wrong:
            raise WrongResult(model.wrong[method])
        if options.seconds is not None and self.spent > options.seconds:
            raise Absent(f"{options.seconds:g} seconds had passed")
        with self._told(name, method, mode):
            return self._begun(name, method, mode, model)

    def time(self, begun: Sequence[tuple[Training, dict]]) -> list[dict]:
        """Their whole records: on a CPU they take turns, on a GPU each goes by itself. Raises Absent or Faulted."""
        watch, records = Watch(), [record for _, record in begun]
        with self._told(*(records[0][key] for key in ("model", "method", "mode"))):
            runs = {record["method"]: training.run for training, record in begun}
            if self.options.device.type == "cpu":
                times = timing.time_on_cpu(runs, self.options.rounds, warmup=0)
            else:
                times = {method: timing.time_on_gpu(lambda _, run=run: run(), 1) for method, run in runs.items()}
                for record in (record for record in records if record["mode"] != "graph"):
                    record["launches"] = timing.count_launches(runs[record["method"]])
        lap = watch.lap()
        self.spent += lap
        for record in records:
            own = times[record["method"]]
            record |= {"ms": own.median * 1e3, "spread_ms": own.spread * 1e3, "measure_s": lap / len(records)}
            record["samples_ms"] = [sample * 1e3 for sample in own.samples]
        return records

    @contextmanager
    def _told(self, name: str, method: str, mode: str) -> Iterator[None]:
        """What fails inside is Absent, or Faulted, where it is not a mistake."""
        try:
            yield
        except RuntimeError as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            if self.options.device.type == "cuda" and (why := timing.fault(self.options.device)):
                raise Faulted(f"{name}, {method}, {mode} faulted the device: {why}") from error
            if mode == "eager" and not isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise Absent(first) from None

    def _begun(self, name: str, method: str, mode: str, model: Model) -> tuple[Training, dict]:
        options, of, size, watch = self.options, MODELS[name], SIZES[self.options.size], Watch()
        make = partial(Training, method, of, size, model.base, model.batch, options.dropout)
        if mode != "eager" and (name, method) not in self.losses:
            training = make()
            self.losses[name, method] = [training.run().item() for _ in range(COMPARED)]
            del training
            free()
        seconds = model.seconds | {"expect_s": watch.lap()}
        training, losses, peak = begin(mode, make, options.device)
        compare(losses[:1], [model.loss], options.dtype)  # fresh adapters change nothing
        compare(losses, self.losses.setdefault((name, method), losses), options.dtype)
        training.stand()
        return training, {
            **{"model": name, "title": of.title, "size": options.size, "method": method, "mode": mode},
            **{"batch": options.batch_of(name), "dtype": options.dtype, "dropout": options.dropout},
            "compiler": size.compiler if mode == "compiled" else None,
            "backend": training.backend(),
            "trained": sum(p.numel() for p in training.trained),
            "peak_bytes": peak,
            "launches": None,
            "losses": losses,
            **seconds,
            "first_s": watch.lap(),
        }


class Watch:
    """Seconds from one lap to the next."""

    def __init__(self):
        self.began = time.perf_counter()

    def lap(self) -> float:
        before, self.began = self.began, time.perf_counter()
        return self.began - before


def free() -> None:
    """What the last training held: models and adapters refer to each other, and compiled code to them."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
