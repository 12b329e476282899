"""One training step of BLIP-base and ViLT-B by every method: verified first, then timed.

    python -m peft_kernels.benchmarks.steps [--model blip vilt] [--method MoIL …] [--mode eager graph compiled]
        [--size tiny] [--batch N] [--dtype float32] [--dropout 0.1] [--rounds N] [--seconds N] [--save FILE.json]

A step is forward, loss, backward, MoIL's own step where there is one, and AdamW's, on one batch in the device's memory.

    eager       as it is
    graph       all of it captured in a CUDA graph and replayed
    compiled    each layer of the towers, and of the authors' formula, by torch.compile as one graph, so that one
                compilation serves all layers of a kind

bfloat16: the frozen weights, and those that train whole, but for MoIL's, are bfloat16; adapters, with peft as with us,
and MoIL's live weights and teachers are float32, and there is no autocast. MB is the peak of all that a training holds:
weights, gradients, optimizer, activations. Launches are counted where the host issues them one by one.
"""

import argparse
import gc
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from peft_kernels.checks import check_choice, check_probability

from . import results, steps_methods, tables, timing
from .cases import WrongResult
from .steps_methods import AUTHORS, FULL, METHODS, MOIL, PEFT, Training
from .steps_models import MODELS, SIZES

MODES = ("eager", "graph", "compiled")
BATCH, CPU_BATCH = {"blip": 16, "vilt": 32}, 2
CPU_ROUNDS, GPU_SECONDS = 3, 65.0
WARMUP, COMPARED = 2, 4  # steps before a graph is captured: MoIL's imitation begins with the second; losses compared
# A loss may differ from eager training's, whose masks are others, by a quarter of how far that has come, or by rounding
ROUNDING, OF_THE_WAY = {"float32": 1e-3, "bfloat16": 0.03}, 0.25
RIVALS = {"PEFT LoRA": PEFT, "full tuning": FULL, "authors' formula": AUTHORS}


@dataclass(frozen=True)
class Options:
    """batch: None for BATCH or CPU_BATCH;  rounds: on a CPU;  seconds: after which nothing is begun, or None"""

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


# ---- one of them ----------------------------------------------------------------------------------------------------


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


class Session:
    """Measures one training after the other, each on its own copy of the same weights."""

    def __init__(self, options: Options, models: Sequence[str], methods: Sequence[str]):
        self.options, self.began = options, time.perf_counter()
        self.models, self.wrong, self.eager = {}, {}, {}
        for name in models:
            of, size, device = MODELS[name], SIZES[options.size], options.device
            self.wrong |= {(name, method): why for method, why in steps_methods.verify(of, methods, device).items()}
            base = of.build(size, device, getattr(torch, options.dtype))
            batch = of.batch(size, options.batch_of(name), device, getattr(torch, options.dtype))
            with torch.no_grad():
                self.models[name] = base, batch, of.loss(base, batch).item()

    def measure(self, model: str, method: str, mode: str) -> dict:
        """One record. Raises Absent, or WrongResult before anything wrong is timed."""
        options, (base, batch, first) = self.options, self.models[model]
        if (model, method) in self.wrong:
            raise WrongResult(self.wrong[model, method])
        if options.seconds is not None and time.perf_counter() - self.began > options.seconds:
            raise Absent(f"{options.seconds:g} seconds had passed")
        of, size = MODELS[model], SIZES[options.size]
        make = partial(Training, method, of, size, base, batch, options.dropout)
        try:
            training, losses, peak = begin(mode, make, options.device)
            compare(losses[:1], [first], options.dtype)  # fresh adapters change nothing
            compare(losses, self.eager.get((model, method), losses), options.dtype)
            if mode == "eager":
                self.eager[model, method] = losses
            training.stand()
            if options.device.type == "cpu":
                times, launches = timing.time_on_cpu({"": training.run}, options.rounds, warmup=0)[""], None
            else:
                times = timing.time_on_gpu(lambda _: training.run(), 1)
                launches = None if mode == "graph" else timing.count_launches(training.run)
        except RuntimeError as error:
            if mode == "eager" and not isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise Absent((str(error).strip() or type(error).__name__).splitlines()[0]) from None
        return {
            **{"model": model, "title": of.title, "size": options.size, "method": method, "mode": mode},
            **{"batch": options.batch_of(model), "dtype": options.dtype, "dropout": options.dropout},
            "compiler": size.compiler if mode == "compiled" else None,
            "backend": training.backend(),
            "trained": sum(p.numel() for p in training.trained),
            "ms": times.median * 1e3,
            "spread_ms": times.spread * 1e3,
            "peak_bytes": peak,
            "launches": launches,
            "losses": losses,
        }


# ---- all of them ----------------------------------------------------------------------------------------------------


