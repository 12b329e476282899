"""The benchmarks' own arithmetic, that nothing wrong is ever timed, and that README's tables say what was measured."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from peft_kernels.benchmarks import bench_lowrank_linear as bench
from peft_kernels.benchmarks import cases, floor, tables, timing

CPU = torch.device("cpu")
TINY = cases.Case(24, 16, 40, 4)
DROPPED = cases.Case(24, 16, 40, 4, dropout=0.25)
EAGER = ["frozen linear", "PEFT", "torch eager", "ours, torch"]

# ---- the floor and the model ----------------------------------------------------------------------------------------

SHAPES = ((8192, 4096, 4096), (9232, 768, 768), (9232, 768, 3072), (9232, 3072, 768))
# Microseconds on an H200, bfloat16, r = 16, forward and backward, worked out by hand for the design documents.
BY_HAND = {
    "two frozen GEMMs": (696, 27.6, 110, 110),
    "floor": (704, 29.3, 115, 115),
    "low-rank first": (774, 44, 147, 157),
    "PEFT": (946, 81, 263, 223),
    "PEFT, dropout": (1024, 97, 279, 289),
}
DESIGN_OF = {"two frozen GEMMs": "linear", "low-rank first": "D1", "PEFT": "eager", "PEFT, dropout": "eager"}


@pytest.mark.parametrize("row", BY_HAND)
def test_floor_and_model_agree_with_the_table_made_by_hand(row):
    for shape, expected in zip(SHAPES, BY_HAND[row]):
        if row == "floor":
            seconds = floor.total(floor.compulsory(*shape, 16, 2)).seconds(floor.H200, "bfloat16")
        else:
            forward, backward = floor.passes(DESIGN_OF[row], *shape, 16, 2, "dropout" in row)
            seconds = floor.modelled_seconds(forward + backward, floor.H200, "bfloat16")
        assert seconds * 1e6 == pytest.approx(expected, rel=0.015)


def test_floor_takes_the_slower_of_arithmetic_and_memory():
    device = floor.Device("toy", bytes_per_s=10.0, flops_per_s={"float32": 100.0}, source="")
    assert floor.Work(flops=1000, bytes=10).seconds(device, "float32") == 10
    assert floor.Work(flops=10, bytes=1000).seconds(device, "float32") == 100
    assert floor.Work(flops=10, bytes=1000).seconds(device, "bfloat16") is None


@pytest.mark.parametrize(
    "name", ["frozen linear", "torch eager"]
)  # the counter overlooks addmm_ and trips over modules
def test_flops_of_each_design_are_those_of_its_matmuls(name):
    t = cases.make_tensors(TINY, CPU)
    built = bench.PROVIDERS[name].build(TINY, t)
    with FlopCounterMode(display=False) as counter:
        bench.results(*_arguments(built, t))
    sizes = (TINY.M, TINY.K, TINY.N, TINY.R, 4)
    forward, backward = floor.passes(bench.PROVIDERS[name].design, *sizes, False)
    matmuls = sum(part.flops for part in forward + backward if part.flops > TINY.M * TINY.N)  # not additions
    assert counter.get_total_flops() == matmuls
    rank = 0 if name == "frozen linear" else TINY.R
    assert counter.get_total_flops() == floor.total(floor.compulsory(*sizes[:3], rank, 4)).flops


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(("design", "gemms"), [("D1", 2), ("D3", 1)])
def test_launches_of_the_kernel_designs(design, gemms, dropout):
    from peft_kernels.triton_kernels import lowrank_linear as kernels
    from peft_kernels.triton_kernels.common import record_launches

    t = [tensor.detach() for tensor in cases.make_tensors(TINY, CPU)]
    x, weight, bias, down, up, dy = t
    rng, p = (torch.zeros(2, dtype=torch.int64), 0.25) if dropout else (None, 0.0)
    with record_launches(run=False) as launches:
        _, z = kernels.lowrank_linear_fwd(x, weight, bias, down, up, None, 2.0, None, rng, p, "input", design)
        needs = (True, True, True, False, False)
        kernels.lowrank_linear_bwd(dy, x, weight, down, up, None, 2.0, z, rng, p, "input", needs, design)
    forward, backward = floor.passes(design, TINY.M, TINY.K, TINY.N, TINY.R, 4, dropout)
    assert len(launches) + gemms + dropout == len(forward + backward)  # drawing the seed is a launch of torch


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)

    def forward(x):
        hidden = torch.tanh(x @ weight)  # saved by tanh, and twice by the product
        return hidden * hidden

    assert timing.saved_bytes(forward, x, (weight,)) == 8 * 4 * 4


# ---- verify, then time ----------------------------------------------------------------------------------------------


def _arguments(built, t):
    forward, factors = built
    return forward, t.x, factors, t.dy


def test_mask_is_recovered():
    t = cases.make_tensors(DROPPED, CPU)
    before = [tensor.clone() for tensor in t]
    forward, factors = bench.PROVIDERS["torch eager"].build(DROPPED, t)
    mask = bench.recover_mask(forward, factors, t, seed=5)
    torch.manual_seed(5)
    assert torch.equal(mask, F.dropout(torch.ones_like(t.x), DROPPED.dropout) != 0)
    assert 0 < mask.sum() < mask.numel()
    assert all(torch.equal(old, new) for old, new in zip(before, t))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EAGER)
def test_right_providers_pass(name, dtype):
    for dropout in cases.DROPOUTS:
        case = cases.Case(50, 24, 40, 4, dtype, dropout)
        t = cases.make_tensors(case, CPU)
        bench.verify(name, bench.PROVIDERS[name], case, bench.PROVIDERS[name].build(case, t), t)


def _eager_with(change):
    def build(case, t):
        def forward(x):
            dropped = F.dropout(x, case.dropout)
            hidden = {"undropped": x, "gradient of A undropped": dropped}.get(change, dropped) @ t.down.t()
            if change == "gradient of A undropped":
                hidden = hidden + (x @ t.down.t() - (x @ t.down.t()).detach())
            y = F.linear(x, t.weight, t.bias) + (1.0 if change == "no scale" else cases.SCALE) * hidden @ t.up.t()
            return {"zeros": y * 0, "nan": y * float("nan"), "one row": _without_last_row(y)}.get(change, y)

        return forward, (t.down, t.up)

    return bench.Provider(build, "eager")


def _without_last_row(y):
    return torch.cat([y[:-1], y[-1:] * 0])


@pytest.mark.parametrize("change", ["zeros", "nan", "one row", "no scale", "undropped", "gradient of A undropped"])
def test_wrong_provider_is_refused_before_anything_is_timed(change, monkeypatch):
    monkeypatch.setitem(bench.PROVIDERS, "wrong", _eager_with(change))
    monkeypatch.setattr(timing, "time_on_cpu", lambda *_: pytest.fail("timed"))
    with pytest.raises(cases.WrongResult, match=r"^wrong: "):
        bench.measure(DROPPED, CPU, ["PEFT", "wrong"], rounds=1)


def test_absent_peer_is_named(monkeypatch):
    def build(case, t):
        raise ImportError("No module named 'peer'")

    monkeypatch.setitem(bench.PROVIDERS, "peer", bench.Provider(build, None))
    record = bench.measure(TINY, CPU, ["torch eager", "peer"], rounds=1)
    assert "peer: absent: No module named 'peer'" in tables.case_table(record)
    assert [row["speed_vs_peft"] for row in record["results"]] == [None]


def test_turns_alternate():
    calls = []
    times = timing.time_on_cpu({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2, warmup=0)
    assert "".join(calls) == "abba"
    assert {len(each.samples) for each in times.values()} == {2}
    slow, fast = timing.Times.of([2.0, 40.0, 4.0]), timing.Times.of([1.0, 20.0, 1.0])
    assert timing.speed_against(fast, slow) == 2.0  # by rounds; 4.0 by medians


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "cpu.json"
    which = ["--device", "cpu", "--shape", "24,16,40,4", "--dtype", "float32", "bfloat16", "--providers", *EAGER]
    bench.main([*which, "--rounds", "2", "--save", str(path)])
    return json.loads(path.read_text())


def test_run_saves_what_tables_need(saved_run):
    assert saved_run["kind"] == "cpu" and saved_run["schema"] == 1
    assert {"python", "torch", "peft"} <= saved_run["versions"].keys()
    assert {"device", "threads", "commit", "date"} <= saved_run.keys()
    assert [(case["dtype"], case["dropout"]) for case in saved_run["cases"]] == [
        (dtype, p) for dtype in ("float32", "bfloat16") for p in (0.0, 0.1)
    ]
    for case in saved_run["cases"]:
        assert [row["provider"] for row in case["results"]] == EAGER
        assert all(row["verified"] and row["ms"] > 0 and row["percent_of_floor"] > 0 for row in case["results"])
        table = tables.case_table(case)
        assert all(name in table for name in EAGER)
        saved = {row["provider"]: row["saved_bytes"] for row in case["results"]}
        assert saved["frozen linear"] == 0
        assert saved["ours, torch"] < saved["PEFT"] or case["dropout"] == 0


# ---- README's tables ------------------------------------------------------------------------------------------------

MARKED = "# A\n<!-- status:begin -->\n<!-- status:end -->\nb\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nc\n"


def _on_gpu(run):
    run = copy.deepcopy(run)
    run.update(kind="gpu", device="NVIDIA Test", driver="1.2", threads=None)
    for case in run["cases"]:
        for row in case["results"]:
            row.update(graph_ms=row["ms"] / 2, graph_speed_vs_peft=2.0, backend=row["backend"] and "triton")
    return run


def test_without_a_gpu_result_tables_say_so_and_nothing_else(saved_run):
    text = tables.updated(MARKED, [saved_run])
    status = [line for line in text.splitlines() if line.startswith("| `")]
    assert [line.split("|")[-2].strip() for line in status if "interpreted" in line or "emulation" in line] == [
        tables.NEVER,
        tables.NEVER,
    ]
    assert f"GPU: {tables.NEVER}." in text and "old" not in text and text.endswith("\nc\n")
    assert "24 × 16 → 40" in text


def test_gpu_result_shows_for_what_it_verified(saved_run):
    text = tables.updated(MARKED, [_on_gpu(saved_run), saved_run])
    triton, cuda = (next(line for line in text.splitlines() if word in line) for word in ("interpreted", "emulation"))
    assert "NVIDIA Test" in triton and tables.NEVER not in triton
    assert tables.NEVER in cuda
    assert f"GPU: {tables.NEVER}" not in text and "2.00×" in text


def test_tables_command(saved_run, tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    tables.save(saved_run, results / "cpu-old.json")
    readme.write_text(MARKED)
    arguments = ["--readme", str(readme), "--results", str(results)]
    assert tables.main([*arguments, "--check"]) == 1 and readme.read_text() == MARKED
    assert tables.main(arguments) == 0 and tables.main([*arguments, "--check"]) == 0
    tables.save(_on_gpu(saved_run), results / "gpu.json")
    assert tables.main([*arguments, "--check"]) == 1
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="status:begin"):
        tables.main(arguments)


def test_later_run_of_a_device_replaces_the_earlier(saved_run, tmp_path):
    for name, date in (("a", "2026-02-01"), ("b", "2026-01-01")):
        tables.save({**saved_run, "date": date}, tmp_path / f"{name}.json")
    assert [run["date"] for run in tables.load(tmp_path)] == ["2026-02-01"]


def test_readme_is_in_sync():
    text = tables.README.read_text() if tables.README.is_file() else MARKED
    if "<!-- status:begin -->" in text and text != MARKED:
        assert tables.updated(text, tables.load()) == text, "run `python -m peft_kernels.benchmarks.tables`"


def test_committed_results_name_no_host_and_no_path():
    for path in Path(tables.RESULTS).glob("*.json"):
        run = json.loads(path.read_text())
        assert {"kind", "device", "versions", "commit", "date", "cases"} <= run.keys(), path.name
        assert not re.search(r'"[^"]*(?:/\w+){2}', path.read_text()), path.name
