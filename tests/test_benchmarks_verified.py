"""How whole runs of the tests ended: their files, README's table of them, and who writes them."""

import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
from measured_cases import device_of

from peft_kernels.benchmarks import verified

ROOT = Path(__file__).resolve().parents[1]
RUN = {"kind": "cpu", "device": "a processor", "commit": "0123456789ab", "sources": "abc", "date": "2026-03-04"}
VERSIONS = {"torch": "2.14.1", "triton": "3.8.0", "python": "3.11.7"}
FILE = "cpu-torch-2.14.1-triton-3.8.0-python-3.11.7.json"


@pytest.fixture
def run(monkeypatch):
    """What the next run is said to be, to be changed."""
    run = {**RUN, "versions": {**VERSIONS}}
    monkeypatch.setattr(verified, "provenance", lambda device: {**run, "cases": []})
    return run


def counts(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())["counts"]


def test_both_parts_of_a_run_are_one_file(run, tmp_path):
    folder = tmp_path / "tests"  # made with the first file
    assert verified.record("tests", {"passed": 8, "skipped": 2, "deselected": 3, "": 20}, folder) == folder / FILE
    verified.record("static", {"passed": 1, "failed": 1}, folder)
    assert verified.load(folder) == [
        {**run, "counts": {"tests": {"passed": 8, "skipped": 2}, "static": {"passed": 1, "failed": 1}}}
    ]


@pytest.mark.parametrize("key", ["commit", "sources", "device"])
def test_other_run_s_part_is_not_kept(key, run, tmp_path):
    verified.record("tests", {"passed": 8}, tmp_path)
    run[key] = "another"
    verified.record("static", {"passed": 1}, tmp_path)
    assert counts(tmp_path) == {"static": {"passed": 1}}


def test_same_part_is_replaced(run, tmp_path):
    for passed in (7, 8):
        verified.record("tests", {"passed": passed}, tmp_path)
    assert counts(tmp_path) == {"tests": {"passed": 8}}


def test_other_versions_have_another_file(run, tmp_path):
    verified.record("tests", {"passed": 8}, tmp_path)
    del run["versions"]["triton"]
    verified.record("tests", {"passed": 7}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {FILE, FILE.replace("3.8.0", "none")}


def test_unknown_part_is_refused(tmp_path):
    with pytest.raises(ValueError, match="part: expected one of tests, static, got 'lint'"):
        verified.record("lint", {}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_table_has_every_run_and_says_what_did_not_run():
    whole = {**RUN, "versions": {**VERSIONS, "torch": "2.9.1"}, "counts": {"tests": {"passed": 4321, "skipped": 2}}}
    whole["counts"]["static"] = {"passed": 9}
    half = {**RUN, "versions": VERSIONS, "counts": {"tests": {"failed": 1}}}
    gpu = device_of(versions={**VERSIONS, "torch": "2.11.0"}, tests={"counts": {"passed": 5}, "complete": True})
    heads, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in verified.table([whole, half], [gpu]).splitlines()
    )
    assert heads == ["torch", "triton", "Python", "what ran"]
    place = "on a CPU, 2026-03-04, commit 0123456789ab"
    assert rows == [
        ["2.14.1", "3.8.0", "3.11.7", f"`make test`, {place}: 1 failed; static checks: not run"],
        ["2.11.0", "3.8.0", "3.11.7", "the operations' tests, NVIDIA Test, 2026-03-04, commit c: 5 passed"],
        ["2.9.1", "3.8.0", "3.11.7", f"`make test`, {place}: 4,321 passed, 2 skipped; static checks: 9 passed"],
    ]
    assert verified.table([], [device_of()]) == ""


# ---- who writes them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exitstatus", pytest.ExitCode)
@pytest.mark.parametrize("part", ["tests", None])
def test_pytest_records_runs_that_came_to_their_end(part, exitstatus, run, tmp_path, monkeypatch):
    record = verified.record
    monkeypatch.setattr(verified, "record", lambda part, counts: record(part, counts, tmp_path))
    reporter = SimpleNamespace(stats={"passed": ["a", "b"], "failed": ["c"], "": [1]}, write_line=print)
    conftest.pytest_terminal_summary(reporter, exitstatus, SimpleNamespace(getoption={"--record": part}.get))
    recorded = [run["counts"] for run in verified.load(tmp_path)]
    ended = part and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    assert recorded == ([{"tests": {"passed": 2, "failed": 1}}] if ended else [])


def test_makefile_records_both_parts_and_whole_runs_only():
    def made(*arguments):
        inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "RECORD")}
        command = ["make", "-n", "tests", "static-ci", *arguments]
        return subprocess.run(command, cwd=ROOT, env=inherited, text=True, capture_output=True)

    assert set(re.findall(r"--record (\w+)", made("RECORD=1").stdout)) == set(verified.PARTS)
    assert "--record" not in made().stdout
    assert "RECORD=1 is for whole runs" in made("RECORD=1", "PYTEST_ARGS=-x").stderr


def test_committed_records_name_no_host_and_no_path():
    for path in verified.TESTS.glob("*.json"):
        assert {"versions", "commit", "date", "counts"} <= json.loads(path.read_text()).keys(), path.name
        assert not re.search(r'"[^"]*(?:/\w+){2}', path.read_text()), path.name