def measure(
    run: dict,
    options: Options,
    models: Sequence[str] = tuple(MODELS),
    methods: Sequence[str] = METHODS,
    modes: Sequence[str] = MODES,
    report: Callable[[], None] = lambda: None,
) -> None:
    """Adds run["steps"] and run["absent_steps"], and calls `report` before each: all eager ones first.

    Raises ValueError on a name that there is not, before anything is built, and WrongResult after all others have been
    measured, if something was wrong: it is absent.
    """
    for name, given, known in (("model", models, MODELS), ("method", methods, METHODS), ("mode", modes, MODES)):
        for each in given:
            check_choice(name, each, tuple(known))
    models, methods = list(dict.fromkeys(models)), list(dict.fromkeys(methods))
    run["steps"], run["absent_steps"] = [], []

    def absent(reason: str, model: str | None = None, method: str | None = None, mode: str | None = None) -> dict:
        run["absent_steps"].append({"model": model, "method": method, "mode": mode, "reason": reason})
        return run["absent_steps"][-1]

    if importlib.util.find_spec("transformers") is None:
        absent("transformers, which has the models, is not installed")
        return
    if PEFT in methods and importlib.util.find_spec("peft") is None:
        absent("peft is not installed", method=PEFT)
        methods.remove(PEFT)
    if "graph" in modes and options.device.type == "cpu":
        absent("a CUDA graph needs a GPU", mode="graph")
        modes = [mode for mode in modes if mode != "graph"]
    asked = [(model, method, mode) for mode in MODES if mode in modes for method in methods for model in models]
    waiting = {each: absent("the run ended before", *each) for each in asked}  # what a run that is killed leaves
    session, wrong = Session(options, models, methods), []
    gc.freeze()  # so that a collection after each training, of 0.5 s, looks at nothing older
    for each in asked:
        report()
        try:
            run["steps"].append(session.measure(*each))
            run["absent_steps"].remove(waiting[each])
        except Absent as reason:
            waiting[each]["reason"] = str(reason)
        except WrongResult as error:
            waiting[each]["reason"] = f"wrong: {error}"
            wrong.append(f"{', '.join(each)}: {error}")
        _free()
        compare_speeds(run["steps"])
    gc.unfreeze()
    if wrong:
        raise WrongResult("; ".join(wrong))


def _free() -> None:
    """What the last training held: models and adapters refer to each other, and compiled code to them."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def compare_speeds(records: Sequence[dict]) -> None:
    """How many times as fast as the rivals in the same mode; the authors' formula is MoIL's alone."""
    same = ("model", "size", "mode", "batch", "dtype", "dropout")
    for record in records:
        alike = {other["method"]: other["ms"] for other in records if all(other[k] == record[k] for k in same)}
        rivals = [name for name in RIVALS.values() if name != AUTHORS or record["method"] in (MOIL, AUTHORS)]
        record["speed_vs"] = {rival: alike[rival] / record["ms"] for rival in rivals if rival in alike}


# ---- tables and the command -----------------------------------------------------------------------------------------


def steps_table(run: dict) -> str:
    """Every step that was measured, and below what is absent and why; "" for a run without steps."""
    heads = ("model", "batch", "dtype", "mode", "method", "trained, M", "ms", "±", "MB peak", "launches")
    heads += tuple(f"vs {name}" for name in RIVALS)
    rows = []
    order = {"model": tuple(MODELS), "mode": MODES, "method": METHODS}
    for r in sorted(run.get("steps", ()), key=lambda r: [names.index(r[key]) for key, names in order.items()]):
        title = r["title"] if r["size"] == "base" else f"{r['title']}, {r['size']}"
        cells = [title, str(r["batch"]), r["dtype"], r["mode"], r["method"], f"{r['trained'] / 1e6:.2f}"]
        cells += [f"{r['ms']:.1f}", f"{r['spread_ms']:.1f}", f"{r['peak_bytes'] / 1e6:.0f}"]
        cells.append("–" if r["launches"] is None else str(r["launches"]))
        speeds = [r["speed_vs"].get(rival) for rival in RIVALS.values()]
        rows.append(cells + ["–" if speed is None else f"{speed:.2f}×" for speed in speeds])
    kept = [index for index, column in enumerate(zip(*rows)) if set(column) != {"–"}]
    table = tables.markdown([heads[i] for i in kept], [[row[i] for i in kept] for row in rows]) if rows else ""
    reasons: dict[str, list[str]] = {}
    for each in run.get("absent_steps", ()):
        title = MODELS[each["model"]].title if each["model"] else None
        what = ", ".join(filter(None, (title, each["method"], each["mode"]))) or "all"
        reasons.setdefault(each["reason"], []).append(what)
    absent = "\n".join(f"- absent: {'; '.join(names)}: {reason}" for reason, names in reasons.items())
    return "\n\n".join(filter(None, (table, absent)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    named = {"nargs": "+", "choices": METHODS, "default": METHODS, "metavar": "NAME"}
    parser.add_argument("--method", help="; ".join(METHODS), **named)
    parser.add_argument("--mode", nargs="+", choices=MODES, help="all on a GPU, eager on a CPU")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch", type=int, help=f"on a GPU {BATCH['blip']} and {BATCH['vilt']}, on a CPU {CPU_BATCH}")
    parser.add_argument("--dtype", choices=ROUNDING, help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--dropout", type=float, default=0.1, help="of LoRA and Aurora: 0.1")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=CPU_ROUNDS, help=f"on a CPU: {CPU_ROUNDS}")
    parser.add_argument("--seconds", type=float, help=f"begin nothing after that; on a GPU {GPU_SECONDS:g}")
    parser.add_argument("--save", metavar="FILE.json", help="written before each step, too")
    given = parser.parse_args(argv)
    device = torch.device(given.device)
    on_cpu = device.type == "cpu"
    dtype = given.dtype or ("float32" if on_cpu else "bfloat16")
    seconds = given.seconds if given.seconds is not None or on_cpu else GPU_SECONDS
    try:
        options = Options(device, given.size, given.batch, dtype, given.dropout, given.rounds, seconds)
    except ValueError as error:
        parser.error(str(error))
    run = results.provenance(device)
    print(results.describe(run), flush=True)
    report = partial(results.save, run, given.save) if given.save else lambda: None
    try:
        measure(run, options, given.model, given.method, given.mode or (("eager",) if on_cpu else MODES), report)
    finally:
        report()
        print(steps_table(run))


if __name__ == "__main__":
    sys.exit(main())
