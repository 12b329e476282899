"""`lowrank_projections`, q, k and v of one tensor in one call, against what else one would use: verified, then timed.

    python -m peft_kernels bench lowrank_projections
    pytest benchmarks/bench_lowrank_projections.py --benchmark-only

Every provider computes J times y_j = x W_jᵀ + b_j + s · drop_j(x) A_jᵀ B_jᵀ, each with a mask of its own, and the
gradients of x, of all A_j and all B_j; the frozen linears alone, y_j and dx. "One by one" is `lowrank_linear` J times,
"stacked weights" the same call with the frozen weights in one memory, (ΣN, K). What differs from float64 by more than
plain torch does is not timed.

unsloth's one node for q, k and v runs only when --against names it: importing unsloth changes other libraries, PEFT
among them. It has no bias, and is asked for none. https://github.com/unslothai/unsloth
"""

from collections.abc import Callable, Sequence
from ctypes import string_at
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_kernels import lowrank_linear, lowrank_projections
from peft_kernels.ops.lowrank_projections import lowrank_projections_reference

from . import cases, runner
from .bench_lowrank_linear import DROPOUTS, peer, peft_layer
from .cases import SCALE
from .floor import lowrank_projections as costs
from .runner import Absent, Built, Provider

OP = "lowrank_projections"


# ---- cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case(cases.Case):
    """J layers with adapters of rank R that read one x (M, K): the first gives y (M, N), dropout on x."""

    M: int
    K: int
    N: int
    J: int = 3
    R: int = 16
    others: int = 0  # the width of all but the first; 0: N, too
    dropout: float = 0.0

    @property
    def widths(self) -> list[int]:
        return [self.N, *[self.others or self.N] * (self.J - 1)]

    def __str__(self) -> str:
        widths = f"{self.J} · {self.N}" if len({*self.widths}) == 1 else ", ".join(map(str, self.widths))
        return f"{self.M} × {self.K} → {widths}, rank {self.R}, dropout {self.dropout:g}"


class Tensors(tuple[Tensor, ...]):
    """x, the frozen weights in one memory, and then of every projection weight, bias, down, up and dy, each its own."""

    def __new__(cls, *tensors: Tensor) -> "Tensors":
        return super().__new__(cls, tensors)

    @property
    def x(self) -> Tensor:
        return self[0]

    @property
    def input(self) -> runner.Input:
        return self.x, self[6::5]

    def parts(self, stacked: bool = False) -> tuple[tuple[Tensor, ...], ...]:
        """weights, biases, downs, ups: J of each"""
        weights = self[2::5]
        weights = self[1].split([len(weight) for weight in weights]) if stacked else weights
        return weights, self[3::5], self[4::5], self[5::5]


# (M, K, N[, J, R, others]): q, k and v at the width of BLIP and ViLT, of 16 and 4 images of 577 tokens; k and v, which
# read the image in BLIP's text encoder; at width 4096 q, k and v with a quarter of the heads, and an MLP's gate and up.
# In float32 the first.
QKV, GROUPED, GATED = (768, 768), (8192, 4096, 4096, 3, 16, 1024), (8192, 4096, 11008, 2)
GPU_SHAPES = ((9232, *QKV), (2308, *QKV), (9232, *QKV, 2), (9232, *QKV, 3, 64), GROUPED, GATED)
CPU_SHAPES = ((4 * 577, *QKV), (2 * 577, 768, 3072, 2))
PRESETS = {
    "blip": ((9232, *QKV), (9232, *QKV, 2), (640, *QKV)),
    "vilt": ((2960, *QKV),),
    "llm": (GROUPED, GATED),
}


def shaped(shape: Sequence[int], dtype: str) -> list[Case]:
    return [Case(*shape, dtype=dtype, dropout=p) for p in DROPOUTS]


def usual_cases(on_cpu: bool, dtypes: Sequence[str]) -> list[Case]:
    found = []
    for dtype in dtypes:
        shapes = CPU_SHAPES if on_cpu else GPU_SHAPES[:1] if dtype == "float32" else GPU_SHAPES
        found += [case for shape in shapes for case in shaped(shape, dtype)]
    return found


def make_tensors(case: Case, device: torch.device) -> Tensors:
    draw = cases.Draw(case, device)
    x = draw.normal(case.M, case.K).requires_grad_()
    together = draw.normal(sum(case.widths), case.K, std=case.K**-0.5)
    tensors = []
    for width, weight in zip(case.widths, together.split(case.widths)):
        down = draw.normal(case.R, case.K, std=case.K**-0.5).requires_grad_()
        up = draw.normal(width, case.R, std=case.R**-0.5 / SCALE).requires_grad_()
        tensors += [weight.clone(), draw.normal(width), down, up, draw.normal(case.M, width)]
    return Tensors(x, together, *tensors)


# ---- providers ------------------------------------------------------------------------------------------------------


