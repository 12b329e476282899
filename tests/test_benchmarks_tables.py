"""A run of every operation's benchmark, its result file, and that README and docs/measured.md say what was measured."""

import copy
import json
import pkgutil
import re
from pathlib import Path

import pytest
from benchmark_cases import TINY, tiny
from measured_cases import WIDE, case_of, device_of

from peft_kernels import ops
from peft_kernels.benchmarks import __main__ as every
from peft_kernels.benchmarks import markdown, measured, predictions, results, tables, terminal

# ---- a run of everything --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "cpu.json"
    which = ["--device", "cpu", "--dtype", "float32", "--rounds", "2", "--save", str(path)]
    assert every.main(which, [tiny(bench) for bench in every.BENCHES]) == 0
    return json.loads(path.read_text())


def test_every_operation_is_measured_and_has_its_peers():
    benched = {bench.op for bench in every.BENCHES}
    names = {module.name for module in pkgutil.iter_modules(ops.__path__)}
    assert benched == {name for name in names if not name.startswith("_")} == set(terminal.VERSUS) == set(TINY)
    for bench in every.BENCHES:
        assert set(terminal.VERSUS[bench.op].values()) <= bench.providers.keys()
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


# ---- README and the page --------------------------------------------------------------------------------------------

EMPTY = "<!-- {0}:begin -->\n<!-- {0}:end -->\n"
MARKED = f"# A\n{EMPTY.format('status')}{EMPTY.format('verified')}b\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nc\n"


def _on_gpu(run):
    run = copy.deepcopy(run)
    run.update(kind="gpu", device="NVIDIA Test", driver="1.2", threads=None)
    for case in run["cases"]:
        for row in case["results"]:
            row.update(graph_ms=row["ms"] / 2, graph_spread_ms=0.0, backend=row["backend"] and "triton")
            if case["op"] == "lowrank_linear" and row["provider"] == "PEFT":
                row["graph_ms"] = 1234.5 * next(r["ms"] / 2 for r in case["results"] if r["backend"])
    return run


def test_without_a_gpu_s_result_texts_say_so_and_show_none(saved_run):
    devices = results.by_device([saved_run])
    readme, page = tables.updated(MARKED, devices), measured.page(devices)
    assert measured.NEVER in readme and "old" not in readme and ".png" not in readme and readme.endswith("\nc\n")
    assert measured.NEVER in page and ".png" not in page and "graph µs" not in page
    assert page.count("not measured") == len(predictions.PREDICTIONS)
    assert all(f"<code>{op}</code>" in page for op in TINY)
    assert all(shape in page for shape in ("24 × 16 → 40", "3 × 24 × 40", "4·6 × 24 → 40", "3 · 3 × 24²"))
    assert "### Where we lose" in page  # on a CPU, too


def test_gpu_s_result_shows(saved_run):
    devices = results.by_device([_on_gpu(saved_run), saved_run])
    readme, page = tables.updated(MARKED, devices), measured.page(devices)
    assert measured.NEVER not in readme + page and f"Ran on NVIDIA Test, {saved_run['date']}: " in readme
    assert f"{len(saved_run['cases'])} cases timed" in readme and "speed.png" not in readme  # no case of the figure
    assert all(f"(measured-{op}.png)" in page for op in TINY)
    gpu, _, cpu = page.partition("## NVIDIA Test")[2].partition(f"## {saved_run['device']}")
    assert "graph µs" in gpu and "graph µs" not in cpu
    table = gpu.partition("<code>lowrank_linear</code>")[2].partition("</details>")[0]
    heads, _, *lines = ([c.strip() for c in line.split("|")] for line in table.splitlines() if line.startswith("|"))
    rows = {line[2]: dict(zip(heads, line)) for line in lines if len(line) == len(heads)}
    ours, peft = rows["ours, torch"], rows["PEFT"]
    assert float(ours["graph µs"]) == pytest.approx(float(ours["eager µs"]) / 2, abs=0.06)
    assert peft["×"] == "1234.50×" and ours["×"] == "1.00×"  # of two columns the last


