"""`gated_query` in both modes, against the formula in torch, eager and compiled: verified first, then timed.

    python -m peft_kernels bench gated_query
    pytest benchmarks/bench_gated_query.py --benchmark-only

Every provider computes one text layer's transformation, and with backward the gradients of all activations and
vectors; "gated" has a padding mask. GB/s counts the compulsory bytes: every activation read or written once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import gated_query
from peft_kernels.ops.gated_query import gated_query_reference

from . import cases, runner
from .floor import gated_query as costs
from .runner import Built, Provider

OP = "gated_query"
MODES = ("additive", "gated")


# ---- cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case(cases.Case):
    """B sequences of S rows of width D."""

    B: int
    S: int
    D: int
    mode: str = "additive"

    def __str__(self) -> str:
        return f"{self.B} × {self.S} × {self.D}, {self.mode}"


class Tensors(NamedTuple):
    hidden: Tensor
    text: Tensor
    gamma: Tensor
    beta: Tensor
    cross: Tensor | None
    cross_gamma: Tensor | None
    cross_beta: Tensor | None
    padding_mask: Tensor | None
    dy: Tensor

    @property
    def input(self) -> runner.Input:
        return self.hidden, self.dy


# BLIP's text layers: 35 tokens at most in retrieval, 40 in question answering.
CPU_SHAPES = ((8, 40, 768), (8, 35, 768))
GPU_SHAPES = (*CPU_SHAPES, (64, 40, 768))
PRESETS = {"blip": GPU_SHAPES}


def shaped(shape: Sequence[int], dtype: str) -> list[Case]:
    return [Case(*shape, mode, dtype=dtype, backward=backward) for backward in (True, False) for mode in MODES]


def usual_cases(on_cpu: bool, dtypes: Sequence[str]) -> list[Case]:
    shapes = CPU_SHAPES if on_cpu else GPU_SHAPES
    return [case for dtype in dtypes for shape in shapes for case in shaped(shape, dtype)]


def make_tensors(case: Case, device: torch.device) -> Tensors:
    """Scores of "gated" spread by about 1, so that its softmax is no choice of one row."""
    draw, shape, additive = cases.Draw(case, device), (case.B, case.S, case.D), case.mode == "additive"
    gamma, beta, *others = (draw.normal(case.D) for _ in range(4))
    lengths = draw.permutation(case.S).repeat(-(-case.B // case.S))[: case.B, None]  # 0: all is padding
    return Tensors(
        hidden=draw.normal(*shape, std=1.0 if additive else (case.S * case.D) ** -0.5).requires_grad_(),
        text=draw.normal(*shape).requires_grad_(),
        gamma=gamma.requires_grad_(),
        beta=beta.requires_grad_(),
        cross=draw.normal(*shape).requires_grad_() if additive else None,
        cross_gamma=others[0].requires_grad_() if additive else None,
        cross_beta=others[1].requires_grad_() if additive else None,
        padding_mask=None if additive else torch.arange(case.S, device=device) < lengths,
        dy=draw.normal(*shape),
    )


# ---- providers ------------------------------------------------------------------------------------------------------


def _built(function: Callable[..., Tensor], case: Case, t: Tensors) -> Built:
    factors = {"text": t.text, "gamma": t.gamma, "beta": t.beta}
    if case.mode == "additive":
        factors |= {"cross": t.cross, "cross_gamma": t.cross_gamma, "cross_beta": t.cross_beta}
    forward = partial(function, case.mode, padding_mask=t.padding_mask, **factors)
    return Built(lambda hidden: forward(hidden=hidden), {f"d_{name}": factor for name, factor in factors.items()})


def _formula(case: Case, t: Tensors) -> Built:
    return _built(gated_query_reference, case, t)


def _compiled(case: Case, t: Tensors) -> Built:
    built = _formula(case, t)
    torch._dynamo.reset()  # each case a graph of its own, with constant sizes
    return built._replace(forward=torch.compile(built.forward, fullgraph=True, dynamic=False))


def _ours(backend: str) -> Callable[[Case, Tensors], Built]:
    return lambda case, t: _built(partial(gated_query, backend=backend), case, t)


PROVIDERS = {
    "formula, eager": Provider(_formula, None),
    "ours, torch": Provider(_ours("torch"), None, "torch"),
    "ours, triton": Provider(_ours("triton"), "fused", "triton", ("cuda",)),
    "ours, cuda": Provider(_ours("cuda"), "fused", "cuda", ("cuda",)),
    "formula, compiled": Provider(_compiled, None, compiled=True),
}


# ---- what is right, and what it costs -------------------------------------------------------------------------------


def reference(provider: Provider, problem: runner.Problem, built: Built, seed: int) -> tuple:
    return None, _formula


def least(case: Case, design: str | None) -> tuple:
    return costs.compulsory(case.mode, case.B, case.S, case.D, case.torch_dtype.itemsize)


def passes(case: Case, design: str, device: str) -> tuple:
    sizes = (case.B, case.S, case.D, case.torch_dtype.itemsize)
    strips = case.B if case.mode == "gated" else -(-case.B * case.S // 8)  # a tile of rows each, while there are few
    return costs.passes(design, case.mode, *sizes, strips)


def proof(case: Case) -> Case:
    """In float32 two sequences: a compiler on a CPU adds rows one by one, which over 320 of them is 3 times as far off
    as torch's own sum."""
    return replace(case, B=min(case.B, 2)) if case.dtype == "float32" else case


BENCH = runner.Bench(
    OP, PROVIDERS, usual_cases, "B,S,D", shaped, make_tensors, reference, least, passes, proof, presets=PRESETS
)


def pytest_generate_tests(metafunc) -> None:
    runner.parametrize(metafunc, BENCH)


def test_gated_query(benchmark, case: Case, provider: str) -> None:
    runner.run_test(benchmark, BENCH, case, provider)
