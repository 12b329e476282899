"""The CUDA kernels of the low-rank linear against the float64 definition: compiled for the CPU on csrc/host_emulation.h
everywhere, and as built for the GPU where there is one."""

import contextlib
import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace

import cuda_emulation
import pytest
import torch
from cuda_cases import (
    BF16,
    CASES,
    FLOAT,
    HALF,
    OFFSET,
    SEED,
    Case,
    P,
    dropout_of,
    keep_mask,
    problem,
    rms,
    through_kernels,
    verify,
)
from cuda_emulation import fenced

from peft_kernels import records
from peft_kernels.cuda_kernels import common, extension
from peft_kernels.cuda_kernels import lowrank_linear as kernels
from peft_kernels.cuda_kernels.support import unsupported
from peft_kernels.layers.lowrank_linear import LowRankLinear
from peft_kernels.ops.lowrank_linear import lowrank_linear
from peft_kernels.records import KEEP_ALL, Factors, Needs
from peft_kernels.triton_kernels.config import PHILOX_ROUNDS

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
    x, weight, down, up = (p.tensors[name] for name in ("x", "weight", "down", "up"))

    def backward(x, weight, factors, /, **needs):
        return kernels.lowrank_linear_bwd(p.dy, x, weight, factors, KEEP_ALL, Needs(**needs))

    factors = Factors(down, up)
    full = backward(x, weight, factors._replace(z=x[:, :16].contiguous()), x=True, down=True, up=True)
    assert backward(None, weight, factors, x=True)[0].equal(full[0])
    assert backward(x, None, factors, down=True)[1].equal(full[1])
    # z came from outside and needs no gradient: dx has no part through it
    assert backward(None, weight, Factors(None, up), x=True)[0].equal(p.dy @ weight)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("drop", ["no", "input", "rank", "core"])
@pytest.mark.parametrize("rank", [16, 33])
def test_who_makes_dz_changes_no_bit(rank, drop, dtype, device):
    """The pass that reads x, or hidden_bwd where dz is asked for; over three chunks of columns and two of rows."""
    p = problem(Case(rows=130, out_cols=264, rank=rank, drop=drop, dtype=dtype, tensor_scale=drop == "rank"), device)
    x, weight, down, up = (p.tensors[name] for name in ("x", "weight", "down", "up"))
    for needs in ((True, True), (True, False), (False, True)):
        made, separate = (
            kernels.lowrank_linear_bwd(
                p.dy, x, weight, Factors(down, up, scale=p.scale), dropout_of(p), Needs(*needs, z=asks)
            )
            for asks in (False, True)
        )
        assert made[4] is None and separate[4].isfinite().all()
        assert [grad is not None for grad in made[:2]] == list(needs)
        assert all(grad is None or grad.equal(other) for grad, other in zip(made[:2], separate))


# ---- how much is launched and called ---------------------------------------------------------------------------------


def launched(case, needs=None):
    """By a forward and a backward of the emulation."""
    with cuda_emulation.kernels_on("cpu"):
        emulation = cuda_emulation.controls(cuda_emulation.emulated_module().__file__)
        p = problem(case, "cpu")
        emulation.emulation_launched()
        through_kernels(p, needs)
        return emulation.emulation_launched()


@pytest.mark.kernels(run=False)
@pytest.mark.parametrize(
    ("case", "count"),
    [
        (Case(), 5),  # shrink, expand; up_bwd, down_bwd, reduce
        (Case(drop="input"), 5),
        (Case(drop="rank"), 7),  # and mix, before expand and before up_bwd
        (Case(hidden=True), 4),  # expand; up_bwd, hidden_bwd, reduce
        (Case(core="diag"), 9),  # mix, mix, hidden_bwd, core_bwd
        (Case(rows=1, out_cols=1024, in_cols=1024), 5),  # each row of T is read 64 times
        (Case(rows=1, out_cols=1024, in_cols=1025), 6),
    ],
    ids=str,
)
def test_launches_are_few(case, count):
    assert launched(case) == count


@pytest.mark.kernels(run=False)
def test_a_warm_call_is_one_call_of_the_module():
    """Beside what makes tensors, and torch's own product. On a GPU two more ask for its number and its stream."""
    layer, x = LowRankLinear(torch.nn.Linear(64, 96), 8, backend="cuda"), torch.zeros(4, 64)
    calls = []

    def note(frame, event, function):
        inside = [each.f_code.co_name for each in _frames(frame)]
        if event == "call" and "lowrank_linear_fwd" in inside:
            calls.append(frame.f_code.co_name)
        if event == "c_call" and "lowrank_linear_fwd" in inside:
            calls.append(function.__name__)

    with cuda_emulation.kernels_on("cpu"):
        for profile in (None, None, note):
            sys.setprofile(profile)
            try:
                layer(x)
            finally:
                sys.setprofile(None)
    assert calls.count("lowrank_linear_fwd") == 2  # ours, and the module's
    assert len(calls) <= 9, calls


