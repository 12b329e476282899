"""Random problems for `reconstruct` and `reconstruct_stack`, their oracle in float64, and the error torch makes."""

from dataclasses import dataclass

import torch
from lowrank_cases import INTERPRETED, ULP, error
from torch import Tensor

from peft_kernels import reconstruct, reconstruct_stack
from peft_kernels.ops.reconstruct import reconstruct_reference


@dataclass(frozen=True)
class Problem:
    """Blocks (rows, columns), O × I of them; a stack is the case I = 1, by its own function."""

    rows: int = 40
    columns: int = 24
    rank: int = 5
    out_blocks: int = 1
    in_blocks: int = 1
    core: str | None = None  # "diagonal" | "dense" with blocks, "flat diagonal" | "flat dense" without
    base: str | None = "full"  # | "shared": one under every matrix of a stack | None
    stack: bool = False
    dtype: torch.dtype = torch.float32
    factor_dtype: torch.dtype | None = None
    scale: float = 1.7

    def tensors(self, device: str) -> dict[str, Tensor]:
        """Leaves that require grad, by name; dense cores are asymmetric, so that a transpose cannot hide."""
        blocks, rank = (self.out_blocks,) if self.stack else (self.out_blocks, self.in_blocks), self.rank
        whole = (self.out_blocks * self.rows, self.in_blocks * self.columns)
        base = (self.out_blocks, self.rows, self.columns) if self.stack else whole
        shapes = {
            "down": (rank, self.columns),
            "up": (self.rows, rank),
            "core": {
                None: None,
                "flat diagonal": (rank,),
                "flat dense": (rank, rank),
                "diagonal": (*blocks, rank),
                "dense": (*blocks, rank, rank),
            }[self.core],
            "base": {None: None, "full": base, "shared": base[-2:]}[self.base],
        }
        generator = torch.Generator().manual_seed(sum(map(ord, repr(shapes))))
        tensors = {}
        for name, shape in shapes.items():
            if shape is not None:
                dtype = self.dtype if name == "base" else self.factor_dtype or self.dtype
                numbers = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
                tensors[name] = numbers.to(self.dtype).to(dtype).to(device).requires_grad_()
        return tensors

    def gradient(self, like: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def run(problem: Problem, device: str, backend: str) -> dict[str, Tensor]:
    """W and every gradient by our operation."""
    tensors = problem.tensors(device)
    function = reconstruct_stack if problem.stack else reconstruct
    arguments = (tensors["down"], tensors["up"], tensors.get("core"))
    w = function(*arguments, scale=problem.scale, base=tensors.get("base"), backend=backend)
    w.backward(problem.gradient(w))
    return {"w": w.detach()} | {name: t.grad for name, t in tensors.items()}


def expected(
    problem: Problem, device: str, dtype: torch.dtype = torch.float64, absolute: bool = False
) -> dict[str, Tensor]:
    """The same by the definition and autograd in `dtype`; absolute: the sums of the absolute terms."""
    tensors = {name: t.detach().to(dtype) for name, t in problem.tensors(device).items()}
    tensors = {name: (t.abs() if absolute else t).requires_grad_() for name, t in tensors.items()}
    down, up, core, base = (tensors.get(name) for name in ("down", "up", "core", "base"))
    if problem.stack:
        delta = reconstruct_reference(down, up, core[:, None], scale=problem.scale)
        w = delta.unflatten(0, (core.shape[0], -1))
        w = w if base is None else base + w
    else:
        w = reconstruct_reference(down, up, core, scale=problem.scale, base=base)
    gradient = problem.gradient(torch.empty_like(w, dtype=problem.dtype)).to(dtype)
    w.backward(gradient.abs() if absolute else gradient)
    return {"w": w.detach()} | {name: t.grad for name, t in tensors.items()}


def assert_as_accurate_as_torch(problem: Problem, device: str, backend: str) -> None:
    """err(ours) ≤ 1.25 × err(torch in the same dtype) + half an ulp; interpreted bfloat16 and few elements as in
    lowrank_cases. A core's gradient may hang on one sum over a whole matrix: half a float32 ulp of the sum of its
    absolute terms is allowed besides."""
    ours, oracle = run(problem, device, backend), expected(problem, device)
    peer, terms = expected(problem, device, problem.dtype), expected(problem, device, absolute=True)
    truncated = INTERPRETED and backend == "triton" and problem.dtype == torch.bfloat16
    factor, slack = (2.0, ULP[problem.dtype]) if truncated else (1.25, ULP[problem.dtype] / 2)
    assert ours.keys() == oracle.keys()
    for name, value in ours.items():
        assert value.shape == oracle[name].shape, name
        kind = problem.dtype if name in ("w", "base") else problem.factor_dtype or problem.dtype
        assert value.dtype == kind, name
        allowed = factor * error(peer[name], oracle[name]) + slack + 2 * ULP[problem.dtype] / value.numel() ** 0.5
        allowed += ULP[torch.float32] / 2 * (terms[name].norm() / oracle[name].norm().clamp_min(1e-300)).item()
        assert error(value, oracle[name]) <= allowed, (name, error(value, oracle[name]), allowed)
