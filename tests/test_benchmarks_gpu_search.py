"""The search for tiles of `python -m peft_kernels.benchmarks.gpu`: each kernel's against its neighbours."""

import pytest
import torch

from peft_kernels.benchmarks import runner
from peft_kernels.benchmarks.__main__ import BENCHES
from peft_kernels.benchmarks.gpu import search as gpu_search
from peft_kernels.benchmarks.gpu import work as gpu_work
from peft_kernels.triton_kernels.config import Tile

CPU = torch.device("cpu")


def test_neighbours_differ_by_one_step_and_stay_in_range():
    tile = Tile(64, 256, warps=8, stages=1)
    found = gpu_search.neighbours(tile)
    changed = [{name for name in vars(tile) if getattr(tile, name) != getattr(each, name)} for each in found]
    assert all(len(names) == 1 for names in changed) and not any(each.depth for each in found)
    assert {(each.rows, each.columns, each.warps, each.stages) for each in found} == {
        (32, 256, 8, 1),
        (128, 256, 8, 1),
        (64, 128, 8, 1),
        (64, 256, 4, 1),
        (64, 256, 8, 2),
    }


def small(op):
    (bench,) = (each for each in BENCHES if each.op == op)
    return bench, bench.shaped(gpu_work.SMALL[op], "float32")[0]


def test_search_climbs_to_the_fastest_tile(monkeypatch):
    """Time is read off the tiles that are in force: least at 16 rows of shrink and 4 warps of expand, together."""
    bench, case = small("lowrank_linear")
    from peft_kernels.triton_kernels import config, lowrank_linear

    def clock(*ignored):
        shape = config.LowRankShape(24, 16, 40, 4)
        tiles = lowrank_linear.lowrank_linear_config(shape, torch.float32, 90)
        if tiles.shrink.rows == 16 and tiles.shrink.stages != 3:
            return None  # does not run
        return 1.0 + abs(tiles.shrink.rows - 16) + abs(tiles.expand.warps - 4) + abs(tiles.up_bwd.columns - 128)

    monkeypatch.setattr(gpu_search, "_time", clock)
    records = {record["kernel"]: record for record in gpu_search.search(bench, case, CPU)}
    assert {"shrink", "expand", "up_bwd", "hidden_bwd", "down_bwd"} == records.keys()  # what is launched, no more
    assert records["shrink"]["to"].startswith("Tile(rows=16, columns=64, warps=8, stages=3")
    assert "warps=4" in records["expand"]["to"] and records["up_bwd"]["to"] == records["up_bwd"]["from"]
    assert records["expand"]["ms_from"] == records["shrink"]["ms_to"] == 5.0 and records["down_bwd"]["ms_to"] == 1.0
    assert lowrank_linear.lowrank_linear_config is config.lowrank_linear_config  # put back


@pytest.mark.parametrize("op", gpu_work.SMALL)
def test_a_patched_tile_is_the_one_that_is_launched(op):
    """And gives the same result: `build` verifies it."""
    from peft_kernels.triton_kernels.common import record_launches

    bench, case = small(op)
    name = next(name for name, each in bench.providers.items() if each.backend == "triton")
    problem = runner.pose(bench, case, CPU)
    tiles = gpu_search.used(op, lambda: runner.build(bench, name, problem))
    kernel, tile = next(iter(tiles.items()))
    other = next(each for each in gpu_search.neighbours(tile) if each.warps != tile.warps)
    with gpu_search.patched(op, {kernel: other}), record_launches() as launches:
        assert not isinstance(runner.build(bench, name, problem), str)
    assert any(launch.tile is other for launch in launches) and not any(launch.tile is tile for launch in launches)


@pytest.mark.parametrize("found", ["wrong: y is off", RuntimeError("out of resource: shared memory")], ids=str)
def test_a_tile_that_computes_something_else_or_does_not_run_is_not_timed(found, monkeypatch):
    bench, case = small("reconstruct")
    problem = runner.pose(bench, case, CPU)
    assert gpu_search._time(bench, "ours, torch", problem, True) > 0

    def build(*ignored):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(runner, "build", build)
    assert gpu_search._time(bench, "ours, torch", problem, True) is None
