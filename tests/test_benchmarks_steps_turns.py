"""Whole training steps on a CPU: all methods of a model take turns, and what adapters add comes from their rounds."""

import json

import pytest
import torch

from peft_kernels.benchmarks import steps, steps_methods, steps_session, timing
from peft_kernels.benchmarks.steps_methods import ADDING, BY_NAME, LORA, METHODS
from peft_kernels.benchmarks.steps_models import MODELS
from peft_kernels.layers.adapted_linear import AdaptedLinear

FROZEN, PEFT_ALL, LORA_ALL = ADDING
CPU = torch.device("cpu")
OPTIONS = steps_session.Options(CPU, "tiny", rounds=1)


@pytest.fixture(scope="module")
def adding(tmp_path_factory):
    path = tmp_path_factory.mktemp("adding") / "cpu.json"
    where = ["--device", "cpu", "--size", "tiny", "--model", "vilt", "--rounds", "1", "--save", str(path)]
    steps.main(["--adds", "--method", LORA, "--dropout", "0.5", *where])
    return json.loads(path.read_text())


def test_what_adapters_add_is_asked_for_by_one_word(adding):
    asked = [(r["method"], r["dropout"]) for r in adding["steps"]]
    assert asked == [(LORA, 0.5), *((method, p) for p in (0.1, 0.0) for method in ADDING)]
    assert adding["absent_steps"] == []
    for p in (0.1, 0.0):
        frozen, theirs, ours = (r for r in adding["steps"] if r["dropout"] == p)
        assert ours["frozen_ms"] == theirs["frozen_ms"] == frozen["ms"] and "adds_ms" not in frozen
        assert frozen["trained"] < ours["trained"] == theirs["trained"] and frozen["peak_bytes"] < ours["peak_bytes"]
        assert PEFT_ALL in ours["speed_vs"]
        assert all(r["losses"] == sorted(r["losses"], reverse=True) for r in (frozen, theirs, ours))
    assert not {*BY_NAME} & {*METHODS}


def test_all_methods_of_a_model_take_turns_on_a_cpu(monkeypatch):
    def time_on_cpu(runs, rounds, warmup):
        timed.append((*runs,))
        assert all(run.__self__.lr == 0 for run in runs.values()) and (rounds, warmup) == (1, 0)
        return {name: timing.Times.of(samples[name]) for name in runs}

    timed, run = [], {}
    samples = {FROZEN: [1.0, 2.0, 6.0], PEFT_ALL: [5.0, 4.0, 13.0], LORA_ALL: [6.0, 9.0, 7.0]}
    monkeypatch.setattr(timing, "time_on_cpu", time_on_cpu)
    steps.measure(run, OPTIONS, methods=ADDING, modes=["eager"])
    assert timed == [ADDING, ADDING] and run["absent_steps"] == []
    assert [(r["model"], r["method"]) for r in run["steps"]] == [
        (model, method) for model in MODELS for method in ADDING
    ]
    frozen, theirs, ours = run["steps"][:3]
    assert ours["samples_ms"] == [6000, 9000, 7000] and (ours["ms"], ours["frozen_ms"]) == (7000, 2000)
    assert (ours["adds_ms"], ours["adds_spread_ms"]) == (5000, 1500)  # the median of 5, 7 and 1 seconds, not 7 - 2
    assert theirs["adds_ms"] == 4000 and "adds_ms" not in frozen
    assert ours["speed_vs"] == {PEFT_ALL: 5 / 6}  # the median of 5 / 6, 4 / 9 and 13 / 7, not 5 / 7
    steps.measure(run, OPTIONS, ["blip"], [LORA_ALL], ["eager"])  # an hour later
    assert run["steps"][-1]["speed_vs"] == {} and "adds_ms" not in run["steps"][-1]


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_compiled_steps_forget_what_was_compiled_before_and_take_no_turns(mode):
    asked = [("vilt", method, mode) for method in (FROZEN, LORA)]
    assert steps._groups(asked, CPU) == ([asked] if mode == "eager" else [[each] for each in asked])
    assert steps._groups(asked, torch.device("cuda")) == [[each] for each in asked]


def test_a_line_says_what_adapters_add(adding):
    same = {**adding["steps"][1], "size": "base"}
    frozen = {**same, "method": FROZEN, "samples_ms": [10.0, 10.0, 10.0]}
    theirs = {**same, "method": PEFT_ALL, "samples_ms": [18.0, 18.5, 17.5]}
    ours = {**same, "method": LORA_ALL, "samples_ms": [12.2, 12.0, 11.6], "peak_bytes": 3e6}
    records = [frozen, {**theirs, "peak_bytes": 4e6}, ours, {**theirs, "dropout": 0.0, "peak_bytes": 9e6}]
    steps.compare_speeds(records)
    lines = steps.steps_table({"steps": records}).splitlines()
    assert lines[-1] == (
        "- ViLT-B, eager, float32, dropout 0.1: to a frozen step of 10.0 ms adapters on all linears add 2.0 ± 0.1 ms, "
        "PEFT's 8.0 ± 0.2 ms, ours / PEFT's 0.25; peak 3 MB, PEFT's 4 MB, ours / PEFT's 0.75"
    )
    assert "dropout" in lines[0] and "dropout" not in steps.steps_table({"steps": records[:3]}).splitlines()[0]
    for missing in (frozen, ours, theirs):
        rest = [{**r} for r in (frozen, theirs, {**theirs, "method": LORA_ALL}) if r["method"] != missing["method"]]
        steps.compare_speeds(rest)
        assert "add " not in steps.steps_table({"steps": rest})
    records[1]["adds_ms"] = -1.0  # as noise may have it
    assert "PEFT's -1.0 ± 0.2 ms; peak" in steps.steps_table({"steps": records})


def test_adapters_that_differ_from_pefts_add_nothing(monkeypatch):
    def frozen_alone(layer, x, *shared):
        return torch.nn.functional.linear(x, layer.weight, layer.bias)

    monkeypatch.setattr(AdaptedLinear, "_adapted", frozen_alone)  # those in no group
    assert steps_methods.verify(MODELS["vilt"], ADDING, CPU).keys() == {PEFT_ALL, LORA_ALL}


def test_one_question_at_a_time(capsys):
    with pytest.raises(SystemExit):
        steps.main(["--adds", "--device", "cpu", "--inference"])
    assert "--adds: goes without" in capsys.readouterr().err