def test_figure_has_the_cases_that_it_is_made_of():
    peers = {"PEFT": (2.0, 2.0), "ours, torch": (1.0, 1.0), "ours, cuda": (1.0, 1.0), "unsloth": (1.0, 1.0)}
    device = device_of(cases=[case_of(peers), case_of(peers, WIDE.replace("rank 16", "rank 64"))])
    assert "docs/speed.png" in tables.speed([device]) and "NVIDIA Test" in tables.speed([device])
    (case,) = tables.shown([device])["cases"]
    assert [row["provider"] for row in case["results"]] == ["PEFT", "ours, cuda"]
    assert tables.speed([{**device, "kind": "cpu"}]) == tables.speed([device_of()]) == ""


def test_truth_alone_is_enough(saved_run):
    record = {"op": "reconstruct", "provider": "ours, cuda", "backend": "cuda", "dtype": "float16", "case": "c"}
    right = {"worst": "dx", "error": 2e-3, "torch_error": 1e-3}
    ran = {"tests": {"ok": False, "told": "8 passed; 1 failed\n  x", "seconds": 3.0}}
    ran["sanitizer"] = {"ok": True, "told": "clean", "seconds": 3.0}
    device = device_of(
        numerics=[
            {**record, **right, "ratio": 0.5},
            {**record, **right, "ratio": 2.0},
            {**record, "wrong": "y is off"},
        ],
        tests={"counts": {"passed": 8, "failed": 1}},
        sanitizer={"memcheck cuda": {"reconstruct": "0 errors"}, "racecheck triton": {"all": "left out: no time"}},
        machine={"gpu": {"0": "a card", "clocks": "1980 MHz"}, "tools": {"ncu": None}},
        ran=ran,
    )
    line = tables.status([device])
    assert "3 results against float64, 1 wrong" in line and "cuda 2.00" in line and "1 failed, 8 passed" in line
    assert "memcheck cuda clean; racecheck triton not clean, or not whole" in line
    assert "as far as they came" in line and "to be looked at: tests." in line and "timed" not in line
    page = measured.page([device])
    assert "- gpu 0: a card\n- gpu clocks: 1980 MHz\n" in page and "ncu" not in page
    assert re.search(r"reconstruct +\| cuda +\| float16 +\| +2 \| +2.00 \| 2.0e-03 \| 1.0e-03 \| dx of c ", page)
    assert "- reconstruct, ours, cuda, 1 ×: wrong: y is off" in page
    assert re.search(r"tests +\| LOOK +\| 3 \| 8 passed; 1 failed +\|", page)
    assert "- racecheck triton, all, 1 ×: left out: no time" in page and "- memcheck" not in page
    assert "Where we lose" not in page and "### Operations" not in page and ".png" not in page
    assert tables.updated(MARKED, [device])


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dry", "rehearsal"])
def test_what_computes_nothing_of_a_gpu_s_is_no_result(kind, saved_run, tmp_path):
    results.save({**saved_run, "kind": kind}, tmp_path / "x.json")
    with pytest.raises(ValueError, match=f"x.json is of a {kind} run"):
        results.load(tmp_path)


def test_ratios_are_those_of_the_rounds_where_there_are_some():
    rows = [{"provider": "a", "ms": 4.0, "graph_ms": 3.0}, {"provider": "b", "ms": 2.0, "graph_ms": 1.0}]
    assert markdown.speed({"results": rows}, rows[1], "a") == "2.00×"
    assert markdown.speed({"results": rows}, rows[1], "a", "graph_ms") == "3.00×"
    assert markdown.speed({"results": rows}, rows[1], "c") == "–"
    rows[1]["speed_vs"] = {"a": 2.5}
    assert markdown.speed({"results": rows}, rows[1], "a") == "2.50×"


def test_tables_command(saved_run, tmp_path):
    readme, page, folder = tmp_path / "README.md", tmp_path / "page.md", tmp_path / "results"
    folder.mkdir()
    results.save(saved_run, folder / "cpu-old.json")
    readme.write_text(MARKED)
    arguments = ["--readme", readme, "--page", page, "--results", folder, "--choices", tmp_path / "fastest.py"]
    arguments = [str(each) for each in arguments]
    assert tables.main([*arguments, "--check"]) == 1 and readme.read_text() == MARKED and not page.exists()
    assert tables.main(arguments) == 0 and tables.main([*arguments, "--check"]) == 0
    page.write_text(page.read_text() + "by hand")
    assert tables.main([*arguments, "--check"]) == 1
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="status:begin"):
        tables.main(arguments)


