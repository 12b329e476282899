"""A run of every operation's benchmark, its result file, and that README's tables say what was measured."""

import copy
import json
import re
from pathlib import Path

import pytest
from benchmark_cases import TINY, tiny

from peft_kernels.benchmarks import __main__ as every
from peft_kernels.benchmarks import results, tables, terminal

# ---- a run of everything --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "cpu.json"
    which = ["--device", "cpu", "--dtype", "float32", "--rounds", "2", "--save", str(path)]
    assert every.main(which, [tiny(bench) for bench in every.BENCHES]) == 0
    return json.loads(path.read_text())


def test_every_operation_is_measured_and_has_its_columns():
    benched = {bench.op for bench in every.BENCHES}
    assert benched <= set(tables.operations()) and "_frozen" not in tables.operations()
    assert benched == set(tables.LAYOUTS) == set(TINY)
    for bench in every.BENCHES:
        assert set(tables.LAYOUTS[bench.op].versus.values()) <= bench.providers.keys()
        usual = [bench.cases(on_cpu, ["float32", "bfloat16"]) for on_cpu in (True, False)]
        assert all(len(set(found)) == len(found) for found in usual)


def test_run_saves_what_tables_need(saved_run):
    assert saved_run["kind"] == "cpu" and saved_run["schema"] == 1
    assert {"python", "torch", "peft"} <= saved_run["versions"].keys()
    assert {"device", "threads", "commit", "date"} <= saved_run.keys()
    assert {case["op"] for case in saved_run["cases"]} == set(TINY)
    for case in saved_run["cases"]:
        assert "ours, torch" in [row["provider"] for row in case["results"]]
        assert all(row["verified"] and row["ms"] > 0 and row["percent_of_floor"] > 0 for row in case["results"])
        assert all(row[key] > 0 for row in case["results"] for key in ("gb_per_s", "tflop_per_s", "percent_of_copy"))
        for row in case["results"]:  # the rates are those of the floor's own work
            flops, size = case["rates"]["flops_per_s"][case["dtype"]], case["rates"]["bytes_per_s"]
            shares = row["tflop_per_s"] * 1e12 / flops, row["gb_per_s"] * 1e9 / size
            assert row["percent_of_floor"] == pytest.approx(100 * max(shares))
            assert row["percent_of_floor"] == pytest.approx(100 * row["floor_ms"] / row["ms"])
        saved = case["backward"] and case["op"] != "weight_distance"  # whose calls are whole steps
        assert all((row["saved_bytes"] is not None) == saved and row["peak_bytes"] > 0 for row in case["results"])
        table = str(terminal.case_table(case))
        assert all(row["provider"] in table for row in case["results"])
        assert case["op"] in table and case["dtype"] in table


# ---- README's tables ------------------------------------------------------------------------------------------------

MARKED = "# A\n<!-- status:begin -->\n<!-- status:end -->\nb\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nc\n"


def _on_gpu(run):
    run = copy.deepcopy(run)
    run.update(kind="gpu", device="NVIDIA Test", driver="1.2", threads=None)
    for case in run["cases"]:
        for row in case["results"]:
            row.update(graph_ms=row["ms"] / 2, backend=row["backend"] and "triton")
            if case["op"] == "lowrank_linear" and row["provider"] == "PEFT":
                row["graph_ms"] = 1234.5 * next(r["ms"] / 2 for r in case["results"] if r["backend"])
    run["cases"] = [case for case in run["cases"] if case["op"] != "reconstruct"]
    return run


def test_without_a_gpu_result_tables_say_so_and_nothing_else(saved_run):
    text = tables.updated(MARKED, [saved_run])
    status = [line for line in text.splitlines() if "interpreted" in line or "emulation" in line]
    assert [line.split("|")[-2].strip() for line in status] == [tables.NEVER] * 2 * len(tables.operations())
    assert f"GPU: {tables.NEVER}." in text and "old" not in text and text.endswith("\nc\n")
    assert all(f"<code>{op}</code>" in text for op in TINY)
    assert all(shape in text for shape in ("24 × 16 → 40", "3 × 24 × 40", "4·6 × 24 → 40", "9 × 24²"))


