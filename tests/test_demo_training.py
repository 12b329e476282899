"""The demo's runs: every method trains what it should, stopped runs go on bit for bit, rates come from validation."""

import copy
import dataclasses
import json

import pytest
import torch
from demo_cases import job, settings, tiny_models  # noqa: F401
from safetensors.torch import load_file
from torch import nn

from peft_kernels.demo import approximation, experiment, models, training
from peft_kernels.demo.experiment import adapter_learning_rate, best, compare, learning_rate, search
from peft_kernels.demo.methods import (
    ABLATIONS,
    ATTENTION,
    AURORA,
    FULL,
    FULL_METHODS,
    LORA,
    METHODS,
    MOIL,
    UNIADAPTER,
    ZERO_SHOT,
    by_name,
    fitting,
)
from peft_kernels.demo.training import Result, factor, run, saved_bytes

VARIANTS = {f"{method.name}-{name}": method for name, group in ABLATIONS.items() for method in group}
VARIANTS = {method.name: method for method in FULL_METHODS} | VARIANTS
ON_VILT = fitting(FULL_METHODS, "vilt")


# ---- methods --------------------------------------------------------------------------------------------------------


def one_step(method, task: str) -> None:
    own = job(method, task)
    model, before = own.model, {name: p.clone() for name, p in own.model.named_parameters()}
    adapter = method.wrap(model, own.task.preset)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if adapter is None:
        assert method.name == "zero-shot" and trained == set(before)
        return
    assert trained == {name for name, _ in adapter.named_parameters()}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(adapter.param_groups(1e-2))
    model.train()
    for _ in range(1 + method.options.get("interval", 1)):  # MoIL's adapters stand still in the first step
        loss = own.loss(model)
        optimizer.zero_grad()
        loss.backward()
        if method.kind is MOIL.kind:
            adapter.step()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved <= trained
    assert moved & {name for name, _ in adapter.named_parameters("adapter")} or method.kind is FULL.kind
    assert len(moved) > len(trained) / 2


@pytest.mark.parametrize("name", VARIANTS)
def test_every_method_trains_what_it_should_in_blip(name):
    one_step(VARIANTS[name], "retrieval")


@pytest.mark.parametrize("method", ON_VILT, ids=lambda method: method.name)
def test_every_method_trains_what_it_should_in_vilt(method):
    one_step(method, "answering")


def test_vilt_leaves_out_what_differs_by_modules_it_has_no_place_for():
    assert [m.name for m in FULL_METHODS if m.name not in {v.name for v in ON_VILT}] == [
        "Aurora, no modules",
        "Aurora, tucker, no modules",
    ]
    assert not any(method.enhance or method.options.get("gates") for method in ON_VILT)
    assert fitting(FULL_METHODS, "blip") == list(FULL_METHODS)


def test_variants_differ_from_what_they_vary_and_from_each_other():
    for group in (FULL_METHODS, *ABLATIONS.values()):
        assert len({(m.kind, m.attention, repr(sorted(m.options.items())), m.enhance) for m in group}) == len(group)
        assert len({m.name for m in group}) == len(group)
    assert all(method.like == group[0].searched for group in ABLATIONS.values() for method in group[1:])


def test_rank_is_every_adapters():
    for method in (LORA, UNIADAPTER, AURORA, MOIL):
        config = method.wrap(models.build_blip(), "blip", rank=3).config
        assert config.rank == 3 and getattr(config, "transform_rank", 3) == 3
    assert method.wrap(models.build_blip(), "blip").config.rank == MOIL.options["rank"]
    FULL.wrap(models.build_blip(), "blip", rank=3)


def test_names_of_methods():
    assert by_name(["lora", "FULL TUNING", "lora"], FULL_METHODS) == [LORA, FULL]
    with pytest.raises(ValueError, match=r"--method: expected some of 'zero-shot', .*'MoIL'; got 'lara'"):
        by_name(["lora", "lara"], METHODS)


def test_pairs_that_are_near_either_way_are_matched(monkeypatch):
    monkeypatch.setattr(models, "PAIRS", 5)  # at a time, of 24
    torch.manual_seed(0)
    task, model, scenes = models.Retrieval(), models.build_blip().eval(), experiment.make_scenes("target", "test", 7)
    with torch.no_grad():
        states, image = task._image(model, scenes.images)
        similarity = image @ task._text(model, scenes)[1].t()
        near = [similarity >= similarity.topk(task.candidates, dim).values.amin(dim, keepdim=True) for dim in (0, 1)]
        expected = similarity - 10
        for i, j in (near[0] | near[1]).nonzero():
            odds = model.itm_head(task._fused(model, scenes.take(j[None]), states[i][None]))
            expected[i, j] += 10 + odds.log_softmax(-1)[0, 1]
    assert (near[0] != near[1]).any() and not (near[0] | near[1]).all()
    torch.testing.assert_close(task.scores(model, scenes), expected, rtol=1e-4, atol=1e-4)


