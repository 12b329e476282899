"""Whole training steps: what a GPU adds, tried on a CPU, and that what cannot be measured is named or refused."""

import contextlib
import dataclasses
import importlib.util
import json

import pytest
import torch

from peft_kernels.benchmarks import steps, steps_methods, steps_session, timing
from peft_kernels.benchmarks.cases import WrongResult
from peft_kernels.benchmarks.steps_methods import FULL, LORA, PEFT
from peft_kernels.benchmarks.steps_models import SIZES

CPU, TINY = torch.device("cpu"), SIZES["tiny"]
OPTIONS = steps_session.Options(CPU, "tiny", rounds=1)


# ---- on a GPU: everything but the clocks, on the CPU ----------------------------------------------------------------


class _Gpu:
    type = "cuda"


class _Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def session(monkeypatch):
    """A capture executes nothing, a replay is a step."""

    def capture(self):
        self.run, self.captured = lambda: self.step(), True

    held = iter([100, 350] * 9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(held))
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(steps_methods.Training, "capture", capture)
    monkeypatch.setattr(timing, "peak_bytes", lambda step, device: (step(), 11))
    monkeypatch.setattr(timing, "time_on_gpu", lambda step, copies: timing.Times.of([step(0).item()] * copies))
    monkeypatch.setattr(timing, "count_launches", lambda step: step() and 7)
    monkeypatch.setattr(timing, "fault", lambda device: None)
    found = steps_session.Session(dataclasses.replace(OPTIONS, dropout=0.0), [])
    found.model("vilt")  # on the CPU
    found.options = dataclasses.replace(found.options, device=_Gpu(), batch=2)
    return found


def measured(session, *each):
    return session.time([session.begin(*each)])[0]


def test_a_graph_is_captured_and_counted_as_eager_steps_are(session):
    graph, eager = (measured(session, "vilt", LORA, mode) for mode in ("graph", "eager"))
    assert eager["losses"] == graph["losses"] and len(graph["losses"]) == steps_session.COMPARED
    assert eager["peak_bytes"] == graph["peak_bytes"] == 250 + 11
    assert (eager["launches"], graph["launches"]) == (7, None) and graph["ms"] > 0


def test_a_graph_is_compared_with_eager_steps_before_it_is_timed(session, monkeypatch):
    """As graphs come first: those steps are taken for that alone, and once."""
    began, begin = [], steps_session.begin
    monkeypatch.setattr(steps_session, "begin", lambda mode, *rest: began.append(mode) or begin(mode, *rest))
    graph = measured(session, "vilt", FULL, "graph")
    expected = session.losses["vilt", FULL]
    assert graph["expect_s"] > 1e-3 and graph["losses"] == expected and expected is not graph["losses"]
    capture = steps_methods.Training.capture

    def backwards(self):
        capture(self)
        self.lr.neg_()

    monkeypatch.setattr(steps_methods.Training, "capture", backwards)
    monkeypatch.setattr(timing, "time_on_gpu", lambda *_: pytest.fail("timed"))
    with pytest.raises(WrongResult, match=r"^the loss of step \d is"):
        measured(session, "vilt", FULL, "graph")
    assert began == ["graph", "graph"] and session.losses["vilt", FULL] is expected


