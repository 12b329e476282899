"""What a call costs the host: process time, calls of functions, and launches.

    python -m peft_kernels bench --host [layer qkv imitation blip vilt] [--rounds N] [--save FILE.json]

layer       one layer of rank 16, bfloat16, 4 × 64 -> 64, so that there is next to nothing to compute
qkv         three layers that read one x, all three together, one by one and as one call, "in a group"; Aurora's share
            cores and x U
imitation   MoIL's step, and a plain weight distance, for 36 projections of 64 × 64
blip, vilt  a training step of BLIP-base or ViLT-B with all their layers, 32 wide, AdamW's step included

Without a name the first three, in half a minute; blip and vilt take up to a minute each. µs are process time on one
thread, of what this process computed and not of what it waited for: the median of rounds in which everybody takes
turns, half the distance between the quartiles, and the median of the rounds' ratios to PEFT's. Gradients are dropped
after each backward. Calls are those of Python's and C's functions in a warm call, by sys.setprofile: exact, and the
same in every run. Launches are of Triton's kernels, or calls of the CUDA extension, each of which launches several.
On a CPU none of them does anything (nothing.py).
"""

import gc
import importlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from peft_kernels import use_backend
from peft_kernels.backend import BACKENDS, status
from peft_kernels.layers import LowRankLinear
from peft_kernels.layers.group import LinearGroup
from peft_kernels.layers.mode_linear import Decomposition, ModeLinear, SharedCores
from peft_kernels.layers.per_pass import PerPass

from . import bench_weight_distance, results, terminal, timing
from .markdown import NOTHING, number
from .nothing import launching_nothing
from .steps_methods import AURORA, FULL, LORA, PEFT, Training
from .steps_models import MODELS, SIZES, Size

ROWS, WIDTH, RANK, DTYPE = 4, 64, 16, torch.bfloat16
DROPOUTS = (0.0, 0.1)
ROUNDS, LONG_ROUNDS = 30, 12
QUESTIONS, WHOLE = ("layer", "qkv", "imitation"), tuple(MODELS)
GROUPED = " in a group"
WARM = 3  # calls before one is counted: kernels are compiled, plans made, caches filled
STEP_SIZE, STEP_DROPOUT = Size(32, SIZES["base"].layers, 2, 32, 100, 10, (RANK, RANK, RANK)), 0.1
IMITATED = {"layers": 12, "width": WIDTH, "R": RANK}


@dataclass(frozen=True)
class Provider:
    """step: forward and backward, or all there is;  forward: where it is a call of its own, of `layers` on `x`

    shared_by: so many layers share what one of them costs
    """

    step: Callable[[], object]
    backend: str | None = None
    forward: Callable[[], object] | None = None
    layers: Sequence[nn.Module] = ()
    x: Tensor | None = None
    shared_by: int = 1

    def running(self) -> use_backend:
        """Its calls belong into this block."""
        return use_backend(self.backend or "auto")


# ---- layers ----------------------------------------------------------------------------------------------------------


def providers(
    p: float, count: int = 1, backends: Sequence[str] | None = None, device: torch.device | str = "cpu"
) -> dict[str, Provider]:
    """One layer, or three that read one x, of everybody, with dropout p; backends: those of ours, all that run here

    On a CPU, kernels run inside of `launching_nothing()` alone.
    """
    backends, ways = available() if backends is None else backends, ("", GROUPED) if count > 1 else ("",)
    found = {"frozen linear": _layers(_linears(count, device))}
    if "PEFT" not in absent():
        found["PEFT"] = _layers(_peft(p, count, device))
        for grouped, backend in product(ways, backends):
            found[f"PEFT accelerated{grouped}, {backend}"] = _layers(_accelerated(p, count, device, grouped), backend)
    for grouped, backend in product(ways, backends):
        ours = [LowRankLinear(linear, RANK, dropout_p=p) for linear in _linears(count, device)]
        found[f"LowRankLinear{grouped}, {backend}"] = _layers(_together(ours) if grouped else ours, backend)
    for grouped, backend in product(ways, backends):
        layers, *others = _aurora(p, count, device, backend)
        found[f"Aurora{grouped}, {backend}"] = _layers(_together(layers) if grouped else layers, *others)
        if count == 1:
            found[f"Aurora, one of three, {backend}"] = _layers(*_aurora(p, 3, device, backend), shared_by=3)
    return found


def available() -> list[str]:
    return [name for name in reversed(BACKENDS) if name not in absent()]


def absent() -> dict[str, str]:
    """Who cannot be had here, and why."""
    found = {name: why for name, why in status().items() if why}
    try:
        importlib.import_module("peft_kernels.integrations.peft")
    except ImportError as error:
        found["PEFT"] = str(error)
    return found


def _linears(count: int, device: torch.device | str) -> list[nn.Linear]:
    return [nn.Linear(WIDTH, WIDTH, device=device, dtype=DTYPE).requires_grad_(False) for _ in range(count)]


