"""What "auto" takes on a GPU follows from the result files, torch included, and from nothing else."""

import ast

import able_machine
import pytest
import torch

from peft_kernels import backend, kinds
from peft_kernels.benchmarks import choices
from peft_kernels.benchmarks.__main__ import BENCHES
from peft_kernels.benchmarks.results import by_device, load


def case(titled: dict, **times: float | tuple[float, float]) -> dict:
    """A case's record with one provider of each backend: milliseconds in a graph, or (None, eager)."""
    rows = []
    for name, time in times.items():
        graph, eager = time if isinstance(time, tuple) else (time, 9.0)
        rows.append({"provider": f"ours, {name}", "backend": name, "graph_ms": graph, "ms": eager})
    return {"op": "lowrank_linear", "K": 768, "N": 768, "dropout": 0.0, "dtype": "bfloat16", "results": rows} | titled


def found(*cases: dict, arch: int = 90) -> dict:
    return choices.fastest({"architecture": arch, "cases": list(cases)})


def test_the_fastest_in_a_graph_wins_by_more_than_a_tie():
    assert found(case({}, torch=1.0, triton=1.5, cuda=1.2)) == {("lowrank_linear", "narrow", "half", 90): "torch"}
    assert found(case({}, torch=1.0, triton=1.01)) == {("lowrank_linear", "narrow", "half", 90): "triton"}
    assert found(case({}, torch=(None, 1.0), triton=1.5))[("lowrank_linear", "narrow", "half", 90)] == "torch"


def test_what_is_found_holds_for_the_measured_architecture():
    assert found(case({}, torch=1.0, triton=1.5), arch=100) == {("lowrank_linear", "narrow", "half", 100): "torch"}


def test_kinds_and_dtypes_are_apart_and_their_cases_together():
    cases = [
        case({}, torch=1.0, triton=1.5),
        case({}, torch=4.0, triton=1.5),
        case({"dropout": 0.1, "N": 3072}, torch=1.0, triton=1.5),
        case({"dtype": "float32"}, cuda=1.0, triton=1.5),
    ]
    assert found(*cases) == {
        ("lowrank_linear", "narrow", "float32", 90): "cuda",
        ("lowrank_linear", "narrow", "half", 90): "triton",
        ("lowrank_linear", "wide, dropout", "half", 90): "torch",
    }


def test_a_case_without_triton_tells_nothing_and_only_defaults_count():
    assert found(case({"R": 96}, torch=1.0, cuda=2.0)) == {}
    two = case({}, torch=1.0, triton=0.9)
    two["results"].append({"provider": "ours, torch, order given", "backend": "torch", "graph_ms": 0.1, "ms": 0.1})
    assert found(two) == {("lowrank_linear", "narrow", "half", 90): "triton"}


def test_every_case_of_the_benchmarks_has_a_kind():
    for bench in BENCHES:
        for each in bench.cases(False, ["bfloat16"]):
            op, kind = choices.KINDS[bench.op](vars(each))
            assert op and isinstance(kind, str)


def test_the_committed_choice_is_what_the_results_say():
    text = choices.text(by_device(load()))
    assert choices.FILE.read_text() == text
    ast.parse(text)
    ast.parse(choices.text([]))
    assert 'SOURCE = ""' in choices.text([{"kind": "cpu", "cases": []}])


ON_GPU = able_machine.OnGpu(torch.bfloat16)


@pytest.fixture
def everything_runs(monkeypatch):
    able_machine.everything_runs(monkeypatch)
    monkeypatch.setattr(backend, "SOURCE", "a GPU, some day")


def test_auto_follows_the_choice(everything_runs, monkeypatch):
    table = {("lowrank_linear", "narrow", "half", 90): "torch", ("lowrank_linear", "wide", "half", 90): "cuda"}
    monkeypatch.setattr(backend, "FASTEST", table)
    narrow, wide = (kinds.linear(768, size, dropout=False) for size in (768, 3072))
    assert backend.resolve("lowrank_linear", [ON_GPU], kind=narrow) == ("torch", "the fastest on a GPU, some day")
    assert backend.resolve("lowrank_linear", [ON_GPU], kind=wide).name == "cuda"
    assert backend.resolve("lowrank_linear", [ON_GPU], kind=kinds.linear(768, 768, dropout=True)).name == "triton"
    assert backend.resolve("lowrank_linear", [ON_GPU], "triton", kind=narrow).name == "triton"


def test_another_architecture_than_the_measured_one_takes_triton(everything_runs, monkeypatch):
    monkeypatch.setattr(backend, "FASTEST", {("op", "", "half", 90): "torch"})
    assert backend.resolve("op", [ON_GPU]).name == "torch"
    for arch in (80, 86, 100, 120):
        able_machine.everything_runs(monkeypatch, arch)
        assert backend.resolve("op", [ON_GPU]) == ("triton", "the tensors are on a GPU")


def test_what_cannot_run_leaves_its_place(everything_runs, monkeypatch):
    monkeypatch.setattr(backend, "FASTEST", {("op", "", "half", 90): "cuda"})
    monkeypatch.setattr(backend.SUPPORT["cuda"], "missing", lambda device_type: "not built")
    assert backend.resolve("op", [ON_GPU]) == ("triton", "cuda cannot run: not built")
    choice = backend.resolve("op", [ON_GPU], rank=65)
    assert choice.name == "torch" and choice.reason.startswith("triton cannot run: ")
