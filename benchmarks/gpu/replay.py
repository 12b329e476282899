"""Launches of an operation with other tiles: recorded in a run that is verified, then replayed alone."""

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import AsyncCompileMode

from peft_kernels.triton_kernels.common import Launch, record_launches
from peft_kernels.triton_kernels.config import Tile

from .. import cases, runner, timing
from ..kept import afresh


class Unfit(Exception):
    """A candidate is left out; the message says why."""


# ---- other tiles ----------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where an operation's tiles are chosen: a function, and the modules of triton_kernels that call it by name."""

    function: str
    modules: tuple[str, ...]


PLACES = {
    "lowrank_linear": Place("lowrank_linear_config", ("lowrank_linear",)),
    "lowrank_projections": Place("projections_config", ("lowrank_projections",)),
    "reconstruct": Place("reconstruct_tile", ("reconstruct",)),
    "batched_lowrank_linear": Place("batched_config", ("batched_lowrank_linear",)),
    "weight_distance": Place("weight_distance_config", ("weight_distance",)),
    "gated_query": Place("gated_query_config", ("gated_query",)),
}
ALONE = "tile"  # the name of a tile that is chosen without a record


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
    """The tiles that were chosen and then launched, by kernel: each a copy that no other kernel has."""
    copies: dict[tuple[str, Tile], Tile] = {}

    def choosing(original: Callable[..., Any]) -> Callable[..., Any]:
        def choose(*args: Any, **kwargs: Any) -> Any:
            chosen = original(*args, **kwargs)
            named = {ALONE: chosen} if isinstance(chosen, Tile) else vars(chosen)
            tiles = {name: tile for name, tile in named.items() if isinstance(tile, Tile)}
            own = {name: copies.setdefault((name, tile), replace(tile)) for name, tile in tiles.items()}
            return own[ALONE] if isinstance(chosen, Tile) else replace(chosen, **own)

        return choose

    with _replaced(PLACES[op], choosing), record_launches() as launches:
        step()
    return {name: tile for (name, _), tile in copies.items() if any(launch.tile is tile for launch in launches)}


@contextmanager
def _replaced(place: Place, choosing: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    with ExitStack() as patches:
        patches.enter_context(afresh())
        for name in place.modules:
            module = importlib.import_module(f"peft_kernels.triton_kernels.{name}")
            choose = choosing(getattr(module, place.function))
            patches.enter_context(mock.patch.object(module, place.function, choose))
        yield


# ---- launches, recorded and replayed --------------------------------------------------------------------------------


class Holding(TorchDispatchMode):
    """Keeps every tensor that is made, as kernels read some by addresses in tables, and fills new memory with NaN."""

    def __init__(self):
        super().__init__()
        self.held: list[Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        for tensor in tensors:
            if "empty" in function.__name__ and tensor.is_floating_point():
                tensor.fill_(float("nan"))
        self.held += tensors
        return result


class Recorded(NamedTuple):
    """One run of the operation."""

    launches: list[Launch]
    held: list[Tensor]


class Recorder:
    """An operation's Triton provider on one case, and sets of tensors for it that no cache holds together."""

    def __init__(self, bench: runner.Bench, case: cases.Case, device: torch.device):
        self.bench, self.device = bench, device
        self.name = next(name for name, each in bench.providers.items() if each.backend == "triton")
        self.problems = [runner.pose(bench, case, device)]
        if device.type == "cuda":
            copies = timing.copies_beyond_cache(runner.compulsory_bytes(bench, self.problems[0]), device)
            self.problems += [runner.pose(bench, case, device) for _ in range(copies - 1)]

    def tiles(self) -> dict[str, Tile]:
        """Records every kernel that is launched. Raises RuntimeError where the provider does not run."""
        found = []
        tiles = used(self.bench.op, lambda: found.append(self.build()))
        if isinstance(found[0], str):
            raise RuntimeError(f"{self.name} does not run {self.bench.op}: {found[0]}")
        return tiles

    def build(self) -> runner.Built | str:
        """Verified on the first set, or why not."""
        try:
            with Holding():
                return runner.build(self.bench, self.name, self.problems[0])
        except Exception as error:  # Triton has many kinds for a tile that cannot be
            if self.fault():
                raise
            return f"{type(error).__name__}: {error}".partition("\n")[0]

    def record(self, tiles: dict[str, Tile]) -> list[Recorded]:
        """A run on each set. Raises Unfit for tiles with which the operation does not run, or is wrong."""
        provider, recorded = self.bench.providers[self.name], []
        with patched(self.bench.op, tiles):
            if isinstance(found := self.build(), str):
                raise Unfit(found)
            for problem in self.problems:
                with Holding() as holding, record_launches() as launches:
                    built = provider.build(problem.case, problem.tensors)
                    runner.results(built, problem.tensors.input, problem.case.backward)
                recorded.append(Recorded(launches, holding.held))
        return recorded

    def times(self, *sets: Sequence[Sequence[Launch]]) -> list[timing.Times]:
        """Seconds that the launches of one run take, for each set of runs, replayed on one set after the other."""
        flat = [[launch for run in runs for launch in run] for runs in sets]
        steps = {str(i): lambda each=each: [launch.run() for launch in each] for i, each in enumerate(flat)}
        on_gpu = self.device.type == "cuda"
        times = timing.time_in_graphs(steps) if on_gpu else timing.time_on_cpu(steps, rounds=1, warmup=0)
        return [timing.Times.of([s / len(runs) for s in each.samples]) for runs, each in zip(sets, times.values())]

    def compile(self, tiles: dict[str, Tile], kernel: str, candidates: Sequence[Tile]) -> None:
        """Ahead, all at once, in threads: each takes about a second. What fails will say so when its turn comes."""
        if self.device.type != "cuda":
            return
        provider, problem = self.bench.providers[self.name], self.problems[0]
        with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for tile in candidates:
                with suppress(Exception), patched(self.bench.op, {**tiles, kernel: tile}):
                    with record_launches(run=False) as launches:
                        built = provider.build(problem.case, problem.tensors)
                        runner.results(built, problem.tensors.input, problem.case.backward)
                    for launch in launches:
                        if launch.tile is tile:
                            launch.compile()

    def spills(self, runs: Sequence[Sequence[Launch]]) -> int:
        """Registers that some launch of the first run keeps in memory; the interpreter has none."""
        return max((launch.run().n_spills for launch in runs[0] if self.device.type == "cuda"), default=0)

    def fault(self) -> str | None:
        return timing.fault(self.device) if self.device.type == "cuda" else None


def differing(runs: Sequence[Recorded], others: Sequence[Recorded]) -> list[list[Launch]]:
    """The launches of each run that the other has not: of a tile's own kernel, and of those whose work it changes."""
    found = []
    for run, other in zip(runs, others):
        signatures, left = [_signature(launch) for launch in other.launches], []
        for launch in run.launches:
            if (signature := _signature(launch)) in signatures:
                signatures.remove(signature)
            else:
                left.append(launch)
        found.append(left)
    return found


def _signature(launch: Launch) -> str:
    shapes = [tuple(arg.shape) if isinstance(arg, Tensor) else arg for arg in launch.args]
    return repr((launch.kernel, launch.grid, shapes, launch.constants, launch.tile))
