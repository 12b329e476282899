"""The floor and the designs of `lowrank_linear`'s benchmark, and that it refuses what is wrong."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from benchmark_cases import reason
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from peft_kernels.benchmarks import bench_lowrank_linear as bench
from peft_kernels.benchmarks import cases, floor, runner
from peft_kernels.benchmarks.floor import __main__ as limits
from peft_kernels.benchmarks.floor import lowrank_linear as costs
from peft_kernels.records import KEEP_ALL, Dropout, Factors, Needs

CPU = torch.device("cpu")
TINY = bench.Case(24, 16, 40, 4)
DROPPED = bench.Case(24, 16, 40, 4, dropout=0.25)
EAGER = ["frozen linear", "PEFT", "torch eager", "ours, torch"]

# ---- the floor and the model ----------------------------------------------------------------------------------------

# Microseconds on an H200, bfloat16, r = 16, forward and backward, and × floor: worked out by hand for the design
# documents, and rounded there.
BY_HAND = {
    "floor": ((704, 29.3, 115, 115), (1, 1, 1, 1)),
    "two frozen GEMMs": ((696, 27.6, 110, 110), None),
    "split graph (tail), mask regenerated": ((746, 38, 132, 142), (1.06, 1.31, 1.15, 1.24)),
    "low-rank first (passes)": ((774, 44, 147, 157), (1.10, 1.51, 1.28, 1.37)),
    "unsloth, no dropout": ((853, 61, 193, 193), (1.21, 2.09, None, None)),
    "torch eager and PEFT, no dropout": ((946, 81, 263, 223), (1.34, 2.76, None, None)),
    "torch eager and PEFT, dropout": ((1024, 97, 279, 289), (1.45, 3.32, None, None)),
}


@pytest.mark.parametrize("row", BY_HAND)
def test_limits_are_those_worked_out_by_hand(row):
    times, ratios = BY_HAND[row]
    found, least = limits.limits()[row], limits.limits()["floor"]
    for seconds, expected in zip(found, times, strict=True):
        assert seconds * 1e6 == pytest.approx(expected, abs=0.051 if expected < 30 else 0.53)  # sums of rounded parts
    for seconds, one, expected in zip(found, least, ratios or ()):
        assert expected is None or seconds / one == pytest.approx(expected, abs=0.0051)


def test_a_split_graph_spares_what_d1_writes_and_adds_to():
    """Forward y once each way, backward dx, where dz and A are read again."""
    x, y, z, down = (n * 2 for n in (50 * 24, 50 * 40, 50 * 4, 4 * 24))
    first, second = (costs.passes(design, 50, 24, 40, 4, 2, True) for design in ("passes", "tail"))
    made = next(part for part in second[1] if part.name.startswith("hidden_bwd"))  # as "passes" makes it in down_bwd
    for spared, flops, *parts in zip((2 * y, 2 * x - 3 * z - down), (0, made.flops), first, second):
        assert floor.total(parts[0]).bytes - floor.total(parts[1]).bytes == spared
        assert floor.total(parts[0]).flops == floor.total(parts[1]).flops - flops


def test_limits_as_a_table():
    text = limits.table(limits.limits())
    assert limits.limits().keys() == BY_HAND.keys() and all(shape in text for shape in limits.SHAPES)
    (line,) = (line for line in text.splitlines() if "low-rank first" in line)
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["774 (1.10)", "44.3 (1.51)", "147 (1.28)", "157 (1.37)"]
    slow = floor.Device("half", floor.H200.bytes_per_s / 2, {"bfloat16": 395e12}, "")
    for name, times in limits.limits(slow).items():
        assert times == pytest.approx([2 * time for time in limits.limits()[name]])


@pytest.mark.parametrize(
    "name", ["frozen linear", "torch eager"]
)  # the counter overlooks addmm_ and trips over modules
def test_flops_of_each_design_are_those_of_its_matmuls(name):
    t = bench.make_tensors(TINY, CPU)
    provider = bench.PROVIDERS[name]
    built = provider.build(TINY, t)
    with FlopCounterMode(display=False) as counter:
        runner.results(built, t.input)
    forward, backward = bench.passes(TINY, provider.design, "cpu")
    matmuls = sum(part.flops for part in forward + backward if part.flops > TINY.M * TINY.N)  # not additions
    assert counter.get_total_flops() == matmuls
    assert counter.get_total_flops() == floor.total(bench.least(TINY, provider.design)).flops


@pytest.mark.parametrize(("K", "N", "R", "apart"), [(768, 768, 16, 0), (768, 3072, 16, 1), (3072, 768, 16, 1),
                                                    (768, 768, 64, 1), (768, 768, 96, 1)])  # fmt: skip
@pytest.mark.parametrize("dropout", [False, True])
def test_many_chunks_make_hidden_bwd_a_pass_of_its_own(K, N, R, apart, dropout):
    _, backward = costs.passes("passes", 9232, K, N, R, 2, dropout)
    assert sum(part.name.startswith("hidden_bwd") for part in backward) == apart
    assert len(backward) == 4 + apart


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(("design", "gemms"), [("passes", 2), ("fused", 1)])
def test_launches_of_the_kernel_designs(design, gemms, dropout):
    from peft_kernels.triton_kernels import lowrank_linear as kernels
    from peft_kernels.triton_kernels.common import record_launches

    t = [tensor.detach() for tensor in bench.make_tensors(TINY, CPU)]
    x, weight, bias, down, up, dy = t
    drops = Dropout(torch.zeros(2, dtype=torch.int64), 0.25, "input") if dropout else KEEP_ALL
    factors, needs = Factors(down, up, scale=2.0), Needs(x=True, down=True, up=True)
    with record_launches(run=False) as launches:
        _, z = kernels.lowrank_linear_fwd(x, weight, bias, factors, drops, design)
        kernels.lowrank_linear_bwd(dy, x, weight, factors._replace(z=z), drops, needs)
    forward, backward = costs.passes(design, TINY.M, TINY.K, TINY.N, TINY.R, 4, dropout)
    assert len(launches) + gemms + dropout == len(forward + backward)  # drawing the seed is a launch of torch


# ---- verify, then time ----------------------------------------------------------------------------------------------


def test_mask_is_recovered():
    t = bench.make_tensors(DROPPED, CPU)
    before = [tensor.clone() for tensor in t]
    mask = bench.recover_mask(bench.PROVIDERS["torch eager"].build(DROPPED, t), t, seed=5)
    torch.manual_seed(5)
    assert torch.equal(mask, F.dropout(torch.ones_like(t.x), DROPPED.dropout) != 0)
    assert 0 < mask.sum() < mask.numel()
    assert all(torch.equal(old, new) for old, new in zip(before, t))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", bench.DROPOUTS)
def test_right_providers_pass(dropout, dtype):
    case = bench.Case(50, 24, 40, 4, dtype=dtype, dropout=dropout)
    problem = runner.Problem(case, bench.make_tensors(case, CPU))
    for name in EAGER:
        runner.verify(bench.BENCH, name, problem, bench.PROVIDERS[name].build(case, problem.tensors))


def test_each_mask_has_its_reference():
    problem = runner.Problem(DROPPED, bench.make_tensors(DROPPED, CPU))
    for seed in (1, 1, 2):
        for name in ("torch eager", "PEFT"):  # draw alike
            built = bench.PROVIDERS[name].build(DROPPED, problem.tensors)
            runner.verify(bench.BENCH, name, problem, built, seed)
    assert len(problem.references) == 2


def _eager_with(change):
    def build(case, t):
        def forward(x):
            dropped = F.dropout(x, case.dropout)
            hidden = {"undropped": x, "gradient of A undropped": dropped}.get(change, dropped) @ t.down.t()
            if change == "gradient of A undropped":
                hidden = hidden + (x @ t.down.t() - (x @ t.down.t()).detach())
            y = F.linear(x, t.weight, t.bias) + (1.0 if change == "no scale" else cases.SCALE) * hidden @ t.up.t()
            return {"zeros": y * 0, "nan": y * float("nan"), "one row": _without_last_row(y)}.get(change, y)

        return runner.Built(forward, {"d_down": t.down, "d_up": t.up})

    return runner.Provider(build, "eager")


def _without_last_row(y):
    return torch.cat([y[:-1], y[-1:] * 0])


@pytest.mark.parametrize("change", ["zeros", "nan", "one row", "no scale", "undropped", "gradient of A undropped"])
def test_wrong_provider_is_not_timed(change):
    assert reason(bench.BENCH, _eager_with(change), DROPPED, "PEFT").startswith("wrong: ")


class _InOneChain(torch.autograd.Function):
    """x Wᵀ and its gradients in float32, each sum from its first term to its last: no order is worse."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _chained(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return _chained(dy, weight.t()), _chained(dy.t(), x.t()) if ctx.needs_input_grad[1] else None


