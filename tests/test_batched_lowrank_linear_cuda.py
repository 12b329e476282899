"""The CUDA kernels of the batched low-rank linear against the float64 definition: compiled for the CPU on
csrc/host_emulation.h everywhere, and as built for the GPU where there is one."""

import itertools
import random
from dataclasses import dataclass, replace

import cuda_emulation
import pytest
import torch
from cuda_cases import BF16, FLOAT, HALF, compare, laid_out
from cuda_emulation import fenced

from peft_kernels import adapter_segments, batched_lowrank_linear, records
from peft_kernels.backend import BackendUnavailableError
from peft_kernels.cuda_kernels import batched_lowrank_linear as kernels
from peft_kernels.cuda_kernels import common, support
from peft_kernels.ops.batched_lowrank_linear import batched_lowrank_linear_reference
from peft_kernels.records import AdapterSegments, Factors

NAMES = "x", "weight", "bias", "down", "up"


@dataclass(frozen=True)
class Case:
    rows: int = 130
    out_cols: int = 96
    in_cols: int = 63
    rank: int = 16
    adapters: int = 3
    index: str = "mixed"  # mixed | one: one adapter has every row | none: no row has one | gaps: adapters without rows
    dtype: torch.dtype = FLOAT
    factors: torch.dtype | None = None  # None: as dtype
    layout: str = "dense"  # dense | strided (16-byte accesses still possible) | unaligned
    bias: bool = True
    tensor_scale: bool = True
    strips: bool = True  # False: each gradient is one strip, written without partial sums

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        words = f"{self.rows}x{self.out_cols}x{self.in_cols}", f"r{self.rank}", f"{self.adapters}a", self.index, dtype
        flags = "factors", "layout", "bias", "tensor_scale", "strips"
        return "-".join([*words, *(name for name in flags if getattr(self, name) != getattr(Case, name))])


def sampled(count):
    """A fixed random sample of the grid."""
    draw = random.Random(7).choice
    for _ in range(count):
        yield Case(
            rows=draw([1, 5, 63, 130, 200]),  # 130, 200: adapters with more rows than a tile
            out_cols=draw([8, 63, 96, 136]),
            in_cols=draw([8, 63, 96, 136]),
            rank=draw([1, 3, 8, 16, 16, 33, 48]),
            adapters=draw([1, 2, 3, 5]),
            index=draw(["mixed", "mixed", "one", "none", "gaps"]),
            dtype=draw([FLOAT, BF16, HALF]),
            factors=draw([None, FLOAT]),
            layout=draw(["dense", "strided", "unaligned"]),
            bias=draw([True, False]),
            tensor_scale=draw([True, False]),
            strips=draw([True, False]),
        )


CASES = [
    *sampled(50),
    *(Case(rank=128, rows=70, dtype=dtype, adapters=2) for dtype in (FLOAT, BF16)),
    Case(rank=96, rows=33, dtype=HALF, factors=FLOAT, index="gaps"),
    Case(rows=200, index="one", dtype=BF16, in_cols=200, out_cols=264, strips=False),  # four tiles in one strip
]


