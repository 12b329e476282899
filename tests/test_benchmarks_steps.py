"""Whole training steps: what is trained, that nothing wrong is timed, and that what cannot be measured is named."""

import dataclasses
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_kernels.benchmarks import steps, steps_methods, steps_models, steps_session, timing
from peft_kernels.benchmarks.cases import WrongResult
from peft_kernels.benchmarks.steps_methods import (
    ADDING,
    AURORA,
    AUTHORS,
    BY_NAME,
    FULL,
    LORA,
    METHODS,
    MOIL,
    PEFT,
    PEFT_AURORA,
)
from peft_kernels.benchmarks.steps_models import MODELS, SIZES
from peft_kernels.layers.adapted_linear import AdaptedLinear
from peft_kernels.layers.group import LinearGroup

FROZEN, PEFT_ALL, LORA_ALL = ADDING
CPU, META, TINY = torch.device("cpu"), torch.device("meta"), SIZES["tiny"]
OPTIONS = steps_session.Options(CPU, "tiny", rounds=1)


def training(method, model="vilt", dropout=0.0):
    of = MODELS[model]
    base, batch = of.build(TINY, CPU, torch.float32), of.batch(TINY, 2, CPU, torch.float32)
    return steps_methods.Training(method, of, TINY, base, batch, dropout)


# ---- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("steps") / "cpu.json"
    steps.main(["--device", "cpu", "--size", "tiny", "--rounds", "2", "--mode", "graph", "eager", "--save", str(path)])
    return json.loads(path.read_text())


def test_run_has_every_step(run):
    assert run["kind"] == "cpu" and run["schema"] == 1
    assert {(r["model"], r["method"]) for r in run["steps"]} == {(a, b) for a in MODELS for b in METHODS}
    for r in run["steps"]:
        assert (r["size"], r["mode"], r["batch"], r["dtype"], r["dropout"]) == ("tiny", "eager", 2, "float32", 0.1)
        assert r["ms"] > 0 and r["spread_ms"] >= 0 and r["launches"] is None and r["compiler"] is None
        assert r["peak_bytes"] > 4 * r["trained"] > 0
        assert r["backend"] == ("torch" if r["method"] in (LORA, AURORA, MOIL) else None)
        assert len(r["losses"]) == steps_session.COMPARED and r["losses"] == sorted(r["losses"], reverse=True)
    graph = {"model": None, "method": None, "mode": "graph", "reason": "a CUDA graph needs a GPU"}
    assert run["absent_steps"] == [graph]


def test_methods_that_are_alike_train_alike(run):
    for model in MODELS:
        found = {r["method"]: r for r in run["steps"] if r["model"] == model}
        for one, other in ((LORA, PEFT), (MOIL, AUTHORS)):
            assert found[one]["trained"] == found[other]["trained"]
        assert found[MOIL]["losses"] == pytest.approx(found[AUTHORS]["losses"], rel=1e-5)
        assert found[FULL]["trained"] > found[LORA]["trained"]


def test_speeds_are_against_rivals_in_the_same_mode(run):
    for model in MODELS:
        found = {r["method"]: r for r in run["steps"] if r["model"] == model}
        for method, r in found.items():
            rivals = {PEFT, FULL, AUTHORS} if method in (MOIL, AUTHORS) else {PEFT, FULL}
            times = {name: timing.Times.of(each["samples_ms"]) for name, each in found.items()}
            assert r["speed_vs"] == {other: timing.speed_against(times[method], times[other]) for other in rivals}
            assert (r["ms"], r["spread_ms"]) == pytest.approx(times[method][:2])
    both = [{**run["steps"][0], "mode": mode, "samples_ms": [ms]} for mode, ms in (("eager", 4.0), ("graph", 1.0))]
    steps.compare_speeds(both)
    assert [r["speed_vs"] for r in both] == [{FULL: 1.0}] * 2


