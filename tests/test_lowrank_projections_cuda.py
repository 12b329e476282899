"""The CUDA kernels of the low-rank projections against the float64 definition: compiled for the CPU on
csrc/host_emulation.h everywhere, and as built for the GPU where there is one."""

import itertools
from dataclasses import replace

import cuda_emulation
import pytest
import torch
from cuda_cases import BF16, FLOAT, HALF, OFFSET, SEED, P
from cuda_emulation import fenced
from projections_cuda_cases import CASES, SENSITIVE, Case, each, problem, through_kernels, verify

from peft_kernels import records
from peft_kernels.cuda_kernels import common
from peft_kernels.cuda_kernels import lowrank_linear as single
from peft_kernels.cuda_kernels import lowrank_projections as kernels
from peft_kernels.cuda_kernels.support import unsupported
from peft_kernels.ops.lowrank_projections import lowrank_projections
from peft_kernels.records import KEEP_ALL, Dropout, Factors, ProjectionNeeds, Projections

# ---- fixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=cuda_emulation.DEVICES)
def device(request):
    with cuda_emulation.kernels_on(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def one_strip(request, monkeypatch):
    case = getattr(request.node, "callspec", None)
    if case and not getattr(case.params.get("case"), "strips", True):
        monkeypatch.setattr(common, "PROCESSORS", 0)


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_definition(case, device):
    verify(case, device)


@pytest.mark.parametrize(
    "case",
    [
        Case(drop="input", dtype=BF16),
        Case(rank=48, rows=130, strips=False),
        Case(shared=True, drop="rank"),
        Case(shared=True, drop="input", rank=33),
        Case(shared=True, drop="rank", hidden=True),
    ],
    ids=str,
)
def test_only_what_is_needed(case, device):
    """Whatever subset is asked for, what comes is the same, bit for bit."""
    p = problem(case, device)
    full = through_kernels(p)
    for needs in itertools.product((False, True), repeat=4):
        if True in needs and all(full[name] is not None for name, need in zip(list(full)[1:], needs) if need):
            some = through_kernels(p, needs)
            assert all(value is None or value.equal(full[name]) for name, value in some.items()), needs


@pytest.mark.parametrize("drop", ["input", "rank"])
@pytest.mark.parametrize("shared", [False, True])
def test_masks_are_the_low_rank_linears(shared, drop, device):
    """Exactly: where A, B and W are the identity, 1 and 0, outputs and gradients of a tensor of ones are masks."""
    J, M, K = 3, 70, 24
    one, zero = torch.eye(K, device=device), torch.zeros(K, K, device=device)
    x, scale = torch.ones(M, K, device=device), torch.tensor(1.0, device=device)
    rng = torch.tensor([[SEED + 3 * j, OFFSET + j] for j in range(J)], device=device)
    factors, dropout = Projections([one] * (1 if shared else J), [one] * J, [scale] * J), Dropout(rng, P, drop)
    *ys, _ = kernels.lowrank_projections_fwd(x, [zero] * J, [None] * J, factors, dropout)
    needs, one_alone = ProjectionNeeds(x=True), Factors(one, one, scale=scale)
    dx, *_ = kernels.lowrank_projections_bwd([x] * J, None, [zero] * J, factors, dropout, needs)
    masks = []
    for y, pair in zip(ys, rng):
        mask, _ = single.lowrank_linear_fwd(x, zero, None, one_alone, dropout._replace(rng=pair.clone()))
        assert y.equal(mask) and 0 < (mask > 0).float().mean() < 1
        masks.append(mask)
    assert not masks[0].equal(masks[1])
    assert dx.equal(masks[0] + masks[1] + masks[2])


@pytest.mark.parametrize(
    "case",
    [Case(drop="input"), Case(shared=True, drop="rank"), Case(rank=33), Case(shared=True, hidden=True)],
    ids=str,
)
def test_outputs_that_nothing_used(case, device):
    """What they would have added to gradients is nothing."""
    p = problem(case, device)
    leaves = {name: each(t, lambda t: t.requires_grad_()) for name, t in p.tensors.items()}
    x, weights, biases, downs, ups, hidden = leaves.values()
    wanted = [*([x] if hidden is None else [x, hidden]), *([] if case.hidden else downs), *ups, *weights, *biases]

    def outputs():
        torch.manual_seed(3)
        return lowrank_projections(
            x, weights, biases, downs[0] if case.shared else downs, ups, hidden=hidden, scales=p.scales, backend="cuda",
            dropout_p=0.0 if p.rng is None else P, dropout_on="input" if p.rng is None else case.drop,
        )  # fmt: skip

    for used in [(0, 2), (1,), (2,)]:
        ys = outputs()
        grads = torch.autograd.grad([ys[j] for j in used], wanted, [p.dys[j] for j in used], allow_unused=True)
        dys = [dy if j in used else torch.zeros_like(dy) for j, dy in enumerate(p.dys)]
        for grad, whole in zip(grads, torch.autograd.grad(outputs(), wanted, dys)):
            assert not whole.any() if grad is None else torch.allclose(grad, whole, atol=1e-5)


def test_outputs_lie_together_where_weights_do(device):
    p = problem(Case(stacked=True), device)
    t = p.tensors
    chosen = Projections(t["downs"], t["ups"], p.scales)
    *ys, _ = kernels.lowrank_projections_fwd(t["x"], t["weights"], t["biases"], chosen, KEEP_ALL)
    assert [y.data_ptr() - ys[0].data_ptr() for y in ys] == [0, 96 * 4, 159 * 4]
    assert all(y.stride() == (199, 1) for y in ys)


# ---- how much is launched --------------------------------------------------------------------------------------------


@pytest.mark.kernels(run=False)
@pytest.mark.parametrize(
    ("case", "needs", "count"),
    [
        (Case(), None, 6),  # shrink, expand; up_bwd, hidden_bwd, down_bwd, reduce
        (Case((64,) * 4, drop="rank", stacked=True), None, 6),
        (Case(rank=100, drop="input"), None, 6),
        (Case(shared=True, drop="rank"), None, 6),
        (Case(shared=True, drop="rank", hidden=True), None, 4),  # neither shrink nor down_bwd
        (Case(), (True, False, False, False), 5),
        (Case(), (False, False, True, False), 4),
        (Case(shared=True, hidden=True), (True, False, False, False), 1),  # expand
    ],
    ids=str,
)
def test_launches_are_few(case, needs, count):
    with cuda_emulation.kernels_on("cpu"):
        emulation = cuda_emulation.controls(cuda_emulation.emulated_module().__file__)
        p = problem(case, "cpu")
        emulation.emulation_launched()
        through_kernels(p, needs)
        assert emulation.emulation_launched() == count


# ---- bits, limits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_bits_repeat(dtype, device):
    p = problem(Case(rows=130, rank=33, drop="input", dtype=dtype), device)
    first, again = through_kernels(p), through_kernels(p)
    assert all(first[name] is None or first[name].equal(again[name]) for name in first)


@pytest.mark.filterwarnings("error:Dynamo detected")
@pytest.mark.parametrize("stacked", [False, True])
def test_in_a_graph_bits_are_the_same(stacked, device):
    p = problem(Case(stacked=stacked), device)
    x, weights, biases, downs, ups, _ = p.tensors.values()
    leaves = [t.requires_grad_() for t in (x, *downs, *ups)]

    def call(x):
        return lowrank_projections(x, weights, biases, downs, ups, scales=p.scales, backend="cuda")

    torch._dynamo.reset()
    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        ys = function(x)
        results.append((*ys, *torch.autograd.grad(ys, leaves, p.dys)))
    assert all(map(torch.equal, *results))


@pytest.mark.kernels(run=False)
def test_no_rows(device):
    """Launchers get at least one row: the operation goes elsewhere."""
    p = problem(Case(rows=0), device)
    x, weights, biases, downs, ups, _ = p.tensors.values()
    leaves = [t.requires_grad_() for t in (x, *downs, *ups)]
    ys = lowrank_projections(x, weights, biases, downs, ups, dropout_p=P, backend="cuda")
    grads = torch.autograd.grad(ys, leaves, p.dys)
    assert [y.shape for y in ys] == [(0, 96), (0, 63), (0, 40)] and not any(grad.any() for grad in grads)


@pytest.mark.kernels(run=False)
def test_limits(device):
    case = records.Case("lowrank_projections", torch.device(device), FLOAT, rank=128, shape=(2, 8), projections=4)
    assert unsupported(case) is None
    assert "128" in unsupported(case._replace(rank=129))
    assert "4 projections" in unsupported(case._replace(projections=5))
    assert "rows" in unsupported(case._replace(shape=(2**31, 8)))
    assert "float64" in unsupported(case._replace(dtype=torch.float64))


# ---- the tests' own teeth --------------------------------------------------------------------------------------------

OURS, SHARED = "lowrank_projections.cu", "lowrank_passes.cuh"
FWD, BWD = "lowrank_linear_fwd.cu", "lowrank_linear_bwd.cu"
SPILLED = "if (out && !held) Factor::template copy<true>(factors, p.downs[j],"
MUTANTS = {
    "one mask for all": (SHARED, "dropout.rng += 2 * j;", "dropout.rng += 0;"),
    "another mask in shrink": (FWD, "draw(dropout_of(p.dropout, first + s), row0,", "draw(p.dropout, row0,"),
    "one x for all in shrink": (FWD, "(drops ? slot * Wide::kElements : 0)", "0"),
    "one A for all in shrink": (FWD, "(p.downs[first + s],", "(p.downs[0],"),
    "one group's sum in z": (FWD, "q < (s + 1) * kParts;", "q < s * kParts + 1;"),
    "one z for all in y": (FWD, "int64_t(block + j) * p.s_step", "int64_t(block) * p.s_step"),
    "z's mask missing in y": (FWD, "if (dropout.rng) s.drop", "if (false) s.drop"),
    "one scale for all in y": (FWD, "each.scale_ptr ? *each.scale_ptr", "each.scale_ptr ? *p.of[0].scale_ptr"),
    "one z for all in dB": (BWD, "int64_t(block + j) * p.thin_step", "int64_t(block) * p.thin_step"),
    "z's mask missing in dB": (BWD, "if (PASS == Pass::up && p.thin_dropout.rng)", "if (false)"),
    "scale missing in dB": (BWD, "= scale * v;", "= v;"),
    "scale missing in dz": (OURS, "        v *= *p.of[j].scale;\n", ""),
    "z's mask missing in dz": (OURS, "dz += p.dropout.rng ?", "dz += false ?"),
    "one projection in the dz of all": (OURS, "p.products == 1 ? p.count : first + 1", "first + 1"),
    "another mask in the pass over x": (OURS, "(p.dropout, j), row0, col0)", "(p.dropout, j), 0, 0)"),
    "plain x in dA": (OURS, "if (drops) dropped.drop(keep, p.dropout.inverse_keep);", ""),
    "masked x of the first in dA": (OURS, "(drops || j == own)", "(j == own)"),
    "dx unmasked": (OURS, "if (!drops) sum[n][i] += acc[n][i];", "if (true) sum[n][i] += acc[n][i];"),
    "dx not rescaled": (OURS, "+= acc[n][i] * p.dropout.inverse_keep;", "+= acc[n][i];"),
    "the last projection in dx": (OURS, "if (!drops) sum[n][i] += acc", "if (!drops) sum[n][i] = acc"),
    "one A for all in dx": (OURS, "(held ? j : 0) * Factor", "0 * Factor"),
    "one A for all beyond the slots": (OURS, SPILLED, SPILLED.replace("[j]", "[0]")),
    "one dz for all": (OURS, "j * p.rank, p.rank);", "0, p.rank);"),
    "gradients of other rounds": (OURS, "int64_t(own + s) * p.rank", "int64_t(s) * p.rank"),
    "a shared A's gradient is the first's": (OURS, "p.shared ? 0 : j - own;", "j - own;"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(name):
    module = cuda_emulation.load(cuda_emulation.build([MUTANTS[name]], "lowrank_"))
    with cuda_emulation.installed(module), pytest.raises(AssertionError, match=r"error .* bound"):
        for case in SENSITIVE:
            verify(case, "cpu")


def test_accesses_stay_in_bounds():
    def check(at_end):
        for case in CASES[::3]:
            p = problem(replace(case, layout="dense", stacked=False), "cpu")
            tensors, dys, rng, scales = (fenced(value, at_end) for value in (p.tensors, p.dys, p.rng, p.scales))
            through_kernels(replace(p, tensors=tensors, dys=dys, rng=rng, scales=scales))

    cuda_emulation.assert_inside_bounds(check)
