"""Random problems for `lowrank_linear`, their oracle in float64, and the error that torch makes in the same dtype."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import peft_kernels
from peft_kernels.ops.lowrank_linear import lowrank_linear_reference

NAMES = ("x", "weight", "bias", "down", "up", "core")
ULP = {torch.float64: 2**-52, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
INTERPRETED = not torch.cuda.is_available()


LAYOUTS = {  # the users in docs/method.md, section 1
    "lora": {},
    "aurora-paper": {"core": "flat diagonal"},
    "aurora-released": {"core": "flat dense"},
    "aurora-fused-qkv": {"core": "diagonal", "out_blocks": 3},
    "aurora-fused-qkv-released": {"core": "dense", "out_blocks": 3},
    "aurora-fc1": {"core": "dense", "out_blocks": 4, "columns_out": 24},
    "aurora-fc2": {"core": "diagonal", "in_blocks": 4},
    "aurora-fc2-released": {"core": "dense", "in_blocks": 4},
    "grid": {"core": "dense", "out_blocks": 2, "in_blocks": 2, "bias": False},
}


@dataclass(frozen=True)
class Problem:
    """Sizes as in docs/method.md, section 1: x (rows, I·columns_in), y (rows, O·columns_out)."""

    rows: int = 37
    columns_in: int = 24
    columns_out: int = 40
    rank: int = 4
    out_blocks: int = 1
    in_blocks: int = 1
    core: str | None = None  # "diagonal" | "dense" with blocks, "flat diagonal" | "flat dense" without
    dtype: torch.dtype = torch.float32
    factor_dtype: torch.dtype | None = None
    bias: bool = True
    scale: float = 1.7
    dropout_p: float = 0.0
    dropout_on: str = "input"
    precomputed_hidden: bool = False

    @property
    def mask_columns(self) -> int:
        return {
            "input": self.in_blocks * self.columns_in,
            "rank": self.in_blocks * self.rank,
            "core": self.out_blocks * self.rank,
        }[self.dropout_on]

    def tensors(self, device: str) -> dict[str, Tensor]:
        """Leaves that require grad, by name; the same numbers whenever the shapes are the same."""
        blocks, rank = (self.out_blocks, self.in_blocks), self.rank
        core_shape = {
            None: None,
            "flat diagonal": (rank,),
            "flat dense": (rank, rank),
            "diagonal": (*blocks, rank),
            "dense": (*blocks, rank, rank),
        }[self.core]
        width_in, width_out = self.in_blocks * self.columns_in, self.out_blocks * self.columns_out
        shapes = {
            "x": (self.rows, width_in),
            "weight": (width_out, width_in),
            "bias": (width_out,) if self.bias else None,
            "down": (rank, self.columns_in),
            "up": (self.columns_out, rank),
            "core": core_shape,
        }
        generator = torch.Generator().manual_seed(sum(map(ord, repr(shapes))))
        tensors = {}
        for name, shape in shapes.items():
            if shape is not None:
                dtype = (self.factor_dtype or self.dtype) if name in ("down", "up", "core") else self.dtype
                numbers = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
                tensors[name] = numbers.to(self.dtype).to(dtype).to(device).requires_grad_()
        return tensors

    def gradient(self, device: str) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        shape = (self.rows, self.out_blocks * self.columns_out)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype).to(device)


def run(problem: Problem, device: str, backend: str, *, seed: int = 7, design: str | None = None) -> dict[str, Tensor]:
    """y and every gradient by our operation, detached."""
    tensors = problem.tensors(device)
    torch.manual_seed(seed)
    hidden = None
    if problem.precomputed_hidden:
        hidden = peft_kernels.lowrank_hidden(tensors["x"], tensors["down"], problem.in_blocks, backend=backend)
    y = peft_kernels.lowrank_linear(
        tensors["x"], tensors["weight"], tensors.get("bias"), tensors["down"], tensors["up"], tensors.get("core"),
        scale=problem.scale, dropout_p=problem.dropout_p, dropout_on=problem.dropout_on, hidden=hidden,
        backend=backend, design=design,
    )  # fmt: skip
    y.backward(problem.gradient(device))
    return {"y": y.detach()} | {name: tensor.grad for name, tensor in tensors.items()}


def expected(
    problem: Problem, device: str, mask: Tensor | None, dtype: torch.dtype = torch.float64, absolute: bool = False
) -> dict[str, Tensor]:
    """y and every gradient by the definition and autograd in `dtype`: float64 is the oracle, problem.dtype the peer.

    absolute: of the absolute values of everything, that is the sums of the absolute terms.
    """
    tensors = {name: t.detach().to(dtype) for name, t in problem.tensors(device).items()}
    tensors = {name: (t.abs() if absolute else t).requires_grad_() for name, t in tensors.items()}
    gradient = problem.gradient(device).to(dtype)
    y = lowrank_linear_reference(
        *(tensors.get(name) for name in NAMES),
        scale=problem.scale, mask=mask, dropout_p=problem.dropout_p, dropout_on=problem.dropout_on,
    )  # fmt: skip
    y.backward(gradient.abs() if absolute else gradient)
    return {"y": y.detach()} | {name: tensor.grad for name, tensor in tensors.items()}


def recover_mask(problem: Problem, device: str, backend: str, *, seed: int = 7, design: str | None = None) -> Tensor:
    """The keep-mask (rows, mask_columns) that a call with this seed draws, read off its gradients.

    With a zero weight, the gradient of x (of hidden for "rank" and "core") is zero just where an element was dropped;
    for "core" one output block at a time is let through.
    """
    problem = replace(problem, bias=False)
    tensors = {name: t.detach() for name, t in problem.tensors(device).items()}
    tensors["weight"] = torch.zeros_like(tensors["weight"])
    kept = []
    for o in range(problem.out_blocks if problem.dropout_on == "core" else 1):
        core = tensors.get("core")
        if problem.dropout_on == "core" and core is not None:
            only = torch.zeros(problem.out_blocks, problem.in_blocks, problem.rank, device=device, dtype=core.dtype)
            only[o, 0] = 1
            core = only
        hidden = None
        probe = tensors["x"].clone().requires_grad_()
        if problem.dropout_on != "input":
            probe = hidden = torch.ones(
                problem.rows, problem.in_blocks * problem.rank, device=device, dtype=problem.dtype, requires_grad=True
            )
        torch.manual_seed(seed)
        y = peft_kernels.lowrank_linear(
            probe if hidden is None else tensors["x"], tensors["weight"], None, tensors["down"], tensors["up"], core,
            dropout_p=problem.dropout_p, dropout_on=problem.dropout_on, hidden=hidden, backend=backend,
            design=design if hidden is None else None,
        )  # fmt: skip
        y.backward(problem.gradient(device))
        kept.append(probe.grad[:, : problem.rank] != 0 if problem.dropout_on == "core" else probe.grad != 0)
    return torch.cat(kept, 1)


def error(value: Tensor, oracle: Tensor) -> float:
    return ((value.double() - oracle).norm() / oracle.norm().clamp_min(1e-300)).item()


def assert_as_accurate_as_torch(
    problem: Problem, device: str, backend: str, design: str | None = None, *, conditioned: bool = False
) -> None:
    """err(ours) ≤ 1.25 × err(torch in the same dtype) + half an ulp, for the output and every gradient.

    The interpreter truncates bfloat16 where it stores: there 2 × and one ulp. In a tensor of n elements the roundings
    of single elements average out only as 1/√n: a tensor of one may be off by two ulps more.

    conditioned: for arbitrary shapes, where a gradient may hang on one sum that cancels (one row, rank 1), and which of
    two roundings of it is the better is chance: half an ulp of the sum of the absolute terms is allowed besides.
    """
    mask = recover_mask(problem, device, backend, design=design) if problem.dropout_p else None
    ours = run(problem, device, backend, design=design)
    oracle, peer = expected(problem, device, mask), expected(problem, device, mask, problem.dtype)
    terms = expected(problem, device, mask, absolute=True) if conditioned else {}
    compare(ours, oracle, peer, terms, problem, backend)


def compare(
    ours: dict[str, Tensor], oracle: dict[str, Tensor], peer: dict[str, Tensor], terms: dict[str, Tensor],
    problem: "Problem", backend: str,
) -> None:  # fmt: skip
    """The rule itself, for every operation whose problems have a dtype and a factor_dtype. Names may end in a number.

    terms: of each sum that may cancel, its absolute terms
    """
    truncated = INTERPRETED and backend == "triton" and problem.dtype == torch.bfloat16
    factor, slack = (2.0, ULP[problem.dtype]) if truncated else (1.25, ULP[problem.dtype] / 2)
    assert ours.keys() == oracle.keys()
    for name, value in ours.items():
        is_factor = name.rstrip("0123456789") in ("down", "up", "core")
        assert value.shape == oracle[name].shape, name
        assert value.dtype == (_factor_dtype(problem) if is_factor else problem.dtype), name
        allowed = factor * error(peer[name], oracle[name]) + slack + 2 * ULP[problem.dtype] / value.numel() ** 0.5
        if terms:
            allowed += ULP[problem.dtype] / 2 * (terms[name].norm() / oracle[name].norm().clamp_min(1e-300)).item()
        assert error(value, oracle[name]) <= allowed, (name, error(value, oracle[name]), allowed)


def _factor_dtype(problem: Problem) -> torch.dtype:
    return problem.factor_dtype or problem.dtype


def skip_unless_runnable(problem: Problem, design: str | None) -> None:
    if design == "fused" and (problem.in_blocks > 1 or problem.rank > 32):
        pytest.skip("fused takes one input block and ranks up to 32; that it refuses others is tested elsewhere")
