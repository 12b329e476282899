"""A run of every operation's benchmark, its result file, and that README and docs/measured.md say what was measured."""

import copy
import json
import pkgutil
import re
from pathlib import Path

import pytest
from benchmark_cases import TINY, tiny

from peft_kernels import ops
from peft_kernels.benchmarks import __main__ as every
from peft_kernels.benchmarks import markdown, measured, predictions, results, tables, terminal
from peft_kernels.benchmarks.gpu import tuning
from peft_kernels.triton_kernels import common, lowrank_linear_bwd, lowrank_linear_fwd

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

MARKED = "# A\n<!-- status:begin -->\n<!-- status:end -->\nb\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nc\n"
RATES = {"name": "x", "bytes_per_s": 3e12, "flops_per_s": {"bfloat16": 8e14}, "source": "invented"}
BACKENDS = {"ours, torch": "torch", "ours, triton D1": "triton", "ours, cuda": "cuda", "ours, triton": "triton"}
BACKENDS["ours, torch, order given"] = "torch"
WIDE = predictions.title(predictions.WIDE, 0.0)


def _on_gpu(run):
    run = copy.deepcopy(run)
    run.update(kind="gpu", device="NVIDIA Test", driver="1.2", threads=None)
    for case in run["cases"]:
        for row in case["results"]:
            row.update(graph_ms=row["ms"] / 2, graph_spread_ms=0.0, backend=row["backend"] and "triton")
            if case["op"] == "lowrank_linear" and row["provider"] == "PEFT":
                row["graph_ms"] = 1234.5 * next(r["ms"] / 2 for r in case["results"] if r["backend"])
    return run


def _case(times, name=WIDE, op="lowrank_linear", **more):
    """A case of a GPU. times: eager and graphed milliseconds by provider"""
    rows = []
    for provider, (ms, graph_ms) in times.items():
        row = {"provider": provider, "backend": BACKENDS.get(provider), "ms": ms, "graph_ms": graph_ms}
        row |= {"spread_ms": 0.0, "graph_spread_ms": 0.0, "floor_ms": 0.5, "percent_of_floor": 60.0, "gb_per_s": 1.0}
        rows.append(row | {"percent_of_copy": 95.0, "tflop_per_s": 1.0, "bytes": 1, "flops": 1, "launches": 7} | more)
    return {"op": op, "title": name, "dtype": "bfloat16", "rates": RATES, "absent": {}, "results": rows}


def _device(kind="gpu", **sections):
    run = {"kind": kind, "device": "NVIDIA Test", "date": "2026-03-04", "driver": "1.2", "threads": None, "commit": "c"}
    (device,) = results.by_device([{**run, "versions": {}, "cases": [], **sections}])
    return device


def _section(device, title):
    text = measured.page([device])
    return text.partition(f"### {title}\n")[2].partition("\n### ")[0]


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
    device = _device(cases=[_case(peers), _case(peers, WIDE.replace("rank 16", "rank 64"))])
    assert "docs/speed.png" in tables.speed([device]) and "NVIDIA Test" in tables.speed([device])
    (case,) = tables.shown([device])["cases"]
    assert [row["provider"] for row in case["results"]] == ["PEFT", "ours, cuda"]
    assert tables.speed([{**device, "kind": "cpu"}]) == tables.speed([_device()]) == ""


