"""What the steps of `python -m peft_kernels.benchmarks.gpu` make of what their processes find."""

import time
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_kernels.benchmarks import runner
from peft_kernels.benchmarks.__main__ import BENCHES
from peft_kernels.benchmarks.gpu import speed, truth, tuning, variants
from peft_kernels.benchmarks.gpu import work as gpu_work
from peft_kernels.benchmarks.gpu.launches import counted
from peft_kernels.benchmarks.gpu.process import OPS, NotHere, Run
from peft_kernels.cuda_kernels import common as cuda_common
from peft_kernels.cuda_kernels import gated_query as cuda_gated_query
from peft_kernels.triton_kernels import config
from peft_kernels.triton_kernels.common import record_launches
from peft_kernels.triton_kernels.config import Tile

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path):
    """A run on a GPU whose processes find nothing until a test says what."""
    content = {"device": "none", "date": "2026-01-01", "cases": [], "numerics": []}
    return Run(tmp_path, "truth", dry=False, content=content, deadline=time.monotonic() + 100)


def finds(monkeypatch, answer):
    """What `work` returns is up to a function of its arguments; a list of all calls."""
    calls = []

    def work(run, kind, key, *options, under=(), **environment):
        calls.append((kind, options, under, environment, run.left))
        status, records, text = answer(kind, options, under)
        for record in records:
            if key:
                run.keep(key, record)
        return status, records, text

    monkeypatch.setattr(Run, "work", work)
    return calls


def option(options, name):
    return options[options.index(name) + 1]


# ---- truth -----------------------------------------------------------------------------------------------------------


def test_a_process_for_each_operation_and_backend_triton_first(run, monkeypatch):
    def answer(kind, options, under):
        op, backend = option(options, "--op"), option(options, "--with")
        status = 1 if (op, backend) == ("reconstruct", "cuda") else 0  # a fault
        return status, [] if status else [{"op": op, "backend": backend, "ratio": 1.0}], ""

    calls = finds(monkeypatch, answer)
    ok, told = truth.numerics(run)
    assert not ok and "nothing of reconstruct cuda" in told and "cuda, reconstruct; exit status 1" in told
    asked = [(option(options, "--with"), option(options, "--op")) for _, options, *_ in calls]
    assert [backend for backend, _ in asked] == [b for b in ("triton", "cuda", "torch") for _ in OPS]
    assert len(set(asked)) == 3 * len(OPS) == len(run.content["numerics"]) + 1
    assert option(calls[0][1], "--sizes") == "small" and "usual" in calls[0][1]


@pytest.mark.parametrize("wrong", [True, False])
def test_a_wrong_number_is_a_finding(wrong):
    records = [{"op": op, "backend": "torch", "ratio": 1.5} for op in OPS]
    records += [{"op": "reconstruct", "case": "c", "backend": "torch", "wrong": "y is off"}] * wrong
    ok, told = truth.told_by_numerics(records, ["torch"], "")
    assert ok != wrong and ("y is off" in told) == wrong and "torch 1.50×" in told


def passed(name, *launches):
    return {"test": name, "outcome": "passed", "reason": None, "launches": dict.fromkeys(launches, 2)}


def skipped(reason):
    return {"test": "s", "outcome": "skipped", "reason": reason, "launches": {}}


def told_by(records, status=0, backends=("triton", "cuda")):
    found = {"counts": {}, "ran": {}, "left_out": {}, "skipped": {}, "failed": [], "elsewhere": [], "nowhere": []}
    found["other_files"] = 7
    for record in records:
        truth.add_test(found, record, "cuda")
    return *truth.told_by_tests(found, status, backends), found


BOTH = [passed("a", "triton on cuda"), passed("b", "cuda on cuda")]


def test_tests_are_counted_by_where_they_ran_and_why_they_did_not():
    more = [{"left_out": {"mutants": 30, "torch's own kernels": 12}}, skipped("fused takes ranks up to 32"), *BOTH]
    ok, told, found = told_by([*more, skipped("fused takes ranks up to 32")])
    assert ok and told.splitlines()[0] == (
        "2 passed, 2 skipped; 1 with cuda on cuda; 1 with triton on cuda; 42 left out, and 7 files of other tests"
    )
    assert "  2 skipped: fused takes ranks up to 32" in told and "  30 left out: mutants" in told
    assert found["skipped"] == {"fused takes ranks up to 32": 2}


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([*BOTH, skipped("could not import 'peft_kernels._C': no such file")], "skipped for what this machine ought"),
        ([*BOTH, skipped("could not import 'triton': no module")], "skipped for what this machine ought"),
        ([*BOTH, skipped("needs a GPU")], "skipped for what this machine ought"),
        (BOTH[:1], "no test ran a kernel of cuda"),
        (BOTH[1:], "no test ran a kernel of triton"),
        ([*BOTH, passed("emulated", "cuda on cpu")], "ran on the wrong device: emulated"),
        ([*BOTH, passed("fell back to torch")], "passed without a kernel: fell back to torch"),
        ([*BOTH, {**passed("x", "triton on cuda"), "outcome": "failed"}], "failed: x"),
        ([], "no test ran"),
    ],
)
def test_what_did_not_run_on_the_gpu_is_a_finding(records, told):
    ok, words, _ = told_by(records, status=int("failed" in told))
    assert not ok and told in words


