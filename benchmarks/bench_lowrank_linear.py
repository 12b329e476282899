"""`lowrank_linear`, forward and backward, against what else one would use: verified first, then timed.

    python -m peft_kernels bench lowrank_linear
    pytest benchmarks/bench_lowrank_linear.py --benchmark-only

Every provider computes y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ and the gradients of x, A and B; the frozen linear alone, y and
dx. What differs from float64 by more than plain torch does is not timed.

unsloth, axolotl, LoRAFusion and chalk run only when --against names them: importing unsloth changes other libraries,
PEFT among them. unsloth's has no bias, and is asked for none. https://github.com/unslothai/unsloth,
https://github.com/axolotl-ai-cloud/axolotl, https://github.com/CentML/lorafusion, https://github.com/freesolo-co/chalk
"""

import importlib
from collections.abc import Callable, Sequence
from ctypes import string_at
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_kernels import lowrank_linear
from peft_kernels.ops.lowrank_linear import lowrank_linear_reference

from . import cases, runner
from .cases import SCALE
from .floor import lowrank_linear as costs
from .runner import Absent, Built, Provider

OP = "lowrank_linear"


# ---- cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case(cases.Case):
    """One linear layer with an adapter: x (M, K) -> y (M, N), rank R, dropout on x."""

    M: int
    K: int
    N: int
    R: int = 16
    dropout: float = 0.0

    def __str__(self) -> str:
        return f"{self.M} × {self.K} → {self.N}, rank {self.R}, dropout {self.dropout:g}"


class Tensors(NamedTuple):
    """Both branches of y have the same size."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    down: Tensor
    up: Tensor
    dy: Tensor

    @property
    def input(self) -> runner.Input:
        return self.x, self.dy


# (M, K, N), or with a rank other than 16, those with dropout alone. BLIP and ViLT have width 768 and an MLP of 3072; 16
# and 4 images have 577 tokens each. In float32 those of 16 images.
WIDTHS, WIDE, RANKS = ((768, 768), (768, 2304), (768, 3072), (3072, 768)), (8192, 4096, 4096), (8, 64, 96)
GPU_SHAPES = (
    *((M, *widths) for M in (16 * 577, 4 * 577) for widths in WIDTHS),
    *((16 * 577, 768, 768, R) for R in RANKS),
    WIDE,
    *((*WIDE, R) for R in RANKS),
)
CPU_SHAPES = ((4 * 577, 768, 768), (2 * 577, 768, 3072), (2 * 577, 3072, 768))
DROPOUTS = (0.0, 0.1)
# 16 images or texts at a time: 577 tokens of BLIP's images, 40 of its texts; ViLT's 40 and 145 patches of 384² pixels.
PRESETS = {
    "blip": ((9232, 768, 768), (9232, 768, 2304), (9232, 768, 3072), (9232, 3072, 768), (640, 768, 768)),
    "vilt": ((2960, 768, 768), (2960, 768, 3072), (2960, 3072, 768)),
    "llm": ((8192, 4096, 4096),),
}


def shaped(shape: Sequence[int], dtype: str) -> list[Case]:
    return [Case(*shape, dtype=dtype, dropout=p) for p in DROPOUTS]


def usual_cases(on_cpu: bool, dtypes: Sequence[str]) -> list[Case]:
    def shapes(dtype: str) -> Sequence[Sequence[int]]:
        return CPU_SHAPES if on_cpu else GPU_SHAPES[: len(WIDTHS)] if dtype == "float32" else GPU_SHAPES

    found = [(shape, case) for dtype in dtypes for shape in shapes(dtype) for case in shaped(shape, dtype)]
    return [case for shape, case in found if case.dropout or len(shape) == 3]


def make_tensors(case: Case, device: torch.device) -> Tensors:
    draw = cases.Draw(case, device)
    return Tensors(
        x=draw.normal(case.M, case.K).requires_grad_(),
        weight=draw.normal(case.N, case.K, std=case.K**-0.5),
        bias=draw.normal(case.N),
        down=draw.normal(case.R, case.K, std=case.K**-0.5).requires_grad_(),
        up=draw.normal(case.N, case.R, std=case.R**-0.5 / SCALE).requires_grad_(),
        dy=draw.normal(case.M, case.N),
    )


# ---- providers ------------------------------------------------------------------------------------------------------


def _linear(case: Case, t: Tensors) -> Built:
    return Built(lambda x: F.linear(x, t.weight, t.bias), {})


def _eager(case: Case, t: Tensors) -> Built:
    def forward(x: Tensor) -> Tensor:
        update = F.linear(F.linear(F.dropout(x, case.dropout), t.down), t.up)
        return F.linear(x, t.weight, t.bias) + update * SCALE

    return Built(forward, {"d_down": t.down, "d_up": t.up})


def _peft(case: Case, t: Tensors) -> Built:
    """Its forward is PEFT's layer."""
    layer, down, up = peft_layer(t.weight, t.bias, t.down, t.up, case.dropout)
    return Built(layer, {"d_down": down, "d_up": up})


