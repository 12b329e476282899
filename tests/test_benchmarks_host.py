"""`python -m peft_kernels bench --host`: its tables are whole, and what it counts repeats. No test looks at times."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext

import pytest

from peft_kernels.benchmarks import __main__ as bench
from peft_kernels.benchmarks import host
from peft_kernels.benchmarks.nothing import launching_nothing

# Kernels that were decorated under the interpreter reach no launcher: another process counts.
COUNT = """
import json, torch
from peft_kernels.benchmarks import host
torch.set_num_threads(1)
with host.stage(device := torch.device("cpu")) as launches:
    asked = [("", "PEFT", host.providers(0.1))] * 2 + list(host.asked(["imitation"], device))
    measured = [host.measure(found, against, launches, 1, device) for _, against, found in asked]
    plain = [], []
    for count, records in zip((1, 3), plain):
        for name, provider in host.providers(0.0, count).items():
            with provider.running():
                calls = host.counted_calls(provider.forward) / provider.shared_by
            records.append({"provider": name, "forward_calls": calls})
    three = host.measure(host.providers(0.1, 3), "PEFT", launches, 1, device)
    print(json.dumps([*measured, *plain, three]))
"""
# The most calls of functions of Python and of C that a layer's forward may take, at p = 0 and at 0.1; or whose calls.
BUDGETS = {f"{name}, {backend}": 50 for name in ("LowRankLinear", "Aurora") for backend in ("triton", "cuda")}
BUDGETS |= {f"PEFT accelerated, {backend}": "PEFT" for backend in ("triton", "cuda")}
BUDGETS_IN_GROUPS = {f"LowRankLinear in a group, {backend}": 0.5 for backend in ("triton", "cuda")}  # of PEFT's three
BUDGETS_IN_GROUPS |= {f"PEFT accelerated in a group, {backend}": 0.7 for backend in ("triton", "cuda")}
BUDGET_OF_MANY = 200  # of a warm call for 36 projections: none for each of its 144 or 336 tensors
NEEDED = {"triton": "triton", "cuda": "peft_kernels._C"}
KERNELS = [backend for backend, module in NEEDED.items() if importlib.util.find_spec(module) is not None]
INTERPRETED = "triton" in KERNELS and os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="module")
def counted():
    """{provider: its record} of one layer with dropout, two times, of an imitation step and of a weight distance; then
    calls alone, of a layer and of three without dropout; and all of three layers."""
    if importlib.util.find_spec("peft") is None:  # not imported: that takes seconds, and would not be used here
        pytest.skip("peft is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [{record["provider"]: record for record in records} for records in json.loads(done.stdout)]


def test_everybody_is_in_the_table(counted):
    ours = ("PEFT accelerated", "LowRankLinear", "Aurora", "Aurora, one of three")
    expected = {f"{name}, {backend}" for name in ours for backend in ("torch", *KERNELS)}
    assert counted[0].keys() == {"frozen linear", "PEFT"} | expected
    asked = zip(counted, ("PEFT", "PEFT", "authors' formula", "authors' formula"), (10, 10, 6, 10))
    for records, against, columns in asked:
        record = {"title": "", "against": against, "results": list(records.values()), "absent": {"cuda": "why"}}
        shown = host.table(record)
        assert shown.notes == ["cuda: why"] and all(len(row) == len(shown.headers) == columns for row in shown.rows)
        assert not any(host.NOTHING in row for row in shown.rows)


def test_calls_repeat(counted):
    for kind in ("forward_calls", "step_calls", "kernels"):
        first, second = ({name: record[kind] for name, record in records.items()} for records in counted[:2])
        assert first == second
    assert all(0 < record["forward_calls"] < record["step_calls"] for record in counted[0].values())


def test_launches_are_the_kernels_of_the_backend(counted):
    endings = {"triton": "_kernel", "cuda": ("_fwd", "_bwd")}
    measured = counted[:4]
    assert all({record["backend"] for record in records.values()} == {None, "torch", *KERNELS} for records in measured)
    for record in (record for records in measured for record in records.values()):
        ending = endings.get(record["backend"])
        assert bool(record["kernels"]) == bool(record["launches"]) == (ending is not None), record
        assert all(name.endswith(ending) for name in record["kernels"])


def test_three_layers_in_a_group_are_one_call(counted):
    """Each kernel is launched once, where three layers launch theirs three times."""
    one, three = counted[0], counted[6]
    alone = [name for name in one if "one of three" not in name]
    together = {name: name.replace(" in a group", "") for name in three if " in a group" in name}
    assert three.keys() == {*alone, *together} and {*together.values()} == {name for name in alone if ", " in name}
    for name, by_themselves in together.items():
        group, others = three[name]["kernels"], three[by_themselves]["kernels"]
        if not name.endswith("torch"):
            assert 0 < sum(group.values()) <= sum(others.values()) / 3 and set(group.values()) == {1}
        assert three[name]["step_calls"] > three[name]["forward_calls"] > 0


@pytest.mark.parametrize("name", BUDGETS)
def test_a_warm_forward_stays_within_its_budget(name, counted):
    if name.rpartition(", ")[2] not in ("torch", *KERNELS):
        pytest.skip("this backend is not built here")
    for p, records in ((0.0, counted[4]), (0.1, counted[0])):
        most = BUDGETS[name] if BUDGETS[name] != "PEFT" else records["PEFT"]["forward_calls"]
        assert records[name]["forward_calls"] <= most, f"p = {p}"


@pytest.mark.parametrize("name", BUDGETS_IN_GROUPS)
def test_a_warm_forward_of_a_group_stays_within_its_budget(name, counted):
    if name.rpartition(", ")[2] not in KERNELS:
        pytest.skip("this backend is not built here")
    for p, records in ((0.0, counted[5]), (0.1, counted[6])):
        calls, by_themselves = records[name]["forward_calls"], records[name.replace(" in a group", "")]["forward_calls"]
        assert calls <= min(BUDGETS_IN_GROUPS[name] * records["PEFT"]["forward_calls"], by_themselves), f"p = {p}"


@pytest.mark.parametrize("backend", KERNELS)
def test_a_warm_call_for_many_matrices_stays_within_its_budget(backend, counted):
    if "cuda" not in KERNELS:
        pytest.skip("the look at many tensors is a call for each where nothing is compiled")
    step, distance = (records[f"ours, {backend}"] for records in counted[2:4])
    assert step["step_calls"] <= BUDGET_OF_MANY and distance["step_calls"] <= BUDGET_OF_MANY


# ---- without another process -----------------------------------------------------------------------------------------


def test_what_is_measured_is_shown_and_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(host, "interpreted", lambda: False)
    monkeypatch.setattr(host, "stage", lambda device: nullcontext(lambda step: Counter()))
    monkeypatch.setattr(host, "absent", lambda: {"PEFT": "not looked for"})
    tables = [(f"{question} of nobody else", "PEFT", host.providers(0.0, 1, [])) for question in host.QUESTIONS]
    monkeypatch.setattr(host, "asked", lambda questions, device: tables if questions == host.QUESTIONS else [])
    assert bench.main(["--host", "--device", "cpu", "--quick", "--save", str(tmp_path / "host.json")]) == 0
    saved, shown = json.loads((tmp_path / "host.json").read_text())["host"], capsys.readouterr().out
    assert [each["title"] for each in saved] == [title for title, *_ in tables]
    assert all(str(host.table(each)) in shown for each in saved)


def test_calls_are_those_of_python_and_of_c():
    def inner():
        return abs(-1)

    def outer():
        return inner(), len([])

    before = sys.getprofile()
    assert host.counted_calls(outer) == 4 and sys.getprofile() is before
    seen = iter([*range(host.WARM)])
    with pytest.raises(StopIteration):
        host.counted_calls(lambda: next(seen))
    assert sys.getprofile() is before


def test_the_interpreter_is_left_behind(monkeypatch):
    started = []

    def start(command, env):
        started.append((command, env))
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(host.subprocess, "run", start)
    assert bench.main(["--host", "layer", "--device", "cpu"]) == 7
    ((command, env),) = started
    assert command[-4:] == ["--host", "layer", "--device", "cpu"] and "TRITON_INTERPRET" not in env
    if INTERPRETED:
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), launching_nothing():
            pass


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--host layers", "--host: got 'layers' (nearest: layer)"),
        ("lowrank_linear --host", "--host: goes with quick, device, rounds, threads, save, not with op"),
        ("--host --plot folder", "not with plot"),
    ],
)
def test_what_makes_no_sense(arguments, told, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments.split())
    assert told in capsys.readouterr().err
