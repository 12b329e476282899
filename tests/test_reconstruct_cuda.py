"""The CUDA kernel of the reconstruction against the float64 definition: compiled for the CPU on csrc/host_emulation.h
everywhere, and as built for the GPU where there is one."""

import random
from dataclasses import dataclass

import cuda_emulation
import pytest
import torch
from cuda_cases import BF16, FLOAT, HALF
from cuda_emulation import fenced

from peft_kernels import records
from peft_kernels.backend import BackendUnavailableError
from peft_kernels.cuda_kernels import reconstruct as kernels
from peft_kernels.cuda_kernels import support
from peft_kernels.ops.reconstruct import reconstruct, reconstruct_reference
from peft_kernels.records import Factors


@dataclass(frozen=True)
class Case:
    rows: int = 63  # of one block
    cols: int = 136
    rank: int = 16
    blocks: tuple = (1, 1)
    core: str = "none"  # none | diag | dense
    dtype: torch.dtype = FLOAT
    factors: str = "same"  # same: as dtype | masters: float32 | mixed: float32 up, the rest as dtype
    base: str = "full"  # none | full | shared: one under every block
    aligned: bool = True
    tensor_scale: bool = False

    def __str__(self):
        words = [f"{self.rows}x{self.cols}", f"r{self.rank}", "{}o{}i".format(*self.blocks), self.core, self.factors]
        flags = [name for name in ("aligned", "tensor_scale") if getattr(self, name) != getattr(Case, name)]
        return "-".join([*words, str(self.dtype).removeprefix("torch."), f"base_{self.base}", *flags])


def sampled(count):
    """A fixed random sample of the grid."""
    draw = random.Random(7).choice
    for _ in range(count):
        blocks = draw([(1, 1), (3, 1), (1, 3), (2, 2)])
        yield Case(
            rows=draw([1, 5, 63, 64, 70]),
            cols=draw([1, 8, 63, 128, 136]),  # 63: blocks of a row that begin at odd elements
            rank=draw([1, 3, 16, 16, 33, 48, 70]),  # 33: one rank beyond a step of 32
            blocks=blocks,
            core=draw(["diag", "dense"] if blocks != (1, 1) else ["none", "none", "diag", "dense"]),
            dtype=draw([FLOAT, BF16, HALF]),
            factors=draw(["same", "masters", "mixed"]),
            base=draw(["none", "full", "shared"] if blocks[1] == 1 else ["none", "full"]),
            aligned=draw([True, True, False]),
            tensor_scale=draw([True, False]),
        )


CASES = [
    *sampled(60),
    *(Case(rank=160, rows=9, cols=24, core=core, dtype=HALF) for core in ("none", "diag", "dense")),
    *(Case(rows=130, cols=264, dtype=dtype, factors=f) for dtype in (BF16, HALF) for f in ("same", "masters", "mixed")),
]


@pytest.fixture(params=cuda_emulation.DEVICES)
def device(request):
    with cuda_emulation.kernels_on(request.param):
        yield request.param


def arguments(case, device):
    """(factors, base, dtype), as the launcher takes them."""
    O, I = case.blocks
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    down, up = normal(case.rank, case.cols) / case.rank**0.5, normal(case.rows, case.rank)
    core = {"none": None, "diag": normal(O, I, case.rank), "dense": normal(O, I, case.rank, case.rank)}[case.core]
    core = core / case.rank**0.5 if case.core == "dense" else core
    base = None if case.base == "none" else normal((1 if case.base == "shared" else O) * case.rows, I * case.cols)

    def put(t, dtype):
        if t is None or case.aligned:
            return None if t is None else t.to(device, dtype)
        return torch.zeros(t.numel() + 1, dtype=dtype, device=device)[1:].view(t.shape).copy_(t)

    other = FLOAT if case.factors == "masters" else case.dtype
    scale = torch.tensor(0.7, device=device) if case.tensor_scale else 0.7
    up = put(up, case.dtype if case.factors == "same" else FLOAT)
    return Factors(put(down, other), up, put(core, other), scale), put(base, case.dtype), case.dtype