def test_tests_that_were_cut_short_count_as_far_as_they_came():
    ok, told, _ = told_by(BOTH, status=None)
    assert not ok and told.startswith("2 passed;") and "time was up" in told


RAN = [{"op": "reconstruct", "launches": {"cuda on cuda": 3}, "finite": True}]
CLEAN = "========= ERROR SUMMARY: 0 errors"


@pytest.mark.parametrize(
    ("status", "records", "text", "told"),
    [
        (0, RAN, CLEAN, "0 errors"),
        (0, RAN, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "0 hazards displayed"),
        (99, RAN, "========= ERROR SUMMARY: 3 errors", "exit status 99, 3 errors"),
        (1, RAN, CLEAN, "exit status 1, 0 errors"),
        (None, RAN, "", "time was up"),
        (0, [{"op": "reconstruct", "absent": "no extension"}], CLEAN, "no kernel of reconstruct ran; no extension"),
        (0, [{"op": "reconstruct", "launches": {"cuda on cpu": 3}}], CLEAN, "no kernel of reconstruct ran"),
        (0, [], CLEAN, "no kernel of reconstruct ran"),
        (0, [{**RAN[0], "finite": False}], CLEAN, "a result is not finite"),
        (0, RAN, "", "no summary"),
    ],
)
def test_reading_compute_sanitizer(status, records, text, told):
    """It has nothing to find where no kernel ran."""
    assert truth.told_by_sanitizer("reconstruct", status, records, text).startswith(told)


@pytest.mark.parametrize("bad", [None, ("memcheck", "triton"), ("racecheck", "cuda")])
def test_triton_s_kernels_are_watched_before_cuda_s(bad, run, monkeypatch):
    monkeypatch.setattr(truth.shutil, "which", lambda name: name)

    def answer(kind, options, under):
        status = 99 if (under[2], option(options, "--with")) == bad else 0
        return status, RAN, CLEAN

    calls = finds(monkeypatch, answer)
    ok, told = truth.sanitizer(run)
    assert ok == (bad is None) and ("exit status 99" in told) != ok
    turns = list(dict.fromkeys((under[2], option(options, "--with")) for _, options, under, *_ in calls))
    assert turns == [("memcheck", "triton"), ("memcheck", "cuda"), ("racecheck", "cuda"), ("racecheck", "triton")]
    assert all(option(options, "--sizes") == "loops" for _, options, *_ in calls)
    assert all(bool(environment) == (under[2] == "memcheck") for _, _, under, environment, _ in calls)


def test_the_last_races_need_time(run, monkeypatch):
    monkeypatch.setattr(truth.shutil, "which", lambda name: name)
    run.deadline = time.monotonic() + 5
    calls = finds(monkeypatch, lambda *_: (0, RAN, CLEAN))
    assert truth.sanitizer(run)[0] and len(calls) == 3 * len(OPS) and "left out" in str(run.content["sanitizer"])
    monkeypatch.setattr(truth.shutil, "which", lambda name: None)
    with pytest.raises(NotHere, match="no compute-sanitizer"):
        truth.sanitizer(run)


# ---- speed and tuning ------------------------------------------------------------------------------------------------


def test_each_operation_is_timed_in_a_process_of_its_own(run, monkeypatch):
    """A case's records are one."""

    def answer(kind, options, under):
        rows = [{"provider": name, "graph_ms": 0.002, "ms": 0.01} for name in ("PEFT", "cuda")]
        return 0, [{"op": option(options, "--op"), "title": "t", "results": [row], "absent": {}} for row in rows], ""

    calls = finds(monkeypatch, answer)
    ok, told = speed.timings(run)
    assert ok and "compiled" not in str(calls) and [option(options, "--op") for _, options, *_ in calls] == list(OPS)
    found = [[row["provider"] for row in case["results"]] for case in run.content["cases"]]
    assert found == [["PEFT", "cuda"]] * len(OPS)
    assert "PEFT 2/10, cuda 2/10" in told


