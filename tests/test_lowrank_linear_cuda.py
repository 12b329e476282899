"""The CUDA kernels of the low-rank linear against the float64 definition: compiled for the CPU on csrc/host_emulation.h
everywhere, and as built for the GPU where there is one."""

import itertools
from dataclasses import replace

import cuda_emulation
import pytest
import torch
from cuda_cases import BF16, CASES, FLOAT, HALF, OFFSET, SEED, Case, P, keep_mask, problem, rms, through_kernels, verify
from cuda_emulation import fenced

from peft_kernels.cuda_kernels import common, extension
from peft_kernels.cuda_kernels import lowrank_linear as kernels

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


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("in_blocks", [1, 3])
def test_hidden(in_blocks, dtype, device):
    p = problem(
        Case(
            dtype=dtype, in_cols=63, blocks=(1, in_blocks), core="diag" if in_blocks > 1 else "none", layout="strided"
        ),
        device,
    )
    x, down, dz = p.tensors["x"], p.tensors["down"], p.dy[:, : in_blocks * 16]
    z = kernels.lowrank_hidden_fwd(x, down, in_blocks)
    dx, d_down = kernels.lowrank_hidden_bwd(dz, x, down, (True, True))
    exact = [t.double().requires_grad_() for t in (x, down)]
    exact_z = (exact[0].unflatten(1, (in_blocks, -1)) @ exact[1].t()).flatten(1)
    exact_z.backward(dz.double())
    for ours, true in ((z, exact_z), (dx, exact[0].grad), (d_down, exact[1].grad)):
        assert rms(ours - true) <= 2 * torch.finfo(dtype).eps * rms(true) and ours.dtype == dtype
    assert kernels.lowrank_hidden_bwd(dz, None, down, (True, False))[0].equal(dx)
    assert kernels.lowrank_hidden_bwd(dz, x, down, (False, True))[1].equal(d_down)


@pytest.mark.parametrize(
    "case",
    [Case(core="dense", drop="rank", blocks=(2, 2), dtype=BF16), Case(drop="input"), Case(hidden=True, drop="core")],
    ids=str,
)
def test_only_what_is_needed(case, device):
    """Whatever subset is asked for, what comes is the same, bit for bit."""
    p = problem(case, device)
    full = list(through_kernels(p).values())[1:]
    for needs in itertools.product((False, True), repeat=5):
        if all(grad is not None or not need for need, grad in zip(needs, full)):
            some = list(through_kernels(p, needs).values())[1:]
            # whether dx has its part through z depends on who made z, not on what else is asked for
            assert all(grad is None or grad.equal(other) for grad, other in zip(some, full)), needs


def test_what_is_not_needed_is_not_read(device):
    p = problem(Case(), device)
    t = p.tensors
    args = {"down": t["down"], "up": t["up"], "core": None, "scale": 1.0}
    args |= {"rng": None, "dropout_p": 0.0, "dropout_on": "input"}
    full = kernels.lowrank_linear_bwd(
        p.dy, t["x"], t["weight"], z=t["x"][:, :16].contiguous(), needs=(True,) * 3 + (False,) * 2, **args
    )
    dx, *_ = kernels.lowrank_linear_bwd(p.dy, None, t["weight"], z=None, needs=(True, *[False] * 4), **args)
    assert dx.equal(full[0])
    _, d_down, *_ = kernels.lowrank_linear_bwd(p.dy, t["x"], None, z=None, needs=(False, True, *[False] * 3), **args)
    assert d_down.equal(full[1])
    args["down"] = None  # z came from outside and needs no gradient: dx has no part through it
    dx, *_ = kernels.lowrank_linear_bwd(p.dy, None, t["weight"], z=None, needs=(True, *[False] * 4), **args)
    assert dx.equal(p.dy @ t["weight"])


@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_bits_repeat(dtype, device):
    p = problem(Case(rows=130, rank=33, blocks=(2, 2), core="dense", drop="input", dtype=dtype), device)
    first, again = through_kernels(p), through_kernels(p)
    assert all(first[n] is None or first[n].equal(again[n]) for n in first)


