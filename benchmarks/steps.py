"""One training step of BLIP-base and ViLT-B by every method: verified first, then timed.

    python -m peft_kernels.benchmarks.steps [--model blip vilt] [--method MoIL …] [--mode graph eager compiled]
        [--size tiny] [--batch N] [--dtype float32] [--dropout 0.1 …] [--rounds N] [--seconds N] [--save FILE.json]
    python -m peft_kernels.benchmarks.steps --adds          also, what adapters on all linears add to a frozen model
    python -m peft_kernels.benchmarks.steps --inference     instead, what the adapted models cost to run and to store

A step is forward, loss, backward, MoIL's own step where there is one, and AdamW's, on one batch in the device's memory.

    graph       all of it captured in a CUDA graph and replayed
    eager       as it is, steps issued back to back
    compiled    each layer of the towers, and of the authors' formula, by torch.compile as one graph, so that one
                compilation serves all layers of a kind

bfloat16: the frozen weights, and those that train whole, but for MoIL's, are bfloat16; adapters, with peft as with us,
and MoIL's live weights and teachers are float32, and there is no autocast. MB is the peak of all that a training holds:
weights, gradients, optimizer, activations. Launches are counted where the host issues them one by one. Beside the time
of a step each record has the seconds that went before it: build_s for the model and verify_s for the tiny one by which
all methods are verified, both shared by a model's records; expect_s for the eager steps that the losses are compared
with, first_s for the first steps, in which kernels are compiled and graphs captured; and measure_s for timing itself.
steps_inference.py says what --inference measures. --adds measures a step of the frozen model, whose heads train and in
which gradients flow through all frozen linears, and those of LoRA on all linears, peft's and ours, with and without
dropout: what adapters add is the difference, and a line below the table compares ours with peft's. On a CPU, eagerly,
all methods of a model take turns, and are held at once: BLIP-base's seven take 20 GB. Their ratios and differences are
medians of each round's, as a CPU's clock may drift more from one minute to the next than methods differ.
"""

import argparse
import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from peft_kernels.checks import check_choice

from . import results, steps_inference, timing
from .cases import WrongResult
from .steps_methods import (
    ADDING,
    BY_NAME,
    FROZEN,
    LORA_ALL,
    METHODS,
    MODES,
    PEFT,
    PEFT_ALL,
    PEFT_AURORA,
    RIVALS,
    RIVALS_OF_FEW,
)
from .steps_models import MODELS, SIZES
from .steps_session import BATCH, CPU_BATCH, CPU_ROUNDS, GPU_SECONDS, ROUNDING, Absent, Faulted, Options, Session, free
from .steps_table import inference_table, steps_table

KNOWN = (*METHODS, *BY_NAME)

# ---- all of them ----------------------------------------------------------------------------------------------------


def measure(
    run: dict,
    options: Options,
    models: Sequence[str] = tuple(MODELS),
    methods: Sequence[str] = METHODS,
    modes: Sequence[str] = MODES,
    report: Callable[[], None] = lambda: None,
) -> None:
    """Adds to run["steps"] and run["absent_steps"], graphs first; calls `report` before the first and whenever one, or
    on a CPU one model, has been measured.

    Raises ValueError on a name that there is not, before anything is built, and WrongResult after all others have been
    measured, if something was wrong: it is absent. After a fault of the GPU nothing more is measured.
    """
    for name, given, known in (("model", models, MODELS), ("method", methods, KNOWN), ("mode", modes, MODES)):
        for each in given:
            check_choice(name, each, tuple(known))
    models, methods = list(dict.fromkeys(models)), list(dict.fromkeys(methods))
    for key in ("steps", "absent_steps"):
        run.setdefault(key, [])

    def absent(reason: str, model: str | None = None, method: str | None = None, mode: str | None = None) -> dict:
        run["absent_steps"].append({"model": model, "method": method, "mode": mode, "reason": reason})
        return run["absent_steps"][-1]

    if importlib.util.find_spec("transformers") is None:
        absent("transformers, which has the models, is not installed")
        return
    for method in {PEFT, PEFT_ALL, PEFT_AURORA} & {*methods} if importlib.util.find_spec("peft") is None else ():
        absent("peft is not installed", method=method)
        methods.remove(method)
    if "graph" in modes and options.device.type == "cpu":
        absent("a CUDA graph needs a GPU", mode="graph")
        modes = [mode for mode in modes if mode != "graph"]
    asked = [(model, method, mode) for mode in MODES if mode in modes for method in methods for model in models]
    waiting = {each: absent("the run ended before", *each) for each in asked}  # what a run that is killed leaves
    session, wrong, before = Session(options, methods), [], len(run["steps"])

    @contextmanager
    def told(*each: str) -> Iterator[None]:
        try:
            yield
        except Absent as reason:
            waiting[each]["reason"] = str(reason)
        except WrongResult as error:
            waiting[each]["reason"] = f"wrong: {error}"
            wrong.append(f"{', '.join(each)}: {error}")

    report()
    try:
        for together in _groups(asked, options.device):
            gc.freeze()  # so that a collection after them, of 0.5 s, looks at nothing older
            begun = []
            for each in together:
                with told(*each):
                    begun.append(session.begin(*each))
            with told(*each):
                for record in session.time(begun) if begun else ():
                    run["steps"].append(record)
                    run["absent_steps"].remove(waiting.pop((record["model"], record["method"], record["mode"])))
            compare_speeds(run["steps"][before:])  # with none of another hour
            report()
            del begun
            free()
    except Faulted as error:
        for left in asked[asked.index(each) :]:
            waiting[left]["reason"] = str(error)
        wrong.append(str(error))
    gc.unfreeze()
    if wrong:
        raise WrongResult("; ".join(wrong))


