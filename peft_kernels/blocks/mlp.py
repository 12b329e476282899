"""A transformer's MLP with low-rank updates, fc2(act(fc1(x))) or fc2(act(gate(x)) ∘ fc1(x)), in one autograd node.

    h = x W₁ᵀ + b₁ + s₁ · B₁ A₁ drop₁(x)        (M, N₁)
    a = act(h), or with a gate g of x, a = act(g) ∘ h
    y = a W₂ᵀ + b₂ + s₂ · B₂ A₂ drop₂(a)        (M, N₂)

Kept for the backward: x, h (and g), each layer's z, the random seeds (the torch backend: 1-byte masks). The widest of
all, a, is made anew of h; so are act(g) and what an activation that a model writes out keeps. All products are those of
`lowrank_linear`, and of `lowrank_projections` for a gate and fc1 whose updates are alike: on the torch backend with
their bits. Formulas of each layer: docs/method.md, section 1. Gated MLPs: arXiv 2002.05202.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels import kinds
from peft_kernels.autocast import autocast_off, autocasts, linear_dtype
from peft_kernels.backend import resolve
from peft_kernels.blocks.activations import ACTIVATIONS, activated, activated_bwd
from peft_kernels.blocks.linears import LinearNeeds, MlpLinear, linears_bwd, linears_fwd
from peft_kernels.checks import (
    check_choice,
    check_factors,
    check_flag,
    check_linear,
    check_probability,
    check_scale,
    check_tensor,
    kind_of,
    refuse_second_derivative,
)
from peft_kernels.operator import composed
from peft_kernels.ops.lowrank_linear import draw
from peft_kernels.ops.lowrank_projections import scale_tensor
from peft_kernels.records import KEEP_ALL, Dropout, Factors
from peft_kernels.remembered import remembered
from peft_kernels.rows import contiguous, rows, shaped
from peft_kernels.torch_kernels.lowrank_linear import lowrank_linear_composed
from peft_kernels.transforms import transformed


def adapted_mlp_reference(x, fc1, fc2, gate=None, *, activation="gelu", masks=(None, None, None), dropout_p=0.0):
    """The definition, in the precision of its arguments.  masks: of gate, fc1 and fc2; True is kept"""
    act = {
        "gelu": F.gelu,
        "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
        "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
        "silu": F.silu,
        "relu": F.relu,
    }[activation]

    def linear(x, layer, mask):
        y = F.linear(x, layer.weight, layer.bias)
        if layer.down is None:
            return y
        dropped = x if mask is None else x * (mask.to(x.dtype) / (1 - dropout_p))
        return y + layer.scale * (dropped @ layer.down.T @ layer.up.T)

    h = linear(x, fc1, masks[1])
    return linear(act(h) if gate is None else act(linear(x, gate, masks[0])) * h, fc2, masks[2])


class _Plan(NamedTuple):
    """What the checks came to."""

    dtype: torch.dtype | None  # that autocast asks for
    calls: tuple[tuple[str | None, int], ...]  # in the order gate, fc1, fc2: a backend, and how many layers at once

    def split(self, values: Sequence) -> list[list]:
        """One value for each layer -> a list for each call."""
        remaining = iter(values)
        return [[next(remaining) for _ in range(count)] for _, count in self.calls]


class _AdaptedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activation, scales, dropouts, plan, *tensors):
        *first, last = calls = plan.split(_layers(tensors, scales))
        backends, read, hs, zs = [backend for backend, _ in plan.calls], rows(x), [], []
        needs_x, gives_dh, needs = _needs(ctx.needs_input_grad)
        for call in zip(backends, [read] * len(first), first, dropouts):
            ys, z = linears_fwd(*call)
            hs, zs = hs + ys, [*zs, z]
        a = activated(activation, *hs)
        if not (gives_dh or needs[-1].input):
            hs = [None] * len(hs)
        (y,), z = linears_fwd(backends[-1], a, last, dropouts[-1])
        keeps = {
            "x": [x if any(each.input for each in needs[:-1]) else None],
            "hs": hs,
            "zs": [z if any(n.up for n in each) else None for z, each in zip([*zs, z], plan.split(needs))],
            "rngs": [dropout.rng for dropout in dropouts],
            "weights": [
                *(each.weight if needs_x else None for call in first for each in call),
                last[0].weight if gives_dh else None,
            ],
            "factors": [t for call in calls for each in call for t in (each.down, each.up)],
            "scales": [scale if isinstance(scale, Tensor) else None for scale in scales],
        }
        ctx.save_for_backward(*(t for part in keeps.values() for t in part))
        ctx.sizes = {name: len(part) for name, part in keeps.items()}
        ctx.numbers = [None if isinstance(scale, Tensor) else scale for scale in scales]
        ctx.activation, ctx.plan, ctx.x_shape = activation, plan, x.shape
        ctx.dropouts = [dropout[1:] for dropout in dropouts]
        return y if x.ndim == 2 else shaped(y, *x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():
            refuse_second_derivative("adapted_mlp")
        saved = iter(ctx.saved_tensors)
        kept = {name: [next(saved) for _ in range(size)] for name, size in ctx.sizes.items()}
        scales = [number if scale is None else scale for number, scale in zip(ctx.numbers, kept["scales"])]
        factors = zip(kept["weights"], kept["factors"][::2], kept["factors"][1::2], scales)
        layers = ctx.plan.split([MlpLinear(weight, None, *others) for weight, *others in factors])
        dropouts = [
            KEEP_ALL if rng is None else Dropout(rng, *others) for rng, others in zip(kept["rngs"], ctx.dropouts)
        ]
        needs_x, gives_dh, needs = _needs(ctx.needs_input_grad)
        (x,), hs = kept["x"], kept["hs"]
        x, dx, gradients = None if x is None else rows(x), None, []
        calls = list(zip([b for b, _ in ctx.plan.calls], layers, zip(kept["zs"], dropouts), ctx.plan.split(needs)))
        with autocast_off(dy):
            backend, layer, of, need = calls[-1]
            a = activated(ctx.activation, *hs) if needs[-1].input else None
            da, own = linears_bwd(backend, [rows(dy)], a, layer, of, (gives_dh, need))
            del a
            wanted = [needs_x or any(True in each for each in need) for *_, need in calls[:-1] for _ in need]
            dhs = activated_bwd(ctx.activation, da, hs, wanted)
            del da
            for (backend, layer, of, need), dys in zip(calls[:-1], ctx.plan.split([*dhs, None])):
                part, found = linears_bwd(backend, dys, x, layer, of, (needs_x, need))
                dx, gradients = part if dx is None else dx.add_(part), gradients + found
        return (None if dx is None else dx.view(ctx.x_shape), *[None] * (_FIRST - 1), *gradients, *own)


_FIRST = 5  # arguments before the tensors of layers


def _layers(tensors: Sequence[Tensor | None], scales: Sequence[float | Tensor]) -> list[MlpLinear]:
    return [MlpLinear(*tensors[4 * place : 4 * place + 4], scale) for place, scale in enumerate(scales)]


def _needs(asked: Sequence[bool]) -> tuple[bool, bool, list[LinearNeeds]]:
    """-> of x, of what the last layer reads, of each layer"""
    needs = [LinearNeeds(*asked[first : first + 4]) for first in range(_FIRST, len(asked), 4)]
    return asked[0], asked[0] or any(True in each for each in needs[:-1]), needs


def adapted_mlp(
    x: Tensor,
    fc1: MlpLinear,
    fc2: MlpLinear,
    gate: MlpLinear | None = None,
    *,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """fc2(act(fc1(x))), or gated fc2(act(gate(x)) ∘ fc1(x)), differentiable in every tensor but the layers' scales.

    x: (..., in_features), any strides, float32, bfloat16, float16 or (torch backend) float64
    fc1: an `MlpLinear` from in_features to hidden;  gate: None, or another one, as gate_proj beside up_proj is
    fc2: an `MlpLinear` from hidden to out_features; each layer has an update of its own, or none
    activation: "gelu" | "gelu_tanh" | "quick_gelu" (h · σ(1.702 h)) | "silu" | "relu"
    dropout_p: probability of dropping an element before each layer's down, in [0, 1); kept ones are divided by
        1 - dropout_p. Each layer draws a mask of its own. No dropout unless `training`.
    backend: "auto" | "cuda" | "triton" | "torch";  the activation is torch's on all of them
    returns y: (..., out_features) in x's dtype

    Under autocast, x, weights and biases are cast as `torch.nn.functional.linear` would; the factors are not.
    Raises ValueError or TypeError, naming layer and argument, before anything runs; BackendUnavailableError (a
    ValueError) if a backend asked for by name cannot run.
    """
    check_probability("dropout_p", dropout_p)
    check_flag("training", training)
    drops = training and dropout_p > 0
    layers = {"fc1": fc1, "fc2": fc2} if gate is None else {"gate": gate, "fc1": fc1, "fc2": fc2}
    for name, layer in layers.items():
        if not isinstance(layer, MlpLinear):
            raise TypeError(f"{name}: expected an MlpLinear, got {kind_of(layer)}")
    plan = _checked(x, fc1, fc2, gate, activation, backend, drops)
    for name, layer in layers.items():
        check_scale(layer.scale, x, f"{name}: scale")
    layers, dtype = list(layers.values()), plan.dtype
    if dtype is not None:
        x = x.to(dtype)
        layers = [each._replace(weight=each.weight.to(dtype), bias=_cast(each.bias, dtype)) for each in layers]
    if transformed():
        return composed(_composed, x, layers, activation, float(dropout_p) if drops else 0.0)
    dropouts = []
    for (run, count), (layer, *_) in zip(plan.calls, plan.split(layers)):
        rng = None
        if drops and run is not None:
            rng = draw(x, run, dropout_p, layer.weight.shape[1], *[count] * (count > 1))
        dropouts.append(KEEP_ALL if rng is None else Dropout(rng, dropout_p, "input"))
    alone = [count == 1 for _, count in plan.calls for _ in range(count)]
    scales = [_scale(each.scale, x, number) for each, number in zip(layers, alone)]
    tensors = [t for w, *others, _ in layers for t in (w, *map(contiguous, others))]
    return _AdaptedMlp.apply(x, activation, scales, dropouts, plan, *tensors)


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def _scale(scale: float | Tensor, x: Tensor, as_number: bool) -> float | Tensor:
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    if isinstance(scale, Tensor) or not as_number:
        return scale_tensor(scale, wide, x.device)
    return scale if torch.compiler.is_compiling() else float(scale)


def _composed(x: Tensor, layers: list[MlpLinear], activation: str, dropout_p: float) -> Tensor:
    """By differentiable operations alone, none in place."""
    *first, last = layers
    a = activated(activation, *[_composed_linear(x, each, dropout_p) for each in first])
    return _composed_linear(a, last, dropout_p)


def _composed_linear(x: Tensor, layer: MlpLinear, dropout_p: float) -> Tensor:
    weight, bias, down, up, scale = layer
    if down is None:
        return F.linear(x, weight, bias)
    factors = Factors(down, up, None, scale)
    return lowrank_linear_composed(x, weight, bias, factors, dropout_p, "input" if dropout_p else "none")


@remembered
def _checked(
    x: Tensor, fc1: MlpLinear, fc2: MlpLinear, gate: MlpLinear | None, activation: str, backend: str, drops: bool
) -> _Plan:
    """Raises whatever is to be raised about a call, or says how it goes."""
    check_tensor("x", x)
    check_choice("activation", activation, tuple(ACTIVATIONS))
    first = {"fc1": fc1} if gate is None else {"gate": gate, "fc1": fc1}
    for name, layer in first.items():
        _check_layer(name, x, layer)
    if gate is not None and gate.weight.shape != fc1.weight.shape:
        raise ValueError(f"gate: weight: expected {tuple(fc1.weight.shape)}, as fc1, got {tuple(gate.weight.shape)}")
    _check_layer("fc2", x.new_empty(1, fc1.weight.shape[0]), fc2)
    kinds_of = {_kind(layer) for layer in first.values()}
    firsts = list(first.values())
    together = len(firsts) > 1 and len(kinds_of) == 1 and None not in kinds_of
    calls = [firsts, [fc2]] if together else [[each] for each in (*firsts, fc2)]
    dtype = linear_dtype(x) if autocasts(x) else None
    return _Plan(dtype, tuple((_backend(x, call, backend, drops), len(call)) for call in calls))


def _check_layer(name: str, x: Tensor, layer: MlpLinear) -> None:
    """x: what it reads, as far as rows do not matter"""
    try:
        check_tensor("weight", layer.weight)
        x, weight, *_ = check_linear(x, layer.weight, layer.bias, None)
        if weight.shape[1] != x.shape[-1]:
            raise ValueError(f"weight: expected (out_features, {x.shape[-1]}), got {tuple(weight.shape)}")
        if (layer.down is None) != (layer.up is None):
            raise ValueError("down, up: expected both or neither")
        if layer.down is not None:
            check_factors(None, x, weight, layer.down, layer.up)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _kind(layer: MlpLinear) -> tuple | None:
    """Alike for layers whose updates one call takes."""
    return None if layer.down is None else (layer.down.shape[0], layer.down.dtype, layer.up.dtype)


def _backend(x: Tensor, layers: list[MlpLinear], backend: str, drops: bool) -> str | None:
    if layers[0].down is None:
        return None
    width_out, width_in = layers[0].weight.shape
    case = {
        "kind": kinds.linear(width_in, width_out, drops),
        "rank": layers[0].down.shape[0],
        "shape": (x.numel() // x.shape[-1], width_in),
    }
    tensors = [x, *(t for each in layers for t in (each.bias, each.down, each.up))]
    if len(layers) > 1:
        choice = resolve("lowrank_projections", tensors, backend, **case, projections=len(layers))
    else:
        choice = resolve("lowrank_linear", tensors, backend, **case)
    return choice.name if x.numel() else "torch"  # no rows: nothing to launch