def definition(factors, base, dtype, change=lambda t: t):
    """The result in float64; of changed tensors if asked."""
    down, up, core, scale, _ = factors
    down, up, core, base = (None if t is None else change(t.double()) for t in (down, up, core, base))
    blocks = (1, 1) if core is None else core.shape[:2]
    if base is not None:
        base = base.repeat(blocks[0] * up.shape[0] // base.shape[0], 1)
    return reconstruct_reference(down, up, core, scale=float(scale), base=base)


def verify(case, device):
    """Every element: one rounding of the result, and float32 errors of a sum with such absolute terms."""
    args = arguments(case, device)
    ours, exact, absolute = kernels.reconstruct_fwd(*args), definition(*args), definition(*args, change=torch.abs)
    assert ours.dtype == case.dtype and ours.shape == exact.shape and ours.is_contiguous()
    info = torch.finfo(case.dtype)
    bound = info.eps / 2 * exact.abs() + info.smallest_normal * info.eps + 4 * torch.finfo(FLOAT).eps * absolute
    excess = ((ours - exact).abs() / bound).max().item()
    assert excess <= 1, f"an error of {excess:.3g} times its bound"


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_definition(case, device):
    verify(case, device)


@pytest.mark.parametrize("core", ["none", "diag", "dense"])
@pytest.mark.parametrize("factors", ["same", "masters"])
@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
def test_merging_is_the_rounded_sum(dtype, factors, core, device):
    """A weight merged in half precision is the exact sum, rounded: 999 of 1000 elements. The others are off by no more
    than the float32 sum was before its rounding: steps of an element say nothing where large terms cancel."""
    case = Case(rows=128, cols=256, core=core, dtype=dtype, factors=factors)
    verify(case, device)
    args = arguments(case, device)
    ours, true = kernels.reconstruct_fwd(*args), definition(*args).float().to(dtype)
    assert (ours == true).double().mean() >= 0.999


@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_bits_repeat(dtype, device):
    args = arguments(Case(rows=70, rank=33, blocks=(2, 2), core="dense", dtype=dtype), device)
    assert kernels.reconstruct_fwd(*args).equal(kernels.reconstruct_fwd(*args))


@pytest.mark.kernels(run=False)
def test_limits(device):
    asked = records.Case("reconstruct", torch.device(device), HALF, shape=(8, 8))
    assert support.unsupported(asked._replace(dtype=FLOAT)) is None
    assert support.unsupported(asked._replace(blocks=(2**29, 3))) is None
    assert "2³¹ tiles" in support.unsupported(asked._replace(blocks=(2**29, 4)))
    assert "rows and columns" in support.unsupported(asked._replace(shape=(2**31, 8)))
    assert "device" in support.unsupported(asked._replace(device=torch.device("meta")))
    down, up = torch.zeros(4, 8, device=device).double(), torch.zeros(8, 4, device=device).double()
    with pytest.raises(BackendUnavailableError, match=r"'cuda' .* cannot run: .* not torch.float64"):
        reconstruct(down, up, backend="cuda")


# ---- the tests' own teeth --------------------------------------------------------------------------------------------

DELTA = "scale * sum.v[j]"
SUM = f"{DELTA} + (p.base ? to_float(out.octs[i].v[j]) : 0.f)"
PURE = "p.core_kind == Core::none && !p.up_float && !p.down_float"
MUTANTS = {
    "rounded before the base is added": (SUM, SUM.replace(DELTA, f"to_float(from_float<T>({DELTA}))")),
    "float32 factors rounded": (PURE, "p.core_kind == Core::none"),
    "dense core transposed": ("(pair * p.rank + a) * p.rank + r", "(pair * p.rank + r) * p.rank + a"),
    "base of the first block": ("p.base_shared ? 0 : p.block_rows * stride", "0"),
}
SENSITIVE = [
    Case(dtype=BF16, factors="masters"),
    Case(rank=40, blocks=(2, 1), core="dense"),
]


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(name):
    module = cuda_emulation.load(cuda_emulation.build([("reconstruct.cu", *MUTANTS[name])]))
    with cuda_emulation.installed(module), pytest.raises(AssertionError, match="times its bound"):
        for case in SENSITIVE:
            verify(case, "cpu")


def test_accesses_stay_in_bounds():
    def check(at_end):
        for case in CASES[::2]:
            kernels.reconstruct_fwd(*fenced(arguments(case, "cpu"), at_end))

    cuda_emulation.assert_inside_bounds(check)
