"""Random problems for `gated_query`, their oracle in float64, and the error that torch makes in the same dtype."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lowrank_cases import INTERPRETED, ULP
from torch import Tensor

from peft_kernels import gated_query
from peft_kernels.ops.gated_query import gated_query_reference

VECTORS = ("gamma", "beta", "cross_gamma", "cross_beta")
MODES = ("additive", "gated")


@dataclass(frozen=True)
class Problem:
    """`batch` sequences of `positions` rows of `width`."""

    mode: str = "gated"
    batch: int = 3
    positions: int = 7
    width: int = 24
    padding: str = "none"  # | "some": and all of the first sequence
    dtype: torch.dtype = torch.float32
    vector_dtype: torch.dtype | None = None
    spread: float = 1.0  # of the scores, about
    scale: float = 0.7

    def tensors(self, device: str) -> dict[str, Tensor]:
        """Leaves that require grad, by name. Scores, sums over S · d products, spread as told, and rarely cancel."""
        shape = (self.batch, self.positions, self.width)
        shapes = {"hidden": shape, "text": shape, "gamma": shape[2:], "beta": shape[2:]}
        if self.mode == "additive":
            shapes |= {"cross": shape, "cross_gamma": shape[2:], "cross_beta": shape[2:]}
        sizes = {"hidden": self.spread * (self.width * self.positions or 1) ** -0.5, "beta": 0.1}
        generator = torch.Generator().manual_seed(sum(map(ord, repr(shapes))))
        tensors = {}
        for name, size in shapes.items():
            numbers = torch.randn(size, generator=generator, dtype=torch.float64)
            if self.mode == "gated":
                numbers = numbers * sizes.get(name, 1.0) + (name == "gamma")
            dtype = self.vector_dtype or self.dtype if name in VECTORS else self.dtype
            tensors[name] = numbers.to(self.dtype).to(dtype).to(device).requires_grad_()
        return tensors

    def options(self, device: str) -> dict:
        if self.mode == "additive":
            return {"scale": self.scale}
        if self.padding == "none":
            return {}
        mask = torch.rand(self.batch, self.positions, generator=torch.Generator().manual_seed(2)) < 0.6
        mask[:1] = False
        return {"padding_mask": mask.to(device)}

    def gradient(self, like: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def run(problem: Problem, device: str, backend: str) -> dict[str, Tensor]:
    """The output and every gradient by our operation."""
    tensors = problem.tensors(device)
    y = gated_query(problem.mode, **tensors, **problem.options(device), backend=backend)
    y.backward(problem.gradient(y))
    return {"y": y.detach()} | {name: t.grad for name, t in tensors.items()}


def expected(problem: Problem, device: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The same by the definition and autograd in `dtype`: float64 is the oracle, problem.dtype the peer."""
    tensors = {name: t.detach().to(dtype).requires_grad_() for name, t in problem.tensors(device).items()}
    y = gated_query_reference(problem.mode, **tensors, **problem.options(device))
    y.backward(problem.gradient(torch.empty_like(y, dtype=problem.dtype)).to(dtype))
    return {"y": y.detach()} | {name: t.grad for name, t in tensors.items()}


def terms(problem: Problem, device: str) -> dict[str, Tensor]:
    """For each result the sum of its absolute terms, in float64: what roundings of float32 sums are relative to.

    An exponential turns its exponent's absolute error into a relative one of g.
    """
    t = {name: tensor.detach().double() for name, tensor in problem.tensors(device).items()}
    dy = problem.gradient(t["hidden"].to(problem.dtype)).double().abs()
    if problem.mode == "additive":
        t = {name: tensor.abs().requires_grad_() for name, tensor in t.items()}
        y = gated_query_reference("additive", **t, **problem.options(device))
        y.backward(dy)
        return {"y": y.detach()} | {name: tensor.grad for name, tensor in t.items()}
    mask = problem.options(device).get("padding_mask", torch.ones(dy.shape[:-1], dtype=torch.bool, device=device))
    moved = t["text"] * t["gamma"] + t["beta"]
    scores = (t["hidden"] * (moved * mask[..., None]).sum(-2, keepdim=True)).sum(-1, keepdim=True)
    gate = scores.masked_fill(~mask[..., None], -1e9).softmax(-2) * mask[..., None]
    hidden, moved = t["hidden"].abs(), t["text"].abs() * t["gamma"].abs() + t["beta"].abs()
    total = (moved * mask[..., None]).sum(-2, keepdim=True)
    gate = gate * (1 + (hidden * total).sum(-1, keepdim=True))
    q = (dy * (hidden + moved)).sum(-1, keepdim=True)
    ds = gate * (q + (gate * q).sum(-2, keepdim=True))
    d_moved = (1 + gate) * dy + mask[..., None] * (ds * hidden).sum(-2, keepdim=True)
    return {
        "y": gate * hidden + (1 + gate) * moved,
        "hidden": gate * dy + ds * total,
        "text": d_moved * t["gamma"].abs(),
        "gamma": (d_moved * t["text"].abs()).sum((0, 1)),
        "beta": d_moved.sum((0, 1)),
    }


def assert_as_accurate_as_torch(problem: Problem, device: str, backend: str, run: Callable = run) -> None:
    """err(ours) ≤ 1.25 × err(torch in the same dtype) + half an ulp; interpreted bfloat16 and few elements as in
    lowrank_cases. A gradient may hang on sums that cancel, all of it at one position, and which of two roundings of
    them is the better is chance: half a float32 ulp of the sum of absolute terms is allowed besides."""
    ours, oracle = run(problem, device, backend), expected(problem, device)
    peer, absolute = expected(problem, device, problem.dtype), terms(problem, device)
    truncated = INTERPRETED and backend == "triton" and problem.dtype == torch.bfloat16
    factor, slack = (2.0, ULP[problem.dtype]) if truncated else (1.25, ULP[problem.dtype] / 2)
    assert ours.keys() == oracle.keys() == absolute.keys()
    for name, value in ours.items():
        assert value.shape == oracle[name].shape, name
        assert value.dtype == (problem.vector_dtype or problem.dtype if name in VECTORS else problem.dtype), name
        norm, few = oracle[name].norm(), 2 * ULP[problem.dtype] / max(1, value.numel()) ** 0.5
        allowed = factor * (peer[name].double() - oracle[name]).norm() + (slack + few) * norm
        allowed += ULP[torch.float32] / 2 * absolute[name].norm()
        wrong = (value.double() - oracle[name]).norm()
        assert wrong <= allowed, (name, (wrong / norm).item(), (allowed / norm).item())
