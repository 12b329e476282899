"""The floor and the designs of `lowrank_projections`' benchmark, and that it refuses what is wrong."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from benchmark_cases import reason
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from peft_kernels.benchmarks import bench_lowrank_projections as bench
from peft_kernels.benchmarks import cases, floor, runner
from peft_kernels.benchmarks.floor import lowrank_linear
from peft_kernels.benchmarks.floor import lowrank_projections as costs
from peft_kernels.frozen_products import stacked
from peft_kernels.ops.lowrank_projections import lowrank_projections_reference
from peft_kernels.records import KEEP_ALL, Dropout, ProjectionNeeds, Projections

CPU = torch.device("cpu")
TINY = bench.Case(24, 16, 40, 3, 4, 24)
DROPPED = bench.Case(24, 16, 40, 3, 4, 24, dropout=0.25)
TWO = bench.Case(50, 24, 40, 2, 4, dropout=0.25)
ON_CPU = runner.providers_on(bench.BENCH, "cpu")


def built_of(name, t, case=TINY):
    return bench.PROVIDERS[name].build(case, t)


# ---- the cases ------------------------------------------------------------------------------------------------------


def test_widths_and_titles():
    assert bench.Case(8, 16, 40).widths == [40] * 3 and TINY.widths == [40, 24, 24]
    assert str(bench.Case(8, 16, 40, 2)) == "8 × 16 → 2 · 40, rank 16, dropout 0"
    assert str(DROPPED) == "24 × 16 → 40, 24, 24, rank 4, dropout 0.25"
    widths = [each.widths for each in bench.usual_cases(False, ["bfloat16"]) if not each.dropout]
    assert {(768,) * 3, (768,) * 2, (4096, 1024, 1024), (11008, 11008)} == set(map(tuple, widths))


def test_weights_lie_together_only_where_they_are_said_to():
    t = bench.make_tensors(TINY, CPU)
    (apart, *_), (together, *_) = t.parts(), t.parts(stacked=True)
    assert stacked(apart) is None and torch.equal(stacked(together), torch.cat(apart))
    assert [dy.shape for dy in t.input[1]] == [(24, 40), (24, 24), (24, 24)]
    for tensors, needed in zip(t.parts(), (False, False, True, True)):
        assert len(tensors) == 3 and {each.requires_grad for each in tensors} == {needed}
    for each in cases.converted(t, torch.float64), cases.rounded(cases.converted(t, torch.float64)):
        assert type(each) is bench.Tensors and len(each) == len(t) and each.x.requires_grad


# ---- the floor and the model ----------------------------------------------------------------------------------------


def test_floor_of_one_projection_is_that_of_lowrank_linear():
    one = (9232, 768, 768, 16, 2)
    assert costs.compulsory(9232, 768, [768], 16, 2) == lowrank_linear.compulsory(*one)
    assert costs.compulsory(9232, 768, [768], 0, 2) == lowrank_linear.compulsory(9232, 768, 768, 0, 2)
    for design, of_each in costs.OF_EACH.items():
        for dropout in (False, True):
            expected = lowrank_linear.passes(of_each, *one, dropout)
            assert costs.passes(design, 9232, 768, [768], 16, 2, dropout) == expected
    with pytest.raises(ValueError, match="design"):
        costs.passes("tail", 9232, 768, [768], 16, 2, False)


@pytest.mark.parametrize("design", ["torch", "passes"])
@pytest.mark.parametrize("dropout", [False, True])
def test_a_group_of_one_costs_what_lowrank_linear_does(design, dropout):
    sizes = (9232, 768, 3072, 16, 2)
    found = costs.passes(design, 9232, 768, [3072], 16, 2, dropout)
    scaled = 2 * 9232 * 16 * 2 if design == "torch" else 0  # z times s, which is a number in a single linear's forward
    for parts, others, more in zip(found, lowrank_linear.passes(design, *sizes, dropout), (scaled, 0)):
        assert floor.total(parts).bytes - more == floor.total(others).bytes


def test_x_is_read_once_each_way_by_the_kernels_and_by_others_in_every_thin_pass():
    """Three projections of 9232 × 768: x is 14 MB."""
    sizes, x = (9232, 768, [768] * 3, 16, 2, True), 9232 * 768 * 2
    together, apart = (costs.passes(design, *sizes) for design in ("passes", "one by one"))
    thin, thin_apart = ([p for p in each[0] if p.name.startswith("shrink")] for each in (together, apart))
    assert len(thin) == 1 and len(thin_apart) == 3
    assert sum(p.bytes for p in thin_apart) - thin[0].bytes == 2 * x
    down, down_apart = ([p for p in each[1] if p.name.startswith("down_bwd")] for each in (together, apart))
    assert sum(p.bytes for p in down_apart) - down[0].bytes in (4 * x, 4 * x - 3 * 9232 * 16 * 2)  # dz made late
    assert [p.bytes for p in apart[1] if p.name == "add"] == [3 * x] * 2
    assert not [p for p in together[1] if p.name == "add"]
    gemms = [p for p in costs.passes("passes, stacked", *sizes)[0] if p.name == "y += x Wᵀ"]
    assert len(gemms) == 1 and gemms[0].flops == sum(p.flops for p in together[0] if p.name == "y_j += x W_jᵀ")


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(
    ("design", "forward", "backward"),
    [
        ("linear", 3, 3 + 2),
        ("eager", 15, 21 + 2),
        ("one by one", 9, 12 + 2),
        ("passes", 2 + 3, 4 + 3),
        ("passes, stacked", 2 + 1, 4 + 3),
        ("unsloth", 9, 21),
    ],
)
def test_launches_by_hand(design, forward, backward, dropout):
    found = costs.passes(design, 9232, 768, [768] * 3, 16, 2, dropout)
    more = {"eager": (3, 3), "one by one": (3, 0), "passes": (1, 0), "passes, stacked": (1, 0)}.get(design, (0, 0))
    assert [len(parts) for parts in found] == [
        count + dropout * added for count, added in zip((forward, backward), more)
    ]


@pytest.mark.parametrize("name", ["frozen linears", "PEFT formula"])
def test_flops_are_those_of_the_matmuls(name):
    t = bench.make_tensors(TINY, CPU)
    built, design = bench._linears(TINY, t), "linear"
    if name != "frozen linears":  # the counter trips over PEFT's modules
        (_, builder), design = (
            bench.reference(bench.PROVIDERS["PEFT"], runner.Problem(TINY, t), built_of("PEFT", t), 1),
            "eager",
        )
        built = builder(TINY, t)
    with FlopCounterMode(display=False) as counter:
        runner.results(built, t.input)
    thin = TINY.M * max(TINY.K, *TINY.widths)
    matmuls = [part for parts in bench.passes(TINY, design, "cpu") for part in parts if part.flops > thin]
    assert counter.get_total_flops() == floor.total(matmuls).flops
    assert counter.get_total_flops() == floor.total(bench.least(TINY, design)).flops


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # where dz is made late, if there are few chunks
@pytest.mark.parametrize("case", [TINY, TWO, bench.Case(300, 768, 768), bench.Case(300, 128, 64, 4)], ids=str)
@pytest.mark.parametrize("design", ["passes", "passes, stacked"])
def test_launches_of_the_kernels(design, case, dtype, dropout):
    kernels = pytest.importorskip("peft_kernels.triton_kernels.lowrank_projections")
    from peft_kernels.triton_kernels.common import record_launches

    case = dataclasses.replace(case, dtype=dtype)
    t = bench.Tensors(*(tensor.detach() for tensor in bench.make_tensors(case, CPU)))
    weights, biases, downs, ups = map(list, t.parts(design.endswith("stacked")))
    x, dys = t.x, list(t.input[1])
    drops = Dropout(torch.zeros(case.J, 2, dtype=torch.int64), 0.25, "input") if dropout else KEEP_ALL
    projections, needs = (
        Projections(downs, ups, [torch.tensor(2.0)] * case.J),
        ProjectionNeeds(x=True, down=True, up=True),
    )
    with record_launches(run=False) as launches:
        *_, z = kernels.lowrank_projections_fwd(x, weights, biases, projections, drops)
        forward_launches = len(launches)
        kernels.lowrank_projections_bwd(dys, x, weights, projections._replace(z=z), drops, needs)
    forward, backward = costs.passes(design, case.M, case.K, case.widths, case.R, case.torch_dtype.itemsize, dropout)
    gemms = 1 if design.endswith("stacked") else case.J
    assert forward_launches + gemms + dropout == len(forward)  # drawing the seeds is a launch of torch
    assert len(launches) - forward_launches + case.J == len(backward)
    names = [part.name.partition(":")[0] for part in (*forward, *backward) if ":" in part.name or "sums" in part.name]
    for name, launch in zip(names, launches, strict=True):
        assert name.split(" ")[0].removesuffix("s") in launch.kernel.__name__


# ---- verify, then time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PEFT", "one by one, torch", "ours, torch"])
def test_masks_are_recovered(name):
    t = bench.make_tensors(DROPPED, CPU)
    before = [tensor.clone() for tensor in t]
    masks = bench.recover_masks(bench.PROVIDERS[name], DROPPED, t, seed=5)
    assert all(0 < mask.sum() < mask.numel() for mask in masks)
    assert not any(torch.equal(masks[j], masks[j - 1]) for j in range(3))  # each draws its own
    assert all(map(torch.equal, before, t))
    if name == "PEFT":
        torch.manual_seed(5)
        for mask in masks:
            assert torch.equal(mask, F.dropout(torch.ones_like(t.x), DROPPED.dropout) != 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [TINY, DROPPED, TWO], ids=str)
def test_right_providers_pass(case, dtype):
    case = dataclasses.replace(case, dtype=dtype)
    record = runner.measure(bench.BENCH, case, CPU, ON_CPU, rounds=1)
    assert record["absent"] == {} and [row["provider"] for row in record["results"]] == ON_CPU
    results = runner.verify(
        bench.BENCH,
        "ours, torch",
        problem := runner.pose(bench.BENCH, case, CPU),
        built_of("ours, torch", problem.tensors, case),
    )
    numbers = [j or "" for j in range(case.J)]
    assert list(results) == [
        *(f"y{j}" for j in numbers),
        "dx",
        *(f"d_{name}{j}" for name in ("down", "up") for j in numbers),
    ]
    kept = {row["provider"]: row["saved_bytes"] for row in record["results"]}
    assert kept["frozen linears"] == 0 and kept["ours, torch"] == kept["ours, torch, stacked weights"]
    assert kept["ours, torch"] < kept["PEFT"] or not case.dropout


def test_rotated_inputs_are_as_many_tensors():
    x, dys = bench.make_tensors(TINY, CPU).input
    torch.manual_seed(1)  # not the one that these were drawn from
    other_x, others = runner._another((x, dys))
    assert other_x.requires_grad and other_x.shape == x.shape and not torch.equal(x, other_x)
    assert [dy.shape for dy in others] == [dy.shape for dy in dys] and not torch.equal(others[2], dys[2])
    problem = runner.pose(bench.BENCH, TINY, CPU)
    assert runner.compulsory_bytes(bench.BENCH, problem) == 4 * 24 * (16 + 40 + 24 + 24)


def _formula_with(change):
    def build(case, t):
        weights, biases, downs, ups = t.parts()

        def forward(x):
            masks = [F.dropout(torch.ones_like(x), case.dropout) != 0 for _ in weights]
            masks = masks[:1] * case.J if change == "one mask for all" else masks
            scales = [2.0, 1.0, 2.0] if change == "a scale" else [2.0] * 3
            y = lowrank_projections_reference(
                x.detach() if change == "no gradient of x" else x,
                weights,
                biases,
                downs[::-1] if change == "another order" else downs,
                ups,
                scales=scales,
                masks=masks,
                dropout_p=case.dropout,
            )
            last = {"zeros": y[2] * 0, "nan": y[2] * float("nan"), "no gradient of x": y[2] + 0 * x.sum()}
            return *y[:2], last.get(change, y[2])

        return runner.Built(forward, bench._factors(downs, ups))

    return runner.Provider(build, None)


@pytest.mark.parametrize("change", ["zeros", "nan", "a scale", "another order", "no gradient of x"])
def test_wrong_provider_is_refused(change):
    assert reason(bench.BENCH, _formula_with(change), DROPPED, "PEFT").startswith("wrong: ")


def test_right_formula_is_taken():
    for change in (None, "one mask for all"):  # whatever masks a provider draws
        problem = runner.pose(bench.BENCH, DROPPED, CPU)
        named = dataclasses.replace(bench.BENCH, providers={"new": _formula_with(change)})
        assert isinstance(runner.build(named, "new", problem), runner.Built)


# ---- a peer that is not here, as its call is known -------------------------------------------------------------------


def _qkv(scale=1.0, bias=False):
    """As unsloth has it: of a block with PEFT's layers, for x (batch, rows, K)."""

    def apply_lora_qkv(block, x, inplace=True):
        assert not inplace and x.dim() == 3
        found = []
        for layer in (block.q_proj, block.k_proj, block.v_proj):
            update = x @ layer.lora_A["default"].weight.t() @ layer.lora_B["default"].weight.t()
            y = F.linear(x, layer.base_layer.weight, layer.base_layer.bias if bias else None)
            found.append(y + scale * layer.scaling["default"] * update)
        return found

    return apply_lora_qkv


def _told(case):
    """Why unsloth is not timed, or None."""
    found = runner.build(bench.BENCH, "unsloth", runner.pose(bench.BENCH, case, CPU))
    return found if isinstance(found, str) else None


def test_unsloth(monkeypatch):
    assert "unsloth" not in runner.providers_on(bench.BENCH, "cuda") and bench.PROVIDERS["unsloth"].foreign
    assert _told(TINY).startswith("absent: No module named")
    monkeypatch.setitem(sys.modules, "unsloth.kernels.fast_lora", SimpleNamespace(apply_lora_qkv=_qkv()))
    assert _told(TINY) is None
    assert _told(DROPPED) == "absent: no dropout"
    assert _told(bench.Case(24, 16, 40, 2, 4)) == "absent: of three projections"
    for wrong in (_qkv(scale=1.01), _qkv(bias=True)):
        monkeypatch.setitem(sys.modules, "unsloth.kernels.fast_lora", SimpleNamespace(apply_lora_qkv=wrong))
        assert _told(TINY).startswith("wrong: ")
    monkeypatch.setitem(sys.modules, "unsloth.kernels.fast_lora", SimpleNamespace(apply_lora_qkv=lambda *_, **__: None))
    assert _told(TINY).startswith("absent: TypeError: ")
