"""The shapes that are measured, their tensors, and the check that comes before every timing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One linear layer with an adapter: x (M, K) -> y (M, N), rank R, dropout on x."""

    M: int
    K: int
    N: int
    R: int = 16
    dtype: str = "float32"
    dropout: float = 0.0

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        return f"{self.M} × {self.K} → {self.N}, rank {self.R}, {self.dtype}, dropout {self.dropout:g}"


# (M, K, N). BLIP and ViLT have width 768 and an MLP of 3072; 577 is the number of image tokens.
GPU_SHAPES = ((8192, 4096, 4096), (16 * 577, 768, 768), (16 * 577, 768, 3072), (16 * 577, 3072, 768))
CPU_SHAPES = ((4 * 577, 768, 768), (4 * 577, 768, 3072), (4 * 577, 3072, 768))
DROPOUTS = (0.0, 0.1)


def cases(shapes: Sequence[Sequence[int]], dtypes: Sequence[str]) -> list[Case]:
    """Shapes are (M, K, N) or (M, K, N, R)."""
    return [Case(*shape, dtype=dtype, dropout=p) for dtype in dtypes for shape in shapes for p in DROPOUTS]


class Tensors(NamedTuple):
    """Random, never zeros: zeros draw less power and run faster. Both branches of y have the same size."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    down: Tensor
    up: Tensor
    dy: Tensor


SCALE = 2.0  # PEFT's usual alpha / r


def make_tensors(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(case.torch_dtype)

    return Tensors(
        x=normal(case.M, case.K).requires_grad_(),
        weight=normal(case.N, case.K, std=case.K**-0.5),
        bias=normal(case.N),
        down=normal(case.R, case.K, std=case.K**-0.5).requires_grad_(),
        up=normal(case.N, case.R, std=case.R**-0.5 / SCALE).requires_grad_(),
        dy=normal(case.M, case.N),
    )


class WrongResult(AssertionError):
    """A provider computes something else than the operation: it is not timed."""


def check(
    provider: str, got: dict[str, Tensor], exact: dict[str, Tensor], usual: dict[str, Tensor], factor: float = 2.0
) -> None:
    """Each result's largest error against float64 is at most `factor` times that of plain torch in the same dtype.

    Raises WrongResult. `usual` are plain torch's results; all errors are relative to the largest exact value.
    """
    for name, value in got.items():
        size = exact[name].abs().max()
        error, tolerated = ((t - exact[name]).abs().max() / size for t in (value.double(), usual[name].double()))
        tolerated = factor * tolerated + 2 * torch.finfo(value.dtype).eps
        if not error <= tolerated:  # so that NaN is wrong, too
            raise WrongResult(
                f"{provider}: {name} is off by {error:.1e} of its largest value, {tolerated:.1e} is usual"
            )