def _factors(downs: Sequence[Tensor], ups: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{name}{j or ''}": t for name, each in (("d_down", downs), ("d_up", ups)) for j, t in enumerate(each)}


def _linears(case: Case, t: Tensors) -> Built:
    weights, biases, _, _ = t.parts()
    return Built(lambda x: tuple([F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]), {})


def _layers(case: Case, t: Tensors) -> tuple[list[nn.Module], dict[str, Tensor]]:
    """PEFT's, and their factors."""
    made = [peft_layer(*each, case.dropout) for each in zip(*t.parts())]
    layers, downs, ups = zip(*made)
    return list(layers), _factors(downs, ups)


def _peft(case: Case, t: Tensors) -> Built:
    layers, factors = _layers(case, t)
    return Built(lambda x: tuple([layer(x) for layer in layers]), factors)


def _one_by_one(backend: str) -> Callable[[Case, Tensors], Built]:
    def build(case: Case, t: Tensors) -> Built:
        options = {"scale": SCALE, "dropout_p": case.dropout, "backend": backend}
        each = list(zip(*t.parts()))
        return Built(lambda x: tuple([lowrank_linear(x, *of, **options) for of in each]), _factors(*t.parts()[2:]))

    return build


def _ours(backend: str, stacked: bool = False) -> Callable[[Case, Tensors], Built]:
    def build(case: Case, t: Tensors) -> Built:
        weights, biases, downs, ups = t.parts(stacked)
        scale = torch.full((), SCALE, device=t.x.device)  # as a layer has it
        options = {"scales": scale, "dropout_p": case.dropout, "backend": backend}
        call = partial(lowrank_projections, weights=weights, biases=biases, downs=downs, ups=ups, **options)
        return Built(call, _factors(downs, ups))

    return build


def _unsloth(case: Case, t: Tensors) -> Built:
    """Its function for a block with PEFT's layers, of which it takes the weights, and x (batch, rows, K)."""
    apply = peer("unsloth.kernels.fast_lora").apply_lora_qkv
    if case.dropout or case.J != 3:
        raise Absent("no dropout" if case.dropout else "of three projections")
    (q, k, v), factors = _layers(case, t)
    block = SimpleNamespace(q_proj=q, k_proj=k, v_proj=v, training=True)

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        return tuple([y[0] for y in apply(block, x[None], inplace=False)])  # in place dx would overwrite x

    return Built(forward, factors)


ONE_BY_ONE = {backend: f"one by one, {backend}" for backend in ("torch", "triton", "cuda")}
PROVIDERS = {
    "frozen linears": Provider(_linears, "linear"),
    "PEFT": Provider(_peft, "eager"),
    ONE_BY_ONE["torch"]: Provider(_one_by_one("torch"), costs.ONE_BY_ONE_IN_TORCH),  # not `ours`: to be compared with
    ONE_BY_ONE["triton"]: Provider(_one_by_one("triton"), costs.ONE_BY_ONE, devices=("cuda",)),
    ONE_BY_ONE["cuda"]: Provider(_one_by_one("cuda"), costs.ONE_BY_ONE, devices=("cuda",)),
    "ours, torch": Provider(_ours("torch"), "torch", "torch"),
    "ours, torch, stacked weights": Provider(_ours("torch", True), "torch, stacked", "torch"),
    "ours, triton": Provider(_ours("triton"), "passes", "triton", ("cuda",)),
    "ours, triton, stacked weights": Provider(_ours("triton", True), "passes, stacked", "triton", ("cuda",)),
    "ours, cuda": Provider(_ours("cuda"), "passes", "cuda", ("cuda",)),
    "ours, cuda, stacked weights": Provider(_ours("cuda", True), "passes, stacked", "cuda", ("cuda",)),
    "unsloth": Provider(_unsloth, "unsloth", devices=(), foreign=True),
}


# ---- what is right --------------------------------------------------------------------------------------------------


def recover_masks(provider: Provider, case: Case, t: Tensors, seed: int) -> list[Tensor]:
    """The masks that this seed leads to: with W = 0 and constant factors, the gradient of y_j alone reaches x where its
    mask kept it, and nowhere else."""
    values = [1.0, 0.0]
    for width in case.widths:
        values += [0.0, 0.0, 1.0, 1 / width, 1.0]
    constant = (torch.full_like(old, value, requires_grad=old.requires_grad) for old, value in zip(t, values))
    built, masks = provider.build(case, Tensors(*constant)), []
    for place in range(case.J):
        torch.manual_seed(seed)
        dys = tuple(torch.full_like(dy, float(place == j)) for j, dy in enumerate(t.input[1]))
        masks.append(runner.results(built, (t.x, dys))["dx"] != 0)
    return masks


def reference(provider: Provider, problem: runner.Problem, built: Built, seed: int) -> tuple:
    """The definition under the masks that the provider draws from this seed."""
    if not built.factors:
        return "linear", _linears
    biased = provider.design != "unsloth"
    dropout = problem.case.dropout
    masks = recover_masks(provider, problem.case, problem.tensors, seed) if dropout else None

    def build(case: Case, t: Tensors) -> Built:
        weights, biases, downs, ups = t.parts()
        biases = biases if biased else [None] * case.J
        options = {"scales": [SCALE] * case.J, "masks": masks, "dropout_p": dropout}
        call = partial(lowrank_projections_reference, weights=weights, biases=biases, downs=downs, ups=ups, **options)
        return Built(call, _factors(downs, ups))

    drawn = None if masks is None else torch.stack(masks).cpu()
    return (dropout, biased, None if drawn is None else string_at(drawn.data_ptr(), drawn.nbytes)), build


# ---- the bench ------------------------------------------------------------------------------------------------------


def least(case: Case, design: str | None) -> tuple:
    rank = 0 if design == "linear" else case.R
    return costs.compulsory(case.M, case.K, case.widths, rank, case.torch_dtype.itemsize)


def passes(case: Case, design: str, device: str) -> tuple:
    if design == "unsloth" and case.dropout:
        return None, None
    return costs.passes(design, case.M, case.K, case.widths, case.R, case.torch_dtype.itemsize, case.dropout > 0)


SHAPE = "M,K,N[,J,R,OTHERS]"
BENCH = runner.Bench(OP, PROVIDERS, usual_cases, SHAPE, shaped, make_tensors, reference, least, passes, presets=PRESETS)


def pytest_generate_tests(metafunc) -> None:
    runner.parametrize(metafunc, BENCH)


def test_lowrank_projections(benchmark, case: Case, provider: str) -> None:
    runner.run_test(benchmark, BENCH, case, provider)
