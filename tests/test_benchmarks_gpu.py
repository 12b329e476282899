"""`python -m peft_kernels.benchmarks.gpu`: its three runs dry, and how the command shares time and keeps results."""

import json
import os
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch

from peft_kernels.benchmarks import results
from peft_kernels.benchmarks.gpu import __main__ as gpu
from peft_kernels.benchmarks.gpu import process
from peft_kernels.benchmarks.gpu import work as gpu_work


def one(folder, part="*"):
    (file,) = folder.glob(f"*-{part}.json")
    return json.loads(file.read_text())


# ---- every step, dry -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)  # beside other work; 30 s of one core alone
def test_dry(tmp_path, capsys):
    status = gpu.main(["--dry", "--out", str(tmp_path), "--seconds", "5000"])
    told = capsys.readouterr().out
    assert status == 0, told + "".join(path.read_text()[-3000:] for path in tmp_path.glob("*.log"))
    truth, speed, tuning = (one(tmp_path, part) for part in gpu.PARTS)
    for part, content in (("truth", truth), ("speed", speed), ("tuning", tuning)):
        assert list(content["ran"]) == [name for name, *_ in gpu.PARTS[part]]
        assert all(step["ok"] and step["whole"] for step in content["ran"].values())
        assert content["kind"] == "dry" and len(content["sources"]) == 12  # `tables` refuses it
    assert not (tmp_path / "steps.json").exists() and len(list(tmp_path.iterdir())) <= 6
    every = set(gpu_work.SMALL)

    compared = {(record["op"], record["backend"]) for record in truth["numerics"] if "ratio" in record}
    assert compared == {(op, backend) for op in every for backend in ("torch", "triton")}
    assert {record["op"] for record in truth["numerics"] if "absent" in record} == every  # CUDA's
    assert truth["tests"]["complete"] and truth["tests"]["counts"] == {"passed": 4}
    assert truth["tests"]["ran"] == {"triton on cpu": 4} and truth["tests"]["left_out"]
    assert truth["ran"]["sanitizer"]["told"].startswith("absent")

    profiled = {record["provider"] for record in speed["profile"] if record.get("us")}
    timed = {row["provider"] for case in speed["cases"] for row in case["results"]}
    assert profiled == timed and {"frozen linear", "PEFT", "ours, triton passes", "ours, triton fused"} <= timed
    assert [step["model"] for step in speed["steps"]] == ["vilt"]
    assert [record["state"] for record in tuning["inference"]] == ["base", "unmerged", "merged"]

    assert {record["op"] for record in tuning["search"]} == {"lowrank_linear"}
    compared = [record for record in tuning["variants"] if "ratio" in record]
    assert compared and all(record["ratio"] > 0 for record in compared)
    assert all("ratio" in record or record["absent"] == "changes nothing here" for record in tuning["variants"])
    assert tuning["cases"] and "not installed: unsloth, axolotl, LoRAFusion, chalk" in tuning["ran"]["peers"]["told"]


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch):
    """Three steps of one part that say that they ran; a part of one step beside it."""
    ran = []

    def step(name, *result, error=None, late=False):
        def call(run):
            ran.append((name, run.deadline))
            run.keep("cases", {"op": name, "results": [], "absent": {}})
            if late:
                run.cut_short.append("a command")
            if error:
                raise error
            return result or (True, f"{name} is well")

        return call

    made = {
        "one": (step("one"), 10, ()),
        "two": (step("two", error=process.NotHere("no such tool")), 20, ("cases",)),
        "three": (step("three"), 30, ()),
    }

    class Truth:  # as `made` is when it is asked for
        def __iter__(self):
            return iter([(name, *each) for name, each in made.items()])

    monkeypatch.setattr(gpu, "PARTS", {"truth": Truth(), "speed": [("a", step("a"), 9, ())]})
    return SimpleNamespace(ran=ran, made=made, step=step, names=lambda: [name for name, _ in ran])


def dry(tmp_path, *arguments):
    return gpu.main(["--dry", "--out", str(tmp_path), *arguments])


def test_what_is_there_whole_is_not_run_again(tmp_path, steps, capsys):
    steps.made["three"] = (steps.step("three", late=True), 30, ())
    assert dry(tmp_path, "truth") == 0 and steps.names() == ["one", "two", "three"]
    assert dry(tmp_path) == 0 and steps.names()[3:] == ["three", "a"]  # the one that time ran out for, and a new part
    content = one(tmp_path, "truth")
    assert content["ran"]["two"]["told"] == "absent: no such tool" and not content["ran"]["three"]["whole"]
    assert "three is well" in capsys.readouterr().out