def _groups(asked: Sequence[tuple[str, str, str]], device: torch.device) -> list[list[tuple[str, str, str]]]:
    """Those that are held at once and take turns: on a CPU, whose clock drifts, all eager trainings of a model."""
    found: dict[tuple[str, ...], list[tuple[str, str, str]]] = {}
    for model, method, mode in asked:
        in_turns = device.type == "cpu" and mode == "eager"
        found.setdefault((mode, model) if in_turns else (mode, model, method), []).append((model, method, mode))
    return list(found.values())


def measure_inference(
    run: dict,
    options: Options,
    models: Sequence[str] = tuple(MODELS),
    methods: Sequence[str] = steps_inference.METHODS,
    report: Callable[[], None] = lambda: None,
) -> None:
    """Adds run["inference"] and run["absent_inference"], and calls `report` after each.

    Raises WrongResult after all others have been measured, if something was wrong: it is absent.
    """
    run["inference"], run["absent_inference"], wrong = [], [], []
    for model, method in ((model, method) for model in models for method in methods):
        absent = {"model": model, "method": method, "mode": "inference"}
        packages = ("transformers", "peft") if method == PEFT else ("transformers",)
        try:
            if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
                raise Absent(f"{missing[0]} is not installed")
            base, *records = steps_inference.measure(model, method, options)
            known = any(record["model"] == model for record in run["inference"])
            run["inference"] += records if known else [base, *records]
        except Absent as reason:
            run["absent_inference"].append({**absent, "reason": str(reason)})
        except WrongResult as error:
            run["absent_inference"].append({**absent, "reason": f"wrong: {error}"})
            wrong.append(f"{model}, {method}: {error}")
        report()
        free()
    if wrong:
        raise WrongResult("; ".join(wrong))


def compare_speeds(records: Sequence[dict]) -> None:
    """How many times as fast as the rivals in the same mode, and how much more than a frozen model's step."""
    same = ("model", "size", "mode", "batch", "dtype", "dropout")
    for record in records:
        alike = {other["method"]: other for other in records if all(other[key] == record[key] for key in same)}
        times = {method: timing.Times.of(other["samples_ms"]) for method, other in alike.items()}
        method = record["method"]
        rivals = [name for name in RIVALS.values() if method in RIVALS_OF_FEW.get(name, (method,))]
        record["speed_vs"] = {
            name: timing.speed_against(times[method], times[name]) for name in rivals if name in alike
        }
        if method in (PEFT_ALL, LORA_ALL) and FROZEN in alike:
            more = timing.beyond(times[method], times[FROZEN])
            record |= {"frozen_ms": times[FROZEN].median, "adds_ms": more.median, "adds_spread_ms": more.spread}


# ---- the command ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inference", action="store_true", help="of the base, adapted and merged models")
    parser.add_argument("--adds", action="store_true", help=f"also {'; '.join(ADDING)}, dropout 0.1 and 0")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    named = {"nargs": "+", "choices": KNOWN, "metavar": "NAME"}
    parser.add_argument("--method", help=f"{'; '.join(METHODS)}; or, only by name: {'; '.join(BY_NAME)}", **named)
    parser.add_argument("--mode", nargs="+", choices=MODES, help="all on a GPU, eager on a CPU")
    parser.add_argument("--size", choices=SIZES, default="base")
    batches = f"on a GPU {BATCH['blip']} and {BATCH['vilt']}, on a CPU {CPU_BATCH}; of --inference"
    batches += f" {steps_inference.GPU_BATCH}, on a CPU {steps_inference.CPU_BATCH}, beside 1"
    parser.add_argument("--batch", type=int, help=batches)
    parser.add_argument("--dtype", choices=ROUNDING, help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--dropout", type=float, nargs="+", metavar="P", help="of LoRA and Aurora: 0.1")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=CPU_ROUNDS, help=f"on a CPU: {CPU_ROUNDS}")
    parser.add_argument("--seconds", type=float, help=f"of timing: begin nothing after that; on a GPU {GPU_SECONDS:g}")
    parser.add_argument("--save", metavar="FILE.json", help="written whenever something has been measured, too")
    given = parser.parse_args(argv)
    device = torch.device(given.device)
    on_cpu = device.type == "cpu"
    dtype = given.dtype or ("float32" if on_cpu else "bfloat16")
    seconds = given.seconds if given.seconds is not None or on_cpu else GPU_SECONDS
    asked = [(p, given.method or METHODS) for p in given.dropout or [0.1]]
    asked += [(p, ADDING) for p in (0.1, 0.0) if given.adds]
    try:
        several = [(Options(device, given.size, given.batch, dtype, p, given.rounds, seconds), of) for p, of in asked]
        if given.adds and given.inference:
            raise ValueError("--adds: goes without --inference")
        if given.inference:
            inferred = steps_inference.chosen(given.method)
            if given.mode or given.seconds:
                raise ValueError("--inference: goes without --mode and --seconds")
    except ValueError as error:
        parser.error(str(error))
    run = results.provenance(device)
    print(results.describe(run), flush=True)
    report = partial(results.save, run, given.save) if given.save else lambda: None
    try:
        if given.inference:
            measure_inference(run, several[0][0], given.model, inferred, report)
        else:
            modes = given.mode or (("eager",) if on_cpu else MODES)
            for options, methods in several:
                measure(run, options, given.model, methods, modes, report)
    finally:
        report()
        print(inference_table(run) if given.inference else steps_table(run))


if __name__ == "__main__":
    sys.exit(main())
