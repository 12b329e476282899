"""The search for tiles: launches alone are replayed, a clock decides, and what is wrong or does not run is refused."""

import dataclasses

import pytest
import torch

from peft_kernels.benchmarks import bench_lowrank_linear, runner, timing
from peft_kernels.benchmarks.__main__ import BENCHES
from peft_kernels.benchmarks.gpu import replay
from peft_kernels.benchmarks.gpu import search as gpu_search
from peft_kernels.benchmarks.gpu import work as gpu_work
from peft_kernels.triton_kernels import reconstruct
from peft_kernels.triton_kernels.common import record_launches
from peft_kernels.triton_kernels.config import Tile, reconstruct_tile

CPU = torch.device("cpu")


def small(op):
    (bench,) = (each for each in BENCHES if each.op == op)
    return bench, bench.shaped(gpu_work.SMALL[op], "float32")[0]


def only_recorded(recorder, tiles):
    """Launches as they would be, none of which is made."""
    with replay.patched(recorder.bench.op, tiles), record_launches(run=False) as launches:
        problem = recorder.problems[0]
        built = recorder.bench.providers[recorder.name].build(problem.case, problem.tensors)
        runner.results(built, problem.tensors.input, problem.case.backward)
    return [replay.Recorded(launches, [])]


# ---- what is searched ------------------------------------------------------------------------------------------------


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


def test_width_768_and_dropout_come_first():
    bench = bench_lowrank_linear.BENCH
    found = gpu_search.cases_of(bench.cases(False, ["bfloat16"]))
    assert [(case.K, case.N, case.dropout) for case in found] == [
        (768, 768, 0.1),
        (768, 768, 0.0),
        (768, 2304, 0.1),
        (768, 2304, 0.0),
    ]
    for bench in BENCHES:
        kinds = gpu_search.cases_of(bench.cases(False, ["bfloat16"]))
        wide = [max(getattr(case, name, 0) for name in ("K", "N", "columns", "width", "D")) > 768 for case in kinds]
        assert wide == sorted(wide) and len(set(kinds)) == len(kinds)


@pytest.mark.parametrize("op", gpu_work.SMALL)
def test_a_patched_tile_is_the_one_that_is_launched(op):
    """And gives the same result: `build` verifies it."""
    bench, case = small(op)
    recorder = replay.Recorder(bench, case, CPU)
    tiles = recorder.tiles()
    kernel, tile = next(iter(tiles.items()))
    other = next(each for each in gpu_search.neighbours(tile) if each.warps != tile.warps)
    with replay.patched(op, {**tiles, kernel: other}), record_launches() as launches:
        assert not isinstance(recorder.build(), str)
    assert any(launch.tile is other for launch in launches) and not any(launch.tile is tile for launch in launches)
    assert all(any(launch.tile is each for launch in launches) for name, each in tiles.items() if name != kernel)


# ---- the search ------------------------------------------------------------------------------------------------------


def by_tiles(cost):
    """A clock that reads the time off the tiles of the launches that are replayed."""

    def times(recorder, *sets):
        return [timing.Times.of([sum(cost(launch) for run in runs for launch in run)] * 3) for runs in sets]

    return times


def test_search_climbs_to_the_fastest_tile(monkeypatch):
    """Least at 16 rows of shrink, 4 warps of expand and the widest up_bwd."""
    bench, case = small("lowrank_linear")

    def cost(launch):
        name, tile = launch.kernel.__name__, launch.tile
        if "shrink" in name:
            return 1.0 + abs(tile.rows - 16) + (tile.stages != 3)
        if "expand" in name:
            return 1.0 + abs(tile.warps - 4)
        return 1.0 + ("up_bwd" in name) * (256 - tile.columns)

    monkeypatch.setattr(replay.Recorder, "record", only_recorded)
    monkeypatch.setattr(replay.Recorder, "times", by_tiles(cost))
    records = {record["kernel"]: record for record in gpu_search.search(bench, case, CPU)}
    assert {"shrink", "expand", "up_bwd", "hidden_bwd", "down_bwd"} == records.keys()  # what is launched, no more
    assert records["shrink"]["to"].startswith("Tile(rows=16, columns=64, warps=8, stages=3")
    assert "warps=4" in records["expand"]["to"] and "columns=256" in records["up_bwd"]["to"]
    assert records["down_bwd"]["to"] == records["down_bwd"]["from"]
    assert (records["shrink"]["us_from"], records["shrink"]["us_to"]) == (17e6, 1e6)
    assert records["down_bwd"]["us_from"] == records["down_bwd"]["us_to"] == 1e6  # its launch alone
    assert all(record["tried"] >= 5 and record["left_out"] == {} for record in records.values())
    limited = list(gpu_search.search(bench, case, CPU, limit=2))
    assert [record["tried"] for record in limited] == [2] * 5