def _chained(a, b):
    total = torch.zeros(a.shape[0], b.shape[0])
    for one, other in zip(a.t(), b.t()):
        total += one[:, None] * other
    return total


def _with_linear(linear):
    def build(case, t):
        def forward(x):
            return linear(x, t.weight) + t.bias + cases.SCALE * linear(linear(x, t.down), t.up)

        return runner.Built(forward, {"d_down": t.down, "d_up": t.up})

    return runner.Provider(build, "eager")


def _in_tf32(x, weight):
    """Operands of 10 bits, as tensor cores take them unless float32 is asked for."""

    def cut(t):
        return ((t.detach().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) - t.detach() + t

    return F.linear(cut(x), cut(weight))


def test_the_order_of_sums_is_no_fault_and_less_precision_is_one():
    case = bench.Case(5000, 16, 24, 4)
    problem = runner.pose(bench.BENCH, case, CPU)

    def check(linear):
        providers = {"new": _with_linear(linear)}
        built = providers["new"].build(case, problem.tensors)
        return runner.verify(dataclasses.replace(bench.BENCH, providers=providers), "new", problem, built)

    check(_InOneChain.apply)
    ((key, (exact, usual, order)),) = problem.references.items()
    perfect = dict.fromkeys(usual, torch.finfo(torch.float32).eps / 2)  # as if plain torch only rounded results
    problem.references[key] = exact, perfect, order
    check(_InOneChain.apply)
    for allowed, linear in (({}, _InOneChain.apply), (order, _in_tf32)):
        problem.references[key] = exact, perfect, allowed
        with pytest.raises(cases.WrongResult):
            check(linear)


# ---- peers that are not here, as their calls are known ---------------------------------------------------------------


def _output_projection(bias, dropout, scale=1.0):
    """As unsloth and axolotl have it: of a block with PEFT's layer, for x (batch, rows, K)."""

    def apply_lora_o(block, x):
        layer, (batch, rows, _) = block.o_proj, x.shape
        dropped = layer.lora_dropout["default"](x) if dropout and block.training else x
        update = dropped @ layer.lora_A["default"].weight.t() @ layer.lora_B["default"].weight.t()
        y = F.linear(x, layer.base_layer.weight, layer.base_layer.bias if bias else None)
        return (y + scale * layer.scaling["default"] * update).view(batch, rows, -1)

    return apply_lora_o


def _fused_linear_lora(x, linear_w, lora_a, lora_b, alpha, seed=None, dropout_p=0.0, linear_bias=None):
    kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) >= dropout_p
    assert x.dim() == 3
    return F.linear(x, linear_w, linear_bias) + alpha * (x * kept / (1 - dropout_p)) @ lora_a.t() @ lora_b.t()


