"""The floor and the designs of the imitation step's benchmark, and that it refuses what is wrong."""

import dataclasses
import re

import pytest
import torch
from benchmark_cases import reason
from imitation_cases import expected, relative, student
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from peft_kernels import imitation_step
from peft_kernels.benchmarks import bench_weight_distance as bench
from peft_kernels.benchmarks import cases, floor, providers, runner, terminal, timing
from peft_kernels.benchmarks.floor import weight_distance as costs
from peft_kernels.imitation.plan import Memory, Plan
from peft_kernels.records import Product

CPU = torch.device("cpu")
HYBRID, LORA, PLAIN = bench.shaped((2, 40, 5, 3), "float32")
CASES = {"hybrid": HYBRID, "lora": LORA, "distance": PLAIN}
ON_CPU = runner.providers_on(bench.BENCH, "cpu")
VILT_B = (12, 768, 96, 96, True)

with_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
with_step = pytest.mark.parametrize("case", [HYBRID, LORA], ids=["hybrid", "lora"])


def _built(name, case):
    return bench.PROVIDERS[name].build(case, bench.make_tensors(case, CPU))


# ---- the floor and the model ----------------------------------------------------------------------------------------


def test_floor_by_hand():
    """36 matrices of 768² four times, 85 MB each, 7 M adapter parameters and as many gradients: 92 µs on an H200."""
    (work,) = costs.compulsory(*VILT_B)
    adapters = 36 * 2 * 96 * 768 + 12 * (2 * 96 * 768 + 96 + 768)
    assert adapters == 7_088_256
    assert work.bytes == 4 * (36 * 4 * (768**2 + 768) + 2 * adapters)
    assert work.bytes / 4.3e12 == pytest.approx(92e-6, rel=1e-2)
    products = 2 * 36 * 768**2 * (6 * 96 + 2 * 97) + 36 * 12 * 768 * 96 * 97
    assert work.flops == products + 3 * 36 * (768**2 + 768)