def test_a_gain_within_the_spread_is_none(monkeypatch):
    bench, case = small("reconstruct")
    began = reconstruct_tile(case.R, case.core, torch.float32, False, 90)

    def times(recorder, *sets, spread=0.2):
        own = [any(launch.tile == began for launch in runs[0]) for runs in sets]
        return [timing.Times(1.0 if first else 0.7, spread, []) for first in own]

    monkeypatch.setattr(replay.Recorder, "record", only_recorded)
    monkeypatch.setattr(replay.Recorder, "times", times)
    (record,) = gpu_search.search(bench, case, CPU)
    assert record["to"] == record["from"] == repr(began) and record["spread_us"] == pytest.approx(4e5)
    monkeypatch.setattr(replay.Recorder, "times", lambda *given: times(*given, spread=0.1))
    (record,) = gpu_search.search(bench, case, CPU)
    assert record["to"] != record["from"] and record["us_to"] < record["us_from"]


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("short", "wrong: y is off by nan of its largest value"),
        ("raises", "OutOfResources: out of resource: shared memory"),
        ("spills", "spills 7 registers"),
    ],
)
def test_what_is_wrong_or_does_not_fit_is_left_out_however_fast(broken, told, monkeypatch):
    """In a record that names the candidate and says why; the tile in use stays."""
    bench, case = small("reconstruct")
    launch = reconstruct.launch

    def breaking(kernel, grid, args, constants, tile):
        if tile.rows == 16 and broken == "raises":
            raise OutOfResources("out of resource: shared memory\nReducing block sizes may help")
        launch(kernel, (grid[0] - (tile.rows == 16 and broken == "short"),), args, constants, tile)

    def spills(recorder, runs):
        return 7 * (broken == "spills" and any(launch.tile.rows == 16 for launch in runs[0]))

    monkeypatch.setattr(reconstruct, "launch", breaking)
    monkeypatch.setattr(gpu_search, "SIZES", {"rows": (16, 64)})
    monkeypatch.setattr(replay.Recorder, "spills", spills)
    monkeypatch.setattr(replay.Recorder, "times", by_tiles(lambda launch: launch.tile.rows))
    (record,) = gpu_search.search(bench, case, CPU)
    assert record["from"] == record["to"] and record["tried"] == 2
    ((tile, why),) = record["left_out"].items()
    assert tile.startswith("Tile(rows=16") and why.startswith(told) and "\n" not in why


class OutOfResources(Exception):
    pass


def test_a_tile_that_faults_the_device_ends_the_search_after_its_record(monkeypatch):
    bench, case = small("reconstruct")
    faults = []

    def times(recorder, *sets):
        faults.append("CUDA error: an illegal memory access was encountered")
        raise torch.AcceleratorError(faults[0])

    monkeypatch.setattr(replay.Recorder, "record", only_recorded)
    monkeypatch.setattr(replay.Recorder, "times", times)
    monkeypatch.setattr(replay.Recorder, "fault", lambda recorder: faults and faults[0])
    records = gpu_search.search(bench, case, CPU)
    record = next(records)
    assert list(record["left_out"].values()) == [f"faulted the device: {faults[0]}"] and record["us_to"] is None
    with pytest.raises(torch.AcceleratorError):
        next(records)


# ---- launches, recorded and replayed ---------------------------------------------------------------------------------