@pytest.mark.parametrize("why", ["absent: no peft", "wrong: y is off"])
def test_a_wrong_provider_is_a_finding(why):
    case = {"op": "reconstruct", "title": "t", "results": [], "absent": {"PEFT": why}}
    ok, told = speed.told_by_cases([case], "")
    assert ok == why.startswith("absent") and ("reconstruct t, PEFT: wrong: y is off" in told) != ok
    assert not speed.told_by_cases([case], "; time was up")[0]


def test_reading_nsight_compute():
    heading = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    rows = [
        '"0","7","up_bwd","gpu__time_duration.sum","ns","12,345"',
        '"0","7","up_bwd","launch__registers_per_thread","register/thread","128"',
        '"1","7","sum","gpu__time_duration.sum","us","1.5"',
        '"1","7","sum","something_else","","3"',
    ]
    found = speed.read_counters("\n".join(["==PROF== Connected", heading, *rows]))
    assert [(row["kernel"], row["ns"], row["unit"]["ns"]) for row in found] == [
        ("up_bwd", 12345.0, "ns"),
        ("sum", 1.5, "us"),
    ]
    assert found[0]["registers"] == 128 and speed.read_counters("==ERROR== no permission") == []


@pytest.mark.parametrize("absent", ["wrong: y is off", "absent: no CUDA"])
def test_a_wrong_variant_is_a_finding(absent):
    record = {"case": "c", "variant": "v", "base_us": 3.0, "variant_us": 2.0, "ratio": 1.5}
    ok, told = tuning.told_by_variants([record, {"case": "c", "variant": "w", "absent": absent}], "")
    assert ok == absent.startswith("absent") and told.startswith("1 comparisons, 1 faster") and absent in told


# ---- the work --------------------------------------------------------------------------------------------------------


def work_of(kind, *options):
    """The records of one kind of work on a CPU."""
    records = []
    given = {"ops": ["reconstruct"], "providers": ["torch"], "dtypes": ["float32"], "sizes": ["small"], "small": True}
    gpu_work.KINDS[kind](gpu_work.Work(CPU, **given | dict(options), add=records.append))
    return [record for record in records if "begun" not in record]


@pytest.mark.parametrize("absent", [{"ours, torch, in a CUDA graph": "failed"}, {"PEFT": "absent: no peft"}, {}])
def test_after_a_failed_capture_the_next_case_has_a_process_of_its_own(absent, monkeypatch):
    """On an H200 no later graph could be captured, and drawing random numbers failed."""
    measured = []
    monkeypatch.setattr(runner, "measure", lambda *_, **__: measured.append(1) or {"absent": absent})
    if "CUDA graph" in str(absent):
        with pytest.raises(SystemExit, match="not captured: ours, torch, in a CUDA graph"):
            work_of("measure", ("most", 2))
    else:
        work_of("measure", ("most", 2))
    assert len(measured) == (1 if "CUDA graph" in str(absent) else 2)


def test_a_wrong_result_is_a_record(monkeypatch):
    (bench,) = (each for each in BENCHES if each.op == "reconstruct")
    right = bench.providers["ours, torch"]

    def build(case, t):
        built = right.build(case, t)
        return built._replace(forward=lambda x: built.forward(x) * (1 + 1e-3))

    monkeypatch.setitem(bench.providers, "ours, torch", runner.Provider(build, right.design, "torch"))
    records = work_of("numerics", ("most", 2))
    assert len(records) == 2 and all("ours, torch" in record["wrong"] for record in records)


def test_errors_are_told_beside_torch_s():
    for record in work_of("numerics", ("most", 3)):
        eps = torch.finfo(torch.float32).eps
        assert record["ratio"] == pytest.approx(record["error"] / (record["torch_error"] + eps / 4)) and record["worst"]


def test_every_case_is_announced_and_the_first_can_be_named():
    records = []
    given = {"ops": ["reconstruct"], "providers": [], "dtypes": ["float32"], "sizes": ["small"], "most": 4, "first": 2}
    gpu_work.numerics(gpu_work.Work(CPU, **given, add=records.append))
    assert records == [{"begun": 2, "of": 4}, {"begun": 3, "of": 4}]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["peers"], ["frozen linear", "PEFT", "torch eager"]),
        (["triton", "compiled"], ["ours, triton passes", "ours, triton fused", "torch compiled", "PEFT compiled"]),
        (["unsloth", "PEFT"], ["PEFT", "unsloth"]),
        (["cuda"], ["ours, cuda"]),
    ],
)
def test_providers_by_backend_kind_and_name(wanted, expected):
    (bench,) = (each for each in BENCHES if each.op == "lowrank_linear")
    assert gpu_work.Work(CPU, [], wanted, [], []).wanted(bench) == expected