@pytest.mark.kernels(run=False)
@pytest.mark.parametrize("current", [0, 1])
def test_launches_go_to_the_tensors_device_and_its_stream(current, monkeypatch):
    """Which becomes the current device only where another one is."""
    entered, launched = [], []
    monkeypatch.setattr(common, "_current_device", lambda: current)
    monkeypatch.setattr(common, "_raw_stream", lambda index: 100 + index)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(entered.append(device.index)))
    like = SimpleNamespace(device=torch.device("cuda", 1))
    common.launch(lambda *arguments: launched.append(arguments), "params", like, 2, 3)
    assert launched == [("params", 101, 2, 3)] and entered == [1] * (current != 1)


def _frames(frame):
    while frame is not None:
        yield frame
        frame = frame.f_back


# ---- bits, masks, limits ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error:Dynamo detected")
def test_in_a_graph_bits_are_the_same(device):
    """And what the kernels cannot run is asked there, too."""
    layer = LowRankLinear(torch.nn.Linear(64, 96, device=device), 8, core="dense", out_blocks=3, backend="cuda")
    torch.nn.init.normal_(layer.up)
    x = torch.randn(5, 64, device=device, requires_grad=True)
    leaves = [x, layer.down, layer.up, layer.core]
    torch._dynamo.reset()
    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        y = call(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_bits_repeat(dtype, device):
    p = problem(Case(rows=130, rank=33, blocks=(2, 2), core="dense", drop="input", dtype=dtype), device)
    first, again = through_kernels(p), through_kernels(p)
    assert all(first[n] is None or first[n].equal(again[n]) for n in first)


@pytest.mark.kernels(run=False)
def test_no_rows(device):
    """Launchers get at least one row: the operation goes elsewhere."""
    p = problem(Case(rows=0, core="dense", blocks=(2, 2)), device)
    t = {name: None if tensor is None else tensor.requires_grad_() for name, tensor in p.tensors.items()}
    y = lowrank_linear(**t, backend="cuda", dropout_p=P, dropout_on="rank")
    y.sum().backward()
    assert y.shape == (0, 192) and t["x"].grad.shape == (0, 126)
    assert not any(t[name].grad.any() for name in ("down", "up", "core"))


def philox(row, group, seed, offset, rounds=PHILOX_ROUNDS):
    """Philox-4x32 as published, in Python's integers."""
    low, key = 0xFFFFFFFF, [seed & 0xFFFFFFFF, seed >> 32]
    counter = [row, group, offset & low, offset >> 32]
    for _ in range(rounds):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [second >> 32 ^ counter[1] ^ key[0], second & low, first >> 32 ^ counter[3] ^ key[1], first & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return counter


def test_mask(device):
    assert philox(0, 0, 0, 0, 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # Random123's known answers
    assert philox(0, 0, 0, 0) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
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
    case = records.Case("lowrank_linear", torch.device(device), FLOAT, rank=128, shape=(2, 8))
    assert unsupported(case) is None
    assert "128" in unsupported(case._replace(rank=129))
    assert "1024" in unsupported(case._replace(blocks=(1, 9))) and "1024" in unsupported(case._replace(blocks=(9, 1)))
    assert unsupported(case._replace(blocks=(8, 8))) is None
    assert "rows" in unsupported(case._replace(shape=(2**31, 8)))
    assert "float64" in unsupported(case._replace(dtype=torch.float64))
    assert "meta" in unsupported(case._replace(device=torch.device("meta")))
    with pytest.raises(ValueError, match="fused"):
        lowrank_linear(
            *(torch.zeros(*shape, device=device) for shape in ((2, 8), (6, 8))), None,
            *(torch.zeros(*shape, device=device) for shape in ((4, 8), (6, 4))), backend="cuda", design="fused",
        )  # fmt: skip


def test_launch_on_the_wrong_device():
    """The real module refuses CPU tensors before any launch; without a module the reason says how to get one."""
    with cuda_emulation.installed(None):  # None in sys.modules: the import fails
        with pytest.raises(ImportError, match="nvcc"):
            extension()
        assert "nvcc" in unsupported(records.Case("lowrank_linear", torch.device("cpu"), FLOAT))


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
    "one chunk of T for all": (BWD, "chunk += int64_t(p.rows) * rank)", "chunk += 0)"),
    "scale missing where the pass makes dz": (BWD, "float v = scale * sum[j];", "float v = sum[j];"),
    "mask missing where the pass makes dz": (BWD, "if (drops) v = keep", "if (false) v = keep"),
    "dz of the tile before": (BWD, "(t, p, row0);", "(t, p, row0 > 0 ? row0 - kRows : row0);"),
    "plain x in dA": (BWD, "            if (drops) w.drop(keep, p.dropout.inverse_keep);\n", ""),
    "dx unmasked": (BWD, "            if (drops) out.drop(keep, p.dropout.inverse_keep);\n", ""),
    "fragments swapped": ("multiply.cuh", "fragment_b[0], fragment_b[1]);", "fragment_b[1], fragment_b[0]);"),
}
SENSITIVE = [
    Case(rows=70, drop="input", dtype=BF16, core="diag", blocks=(2, 2), in_cols=21),
    Case(rows=70, core="dense", blocks=(3, 1), dtype=FLOAT),
    Case(rows=70, drop="rank", dtype=BF16, out_cols=264, strips=False),
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