def test_truth_alone_is_enough(saved_run):
    record = {"op": "reconstruct", "provider": "ours, cuda", "backend": "cuda", "dtype": "float16", "case": "c"}
    right = {"worst": "dx", "error": 2e-3, "torch_error": 1e-3}
    ran = {"tests": {"ok": False, "told": "8 passed; 1 failed\n  x", "seconds": 3.0}}
    ran["sanitizer"] = {"ok": True, "told": "clean", "seconds": 3.0}
    device = _device(
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


# ---- losses ---------------------------------------------------------------------------------------------------------


def _lost(device):
    return [(clock, ours, faster) for _, (_, _, clock, ours, _, faster) in measured.losses(device)]


def test_losing_cases_are_listed_and_the_worst_first():
    slow = {"ours, torch": (2.0, 2.0), "ours, triton D1": (1.0, 0.8), "ours, cuda": (1.5, 0.4)}
    device = _device(cases=[_case({**slow, "PEFT": (0.8, 0.5), "frozen linear": (0.1, 0.1)})])
    assert _lost(device) == [("eager", "ours, triton D1", "PEFT 1.25×")]  # in a graph CUDA's are faster than PEFT
    device["foreign"] = [_case({"ours, triton D1": (1.0, 0.8), "unsloth": (3.0, 0.4)})]
    assert _lost(device) == [("graph", "ours, triton D1", "unsloth 2.00×"), ("eager", "ours, triton D1", "PEFT 1.25×")]
    assert "unsloth 2.00×" in _section(device, "Where we lose")
    assert "somebody is faster" in tables.status([device])


def test_plain_torch_of_ours_counts_as_another_beside_kernels():
    case = _case({"ours, torch": (0.5, 2.0), "ours, triton D1": (1.0, 1.0)})
    assert _lost(_device(cases=[case])) == [("eager", "ours, triton D1", "ours, torch 2.00×")]
    cpu = _case({"ours, torch": (2.0, None), "ours, torch, order given": (1.0, None), "PEFT": (1.5, None)})
    assert _lost(_device("cpu", cases=[cpu])) == []  # the faster of torch's is ours there


def test_case_without_a_kernel_of_ours_is_the_worst():
    without = _case({"PEFT": (1.0, None)})
    cases = [_case({"ours, triton D1": (9.0, None), "PEFT": (1.0, None)}), without]
    assert [ours for _, ours, _ in _lost(_device(cases=cases))] == ["ours, triton D1"]  # time was up before ours
    without["absent"]["ours, triton D1"] = "absent: rank"
    assert [ours for _, ours, _ in _lost(_device(cases=cases))] == ["none", "ours, triton D1"]


def test_losing_steps_are_listed_too():
    step = {"model": "vilt", "size": "base", "title": "ViLT-B", "batch": 32, "dtype": "bfloat16", "ms": 12.3}
    step |= {"spread_ms": 0.1, "peak_bytes": 5e9, "launches": 70, "trained": 7e6, "mode": "graph"}
    lost = {**step, "method": "our LoRA", "speed_vs": {"PEFT LoRA": 0.5, "full tuning": 0.4}}
    won = {**step, "method": "MoIL", "speed_vs": {"PEFT LoRA": 0.5, "MoIL, authors' formula": 1.5}}
    device = _device(steps=[lost, won])
    assert _lost(device) == [("graph", "our LoRA", "PEFT LoRA 2.00×")]
    table = _section(device, "Training steps")
    assert "| ViLT-B" in table and "12.3" in table and "1.50×" in table


def test_nothing_lost_is_said():
    device = _device(cases=[_case({"ours, triton D1": (1.0, 1.0), "PEFT": (2.0, 2.0)})])
    assert _section(device, "Where we lose").strip().startswith("Nowhere")


# ---- predictions ----------------------------------------------------------------------------------------------------


def _line(device, name):
    (line,) = (line for line in _section(device, "Against predictions").splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_miss_is_marked_and_explained_or_called_unexplained(monkeypatch):
    name = "whole operation, ours, 8192 × 4096²"
    device = _device(cases=[_case({"ours, triton D1": (9.0, 1.8), "ours, cuda": (9.0, 1.9), "PEFT": (9.0, 1.15)})])
    assert _line(device, name) == ["900 µs", "1800 µs", "2.00", "**missed by 2.0 ×**: unexplained"]
    monkeypatch.setitem(predictions.EXPLAINED, name, "Registers.")
    assert _line(device, name)[-1] == "**missed by 2.0 ×**: Registers."
    assert _line(device, "whole operation, PEFT, 8192 × 4096²") == ["1150 µs", "1150 µs", "1.00", ""]
    slower = _line(device, "speed against PEFT, dropout 0, 8192 × 4096²")
    assert slower[1:] == ["0.64 ×", "0.53", "**missed by 1.9 ×**: unexplained"]
    assert _line(device, "speed against PEFT, dropout 0.1, 8192 × 4096²")[1:] == ["not measured", "–", ""]


@pytest.mark.parametrize(
    ("low", "high", "value", "ratio", "verdict"),
    [
        (10, 10, 15, 1.5, ""),
        (10, 10, 15.1, 1.51, "missed by 1.5 ×"),
        (10, 10, 6, 0.6, "missed by 1.7 ×"),
        (31, 45, 40, 1.0, ""),
        (31, 45, 90, 2.0, "missed by 2.0 ×"),
        (2.0, None, 9.0, 4.5, "met"),
        (2.0, None, 1.9, 0.95, "missed"),
        (2.0, None, 1.0, 0.5, "missed by 2.0 ×"),
        (None, 1.5, 0.5, 1 / 3, "met"),
        (None, 1.5, 3.0, 2.0, "missed by 2.0 ×"),
    ],
)
def test_what_a_miss_is(low, high, value, ratio, verdict):
    prediction = predictions.Prediction("x", low, high, "", lambda device: None)
    told = f"**{verdict}**: unexplained" if "by" in verdict else verdict
    assert prediction.ratio(value) == pytest.approx(ratio) and prediction.verdict(value) == told


def test_every_prediction_finds_what_a_run_measures():
    """Its case goes by a title of the bench's, its kernel by a name in triton_kernels/."""
    times = dict.fromkeys(("PEFT", "frozen linear", "authors' formula", *tuning.FOREIGN, *BACKENDS), (1.0, 1.0))
    names = [name for module in (common, lowrank_linear_fwd, lowrank_linear_bwd) for name in vars(module)]
    kernels = [{"kernel": name, "us": 6.0, "calls": 2.0} for name in names if name.endswith("_kernel")]
    device, benches = _device(), {bench.op: bench for bench in every.BENCHES}
    for op in ("lowrank_linear", "reconstruct", "weight_distance"):
        for title in (case.title for case in benches[op].cases(False, ["bfloat16"])):
            device["cases"].append(_case(times, title, op))
            device["profile"].append({"op": op, "case": title, "provider": predictions.D1, "kernels": kernels})
    found = {each.name: each.find(device) for each in predictions.PREDICTIONS}
    assert len(found) == len(predictions.PREDICTIONS) and predictions.EXPLAINED.keys() <= found.keys()
    assert None not in found.values() and found["sum, 8192 × 4096²"] == 3.0


# ---- kernels, tiles, variants ---------------------------------------------------------------------------------------


def test_kernels_show_their_share_of_the_floor():
    bytes_read = 2 * (8192 * 4096 + 16 * 4096 + 8192 * 16)  # x, A and z
    us = 2 * bytes_read / RATES["bytes_per_s"] * 1e6
    rows = [{"kernel": "_shrink_kernel", "us": us, "calls": 1.0}, {"kernel": "void a::b_kernel<int>(c)", "us": 3.0}]
    record = {"op": "lowrank_linear", "case": WIDE, "dtype": "bfloat16", "provider": "ours, triton D1"}
    record |= {"backend": "triton", "kernels": rows, "us": us + 3}
    absent = {"op": "lowrank_linear", "case": WIDE, "provider": "ours, cuda", "backend": "cuda", "absent": "no library"}
    device = _device(profile=[record, absent], cases=[_case({})])
    text = _section(device, "Kernels")
    assert f"| {us + 3:.1f} | shrink {us:.1f} (50 %), b 3.0 |" in text
    assert "- ours, cuda, 1 ×: no library" in text
    assert "(50 %)" not in _section(_device(profile=[record]), "Kernels")  # without a case nothing tells the rates


def test_tiles_and_variants_are_shown():
    tile = {"op": "gated_query", "case": "c", "kernel": "k", "from": "Tile(rows=1)", "to": "Tile(rows=2)"}
    tile |= {"us_from": 5.0, "us_to": 4.0, "spread_us": 0.1, "tried": 3, "left_out": {"x": "spills"}}
    variant = {"case": "c", "variant": "more strips", "whole": False}
    timed = {"base_us": 5.0, "base_spread_us": 0.1, "variant_us": 4.0, "variant_spread_us": 0.1, "ratio": 1.25}
    device = _device(search=[tile], variants=[{**variant, "absent": "changes nothing here"}, {**variant, **timed}])
    text = _section(device, "Tiles and variants")
    assert "| (rows=1) | (rows=2) | 5.00 | 4.00 | 0.10 | 3 | 1 |" in text
    assert "| more strips | 5.00 | 0.10 | 4.00 | 0.10 | 1.250× |" in text
    assert "- more strips, 1 ×: changes nothing here" in text


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
    run["cases"].append(_case({"ours, cuda": (1.0, 1.0), "PEFT": (2.0, 2.0)}))
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
