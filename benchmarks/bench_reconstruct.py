"""`reconstruct` and `reconstruct_stack`, against what else one would write: verified first, then timed.

    python -m peft_kernels bench reconstruct
    pytest benchmarks/bench_reconstruct.py --benchmark-only

Every provider computes W_k = base_k + s · B core_k A for N matrices at once, in the dtype of its factors; forward +
backward also the gradients of A, B and the cores, the base being frozen. GB/s counts the compulsory bytes: every
element of W written once, base and factors read once. On a CPU most of the time goes into new pages for W, with every
provider but the copy: filling 85 MB took 39 ms the first time and 4 ms again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import reconstruct, reconstruct_stack
from peft_kernels.ops.reconstruct import reconstruct_reference

from . import cases, runner
from .cases import SCALE
from .floor import reconstruct as costs
from .runner import Absent, Built, Provider

OP = "reconstruct"
CORES = ("none", "diagonal", "dense")


# ---- cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case(cases.Case):
    """N matrices (rows, columns) of rank R that share A and B, each on a base of its own if there is one."""

    N: int
    rows: int
    columns: int
    R: int
    core: str = "diagonal"  # "none": N = 1, and no stack
    base: bool = False

    def __str__(self) -> str:
        sizes = f"{self.N} × {self.rows} × {self.columns}, rank {self.R}"
        core = "no core" if self.core == "none" else f"{self.core} cores"
        return f"{sizes}, {core}, {'on a base' if self.base else 'no base'}"


class Tensors(NamedTuple):
    base: Tensor | None
    down: Tensor
    up: Tensor
    core: Tensor | None
    dw: Tensor

    @property
    def input(self) -> runner.Input:
        return self.base, self.dw


# Aurora's stacks in BLIP and ViLT (width 768, rank 64, 12 layers of 3 or 9 projections), and a LoRA merge at 4096.
ALIKE = {"rows": 768, "columns": 768, "R": 64}
MERGE = {"N": 1, "rows": 4096, "columns": 4096, "R": 16, "core": "none", "base": True}
STACKS = (
    {"N": 36, "core": "diagonal", **ALIKE},
    {"N": 1, "core": "diagonal", **ALIKE},
    {"N": 36, "core": "dense", **ALIKE},
    {"N": 36, "core": "diagonal", "base": True, **ALIKE},
    {"N": 108, "core": "diagonal", **ALIKE},
)
CPU_CASES = (*STACKS, MERGE)
GPU_CASES = (
    *STACKS,
    {"N": 1, "core": "dense", **ALIKE},
    {"N": 36, "core": "dense", "base": True, **ALIKE},
    {"N": 108, "core": "dense", **ALIKE},
    {"N": 108, "core": "diagonal", "base": True, **ALIKE},
    MERGE,
)
PRESETS = {"blip": ((108, 768, 768, 64),), "vilt": ((36, 768, 768, 64),), "llm": ((1, 4096, 4096, 16),)}
BACKWARD_CASES = ({"N": 36, "core": "diagonal", **ALIKE}, {"N": 36, "core": "dense", **ALIKE})


def usual_cases(on_cpu: bool, dtypes: Sequence[str]) -> list[Case]:
    *forward, merge = [(each, False) for each in (CPU_CASES if on_cpu else GPU_CASES)]
    both = [*forward, *((each, True) for each in BACKWARD_CASES), merge]
    return [Case(**each, dtype=dtype, backward=backward) for dtype in dtypes for each, backward in both]


def shaped(shape: Sequence[int], dtype: str) -> list[Case]:
    """Every core, with and without a base, forward and with backward."""
    cores = CORES if shape[0] == 1 else CORES[1:]
    kinds = [(core, base, backward) for core in cores for base in (False, True) for backward in (False, True)]
    return [Case(*shape, core, base, dtype=dtype, backward=backward) for core, base, backward in kinds]


def make_tensors(case: Case, device: torch.device) -> Tensors:
    draw, stack = cases.Draw(case, device), (case.N,) if case.core != "none" else ()
    core = None
    if case.core != "none":
        size = (case.R,) if case.core == "diagonal" else (case.R, case.R)
        core = draw.normal(case.N, *size, std=case.R ** (-0.5 * (case.core == "dense"))).requires_grad_()
    base = draw.normal(*stack, case.rows, case.columns) if case.base else None
    return Tensors(
        base=base,
        down=draw.normal(case.R, case.columns).requires_grad_(),
        up=draw.normal(case.rows, case.R, std=case.R**-0.5 / SCALE).requires_grad_(),
        core=core,
        dw=draw.normal(*stack, case.rows, case.columns),
    )


# ---- providers ------------------------------------------------------------------------------------------------------

EINSUMS = {"none": "nr,rk->nk", "diagonal": "nr,or,rk->onk", "dense": "na,oab,bk->onk"}


def _built(forward: Callable[[Tensor | None], Tensor], t: Tensors) -> Built:
    return Built(forward, {"d_down": t.down, "d_up": t.up} | ({} if t.core is None else {"d_core": t.core}))


def _einsum(case: Case, t: Tensors) -> Built:
    factors = [t.down] if t.core is None else [t.core, t.down]

    def forward(base: Tensor | None) -> Tensor:
        update = torch.einsum(EINSUMS[case.core], t.up * SCALE, *factors)
        return update if base is None else base + update

    return _built(forward, t)


def _mixed(t: Tensors, up: Tensor) -> Tensor:
    """B core_k for all k, (N, rows, R); without cores B."""
    if t.core is None:
        return up
    return up * t.core[:, None] if t.core.dim() == 2 else up @ t.core


def _bmm(case: Case, t: Tensors) -> Built:
    def forward(base: Tensor | None) -> Tensor:
        left = _mixed(t, t.up * SCALE)
        if t.core is None:
            return left @ t.down if base is None else torch.addmm(base, left, t.down)
        down = t.down.expand(case.N, -1, -1)
        return torch.bmm(left, down) if base is None else torch.baddbmm(base, left, down)

    return _built(forward, t)


def _loop(case: Case, t: Tensors) -> Built:
    if case.backward:
        raise Absent("forward only: its products go into place")

    def forward(base: Tensor | None) -> Tensor:
        up, result = t.up * SCALE, torch.empty_like(t.dw)
        for k in range(case.N):
            place = result if t.core is None else result[k]
            left = up if t.core is None else _times(up, t.core[k])
            if base is None:
                torch.mm(left, t.down, out=place)
            else:
                torch.addmm(base if t.core is None else base[k], left, t.down, out=place)
        return result

    return _built(forward, t)


def _times(up: Tensor, core: Tensor) -> Tensor:
    return up * core if core.dim() == 1 else up @ core


def _formula(case: Case, t: Tensors) -> Built:
    """PEFT's merge: the update in the weight's dtype, scaled, then added; B core stands for its B."""
    if not case.base:
        raise Absent("a merge needs a base")
    if case.backward:
        raise Absent("forward only: PEFT merges without a graph")
    return _built(lambda base: base + (_mixed(t, t.up) @ t.down) * SCALE, t)


def _ours(backend: str) -> Callable[[Case, Tensors], Built]:
    def build(case: Case, t: Tensors) -> Built:
        op = reconstruct if t.core is None else reconstruct_stack
        return _built(lambda base: op(t.down, t.up, t.core, scale=SCALE, base=base, backend=backend), t)

    return build


PROVIDERS = {
    "torch einsum": Provider(_einsum, None),  # torch chooses the order of its products
    "torch bmm": Provider(_bmm, "bmm"),
    "matmul loop": Provider(_loop, "loop"),
    "PEFT's merge formula": Provider(_formula, "formula"),
    "ours, torch": Provider(_ours("torch"), "torch", "torch"),
    "ours, triton": Provider(_ours("triton"), "fused", "triton", ("cuda",)),
    "ours, cuda": Provider(_ours("cuda"), "fused", "cuda", ("cuda",)),
}


# ---- what is right, and what it costs -------------------------------------------------------------------------------


def reference(provider: Provider, problem: runner.Problem, built: Built, seed: int) -> tuple:
    def build(case: Case, t: Tensors) -> Built:
        def forward(base: Tensor | None) -> Tensor:
            core = t.core if t.core is None else t.core[:, None]
            base = base if base is None else base.reshape(-1, case.columns)
            return reconstruct_reference(t.down, t.up, core, scale=SCALE, base=base).view(t.dw.shape)

        return _built(forward, t)

    return None, build


def _sizes(case: Case) -> tuple:
    return case.N, case.rows, case.columns, case.R, case.core, case.base, case.torch_dtype.itemsize


def least(case: Case, design: str | None) -> tuple:
    return costs.compulsory(*_sizes(case))


def passes(case: Case, design: str, device: str) -> tuple:
    return costs.passes(design, *_sizes(case))


SHAPE = "N,ROWS,COLUMNS,R"
BENCH = runner.Bench(OP, PROVIDERS, usual_cases, SHAPE, shaped, make_tensors, reference, least, passes, presets=PRESETS)


def pytest_generate_tests(metafunc) -> None:
    runner.parametrize(metafunc, BENCH)


def test_reconstruct(benchmark, case: Case, provider: str) -> None:
    runner.run_test(benchmark, BENCH, case, provider)
