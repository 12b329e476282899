"""`python -m peft_kernels.benchmarks.gpu`: its parts run dry, and what the command makes of what they find."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from peft_kernels.benchmarks import runner, tables
from peft_kernels.benchmarks.__main__ import BENCHES
from peft_kernels.benchmarks.gpu import __main__ as gpu
from peft_kernels.benchmarks.gpu import parts as gpu_parts
from peft_kernels.benchmarks.gpu import work as gpu_work

CPU = torch.device("cpu")


def one(folder):
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


# ---- every part, dry -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)  # seven processes that import torch
def test_dry(tmp_path, capsys):
    status = gpu.main(["--dry", "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert status == 0, told + (tmp_path / "log.txt").read_text()[-5000:]
    content = one(tmp_path)
    assert list(content["parts"]) == list(gpu_parts.PARTS) and all(part["ok"] for part in content["parts"].values())
    assert content["kind"] == "dry"  # `tables` refuses it
    assert content["tests"]["complete"] and content["tests"]["counts"]["passed"] >= 10
    backends = {(record["op"], record["backend"]) for record in content["numerics"] if "ratio" in record}
    assert backends == {(op, backend) for op in gpu_work.SMALL for backend in ("torch", "triton")}
    assert {record["op"] for record in content["numerics"] if "absent" in record} == set(gpu_work.SMALL)  # cuda
    assert {case["op"] for case in content["cases"]} == set(gpu_work.SMALL)
    assert {record["op"] for record in content["search"]} == set(gpu_work.SMALL)
    assert all(record["tried"] == 1 for record in content["search"])
    assert {record["op"] for record in content["profile"]} == set(gpu_parts.KERNELS)
    assert all(record["kernels"][0]["us"] > 0 for record in content["profile"])
    assert content["steps"] and {step["model"] for step in content["steps"]} == {"blip", "vilt"}
    assert "absent" in content["parts"]["sanitizer"]["told"]


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(monkeypatch):
    """Three parts that say that they ran."""
    ran = []

    def part(name, *result, error=None):
        def call(run):
            ran.append((name, run.deadline))
            if error:
                raise error
            return result or (True, f"{name} is well", {name: len(ran)})

        return call

    made = {
        "one": (part("one"), 10),
        "two": (part("two", error=gpu_parts.NotHere("no such tool")), 20),
        "three": (part("three"), 30),
    }
    monkeypatch.setattr(gpu, "PARTS", made)
    return SimpleNamespace(ran=ran, made=made, part=part, names=lambda: [name for name, _ in ran])


def dry(tmp_path, *arguments):
    return gpu.main(["--dry", "--out", str(tmp_path), *arguments])


def test_what_is_there_is_not_run_again_unless_named(tmp_path, parts, capsys):
    assert dry(tmp_path) == 0 and parts.names() == ["one", "two", "three"]
    assert dry(tmp_path) == 0 and len(parts.ran) == 3
    assert dry(tmp_path, "three", "one") == 0 and parts.names()[3:] == ["one", "three"]
    content = one(tmp_path)
    assert content["one"] == 4 and content["three"] == 5 and content["parts"]["two"]["told"] == "absent: no such tool"
    assert "three is well" in capsys.readouterr().out


def test_another_commit_begins_anew(tmp_path, parts, monkeypatch, capsys):
    dry(tmp_path, "one")
    monkeypatch.setattr(tables, "_commit", lambda: "another")
    dry(tmp_path, "three")
    assert list(one(tmp_path)["parts"]) == ["three"] and "begun anew" in capsys.readouterr().out


def test_a_part_that_breaks_or_fails_takes_no_other_with_it(tmp_path, parts, capsys):
    parts.made["one"] = (parts.part("one", error=RuntimeError("boom")), 10)
    parts.made["two"] = (parts.part("two", False, "two is wrong", {}), 10)
    assert dry(tmp_path) == 1 and parts.names() == ["one", "two", "three"]
    told = one(tmp_path)["parts"]
    assert told["one"]["told"] == "RuntimeError: boom" and [p["ok"] for p in told.values()] == [False, False, True]
    assert "LOOK" in capsys.readouterr().out


def test_time_is_shared(tmp_path, parts):
    """A part may take its own time and what is left over, never what later ones need; named ones may take all."""
    begin = time.monotonic()
    dry(tmp_path, "--seconds", "100")
    deadlines = [deadline - begin for _, deadline in parts.ran]
    assert deadlines == pytest.approx([50, 70, 100], abs=2)
    dry(tmp_path, "one", "--seconds", "100")
    assert parts.ran[-1][1] - time.monotonic() == pytest.approx(100, abs=2)
    dry(tmp_path, "one", "--seconds", "0")
    assert len(parts.ran) == 4 and one(tmp_path)["parts"]["one"] == {
        "ok": False,
        "told": "not run: time was up",
        "seconds": 0.0,
    }


def test_bad_arguments(tmp_path, parts, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        dry(tmp_path, "four")
    assert "expected some of one, two, three; got four" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "x")]) == 2 and not (tmp_path / "x").exists()
    assert "no GPU" in capsys.readouterr().err and not parts.ran


# ---- processes and their output --------------------------------------------------------------------------------------


def test_a_process_ends_at_its_deadline_with_all_it_started(tmp_path):
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    run = gpu_parts.Run(tmp_path, dry=True, deadline=time.monotonic() + 3)
    begin = time.monotonic()
    status, text = run.call([sys.executable, "-c", code])
    assert status is None and text == "begun\n" and time.monotonic() - begin < 20
    assert "exit status None" in (tmp_path / "log.txt").read_text()
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert not any(line.endswith(child) for line in left.splitlines())


def test_what_was_found_before_the_deadline_is_kept(tmp_path, monkeypatch):
    code = "import sys, time; open(sys.argv[3], 'w').write('[1]'); time.sleep(60)"
    monkeypatch.setattr(gpu_parts, "WORK", (sys.executable, "-c", code))
    run = gpu_parts.Run(tmp_path, dry=True, deadline=time.monotonic() + 2)
    assert run.work("measure")[:2] == (None, [1])


def test_operations_share_a_part(tmp_path):
    deadline = time.monotonic() + 80
    found = [(ops, run.deadline - deadline) for run, ops in gpu_parts.Run(tmp_path, False, deadline).groups()]
    assert [ops for ops, _ in found] == [(op,) for op in gpu_parts.VALUE]
    assert [left for _, left in found] == pytest.approx([-40, -30, -20, -10, 0], abs=1)


@pytest.mark.parametrize("workers", [True, False])
def test_reading_pytest(workers):
    lines = [
        "tests/a.py::test_x[1-2] PASSED [ 10%]",
        "tests/a.py::test_y FAILED [ 50%]",
        "tests/b.py::t SKIPPED (no) [ 60%]",
    ]
    if workers:
        lines = [
            "[gw0] [  1%] PASSED tests/a.py::test_x[1-2] ",
            "[gw11] [100%] FAILED tests/a.py::test_y ",
            "[gw1] [ 60%] SKIPPED tests/b.py::t ",
        ]
    ok, told, found = gpu_parts.told_by_pytest(
        [1], "\n".join(["== test session ==", *lines, "FAILED tests/a.py::test_y - x"])
    )
    assert not ok and told == "1 failed, 1 passed, 1 skipped; exit status 1"
    assert found["tests"]["failed"] == ["tests/a.py::test_y"] and found["tests"]["complete"]
    ok, told, found = gpu_parts.told_by_pytest([0, None], lines[0])
    assert not ok and told == "1 passed; time was up" and not found["tests"]["complete"]
    assert gpu_parts.told_by_pytest([0], lines[0])[0] and not gpu_parts.told_by_pytest([0], "")[0]


def test_reading_nsight_compute():
    heading = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    rows = [
        '"0","7","up_bwd","gpu__time_duration.sum","ns","12,345"',
        '"0","7","up_bwd","launch__registers_per_thread","register/thread","128"',
        '"1","7","sum","gpu__time_duration.sum","us","1.5"',
        '"1","7","sum","something_else","","3"',
    ]
    found = gpu_parts.counters("\n".join(["==PROF== Connected", heading, *rows]))
    assert [(row["kernel"], row["ns"], row["unit"]["ns"]) for row in found] == [
        ("up_bwd", 12345.0, "ns"),
        ("sum", 1.5, "us"),
    ]
    assert found[0]["registers"] == 128 and gpu_parts.counters("==ERROR== no permission") == []


@pytest.mark.parametrize("why", ["absent: no peft", "wrong: y is off"])
def test_a_wrong_provider_is_a_finding(why, tmp_path, monkeypatch):
    record = {"op": "reconstruct", "absent": {"PEFT": why}}
    monkeypatch.setattr(gpu_parts.Run, "work", lambda *_: (0, [record], ""))
    ok, told, found = gpu_parts.bench(gpu_parts.Run(tmp_path, dry=True))
    assert found == {"cases": [record]} and ok == why.startswith("absent")
    assert told == ("1 cases, 0 wrong" if ok else "1 cases, 1 wrong\n  reconstruct, PEFT: wrong: y is off")


RAN = [{"op": op, "ratio": 1.0} for op in gpu_parts.VALUE]
ABSENT = [*RAN[1:], {"op": RAN[0]["op"], "absent": "no extension"}]


@pytest.mark.parametrize(
    ("status", "records", "text", "told"),
    [
        (0, RAN, "========= ERROR SUMMARY: 0 errors", "0 errors"),
        (0, RAN, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "0 hazards displayed"),
        (99, RAN, "========= ERROR SUMMARY: 3 errors", "exit status 99, 3 errors"),
        (1, RAN, "========= ERROR SUMMARY: 0 errors", "exit status 1, 0 errors"),  # a wrong result
        (None, RAN, "", "time was up"),
        (0, ABSENT, "========= ERROR SUMMARY: 0 errors", "nothing ran of lowrank_linear; no extension"),
        (0, [], "========= ERROR SUMMARY: 0 errors", "nothing ran of lowrank_linear, weight_distance"),
        (0, RAN, "", "no summary"),
    ],
)
def test_reading_compute_sanitizer(status, records, text, told):
    """It has nothing to find where no kernel ran."""
    assert gpu_parts.told_by_sanitizer(status, records, text).startswith(told)


@pytest.mark.parametrize("bad", [None, "memcheck", "racecheck"])
def test_the_sanitizer_s_word_counts(bad, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_parts.shutil, "which", lambda name: name)
    calls = {}

    def work(run, kind, *options, under, **environment):
        calls[under[2]] = run.deadline - time.monotonic(), environment
        return 99 if under[2] == bad else 0, RAN, "========= ERROR SUMMARY: 0 errors"

    monkeypatch.setattr(gpu_parts.Run, "work", work)
    ok, told, _ = gpu_parts.sanitizer(gpu_parts.Run(tmp_path, dry=False, deadline=time.monotonic() + 60))
    assert ok == (bad is None) and ("exit status 99" in told) != ok
    assert (
        [round(left, -1) for left, _ in calls.values()] == [30, 60]
        and calls["memcheck"][1]
        and not calls["racecheck"][1]
    )


def test_a_backend_of_which_nothing_ran_is_a_finding(tmp_path, monkeypatch):
    records = [{"op": op, "backend": b, "ratio": 1.0} for op in gpu_parts.VALUE for b in ("torch", "triton", "cuda")]
    monkeypatch.setattr(gpu_parts.Run, "work", lambda *_: (0, records, ""))
    assert gpu_parts.numerics(gpu_parts.Run(tmp_path, dry=False))[0]
    records[-1] = {"op": gpu_parts.VALUE[-1], "backend": "cuda", "absent": "no extension"}
    ok, told, _ = gpu_parts.numerics(gpu_parts.Run(tmp_path, dry=False))
    assert not ok and told.endswith(f"nothing of {gpu_parts.VALUE[-1]} cuda")


# ---- the work --------------------------------------------------------------------------------------------------------


def work(tmp_path, **given):
    usual = {"ops": ["reconstruct"], "dtypes": ["float32"], "backends": ["torch"], "small": True}
    return gpu_work.Work(tmp_path / "x.json", CPU, **usual | given)


def test_a_wrong_result_is_recorded_and_the_exit_status_says_so(tmp_path, monkeypatch, capsys):
    (bench,) = (each for each in BENCHES if each.op == "reconstruct")
    right = bench.providers["ours, torch"]

    def build(case, t):
        built = right.build(case, t)
        return built._replace(forward=lambda x: built.forward(x) * (1 + 1e-3))

    monkeypatch.setitem(bench.providers, "ours, torch", runner.Provider(build, right.design, "torch"))
    options = ["numerics", "--save", str(tmp_path / "x.json"), "--small", "--device", "cpu", "--op", "reconstruct"]
    assert gpu_work.main([*options, "--dtype", "float32", "--backend", "torch"]) == 1
    records = json.loads((tmp_path / "x.json").read_text())
    assert records and all("ours, torch" in record["wrong"] for record in records)


def test_errors_are_told_beside_torch_s(tmp_path):
    done = work(tmp_path)
    gpu_work.numerics(done)
    assert done.records == json.loads(done.save.read_text()) and len(done.records) <= gpu_work.MOST
    for record in done.records:
        eps = torch.finfo(torch.float32).eps
        assert record["ratio"] == pytest.approx(record["error"] / (record["torch_error"] + eps / 4)) and record["worst"]