def test_table(run):
    table = steps.steps_table(run)
    lines = table.splitlines()
    assert len(lines) == 2 + len(run["steps"]) + 4 and lines[-1] == "- absent: graph: a CUDA graph needs a GPU"
    assert lines[-3].startswith("On a CPU") and "On a CPU" not in steps.steps_table({**run, "kind": "gpu"})
    assert [line.split("|")[1].strip() for line in lines[2:-4:6]] == ["BLIP-base, tiny", "ViLT-B, tiny"]
    assert "launches" not in table and "vs authors' formula" in table
    changed = {**run["steps"][3], "launches": 1234, "size": "base", "peak_bytes": 5_600_000, "trained": 7_088_256}
    changed |= {"ms": 12.34, "speed_vs": {PEFT: 1.5}}
    cells = [cell.strip() for cell in steps.steps_table({"steps": [changed]}).splitlines()[2].split("|")[1:-1]]
    title = MODELS[changed["model"]].title
    expected = [title, "2", "float32", "eager", changed["method"], "7.09", "12.3", f"{changed['spread_ms']:.1f}"]
    assert cells == [*expected, "6", "1234", "1.50×"]
    assert steps.steps_table({}) == "" and steps.steps_table({"cases": [], "steps": []}) == ""


def test_seconds_before_a_step_s_time_have_fields_of_their_own(run, monkeypatch):
    for model in MODELS:
        found = [r for r in run["steps"] if r["model"] == model]
        assert all(r[name] > 0 for r in found for name in ("build_s", "verify_s", "first_s", "measure_s"))
        assert len({(r["build_s"], r["verify_s"]) for r in found}) == 1 and {r["expect_s"] < 0.01 for r in found} == {
            True
        }
    now, slow = [0.0], {"verify": 100.0, "begin": 10.0, "time_on_cpu": 1.0}

    def slowly(owner, name):
        function = getattr(owner, name)

        def call(*args, **options):
            now[0] += slow[name]
            return function(*args, **options)

        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr(steps_session.time, "perf_counter", lambda: now[0])
    for owner, name in ((steps_methods, "verify"), (steps_session, "begin"), (timing, "time_on_cpu")):
        slowly(owner, name)
    session = steps_session.Session(dataclasses.replace(OPTIONS, seconds=1.5), [FULL, LORA])
    records = [each for method in (FULL, LORA) for each in session.time([session.begin("vilt", method, "eager")])]
    assert [[r[name] for name in ("build_s", "verify_s", "expect_s", "first_s", "measure_s")] for r in records] == [
        [0, 100, 0, 10, 1]
    ] * 2
    with pytest.raises(steps_session.Absent, match=r"^1.5 seconds had passed"):  # of timing alone
        session.begin("vilt", PEFT, "eager")


# ---- what is trained ------------------------------------------------------------------------------------------------


def test_layers_compile_once_for_all():
    session = steps_session.Session(OPTIONS, [])
    counts = torch._dynamo.utils.counters["stats"]
    counts.clear()
    _, eager = session.begin("vilt", AUTHORS, "eager")
    assert not counts and eager["compiler"] is None
    assert session.begin("vilt", AUTHORS, "compiled")[1]["compiler"] == "aot_eager"  # losses were compared
    # The first layer, whose input takes no gradient, and the others; the authors' formula
    assert counts["unique_graphs"] == 3


def wrapped(method, model, size, dtype=torch.bfloat16):
    of = MODELS[model]
    with META:
        built = of.configured(size).to(dtype)
    adapter = steps_methods.wrap(method, built, of, size, 0.1)
    return built.train(), adapter


HEADS = {"blip": 768 * 2 + 2, "vilt": 1536 * 769 + 2 * 1536 + 3129 * 1537}


@pytest.mark.parametrize(
    ("method", "model", "adapters"),
    [
        (LORA, "blip", 12 * 16 * (768 + 3 * 768) + 72 * 16 * 2 * 768),
        (PEFT, "vilt", 36 * 16 * 2 * 768),
        (AURORA, "vilt", 64 * (768 + 768 + 1 + 36)),
        (PEFT_AURORA, "vilt", 36 * 64 * 2 * 768),
        (PEFT_AURORA, "blip", 12 * 64 * ((768 + 2304) + 1536 + 2 * 3840 + 6 * 1536)),
        (MOIL, "vilt", 7_088_256 + 36 * 768 * 769),  # of adapters as many as published
        (LORA_ALL, "vilt", 12 * 16 * (4 * 1536 + 2 * 3840)),
        (PEFT_ALL, "blip", 12 * 16 * ((768 + 2304 + 1536 + 2 * 3840) + (8 * 1536 + 2 * 3840))),
        (LORA_ALL, "blip", 12 * 16 * ((768 + 2304 + 1536 + 2 * 3840) + (8 * 1536 + 2 * 3840))),
    ],
)
def test_as_many_parameters_train_as_the_published_sizes_have(method, model, adapters):
    built, _ = wrapped(method, model, SIZES["base"])
    trained = {name: p for name, p in built.named_parameters() if p.requires_grad}
    heads = {name for name in trained if any(f".{head}." in f".{name}" for head in MODELS[model].heads)}
    assert sum(trained[name].numel() for name in heads) == HEADS[model]
    assert sum(trained[name].numel() for name in trained.keys() - heads) == adapters
    assert {trained[name].dtype for name in heads} == {torch.bfloat16}
    assert {trained[name].dtype for name in trained.keys() - heads} == {torch.float32}


