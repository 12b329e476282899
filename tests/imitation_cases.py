"""Random groups for the imitation step, and its definition: everything materialised, gradients by autograd."""

from dataclasses import dataclass

import torch
from torch import Tensor

from peft_kernels.imitation import ImitationGroup, Transform


@dataclass(frozen=True)
class Layer:
    """One layer with `outs` projections; a transform's width follows from its placement."""

    outs: tuple[int, ...] = (40, 40, 40)
    columns: int = 40
    rank: int | None = 5
    depth: int | None = 3  # r_d
    bias: bool = True
    placement: str = "input"
    live: torch.dtype = torch.float32
    drift: float = 1e-2  # of live and teacher from the frozen weights
    adapted: float = 1e-1  # of the adapters' own products

    def group(self, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> ImitationGroup:
        generator = torch.Generator().manual_seed(seed + sum(self.outs) + self.columns)

        def random(*shape: int, size: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * size).to(device, dtype)

        def adapter(*shape: int) -> Tensor:
            return random(*shape, size=(self.adapted / shape[-1]) ** 0.5).requires_grad_()

        weight0 = [random(out, self.columns, size=self.columns**-0.5) for out in self.outs]
        bias0 = [random(out) for out in self.outs] if self.bias else None

        def near(tensors, kind=dtype):
            return (
                None
                if tensors is None
                else [(t + random(*t.shape, size=self.drift) * t.std()).to(kind) for t in tensors]
            )

        live = self.live if dtype == torch.float32 else dtype
        rank, depth, width = self.rank, self.depth, self.columns if self.placement == "input" else self.outs[0]
        return ImitationGroup(
            live=near(weight0, live),
            teacher=near(weight0),
            weight0=weight0,
            live_bias=near(bias0, live),
            teacher_bias=near(bias0),
            bias0=bias0,
            down=None if rank is None else [adapter(rank, self.columns) for _ in self.outs],
            up=None if rank is None else [adapter(out, rank) for out in self.outs],
            transform=None
            if depth is None
            else Transform(adapter(depth, width), adapter(depth), adapter(width, depth), adapter(width)),
            placement=self.placement,
        )


def adapters(groups: list[ImitationGroup]) -> list[Tensor]:
    return list({id(t): t for group in groups for t in group.adapters()}.values())


def student(group: ImitationGroup, m: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None]:
    """W̄ and b̄ of one projection as docs/method.md, section 3, has them, differentiable in the group's own tensors."""
    weight, bias = group.weight0[m].to(dtype), None if group.bias0 is None else group.bias0[m].to(dtype)
    if group.down is not None:
        weight = weight + group.up[m].to(dtype) @ group.down[m].to(dtype)
    if group.transform is None:
        return weight, bias
    down, down_bias, up, up_bias = (t.to(dtype) for t in group.transform)
    whole = torch.eye(up.shape[0], dtype=dtype, device=up.device) + up @ down
    shift = up @ down_bias + up_bias
    if group.placement == "input":
        return weight @ whole, None if bias is None else weight @ shift + bias
    return whole @ weight, None if bias is None else whole @ bias + shift


def followed(group: ImitationGroup, decay: float, dtype: torch.dtype = torch.float64) -> ImitationGroup:
    """The same group with the teachers that the hand formula gives, in `dtype`."""
    teachers = {}
    for name, live in (("teacher", group.live), ("teacher_bias", group.live_bias)):
        if live is not None:
            pairs = zip(getattr(group, name), live)
            teachers[name] = [decay * t.to(dtype) + (1 - decay) * own.to(dtype) for t, own in pairs]
    lists = group.lists() | teachers
    return ImitationGroup(**lists, transform=group.transform, placement=group.placement)


def reduced(difference: Tensor, moved: Tensor, base: Tensor, reduction: str) -> Tensor:
    squared = difference.square()
    if reduction == "relative":
        return squared.sum() / moved.square().sum().clamp_min(1e-12 * base.square().sum())
    return squared.mean() if reduction == "mean" else squared.sum()


def loss(groups: list[ImitationGroup], reduction: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """The loss L of docs/method.md, section 3, of the teachers as they are."""
    total = torch.zeros((), dtype=dtype, device=groups[0].weight0[0].device)
    for group in groups:
        for m, (teacher, weight0) in enumerate(zip(group.teacher, group.weight0)):
            weight, bias = student(group, m, dtype)
            teacher, weight0 = teacher.to(dtype), weight0.to(dtype)
            total = total + reduced(teacher - weight, teacher - weight0, weight0, reduction)
            if bias is not None:
                teacher, bias0 = group.teacher_bias[m].to(dtype), group.bias0[m].to(dtype)
                total = total + reduced(teacher - bias, teacher - bias0, bias0, reduction)
    return total


def expected(groups: list[ImitationGroup], decay: float, reduction: str) -> tuple[Tensor, list[Tensor]]:
    """The loss and every adapter's gradient, in float64; zeros where the loss does not depend on one."""
    value = loss([followed(group, decay) for group in groups], reduction)
    leaves = adapters(groups)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.detach(), [torch.zeros_like(t) if grad is None else grad for t, grad in zip(leaves, grads)]


def relative(value: Tensor, oracle: Tensor) -> float:
    return ((value.double() - oracle.double()).norm() / oracle.double().norm().clamp_min(1e-300)).item()
