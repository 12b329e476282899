"""What adapted models cost to run: merged and unmerged are compared before any timing, and bytes are the file's."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open

from peft_kernels.adapters import LoRA
from peft_kernels.benchmarks import measured, results, steps, steps_inference, steps_methods, steps_table, timing
from peft_kernels.benchmarks.cases import WrongResult
from peft_kernels.benchmarks.steps_inference import BASE, MERGED, UNMERGED
from peft_kernels.benchmarks.steps_methods import AURORA, FULL, LORA, MOIL, PEFT
from peft_kernels.benchmarks.steps_models import MODELS, SIZES
from peft_kernels.benchmarks.steps_session import Options
from peft_kernels.layers.adapted_linear import AdaptedLinear

CPU, TINY = torch.device("cpu"), SIZES["tiny"]
OPTIONS = Options(CPU, "tiny", rounds=1)
METHODS = steps_inference.METHODS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("inference") / "cpu.json"
    arguments = ("--inference", "--device", "cpu", "--size", "tiny", "--model", "vilt", "--rounds", "1", "--batch", "3")
    steps.main([*arguments, "--save", str(path)])
    return json.loads(path.read_text())


def test_run_has_the_base_once_and_both_states_of_every_method(run):
    states = [(None, BASE), *((method, state) for method in METHODS for state in (UNMERGED, MERGED))]
    assert [(r["method"], r["state"]) for r in run["inference"]] == states
    assert run["absent_inference"] == [] and run["schema"] == 1 and "steps" not in run
    for r in run["inference"]:
        assert (r["size"], r["dtype"], r["batch"], r["graph_ms"]) == ("tiny", "float32", 3, None)
        assert r["ms"] > 0 and r["batch_ms"] > 0 and r["examples_per_s"] == pytest.approx(3e3 / r["batch_ms"])
        assert r["vs_base"] > 0 and (r["state"] != BASE or r["vs_base"] == r["batch_vs_base"] == 1)
        assert r["backend"] == ("torch" if r["state"] == UNMERGED and r["method"] != PEFT else None)


def test_table(run):
    *lines, _, told = steps.inference_table(run).splitlines()
    assert told == steps_table.TURNS
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0] == ["model", "dtype", "method", "state", "ms", "±", "vs base", "batch", "examples/s",
                       "vs base of batch", "stored kB"]  # fmt: skip
    assert len(rows) == 2 + 1 + 2 * len(METHODS)
    assert rows[2][:4] == ["ViLT-B, tiny", "float32", "–", "base"] and rows[2][-1] == "–"
    changed = {**run["inference"][1], "size": "base", "ms": 12.345, "vs_base": 0.5, "graph_ms": 2.0, "batch_ms": 10.0}
    changed |= {"graph_vs_base": 0.25, "batch_graph_ms": 4.0, "spread_ms": 1.0, "batch_vs_base": 0.75}
    changed |= {"examples_per_s": 300.0, "stored_bytes": 1_234_567}
    cells = [cell.strip() for cell in steps.inference_table({"inference": [changed]}).splitlines()[2].split("|")[1:-1]]
    assert cells == ["ViLT-B", "float32", PEFT, UNMERGED, "12.35", "1.00", "0.50×", "2.00", "0.25×", "3", "300.0",
                     "0.75×", "750.0", "1235"]  # fmt: skip
    assert steps.inference_table({}) == ""


def test_results_and_page_have_a_section(run):
    (device,) = results.by_device([run])
    assert device["inference"] == run["inference"]
    assert "### Inference\n\n| model" in measured.page([device])


# ---- what is measured -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_merged_models_are_made_of_what_the_base_is_made_of(model, method):
    of, batch = MODELS[model], MODELS[model].batch(TINY, 2, CPU, torch.float32)
    merged, adapter = steps_methods.wrapped(method, of, TINY, batch.pixels)
    before = steps_inference.run(of, merged.eval(), batch)
    steps_inference.merge(method, adapter, of)
    base = of.build(TINY, CPU, torch.float32).eval()
    kinds = [{type(module) for module in each.modules()} for each in (merged, base)]
    with_gates = (model, method) == ("blip", AURORA)
    assert (kinds[0] == kinds[1]) is not with_gates
    assert all(layer.merged for layer in merged.modules() if isinstance(layer, AdaptedLinear))
    after = steps_inference.run(of, merged, batch)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * before.abs().max().item())
    assert (after - steps_inference.run(of, base, batch)).abs().max() > 0.1 * before.abs().max()


def test_models_take_turns_in_evaluation_without_gradients(monkeypatch):
    seen = []

    def time_on_cpu(runs, rounds):
        assert list(runs) == [BASE, UNMERGED, MERGED] and rounds == 1
        for once in runs.values():
            _, model, batch = once.args
            seen.append((len(batch.words), model.training, once().requires_grad))
        return {state: timing.Times.of([at]) for state, at in zip(runs, (1.0, 4.0, 2.0))}

    monkeypatch.setattr(timing, "time_on_cpu", time_on_cpu)
    base, unmerged, merged = steps_inference.measure("vilt", LORA, OPTIONS)
    assert seen == [(count, False, False) for count in (1, 8) for _ in range(3)]
    assert [r["ms"] for r in (base, unmerged, merged)] == [1e3, 4e3, 2e3]
    assert [r["batch_vs_base"] for r in (base, unmerged, merged)] == [1, 0.25, 0.5]
    assert [r["examples_per_s"] for r in (base, unmerged, merged)] == [8, 2, 4]


@pytest.mark.parametrize("method", [LORA, MOIL, AURORA])
def test_bytes_are_those_of_the_file_that_save_pretrained_writes(method, run, tmp_path):
    _, adapter = steps_methods.wrapped(method, MODELS["vilt"], TINY, torch.zeros(1))
    adapter.save_pretrained(tmp_path)
    (size,) = {r["stored_bytes"] for r in run["inference"] if (r["model"], r["method"]) == ("vilt", method)}
    assert size == (tmp_path / "adapter_model.safetensors").stat().st_size


def test_pefts_bytes_are_of_its_factors_and_of_the_heads(monkeypatch):
    found, save = {}, steps_inference.save_file

    def saving(tensors, path):
        save(tensors, path)
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        found["size"] = path.stat().st_size

    monkeypatch.setattr(steps_inference, "save_file", saving)
    model, adapter = steps_methods.wrapped(PEFT, MODELS["vilt"], TINY, torch.zeros(1))
    assert steps_inference.stored_bytes(adapter, model, MODELS["vilt"]) == found.pop("size")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(t.numel() for t in found.values()) == trained


# ---- what is wrong, or cannot be asked ------------------------------------------------------------------------------


def test_a_wrong_merge_is_not_timed_and_the_rest_is(monkeypatch):
    merge, time_on_cpu, timed = LoRA.merge, timing.time_on_cpu, []

    def wrong(self, keep_on=None):
        merge(self, keep_on)
        for layer in self.layers.values():
            layer.weight.data.mul_(1.1)

    monkeypatch.setattr(LoRA, "merge", wrong)
    monkeypatch.setattr(steps_methods, "verify", lambda of, methods, device: {})
    monkeypatch.setattr(timing, "time_on_cpu", lambda runs, rounds: timed.append(1) or time_on_cpu(runs, rounds))
    found, told = {}, []
    with pytest.raises(WrongResult, match="vilt, our LoRA: merged, y is off by"):
        steps.measure_inference(found, OPTIONS, ["vilt"], [LORA, PEFT], lambda: told.append(len(found["inference"])))
    assert len(timed) == 2 and told == [0, 3]
    assert [(r["method"], r["state"]) for r in found["inference"]] == [(None, BASE), (PEFT, UNMERGED), (PEFT, MERGED)]
    (absent,) = found["absent_inference"]
    assert absent["method"] == LORA and absent["reason"].startswith("wrong: merged, y is off by")
    assert "- absent: ViLT-B, our LoRA, inference: wrong: merged" in steps.inference_table(found)


def test_what_verify_finds_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(steps_methods, "verify", lambda of, methods, device: {methods[0]: "no good"})
    with pytest.raises(WrongResult, match="no good"):
        steps_inference.measure("vilt", MOIL, OPTIONS)


def test_what_is_not_installed_is_named(monkeypatch):
    find = steps.importlib.util.find_spec
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    found = {}
    steps.measure_inference(found, OPTIONS, ["vilt"], [PEFT])
    assert [(each["method"], each["reason"]) for each in found["absent_inference"]] == [(PEFT, "peft is not installed")]


def test_too_large_a_batch_is_absent(monkeypatch):
    def run(of, model, batch):
        raise torch.cuda.OutOfMemoryError("out of memory\nTry less")

    monkeypatch.setattr(steps_inference, "run", run)
    found = {}
    steps.measure_inference(found, dataclasses.replace(OPTIONS, batch=2), ["vilt"], [LORA])
    assert found["inference"] == [] and found["absent_inference"][0]["reason"] == "out of memory"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--method", FULL), f"--inference: {FULL}: expected some of PEFT LoRA, our LoRA, MoIL, Aurora"),
        (("--mode", "eager"), "--inference: goes without --mode and --seconds"),
        (("--seconds", "3"), "--inference: goes without --mode and --seconds"),
    ],
)
def test_options_that_make_no_sense(arguments, told, capsys):
    with pytest.raises(SystemExit):
        steps.main(["--inference", "--device", "cpu", "--size", "tiny", *arguments])
    assert told in capsys.readouterr().err
