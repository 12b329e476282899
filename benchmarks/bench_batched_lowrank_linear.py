"""`batched_lowrank_linear`, many adapters in one batch, against what else one would use: verified first, then timed.

    python -m peft_kernels bench batched_lowrank_linear
    pytest benchmarks/bench_batched_lowrank_linear.py --benchmark-only

Every provider computes y = x Wᵀ + b + s · x A_lᵀ B_lᵀ with an adapter l for every entry of the batch, or for every row,
in no order; forward + backward also the gradients of x and of all adapters. Each adapter has the same number of rows,
give or take one entry, and no row is without one.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_kernels import adapter_segments, batched_lowrank_linear, lowrank_linear

from . import cases, runner
from .cases import SCALE
from .floor import batched_lowrank_linear as costs
from .runner import Absent, Built, Provider

OP = "batched_lowrank_linear"


# ---- cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case(cases.Case):
    """x (entries, tokens, K) -> y (entries, tokens, N), L adapters of rank R."""

    entries: int
    tokens: int
    K: int
    N: int
    L: int
    R: int = 16
    adapter_of: str = "entry"  # "entry" | "row"

    @property
    def M(self) -> int:
        return self.entries * self.tokens

    @property
    def used(self) -> int:
        """Adapters that have rows."""
        return min(self.L, self.entries if self.adapter_of == "entry" else self.M)

    def __str__(self) -> str:
        return (
            f"{self.entries}·{self.tokens} × {self.K} → {self.N}, rank {self.R}, "
            f"{self.used} of {self.L} adapters, one for each {self.adapter_of}"
        )


class Tensors(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    down: Tensor
    up: Tensor
    index: Tensor
    dy: Tensor

    @property
    def input(self) -> runner.Input:
        return self.x, self.dy

    @property
    def row_index(self) -> Tensor:
        missing = self.x.dim() - 1 - self.index.dim()
        return self.index.reshape(*self.index.shape, *[1] * missing).expand(self.x.shape[:-1]).reshape(-1)


# Adapters, and what has one. A CPU's batch has four entries, so that more adapters than that need rows of their own.
CPU_MIXES = ((4, "entry"), (32, "row"), (1, "entry"), (4, "row"), (128, "row"))
GPU_MIXES = (*CPU_MIXES, (32, "entry"), (128, "entry"))
PRESETS = {
    "blip": ((16, 577, 768, 768, 32),),
    "vilt": ((16, 185, 768, 768, 32),),
    "llm": ((8, 1024, 4096, 4096, 32),),
}


def usual_cases(on_cpu: bool, dtypes: Sequence[str]) -> list[Case]:
    sizes = (4 if on_cpu else 16, 577, 768, 768)
    return [
        Case(*sizes, L, adapter_of=adapter_of, dtype=dtype, backward=backward)
        for dtype in dtypes
        for L, adapter_of in (CPU_MIXES if on_cpu else GPU_MIXES)
        for backward in (False, True)
    ]


def shaped(shape: Sequence[int], dtype: str) -> list[Case]:
    kinds = [(adapter_of, backward) for adapter_of in ("entry", "row") for backward in (False, True)]
    return [Case(*shape, adapter_of=adapter_of, dtype=dtype, backward=backward) for adapter_of, backward in kinds]


def make_tensors(case: Case, device: torch.device) -> Tensors:
    draw, shape = cases.Draw(case, device), (case.entries, case.tokens)
    count = case.entries if case.adapter_of == "entry" else case.M
    return Tensors(
        x=draw.normal(*shape, case.K).requires_grad_(),
        weight=draw.normal(case.N, case.K, std=case.K**-0.5),
        bias=draw.normal(case.N),
        down=draw.normal(case.L, case.R, case.K, std=case.K**-0.5).requires_grad_(),
        up=draw.normal(case.L, case.N, case.R, std=case.R**-0.5 / SCALE).requires_grad_(),
        index=(draw.permutation(count) % case.L).view(shape[: 1 if case.adapter_of == "entry" else 2]),
        dy=draw.normal(*shape, case.N),
    )


# ---- providers ------------------------------------------------------------------------------------------------------


def _built(forward: Callable[[Tensor], Tensor], t: Tensors) -> Built:
    return Built(forward, {"d_down": t.down, "d_up": t.up})


def _ours(backend: str, before: bool) -> Callable[[Case, Tensors], Built]:
    """before: the rows are put in order once, as for all layers of a model, and not in every call."""

    def build(case: Case, t: Tensors) -> Built:
        index = adapter_segments(t.row_index, case.L) if before else t.index

        def forward(x: Tensor) -> Tensor:
            return batched_lowrank_linear(x, t.weight, t.bias, t.down, t.up, index, scale=SCALE, backend=backend)

        return _built(forward, t)

    return build


def _groups(t: Tensors) -> tuple[Tensor, list[int], list[int]]:
    """Rows in the order of their adapters, the adapters that have some, and how many."""
    adapters, counts = t.row_index.unique(return_counts=True)
    return t.row_index.argsort(stable=True), adapters.tolist(), counts.tolist()


def _loop(case: Case, t: Tensors) -> Built:
    """As well as it can be written: rows change places once on each side, and no gradient is made of full-size sums."""
    order, adapters, counts = _groups(t)

    def forward(x: Tensor) -> Tensor:
        parts = x.flatten(0, -2).index_select(0, order).split(counts)
        downs, ups = t.down.unbind(), t.up.unbind()
        of_each = [
            lowrank_linear(part, t.weight, t.bias, downs[adapter], ups[adapter], scale=SCALE)
            for part, adapter in zip(parts, adapters)
        ]
        y = x.new_empty(case.M, case.N).index_copy_(0, order, torch.cat(of_each))
        return y.view(t.dy.shape)

    return _built(forward, t)


def _peft(case: Case, t: Tensors) -> Built:
    import peft

    if case.backward:
        raise Absent("forward only: PEFT mixes adapters for inference")
    if case.adapter_of != "entry":
        raise Absent("PEFT's adapter_names are per entry of the batch")
    base = nn.Linear(1, 1, device=t.x.device, dtype=t.x.dtype)
    base.in_features, base.out_features = case.K, case.N
    base.weight, base.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (t.weight, t.bias))
    model = nn.ModuleDict({"linear": base})
    config = peft.LoraConfig(r=case.R, lora_alpha=int(SCALE * case.R), target_modules=["linear"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are several adapters
        for adapter in range(case.L):
            peft.inject_adapter_in_model(config, model, adapter_name=str(adapter))
    layer = model["linear"].eval()
    for adapter in range(case.L):  # the same memory
        layer.lora_A[str(adapter)].weight = nn.Parameter(t.down.detach()[adapter])
        layer.lora_B[str(adapter)].weight = nn.Parameter(t.up.detach()[adapter])
    names = [str(adapter) for adapter in t.index.tolist()]
    return _built(lambda x: layer(x, adapter_names=names), t)


def _merged(case: Case, t: Tensors) -> Built:
    """A weight for every adapter, merged before: the memory of L layers."""
    if case.backward:
        raise Absent("forward only: merged adapters do not train")
    order, adapters, counts = _groups(t)
    wide = torch.promote_types(t.x.dtype, torch.float32)
    updates = SCALE * torch.bmm(t.up.detach()[adapters].to(wide), t.down.detach()[adapters].to(wide))
    weights = (t.weight + updates).to(t.x.dtype)

    def forward(x: Tensor) -> Tensor:
        parts = x.flatten(0, -2).index_select(0, order).split(counts)
        sorted_y = x.new_empty(case.M, case.N)
        for part, weight, place in zip(parts, weights, sorted_y.split(counts)):
            torch.addmm(t.bias, part, weight.t(), out=place)
        return torch.empty_like(sorted_y).index_copy_(0, order, sorted_y).view(t.dy.shape)

    return _built(forward, t)


PROVIDERS = {
    "loop of lowrank_linear": Provider(_loop, "loop"),
    "PEFT, adapter_names": Provider(_peft, "PEFT"),
    "merged weights": Provider(_merged, "merged"),
    "ours, torch": Provider(_ours("torch", False), None, "torch"),
    "ours, torch, order given": Provider(_ours("torch", True), "torch", "torch"),
    "ours, triton": Provider(_ours("triton", False), None, "triton", ("cuda",)),
    "ours, triton, order given": Provider(_ours("triton", True), "segments", "triton", ("cuda",)),
    "ours, cuda": Provider(_ours("cuda", False), None, "cuda", ("cuda",)),
    "ours, cuda, order given": Provider(_ours("cuda", True), "segments", "cuda", ("cuda",)),
}


# ---- what is right, and what it costs -------------------------------------------------------------------------------


def reference(provider: Provider, problem: runner.Problem, built: Built, seed: int) -> tuple:
    """The definition, adapter by adapter: batched_lowrank_linear_reference takes the factors' memory for every row."""

    def build(case: Case, t: Tensors) -> Built:
        def forward(x: Tensor) -> Tensor:
            y = F.linear(x, t.weight, t.bias).flatten(0, -2)
            for adapter in t.row_index.unique().tolist():
                rows = (t.row_index == adapter).nonzero()[:, 0]
                update = x.flatten(0, -2)[rows] @ t.down[adapter].t() @ t.up[adapter].t()
                y = y.index_add(0, rows, SCALE * update)
            return y.view(t.dy.shape)

        return _built(forward, t)

    return None, build


def _sizes(case: Case) -> tuple:
    return case.M, case.K, case.N, case.R, case.L, case.used, case.torch_dtype.itemsize


def least(case: Case, design: str | None) -> tuple:
    return costs.compulsory(*_sizes(case))


def passes(case: Case, design: str, device: str) -> tuple:
    """On a GPU the torch backend multiplies every row by every adapter, and the loop runs other kernels."""
    if device != "cpu" and design in ("torch", "loop"):
        return None, None
    return costs.passes(design, *_sizes(case))


SHAPE = "ENTRIES,TOKENS,K,N,L[,R]"
BENCH = runner.Bench(OP, PROVIDERS, usual_cases, SHAPE, shaped, make_tensors, reference, least, passes, presets=PRESETS)


def pytest_generate_tests(metafunc) -> None:
    runner.parametrize(metafunc, BENCH)


def test_batched_lowrank_linear(benchmark, case: Case, provider: str) -> None:
    runner.run_test(benchmark, BENCH, case, provider)