def test_gpu_result_shows_for_what_it_verified(saved_run):
    text = tables.updated(MARKED, [_on_gpu(saved_run), saved_run])
    for line in (line for line in text.splitlines() if "interpreted" in line or "emulation" in line):
        seen = "interpreted" in line and "`reconstruct`" not in line
        assert ("NVIDIA Test" in line) == seen and (tables.NEVER in line) != seen
    assert f"GPU: {tables.NEVER}" not in text and "1234.50×" in text and ", and in a CUDA graph." in text
    table = text.partition("<code>lowrank_linear</code>")[2]
    heads, _, first = ([cell.strip() for cell in line.split("|")] for line in table.splitlines()[2:5])
    cells = dict(zip(heads, first))  # eager beside the graph
    assert float(cells["graph ms"]) == pytest.approx(float(cells["ms"]) / 2, abs=2e-3)
    assert cells["graph vs PEFT"] == "1234.50×" != cells["vs PEFT"]
    after = text.partition("NVIDIA Test")[2].partition("threads:")
    assert "graph ms" in after[0] and "graph ms" not in after[2]  # of a CPU there is none


def test_what_was_verified_without_being_timed_shows_too(saved_run):
    ran = {**_on_gpu(saved_run), "cases": [], "date": "2026-03-04"}
    ran["numerics"] = [
        {"op": "reconstruct", "backend": "cuda", "ratio": 1.0},
        {"op": "reconstruct", "backend": "triton", "wrong": "y is off"},
        {"op": "gated_query", "backend": "cuda", "absent": "no extension"},
    ]
    lines = [line for line in tables.status_table([ran, saved_run]).splitlines() if "2026-03-04" in line]
    (line,) = lines
    assert "`reconstruct`" in line and "| cuda" in line


def test_steps_are_shown(saved_run):
    step = {"model": "vilt", "size": "base", "title": "ViLT-B", "method": "MoIL", "mode": "graph", "batch": 32}
    step |= {"dtype": "bfloat16", "ms": 12.3, "spread_ms": 0.1, "peak_bytes": 5e9, "launches": 70, "trained": 7e6}
    text = tables.speed_table([{**saved_run, "steps": [step | {"speed_vs": {"PEFT LoRA": 1.5}}]}])
    assert "<summary>a training step</summary>" in text and "| ViLT-B" in text and "12.3" in text and "1.50×" in text


@pytest.mark.parametrize("kind", ["dry", "rehearsal"])
def test_what_computes_nothing_of_a_gpu_s_is_no_result(kind, saved_run, tmp_path):
    results.save({**saved_run, "kind": kind}, tmp_path / "x.json")
    with pytest.raises(ValueError, match=f"x.json is of a {kind} run"):
        results.load(tmp_path)


def test_ratios_are_those_of_the_rounds_where_there_are_some():
    rows = [{"provider": "a", "ms": 4.0, "graph_ms": 3.0}, {"provider": "b", "ms": 2.0, "graph_ms": 1.0}]
    assert tables.speed({"results": rows}, rows[1], "a") == "2.00×"
    assert tables.speed({"results": rows}, rows[1], "a", "graph_ms") == "3.00×"
    assert tables.speed({"results": rows}, rows[1], "c") == "–"
    rows[1]["speed_vs"] = {"a": 2.5}
    assert tables.speed({"results": rows}, rows[1], "a") == "2.50×"


def test_tables_command(saved_run, tmp_path):
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    folder.mkdir()
    results.save(saved_run, folder / "cpu-old.json")
    readme.write_text(MARKED)
    arguments = ["--readme", str(readme), "--results", str(folder)]
    assert tables.main([*arguments, "--check"]) == 1 and readme.read_text() == MARKED
    assert tables.main(arguments) == 0 and tables.main([*arguments, "--check"]) == 0
    results.save(_on_gpu(saved_run), folder / "gpu.json")
    assert tables.main([*arguments, "--check"]) == 1
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="status:begin"):
        tables.main(arguments)


def test_later_run_of_a_device_replaces_the_earlier(saved_run, tmp_path):
    for name, date in (("a", "2026-02-01"), ("b", "2026-01-01")):
        results.save({**saved_run, "date": date}, tmp_path / f"{name}.json")
    assert [run["date"] for run in results.load(tmp_path)] == ["2026-02-01"]


def test_readme_is_in_sync():
    text = tables.README.read_text() if tables.README.is_file() else MARKED
    if "<!-- status:begin -->" in text and text != MARKED:
        assert tables.updated(text, results.load()) == text, "run `python -m peft_kernels.benchmarks.tables`"


def test_committed_results_name_no_host_and_no_path():
    for path in Path(results.RESULTS).glob("*.json"):
        run = json.loads(path.read_text())
        assert {"kind", "device", "versions", "commit", "date", "cases"} <= run.keys(), path.name
        assert not re.search(r'"[^"]*(?:/\w+){2}', path.read_text()), path.name