def test_what_fails_on_a_gpu_is_named_with_its_reason(session, monkeypatch):
    def capture(self):
        raise RuntimeError("\noperation not permitted\nwhen a stream is capturing")

    monkeypatch.setattr(steps_methods.Training, "capture", capture)
    with pytest.raises(steps_session.Absent, match=r"^operation not permitted$"):
        measured(session, "vilt", FULL, "graph")

    def step(self):
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(steps_methods.Training, "step", step)
    with pytest.raises(steps_session.Absent, match="out of memory"):
        measured(session, "vilt", FULL, "eager")

    def mistake(self):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(steps_methods.Training, "step", mistake)
    with pytest.raises(RuntimeError, match="a mistake"):
        measured(session, "vilt", FULL, "eager")


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_a_fault_is_told_and_ends_the_run(mode, session, monkeypatch):
    """Nothing else that was asked for runs; what was measured before is there, and was saved."""
    times, faults, told = timing.time_on_gpu, [], []

    def time_on_gpu(step, copies):
        if len(told) == 2:  # before the first, and after it
            faults.append("CUDA error: an illegal memory access was encountered")
            raise torch.AcceleratorError(faults[0])
        return times(step, copies)

    monkeypatch.setattr(timing, "time_on_gpu", time_on_gpu)
    monkeypatch.setattr(timing, "fault", lambda device: faults[0] if faults else None)
    monkeypatch.setattr(steps, "Session", lambda options, methods: session)
    run = {}
    with pytest.raises(WrongResult, match=r"^vilt, full tuning, .* faulted the device: CUDA error"):
        steps.measure(
            run, session.options, ["vilt"], [LORA, FULL, PEFT], [mode], lambda: told.append(len(run["steps"]))
        )
    assert told == [0, 1] and [r["method"] for r in run["steps"]] == [LORA]
    assert [each["method"] for each in run["absent_steps"]] == [FULL, PEFT]
    assert all("full tuning" in each["reason"] and "illegal" in each["reason"] for each in run["absent_steps"])


# ---- what is left out, and what is refused --------------------------------------------------------------------------


class _Listed:
    """A session that measures nothing."""

    def __init__(self, options, methods):
        pass

    def begin(self, model, method, mode):
        raise steps_session.Absent("not now")


def test_a_run_that_is_killed_has_named_what_it_owes(monkeypatch):
    monkeypatch.setattr(steps, "Session", _Listed)
    run, told = {}, []
    asked = {"methods": [FULL, LORA, FULL], "modes": ["compiled", "eager"]}
    steps.measure(run, OPTIONS, **asked, report=lambda: told.append(json.dumps(run)))
    first, last = (json.loads(text)["absent_steps"] for text in (told[0], told[-1]))
    order = [(FULL, "eager"), (LORA, "eager"), (FULL, "compiled"), (LORA, "compiled")]
    assert steps.MODES[0] == "graph" and len(told) == 1 + 2 + 4  # eagerly all methods of a model take turns
    assert [(each["method"], each["mode"]) for each in first[::2]] == order  # of both models
    assert {each["reason"] for each in first} == {"the run ended before"}
    assert [each["reason"] for each in last] == ["not now"] * 8


def test_time_is_kept():
    run = {}
    steps.measure(run, dataclasses.replace(OPTIONS, seconds=1e-9), ["vilt", "blip"], [FULL], ["eager"])
    assert [r["model"] for r in run["steps"]] == ["vilt"]
    assert [each["reason"] for each in run["absent_steps"]] == ["1e-09 seconds had passed"]


@pytest.mark.parametrize(("missing", "left"), [("peft", [LORA]), ("transformers", None)])
def test_what_is_not_installed_is_named(monkeypatch, missing, left):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    monkeypatch.setattr(steps, "Session", _Listed)
    run = {}
    steps.measure(run, OPTIONS, ["blip"], [PEFT, LORA], ["eager"])
    assert f"{missing}" in run["absent_steps"][0]["reason"] and run["absent_steps"][0]["mode"] is None
    assert run["absent_steps"][0]["method"] == (PEFT if missing == "peft" else None)
    assert [each["method"] for each in run["absent_steps"][1:]] == (left or [])
    assert "is not installed" in steps.steps_table(run)


@pytest.mark.parametrize("names", [{"models": ["blip", "clip"]}, {"methods": ["moil"]}, {"modes": ["fast"]}], ids=str)
def test_unknown_names_are_refused_before_anything_is_built(monkeypatch, names):
    monkeypatch.setattr(steps, "Session", lambda *_: pytest.fail("built"))
    with pytest.raises(ValueError, match=r"expected one of \(.*\), got"):
        steps.measure({}, OPTIONS, **names)


@pytest.mark.parametrize(
    ("name", "value"),
    [("size", "huge"), ("dtype", "float16"), ("batch", 0), ("rounds", -1), ("seconds", 0), ("dropout", 1.0)],
)
def test_unfit_options_are_refused(name, value, capsys):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        dataclasses.replace(OPTIONS, **{name: value})
    with pytest.raises(SystemExit):
        steps.main([f"--{name}", str(value)])
    assert name in capsys.readouterr().err