def _peft(p: float, count: int, device: torch.device | str) -> list[nn.Module]:
    import peft

    config = peft.LoraConfig(r=RANK, lora_dropout=p, target_modules=[str(index) for index in range(count)])
    return list(peft.get_peft_model(nn.Sequential(*_linears(count, device)), config).base_model.model.to(DTYPE))


def _accelerated(p: float, count: int, device: torch.device | str, grouped: str) -> list[nn.Module]:
    from peft_kernels.integrations.peft import accelerate

    layers = _peft(p, count, device)
    accelerate(nn.ModuleDict(zip("qkv", layers)), group=bool(grouped))
    return layers


def _together(layers: list[nn.Module]) -> list[nn.Module]:
    group = LinearGroup(layers, "qkv")
    for member, layer in enumerate(layers):
        layer.group = group, member
    return layers


def _aurora(p: float, count: int, device: torch.device | str, backend: str) -> tuple:
    shared = Decomposition([(WIDTH, WIDTH)] * count, [(1, 1)] * count, RANK, dtype=DTYPE, device=device)
    cores, hidden = SharedCores(shared), PerPass()
    linears = _linears(count, device)
    layers = [ModeLinear(linear, cores, slot, hidden=hidden, dropout_p=p) for slot, linear in enumerate(linears)]
    return layers, backend, list(shared.parameters())


