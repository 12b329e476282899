"""The CUDA kernels of the gated query transformation against the float64 definition: compiled for the CPU on
csrc/host_emulation.h everywhere, and as built for the GPU where there is one."""

from dataclasses import replace
from itertools import product

import cuda_emulation
import pytest
import torch
from cuda_cases import laid_out
from cuda_emulation import fenced
from gated_query_cases import MODES, Problem, assert_as_accurate_as_torch

from peft_kernels import gated_query
from peft_kernels.backend import BackendUnavailableError
from peft_kernels.cuda_kernels import gated_query as kernels
from peft_kernels.cuda_kernels import support
from peft_kernels.records import Case, Gate, Modulated

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
WIDE = ("hidden", "text", "cross")
NAMES = ("hidden", "text", "gamma", "beta", "cross", "cross_gamma", "cross_beta")
PROBLEMS = [
    *(
        Problem(mode, 2, positions, width, padding, dtype)
        for (mode, padding), positions, width, dtype in product(
            (("additive", "none"), ("gated", "none"), ("gated", "some")),
            (1, 35, 63),  # 63: more rows than warps take at once
            (1, 63, 264, 768),  # 264: one oct into the second chunk of columns
            (FLOAT, BF16, HALF),
        )
    ),
    *(Problem(mode, 2, 35, 760, dtype=dtype, vector_dtype=FLOAT) for mode in MODES for dtype in (BF16, HALF)),
    Problem("gated", 1, 600, 40, "none", BF16),  # more positions than threads
    Problem("gated", 2, 20, 1288, "some", spread=30.0),
    Problem("additive", 300, 20, 24),  # strips of several rows for each warp
]


@pytest.fixture(params=cuda_emulation.DEVICES)
def device(request):
    with cuda_emulation.kernels_on(request.param):
        yield request.param


def arguments(problem, device, layout="dense"):
    """(tensors by name, options, dy), rows as the launchers take them."""
    tensors = {name: t.detach() for name, t in problem.tensors(device).items()}
    dy = problem.gradient(tensors["hidden"])
    tensors = {name: laid_out(t.flatten(0, 1), layout) if name in WIDE else t for name, t in tensors.items()}
    return tensors, problem.options(device), laid_out(dy.flatten(0, 1), layout)


def through_kernels(problem, tensors, options, dy, needs=(True,) * 7):
    """-> {"y", and every gradient asked for}; `needs` in the order of the tensors, and of hidden first."""
    t = tensors
    if problem.mode == "additive":
        text, cross = (Modulated(*(t[name] for name in each)) for each in (NAMES[1:4], NAMES[4:]))
        y = kernels.additive_query_fwd(t["hidden"], text, cross, options["scale"])
        text, cross = (m if needed else m._replace(values=None) for m, needed in ((text, needs[2]), (cross, needs[5])))
        grads = kernels.additive_query_bwd(dy, text, cross, options["scale"], needs[1:])
        grads = (dy if needs[0] else None, *grads)
    else:
        (hidden, *text), mask, needs = t.values(), options.get("padding_mask"), needs[:4]
        y, *gate = kernels.gated_query_fwd(hidden, Modulated(*text), mask, problem.positions)
        grads = kernels.gated_query_bwd(dy, hidden, Modulated(*text), mask, Gate(*gate), needs)
    assert [grad is not None for grad in grads] == list(needs)
    return {"y": y} | dict(zip(NAMES, grads))


def verify(problem, device, layout="dense"):
    def run(problem, device, backend):
        got = through_kernels(problem, *arguments(problem, device, layout))
        shape = (problem.batch, problem.positions)
        return {name: t.unflatten(0, shape) if t.dim() == 2 else t for name, t in got.items()}

    assert_as_accurate_as_torch(problem, device, "cuda", run)


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_against_the_definition(problem, device):
    verify(problem, device)


@pytest.mark.parametrize("layout", ["strided", "unaligned"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_wider_matrices(mode, dtype, layout, device):
    verify(Problem(mode, 2, 20, 264, dtype=dtype), device, layout)


@pytest.mark.parametrize("mode", MODES)
def test_bits_repeat_whatever_is_asked_for(mode, device):
    problem = Problem(mode, 3, 20, 72, dtype=BF16, vector_dtype=FLOAT)
    given = arguments(problem, device)
    everything = through_kernels(problem, *given)
    assert all(t.equal(everything[name]) for name, t in through_kernels(problem, *given).items())
    for index, name in enumerate(given[0]):
        alone = through_kernels(problem, *given, tuple(i == index for i in range(7)))
        assert alone[name].equal(everything[name])


def test_tensor_scale(device):
    problem = Problem("additive", 2, 9, 40)
    tensors, options, dy = arguments(problem, device)
    plain = through_kernels(problem, tensors, options, dy)
    in_memory = through_kernels(problem, tensors, {"scale": torch.tensor(problem.scale, device=device)}, dy)
    assert all(t.equal(in_memory[name]) for name, t in plain.items())


@pytest.mark.kernels(run=False)
def test_limits(device):
    asked = Case("gated_query", torch.device(device), FLOAT, shape=(6, 8))
    assert support.unsupported(asked) is None
    assert "pieces of 256 columns" in support.unsupported(asked._replace(shape=(2**30, 257)))
    assert "device" in support.unsupported(asked._replace(device=torch.device("meta")))
    double = torch.zeros(2, 3, device=device, dtype=torch.float64)
    with pytest.raises(BackendUnavailableError, match=r"'cuda' .* cannot run: .* not torch.float64"):
        gated_query("gated", double, double, double[0], double[0], backend="cuda")


# ---- the tests' own teeth --------------------------------------------------------------------------------------------

ADDITIVE, GATED = Problem("additive", 2, 35, 40, dtype=BF16), Problem("gated", 2, 35, 40, "some")
SHARED, MAIN, OTHER = "gated_query.cuh", "gated_query.cu", "gated_query_additive.cu"
MUTANTS = {
    "cross beta missing": (OTHER, " + cross_beta.v[j])", ")", ADDITIVE),
    "strips overlap": (OTHER, "first = p.rows * blockIdx.y / gridDim.y", "first = 0", ADDITIVE),
    "the other beta left out": (OTHER, "put<T>(p.d_cross_beta,", "put<T>(nullptr,", ADDITIVE),
    "last strip left out": (OTHER, "strip < p.strips", "strip < p.strips - 1", ADDITIVE),
    "sums of one warp": (SHARED, "sum.v[j] += other.v[j]", "sum.v[j] = other.v[j]", GATED),
    "padding in the total": (MAIN, "if (!sequence.kept(i)) return;", "", GATED),
    "softmax without its sum": (MAIN, "gate[i] /= sum", "gate[i] /= 1.f", GATED),
    "mean missing": (MAIN, "gate[i] * (ds[i] - mean)", "gate[i] * ds[i]", GATED),
    "padding gets the total's gradient": (MAIN, "(kept ? d_total.v[j] : 0.f)", "d_total.v[j]", GATED),
    "rows ahead are others": (MAIN, "visit(i + k * warps(), k);", "visit(i, k);", GATED),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(name):
    *change, problem = MUTANTS[name]
    module = cuda_emulation.load(cuda_emulation.build([change]))
    with cuda_emulation.installed(module), pytest.raises(AssertionError):
        verify(replace(problem, width=40), "cpu")


def test_accesses_stay_in_bounds():
    def check(at_end):
        for problem in PROBLEMS[::2]:
            through_kernels(problem, *fenced(arguments(problem, "cpu"), at_end))

    cuda_emulation.assert_inside_bounds(check)
