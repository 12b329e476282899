"""Random problems for `batched_lowrank_linear`, their oracle in float64, and the error torch itself makes."""

from dataclasses import dataclass

import torch
from lowrank_cases import INTERPRETED, ULP, error
from torch import Tensor

from peft_kernels import batched_lowrank_linear
from peft_kernels.ops.batched_lowrank_linear import batched_lowrank_linear_reference

NAMES = ("x", "weight", "bias", "down", "up")


def rows_of(*counts: int) -> tuple[int, ...]:
    """A shuffled index with counts[0] rows of no adapter, counts[1] of adapter 0, and so on."""
    index = torch.arange(-1, len(counts) - 1).repeat_interleave(torch.tensor(counts))
    return tuple(index[torch.randperm(len(index), generator=torch.Generator().manual_seed(3))].tolist())


@dataclass(frozen=True)
class Problem:
    index: tuple[int, ...] = rows_of(5, 20, 0, 70, 1)  # with none, an empty adapter, one over a tile, a single row
    adapters: int = 4
    inputs: int = 24
    outputs: int = 40
    rank: int = 5
    dtype: torch.dtype = torch.float32
    factor_dtype: torch.dtype | None = None
    bias: bool = True
    scale: float | None = 1.7  # None: one for each adapter

    def scales(self, device: str) -> float | Tensor:
        return torch.linspace(0.5, 2, self.adapters, device=device) if self.scale is None else self.scale

    def tensors(self, device: str) -> dict[str, Tensor]:
        """Leaves that require grad, by name."""
        shapes = {
            "x": (len(self.index), self.inputs),
            "weight": (self.outputs, self.inputs),
            "bias": (self.outputs,) if self.bias else None,
            "down": (self.adapters, self.rank, self.inputs),
            "up": (self.adapters, self.outputs, self.rank),
        }
        generator = torch.Generator().manual_seed(sum(map(ord, repr(shapes))))
        tensors = {}
        for name, shape in shapes.items():
            if shape is not None:
                dtype = self.factor_dtype or self.dtype if name in ("down", "up") else self.dtype
                numbers = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
                tensors[name] = numbers.to(self.dtype).to(dtype).to(device).requires_grad_()
        return tensors

    def gradient(self, device: str) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        numbers = torch.randn(len(self.index), self.outputs, generator=generator, dtype=torch.float64)
        return numbers.to(self.dtype).to(device)


def run(problem: Problem, device: str, backend: str) -> dict[str, Tensor]:
    """y and every gradient by our operation."""
    tensors, index = problem.tensors(device), torch.tensor(problem.index, device=device, dtype=torch.int64)
    arguments = (tensors.get(name) for name in NAMES)
    y = batched_lowrank_linear(*arguments, index, scale=problem.scales(device), backend=backend)
    y.backward(problem.gradient(device))
    return {"y": y.detach()} | {name: t.grad for name, t in tensors.items()}


def expected(
    problem: Problem, device: str, dtype: torch.dtype = torch.float64, absolute: bool = False
) -> dict[str, Tensor]:
    """The same by the definition and autograd in `dtype`; absolute: the sums of the absolute terms."""
    tensors = {name: t.detach().to(dtype) for name, t in problem.tensors(device).items()}
    tensors = {name: (t.abs() if absolute else t).requires_grad_() for name, t in tensors.items()}
    index, gradient = torch.tensor(problem.index, device=device, dtype=torch.int64), problem.gradient(device).to(dtype)
    arguments = (tensors.get(name) for name in NAMES)
    y = batched_lowrank_linear_reference(*arguments, index, scale=problem.scales(device))
    y.backward(gradient.abs() if absolute else gradient)
    return {"y": y.detach()} | {name: t.grad for name, t in tensors.items()}


def assert_as_accurate_as_torch(
    problem: Problem,
    device: str,
    backend: str,
    results: dict[str, Tensor] | None = None,
    *,
    conditioned: bool = False,
) -> None:
    """err(ours) ≤ 1.25 × err(torch in the same dtype) + half an ulp; interpreted bfloat16 and few elements as in
    lowrank_cases. An adapter may have one row: half a float32 ulp of the sum of the absolute terms is allowed besides.

    results: of another way to compute the same, instead of ours;  conditioned: as in lowrank_cases
    """
    ours = results or run(problem, device, backend)
    oracle, peer = expected(problem, device), expected(problem, device, problem.dtype)
    terms = expected(problem, device, absolute=True)
    truncated = INTERPRETED and backend == "triton" and problem.dtype == torch.bfloat16
    factor, slack = (2.0, ULP[problem.dtype]) if truncated else (1.25, ULP[problem.dtype] / 2)
    assert ours.keys() == oracle.keys()
    for name, value in ours.items():
        assert value.shape == oracle[name].shape, name
        kind = problem.factor_dtype or problem.dtype if name in ("down", "up") else problem.dtype
        assert value.dtype == kind, name
        allowed = factor * error(peer[name], oracle[name]) + slack
        allowed += 2 * ULP[problem.dtype] / max(1, value.numel()) ** 0.5
        term = ULP[problem.dtype if conditioned else torch.float32] / 2
        allowed += term * (terms[name].norm() / oracle[name].norm().clamp_min(1e-300)).item()
        assert error(value, oracle[name]) <= allowed, (name, error(value, oracle[name]), allowed)
