"""The search for tiles: each kernel's tile against its neighbours, one size doubled or halved at a time.

A candidate is patched into the function of triton_kernels/config.py that chooses, verified like any provider, then
timed in a CUDA graph. What is faster becomes the tile whose neighbours are tried next. Nothing is written back: the
winners are rows for config.py, to be looked at by a person, and compiled ahead of time for every architecture first.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch

from peft_kernels.triton_kernels.common import record_launches
from peft_kernels.triton_kernels.config import Tile

from .. import cases, runner, timing


class Place(NamedTuple):
    """Where an operation's tiles are chosen: a function, and the modules of triton_kernels that call it by name."""

    function: str
    modules: tuple[str, ...]


PLACES = {
    "lowrank_linear": Place("lowrank_linear_config", ("lowrank_linear",)),
    "reconstruct": Place("reconstruct_tile", ("reconstruct",)),
    "batched_lowrank_linear": Place("batched_config", ("batched_lowrank_linear",)),
    "weight_distance": Place("weight_distance_config", ("weight_distance_records", "weight_distance_product")),
    "gated_query": Place("gated_query_config", ("gated_query",)),
}
ALONE = "tile"  # the name of a tile that is chosen without a record
SIZES = {"rows": (8, 256), "columns": (16, 256), "depth": (16, 128), "warps": (2, 8), "stages": (1, 5)}
GAIN = 0.98  # of the time: a candidate has to save more than the clock's own spread


def cases_of(given: Sequence[cases.Case]) -> list[cases.Case]:
    """The first case of each kind: others that have its kernels share its tiles."""
    kinds: dict[tuple, cases.Case] = {}
    for case in given:
        kinds.setdefault((case.dtype, getattr(case, "core", ""), getattr(case, "mode", "")), case)
    return list(kinds.values())


def neighbours(tile: Tile) -> list[Tile]:
    """Tiles with one size doubled or halved, one stage more or less; a depth of 0 means that nothing loops."""
    found = []
    for name, (least, most) in SIZES.items():
        value = getattr(tile, name)
        steps = (value - 1, value + 1) if name == "stages" else (value // 2, value * 2)
        found += [replace(tile, **{name: each}) for each in steps if value and least <= each <= most]
    return found


@contextmanager
def patched(op: str, tiles: dict[str, Tile]) -> Iterator[None]:
    """These kernels run with these tiles, all others with their own."""

    def choosing(original: Callable[..., Any]) -> Callable[..., Any]:
        def choose(*args: Any, **kwargs: Any) -> Any:
            chosen = original(*args, **kwargs)
            return tiles.get(ALONE, chosen) if isinstance(chosen, Tile) else replace(chosen, **tiles)

        return choose

    with _replaced(PLACES[op], choosing):
        yield


def used(op: str, step: Callable[[], object]) -> dict[str, Tile]:
    """The tiles that were chosen and then launched, by kernel."""
    found: dict[str, Tile] = {}

    def choosing(original: Callable[..., Any]) -> Callable[..., Any]:
        def choose(*args: Any, **kwargs: Any) -> Any:
            chosen = original(*args, **kwargs)
            tiles = {ALONE: chosen} if isinstance(chosen, Tile) else vars(chosen)
            found.update({name: tile for name, tile in tiles.items() if isinstance(tile, Tile)})
            return chosen

        return choose

    with _replaced(PLACES[op], choosing), record_launches() as launches:
        step()
    return {name: tile for name, tile in found.items() if any(launch.tile is tile for launch in launches)}


@contextmanager
def _replaced(place: Place, choosing: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    with ExitStack() as patches:
        for name in place.modules:
            module = importlib.import_module(f"peft_kernels.triton_kernels.{name}")
            choose = choosing(getattr(module, place.function))
            patches.enter_context(mock.patch.object(module, place.function, choose))
        yield


def search(bench: runner.Bench, case: cases.Case, device: torch.device, limit: int | None = None) -> Iterator[dict]:
    """A record for each kernel of the Triton provider.

    limit: candidates of each kernel;  ms: of the whole operation, with the better tiles of the kernels before
    """
    name = next(name for name, each in bench.providers.items() if each.backend == "triton")
    problem, on_cpu = runner.pose(bench, case, device), device.type == "cpu"
    best = _time(bench, name, problem, on_cpu)
    if best is None:
        raise RuntimeError(f"{name} does not run {bench.op} {case.title}")
    better: dict[str, Tile] = {}
    for kernel, began in used(bench.op, lambda: runner.build(bench, name, problem)).items():
        before, tile, tried, queue = best, began, {began: best}, neighbours(began)
        while queue and (limit is None or len(tried) <= limit):
            candidate = queue.pop(0)
            if candidate in tried:
                continue
            with patched(bench.op, {**better, kernel: candidate}):
                tried[candidate] = time = _time(bench, name, problem, on_cpu)
            if time is not None and time < GAIN * best:
                best, tile, queue = time, candidate, neighbours(candidate)
                better[kernel] = tile
        yield {
            **{"op": bench.op, "case": case.title, "dtype": case.dtype, "provider": name, "kernel": kernel},
            **{"from": repr(began), "to": repr(tile), "ms_from": before, "ms_to": best, "tried": len(tried) - 1},
        }


def _time(bench: runner.Bench, name: str, problem: runner.Problem, on_cpu: bool) -> float | None:
    """Milliseconds; None for what does not compile, does not fit, or computes something else."""
    try:
        built = runner.build(bench, name, problem)
        if isinstance(built, str):
            return None

        def step(index: int) -> dict:
            return runner.results(built, problem.tensors.input, problem.case.backward)

        if on_cpu:
            return timing.time_on_cpu({"": lambda: step(0)}, rounds=1)[""].median * 1e3
        return timing.time_in_graph(step, 1).median * 1e3
    except Exception as error:  # of Triton, which has many kinds for a tile that cannot be
        if isinstance(error, torch.AcceleratorError):
            raise  # nothing runs on this GPU any more in this process
        return None