def _update(x, lora_a, lora_b, scale):
    return scale * x @ lora_a.t() @ lora_b.t()


FOREIGN = {
    "unsloth": ("unsloth.kernels.fast_lora", {"apply_lora_o": _output_projection(bias=False, dropout=True)}),
    "axolotl": ("axolotl.kernels.lora", {"apply_lora_o": _output_projection(bias=True, dropout=True)}),
    "LoRAFusion": ("lorafusion.ops.lora_v1", {"fused_linear_lora": _fused_linear_lora}),
    "chalk": ("chalk.ops.lora", {"load_lora": lambda: _update}),
    "chalk fused": ("chalk.ops.lora", {"fused_lora": lambda *args: args[-1] + _update(*args[:-1])}),
}


def _told(name, case):
    """Why it is not timed, or None."""
    found = runner.build(bench.BENCH, name, runner.pose(bench.BENCH, case, CPU))
    return found if isinstance(found, str) else None


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_peer(name, monkeypatch):
    assert name not in runner.providers_on(bench.BENCH, "cuda") and bench.PROVIDERS[name].foreign
    assert _told(name, TINY).startswith("absent: No module named")
    module, content = FOREIGN[name]
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**content))
    assert _told(name, TINY) is None
    assert _told(name, DROPPED) == ("absent: no dropout" if "chalk" in name else None)
    ((call, _),) = content.items()
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{call: lambda block: block}))
    assert _told(name, TINY).startswith("absent: TypeError: ")


def test_foreign_peer_that_has_nothing_for_this_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "chalk.ops.lora", SimpleNamespace(load_lora=lambda: None))
    assert _told("chalk", TINY) == "absent: its own test fails"


@pytest.mark.parametrize("wrong", [_output_projection(True, False), _output_projection(False, False, scale=1.01)])
def test_foreign_peer_that_is_wrong(wrong, monkeypatch):
    """With a bias that unsloth's has not, and with another scale."""
    monkeypatch.setitem(sys.modules, FOREIGN["unsloth"][0], SimpleNamespace(apply_lora_o=wrong))
    assert _told("unsloth", TINY).startswith("wrong: ")


@pytest.mark.parametrize("dropout", bench.DROPOUTS)
def test_what_is_saved_for_the_backward(dropout):
    case = dataclasses.replace(TINY, dropout=dropout)
    record = runner.measure(bench.BENCH, case, CPU, EAGER, rounds=1)
    saved = {row["provider"]: row["saved_bytes"] for row in record["results"]}
    assert saved["frozen linear"] == 0
    assert saved["ours, torch"] < saved["PEFT"] or dropout == 0