@pytest.mark.kernels(run=False)
def test_no_rows(device):
    p = problem(Case(rows=0, core="dense", blocks=(2, 2), drop="rank"), device)
    results = through_kernels(p)
    assert results["y"].shape == (0, 192) and results["dx"].shape == (0, 126)
    assert all(results[n].shape == p.tensors[n].shape and not results[n].any() for n in ("down", "up", "core"))
    z = kernels.lowrank_hidden_fwd(p.tensors["x"], p.tensors["down"], 2)
    assert z.shape == (0, 32)
    dx, d_down = kernels.lowrank_hidden_bwd(z, p.tensors["x"], p.tensors["down"], (True, True))
    assert dx.shape == (0, 126) and not d_down.any()


def philox(row, group, seed, offset):
    """Philox-4x32-10 as published, in Python's integers."""
    low, key = 0xFFFFFFFF, [seed & 0xFFFFFFFF, seed >> 32]
    counter = [row, group, offset & low, offset >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [second >> 32 ^ counter[1] ^ key[0], second & low, first >> 32 ^ counter[3] ^ key[1], first & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return counter


def test_mask(device):
    assert philox(0, 0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # Random123's known answer
    mask = keep_mask(torch.tensor([SEED, OFFSET], device=device), P, 5, 21, kernels.launch)  # the one that is counted
    for row, column in itertools.product(range(5), range(21)):
        word = philox(row, column // 8, SEED, OFFSET)[column % 8 // 2]
        assert mask[row, column] == ((word >> column % 2 * 16 & 0xFFFF) >= round(P * 65536))
    rng = torch.tensor([3, 4], device=device)
    assert keep_mask(rng, 0.0, 9, 9).all()
    kept = keep_mask(rng, 0.25, 500, 200).float().mean().item()
    assert abs(kept - 0.75) < 0.006  # four standard deviations


@pytest.mark.kernels(run=False)
def test_limits(device):
    x = torch.zeros(2, 8, device=device)
    assert kernels.unsupported(x, 128) is None
    assert "128" in kernels.unsupported(x, 129)
    assert "1024" in kernels.unsupported(x, 128, 9)
    assert "float64" in kernels.unsupported(x.double(), 4)
    assert "tail" in kernels.unsupported(x, 4, design="tail")
    assert "device" in kernels.unsupported(x.to("meta"), 4)


def test_launch_on_the_wrong_device():
    """The real module refuses CPU tensors before any launch; without a module the reason says how to get one."""
    with cuda_emulation.installed(None):  # None in sys.modules: the import fails
        with pytest.raises(ImportError, match="nvcc"):
            extension()
        assert "nvcc" in kernels.unsupported(torch.zeros(1, 1), 1)


# ---- the tests' own teeth --------------------------------------------------------------------------------------------

FWD, BWD, SHARED = "lowrank_linear_fwd.cu", "lowrank_linear_bwd.cu", "lowrank_linear.cuh"
MUTANTS = {
    "zero output": (FWD, "from_float<T>(scale * v + bias[half + col])", "from_float<T>(0.f)"),
    "scale missing in the output": (FWD, "(scale * v + bias", "(v + bias"),
    "scale missing in the gradient": (BWD, "            v *= scale;\n", ""),
    "core blocks swapped": (SHARED, "int64_t(block) * p.in_blocks + b;", "int64_t(b) * p.in_blocks + block;"),
    "other mask in the backward": (
        BWD,
        "Wide::draw(p.dropout, row0, global0)",
        "Wide::draw(p.dropout, row0 + 1, global0)",
    ),
    "plain x in dA": (BWD, "            if (drops) w.drop(keep, p.dropout.inverse_keep);\n", ""),
    "dx unmasked": (BWD, "            if (drops) out.drop(keep, p.dropout.inverse_keep);\n", ""),
    "fragments swapped": ("multiply.cuh", "fragment_b[0], fragment_b[1]);", "fragment_b[1], fragment_b[0]);"),
}
SENSITIVE = [
    Case(rows=70, drop="input", dtype=BF16, core="diag", blocks=(2, 2), in_cols=21),
    Case(rows=70, core="dense", blocks=(3, 1), dtype=FLOAT),
]


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(name):
    module = cuda_emulation.load(cuda_emulation.build([MUTANTS[name]], "lowrank_linear"))
    with cuda_emulation.installed(module), pytest.raises(AssertionError, match=r"error .* bound"):
        for case in SENSITIVE:
            verify(case, "cpu")


def test_accesses_stay_in_bounds():
    def check(at_end):
        for case in CASES[::3]:
            p = problem(replace(case, layout="dense"), "cpu")
            through_kernels(replace(p, tensors=fenced(p.tensors, at_end), dy=fenced(p.dy, at_end)))

    cuda_emulation.assert_inside_bounds(check)
