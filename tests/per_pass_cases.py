"""Layers that share by PerPass, beside twins that share nothing."""

import torch
from torch import nn

from peft_kernels.layers.mode_linear import Decomposition, ModeLinear, SharedCores
from peft_kernels.layers.per_pass import PerPass
from peft_kernels.ops import lowrank_linear, lowrank_projections

D, RANK, PLACES = 6, 2, 3


class Stack(nn.Module):
    """q, k and v of one x: layers that share x U and their cores, beside twins that share nothing."""

    def __init__(self, core: str = "tucker"):
        super().__init__()
        self.decomposition = Decomposition([(D, D)] * PLACES, [(1, 1)] * PLACES, RANK, core, dtype=torch.float64)
        nn.init.normal_(self.decomposition.up[f"{D}x{D}"])
        cores, hidden = SharedCores(self.decomposition), PerPass()
        linears = [nn.Linear(D, D, dtype=torch.float64) for _ in range(PLACES)]
        self.kept = []
        self.layers = nn.ModuleList(ModeLinear(each, cores, k, hidden=hidden) for k, each in enumerate(linears))
        self.twins = nn.ModuleList(
            ModeLinear(each, SharedCores(self.decomposition), k) for k, each in enumerate(linears)
        )

    def forward(self, x):
        return torch.stack([layer(x) for layer in self.layers])


class Watched:
    """An operator that shows each call's arguments to `note` first."""

    def __init__(self, operator, note):
        self.operator, self.note = operator, note

    def __call__(self, backend, *args):
        self.note(*args)
        return self.operator(backend, *args)

    def direct(self, backend, memo, *args):
        self.note(*args)
        return self.operator.direct(backend, memo, *args)


def watch(monkeypatch, name: str, note) -> None:
    op = lowrank_projections if name.startswith("lowrank_projections") else lowrank_linear
    monkeypatch.setattr(op, name, Watched(getattr(op, name), note))


def count_products(monkeypatch) -> list[int]:
    """One entry for each product with U that several layers share, or that one of them makes for itself."""
    made = []
    watch(monkeypatch, "lowrank_hidden_fwd", lambda *args: made.append(1))
    watch(monkeypatch, "lowrank_linear_fwd", lambda x, w, b, factors, *_: factors.z is None and made.append(1))
    return made


def data(requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(4, D, dtype=torch.float64, requires_grad=requires_grad)


def same(stack: Stack, x: torch.Tensor, *members: int) -> list[torch.Tensor]:
    """Outputs of the members, each equal to its twin's, and kept: with the last of them a pass would end."""
    ys = [stack.layers[m](x) for m in members]
    stack.kept += ys
    for m, y in zip(members, ys):
        torch.testing.assert_close(y, stack.twins[m](x), rtol=1e-13, atol=1e-13)
    return ys


def grads(stack: Stack, x: torch.Tensor, run) -> list[torch.Tensor]:
    """Of U, V, P and C, and of x where it takes one."""
    wanted = [p for p in (*stack.decomposition.parameters(), x) if p.requires_grad]
    for p in wanted:
        p.grad = None
    run()
    return [p.grad.clone() for p in wanted]


def expected_grads(stack: Stack, x: torch.Tensor, members=range(PLACES)) -> list[torch.Tensor]:
    return grads(stack, x, lambda: sum(stack.twins[m](x).square().sum() for m in members).backward())


def close(got, expected) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
