"""The search for tiles: each kernel's tile against its neighbours, one size doubled or halved at a time.

A candidate is patched into the function of triton_kernels/config.py that chooses. The whole operation then runs once on
each of several sets of tensors, beyond the cache together, and its launches are recorded: the first set's results are
verified against float64, in memory that was full of NaN before. From then on the kernel's launches alone are replayed,
and with them those of other kernels that the tile changes: a tile of fewer rows makes more partial sums to add. The
best tile so far is replayed in turns with the candidate, which wins by more than both spreads; its neighbours are tried
next. At last the winner meets the tile that the search began with once more, for the record.

Nothing is written back: the winners are rows for config.py, to be looked at by a person, and compiled ahead of time for
every architecture first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from peft_kernels.triton_kernels.config import Tile

from .. import cases, runner, timing
from .replay import Recorded, Recorder, Unfit, differing

SIZES = {"rows": (8, 256), "columns": (16, 256), "depth": (16, 128), "warps": (2, 8), "stages": (1, 5)}


# ---- what to search -------------------------------------------------------------------------------------------------


def cases_of(given: Sequence[cases.Case]) -> list[cases.Case]:
    """The first case of each kind: others that have its kernels share its tiles. Width 768 and dropout come first."""
    kinds: dict[tuple, cases.Case] = {}
    for case in given:
        kind = (case.dtype, getattr(case, "core", ""), getattr(case, "mode", ""), _dropout(case), _wide(case))
        kinds.setdefault(kind, case)
    return sorted(kinds.values(), key=lambda case: (_wide(case), not _dropout(case)))


def _dropout(case: cases.Case) -> bool:
    return getattr(case, "dropout", 0) > 0


def _wide(case: cases.Case) -> bool:
    return max(getattr(case, name, 0) for name in ("K", "N", "columns", "width", "D")) > 768


def neighbours(tile: Tile) -> list[Tile]:
    """Tiles with one size doubled or halved, one stage more or less; a depth of 0 means that nothing loops."""
    found = []
    for name, (least, most) in SIZES.items():
        value = getattr(tile, name)
        steps = (value - 1, value + 1) if name == "stages" else (value // 2, value * 2)
        found += [replace(tile, **{name: each}) for each in steps if value and least <= each <= most]
    return found


# ---- the search -----------------------------------------------------------------------------------------------------


def faster(new: timing.Times, old: timing.Times) -> bool:
    return old.median - new.median > old.spread + new.spread


def search(bench: runner.Bench, case: cases.Case, device: torch.device, limit: int | None = None) -> Iterator[dict]:
    """A record for each kernel of the Triton provider, with the better tiles of the kernels before it.

    limit: candidates of each kernel
    us_from, us_to: of the kernel's launches in one run of the operation, and of those that the tile changes
    left_out: why, by candidate. One that faults the device ends the search, after a record without times.
    """
    recorder = Recorder(bench, case, device)
    tiles = recorder.tiles()
    best = recorder.record(tiles)
    for kernel, began in list(tiles.items()):
        record = {"op": bench.op, "case": case.title, "dtype": case.dtype, "provider": recorder.name, "kernel": kernel}
        record |= {"from": repr(began), "to": repr(began), "us_from": None, "us_to": None, "spread_us": None}
        record |= {"tried": 0, "left_out": {}}
        first, tile, tried, queue = best, began, {began}, neighbours(began)
        recorder.compile(tiles, kernel, queue[:limit])
        while queue and (limit is None or record["tried"] < limit):
            candidate = queue.pop(0)
            if candidate in tried:
                continue
            tried.add(candidate)
            record["tried"] += 1
            try:
                found = recorder.record({**tiles, kernel: candidate})
                won = faster(*_compared(recorder, found, best))
            except Unfit as why:
                record["left_out"][repr(candidate)] = str(why)
            except Exception:
                if why := recorder.fault():
                    record["left_out"][repr(candidate)] = f"faulted the device: {why}"
                    yield record
                raise
            else:
                if won:
                    best, tile, queue = found, candidate, [each for each in neighbours(candidate) if each not in tried]
                    recorder.compile(tiles, kernel, queue if limit is None else queue[: limit - record["tried"]])
        if best is first:
            (old,) = (new,) = recorder.times([[each for each in run.launches if each.tile is began] for run in first])
        else:
            new, old = _compared(recorder, best, first)
        if faster(new, old):
            record["to"], tiles[kernel] = repr(tile), tile
        else:
            new, best = old, first
        us = {"us_from": old.median, "us_to": new.median, "spread_us": old.spread + new.spread}
        yield record | {name: 1e6 * seconds for name, seconds in us.items()}


def _compared(
    recorder: Recorder, found: Sequence[Recorded], best: Sequence[Recorded]
) -> tuple[timing.Times, timing.Times]:
    """The times of a candidate and of what it is to beat. Raises Unfit for one that spills more."""
    new, old = differing(found, best), differing(best, found)
    if (spilled := recorder.spills(new)) > recorder.spills(old):
        raise Unfit(f"spills {spilled} registers")
    return tuple(recorder.times(new, old))