def test_fused_step_by_hand():
    """Of the 85 MB: three read and two written by the distance, W0 twice and E four times by the products."""
    (parts,) = costs.passes("fused", *VILT_B, "cuda")
    large = 4 * 36 * 768**2
    assert [part.bytes // large for part in parts] == [0, 1, 5, 0, 2, 2, 1, 0]
    assert 11 * large < floor.total(parts).bytes < 15 * large  # thin operands, read and written a few times each


class _Calls(TorchDispatchMode):
    """Counts what torch runs, but for views and new memory."""

    FREE = (
        "t",
        "view",
        "alias",
        "as_strided",
        "slice",
        "split_with_sizes",
        "select",
        "unbind",
        "unsqueeze",
        "detach",
        "lift_fresh",
        "_local_scalar_dense",
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        name = str(call).split(".")[1]
        self.count += name not in self.FREE and not name.startswith(("empty", "new_empty"))
        return call(*args, **kwargs or {})


@with_case
@pytest.mark.parametrize("name", ["authors' formula", "ours, torch"])
def test_designs_on_a_cpu_launch_what_torch_runs(name, case):
    built = _built(name, case)
    built.forward(None)  # makes its plan
    with _Calls() as calls:
        built.forward(None)
    assert calls.count == len(bench.passes(case, bench.PROVIDERS[name].design, "cpu")[0])


def _matmuls(design, case):
    (parts,) = bench.passes(case, design, "cpu")
    return sum(part.flops for part in parts if part.name.startswith("product"))


@with_case
def test_flops_of_the_authors_formula_are_those_of_its_matmuls(case):
    built = _built("authors' formula", case)
    with FlopCounterMode(display=False) as counter:
        built.forward(None)
    assert counter.get_total_flops() == _matmuls("authors", case)


def _plan(case, backend):
    """Of all layers together."""
    t = bench.make_tensors(case, CPU)
    plan = Plan(bench.own_groups(case, t), backend, Memory(t.weight0))
    plan.find_gradients()
    return plan


@with_step
def test_flops_of_ours_are_those_of_the_plan(case):
    plan = _plan(case, "torch")
    flops = 0
    for product in [record for stage in plan.stages() for record in stage if isinstance(record, Product)]:
        inner = 0 if product.form == "tn" else 1
        for term in product.terms:
            columns = product.result.shape[1] + (product.result_last is not None)
            flops += 2 * product.result.shape[0] * columns * term.left.shape[inner]
    for distance in plan.distances:
        flops += sum(2 * left.shape[0] * left.shape[1] * right.shape[1] for left, right in distance.pairs)
    assert _matmuls("torch", case) == flops
    names = ("P", "G", "dB, dG", "dA, dA_d, da_d, U", "dX, dB, dA", "dB", "dA")
    fused = sum(part.flops for part in bench.passes(case, "fused", "cuda")[0] if part.name in names)
    assert fused + 2 * 3 * case.layers * case.width**2 * (case.R + case.depth) == flops
    least = bench.least(case, None)[0].flops
    assert flops <= least + 6 * case.layers * case.width**2 and flops > 0.9 * least


@with_step
def test_kernels_launch_what_the_model_says(case):
    """Seven for the hybrid student, four for A and B alone; torch adds up the losses."""
    from peft_kernels.triton_kernels.common import record_launches

    plan = _plan(case, "triton")
    with record_launches(run=False) as launches:
        plan.run(bench.DECAY, "mean", 1.0)
    (parts,) = bench.passes(case, "fused", "cuda")
    assert len(launches) == len(parts) - 1 == (7 if case.depth else 4) and parts[-1].name == "sum of the losses"


def test_what_nobody_models():
    assert costs.passes("torch", *VILT_B, "cuda") == (None,)
    assert bench.passes(PLAIN, "lerp", "cpu") == (None,)
    with pytest.raises(ValueError, match="design"):
        costs.passes("unknown", *VILT_B, "cpu")


# ---- what the providers compute -------------------------------------------------------------------------------------


@with_step
@pytest.mark.parametrize("name", ["authors' formula", "low-rank form, autograd", "ours, torch"])
def test_step_is_the_definition(name, case):
    """As tests/imitation_cases.py has it, in float64."""
    t = cases.converted(bench.make_tensors(case, CPU), torch.float64)
    value, grads = expected(bench.own_groups(case, t), bench.DECAY, "mean")
    built = bench.PROVIDERS[name].build(case, t)
    assert relative(built.forward(None), value) < 1e-12
    found, layers = built.found(), []
    for layer in range(case.layers):
        own = {kind: grad.chunk(case.layers)[layer] for kind, grad in found.items() if kind.startswith("d")}
        layers.append(torch.cat(list(own.values())))
    per_layer = len(grads) // case.layers
    for layer, got in enumerate(layers):
        exact = torch.cat([grad.flatten() for grad in grads[layer * per_layer : (layer + 1) * per_layer]])
        assert relative(got, exact) < 1e-12


@with_case
def test_every_provider_has_its_own_teachers_and_adapters(case):
    t = bench.make_tensors(case, CPU)
    before = [None if tensor is None else tensor.clone() for tensor in t]
    first = [bench.PROVIDERS[name].build(case, t).forward(None) for name in ("authors' formula", "ours, torch")]
    again = bench.PROVIDERS["authors' formula"].build(case, t)
    assert torch.equal(again.forward(None), first[0]) and relative(first[1], first[0]) < 1e-6
    assert all(old is None or torch.equal(old, new) for old, new in zip(before, t))
    if case.kind == bench.STEP:
        assert not torch.equal(again.forward(None), first[0])  # its teachers have moved on


# ---- verify, then time ----------------------------------------------------------------------------------------------


@with_case
def test_right_providers_pass(case):
    record = runner.measure(bench.BENCH, case, CPU, ON_CPU, rounds=1)
    expected = {"authors' formula", "W0 + B A shared", "low-rank form, autograd", "ours, torch"}
    expected |= {"foreach lerp"} if case.kind == bench.STEP else set()
    assert {row["provider"] for row in record["results"]} == expected
    assert record["absent"].keys() == set(ON_CPU) - expected
    assert all((row["peak_bytes"] > 0) == (row["provider"] != "foreach lerp") for row in record["results"])
    assert all(row["saved_bytes"] is None for row in record["results"])
    assert all(name in str(terminal.case_table(record)) for name in expected)


def test_peak_counts_what_is_kept_from_step_to_step():
    """Less than the authors' formula keeps; at least one layer's errors, and the gradients."""
    case = bench.Case(2, 96, 12, 12)
    authors, ours = (_built(name, case) for name in ("authors' formula", "ours, torch"))
    peaks = [timing.peak_bytes(lambda each=each: each.forward(None), CPU)[1] for each in (authors, ours)]
    adapters = sum(tensor.nbytes for tensor in bench.own_groups(case, bench.make_tensors(case, CPU))[0].adapters())
    assert 2 * adapters + 3 * 4 * 96**2 < peaks[1] < peaks[0]
    assert timing.peak_bytes(lambda: ours.forward(None), CPU)[1] < peaks[1] / 4


def test_larger_cases_are_verified_by_their_first_layers(monkeypatch):
    verified = []
    check = providers.verify
    monkeypatch.setattr(providers, "verify", lambda *args: verified.append(args[2].case.layers) or check(*args))
    for layers in (1, 2, 5):
        runner.measure(bench.BENCH, dataclasses.replace(HYBRID, layers=layers), CPU, ["ours, torch"], rounds=1)
    assert verified == [1, 2, 2]


def _ours_with(change):
    def build(case, t):
        groups = bench.own_groups(case, t)
        if change == "no bias":
            for group in groups:
                group.live_bias = group.teacher_bias = group.bias0 = None
        decay = 0.999 if change == "another decay" else bench.DECAY

        def run():
            scale = 1.0001 if change == "gradients scaled" else 1.0
            loss = imitation_step(groups, decay=decay, loss_scale=scale, update_teacher=change != "teachers stay")
            if change == "one element of a gradient":
                groups[1].up[2].grad[3, 2] *= 1.01
            if change == "no gradient of one transform":
                groups[1].transform.up.grad.zero_()
            return loss * (1 + 2e-6) if change == "loss off by two millionths" else loss

        return bench._step(groups, run, backward=False)

    return build


def _autograd_with(change):
    """Gradients of one of the two parts of the loss alone."""

    def distance(group, m):
        pairs = zip(student(group, m, torch.float32), (group.teacher[m], group.teacher_bias[m]))
        of_weight, of_bias = (F.mse_loss(*pair) for pair in pairs)
        kept, lost = (of_bias, of_weight) if change == "biases' gradients" else (of_weight, of_bias)
        return kept + lost.detach() + 0 * lost

    return lambda case, t: bench._by_autograd(case, t, distance)


OURS = ("no bias", "another decay", "gradients scaled", "teachers stay", "one element of a gradient")
OURS += ("no gradient of one transform", "loss off by two millionths")
WRONG = {change: _ours_with(change) for change in OURS}
WRONG |= {change: _autograd_with(change) for change in ("biases' gradients", "weights' gradients")}


@pytest.mark.parametrize("change", WRONG)
def test_wrong_provider_is_refused(change):
    assert reason(bench.BENCH, runner.Provider(WRONG[change], None), HYBRID).startswith("wrong: ")


def test_what_is_changed_is_right_otherwise():
    providers = {"new": runner.Provider(_ours_with(None), None)}
    record = runner.measure(dataclasses.replace(bench.BENCH, providers=providers), HYBRID, CPU, ["new"], rounds=1)
    assert not record["absent"]


def test_wrong_teachers_alone_are_refused():
    build = bench._teachers_alone(lambda teachers, lives: torch._foreach_lerp_(teachers, lives, bench.DECAY))
    assert re.match("wrong: (y|teacher)", reason(bench.BENCH, runner.Provider(build, "lerp"), HYBRID))


def test_teachers_are_no_sums():
    """At this width the order of sums may change a gradient by more than a step moves a teacher."""
    case = bench.Case(1, 768, 2)
    problem = runner.pose(bench.BENCH, case, CPU)
    built = bench.PROVIDERS["authors' formula"].build(case, problem.tensors)
    runner.verify(bench.BENCH, "authors' formula", problem, built)
    ((_, _, order),) = problem.references.values()
    assert {"dA", "dB"} <= order.keys() and not any(name.startswith("teacher") for name in order)


def test_losses_of_the_whole_case_are_compared():
    """Where the layers that are verified are right, and another one is not."""

    def build(case, t):
        built = bench.PROVIDERS["ours, torch"].build(case, t)
        return built._replace(forward=lambda _: built.forward(None) * (1 + 1e-5 * (case.layers > 2)))

    three = dataclasses.replace(HYBRID, layers=3)
    told = reason(bench.BENCH, runner.Provider(build, None), three, "authors' formula")
    assert re.match("wrong: y is .* by authors' formula", told)
