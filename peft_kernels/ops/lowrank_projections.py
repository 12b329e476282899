"""Several low-rank linears of one tensor, as attention's q, k and v: y_j = x W_jᵀ + b_j + s_j · B_j A_j x, in one node.

J weights W_j (N_j, K) read one x (M, K). Their updates have one rank R; each has its own A_j (R, K), or all share one:

    z_j = drop_j(x) A_jᵀ  or, if dropout is on "rank", drop_j(x A_jᵀ)        (M, R), each with a mask of its own
    y_j = x W_jᵀ + b_j + s_j · z_j B_jᵀ

Backward, with G_j = ∂L/∂y_j:

    dB_j = s_j G_jᵀ z_j;   dz_j = s_j G_j B_j;   dA_j = dz_jᵀ drop_j(x);   dx = Σ_j G_j W_j + drop_j(dz_j A_j)

Called one by one, J linears read x 2 J times in thin passes and add J gradients of x; here x is read once each way, and
dx is one sum. An output that nothing used costs the backward nothing.

Cores are multiplied into B_j first: with c_j (R,) B_j becomes B_j diag(c_j), with K_j (R, R) it becomes B_j K_j. That
is exact but for rounding, costs N_j · R multiplications where a core on z would cost M · R, and leaves one z to layers
that share A, as Aurora's do. Kept for the backward: x itself, z, the random seeds. Source: docs/method.md, section 1.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from peft_kernels import kinds
from peft_kernels.autocast import autocast_off, autocasts, linear_dtype
from peft_kernels.backend import requested_by, resolve
from peft_kernels.checks import (
    check_choice,
    check_factors,
    check_flag,
    check_linear,
    check_probability,
    check_scale,
    check_shape,
    check_tensor,
    kind_of,
    refuse_second_derivative,
)
from peft_kernels.operator import Operator, composed
from peft_kernels.ops.lowrank_linear import draw
from peft_kernels.records import KEEP_ALL, Dropout, ProjectionNeeds, Projections
from peft_kernels.remembered import MOST
from peft_kernels.rows import contiguous, rows
from peft_kernels.torch_kernels import lowrank_projections as launchers
from peft_kernels.transforms import in_torch_func, transformed

DROPOUT_PLACES = ("input", "rank")
Scale = float | Tensor
_TENSORS = (Tensor, nn.Parameter)
_PLAIN = (*_TENSORS, type(None))  # what other types hide changes without a sign
lowrank_projections_fwd = Operator(launchers.lowrank_projections_fwd)
lowrank_projections_bwd = Operator(launchers.lowrank_projections_bwd)


def lowrank_projections_reference(
    x, weights, biases, downs, ups, cores=None, *, scales, hidden=None, masks=None, dropout_p=0.0, dropout_on="input"
):
    """The definition, in the precision of its arguments; masks[j] (True = kept) is of the place `dropout_on` names."""
    ys = []
    for j, (weight, bias, up) in enumerate(zip(weights, biases, ups)):
        down = downs if isinstance(downs, Tensor) else downs[j]
        keep = 1.0 if masks is None else masks[j].to(x.dtype) / (1 - dropout_p)
        if hidden is not None:
            z = hidden * keep
        else:
            z = (x * keep) @ down.T if dropout_on == "input" else (x @ down.T) * keep
        if cores is not None:
            z = z * cores[j] if cores[j].dim() == 1 else z @ cores[j].T
        y = x @ weight.T + scales[j] * (z @ up.T)
        ys.append(y if bias is None else y + bias)
    return tuple(ys)


class _Plan(NamedTuple):
    """What the checks of one kind of call came to."""

    backend: str
    dtype: torch.dtype | None  # that autocast asks for
    count: int  # J
    drops: int  # columns of each mask; 0: nothing is dropped
    ready: bool  # nothing has to be cast, copied or reshaped before kernels can take it
    wide_scales: bool  # they are tensors of the dtype that kernels take
    memo: dict | None = None  # where the backend keeps its own: if it is ready, no graph is made and autocast is off


class _LowRankProjections(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, hidden, scales, dropout, plan, *tensors):
        count, needs = plan.count, ctx.needs_input_grad
        weights, biases = tensors[:count], tensors[count : 2 * count]
        downs, ups = tensors[2 * count : -count], tensors[-count:]
        needs_weights, needs_downs = True in needs[_FIRST : _FIRST + count], True in needs[_FIRST + 2 * count : -count]
        z = None if hidden is None else rows(hidden)
        x_rows = rows(x) if plan.memo is None else x if x.ndim == 2 else x.view(-1, x.shape[-1])
        args = x_rows, weights, biases, tuple.__new__(Projections, (downs, ups, scales, z)), dropout
        if plan.memo is None:
            ys = lowrank_projections_fwd(plan.backend, *args)
        else:
            ys = lowrank_projections_fwd.direct(plan.backend, plan.memo, *args)
        if z is None:
            *ys, z = ys
        ctx.save_for_backward(
            x if needs_weights or needs_downs else None,
            z if True in needs[-count:] else None,
            dropout.rng,
            *(weights if needs[0] else (None,) * count),
            *downs,
            *ups,
            *scales,
        )
        ctx.set_materialize_grads(False)
        ctx.x_shape, ctx.z_shape = x.shape, None if hidden is None else hidden.shape
        ctx.dropout, ctx.plan, ctx.begins_backward = dropout[1:], plan, None  # who shares the outputs may set the last
        if x.ndim == 2:
            return tuple(ys)
        leading = x.shape[:-1]
        return tuple([_shaped(y, (*leading, y.shape[1])) for y in ys])

    @staticmethod
    def backward(ctx, *dys):
        if torch.is_grad_enabled():
            refuse_second_derivative("lowrank_projections")
        if ctx.begins_backward is not None:
            ctx.begins_backward()
        x, z, rng, *tensors = ctx.saved_tensors
        plan, count = ctx.plan, ctx.plan.count
        weights, downs, ups, scales = (
            tensors[:count], tensors[count : -2 * count], tensors[-2 * count : -count], tensors[-count:],
        )  # fmt: skip
        needs_x, needs_z, _, _, _, *needed = ctx.needs_input_grad
        needs_weights, needs_biases, needs_downs, needs_ups = _parts(needed, count)
        used = [j for j, dy in enumerate(dys) if dy is not None]
        if not used:
            return (None,) * (_FIRST + len(needed))
        dys, rank = [None if dy is None else rows(dy) for dy in dys], ups[0].shape[1]
        x = None if x is None else rows(x)
        d_weights, d_biases, d_downs, d_ups = ([None] * len(part) for part in _parts(needed, count))
        dx, dz, needs = None, None, ProjectionNeeds(needs_x, True in needs_downs, True in needs_ups, needs_z)
        if True in needs:
            shared = len(downs) == 1
            if len(used) < count:  # what nothing used is left out
                z = z if z is None or z.shape[1] == rank else torch.cat([z.split(rank, 1)[j] for j in used], 1)
                rng = None if rng is None else rng[used]
            chosen = Projections(downs if len(downs) < 2 else _at(downs, used), _at(ups, used), _at(scales, used), z)
            args = (
                _at(dys, used), x if needs.down else None, _at(weights, used) if needs_x else [], chosen,
                KEEP_ALL if rng is None else Dropout(rng, *ctx.dropout), needs,
            )  # fmt: skip
            if plan.memo is None or torch._C._is_any_autocast_enabled():
                dx, d_down, d_up, dz = lowrank_projections_bwd(plan.backend, *args)
            else:
                dx, d_down, d_up, dz = lowrank_projections_bwd.direct(plan.backend, plan.memo, *args)
            if needs.down:
                _spread(d_downs, [0] if shared else used, d_down.split(rank), needs_downs)
            if needs.up:
                _spread(d_ups, used, d_up.split(chosen.widths), needs_ups)
        if True in needs_weights or True in needs_biases:
            with autocast_off(dys[used[0]]):
                for j in used:
                    d_weights[j] = dys[j].t() @ x if needs_weights[j] else None
                    d_biases[j] = dys[j].sum(0) if needs_biases[j] else None
        dx = dx if dx is None or len(ctx.x_shape) == 2 else dx.view(ctx.x_shape)
        dz = dz if dz is None else dz.view(ctx.z_shape)
        return (dx, dz, None, None, None, *d_weights, *d_biases, *d_downs, *d_ups)


_FIRST = 5  # arguments before weights, biases, downs and ups


def _parts(tensors: Sequence, count: int) -> tuple[list, list, list, list]:
    """-> those of weights, biases, downs and ups; there may be one down for all, or none"""
    tensors = list(tensors)
    return tensors[:count], tensors[count : 2 * count], tensors[2 * count : -count], tensors[-count:]


def _at(tensors: list, places: list[int]) -> list:
    return tensors if len(places) == len(tensors) else [tensors[j] for j in places]


def _spread(gradients: list, places: list[int], parts: Sequence[Tensor], needed: list[bool]) -> None:
    for j, part in zip(places, parts):
        gradients[j] = part if needed[j] else None


def lowrank_projections(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor] | Tensor,
    ups: Sequence[Tensor],
    cores: Sequence[Tensor] | None = None,
    *,
    scales: Sequence[Scale] | Scale = 1.0,
    dropout_p: float = 0.0,
    dropout_on: str = "input",
    training: bool = True,
    hidden: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """y_j = x W_jᵀ + b_j + s_j · B_j core_j(A_j x) for J weights, differentiable in every tensor but `scales`.

    x: (..., in_features), any strides, float32, bfloat16, float16 or (torch backend) float64
    weights: J tensors (out_features_j, in_features) in x's dtype; biases: J times (out_features_j,) or None
    downs: J tensors (R, in_features), or one tensor that all share;  ups: J tensors (out_features_j, R); in x's dtype
        or float32, each of the two kinds in one dtype
    cores: None, or J tensors (R,), or J tensors (R, R), which are multiplied into `ups`
    scales: a number or a 0-d tensor on x's device for all, or J of them
    dropout_p: probability of dropping an element, in [0, 1); kept ones are divided by 1 - dropout_p. Each projection
        draws a mask of its own. No dropout unless `training`.
    hidden: x Aᵀ (..., R) from `lowrank_hidden`, for projections that share one tensor `downs` with others still;
        `downs` gets its gradient through it
    dropout_on: "input" (x before A_j, as in PEFT's LoRA) or "rank" (A_j x; with cores (R,) it may as well drop after)
    backend: "auto" | "cuda" | "triton" | "torch"; the kernels of the first two take J up to 4
    returns J tensors y_j: (..., out_features_j) in x's dtype

    Under autocast, x, weights and biases are cast as `torch.nn.functional.linear` would; the factors are not.
    Raises ValueError or TypeError, naming argument and place, before anything runs; BackendUnavailableError (a
    ValueError) if a backend asked for by name cannot run.
    """
    options, shared = (dropout_p, dropout_on, training, backend), type(downs) in _TENSORS
    downs = (downs,) if shared else downs
    scales = scales if type(scales) is tuple else _listed_scales(scales, weights)
    key = plan = None
    if not torch.compiler.is_dynamo_compiling():
        try:
            tensors = hidden, *weights, *biases, *downs, *ups, *(cores or ())
            key = _signature(x, tensors, scales, (len(weights), shared, cores is None), options)
            plan = _plans[key]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            pass  # another kind of call, or an argument that the checks will name
    if plan is None:
        plan = _checked(x, weights, biases, downs, ups, cores, scales, hidden, options)
        if key is not None and all(type(t) in _PLAIN for t in (x, *tensors)):
            if plan.ready and x.device.type != "meta":
                plan = plan._replace(memo={})
            if len(_plans) >= MOST:
                _plans.clear()
            _plans[key] = plan
    if not plan.ready:
        x, hidden, *cast = _cast((x, hidden, *weights, *biases), plan.dtype)
        weights, biases = cast[: plan.count], cast[plan.count :]
        biases, downs, ups = ([contiguous(t) for t in each] for each in (biases, downs, ups))
    if not plan.wide_scales:
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        scales = tuple([scale_tensor(scale, wide, x.device) for scale in scales])
    if cores is not None:
        ups = [_with_core(up, core) for up, core in zip(ups, cores)]
    if plan.memo is None and transformed():
        chosen = Projections(downs, ups, scales, hidden)
        args = x, weights, biases, chosen, float(dropout_p), dropout_on if plan.drops else "none"
        return tuple(composed(launchers.lowrank_projections_composed, *args))
    dropout = KEEP_ALL
    if plan.drops:
        rng = draw(x, plan.backend, dropout_p, plan.drops, plan.count)
        dropout = tuple.__new__(Dropout, (rng, dropout_p, dropout_on))
    apply = _LowRankProjections.apply if plan.memo is None else _apply
    return apply(x, hidden, scales, dropout, plan, *weights, *biases, *(downs if hidden is None else ()), *ups)


_plans: dict[tuple, _Plan] = {}
_shaped = torch.ops.aten._unsafe_view.default._op  # a tensor of its own, as `rows.shaped` says
_apply = super(torch.autograd.Function, _LowRankProjections).apply  # without unwrapping what functorch left


def _listed_scales(scales: object, weights: object) -> tuple:
    if isinstance(scales, list):
        return tuple(scales)
    return (scales,) * (len(weights) if isinstance(weights, list | tuple) else 1)


def _cast(tensors: Sequence[Tensor | None], dtype: torch.dtype | None) -> list[Tensor | None]:
    return [t if t is None or dtype is None else t.to(dtype) for t in tensors]


def _with_core(up: Tensor, core: Tensor) -> Tensor:
    """B diag(c) or B K, in float32 where they are half precision: it becomes half once, in the kernels."""
    if up.dtype is not core.dtype or up.dtype in (torch.bfloat16, torch.float16):
        up, core = up.float(), core.float()
    if core.ndim == 1:
        return up * core
    with autocast_off(up):
        return up @ core


def scale_tensor(scale: Scale, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(scale, Tensor):
        return scale.to(dtype)
    if torch.compiler.is_compiling():
        return torch.full((), scale, dtype=dtype, device=device)
    return _constant(float(scale), dtype, device)


@functools.lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _constant(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), number, dtype=dtype, device=device)


def _signature(x: Tensor, tensors: tuple, scales: tuple, counts: tuple, options: tuple) -> tuple:
    """All that the checks of a call, and the choice of its backend, look at: calls with the same one go the same way.

    Raises for what is no tensor, and for what cannot be in a key.
    """
    dropout_p, dropout_on, training, backend = options
    if in_torch_func() or forward_ad._current_level >= 0:  # `transformed()`, without a call in each warm one
        raise TypeError("a transform's tensors")
    return (
        type(x), x.dtype, x.device, x.layout, x.shape[-1], 0 in x.shape, counts,
        all(map(Tensor.is_contiguous, [t for t in (x, *tensors) if t is not None])),
        linear_dtype(x) if torch._C._is_any_autocast_enabled() else None,
        *[None if t is None else (type(t), t.dtype, t.device, t.layout, t.shape) for t in tensors],
        *[
            (type(s), s.dtype, s.device, s.layout, s.ndim, s.requires_grad) if type(s) in _TENSORS else (type(s), s)
            for s in scales
        ],
        type(dropout_p), dropout_p, dropout_on, not training,
        backend if backend != "auto" else requested_by(backend),
    )  # fmt: skip


def _checked(x, weights, biases, downs, ups, cores, scales, hidden, options: tuple) -> _Plan:
    """Raises whatever is to be raised about a call, or says how it goes."""
    dropout_p, dropout_on, training, backend = options
    check_tensor("x", x)
    lists = {"weights": weights, "biases": biases, "downs": downs, "ups": ups, "scales": scales, "cores": cores}
    for name, entries in lists.items():
        if entries is None and name == "cores":
            continue
        if not isinstance(entries, list | tuple):
            one = " or one Tensor for all" * (name in ("downs", "scales"))
            raise TypeError(f"{name}: expected a list with an entry for each projection{one}, got {kind_of(entries)}")
    counts = {name: len(entries) for name, entries in lists.items() if entries is not None}
    if len({*counts.values()} - ({1} if counts["downs"] == 1 else set())) > 1 or 0 in counts.values():
        found = ", ".join(map(str, counts.values()))
        raise ValueError(f"{', '.join(counts)}: expected as many entries of each (downs: or one), got {found}")
    count = len(weights)
    given = x
    for j, (weight, bias, up, scale) in enumerate(zip(weights, biases, ups, scales)):
        down, core = downs[j if len(downs) > 1 else 0], None if cores is None else cores[j]
        try:
            check_tensor("weight", weight)
            x, weight, _, _ = check_linear(given, weight, bias, hidden)
            if isinstance(core, Tensor) and core.dim() > 2:
                raise ValueError(f"core: expected (R,) or (R, R), got {tuple(core.shape)}")
            check_factors(core, x, weight, down, up)
            check_scale(scale, x)
        except (TypeError, ValueError) as error:
            name, _, problem = str(error).partition(":")
            place = f"downs[{j}]" if len(downs) > 1 else "downs"
            places = {"weight": f"weights[{j}]", "bias": f"biases[{j}]", "down": place, "up": f"ups[{j}]"}
            places |= {"core": f"cores[{j}]", "scale": f"scales[{j}]"}
            raise type(error)(f"{places.get(name, name)}:{problem}") from None
    for name, factors in (("downs", downs), ("ups", ups)):
        if len(kinds_of := {(t.dtype, t.shape[1 if name == "ups" else 0]) for t in factors}) > 1:
            raise ValueError(f"{name}: expected one dtype and one rank, got {sorted(map(str, kinds_of))}")
    check_probability("dropout_p", dropout_p)
    check_choice("dropout_on", dropout_on, DROPOUT_PLACES)
    check_flag("training", training)
    rank, drops = ups[0].shape[1], training and dropout_p > 0
    if hidden is not None:
        if len(downs) > 1:
            raise ValueError("hidden: serves projections that share one tensor `downs`, got several")
        if dropout_p > 0 and dropout_on == "input":
            raise ValueError('hidden: cannot be combined with dropout_on="input", which drops x before down')
        check_shape("hidden", hidden, (*x.shape[:-1], rank), "(..., R)")
    kind = kinds.linear(x.shape[-1], max(up.shape[0] for up in ups), drops)
    shape = (x.numel() // x.shape[-1], x.shape[-1])
    case = {"kind": kind, "rank": rank, "shape": shape, "projections": count}
    choice = resolve("lowrank_projections", (x, *biases, *downs, *ups), backend, **case)
    run = choice.name if x.numel() else "torch"  # no rows: nothing to launch
    columns = x.shape[-1] if dropout_on == "input" else rank
    dtype, wide = linear_dtype(given) if autocasts(given) else None, torch.promote_types(x.dtype, torch.float32)
    tensors = (given, hidden, *biases, *downs, *ups)
    ready = dtype is None and all(t is None or t.is_contiguous() for t in tensors)
    wide_scales = all(isinstance(s, Tensor) and s.dtype is wide for s in scales)
    return _Plan(run, dtype, count, columns if drops else 0, ready, wide_scales)