def _layers(
    layers: Sequence[nn.Module], backend: str | None = None, also: Sequence[Tensor] = (), shared_by: int = 1
) -> Provider:
    """also: what trains beside the layers' own parameters"""
    like = next(layers[0].parameters())
    x = torch.randn(ROWS, WIDTH, dtype=DTYPE, device=like.device, requires_grad=True)
    leaves = [x, *also, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
    gradients = [torch.randn_like(x) for _ in layers]
    if len(layers) == 1:
        forward = partial(layers[0], x)
    else:
        q, k, v = layers

        def forward() -> tuple[Tensor, ...]:
            return q(x), k(x), v(x)

    def step() -> None:
        y = forward()
        torch.autograd.backward(y, gradients if isinstance(y, tuple) else gradients[0])
        for leaf in leaves:
            leaf.grad = None

    return Provider(step, backend, forward, layers, x, shared_by)


# ---- what is more than a layer ---------------------------------------------------------------------------------------


def imitation_providers(kind: str, device: torch.device, backends: Sequence[str]) -> dict[str, Provider]:
    depth = RANK if kind == bench_weight_distance.STEP else 0
    case = bench_weight_distance.Case(**IMITATED, depth=depth, kind=kind)
    tensors = bench_weight_distance.make_tensors(case, device)
    found = {}
    for name in ("authors' formula", "low-rank form, autograd", *(f"ours, {backend}" for backend in backends)):
        provider = bench_weight_distance.PROVIDERS[name]
        built = provider.build(case, tensors)
        loss = built.loss if kind == bench_weight_distance.PLAIN else None
        found[name] = Provider(partial(built.forward, None), provider.backend, loss)
    return found


def step_providers(model: str, device: torch.device, backends: Sequence[str]) -> dict[str, Provider]:
    of = MODELS[model]
    base, batch = of.build(STEP_SIZE, device, DTYPE), of.batch(STEP_SIZE, 1, device, DTYPE)

    def training(method: str, accelerated: bool = False) -> Callable[[], Tensor]:
        made = Training(method, of, STEP_SIZE, base, batch, STEP_DROPOUT)
        made.stand()
        if accelerated:
            from peft_kernels.integrations.peft import accelerate

            accelerate(made.model)
        return made.step

    found = {FULL: Provider(training(FULL))}
    if "PEFT" not in absent():
        found[PEFT] = Provider(training(PEFT))
        found |= {f"{PEFT} accelerated, {each}": Provider(training(PEFT, True), each) for each in backends}
    for method in (LORA, AURORA):
        found |= {f"{method}, {each}": Provider(training(method), each) for each in backends}
    return found


# ---- measuring -------------------------------------------------------------------------------------------------------


def counted_calls(function: Callable[[], object]) -> int:
    """How many functions of Python and of C a warm call of this one calls, itself included; the same every time."""
    for _ in range(WARM):
        function()
    count, before, collecting = 0, sys.getprofile(), gc.isenabled()

    def see(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # what it would free may have callbacks
    try:
        with torch.autograd.set_multithreading_enabled(False):  # a GPU's backward, too, is this thread's
            sys.setprofile(see)
            function()
            sys.setprofile(before)
    finally:
        sys.setprofile(before)
        if collecting:
            gc.enable()
    return count - 1  # the one that ends it


@contextmanager
def stage(device: torch.device) -> Iterator[Callable[[Callable[[], object]], Counter[str]]]:
    """Where kernels run, or on a CPU do nothing; yields what counts a function's launches."""
    if device.type == "cpu":
        with launching_nothing() as done:

            def launches(function: Callable[[], object]) -> Counter[str]:
                before = Counter(done)
                function()
                return Counter(done) - before

            yield launches
        return

    from .gpu.launches import counted  # which imports triton

    def launches_on_gpu(function: Callable[[], object]) -> Counter[str]:
        with counted() as done:
            function()
        return done

    yield launches_on_gpu


def measure(
    found: dict[str, Provider],
    against: str,
    launches: Callable[[Callable[[], object]], Counter[str]],
    rounds: int | None,
    device: torch.device,
) -> list[dict]:
    """A record for each provider, with its times beside that one's."""
    records, clocks = {}, {}
    for name, provider in found.items():
        runs = {"forward": provider.forward, "step": provider.step}
        records[name] = record = {"provider": name, "backend": provider.backend}
        with provider.running():
            for kind, run in runs.items():
                if run is not None:
                    record[f"{kind}_calls"] = counted_calls(run) / provider.shared_by
                    clocks[name, kind] = timing.host_clock(run, provider.running, device)
            record["kernels"] = launches(provider.step)
            record["launches"] = record["kernels"].total() / provider.shared_by
    short = any(provider.forward for provider in found.values())
    gc.collect()
    gc.freeze()  # what is there: no collection goes through it while time is taken
    times = timing.in_turns(clocks, rounds or (ROUNDS if short else LONG_ROUNDS))
    gc.unfreeze()
    for (name, kind), each in times.items():
        share = 1e6 / found[name].shared_by
        records[name] |= {f"{kind}_us": each.median * share, f"{kind}_spread_us": each.spread * share}
        if (against, kind) in times:
            ratio = 1 / timing.speed_against(each, times[against, kind])
            records[name][f"{kind}_ratio"] = ratio / found[name].shared_by
    return list(records.values())


def asked(questions: Sequence[str], device: torch.device) -> Iterator[tuple[str, str, dict[str, Provider]]]:
    """(title, whom to compare with, providers) of each question's tables."""
    backends = available()
    for question in questions:
        if question in WHOLE:
            title = f"a training step of {MODELS[question].title}, {STEP_SIZE.width} wide, p = {STEP_DROPOUT:g}"
            yield title, PEFT, step_providers(question, device, backends)
        elif question == "imitation":
            for kind in (bench_weight_distance.STEP, bench_weight_distance.PLAIN):
                title = f"{kind}, {bench_weight_distance.PROJECTIONS * IMITATED['layers']} projections"
                yield title, "authors' formula", imitation_providers(kind, device, backends)
        else:
            for p in DROPOUTS:
                title = f"{'one layer' if question == 'layer' else 'three layers that read one x'}, p = {p:g}"
                yield title, "PEFT", providers(p, 1 if question == "layer" else 3, backends, device)


# ---- the command -----------------------------------------------------------------------------------------------------


def table(record: dict) -> terminal.Table:
    rows, kinds = [], [kind for kind in ("forward", "step") if f"{kind}_us" in record["results"][0]]
    digits = len(kinds) - 1  # what has no forward of its own takes milliseconds
    for row in record["results"]:
        cells = [row["provider"]]
        for kind in kinds:
            cells += [number(row[f"{kind}_us"], digits), number(row[f"{kind}_spread_us"], digits)]
            cells += [f"{row[f'{kind}_ratio']:.2f}×" if f"{kind}_ratio" in row else NOTHING]
            cells += [f"{row[f'{kind}_calls']:.1f}".removesuffix(".0")]
        rows.append([*cells, f"{row['launches']:.1f}".removesuffix(".0")])
    names = {"forward": "forward", "step": "and backward" if len(kinds) == 2 else "step"}
    headers = ["provider"]
    for kind in kinds:
        headers += [f"{names[kind]}, µs", "±", f"of {record['against']}", "calls"]
    notes = [f"{name}: {why}" for name, why in record["absent"].items()]
    return terminal.Table(record["title"], [*headers, "launches"], rows, notes)


def main(questions: Sequence[str], device: torch.device, rounds: int | None, save: Path | None) -> int:
    run = results.provenance(device) | {"host": []}
    print(results.describe(run), end="\n\n")
    with stage(device) as launches:
        why = absent()
        for title, against, found in asked(questions or QUESTIONS, device):
            measured = measure(found, against, launches, rounds, device)
            run["host"].append({"title": title, "against": against, "results": measured, "absent": why})
            terminal.show(table(run["host"][-1]))
            if save:
                results.save(run, save)
    return 0


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def elsewhere(arguments: Sequence[str]) -> int:
    """In a process without TRITON_INTERPRET, which decides what a kernel is when it is imported; its exit status."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", "peft_kernels", "bench", *arguments], env=environment).returncode