def peft_layer(
    weight: Tensor, bias: Tensor, down: Tensor, up: Tensor, dropout: float
) -> tuple[nn.Module, nn.Parameter, nn.Parameter]:
    """PEFT's layer in the memory of these tensors, and its factors."""
    import peft

    base = nn.Linear(1, 1, device=weight.device, dtype=weight.dtype)
    base.out_features, base.in_features = weight.shape
    base.weight, base.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))
    rank = len(down)
    config = peft.LoraConfig(r=rank, lora_alpha=int(SCALE * rank), lora_dropout=dropout, target_modules=["linear"])
    layer = peft.inject_adapter_in_model(config, nn.ModuleDict({"linear": base}))["linear"].train()
    down, up = nn.Parameter(down.detach()), nn.Parameter(up.detach())
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = down, up
    return layer, down, up


def _compiled(build: Callable[[Case, Tensors], Built]) -> Callable[[Case, Tensors], Built]:
    def build_compiled(case: Case, t: Tensors) -> Built:
        built = build(case, t)
        torch._dynamo.reset()  # each case a graph of its own, with constant sizes
        return built._replace(forward=torch.compile(built.forward, fullgraph=True, dynamic=False))

    return build_compiled


def peer(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:  # of many kinds, where there is no GPU
        raise Absent(str(error)) from error


def _fast_lora(module: str) -> Callable[[Case, Tensors], Built]:
    """unsloth and axolotl have the same function for a block's output projection: PEFT's layer, of which they take the
    weights, and x (batch, rows, K)."""

    def build(case: Case, t: Tensors) -> Built:
        apply = peer(module).apply_lora_o
        built = _peft(case, t)
        block = SimpleNamespace(o_proj=built.forward, training=True)
        return built._replace(forward=lambda x: apply(block, x[None])[0])

    return build


def _lorafusion(case: Case, t: Tensors) -> Built:
    call = peer("lorafusion.ops.lora_v1").fused_linear_lora

    def forward(x: Tensor) -> Tensor:
        seed = int(torch.randint(2**20, ()))  # its own would come from Python's random
        return call(x[None], t.weight, t.down, t.up, SCALE, seed, case.dropout, t.bias)[0]

    return Built(forward, {"d_down": t.down, "d_up": t.up})


def _chalk(fused: bool) -> Callable[[Case, Tensors], Built]:
    """What it puts in PEFT's layer: on a linear's result the update that it picks for this GPU, which on an H100 is
    torch's; fused: its Triton kernels, which add to that result, and are picked where it has nothing better."""

    def build(case: Case, t: Tensors) -> Built:
        lora = peer("chalk.ops.lora")
        if case.dropout:
            raise Absent("no dropout")
        update = None if fused else lora.load_lora()  # after a test on the GPU, which it prints
        if not fused and update is None:
            raise Absent("its own test fails")

        def forward(x: Tensor) -> Tensor:
            y = F.linear(x, t.weight, t.bias)
            return lora.fused_lora(x, t.down, t.up, SCALE, y) if fused else y + update(x, t.down, t.up, SCALE)

        return Built(forward, {"d_down": t.down, "d_up": t.up})

    return build


def _ours(backend: str, design: str | None) -> Callable[[Case, Tensors], Built]:
    def build(case: Case, t: Tensors) -> Built:
        options = {"scale": SCALE, "dropout_p": case.dropout, "backend": backend, "design": design}
        forward = partial(lowrank_linear, weight=t.weight, bias=t.bias, down=t.down, up=t.up, **options)
        return Built(forward, {"d_down": t.down, "d_up": t.up})

    return build


PROVIDERS = {
    "frozen linear": Provider(_linear, "linear"),
    "PEFT": Provider(_peft, "eager"),
    "torch eager": Provider(_eager, "eager"),
    "ours, torch": Provider(_ours("torch", None), "torch", "torch"),
    "ours, triton passes": Provider(_ours("triton", "passes"), "passes", "triton", ("cuda",)),
    "ours, triton fused": Provider(_ours("triton", "fused"), "fused", "triton", ("cuda",)),
    "ours, cuda": Provider(_ours("cuda", None), "passes", "cuda", ("cuda",)),
    "torch compiled": Provider(_compiled(_eager), None, devices=("cuda",), compiled=True),  # on a CPU as PEFT's
    "PEFT compiled": Provider(_compiled(_peft), None, compiled=True),
    "unsloth": Provider(_fast_lora("unsloth.kernels.fast_lora"), "unsloth", devices=(), foreign=True),
    "axolotl": Provider(_fast_lora("axolotl.kernels.lora"), None, devices=(), foreign=True),
    "LoRAFusion": Provider(_lorafusion, None, devices=(), foreign=True),
    "chalk": Provider(_chalk(fused=False), None, devices=(), foreign=True),
    "chalk fused": Provider(_chalk(fused=True), None, devices=(), foreign=True),
}


# ---- what is right --------------------------------------------------------------------------------------------------


def recover_mask(built: Built, t: Tensors, seed: int) -> Tensor:
    """The mask that this seed leads to: with W = 0 and constant factors, dx is a constant where x was kept, else 0."""
    kept_values = [tensor.detach().clone() for tensor in t]
    with torch.no_grad():
        for tensor, value in zip(t, (1.0, 0.0, 0.0, 1.0, 1.0 / t.up.shape[0], 1.0)):
            tensor.fill_(value)
    torch.manual_seed(seed)
    mask = runner.results(built, t.input)["dx"] != 0
    with torch.no_grad():
        for tensor, value in zip(t, kept_values):
            tensor.copy_(value)
    return mask


def reference(provider: Provider, problem: runner.Problem, built: Built, seed: int) -> tuple:
    """The definition under the mask that the provider draws from this seed."""
    if not built.factors:
        return "linear", _linear
    biased = provider.design != "unsloth"
    dropout = problem.case.dropout
    mask = recover_mask(built, problem.tensors, seed) if dropout else None

    def build(case: Case, t: Tensors) -> Built:
        options = {"scale": SCALE, "mask": mask, "dropout_p": dropout, "bias": t.bias if biased else None}
        forward = partial(lowrank_linear_reference, weight=t.weight, down=t.down, up=t.up, **options)
        return Built(forward, {"d_down": t.down, "d_up": t.up})

    drawn = None if mask is None else mask.cpu().contiguous()
    return (dropout, biased, None if drawn is None else string_at(drawn.data_ptr(), drawn.nbytes)), build


# ---- the bench ------------------------------------------------------------------------------------------------------


def least(case: Case, design: str | None) -> tuple:
    rank = 0 if design == "linear" else case.R
    return costs.compulsory(case.M, case.K, case.N, rank, case.torch_dtype.itemsize)


def passes(case: Case, design: str, device: str) -> tuple:
    if design == "unsloth" and case.dropout:
        return None, None
    sizes = (case.M, case.K, case.N, case.R, case.torch_dtype.itemsize)
    return costs.passes(design, *sizes, case.dropout > 0)


BENCH = runner.Bench(
    OP, PROVIDERS, usual_cases, "M,K,N[,R]", shaped, make_tensors, reference, least, passes, presets=PRESETS
)


def pytest_generate_tests(metafunc) -> None:
    runner.parametrize(metafunc, BENCH)


def test_lowrank_linear(benchmark, case: Case, provider: str) -> None:
    runner.run_test(benchmark, BENCH, case, provider)
