"""Prepared choices of `lowrank_linear` against what is: each verified, then both replayed in turns.

A variant is a small patch of one choice, or another design that is there already. Where it changes thin passes alone,
only our own launches are timed: beside torch's products, which take most of an operation, no change of theirs shows.
Nothing is written back; what wins is a row for triton_kernels/config.py, to be looked at by a person.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch

from peft_kernels.cuda_kernels import common as cuda_common
from peft_kernels.triton_kernels import config, lowrank_linear
from peft_kernels.triton_kernels.common import Launch, record_launches

from .. import cases, runner, timing
from ..kept import afresh

# (M, K, N): ViLT-B's and BLIP's layers at batches of 4 and 16 images, and a language model's.
LAYERS = ((2308, 768, 768), (9232, 768, 768), (9232, 768, 3072), (9232, 3072, 768), (8192, 4096, 4096))
SHAPES = {"lowrank_linear": LAYERS}
PASSES, FUSED, CUDA = "ours, triton passes", "ours, triton fused", "ours, cuda"


@dataclass(frozen=True)
class Variant:
    """What is in force while it is built and run, and on which cases it makes sense."""

    name: str
    patch: Callable[[], AbstractContextManager] = nullcontext
    base: str = PASSES
    provider: str = PASSES
    whole: bool = False  # time the operation, torch's products included
    applies: Callable[[cases.Case], bool] = lambda case: True


# ---- patches --------------------------------------------------------------------------------------------------------


@contextmanager
def tile(kernel: str, **sizes: int) -> Iterator[None]:
    """One kernel's tile with other sizes."""
    choose = lowrank_linear.lowrank_linear_config

    def changed(*args, **kwargs):
        chosen = choose(*args, **kwargs)
        return replace(chosen, **{kernel: replace(getattr(chosen, kernel), **sizes)})

    with mock.patch.object(lowrank_linear, "lowrank_linear_config", changed):
        yield


def strips(factor: float) -> AbstractContextManager:
    """Strips of rows for as many times the processors as there are."""
    return mock.patch.dict(config.PROCESSORS, {arch: int(n * factor) for arch, n in config.PROCESSORS.items()})


def cuda_strips(factor: float) -> AbstractContextManager:
    return mock.patch.object(cuda_common, "PROCESSORS", int(cuda_common.PROCESSORS * factor))


def _small(case: cases.Case) -> bool:
    return case.K <= 1024 and case.R <= 32


VARIANTS = (
    Variant("fused forward", provider=FUSED, whole=True, applies=_small),
    Variant("half as many strips", partial(strips, 0.5)),
    Variant("twice as many strips", partial(strips, 2)),
    Variant(
        "fused forward: deeper", partial(tile, "fused", depth=64, stages=4), provider=FUSED, whole=True, applies=_small
    ),
    Variant("down_bwd: 32 rows", partial(tile, "down_bwd", rows=32)),
    Variant("cuda: half as many strips", partial(cuda_strips, 0.5), CUDA, CUDA, whole=True),
    Variant("cuda instead of triton", provider=CUDA, whole=True),
)


# ---- the comparison -------------------------------------------------------------------------------------------------


def compare(bench: runner.Bench, case: cases.Case, device: torch.device, most: int | None = None) -> Iterator[dict]:
    """A record for each variant that makes sense on a case. most: variants"""
    problem = runner.pose(bench, case, device)
    inputs, bases = _inputs(problem, device), {}
    for variant in [each for each in VARIANTS if each.applies(case)][:most]:
        record = {"op": bench.op, "case": case.title, "dtype": case.dtype, "variant": variant.name}
        record |= {"base": variant.base, "provider": variant.provider, "whole": variant.whole}
        if variant.base not in bases:
            bases[variant.base] = runner.build(bench, variant.base, problem)
        try:
            with afresh(), variant.patch():
                built = runner.build(bench, variant.provider, problem)
            if why := next((each for each in (bases[variant.base], built) if isinstance(each, str)), None):
                record["absent"] = why
            else:
                base = partial(_run, bases[variant.base], case, inputs, nullcontext)
                record |= _compared(base, partial(_run, built, case, inputs, variant.patch), variant.whole, device)
        except Exception as error:  # Triton has many kinds for a tile that cannot be
            if isinstance(error, torch.AcceleratorError):
                raise  # nothing runs on this GPU any more in this process
            record["absent"] = f"{type(error).__name__}: {error}".partition("\n")[0]
        yield record


def _inputs(problem: runner.Problem, device: torch.device) -> list[runner.Input]:
    """As many sets as do not fit into the cache at once."""
    given = problem.tensors.input
    if device.type == "cpu":
        return [given]
    more = timing.copies_beyond_cache(sum(t.nbytes for t in given), device) - 1
    return [given, *(tuple(torch.randn_like(t).requires_grad_(t.requires_grad) for t in given) for _ in range(more))]


def _run(
    built: runner.Built,
    case: cases.Case,
    inputs: list[runner.Input],
    patch: Callable[[], AbstractContextManager],
) -> list[dict]:
    with afresh(), patch():
        return [runner.results(built, given, case.backward) for given in inputs]


def _compared(base: partial, variant: partial, whole: bool, device: torch.device) -> dict:
    """Microseconds for one set of inputs: the whole operation takes them, or the launches recorded from it."""
    steps, inputs, kept = {"base": base, "variant": variant}, len(base.args[2]), []
    if not whole:
        launches = {}
        for name, run in steps.items():
            with record_launches() as launches[name]:
                kept.append(run())  # what the launches write to stays theirs
        if alike(*launches.values()):
            return {"absent": "changes nothing here"}
        steps = {name: lambda each=each: [launch.run() for launch in each] for name, each in launches.items()}
    times = timing.time_on_cpu(steps, rounds=1) if device.type == "cpu" else timing.time_in_graphs(steps)
    found = {f"{name}_us": each.median * 1e6 / inputs for name, each in times.items()}
    found |= {f"{name}_spread_us": each.spread * 1e6 / inputs for name, each in times.items()}
    return found | {"ratio": timing.speed_against(times["variant"], times["base"])}


def alike(some: Sequence[Launch], others: Sequence[Launch]) -> bool:
    """Whether they are the same kernels in the same grids with the same tiles."""
    return [(e.kernel, e.grid, e.constants, e.tile) for e in some] == [
        (e.kernel, e.grid, e.constants, e.tile) for e in others
    ]