def test_pictures_are_drawn_when_the_page_changes(saved_run, tmp_path):
    pytest.importorskip("matplotlib")
    readme, page, folder = tmp_path / "README.md", tmp_path / "page.md", tmp_path / "results"
    folder.mkdir()
    readme.write_text(MARKED)
    arguments = ["--readme", readme, "--page", page, "--results", folder, "--choices", tmp_path / "fastest.py"]
    arguments = [str(each) for each in arguments]
    run = _on_gpu(saved_run)
    run["cases"] = [case for case in run["cases"] if case["op"] == "gated_query"]
    run["cases"].append(case_of({"ours, cuda": (1.0, 1.0), "PEFT": (2.0, 2.0)}))
    results.save(run, folder / "gpu.json")
    assert tables.main(arguments) == 0 and tables.main([*arguments, "--check"]) == 0
    drawn = {"measured-gated_query.png", "measured-lowrank_linear.png", "measured-roofline.png", "speed.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == drawn
    (tmp_path / "speed.png").write_bytes(b"kept")
    assert tables.main(arguments) == 0 and (tmp_path / "speed.png").read_bytes() == b"kept"  # nothing has changed
    (tmp_path / "measured-roofline.png").unlink()
    assert tables.main([*arguments, "--check"]) == 1
    run["cases"].pop()
    results.save(run, folder / "gpu.json")
    assert tables.main(arguments) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"measured-gated_query.png", "measured-roofline.png"}


def test_second_gpu_s_pictures_have_other_names(saved_run):
    page = measured.page(results.by_device([_on_gpu(saved_run), {**_on_gpu(saved_run), "device": "NVIDIA Zweite"}]))
    first, _, second = page.partition("## NVIDIA Zweite")
    assert "(measured-roofline.png)" in first and "(measured-1-roofline.png)" in second


def test_later_run_of_a_device_replaces_the_earlier(saved_run, tmp_path):
    for name, date in (("a", "2026-02-01"), ("b", "2026-01-01")):
        results.save({**saved_run, "date": date}, tmp_path / f"{name}.json")
    assert [run["date"] for run in results.load(tmp_path)] == ["2026-02-01"]


def test_parts_of_a_run_are_one_device_and_the_latest_of_each_counts(saved_run, tmp_path):
    run = _on_gpu(saved_run)
    told = {"ok": True, "seconds": 1.0}
    parts = {
        "speed": {
            "date": "2026-02-01",
            "profile": [{"old": 1}],
            "search": [1],
            "ran": {"kernels": {**told, "told": "old"}},
        },
        "again": {"date": "2026-02-03", "profile": [{"new": 1}], "ran": {"kernels": {**told, "told": "new"}}},
        "truth": {"date": "2026-02-02", "cases": [], "tests": {"counts": {"passed": 1}}, "ran": {"tests": told}},
    }
    for name, part in parts.items():
        results.save({**run, "part": name, **part}, tmp_path / f"{name}.json")
    (device,) = results.by_device(results.load(tmp_path))
    assert device["profile"] == [{"new": 1}] and device["tests"] == {"counts": {"passed": 1}}
    assert device["ran"]["kernels"]["told"] == "new" and "tests" in device["ran"]
    assert [each["part"] for each in device["runs"]] == ["again", "truth", "speed"] and device["cases"] == run["cases"]


def test_committed_texts_are_in_sync():
    if tables.PAGE.is_file() and tables.README.is_file():  # an installed package has neither
        assert tables.main(["--check"]) == 0, "run `python -m peft_kernels.benchmarks.tables`"


def test_committed_results_name_no_host_and_no_path():
    for path in Path(results.RESULTS).glob("*.json"):
        run = json.loads(path.read_text())
        assert {"kind", "device", "versions", "commit", "date", "cases"} <= run.keys(), path.name
        assert not re.search(r'"[^"]*(?:/\w+){2}', path.read_text()), path.name
