"""MLPs for `adapted_mlp`: their tensors, the same as operations one after another, and their oracle in float64."""

from dataclasses import dataclass

import torch
from lowrank_cases import INTERPRETED, ULP, error
from torch import Tensor

from peft_kernels import MlpLinear, adapted_mlp, lowrank_linear, lowrank_projections
from peft_kernels.blocks import mlp
from peft_kernels.blocks.activations import ACTIVATIONS
from peft_kernels.blocks.mlp import adapted_mlp_reference

TENSORS = ("weight", "bias", "down", "up")


@dataclass(frozen=True)
class Mlp:
    """ranks: of gate (None: no gate), fc1 and fc2; 0: a plain linear. A gate and fc1 of one rank are one call."""

    ranks: tuple[int | None, int, int] = (None, 4, 3)
    activation: str = "gelu"
    dtype: torch.dtype = torch.float32
    factor_dtype: torch.dtype | None = None
    dropout_p: float = 0.0
    bias: bool = True
    sizes: tuple[int, int, int] = (24, 40, 17)  # in, hidden, out
    shape: tuple[int, ...] = (2, 9)
    scale: float = 1.7

    @property
    def names(self) -> list[str]:
        return [name for name, rank in zip(("gate", "fc1", "fc2"), self.ranks) if rank is not None]

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Leaves that require grad: x, and fc1.weight, … of each layer. The same numbers in every dtype."""
        generator, (columns, hidden, out) = torch.Generator().manual_seed(0), self.sizes
        shapes = {"x": (*self.shape, columns)}
        for name, rank in zip(("gate", "fc1", "fc2"), self.ranks):
            n, k = (out, hidden) if name == "fc2" else (hidden, columns)
            own = {"weight": (n, k), "bias": (n,) if self.bias else None}
            own |= {"down": (rank, k), "up": (n, rank)} if rank else {}
            shapes |= {f"{name}.{key}": shape for key, shape in own.items() if rank is not None and shape}
        found = {}
        for name, shape in shapes.items():
            numbers = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
            own = self.factor_dtype if self.factor_dtype and name.endswith(("down", "up")) else self.dtype
            found[name] = numbers.to(self.dtype).to(dtype or own).requires_grad_()
        return found

    def layers(self, tensors: dict[str, Tensor]) -> dict[str, MlpLinear]:
        return {name: MlpLinear(*(tensors.get(f"{name}.{key}") for key in TENSORS), self.scale) for name in self.names}

    def gradient(self, y: Tensor) -> Tensor:
        return torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)


def results(case: Mlp, run, tensors: dict[str, Tensor] | None = None, seed: int = 7) -> dict[str, Tensor]:
    """y and every gradient of `run(x, **layers)`."""
    tensors = case.tensors() if tensors is None else tensors
    wanted = {name: t for name, t in tensors.items() if t.requires_grad}
    torch.manual_seed(seed)
    y = run(tensors["x"], **case.layers(tensors))
    return {"y": y.detach()} | dict(zip(wanted, torch.autograd.grad(y, [*wanted.values()], case.gradient(y))))


def ours(case: Mlp, backend: str = "auto"):
    def run(x, **layers):
        return adapted_mlp(x, **layers, activation=case.activation, dropout_p=case.dropout_p, backend=backend)

    return run


def one_by_one(case: Mlp):
    """The operations whose launchers the block calls, with torch's activation between them."""

    def linear(x, layer):
        if layer.down is None:
            return torch.nn.functional.linear(x, layer.weight, layer.bias)
        return lowrank_linear(x, *layer[:4], scale=layer.scale, dropout_p=case.dropout_p)

    def run(x, fc1, fc2, gate=None):
        act = ACTIVATIONS[case.activation].of
        if gate is None:
            return linear(act(linear(x, fc1)), fc2)
        if gate.down is not None and case.ranks[0] == case.ranks[1]:
            weights, biases, downs, ups, scales = zip(gate, fc1)
            g, u = lowrank_projections(x, weights, biases, downs, ups, scales=scales, dropout_p=case.dropout_p)
        else:
            g, u = linear(x, gate), linear(x, fc1)
        return linear(act(g) * u, fc2)

    return run


def reference(case: Mlp, masks: tuple[Tensor | None, ...] = (None, None, None)):
    def run(x, **layers):
        own = {"activation": case.activation, "masks": masks, "dropout_p": case.dropout_p}
        return adapted_mlp_reference(x, **layers, **own)

    return run


def assert_as_accurate_as_torch(case: Mlp, backend: str) -> None:
    """As lowrank_cases': within 1.25 × the error of plain torch in the same dtype, where rounding hides nothing."""
    found = results(case, ours(case, backend))
    oracle = results(case, reference(case), case.tensors(torch.float64))
    peer = results(case, reference(case), case.tensors(case.dtype))
    truncated = INTERPRETED and backend == "triton" and case.dtype == torch.bfloat16
    factor, slack = (2.0, ULP[case.dtype]) if truncated else (1.25, ULP[case.dtype] / 2)
    assert found.keys() == oracle.keys()
    for name, value in found.items():
        assert value.shape == oracle[name].shape, name
        own = case.factor_dtype if case.factor_dtype and name.endswith(("down", "up")) else case.dtype
        assert value.dtype == own, name
        allowed = factor * error(peer[name], oracle[name]) + slack + 2 * ULP[case.dtype] / value.numel() ** 0.5
        assert error(value, oracle[name]) <= allowed, (name, error(value, oracle[name]), allowed)


def drawing(monkeypatch, case: Mlp) -> tuple[Tensor | None, ...]:
    """The masks that a call on the torch backend will have drawn for gate, fc1 and fc2, filled in as it runs."""
    drawn, draw = [], mlp.draw

    def noted(*args):
        drawn.append(draw(*args))
        return drawn[-1]

    monkeypatch.setattr(mlp, "draw", noted)
    tensors = case.tensors()
    torch.manual_seed(7)
    ours(case, "torch")(tensors["x"], **case.layers(tensors))
    monkeypatch.setattr(mlp, "draw", draw)
    masks = [m for each in drawn for m in (each if each.ndim == 3 else [each])]
    remaining = iter(masks)
    return tuple(next(remaining).view(*case.shape, -1) if rank else None for rank in case.ranks)