# ---- one run --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("method", "task"),
    [
        (FULL, "retrieval"),
        (LORA, "retrieval"),  # dropout: torch's generator goes on, too
        (AURORA, "retrieval"),
        (MOIL.varied("MoIL", interval=3), "retrieval"),  # moves at steps 4, 7 and 10
        (UNIADAPTER, "answering"),
        (MOIL, "answering"),  # ViLT draws an order of its patches
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_stopped_run_goes_on_bit_for_bit(method, task, tmp_path, monkeypatch):
    scenes = experiment.make_scenes("target", "test", 6, distinct=True)
    own = job(method, task, steps=10)

    def stop(step, note, done):
        if step == stop.at:
            raise Killed

    stop.at = 0
    steps, count = [], own.task.loss

    def counted(*args, **options):
        steps.append(1)
        return count(*args, **options)

    monkeypatch.setattr(type(own.task), "loss", lambda self, *args, **options: counted(*args, **options))
    whole = run(own, scenes, tmp_path / "whole")
    assert len(steps) == 11  # and one to measure by
    torch.manual_seed(9)
    for stop.at in (1, 3, 8):  # before the first checkpoint, between two, at one
        with pytest.raises(Killed):
            run(own, scenes, tmp_path / "stopped", stop)
        torch.manual_seed(10 + stop.at)
    assert (tmp_path / "stopped" / training.CHECKPOINT_FILE).exists()
    steps.clear()
    again = run(own, scenes, tmp_path / "stopped")
    assert len(steps) == 2 + 1  # steps 9 and 10
    differ = {f.name for f in dataclasses.fields(Result) if getattr(whole, f.name) != getattr(again, f.name)}
    assert differ <= {"step_ms"}
    assert len(whole.losses) == 10 and len(whole.errors) == (10 if method.kind is MOIL.kind else 0)
    files = [load_file(tmp_path / name / training.WEIGHTS_FILE) for name in ("whole", "stopped")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {
        *("adapter_config.json", training.WEIGHTS_FILE, training.RESULT_FILE)
    }


def test_run_that_is_done_is_read(tmp_path, monkeypatch):
    scenes = experiment.make_scenes("target", "test", 6, distinct=True)
    first = run(job(LORA, "retrieval"), scenes, tmp_path)
    monkeypatch.setattr(models.Retrieval, "loss", None)
    assert run(job(LORA, "retrieval"), scenes, tmp_path) == first


def test_result_is_of_the_trained_adapter(tmp_path):
    scenes = experiment.make_scenes("target", "test", 6, distinct=True)
    own = job(MOIL, "retrieval")
    result = run(own, scenes, tmp_path)
    assert list(result.scores) == ["student", "live", "teacher"]
    model = models.build_blip()
    model.load_state_dict(own.model.state_dict())
    MOIL.kind.from_pretrained(model, tmp_path)
    with torch.no_grad():
        assert own.task.evaluate(model.eval(), scenes).scores == result.scores["student"]
    assert result.stored_bytes == (tmp_path / training.WEIGHTS_FILE).stat().st_size
    assert result.backend == "torch" and result.step_ms > 0
    trained = MOIL.wrap(models.build_blip(), "blip")
    assert result.trained == sum(p.numel() for p in trained.model.parameters() if p.requires_grad)
    assert result.mean == pytest.approx(sum(result.scores["student"].values()) / 4)
    assert len(result.shown) == 4 and all(len(set(found)) == 3 for found in result.shown)


def test_each_mode_is_evaluated_as_itself(tmp_path, monkeypatch):
    def modes(self, model, scenes):
        (mode,) = {layer.mode for layer in model.modules() if hasattr(layer, "live_weight")}
        assert not model.training
        return models.Evaluation({mode: 1.0}, [])

    monkeypatch.setattr(models.Retrieval, "evaluate", modes)
    own = job(MOIL, "retrieval", steps=1)
    assert run(own, own.train, tmp_path).scores == {mode: {mode: 1.0} for mode in ("student", "live", "teacher")}


def test_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(models.Retrieval, "loss", lambda self, model, *_, **__: model.itm_head.bias.sum() * torch.nan)
    with pytest.raises(FloatingPointError, match=r"LoRA, lr 0.001: the loss of step 1 is nan"):
        run(job(LORA, "retrieval"), experiment.make_scenes("target", "test", 6, distinct=True), tmp_path)
    assert not (tmp_path / training.RESULT_FILE).exists()


def test_schedule():
    assert factor(0, 200) == pytest.approx(1 / training.WARMUP)
    assert factor(100, 200) == pytest.approx(0.5)
    assert 0 < factor(199, 200) < 1e-3


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    x, linear = torch.randn(4, 3, requires_grad=True), nn.Linear(3, 5, bias=False)
    y = linear(x)  # keeps x, for the weight's gradient: 4 · 3 floats, and the weight, for x's
    assert saved_bytes(y.sum(), linear) == 48
    assert saved_bytes((linear(x).relu() + linear(x)).sum(), linear) == 48 + 80  # and the rectified (4, 5)


# ---- the experiment -------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch):
    """What is asked for: (domain, split) of every make_scenes; [(method's training loss?, split)] of what is read."""
    made, read, make = [], [], experiment.make_scenes

    def recorded(domain, split, count, **options):
        scenes = make(domain, split, count, **options)
        made.append((scenes.images.data_ptr(), domain, split))
        kept.append(scenes)
        return scenes

    kept = []
    monkeypatch.setattr(experiment, "make_scenes", recorded)
    evaluate, draw = models.Retrieval.evaluate, type(make("source", "test", 2)).draw

    def split_of(scenes):
        return next(each[1:] for each in reversed(made) if each[0] == scenes.images.data_ptr())

    def evaluated(self, model, scenes):
        read.append(("evaluate", *split_of(scenes)))
        return evaluate(self, model, scenes)

    def drawn(self, batch):
        read.append(("train", *split_of(self)))
        return draw(self, batch)

    monkeypatch.setattr(models.Retrieval, "evaluate", evaluated)
    monkeypatch.setattr(experiment.Scenes, "draw", drawn)
    return read


def test_comparison_trains_on_train_and_reads_test_once_for_each_result(tmp_path, seen):
    results = compare(settings(tmp_path / "out", seeds=(0, 1)), "retrieval", (ZERO_SHOT, LORA, MOIL), "x")
    assert [r.method for r in results] == ["zero-shot", "LoRA", "LoRA", "MoIL", "MoIL"]
    assert [r.seed for r in results] == [0, 0, 1, 0, 1]
    assert {each for each in seen if each[0] == "train"} == {
        ("train", "source", "pretraining"),
        ("train", "target", "train"),
    }
    evaluations = [each[1:] for each in seen if each[0] == "evaluate"]
    assert evaluations.count(("source", "validation")) == 1  # the pre-trained model's
    assert evaluations.count(("target", "test")) == len(evaluations) - 1 == 1 + 2 + 2 * 3  # MoIL's three modes
    assert results[1].losses != results[2].losses


def test_search_never_sees_the_test_split(tmp_path, seen):
    search(settings(tmp_path / "out"), "retrieval", (LORA, MOIL), grid=(1e-3, 1e-2))
    assert {each[1:] for each in seen} == {
        *(("source", "pretraining"), ("source", "validation"), ("target", "train"), ("target", "validation"))
    }


def injected(monkeypatch, means: dict[tuple[str, float], float]) -> None:
    """Means by the method and its own rate, of MoIL its adapters'; a seed adds itself."""

    def fake(own, scenes, folder, progress):
        value = means[own.method.name, own.adapter_lr or own.lr]
        if value is None:
            raise FloatingPointError
        return Result(
            own.method.name, own.seed, own.lr, own.lr_from, None, {"": {"a": value, "b": value + 2 + own.seed}}
        )

    monkeypatch.setattr(experiment, "pretrained", lambda *_: (models.build_blip(), None))
    monkeypatch.setattr(experiment, "run", fake)


OF_MOIL = {("MoIL", lr): score for lr, score in zip(experiment.ADAPTER_GRID, (9, 20, 20, 1))}


def test_search_picks_the_best_of_the_validation_scores(tmp_path, monkeypatch):
    means = {("LoRA", 1e-3): 5, ("LoRA", 1e-2): 7, ("LoRA", 1e-1): None}
    means |= {("attention tuning", 1e-3): 9, ("attention tuning", 1e-2): 9, ("attention tuning", 1e-1): 1}
    injected(monkeypatch, means | OF_MOIL)
    own = settings(tmp_path / "out", seeds=(0, 2))
    variant = LORA.varied("LoRA, other", rank=2)
    found = search(own, "retrieval", (ZERO_SHOT, ATTENTION, LORA, variant, MOIL), grid=(1e-3, 1e-2, 1e-1))
    seeds = {"seeds": [0, 2]}
    assert found == {
        "attention tuning": {"lr": 1e-3, **seeds, "validation": {"0.001": 10.5, "0.01": 10.5, "0.1": 2.5}},
        "LoRA": {"lr": 1e-2, **seeds, "validation": {"0.001": 6.5, "0.01": 8.5, "0.1": None}},
        "MoIL": {  # the smaller of equals; its live weights' rate is not searched again
            **{"lr": 1e-3, "adapter_lr": 3e-3, **seeds},
            "validation": {"0.001": 10.5, "0.003": 21.5, "0.01": 21.5, "0.03": 2.5},
        },
    }
    assert json.loads(own.rates.read_text())["retrieval"] == found
    assert learning_rate(own, "retrieval", LORA) == (1e-2, "search")
    assert learning_rate(own, "retrieval", variant) == (1e-2, "search of LoRA")
    assert learning_rate(own, "retrieval", MOIL) == (1e-3, "search of attention tuning")
    assert adapter_learning_rate(own, "retrieval", MOIL.varied("other", interval=2)) == 3e-3
    assert adapter_learning_rate(own, "retrieval", LORA) is None
    assert adapter_learning_rate(own, "answering", MOIL) == experiment.DEFAULT_ADAPTER_LR
    assert learning_rate(own, "retrieval", AURORA) == (experiment.DEFAULT_LR, "default")
    assert learning_rate(own, "answering", LORA) == (experiment.DEFAULT_LR, "default")
    assert learning_rate(own, "retrieval", ZERO_SHOT)[1] == ""


def test_search_keeps_other_entries_of_the_same_settings(tmp_path, monkeypatch):
    injected(monkeypatch, {("LoRA", 1e-3): 5} | OF_MOIL)
    for task, method in (("retrieval", LORA), ("answering", LORA), ("retrieval", MOIL)):
        search(settings(tmp_path / "out"), task, (method,), grid=(1e-3,))
    content = json.loads((tmp_path / "search.json").read_text())
    assert list(content["retrieval"]) == ["LoRA", "MoIL"] and list(content["answering"]) == ["LoRA"]
    assert content["settings"]["steps"] == settings(tmp_path / "out").steps
    search(settings(tmp_path / "out", steps=7), "retrieval", (LORA,), grid=(1e-3,))
    content = json.loads((tmp_path / "search.json").read_text())
    assert list(content) == ["settings", "retrieval"] and list(content["retrieval"]) == ["LoRA"]


def test_best_needs_a_rate_that_does_not_diverge():
    assert best({1e-2: 3.0, 1e-3: 3.0, 1.0: None}, "x") == 1e-3
    with pytest.raises(ValueError, match=r"MoIL: diverges with every learning rate of 0.1, 1"):
        best({0.1: None, 1.0: None}, "MoIL")


# ---- how near weights come ------------------------------------------------------------------------------------------


def test_distances_from_full_tuning_by_hand(tmp_path):
    found = compare(settings(tmp_path / "out", steps=6), "retrieval", approximation.APPROXIMATION, "a", watched=True)
    own = settings(tmp_path / "out", steps=6)
    base, _ = experiment.pretrained(own, "retrieval")
    start = approximation.start_of(base, "blip")
    weights = {}
    for result in found:
        model = copy.deepcopy(base)
        method = next(m for m in approximation.APPROXIMATION if m.name == result.method)
        adapter = method.kind.from_pretrained(model, own.folder(f"a-{result.method}-0"))
        if method.kind is not FULL.kind:
            adapter.merge()
        weights[result.method] = {name: model.get_submodule(name).weight for name in start}
        assert [at["step"] for at in result.watched] == [1, 2, 3, 4, 5, 6]
    tuned = weights["attention tuning"]
    below = sum((tuned[name] - start[name]).square().sum() for name in start).sqrt()
    for result in found:
        above = sum((weights[result.method][name] - tuned[name]).square().sum() for name in start).sqrt()
        assert result.watched[-1]["error"] == pytest.approx((above / below).item(), rel=1e-3, abs=1e-6)
    assert found[1].losses[0] == found[0].losses[0]  # the same batches
    for moil in found[2:]:  # whose live weights take the same steps: attention tuning is what its student can come to
        assert moil.lr == found[0].lr and moil.losses == pytest.approx(found[0].losses, rel=1e-5)
        assert moil.scores["live"] == found[0].scores[""]
