"""How the steps of `python -m peft_kernels.benchmarks.gpu` start processes: deadlines, faults, and what is kept."""

import json
import subprocess
import sys
import time
from functools import partial

import pytest

from peft_kernels.benchmarks.gpu import process
from peft_kernels.benchmarks.gpu.process import Run

CHILD = "import time; time.sleep(600)"


def run_of(tmp_path, seconds=60.0, **given):
    content = {"device": "none", "date": "2026-01-01", **given}
    return Run(tmp_path, "truth", dry=True, content=content, deadline=time.monotonic() + seconds)


def python(code, *arguments):
    return [sys.executable, "-c", code, *arguments]


def test_a_process_ends_at_its_deadline_with_all_it_started(tmp_path):
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {CHILD!r}])"
    run, begin = run_of(tmp_path, 4), time.monotonic()
    status, text = run.call(python(code))
    assert status is None and text == "begun" and time.monotonic() - begin < 300  # on a busy machine, too
    assert "exit status None" in (tmp_path / "truth.log").read_text() and len(run.cut_short) == 1
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert not any(line.endswith(CHILD) for line in left.splitlines())


@pytest.mark.parametrize("status", [0, 3])
def test_a_process_that_ended_is_not_waited_for_because_of_what_it_left(tmp_path, status):
    """A compiler's worker in a session of its own may keep the output open."""
    code = f"""
import os, subprocess, sys
left = subprocess.Popen([sys.executable, "-c", {CHILD!r}], start_new_session=True)
print(left.pid, flush=True)
os._exit({status})
"""
    begin = time.monotonic()
    found, text = run_of(tmp_path).call(python(code))
    subprocess.run(["kill", text])
    assert found == status and time.monotonic() - begin < 300


def test_records_are_kept_as_they_come(tmp_path):
    """Whatever then happens to the process, or to the run."""
    lines = [process.line_of({"n": n}) for n in range(3)]
    code = f"import os; print('dots..' + {lines[0]!r}); print('other'); print({lines[1]!r}); print({lines[2][:-1]!r})"
    run, seen = run_of(tmp_path), []

    def found(record):
        run.keep("records", record)
        seen.append(json.loads(run.file.read_text())["records"])

    assert run.call(python(code + "; os.abort()"), found)[0] == -6
    assert seen == [[{"n": 0}], [{"n": 0}, {"n": 1}]]  # half a record is none


WORKER = """
import os, sys
for case in range(int(sys.argv[sys.argv.index("--from") + 1]), 4):
    print('record {"begun": %d, "of": 4}' % case, flush=True)
    if str(case) in FAULTS:
        os.kill(os.getpid(), 11)
    print('record {"case": %d}' % case, flush=True)
"""


@pytest.mark.parametrize(("faults", "kept"), [("", [0, 1, 2, 3]), ("1", [0, 2, 3]), ("03", [1, 2]), ("0123", [])])
def test_a_fault_takes_one_case_with_it(tmp_path, monkeypatch, faults, kept):
    """Another process goes on behind the one that was begun."""
    (tmp_path / "worker.py").write_text(WORKER.replace("FAULTS", repr(faults)))
    monkeypatch.setattr(process, "PYTHON", (sys.executable,))
    run = run_of(tmp_path)
    run.worker = tmp_path / "worker.py"
    status, records, _ = run.work("numerics", "records")
    assert [record["case"] for record in records] == kept and run.content.get("records", []) == records
    assert status == (-11 if faults else 0)


def test_a_worker_that_does_not_begin_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "PYTHON", (sys.executable, "-c", "print('no'); raise SystemExit(1)"))
    assert run_of(tmp_path).work("numerics", "records")[::2] == (1, "no")


def test_together_is_at_once_and_in_turn_shares_what_is_left(tmp_path):
    meet = """
import os, sys, time
open(os.path.join(sys.argv[1], sys.argv[2]), "w").close()
while len(os.listdir(sys.argv[1])) < 4:
    time.sleep(0.05)
"""
    (tmp_path / "place").mkdir()
    run = run_of(tmp_path)
    calls = [partial(run.call, python(meet, str(tmp_path / "place"), str(n))) for n in range(4)]
    assert run.together(calls) == [(0, "")] * 4  # one after the other they would never meet
    run, shares = run_of(tmp_path, 3600), []
    for turn, (name,) in run.in_turn([("a",), ("b",), ("c",)]):
        shares.append((name, turn.left / run.left))
    assert [name for name, _ in shares] == ["a", "b", "c"]
    assert [share for _, share in shares] == pytest.approx([2 / 4, 2 / 3, 1], abs=0.05)


def test_the_log_keeps_the_begin_and_the_end(tmp_path):
    run_of(tmp_path).call(python("print('first'); print('x' * 10**6); print('last')"))
    text = (tmp_path / "truth.log").read_text()
    assert len(text) < 1.1 * process.KEPT and "first" in text and "last" in text


def test_operations_go_apart_on_a_gpu():
    assert Run(None, "truth", dry=False).groups() == [(op,) for op in process.OPS]
    assert Run(None, "truth", dry=True).groups() == [process.OPS]
    assert Run(None, "speed", dry=True).groups() == [process.OPS[:1]]