@pytest.mark.parametrize(
    ("model", "tokens"), [("blip", {"vision": 577, "text": 35, "cross": 577}), ("vilt", {"text": 185})]
)
def test_as_many_tokens_as_the_published_sizes_have(model, tokens):
    of, seen = MODELS[model], {}
    with META:
        built = of.configured(SIZES["base"])
    places = {"qkv": "vision", "attention.self.key": "text", "crossattention.self.key": "cross"}
    places["attention.attention.key"] = "text"
    for name, module in built.named_modules():
        place = next((place for ending, place in places.items() if f".{name}".endswith(f".{ending}")), None)
        if place:
            module.register_forward_pre_hook(lambda _, args, place=place: seen.update({place: tuple(args[0].shape)}))
    of.logits(built, of.batch(SIZES["base"], 2, META, torch.float32))
    assert seen == {place: (2, count, 768) for place, count in tokens.items()}


class Waits(TorchDispatchMode):
    """What no CUDA graph holds: values that the host reads, sizes that depend on them, tensors from the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, devices = str(function), {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        if len(devices) > 1 or any(word in name for word in ("local_scalar", "nonzero", "unique", "multinomial")):
            self.found.append(name)
        result = function(*args, **(kwargs or {}))
        if len(devices | {t.device for t in tree_leaves(result) if isinstance(t, torch.Tensor)}) > 1:
            self.found.append(name)
        return result


@pytest.mark.parametrize("model", MODELS)
def test_nothing_waits_for_the_device(model):
    of = MODELS[model]
    batch = of.batch(TINY, 2, META, torch.bfloat16)
    for method in (*METHODS, *BY_NAME):
        built, adapter = wrapped(method, model, TINY)
        with Waits() as waits:
            loss = of.loss(built, batch)
            if method == AUTHORS:
                loss = loss + steps_methods.AuthorsImitation(adapter).loss()
            loss.backward()
        assert waits.found == [], method
    with pytest.raises((RuntimeError, NotImplementedError)), Waits() as waits:  # as the models' own forwards do
        steps_models.own_logits(built, batch)
    assert waits.found


def test_every_second_text_is_shorter():
    batch = MODELS["blip"].batch(TINY, 3, CPU, torch.float32)
    assert batch.mask.sum(1).tolist() == [35, 30, 35]
    assert torch.equal(batch.padding[:, 0, 0] == 0, batch.mask == 1) and batch.padding[1, 0, 0, -1] < -1e30


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ADDING)
def test_gradients_reach_the_embeddings_through_all_linears(method, model):
    each, given, reached = training(method, model), [], []
    for name in MODELS[model].embeddings:
        each.model.get_submodule(name).register_forward_hook(
            lambda module, args, output: given.append(output if isinstance(output, torch.Tensor) else output[0])
        )
    linears = list(map(each.model.get_submodule, steps_methods._linears(each.model, each.of)))
    for module in linears if method == FROZEN else ():
        module.register_full_backward_hook(lambda module, dx, dy: reached.append((module, dx[0] is not None)))
    each.run()
    assert len(given) == len(MODELS[model].embeddings) and all(states.grad.any() for states in given)
    if method == FROZEN:
        assert {module for module, arrived in reached if arrived} == {*linears} and len(linears) > 10
        trained = {name for name, p in each.model.named_parameters() if p.grad is not None}
        assert trained and all(name.startswith(MODELS[model].heads) for name in trained)
        assert len(trained) == len(each.trained)


@pytest.mark.parametrize("method", [MOIL, AUTHORS])
def test_imitation_begins_with_the_second_step(method):
    each = training(method)
    each.run()
    assert all(p.grad is None for p in each.adapter.parameters("adapter"))
    each.run()
    assert all(p.grad is not None for p in each.adapter.parameters("adapter"))


def test_weights_that_stand_still_have_gradients():
    each = training(LORA)
    losses = [each.run() for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    each.stand()
    before = [p.clone() for p in each.trained]
    losses = [each.run() for _ in range(2)]
    assert torch.equal(*losses) and all(map(torch.equal, before, each.trained))
    assert all(p.grad.any() for p in each.trained)


# ---- verify, then time ----------------------------------------------------------------------------------------------


def _no_bias(group, identity):
    down, _, up, _ = group.transform
    pairs = zip(group.weight0, group.up, group.down, group.teacher)
    return sum(((w + b @ a) @ (identity + up @ down) - teacher).square().mean() for w, b, a, teacher in pairs)


def _unadapted(layer, x, *shared):
    return torch.nn.functional.linear(x, layer.weight, layer.bias)


def _without_padding(logits):
    return lambda model, batch: logits(model, batch._replace(padding=torch.zeros_like(batch.padding)))


@pytest.mark.parametrize(
    ("owner", "name", "mutant", "wrong"),
    [
        (steps_methods.AuthorsImitation, "layer_distance", staticmethod(_no_bias), {MOIL, AUTHORS}),
        (steps_methods.AuthorsImitation, "_follow", lambda self, group: None, {MOIL, AUTHORS}),
        (steps_methods, "_our_name", lambda name: name, {PEFT, LORA}),
        (AdaptedLinear, "_adapted", _unadapted, {PEFT, LORA, AURORA}),
    ],
)
def test_what_differs_is_found(monkeypatch, owner, name, mutant, wrong):
    monkeypatch.setattr(LinearGroup, "get", lambda *_: None)  # each layer runs by itself
    monkeypatch.setattr(owner, name, mutant)
    assert steps_methods.verify(MODELS["vilt"], METHODS, CPU).keys() == wrong


def test_another_scale_of_pefts_is_found(monkeypatch):
    import peft

    config = peft.LoraConfig
    monkeypatch.setattr(peft, "LoraConfig", lambda **options: config(**options | {"lora_alpha": 1}))
    assert "is off by" in steps_methods.verify(MODELS["blip"], [PEFT], CPU)[PEFT]


@pytest.mark.parametrize("model", MODELS)
def test_another_forward_is_found(model):
    of = dataclasses.replace(MODELS[model], logits=_without_padding(MODELS[model].logits))
    assert steps_methods.verify(of, [FULL], CPU).keys() == {FULL}
    assert steps_methods.verify(MODELS[model], [FULL], CPU) == {}


def test_losses_come_down_the_same_way():
    eager = [1.0, 0.95, 0.9]
    steps_session.compare([1.0, 0.96, 0.91], eager, "float32")
    steps_session.compare([1.02, 0.93, 0.92], eager, "bfloat16")
    for wrong in ([1.0, 1.0, 1.0], [1.0, 0.95, 0.93], [1.0, 0.95, 0.85], [1.01, 0.95, 0.9], [1.0, float("nan"), 0.9]):
        with pytest.raises(WrongResult, match=r"^the loss of step \d is"):
            steps_session.compare(wrong, eager, "float32")


def test_what_is_wrong_is_named_and_the_rest_is_measured(monkeypatch):
    def without_optimizer(self):
        self.optimizer.step = lambda: None

    def fresh_adapter_that_changes_something(method, model, *rest):
        adapter = wrap(method, model, *rest)
        if method == LORA:
            next(layer for layer in adapter.layers.values()).up.data.normal_()
        return adapter

    wrap = steps_methods.wrap
    monkeypatch.setattr(steps_methods.Training, "compile", without_optimizer)
    monkeypatch.setattr(steps_methods, "wrap", fresh_adapter_that_changes_something)
    monkeypatch.setattr(steps_methods, "verify", lambda of, methods, device: {MOIL: "no good"})
    run = {}
    with pytest.raises(WrongResult, match="vilt, MoIL, eager: no good"):
        steps.measure(run, OPTIONS, ["vilt"], [MOIL, LORA, FULL], ["eager", "compiled"])
    assert [(r["method"], r["mode"]) for r in run["steps"]] == [(FULL, "eager")]
    reasons = {(each["method"], each["mode"]): each["reason"] for each in run["absent_steps"]}
    assert reasons[MOIL, "eager"] == reasons[MOIL, "compiled"] == "wrong: no good"
    assert reasons[LORA, "eager"].startswith("wrong: the loss of step 1 is")
    assert reasons[FULL, "compiled"].startswith("wrong: the loss of step 2 is")