def test_launches_are_counted_by_backend_and_device():
    (bench,) = (each for each in BENCHES if each.op == "reconstruct")
    problem = runner.pose(bench, bench.shaped(gpu_work.SMALL["reconstruct"], "float32")[0], CPU)
    with counted() as counts:
        for name, number in (("ours, torch", {}), ("ours, triton", {"triton on cpu": 1})):
            runner.results(bench.providers[name].build(problem.case, problem.tensors), problem.tensors.input, False)
            assert dict(counts) == number
        with record_launches(run=False) as launches:
            runner.results(bench.providers[name].build(problem.case, problem.tensors), problem.tensors.input, False)
    assert len(launches) == 1 and dict(counts) == number  # what is only recorded does not run


# ---- what the sanitizer watches --------------------------------------------------------------------------------------


def test_all_rows_are_one_strip_while_a_sanitizer_watches():
    """So that the loop over rows goes round more than once, on every processor that the tiles know."""
    sizes = [(130, Tile(64, 64), 3), (520, Tile(32, 64), 6), (120, Tile(8, 64), 5)]  # rows, tile, column tiles

    def tiles(rows, tile, columns, arch=90):
        return config.strip_tiles(rows, tile, columns, arch)

    usual = [tiles(*each) for each in sizes]
    with gpu_work.one_strip():
        for (rows, tile, columns), before in zip(sizes, usual):
            assert all(tiles(rows, tile, columns, arch) * tile.rows >= rows for arch in config.PROCESSORS)
            assert config.adapter_strips(rows, 2, tile, columns, 90) == 1 and before * tile.rows < rows
        assert cuda_common.PROCESSORS == cuda_gated_query.PROCESSORS == 0  # one strip, whatever the shape
    assert [tiles(*each) for each in sizes] == usual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_watched_shapes_are_wider_than_any_tile(dtype):
    """Rows, both widths and the rank: a loop over one of them goes round more than once, the last time in part."""
    rows, inner, outer, rank = gpu_work.LOOPS["lowrank_linear"]
    tiles = config.lowrank_linear_config(config.LowRankShape(inner, outer, rank), dtype, 90)
    for tile in (tiles.shrink, tiles.expand, tiles.up_bwd, tiles.down_bwd):
        assert rows > tile.rows and rows % tile.rows and inner > tile.columns and inner % tile.columns
    assert rank > tiles.chunk_r and rank % tiles.block_r
    rows, inner, outer, count, rank, others = gpu_work.LOOPS["lowrank_projections"]
    shape = config.ProjectionsShape(inner, max(outer, others), rank, count, count, dropout=True)
    tiles = config.projections_config(shape, dtype, 90)
    for tile in (tiles.shrink, tiles.expand, tiles.up_bwd, tiles.down_bwd):
        assert rows > tile.rows and rows % tile.rows and inner > tile.columns and inner % tile.columns
        assert min(outer, others) > tile.columns / 2 and others % tile.columns
    queries = config.gated_query_config(gpu_work.LOOPS["gated_query"][2])
    assert gpu_work.LOOPS["gated_query"][1] > queries.gated_fwd.rows
    assert gpu_work.LOOPS["gated_query"][2] > queries.gated_fwd.columns > queries.additive.columns


def test_a_kernel_runs_under_the_watch_and_its_launches_are_told():
    records = work_of("check", ("providers", ["triton"]), ("most", 1))
    assert [(record["launches"], record["finite"]) for record in records] == [({"triton on cpu": 1}, True)]


# ---- prepared variants -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [v for v in variants.VARIANTS if "cuda" not in v.name], ids=lambda v: v.name)
def test_a_variant_changes_what_is_launched(variant):
    """On some shape that it is tried on. What patches nothing would tell that there is nothing to gain."""
    (bench,) = (each for each in BENCHES if each.op == "lowrank_linear")

    def launched(case, provider, patch):
        with FakeTensorMode(), patch(), record_launches(run=False) as launches:
            tensors = bench.tensors(case, CPU)
            runner.results(bench.providers[provider].build(case, tensors), tensors.input)
        return launches

    cases = [case for shape in variants.LAYERS for case in bench.shaped(shape, "bfloat16") if variant.applies(case)]
    assert not all(
        variants.alike(launched(case, variant.base, nullcontext), launched(case, variant.provider, variant.patch))
        for case in cases
    )


def test_a_variant_that_changes_nothing_is_told_so(monkeypatch):
    monkeypatch.setattr(variants, "VARIANTS", (variants.Variant("nothing"),))
    records = work_of("variants", ("ops", ["lowrank_linear"]), ("most", 1))
    assert [record["absent"] for record in records] == ["changes nothing here"]