def test_a_replay_is_of_the_launch_alone_and_gives_the_same():
    bench, case = small("lowrank_linear")
    recorder = replay.Recorder(bench, case, CPU)
    tiles = recorder.tiles()
    (run,) = recorder.record(tiles)
    (expand,) = [launch for launch in run.launches if launch.tile is tiles["expand"]]
    y, others = expand.args[3], [t for launch in run.launches for t in launch.args if isinstance(t, torch.Tensor)]
    before = {id(t): t.clone() for t in others if t is not y}
    first = y.fill_(float("nan")).clone()
    (time,) = recorder.times([[expand]])
    assert time.median > 0 and not y.isnan().any() and first.isnan().all()
    assert all(torch.equal(before[id(t)], t) for t in others if t is not y)


def test_launches_whose_work_a_tile_changes_are_replayed_with_it():
    """Half as many rows make twice as many partial sums for the kernel that adds them."""
    bench = bench_lowrank_linear.BENCH
    recorder = replay.Recorder(bench, bench_lowrank_linear.Case(3000, 16, 16), CPU)
    taller = Tile(64, 128)
    one, other = (only_recorded(recorder, {"up_bwd": tile}) for tile in (Tile(32, 128), taller))
    for runs, others in ((one, other), (other, one)):
        (changed,) = replay.differing(runs, others)
        assert [launch.kernel.__name__ for launch in changed] == ["_up_bwd_kernel", "_sum_kernel"]
    assert replay.differing(one, one) == [[]] and len(one[0].launches) > 4


def test_what_is_only_reached_by_addresses_is_held():
    """Tables in device memory hold addresses: a tensor that nobody keeps would be replaced before a replay writes."""
    bench, case = small("weight_distance")
    problem = runner.pose(bench, case, CPU)
    with replay.Holding() as holding, record_launches(run=False) as launches:
        built = bench.providers["ours, triton"].build(problem.case, problem.tensors)
        runner.results(built, problem.tensors.input, problem.case.backward)
    del built
    places = [t.untyped_storage() for t in (*holding.held, *problem.tensors) if t is not None]
    ends = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in places]
    tables = [arg for launch in launches for arg in launch.args if getattr(arg, "dtype", None) == torch.int64]
    addresses = {number for table in tables for number in table.flatten().tolist() if number > 2**32}
    assert len(addresses) > 50
    assert all(any(begin <= address < end for begin, end in ends) for address in addresses)


def test_new_memory_is_full_of_nan():
    torch.use_deterministic_algorithms(False)
    with replay.Holding() as holding:
        made = torch.empty(3), torch.ones(2).new_empty(4), torch.empty_like(torch.ones(5)), torch.empty(2, dtype=int)
        right = torch.ones(2) + 1
    assert all(t.isnan().all() for t in made[:3]) and torch.equal(right, torch.full((2,), 2.0))
    assert all(any(t is each for each in holding.held) for t in (*made, right))


class _Gpu:
    type = "cuda"


def test_on_a_gpu_sets_take_turns_in_graphs(monkeypatch):
    """As many sets as no cache holds; each graph has one launch of every set, and a time is that of one."""
    bench, case = small("reconstruct")
    bench = dataclasses.replace(bench, tensors=lambda case, device: bench_tensors(case, CPU))
    bench_tensors, graphs = small("reconstruct")[0].tensors, []

    def in_graphs(steps):
        graphs.append({name: len(step()) for name, step in steps.items()})
        return {name: timing.Times.of([6.0]) for name in steps}

    monkeypatch.setattr(timing, "copies_beyond_cache", lambda nbytes, device: 3 if nbytes else 0)
    monkeypatch.setattr(timing, "time_in_graphs", in_graphs)
    monkeypatch.setattr(timing, "fault", lambda device: None)
    recorder = replay.Recorder(bench, case, _Gpu())
    runs = recorder.record(recorder.tiles())
    places = {launch.args[4].data_ptr() for run in runs for launch in run.launches}
    assert len(runs) == 3 == len(places)
    times = recorder.times(*[[run.launches for run in runs]] * 2)
    assert graphs == [{"0": 3, "1": 3}] and [time.median for time in times] == [2.0, 2.0]
