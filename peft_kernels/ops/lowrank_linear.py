"""A frozen linear layer with a low-rank update: y = x Wᵀ + b + s · B core(A x), forward and backward, in thin passes.

The weight's update consists of O × I blocks that share one A and one B (docs/method.md, section 1):

    ΔW[o, i] = s · B · diag(c[o, i]) · A    or    s · B · K[o, i] · A    or, without a core and O = I = 1,  s · B · A

    z_i = drop(x_i) Aᵀ            (M, I·R)    x_i: the i-th block of x's columns;  drop only where dropout_on says
    S_o = drop(Σ_i drop(z_i) ∘ c[o, i])       or  Σ_i z_i K[o, i]ᵀ    (M, O·R)
    y_o = x W_oᵀ + b_o + s · S_o Bᵀ

Backward, with G = ∂L/∂y:

    dB = s Σ_o G_oᵀ S_o;   dS_o = s G_o B;   dc[o, i] = Σ_rows dS_o ∘ z_i   or   dK[o, i] = dS_oᵀ z_i
    dz_i = Σ_o dS_o ∘ c[o, i]   or   Σ_o dS_o K[o, i];   dA = Σ_i dz_iᵀ drop(x_i);   dx_i = G W[:, i] + dz_i A

Kept for the backward: x itself (not a copy), z, and the random seed. Uses: LoRA (arXiv 2106.09685), MoIL's adapters
(doi 10.1109/TPAMI.2024.3435790), Aurora's mode approximation (arXiv 2305.08381), LoRA-XS (arXiv 2405.17604).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels import kinds
from peft_kernels.backend import resolve
from peft_kernels.checks import (
    autocast_off,
    check_choice,
    check_factor,
    check_factors,
    check_linear,
    check_probability,
    check_scale,
    check_shape,
    check_tensor,
    linear_dtype,
)
from peft_kernels.dispatch import lowrank_linear as dispatch
from peft_kernels.ops._frozen import QuantizedWeight, contiguous, dense, refuse_second_derivative, rows, shaped

DROPOUT_PLACES = ("input", "rank", "core")
DESIGNS = (None, "D1", "D3")


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


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, up, core, scale, hidden, rng, dropout_p, dropout_on, design, backend):
        needs_x, needs_weight, _, needs_down, needs_up, needs_core = ctx.needs_input_grad[:6]
        hidden_rows = None if hidden is None else rows(hidden)
        args = (rows(x), dense(weight, x.dtype), bias, down, up, core, scale, hidden_rows, rng)
        y, z = dispatch.lowrank_linear_fwd(backend, *args, dropout_p, dropout_on, design)
        ctx.save_for_backward(
            x if needs_weight or (needs_down and hidden is None) else None,
            weight if needs_x and isinstance(weight, Tensor) else None,
            down if hidden is None else None,
            up,
            core,
            scale if isinstance(scale, Tensor) else None,
            (z if hidden is None else hidden) if needs_up or needs_core else None,
            rng,
        )
        ctx.scale = None if isinstance(scale, Tensor) else scale
        ctx.quantized = None if isinstance(weight, Tensor) else weight
        ctx.x_shape, ctx.hidden_shape = x.shape, None if hidden is None else hidden.shape
        ctx.settings = (dropout_p, dropout_on, design, backend)
        return shaped(y, *x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivative("lowrank_linear")
        x, weight, down, up, core, scale, z, rng = ctx.saved_tensors
        dropout_p, dropout_on, design, backend = ctx.settings
        needs_x, needs_weight, needs_bias, needs_down, needs_up, needs_core, _, needs_hidden = ctx.needs_input_grad[:8]
        needs = (needs_x, needs_down and down is not None, needs_up, needs_core, needs_hidden)
        if needs_x and ctx.quantized is not None:
            weight = dense(ctx.quantized, dy.dtype)
        scale = ctx.scale if scale is None else scale
        dy = rows(dy)
        x = None if x is None else rows(x)
        args = (dy, x if needs[1] else None, weight, down, up, core, scale, None if z is None else rows(z), rng)
        grads = dispatch.lowrank_linear_bwd(backend, *args, dropout_p, dropout_on, needs, design)
        dx, d_down, d_up, d_core, d_hidden = grads
        dx = None if dx is None else dx.view(ctx.x_shape)
        with autocast_off(dy):
            d_weight = dy.t() @ x if needs_weight else None
            d_bias = dy.sum(0) if needs_bias else None
        d_hidden = None if d_hidden is None else d_hidden.view(ctx.hidden_shape)
        return dx, d_weight, d_bias, d_down, d_up, d_core, None, d_hidden, None, None, None, None, None


class _LowRankHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, down, input_blocks, backend):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, down)
        ctx.x_shape, ctx.backend = x.shape, backend
        z = dispatch.lowrank_hidden_fwd(backend, rows(x), down, input_blocks)
        return shaped(z, *x.shape[:-1], z.shape[-1])

    @staticmethod
    def backward(ctx, dz):
        refuse_second_derivative("lowrank_hidden")
        x, down = ctx.saved_tensors
        x = None if x is None else rows(x)
        dx, d_down = dispatch.lowrank_hidden_bwd(ctx.backend, rows(dz), x, down, ctx.needs_input_grad[:2])
        return None if dx is None else dx.view(ctx.x_shape), d_down, None, None


def _draw(x: Tensor, backend: str, dropout_p: float, mask_columns: int) -> Tensor:
    """This call's randomness, from torch's generator: a keep-mask (rows, columns) for torch, or (seed, offset)."""
    if backend == "torch":
        rows = x.numel() // x.shape[-1]
        if torch.compiler.is_compiling():  # Dynamo cannot trace random_
            return torch.empty(rows, mask_columns, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout_p)
        # Four elements from each 64-bit word, as in the kernels; bernoulli_ takes a CPU about 3 times as long
        size = rows * mask_columns
        words = torch.empty(-(-size // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        bits = words.view(torch.int16)[:size].view(rows, mask_columns)
        return bits >= min(round(dropout_p * 65536), 65535) - 32768
    return torch.randint(2**62, (2,), dtype=torch.int64, device=x.device)


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
    backend: "auto" | "cuda" | "triton" | "torch";  design: None (chosen by shape) | "D1" | "D3" (triton)
    returns y: (..., out_features) in x's dtype

    Under autocast, x, weight, bias and hidden are cast as `torch.nn.functional.linear` would; the factors are not.
    Masks follow torch.manual_seed and differ between backends and between eager and compiled runs.
    Raises ValueError or TypeError, naming the argument, before anything runs; BackendUnavailableError (a ValueError)
    if a backend asked for by name cannot run.
    """
    x, weight, bias, hidden = check_linear(x, weight, bias, hidden)
    core = check_factors(core, x, weight, down, up)
    check_scale(scale, x)
    check_probability("dropout_p", dropout_p)
    check_choice("dropout_on", dropout_on, DROPOUT_PLACES)
    check_choice("design", design, DESIGNS)
    rank, out_blocks, in_blocks = up.shape[1], weight.shape[0] // up.shape[0], weight.shape[1] // down.shape[1]
    if hidden is not None:
        if dropout_p > 0 and dropout_on == "input":
            raise ValueError('hidden: cannot be combined with dropout_on="input", which drops x before down')
        check_shape("hidden", hidden, (*x.shape[:-1], in_blocks * rank), "(..., input blocks · R)")
    drops = training and dropout_p > 0
    kind = kinds.linear(weight.shape[1], weight.shape[0], drops)
    choice = resolve("lowrank_linear", (x, bias, down, up, core, hidden), backend, rank=rank, kind=kind)
    if design == "D3" and hidden is not None:
        raise ValueError("design: 'D3' computes x Aᵀ itself and takes no hidden")
    if design is not None and (choice.name == "torch" or (choice.name == "cuda" and design != "D1")):
        raise ValueError(f"design: {design!r} does not exist on backend {choice.name!r} ({choice.reason})")
    run = choice.name if x.numel() else "torch"  # no rows: nothing to launch
    if run != "torch" and isinstance(scale, Tensor):
        scale = scale.to(torch.float32)
    rng = None
    if drops:
        columns = {"input": x.shape[-1], "rank": in_blocks * rank, "core": out_blocks * rank}[dropout_on]
        rng = _draw(x, run, dropout_p, columns)
    return _LowRankLinear.apply(
        x, weight, contiguous(bias), down.contiguous() if hidden is None else down.detach(), up.contiguous(),
        contiguous(core), scale, hidden, rng, dropout_p, dropout_on, design if run == "triton" else None, run,
    )  # fmt: skip


