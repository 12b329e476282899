"""A frozen linear layer with a low-rank update: y = x Wᵀ + b + s · B core(A x), forward and backward, in thin passes.

The weight's update consists of O × I blocks that share one A and one B (docs/method.md, section 1):

    ΔW[o, i] = s · B · diag(c[o, i]) · A    or    s · B · K[o, i] · A    or, without a core and O = I = 1,  s · B · A

    z_i = drop(x_i) Aᵀ            (M, I·R)    x_i: the i-th block of x's columns;  drop only where dropout_on says
    S_o = drop(Σ_i drop(z_i) ∘ c[o, i])       or  Σ_i z_i K[o, i]ᵀ    (M, O·R)
    y_o = x W_oᵀ + b_o + s · S_o Bᵀ

Backward, with G = ∂L/∂y:

    dB = s Σ_o G_oᵀ S_o;   dS_o = s G_o B;   dc[o, i] = Σ_rows dS_o ∘ z_i   or   dK[o, i] = dS_oᵀ z_i
    dz_i = Σ_o dS_o ∘ c[o, i]   or   Σ_o dS_o K[o, i];   dA = Σ_i dz_iᵀ drop(x_i);   dx_i = G W[:, i] + dz_i A

Kept for the backward: x itself (not a copy; or what it is made of, peft_kernels/recomputed.py), z, and the random seed.
Uses: LoRA (arXiv 2106.09685), MoIL's adapters (doi 10.1109/TPAMI.2024.3435790), Aurora's mode approximation
(arXiv 2305.08381), LoRA-XS (arXiv 2405.17604).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from peft_kernels import kinds
from peft_kernels.autocast import autocast_off, autocasts, linear_dtype
from peft_kernels.backend import requested_by, resolve
from peft_kernels.checks import (
    check_choice,
    check_factor,
    check_factors,
    check_flag,
    check_integer,
    check_linear,
    check_probability,
    check_scale,
    check_shape,
    check_tensor,
    refuse_second_derivative,
)
from peft_kernels.operator import Operator, composed
from peft_kernels.quantized import QuantizedWeight, dense
from peft_kernels.recomputed import made, recipe_of
from peft_kernels.records import KEEP_ALL, Dropout, Factors, Needs
from peft_kernels.remembered import MOST, remembered
from peft_kernels.rows import contiguous, rows, shaped
from peft_kernels.torch_kernels import lowrank_linear as launchers
from peft_kernels.transforms import in_torch_func, transformed

DROPOUT_PLACES = ("input", "rank", "core")
DESIGNS = (None, "passes", "fused")
lowrank_linear_fwd = Operator(launchers.lowrank_linear_fwd)
lowrank_linear_bwd = Operator(launchers.lowrank_linear_bwd)
lowrank_hidden_fwd = Operator(launchers.lowrank_hidden_fwd)
lowrank_hidden_bwd = Operator(launchers.lowrank_hidden_bwd)


def lowrank_linear_reference(
    x, weight, bias, down, up, core=None, *, scale=1.0, hidden=None, mask=None, dropout_p=0.0, dropout_on="input"
):
    """The definition, in the precision of its arguments; `mask` (True = kept) is of the place `dropout_on` names."""
    if core is None or core.dim() < 3:
        core = (x.new_ones(up.shape[1]) if core is None else core)[None, None]
    core = torch.diag_embed(core) if core.dim() == 3 else core
    out_blocks, in_blocks, rank, _ = core.shape
    drop = dict.fromkeys(DROPOUT_PLACES, 1.0)
    if mask is not None:
        drop[dropout_on] = mask.to(x.dtype) / (1 - dropout_p)
    blocks = (x * drop["input"]).unflatten(-1, (in_blocks, -1))
    z = torch.einsum("...ik,rk->...ir", blocks, down).flatten(-2) if hidden is None else hidden
    z = (z * drop["rank"]).unflatten(-1, (in_blocks, rank))
    expanded = torch.einsum("oiab,...ib->...oa", core, z).flatten(-2) * drop["core"]
    update = torch.einsum("...oa,na->...on", expanded.unflatten(-1, (out_blocks, rank)), up).flatten(-2)
    return F.linear(x, weight, bias) + scale * update


class _Plan(NamedTuple):
    """What the checks of one kind of call came to."""

    backend: str
    design: str | None
    dtype: torch.dtype | None  # that autocast asks for
    drops: int  # columns of the mask; 0: nothing is dropped
    ready: bool  # nothing has to be cast, copied or reshaped before kernels can take it
    memo: dict | None = None  # where the backend keeps its own: if no graph is made, autocast is off, x contiguous


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, up, core, scale, z, dropout, plan, recipe):
        needs_x, needs_weight, _, needs_down, needs_up, needs_core, *_ = ctx.needs_input_grad
        factors = Factors(None if z is not None else down, up, core, scale, z)
        if z is not None and (z.ndim != 2 or not z.is_contiguous()):
            plan = plan if z.is_contiguous() else plan._replace(memo=None)  # nor in the backward, which reads z, too
            factors = factors._replace(z=rows(z))
        backend, memo = plan.backend, plan.memo
        if memo is None:
            stored = dense(weight, x.dtype)
            y, own_z = lowrank_linear_fwd(backend, rows(x), stored, bias, factors, dropout, plan.design)
        else:
            stored, x_rows = weight, x if x.ndim == 2 else rows(x)
            y, own_z = lowrank_linear_fwd.direct(backend, memo, x_rows, weight, bias, factors, dropout, plan.design)
        is_number, is_stored = type(scale) is float, stored is weight
        keeps_x = needs_weight or (needs_down and z is None)
        ctx.make_x, made_of = (None, ()) if recipe is None or not keeps_x else recipe
        ctx.save_for_backward(
            x if keeps_x and ctx.make_x is None else None,
            weight if needs_x and is_stored else None,
            factors.down,
            up,
            core,
            None if is_number else scale,
            (own_z if z is None else z) if needs_up or needs_core else None,
            dropout.rng,
            *made_of,
        )
        ctx.scale, ctx.quantized = scale if is_number else None, None if is_stored else weight
        ctx.x_shape, ctx.z_shape = x.shape, None if z is None else z.shape
        ctx.dropout, ctx.plan = dropout[1:], plan
        return y if x.ndim == 2 else shaped(y, *x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():
            refuse_second_derivative("lowrank_linear")
        x, weight, down, up, core, scale, z, rng, *made_of = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_down, needs_up, needs_core, _, needs_z, *_ = ctx.needs_input_grad
        needs = Needs(needs_x, needs_down and down is not None, needs_up, needs_core, needs_z)
        plan, dy = ctx.plan, rows(dy)
        if needs_x and ctx.quantized is not None:
            weight = dense(ctx.quantized, dy.dtype)
        if made_of:
            x = made(ctx.make_x, made_of)
        if x is not None and (plan.memo is None or x.ndim != 2):
            x = rows(x)
        dx = d_down = d_up = d_core = d_z = d_weight = d_bias = None
        if True in needs:
            z = z if z is None or ctx.z_shape is None else rows(z)
            factors = Factors(down, up, core, ctx.scale if scale is None else scale, z)
            dropout, own_x = KEEP_ALL if rng is None else Dropout(rng, *ctx.dropout), x if needs.down else None
            if plan.memo is None or torch._C._is_any_autocast_enabled():
                grads = lowrank_linear_bwd(plan.backend, dy, own_x, weight, factors, dropout, needs)
            else:
                grads = lowrank_linear_bwd.direct(plan.backend, plan.memo, dy, own_x, weight, factors, dropout, needs)
            dx, d_down, d_up, d_core, d_z = grads
        if needs_weight or needs_bias:
            with autocast_off(dy):
                d_weight = dy.t() @ x if needs_weight else None
                d_bias = dy.sum(0) if needs_bias else None
        dx = dx if dx is None or len(ctx.x_shape) == 2 else dx.view(ctx.x_shape)
        d_z = None if d_z is None else d_z.view(ctx.z_shape)
        return dx, d_weight, d_bias, d_down, d_up, d_core, None, d_z, None, None, None


class _LowRankHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, down, input_blocks, backend):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, down)
        ctx.x_shape, ctx.backend = x.shape, backend
        z = lowrank_hidden_fwd(backend, rows(x), down, input_blocks)
        return shaped(z, *x.shape[:-1], z.shape[-1])

    @staticmethod
    def backward(ctx, dz):
        refuse_second_derivative("lowrank_hidden")
        x, down = ctx.saved_tensors
        x = None if x is None else rows(x)
        dx, d_down = lowrank_hidden_bwd(ctx.backend, rows(dz), x, down, ctx.needs_input_grad[:2])
        return None if dx is None else dx.view(ctx.x_shape), d_down, None, None


def draw(x: Tensor, backend: str, dropout_p: float, mask_columns: int, *calls: int) -> Tensor:
    """This call's randomness, from torch's generator: a keep-mask (rows, columns) for torch, or (seed, offset).

    calls: their number, where one stands for several; it is the first dimension, and each draws as if it were alone
    """
    if backend == "torch":
        rows = x.numel() // x.shape[-1]
        if torch.compiler.is_compiling():  # Dynamo cannot trace random_
            return torch.empty(*calls, rows, mask_columns, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout_p)
        # Four elements from each 64-bit word, as in the kernels; bernoulli_ takes a CPU about 3 times as long
        size = rows * mask_columns
        words = torch.empty(*calls, -(-size // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        bits = words.view(torch.int16)[..., :size].view(*calls, rows, mask_columns)
        return bits >= min(round(dropout_p * 65536), 65535) - 32768
    return torch.randint(2**62, (*calls, 2), dtype=torch.int64, device=x.device)


def lowrank_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    core: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    dropout_on: str = "input",
    training: bool = True,
    hidden: Tensor | None = None,
    backend: str = "auto",
    design: str | None = None,
    recompute: bool = False,
) -> Tensor:
    """y = x Wᵀ + b + scale · (the low-rank update of x), differentiable in every tensor but `scale`.

    x: (..., in_features), any strides, float32, bfloat16, float16 or (torch backend) float64
    weight: (out_features, in_features) in x's dtype, or an object with `.dequantize(dtype) -> Tensor` and `.shape`
    bias: (out_features,) or None
    down: (R, in_features / I);  up: (out_features / O, R);  each in x's dtype, or float32
    core: None | (R,) | (R, R) with O = I = 1 | (O, I, R) | (O, I, R, R), in x's dtype or float32
    scale: a number, or a 0-d tensor on x's device (a changed value then recompiles nothing)
    dropout_p: probability of dropping an element, in [0, 1); kept ones are divided by 1 - dropout_p. Masks are
        drawn with it rounded to a multiple of 2⁻¹⁶. No dropout unless `training`.
    dropout_on: "input" (x before A, as in PEFT's LoRA), "rank" (z) or "core" (S, a mask per output block)
    hidden: z (..., I·R) from `lowrank_hidden`, computed once for several calls; `down` gets its gradient through it
    backend: "auto" | "cuda" | "triton" | "torch";  design: None (chosen by shape) | "passes" | "fused" (triton)
    recompute: where x is an activation's result (GELU, SiLU, or a product, as in gated MLPs), may the backward make it
        anew from what autograd keeps for the activation, instead of keeping x, too? No bit of any gradient changes.
    returns y: (..., out_features) in x's dtype

    Under autocast, x, weight, bias and hidden are cast as `torch.nn.functional.linear` would; the factors are not.
    Masks follow torch.manual_seed and differ between backends and between eager and compiled runs.
    Raises ValueError or TypeError, naming the argument, before anything runs; BackendUnavailableError (a ValueError)
    if a backend asked for by name cannot run.
    """
    options = dropout_p, dropout_on, training, backend, design
    key = plan = None
    if not torch.compiler.is_dynamo_compiling():
        try:
            key = _signature(x, weight, bias, down, up, core, scale, hidden, options)
            plan = _plans[key]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            pass  # another kind of call, or an argument that the checks will name
    if plan is None:
        plan = _checked(x, weight, bias, down, up, core, scale, hidden, options)
        if key is not None and _PLAIN.issuperset(key[:7]) and (key[7] in _PLAIN or not isinstance(scale, Tensor)):
            if plan.ready and x.is_contiguous() and x.device.type != "meta":
                plan = plan._replace(memo={})
            if len(_plans) >= MOST:
                _plans.clear()
            _plans[key] = plan
    if type(scale) is float and not -_MOST <= scale <= _MOST:
        check_scale(scale, x)
    if not plan.ready:
        x, weight = _cast(x, plan.dtype), _cast(weight, plan.dtype)
        bias, hidden = _cast(bias, plan.dtype), _cast(hidden, plan.dtype)
        core = core[None, None] if core is not None and core.dim() < 3 else core
        bias, up, core = contiguous(bias), up.contiguous(), contiguous(core)
        down = down.contiguous() if hidden is None else down
        if isinstance(scale, Tensor):
            scale = scale if plan.backend == "torch" else scale.to(torch.float32)
        elif not torch.compiler.is_compiling():
            check_scale(scale, x)
            scale = float(scale)
    if plan.memo is None and transformed():
        factors, on = Factors(down, up, core, scale, hidden), dropout_on if plan.drops else "none"
        weight = dense(weight, x.dtype)
        return composed(launchers.lowrank_linear_composed, x, weight, bias, factors, float(dropout_p), on)
    dropout = KEEP_ALL
    if plan.drops:
        dropout = tuple.__new__(Dropout, (draw(x, plan.backend, dropout_p, plan.drops), dropout_p, dropout_on))
    apply = _LowRankLinear.apply if plan.memo is None else _apply
    down = down if hidden is None else down.detach()
    recipe = recipe_of(x) if recompute and key is not None and x.grad_fn is not None else None  # no key: in a graph
    return apply(x, weight, bias, down, up, core, scale, hidden, dropout, plan, recipe)


_plans: dict[tuple, _Plan] = {}
_TENSORS = (Tensor, nn.Parameter)
_PLAIN = frozenset((*_TENSORS, type(None)))  # what other types hide changes without a sign
_MOST = torch.finfo(torch.float32).max  # a number beyond is looked at again
_apply = super(torch.autograd.Function, _LowRankLinear).apply  # without unwrapping what functorch left


def _cast(t: Tensor | QuantizedWeight | None, dtype: torch.dtype | None) -> Tensor | QuantizedWeight | None:
    return t.to(dtype) if dtype is not None and isinstance(t, Tensor) else t


def _signature(x, weight, bias, down, up, core, scale, hidden, options: tuple) -> tuple:
    """All that the checks of a call, and the choice of its backend, look at: calls with the same one go the same way.

    Raises for what is no tensor, and for what cannot be in a key.
    """
    dropout_p, dropout_on, training, backend, design = options
    if in_torch_func() or forward_ad._current_level >= 0:  # `transformed()`, without a call in each warm one
        raise TypeError("a transform's tensors")
    shape, device = x.shape, x.device
    factors = (down, up) if bias is None else (bias, down, up)
    factors = factors if core is None else (*factors, core)
    return (
        type(x), type(weight), type(bias), type(down), type(up), type(core), type(hidden), type(scale), type(dropout_p),
        x.dtype, device, x.layout, shape[-1], 0 in shape, x.is_contiguous(),
        linear_dtype(x) if torch._C._is_any_autocast_enabled() else None,
        weight.dtype, weight.device == device, weight.layout, weight.shape,
        None if bias is None else (bias.dtype, bias.device == device, bias.layout, bias.shape),
        down.dtype, down.device == device, down.layout, down.shape,
        up.dtype, up.device == device, up.layout, up.shape,
        None if core is None else (core.dtype, core.device == device, core.layout, core.shape),
        None if hidden is None else (hidden.dtype, hidden.device == device, hidden.layout, hidden.shape[-1],
                                     hidden.shape[:-1] == shape[:-1]),
        (scale.dtype, scale.device == device, scale.layout, scale.ndim, scale.requires_grad)
        if type(scale) in _TENSORS else None,
        all(map(Tensor.is_contiguous, factors)),
        dropout_p, dropout_on, not training, design, backend if backend != "auto" else requested_by(backend),
    )  # fmt: skip


def _checked(x, weight, bias, down, up, core, scale, hidden, options: tuple) -> _Plan:
    """Raises whatever is to be raised about a call, or says how it goes."""
    dropout_p, dropout_on, training, backend, design = options
    check_tensor("x", x)
    dtype, own_core, quantized = linear_dtype(x) if autocasts(x) else None, core, not isinstance(weight, Tensor)
    x, weight, bias, hidden = check_linear(x, weight, bias, hidden)
    core = check_factors(core, x, weight, down, up)
    check_scale(scale, x)
    check_probability("dropout_p", dropout_p)
    check_choice("dropout_on", dropout_on, DROPOUT_PLACES)
    check_choice("design", design, DESIGNS)
    check_flag("training", training)
    rank, blocks = up.shape[1], (weight.shape[0] // up.shape[0], weight.shape[1] // down.shape[1])
    if hidden is not None:
        if dropout_p > 0 and dropout_on == "input":
            raise ValueError('hidden: cannot be combined with dropout_on="input", which drops x before down')
        check_shape("hidden", hidden, (*x.shape[:-1], blocks[1] * rank), "(..., input blocks · R)")
    drops = training and dropout_p > 0
    kind = kinds.linear(weight.shape[1], weight.shape[0], drops)
    shape = (x.numel() // x.shape[-1], x.shape[-1])
    tensors = (x, bias, down, up, core, hidden)
    choice = resolve("lowrank_linear", tensors, backend, kind=kind, rank=rank, blocks=blocks, shape=shape)
    if design == "fused" and hidden is not None:
        raise ValueError("design: 'fused' computes x Aᵀ itself and takes no hidden")
    if design is not None and (choice.name == "torch" or (choice.name == "cuda" and design != "passes")):
        raise ValueError(f"design: {design!r} does not exist on backend {choice.name!r} ({choice.reason})")
    run = choice.name if x.numel() else "torch"  # no rows: nothing to launch
    columns = {"input": x.shape[-1], "rank": blocks[1] * rank, "core": blocks[0] * rank}[dropout_on]
    ready = dtype is None and core is own_core and not quantized
    ready = ready and all(t is None or t.is_contiguous() for t in (bias, down, up, core))
    if isinstance(scale, Tensor):
        ready = ready and (run == "torch" or scale.dtype == torch.float32)
    else:
        ready = ready and type(scale) is float
    return _Plan(run, design if run == "triton" else None, dtype, columns if drops else 0, ready)


def lowrank_hidden(x: Tensor, down: Tensor, input_blocks: int = 1, backend: str = "auto") -> Tensor:
    """z = x Aᵀ per input block, differentiable: computed once, it serves every `lowrank_linear` that shares x and A.

    x: (..., in_features);  down: (R, in_features / input_blocks) in x's dtype or float32
    backend: "auto" | "cuda" | "triton" | "torch"
    returns z: (..., input_blocks · R) in x's dtype, for `lowrank_linear(..., hidden=z)`
    Raises ValueError or TypeError, naming the argument, before anything runs.
    """
    name, dtype = _checked_hidden(x, down, input_blocks, backend)
    x = x if x.dtype is dtype else x.to(dtype)
    if name is None:
        return composed(launchers.lowrank_hidden_composed, x, down, input_blocks)
    return _LowRankHidden.apply(x, down.contiguous(), input_blocks, name)


@remembered
def _checked_hidden(x: Tensor, down: Tensor, input_blocks: int, backend: str) -> tuple[str | None, torch.dtype]:
    """-> the backend's name, None inside transforms, and the dtype that x is computed in"""
    check_tensor("x", x)
    dtype = linear_dtype(x)
    check_factor("down", down, x.to(dtype))
    check_integer("input_blocks", input_blocks)
    if down.dim() != 2 or 0 in down.shape or x.dim() == 0 or down.shape[1] * input_blocks != x.shape[-1]:
        raise ValueError(
            f"down: expected (R, in_features / input_blocks) with R ≥ 1 for x {tuple(x.shape)} and "
            f"input_blocks {input_blocks}, got {tuple(down.shape)}"
        )
    case = {"rank": down.shape[0], "blocks": (1, input_blocks), "shape": (x.numel() // x.shape[-1], x.shape[-1])}
    choice = resolve("lowrank_hidden", (x.to(dtype), down), backend, **case)
    name = choice.name if x.numel() else "torch"
    return None if transformed() else name, dtype