@pytest.fixture(params=cuda_emulation.DEVICES)
def device(request):
    with cuda_emulation.kernels_on(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def one_strip(request, monkeypatch):
    case = getattr(request.node, "callspec", None)
    if case and not getattr(case.params.get("case"), "strips", True):
        monkeypatch.setattr(common, "PROCESSORS", 0)


@dataclass
class Problem:
    """Inputs in the case's dtypes, and what is needed to call either side."""

    tensors: dict  # NAMES, in the order of the reference; bias may be None
    dy: torch.Tensor
    scale: object
    index: torch.Tensor
    segments: AdapterSegments


def problem(case, device):
    M, N, K, R, L = case.rows, case.out_cols, case.in_cols, case.rank, case.adapters
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    values = {
        "x": normal(M, K),
        "weight": normal(N, K) / K**0.5,
        "bias": normal(N) if case.bias else None,
        "down": normal(L, R, K) / K**0.5,
        "up": normal(L, N, R) / R**0.5,
    }
    for name, value in values.items():
        if value is not None:
            value = value.to(device, (case.factors or case.dtype) if name in ("down", "up") else case.dtype)
            values[name] = laid_out(value, case.layout) if name in ("x", "weight") else value
    dy = laid_out(normal(M, N).to(device, case.dtype), case.layout)
    scale = (torch.rand(L, generator=generator) + 0.5).to(device) if case.tensor_scale else 0.7
    index = torch.randint(-1, L, (M,), generator=generator)
    if case.index in ("one", "none"):
        index.fill_(L - 1 if case.index == "one" else -1)
    elif case.index == "gaps":
        index[index % 2 == 0] = -1
    index = index.to(device)
    return Problem(values, dy, scale, index, adapter_segments(index, L))


def through_kernels(p, needs=(True, True, True)):
    """-> {"y", "x", "down", "up"}, the gradients None where not needed."""
    t, factors = p.tensors, Factors(p.tensors["down"], p.tensors["up"], scale=p.scale)
    y, z = kernels.batched_lowrank_linear_fwd(t["x"], t["weight"], t["bias"], factors, p.segments)
    assert z[p.index < 0].isnan().all() and not z[p.index >= 0].isnan().any()  # never written: poisoned
    factors = factors._replace(z=z if needs[2] else None)
    args = (p.dy, t["x"] if needs[1] else None, t["weight"] if needs[0] else None, factors, p.segments, needs)
    grads = kernels.batched_lowrank_linear_bwd(*args) if any(needs) else (None,) * 3
    assert [g is not None for g in grads] == list(needs)
    return dict(zip(("y", "x", "down", "up"), (y, *grads)))


def through_reference(p, dtype, change=lambda t: t):
    """The same by autograd of the definition, in `dtype`; of changed inputs if asked."""
    leaves = {n: None if t is None else change(t.detach().clone()).requires_grad_() for n, t in p.tensors.items()}
    inputs = {n: None if t is None else t.to(dtype) for n, t in leaves.items()}
    scale = p.scale.to(dtype) if isinstance(p.scale, torch.Tensor) else p.scale
    y = batched_lowrank_linear_reference(**inputs, adapter_index=p.index, scale=scale)
    y.backward(change(p.dy).to(dtype))
    return {"y": y.detach(), **{name: leaves[name].grad for name in ("x", "down", "up")}}


def verify(case, device):
    p = problem(case, device)
    wide = replace(p, tensors={n: None if t is None else t.double() for n, t in p.tensors.items()}, dy=p.dy.double())
    exact, absolute = (through_reference(wide, torch.float64, change) for change in (lambda t: t, torch.abs))
    compare(through_kernels(p), exact, through_reference(p, case.dtype), absolute, case.dtype)


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_definition(case, device):
    verify(case, device)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_only_what_is_needed(dtype, device):
    """Whatever subset is asked for, what comes is the same, bit for bit."""
    p = problem(Case(dtype=dtype), device)
    full = through_kernels(p).values()
    for needs in itertools.product((False, True), repeat=3):
        some = through_kernels(p, needs).values()
        assert all(grad is None or grad.equal(other) for grad, other in zip(some, full)), needs


@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_bits_repeat(dtype, device):
    p = problem(Case(rows=200, rank=33, dtype=dtype, adapters=2), device)
    first, again = through_kernels(p), through_kernels(p)
    assert all(first[n].equal(again[n]) for n in first)


def test_a_row_does_not_depend_on_its_batch(device):
    """The same bits for a row's output whatever else is in the batch, as far as torch's own product allows."""
    case = Case(rows=200, dtype=BF16, adapters=5)
    p = problem(case, device)
    p.tensors["weight"].zero_()
    y = through_kernels(p)["y"]
    some = torch.arange(0, case.rows, 3, device=device)
    tensors = p.tensors | {"x": p.tensors["x"][some]}
    alone = replace(p, tensors=tensors, dy=p.dy[some], index=p.index[some])
    assert through_kernels(replace(alone, segments=adapter_segments(alone.index, 5)))["y"].equal(y[some])


@pytest.mark.kernels(run=False)
def test_limits(device):
    asked = records.Case("batched_lowrank_linear", torch.device(device), FLOAT, rank=128, shape=(2, 8))
    assert support.unsupported(asked) is None
    assert "128" in support.unsupported(asked._replace(rank=129))
    assert "float64" in support.unsupported(asked._replace(dtype=torch.float64))
    assert "device" in support.unsupported(asked._replace(device=torch.device("meta")))
    assert "2³¹ rows" in support.unsupported(asked._replace(shape=(2**31, 8)))
    p = problem(Case(rank=129, rows=4), device)
    with pytest.raises(BackendUnavailableError, match=r"'cuda' .* cannot run: .* not 129"):
        batched_lowrank_linear(*p.tensors.values(), p.index, backend="cuda")


# ---- the tests' own teeth --------------------------------------------------------------------------------------------

SHARED, BWD = "batched_lowrank_linear.cuh", "batched_lowrank_linear_bwd.cu"
MUTANTS = {
    "the first adapter's factors": (SHARED, "adapter * elements *", "0 * elements *"),
    "the first adapter's scale": (SHARED, "scale_ptr ? scale_ptr[adapter] : scale", "scale_ptr ? scale_ptr[0] : scale"),
    "scale missing in the gradient": (BWD, "        v *= scale;\n", ""),
    "rows not gathered in the gradient": (
        BWD,
        "thin_rows.find(order + row0, rows - row0);",
        "for (int i = 0; i < Thin::kOcts; ++i) thin_rows.at[i] = Thin::row_of(i) < rows - row0 ? row0 : -1;",
    ),
}
SENSITIVE = Case(dtype=BF16, index="mixed", rows=200)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(name):
    module = cuda_emulation.load(cuda_emulation.build([MUTANTS[name]]))
    with cuda_emulation.installed(module), pytest.raises(AssertionError, match=r"error .* bound"):
        verify(SENSITIVE, "cpu")


def test_accesses_stay_in_bounds():
    def check(at_end):
        for case in CASES[::2]:
            p = problem(replace(case, layout="dense"), "cpu")
            inputs = {"tensors": p.tensors, "dy": p.dy, "scale": p.scale, "segments": p.segments}
            through_kernels(replace(p, **fenced(inputs, at_end)))

    cuda_emulation.assert_inside_bounds(check)