def lowrank_hidden(x: Tensor, down: Tensor, input_blocks: int = 1, backend: str = "auto") -> Tensor:
    """z = x Aᵀ per input block, differentiable: computed once, it serves every `lowrank_linear` that shares x and A.

    x: (..., in_features);  down: (R, in_features / input_blocks) in x's dtype or float32
    backend: "auto" | "cuda" | "triton" | "torch"
    returns z: (..., input_blocks · R) in x's dtype, for `lowrank_linear(..., hidden=z)`
    Raises ValueError or TypeError, naming the argument, before anything runs.
    """
    check_tensor("x", x)
    x = x.to(linear_dtype(x))
    check_factor("down", down, x)
    if isinstance(input_blocks, bool) or not isinstance(input_blocks, int) or input_blocks < 1:
        raise ValueError(f"input_blocks: expected an integer ≥ 1, got {input_blocks!r}")
    if down.dim() != 2 or 0 in down.shape or x.dim() == 0 or down.shape[1] * input_blocks != x.shape[-1]:
        raise ValueError(
            f"down: expected (R, in_features / input_blocks) with R ≥ 1 for x {tuple(x.shape)} and "
            f"input_blocks {input_blocks}, got {tuple(down.shape)}"
        )
    choice = resolve("lowrank_hidden", (x, down), backend, rank=down.shape[0])
    return _LowRankHidden.apply(x, down.contiguous(), input_blocks, choice.name if x.numel() else "torch")