@pytest.mark.parametrize("commit", [None, "0123456789ab", "0123456789ab+"])
def test_other_sources_begin_anew_whatever_the_commit_says(tmp_path, steps, monkeypatch, capsys, commit):
    monkeypatch.setattr(results, "_commit", lambda: commit)
    dry(tmp_path, "speed")
    dry(tmp_path, "speed")
    assert steps.names() == ["a"]
    monkeypatch.setattr(results, "sources", lambda: "another")
    dry(tmp_path, "speed")
    assert steps.names() == ["a", "a"] and "begun anew" in capsys.readouterr().out
    assert one(tmp_path)["sources"] == "another" and len(one(tmp_path)["cases"]) == 1


def test_a_step_that_breaks_or_fails_takes_no_other_with_it(tmp_path, steps, capsys):
    steps.made["one"] = (steps.step("one", error=RuntimeError("boom")), 10, ())
    steps.made["two"] = (steps.step("two", False, "two is wrong"), 10, ())
    assert dry(tmp_path, "truth") == 1 and steps.names() == ["one", "two", "three"]
    told = one(tmp_path)["ran"]
    assert told["one"]["told"] == "RuntimeError: boom" and [s["ok"] for s in told.values()] == [False, False, True]
    assert "LOOK" in capsys.readouterr().out


def test_what_was_found_is_there_while_a_step_runs(tmp_path, steps):
    def killed(run):
        run.keep("cases", {"op": "last", "results": [], "absent": {}})
        raise KeyboardInterrupt

    steps.made["two"] = (killed, 20, ())
    with pytest.raises(KeyboardInterrupt):
        dry(tmp_path, "truth")
    content = one(tmp_path)
    assert [case["op"] for case in content["cases"]] == ["one", "last"]
    assert content["ran"]["two"] == {"ok": False, "told": "the run ended before", "seconds": 0.0, "whole": False}


def test_time_is_shared(tmp_path, steps, monkeypatch):
    """A step may take its own time and what is left over, never what later ones need; installing counts."""
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: 1000.0, time=lambda: 5000.0))
    dry(tmp_path, "truth", "speed", "--seconds", "100", "--began", "4985")
    assert [deadline - 1000 for _, deadline in steps.ran] == [35, 55, 85, 100]
    dry(tmp_path / "again", "truth", "--seconds", "0")
    assert len(steps.ran) == 4
    none = {"ok": False, "told": "not run: time was up", "seconds": 0.0, "whole": False}
    assert list(one(tmp_path / "again")["ran"].values()) == [none] * 3


def test_bad_arguments(tmp_path, steps, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        dry(tmp_path, "four")
    assert "expected some of truth, speed; got four" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "x")]) == 2 and not (tmp_path / "x").exists()
    assert "no GPU" in capsys.readouterr().err and not steps.ran


FAKE = """#!/bin/sh
echo "cuda=$PEFT_KERNELS_CUDA archs=$PEFT_KERNELS_CUDA_ARCHS $*" >> "$CALLS"
case "$*" in
    *get_device_capability*) echo 90a ;;
    *"pip install"*) test "$PEFT_KERNELS_CUDA" = "$BUILDS" ;;
esac
"""


@pytest.mark.parametrize("builds", ["require", "off"])
def test_make_builds_for_this_gpu_and_goes_on_without_cuda(tmp_path, builds):
    """With a Python that only says what it was called with."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(FAKE)
    python.chmod(0o755)
    command = ["make", "gpu", f"PYTHON={python}", "PARTS=truth speed", f"OUT={tmp_path}"]
    settings = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    settings |= {"CALLS": str(calls), "BUILDS": builds}
    begin = int(time.time())
    assert subprocess.run(command, cwd=process.REPOSITORY, env=settings, capture_output=True).returncode == 0
    lines = calls.read_text().splitlines()
    tried = [line.split()[:2] for line in lines if "pip install" in line]
    assert tried == [["cuda=require", "archs=90a"], ["cuda=off", "archs="]][: 1 + (builds == "off")]
    assert lines[-1].endswith("truth speed") and f"--out {tmp_path}" in lines[-1]
    assert begin <= int(lines[-1].partition("--began ")[2].split()[0]) <= time.time()
