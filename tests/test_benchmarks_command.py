"""`python -m peft_kernels bench`: what it runs, what it refuses before, and what it shows, saves and compares."""

import copy
import dataclasses
import json
import sys

import pytest
from benchmark_cases import TINY, tiny

from peft_kernels import __main__ as command
from peft_kernels.benchmarks import __main__ as bench
from peft_kernels.benchmarks import bench_lowrank_linear, compare, results, runner, terminal

BENCHES = [tiny(each) for each in bench.BENCHES]
FAST = ["--device", "cpu", "--dtype", "float32", "--rounds", "2"]


def run(*arguments, benches=BENCHES):
    return bench.main([*arguments, *FAST], benches)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The run of one operation."""
    path = tmp_path_factory.mktemp("run") / "new" / "cpu.json"
    assert run("lowrank_linear", "--against", "peft,linear", "--save", str(path)) == 0
    return path


# ---- what it runs ---------------------------------------------------------------------------------------------------


def planned(*arguments, device="cpu", benches=bench.BENCHES):
    """{operation: (providers, cases)} of those that have some."""
    given = bench.parser().parse_args(arguments)
    plan = bench.planned(given, bench.torch.device(device), benches)
    return {each.op: (providers, cases) for each, providers, cases in plan if cases}


def test_without_arguments_everything_that_is_usual():
    for device, dtypes in (("cpu", ["float32", "bfloat16"]), ("cuda", ["bfloat16"])):
        plan = planned(device=device)
        for each in bench.BENCHES:
            providers, cases = plan[each.op]
            assert providers == runner.providers_on(each, device)
            assert cases == list(dict.fromkeys(c for d in dtypes for c in each.cases(device == "cpu", [d])))


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("peft", ["PEFT"]),  # a whole name is that one alone
        ("compile", ["torch compiled", "PEFT compiled"]),
        ("eager", ["torch eager"]),
        ("UNSLOTH,linear", ["frozen linear", "unsloth"]),
        ("none", []),
        (" peft,", ["PEFT"]),
    ],
)
def test_peers_by_name(words, names):
    ours = ["ours, torch"]
    providers, _ = planned("lowrank_linear", "--against", words)["lowrank_linear"]
    assert providers == [name for name in bench_lowrank_linear.PROVIDERS if name in names + ours]


def test_a_peer_of_one_operation_leaves_the_others_alone():
    plan = planned("--against", "lerp,adapter_n")
    assert plan["weight_distance"][0] == ["foreach lerp", "ours, torch"]
    assert plan["batched_lowrank_linear"][0][:2] == ["PEFT, adapter_names", "ours, torch"]
    assert plan["lowrank_linear"][0] == ["ours, torch"]


def test_shapes_by_model_and_by_numbers():
    plan = planned("--shapes", "llm,vilt", "--dtype", "bfloat16")
    assert plan.keys() == {each.op for each in bench.BENCHES} - {"gated_query"}
    sizes = {(case.K, case.N) for case in plan["lowrank_linear"][1]}
    assert sizes == {(768, 768), (768, 3072), (3072, 768), (4096, 4096)}
    (_, cases) = planned("lowrank_linear", "--shapes", "24,16,40,4", "8,8,8", "--dtype", "float16")["lowrank_linear"]
    shapes = ((24, 16, 40, 4), (8, 8, 8))
    assert cases == [bench_lowrank_linear.Case(*s, dtype="float16", dropout=p) for s in shapes for p in (0, 0.1)]
    for each in bench.BENCHES:
        for shape in (TINY[each.op], *(shape for shapes in each.presets.values() for shape in shapes)):
            assert planned(each.op, "--shapes", ",".join(map(str, shape)))


def test_dropout_and_quick():
    plan = planned("--dropout", "0.3", "0.2", "--dtype", "float32")
    assert {case.dropout for case in plan["lowrank_linear"][1]} == {0.3, 0.2}
    assert len(plan["lowrank_linear"][1]) == 2 * len(bench_lowrank_linear.CPU_SHAPES)
    assert plan["reconstruct"] == planned("--dtype", "float32")["reconstruct"]
    assert [len(cases) for _, cases in planned("--quick", "--dtype", "float32").values()] == [2] * len(bench.BENCHES)


def test_compiled_peers_are_last_and_in_a_quick_run_only_by_name():
    for device in ("cpu", "cuda"):
        full, quick = planned(device=device), planned("--quick", device=device)
        for each in bench.BENCHES:
            kinds = [each.providers[name].compiled for name in full[each.op][0]]
            assert kinds == sorted(kinds) and any(kinds) == ("compiled" in str(full[each.op][0]))
            assert quick[each.op][0] == [name for name in full[each.op][0] if not each.providers[name].compiled]
    named = planned("--quick", "--against", "compile", device="cuda")
    assert named["lowrank_linear"][0][-2:] == ["torch compiled", "PEFT compiled"]


def test_width_4096_comes_last():
    for device in ("cpu", "cuda"):
        for op, (_, found) in planned("--dtype", "bfloat16", device=device).items():
            widths = [max(getattr(case, name, 0) for name in ("K", "N", "rows", "width", "D")) for case in found]
            wide = [width >= 4096 for width in widths]
            assert wide == sorted(wide), op
            assert widths[0] == 768


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("lowrank_liner", "operation: got 'lowrank_liner' (nearest: lowrank_linear, "),
        ("--against peft,unsolth", "--against: got 'unsolth' (nearest: unsloth"),
        ("--against none,peft", "--against: got 'none'"),
        ("--shapes blp", "--shapes: got 'blp' (nearest: blip)"),
        ("gated_query --shapes llm", "gated_query has blip"),
        ("--shapes 24,16,40", "sizes of one operation"),
        ("lowrank_linear --shapes 24,16", "lowrank_linear takes M,K,N[,R], got 24,16"),
        ("lowrank_projections --shapes 24,16", "lowrank_projections takes M,K,N[,J,R,OTHERS], got 24,16"),
        ("lowrank_linear --shapes 24,16,40,4,4", "lowrank_linear takes M,K,N[,R], got 24,16,40,4,4"),
        ("lowrank_linear --shapes 24,x,40", "or numbers like 24,16,40, got 24,x,40"),
        ("lowrank_linear --shapes 24,0,40", "or numbers like 24,16,40, got 24,0,40"),
        ("--dtype bf16", "--dtype: got 'bf16' (nearest: bfloat16"),
        ("--dropout 1", "expected 0 ≤ P < 1, got 1"),
        ("reconstruct --dropout 0.1", "--dropout: reconstruct: there is none"),
        ("--graph", "a CUDA graph needs a GPU"),
        ("--device quantum", "quantum"),
        ("--rounds 0", "expected a number ≥ 1, got 0"),
        ("--compare nowhere.json", "--compare: nowhere.json is not a file of --save"),
    ],
)
def test_refused_before_anything_runs(arguments, told, monkeypatch, capsys):
    monkeypatch.setattr(runner, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as caught:
        bench.main(["--device", "cpu", *arguments.split()])
    assert caught.value.code == 2 and told in capsys.readouterr().err


def test_old_file_without_a_common_case_is_refused(saved, tmp_path, capsys):
    other = tmp_path / "other.json"
    for content in (json.dumps({**json.loads(saved.read_text()), "cases": []}), "[]", "{}", '{"cases": [1]}'):
        other.write_text(content)
        with pytest.raises(SystemExit):
            run("lowrank_linear", "--compare", str(other))
        assert "--compare: " in capsys.readouterr().err


# ---- what it shows and saves ----------------------------------------------------------------------------------------


def test_both_commands_are_one(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(bench, "main", lambda argv: seen.append(argv) or 7)
    assert command.main(["bench", "--quick"]) == 7 and seen == [["--quick"]]
    monkeypatch.setattr(sys, "argv", ["peft_kernels", "bench"])
    assert command.main() == 7 and seen[1] == []


def test_saved_after_every_case(saved, tmp_path, monkeypatch):
    assert [case["dropout"] for case in json.loads(saved.read_text())["cases"]] == [0.0, 0.1]
    measure, calls = runner.measure, []

    def second_fails(*arguments):
        calls.append(arguments)
        return measure(*arguments) if len(calls) < 2 else pytest.exit("stopped")

    monkeypatch.setattr(runner, "measure", second_fails)
    path = tmp_path / "cpu.json"
    with pytest.raises(BaseException, match="stopped"):
        run("gated_query", "--against", "none", "--save", str(path))
    assert len(json.loads(path.read_text())["cases"]) == 1 and list(tmp_path.iterdir()) == [path]


def test_a_fault_ends_the_run(saved, tmp_path, monkeypatch, capsys):
    """What was measured before is saved, and what was not begun is not in the file."""
    record, calls = json.loads(saved.read_text())["cases"][0], []

    def measure(bench, case, device, providers, rounds, in_graph, save):
        calls.append(case)
        save({**record, "results": record["results"][:1]})
        assert len(json.loads(path.read_text())["cases"]) == len(calls)
        return record if len(calls) == 1 else {**record, "fault": "PEFT faulted the device: an illegal address"}

    monkeypatch.setattr(runner, "measure", measure)
    path = tmp_path / "x.json"
    assert run("--save", str(path)) == 1 and len(calls) == 2
    assert "nothing more runs: PEFT faulted the device" in capsys.readouterr().out


def test_floor_and_absent_peers_are_told(capsys):
    full = dataclasses.replace(bench_lowrank_linear.BENCH, cases=BENCHES[2].cases)
    assert run("--against", "peft,unsloth", "--dropout", "0", benches=[full]) == 0
    text = capsys.readouterr().out
    assert "unsloth: absent: No module named 'unsloth'" in text
    header = next(line for line in text.splitlines() if line.startswith("| provider"))
    wanted = ["provider", "ms", "±", "vs PEFT", *terminal.SHOWN]
    assert [cell.strip() for cell in header.split("|")[1:-1]] == wanted and wanted[4] == "floor ms"


def _wrong(case, t):
    return runner.Built(lambda x: x, {})


def test_something_wrong_is_told_and_is_the_exit_status(capsys):
    providers = {**BENCHES[1].providers, "wrong": runner.Provider(_wrong, None)}
    wrong = dataclasses.replace(BENCHES[1], providers=providers)
    assert run("gated_query", "--quick", benches=[wrong]) == 1
    assert capsys.readouterr().out.count("wrong: wrong: no d_beta") == 2


def test_without_a_graph(monkeypatch):
    seen = []
    nothing = {"op": "gated_query", "title": "", "results": [], "absent": {}}
    monkeypatch.setattr(runner, "measure", lambda *arguments: seen.append(arguments[-2]) or nothing)
    run("gated_query", "--quick")
    run("gated_query", "--quick", "--no-graph")
    assert seen == [True, True, False, False]


def test_ratios_are_to_the_peer_of_readme_or_to_the_first_that_is_there(saved):
    record = json.loads(saved.read_text())["cases"][0]
    assert [row["provider"] for row in record["results"]] == ["frozen linear", "PEFT", "ours, torch"]
    for ratio in ("vs PEFT", "vs frozen linear", None):
        headers = terminal.case_table(record).headers
        assert [head for head in headers if head.startswith("vs ")] == [ratio][: ratio is not None]
        del record["results"][len(record["results"]) - 2]


def test_table_of_rich_on_a_terminal(saved, monkeypatch, capsys):
    pytest.importorskip("rich")
    record = json.loads(saved.read_text())["cases"][0]
    record["absent"]["peer"] = "absent: [none] of it"
    table = terminal.case_table(record)
    terminal.show(table)
    assert capsys.readouterr().out == f"{table}\n\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    terminal.show(table)
    text = capsys.readouterr().out
    assert "│" not in text and "| ---" not in text and "─" in text
    assert all(part in text for part in ("frozen linear", "% of floor", "peer: absent: [none] of it"))
    monkeypatch.setitem(sys.modules, "rich", None)
    terminal.show(table)
    assert capsys.readouterr().out == f"{table}\n\n"


# ---- comparing ------------------------------------------------------------------------------------------------------


def _slower(run, provider, factor, spread, **more):
    """The same run in which one provider takes longer, everyone with the same spread."""
    run = copy.deepcopy(run)
    for case in run["cases"]:
        for row in case["results"]:
            time = row["ms"] * (factor if row["provider"] == provider else 1)
            row.update(ms=time, spread_ms=row["ms"] * spread, **more)
    return run


def test_changes_beyond_both_spreads(saved):
    old = _slower(json.loads(saved.read_text()), "", 1, 0.1)
    for factor, told in ((1.15, ""), (1.3, compare.SLOWER), (0.85, ""), (0.7, compare.FASTER)):
        new = _slower(old, "ours, torch", factor, 0.1)
        found = compare.changes(old, new)
        assert len(found) == 2 * 3 and {change.how for change in found} == {"eager"}
        for change in found:
            mine = change.provider == "ours, torch"
            assert change.ours == mine and change.told == (told if mine else "")
            assert change.new / change.old == pytest.approx(factor if mine else 1)
        assert str(compare.table(found, old)).count(f"{1 / factor:.2f}×") == 2


def test_graphs_are_compared_where_both_runs_have_them(saved):
    """Beside eager times, which say what they say."""
    old = _slower(json.loads(saved.read_text()), "", 1, 0.0)
    new = _slower(old, "ours, torch", 2, 0.0, graph_ms=1.0, graph_spread_ms=0.5)

    def told(old, how):
        return {(c.old, c.new, c.told) for c in compare.changes(old, new) if c.how == how}

    assert {change.told for change in compare.changes(old, new) if change.ours} == {compare.SLOWER}
    assert told(old, "graph") == set()
    eager, old = told(old, "eager"), _slower(old, "", 1, 0.0, graph_ms=1.6, graph_spread_ms=0.0)
    assert told(old, "graph") == {(1.6, 1.0, compare.FASTER)}
    assert told(old, "eager") == eager and compare.SLOWER in {word for _, _, word in eager}
    old = _slower(old, "", 1, 0.0, graph_ms=1.6, graph_spread_ms=0.2)
    assert told(old, "graph") == {(1.6, 1.0, "")}


def test_other_cases_and_other_providers_are_left_out(saved):
    old, new = (json.loads(saved.read_text()) for _ in range(2))
    old["cases"][0]["dropout"] = 0.5
    old["cases"][1]["results"][0]["provider"] = "another"
    assert len(compare.changes(old, new)) == 2 * 3 - 3 - 1


@pytest.mark.parametrize(
    ("provider", "factor", "status"), [("ours, torch", 1e-3, 1), ("PEFT", 1e-3, 0), ("ours, torch", 1e3, 0)]
)
def test_exit_status_says_that_one_of_ours_became_slower(provider, factor, status, saved, tmp_path, capsys):
    path = tmp_path / "old.json"
    results.save(_slower(json.loads(saved.read_text()), provider, factor, 0.0), path)
    for case in (old := json.loads(path.read_text()))["cases"]:
        for row in case["results"]:  # whatever the machine does meanwhile
            row["spread_ms"] = 1e9 if row["provider"] != provider else 0
    path.write_text(json.dumps(old))
    arguments = ("lowrank_linear", "--against", "peft,linear", "--dropout", "0", "--compare", str(path))
    assert run(*arguments) == status
    assert ("SLOWER" if factor < 1 else "faster") in capsys.readouterr().out


def test_committed_results_can_be_compared_with():
    found = {path: json.loads(path.read_text()) for path in results.RESULTS.glob("*.json")}
    found = {path: run for path, run in found.items() if run["kind"] == "cpu" and run["cases"]}
    wanted = [{"op": op, **dataclasses.asdict(c)} for op, (_, cases) in planned().items() for c in cases]
    assert found
    for path, committed in found.items():
        assert compare.load(path, wanted) == committed
        assert {compare.identity(case) for case in committed["cases"]} <= set(map(compare.identity, wanted))


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_without_matplotlib_nothing_runs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "peft_kernels.benchmarks.plots", raising=False)
    monkeypatch.delattr(sys.modules["peft_kernels.benchmarks"], "plots", raising=False)
    with pytest.raises(SystemExit):
        run("--plot", "nowhere")
    assert "pip install 'peft_kernels[bench]'" in capsys.readouterr().err


def _size(folder, name):
    return (folder / name / "lowrank_linear.png").stat().st_size


def test_pictures(saved, tmp_path):
    pytest.importorskip("matplotlib")
    from peft_kernels.benchmarks import plots

    content = json.loads(saved.read_text())
    paths = plots.plot(content, tmp_path / "made")
    assert [path.name for path in paths] == ["lowrank_linear.png", "roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in paths)
    for case in content["cases"]:
        for row in case["results"]:
            row["graph_ms"] = row["ms"] / 2
    assert plots.plot(content, tmp_path / "graphs") and _size(tmp_path, "graphs") != _size(tmp_path, "made")
    for case in content["cases"]:
        case["results"].clear()
    assert plots.plot(content, tmp_path) == []
