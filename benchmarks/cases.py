"""What the cases of every operation share: their dtype and direction, random tensors, the check before every timing."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

SCALE = 2.0  # PEFT's usual alpha / r


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem to measure; bench_<op>.py adds its sizes."""

    dtype: str = "float32"
    backward: bool = True  # False: the forward alone, without a graph for autograd

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def title(self) -> str:
        return f"{self}, {self.dtype}, {'forward + backward' if self.backward else 'forward'}"


class Draw:
    """Random tensors from one seed. Never zeros: they draw less power and run faster."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0):
        self.dtype, self.device = case.torch_dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator, device=self.device) * std).to(self.dtype)

    def permutation(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self.generator, device=self.device)


def converted(tensors: Any, dtype: torch.dtype) -> Any:
    """Copies in another dtype that take gradients where the originals do; None and whole numbers as they are."""

    def convert(t: Tensor | None) -> Tensor | None:
        if t is None or not t.is_floating_point():
            return t
        return t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)

    return type(tensors)(*map(convert, tensors))


class WrongResult(AssertionError):
    """A provider computes something else than the operation: it is not timed."""


def errors(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Each result's largest error, relative to the largest exact value; NaN if anything is, or all is 0."""
    found = {}
    for name, value in results.items():
        if value.shape != exact[name].shape:
            raise WrongResult(f"{name} has shape {tuple(value.shape)}, not {tuple(exact[name].shape)}")
        # In pieces that stay in the cache: copies of a large result in float64 cost more than computing it.
        pieces = zip(value.detach().flatten().split(2**18), exact[name].flatten().split(2**18))
        largest = torch.stack([torch.stack([(v.double() - e).abs().max(), e.abs().max()]) for v, e in pieces])
        error, size = largest.amax(0)
        found[name] = (error / size).item()  # NaN if both are 0
    return found


def rounded(tensors: Any) -> Any:
    """Copies of float64 tensors that are off by up to half a unit in float32's last place, each element by its own."""

    def nudge(t: Tensor | None) -> Tensor | None:
        if t is None or not t.is_floating_point():
            return t
        generator = torch.Generator(t.device).manual_seed(t.numel())
        by = torch.empty_like(t, requires_grad=False).uniform_(-1, 1, generator=generator)
        return torch.addcmul(t.detach(), t.detach(), by, value=torch.finfo(torch.float32).eps / 2).requires_grad_(
            t.requires_grad
        )

    return type(tensors)(*map(nudge, tensors))


def longest_sum(tensors: Any) -> int:
    """Terms of the longest sum over these tensors: along a row, or over all rows."""
    shapes = [t.shape for t in tensors if t is not None and t.dim() > 1]
    return max(max(shape[-1], shape.numel() // max(1, shape[-1])) for shape in shapes)


def check(
    provider: str,
    got: dict[str, Tensor],
    exact: dict[str, Tensor],
    usual: dict[str, float],
    accuracy: Mapping[str, float] = MappingProxyType({}),
    order: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, float]:
    """Each result's error against float64 is at most twice that of plain torch in the same dtype, `usual`, and what is
    left to the order of its sums, `order`.

    Or, for those in `accuracy`, at most that. Returns the errors. Raises WrongResult.
    """
    if missing := exact.keys() - got.keys():
        raise WrongResult(f"{provider}: no {', '.join(sorted(missing))}")
    try:
        found = errors(got, exact)
    except WrongResult as error:
        raise WrongResult(f"{provider}: {error}") from None
    for name, error in found.items():
        epsilon = torch.finfo(got[name].dtype).eps
        tolerated = accuracy.get(name, 2 * usual[name] + 2 * epsilon + order.get(name, 0.0))
        if not error <= tolerated:  # so that NaN is wrong, too
            raise WrongResult(
                f"{provider}: {name} is off by {error:.1e} of its largest value, {tolerated:.1e} is usual"
            )
    return found


def unlike(values: dict[str, float], tolerated: float = 1e-6) -> dict[str, str]:
    """Where all compute one number: who differs from the first by more than a part in a million, and in what words."""
    found = {}
    for name, value in values.items():
        first, expected = next(iter(values.items()))
        if not abs(value - expected) <= tolerated * abs(expected):
            found[name] = f"y is {value!r}, and {expected!r} by {first}"
    return found
