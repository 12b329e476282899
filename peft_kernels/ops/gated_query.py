"""Aurora's gated query transformation: a text layer's output takes up what its attention blocks gave, by learned gates.

Two readings. All vectors γ, β, … are (d,); Σ without an index is over all rows, that is positions of sequences.

"additive", the authors' released code: h the FFN's output, a_s and a_c those of self- and cross-attention, s the scale:

    out = h + s (a_s ∘ γ + β) + s (a_c ∘ γ_c + β_c)
    dh = G,  da_s = s G ∘ γ,  da_c = s G ∘ γ_c,  dγ = s Σ G ∘ a_s,  dγ_c = s Σ G ∘ a_c,  dβ = dβ_c = s Σ G

"gated", as described for the paper: f the FFN's output and t the text, (S, d) for each sequence; m_j = 1 for a real
token and 0 for padding:

    t' = γ ∘ t + β,  τ = Σ_j m_j t'_j,  g = softmax of ⟨f_i, τ⟩ over the positions with m_i = 1,  g_i = 0 elsewhere,
    out_i = g_i f_i + (1 − g_i) t'_i
    q_i = ⟨G_i, f_i − t'_i⟩,  ds_i = g_i (q_i − Σ_l g_l q_l),  df_i = g_i G_i + ds_i τ
    dt'_j = (1 − g_j) G_j + m_j Σ_i ds_i f_i,  dt = γ ∘ dt',  dγ = Σ t ∘ dt',  dβ = Σ dt'

A sequence gives the same result whatever it is padded to. At padding, and where all is padding, out_i = t'_i.

Kept for the backward: inputs, and for "gated" g and τ in float32, S + d numbers for each sequence: 5 % of one bfloat16
activation at S = 40, d = 768, where computing them again would read f and t once more.
Sources: arXiv 2305.08381 and its code, https://github.com/WillDreamer/Aurora; docs/method.md, section 4.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.autocast import autocasts
from peft_kernels.backend import resolve
from peft_kernels.checks import (
    check_choice,
    check_factor,
    check_scale,
    check_shape,
    check_tensor,
    refuse_second_derivative,
)
from peft_kernels.operator import Operator, composed
from peft_kernels.records import Gate, Modulated
from peft_kernels.remembered import remembered
from peft_kernels.rows import contiguous, rows, shaped
from peft_kernels.torch_kernels import gated_query as launchers
from peft_kernels.transforms import transformed

MODES = ("additive", "gated")
_SCALE = 0.1  # of the released code
additive_query_fwd = Operator(launchers.additive_query_fwd)
additive_query_bwd = Operator(launchers.additive_query_bwd)
gated_query_fwd = Operator(launchers.gated_query_fwd)
gated_query_bwd = Operator(launchers.gated_query_bwd)


def gated_query_reference(
    mode, hidden, text, gamma, beta, cross=None, cross_gamma=None, cross_beta=None, *, padding_mask=None, scale=_SCALE
):
    """The definition, in the precision of its arguments."""
    moved = text * gamma + beta
    if mode == "additive":
        return hidden + scale * moved + scale * (cross * cross_gamma + cross_beta)
    if padding_mask is None:
        gate = (hidden * moved.sum(-2, keepdim=True)).sum(-1, keepdim=True).softmax(-2)
    else:
        padding = ~padding_mask[..., None]
        score = (hidden * moved.masked_fill(padding, 0).sum(-2, keepdim=True)).sum(-1, keepdim=True)
        gate = score.masked_fill(padding, -torch.inf).softmax(-2).masked_fill(padding, 0)
    return gate * hidden + (1 - gate) * moved


class _Additive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, text, gamma, beta, cross, cross_gamma, cross_beta, scale, backend):
        _, needs_text, needs_gamma, _, needs_cross, needs_cross_gamma, _ = ctx.needs_input_grad[:7]
        ctx.save_for_backward(
            text if needs_gamma else None,
            gamma if needs_text or needs_gamma else None,
            beta,
            cross if needs_cross_gamma else None,
            cross_gamma if needs_cross or needs_cross_gamma else None,
            cross_beta,
            scale if isinstance(scale, Tensor) else None,
        )
        ctx.scale, ctx.shape, ctx.backend = None if isinstance(scale, Tensor) else scale, hidden.shape, backend
        moved = Modulated(rows(text), gamma, beta), Modulated(rows(cross), cross_gamma, cross_beta)
        return shaped(additive_query_fwd(backend, rows(hidden), *moved, scale), *hidden.shape)

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivative("gated_query")
        text, gamma, beta, cross, cross_gamma, cross_beta, scale = ctx.saved_tensors
        text, cross = None if text is None else rows(text), None if cross is None else rows(cross)
        scale, (needs_hidden, *needs) = ctx.scale if scale is None else scale, ctx.needs_input_grad[:7]
        grads = [None] * 6
        if any(needs):
            moved = Modulated(text, gamma, beta), Modulated(cross, cross_gamma, cross_beta)
            grads = additive_query_bwd(ctx.backend, rows(dy), *moved, scale, tuple(needs))
        d_text, d_gamma, d_beta, d_cross, *others = grads
        d_text = None if d_text is None else d_text.view(ctx.shape)
        d_cross = None if d_cross is None else d_cross.view(ctx.shape)
        return dy if needs_hidden else None, d_text, d_gamma, d_beta, d_cross, *others, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, text, gamma, beta, padding_mask, backend):
        positions = hidden.shape[-2] or 1  # of no sequences, where there are no positions
        padding_mask = None if padding_mask is None else padding_mask.reshape(-1, positions)
        moved = Modulated(rows(text), gamma, beta)
        out, *gate = gated_query_fwd(backend, rows(hidden), moved, padding_mask, positions)
        ctx.save_for_backward(hidden, text, gamma, beta, padding_mask, *gate)
        ctx.backend = backend
        return shaped(out, *hidden.shape)

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivative("gated_query")
        hidden, text, gamma, beta, padding_mask, *gate = ctx.saved_tensors
        args = (rows(hidden), Modulated(rows(text), gamma, beta), padding_mask, Gate(*gate), ctx.needs_input_grad[:4])
        d_hidden, d_text, d_gamma, d_beta = gated_query_bwd(ctx.backend, rows(dy), *args)
        d_hidden = None if d_hidden is None else d_hidden.view(hidden.shape)
        d_text = None if d_text is None else d_text.view(hidden.shape)
        return d_hidden, d_text, d_gamma, d_beta, None, None


class _Plan(NamedTuple):
    """What the checks of calls that look alike came to."""

    backend: str | None  # None inside transforms
    dtype: torch.dtype  # the result's, and that of all tensors as large


@remembered
def _checked(
    hidden: Tensor, text: Modulated, cross: Modulated, padding_mask: Tensor | None, mode: str, backend: str
) -> _Plan:
    """Raises whatever is to be raised about a call, but for its scale."""
    check_choice("mode", mode, MODES)
    for name, value in zip(("cross", "cross_gamma", "cross_beta"), cross):
        if (value is None) == (mode == "additive"):
            raise ValueError(f"{name}: mode {mode!r} {'needs it, got None' if value is None else 'takes none'}")
    if mode == "additive" and padding_mask is not None:
        raise ValueError("padding_mask: mode 'additive' takes none, as it mixes no positions")
    wide = {"hidden": hidden, "text": text.values} | ({} if cross.values is None else {"cross": cross.values})
    dtype = _check_wide(wide, *((2, "(..., S, d)") if mode == "gated" else (1, "(..., d)")))
    hidden = hidden.to(dtype)
    _check_vector("gamma", text.gamma, hidden)
    _check_vector("beta", text.beta, hidden)
    if mode == "additive":
        _check_vector("cross_gamma", cross.gamma, hidden)
        _check_vector("cross_beta", cross.beta, hidden)
    if padding_mask is not None:
        check_tensor("padding_mask", padding_mask, hidden, dtypes=(torch.bool,))
        check_shape("padding_mask", padding_mask, tuple(hidden.shape[:-1]), "(..., S)")
    shape = (hidden.numel() // hidden.shape[-1], hidden.shape[-1])
    choice = resolve("gated_query", (hidden,), backend, kind=mode, shape=shape)
    name = choice.name if hidden.numel() else "torch"  # no rows: nothing to launch
    return _Plan(None if transformed() else name, dtype)


def _check_wide(wide: dict[str, Tensor], least: int, meaning: str) -> torch.dtype:
    """Tensors of one shape and dtype; under autocast, whose layer norm gives float32, the widest of their dtypes."""
    hidden = wide["hidden"]
    for name, value in wide.items():
        check_tensor(name, value, None if value is hidden else hidden)
        if value is hidden and (value.dim() < least or value.shape[-1] == 0):
            raise ValueError(f"{name}: expected shape {meaning} with d ≥ 1, got {tuple(value.shape)}")
        check_shape(name, value, tuple(hidden.shape), f"{meaning}, as hidden")
        if value.dtype != hidden.dtype and not autocasts(hidden):
            raise TypeError(f"{name}: expected dtype {hidden.dtype}, as hidden, got {value.dtype}")
    return functools.reduce(torch.promote_types, (value.dtype for value in wide.values()))


def _check_vector(name: str, vector: Tensor, hidden: Tensor) -> None:
    check_tensor(name, vector, hidden)
    check_factor(name, _taken(vector, hidden.dtype) if autocasts(hidden) else vector, hidden)
    check_shape(name, vector, (hidden.shape[-1],), "(d,)")


def _taken(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """As kernels take it: not narrower than `dtype`."""
    return (vector.to(dtype) if vector.dtype.itemsize < dtype.itemsize else vector).contiguous()


def gated_query(
    mode: str,
    hidden: Tensor,
    text: Tensor,
    gamma: Tensor,
    beta: Tensor,
    cross: Tensor | None = None,
    cross_gamma: Tensor | None = None,
    cross_beta: Tensor | None = None,
    *,
    padding_mask: Tensor | None = None,
    scale: float | Tensor = _SCALE,
    backend: str = "auto",
) -> Tensor:
    """Aurora's gated query transformation of one layer's output, differentiable in every tensor but the mask and scale.

    mode: "additive", hidden + scale · (text ∘ gamma + beta) + scale · (cross ∘ cross_gamma + cross_beta), or "gated",
        g · hidden + (1 − g) · (text ∘ gamma + beta) with g the softmax, over the S positions, of hidden's products with
        the sum of the moved text
    hidden: (..., d), the FFN's output after its LayerNorm, any strides; for "gated" (..., S, d), each a sequence
    text: as hidden: the self-attention block's output;  cross: as hidden, that of cross-attention; "additive" only
    gamma, beta, cross_gamma, cross_beta: (d,), in hidden's dtype or float32; gradients come in their own
    padding_mask: None or (..., S), True for a real token; "gated" only. Padding is left out of the sum of the moved
        text and of the softmax: real tokens come out as without it. Its own g is 0.
    scale: a number, or a 0-d tensor on the same device (takes no gradient); "additive" only
    backend: "auto" | "cuda" | "triton" | "torch"
    returns out: (..., d), as hidden; sums in float32, rounded once

    hidden, text and cross have one dtype: float32, bfloat16, float16 or (torch backend) float64. Under autocast, where
    layer norms give float32, they may differ: the widest of them is the result's, and narrower vectors are widened.
    "gated" mixes positions: it has no place in a causal decoder. It needs gamma near 1 and beta near 0; "additive" has
    both near 0. Source: arXiv 2305.08381 and its code; docs/method.md, section 4.
    Raises ValueError or TypeError, naming the argument, before anything runs; BackendUnavailableError (a ValueError)
    if a backend asked for by name cannot run.
    """
    moved = Modulated(text, gamma, beta), Modulated(cross, cross_gamma, cross_beta)
    run, dtype = _checked(hidden, *moved, padding_mask, mode, backend)
    hidden, text, gamma, beta = hidden.to(dtype), text.to(dtype), _taken(gamma, dtype), _taken(beta, dtype)
    if mode == "gated":
        if not isinstance(scale, float) or scale != _SCALE:
            raise ValueError("scale: mode 'gated' has none; leave it out")
        if run is None:
            return composed(launchers.gated_query_composed, hidden, Modulated(text, gamma, beta), padding_mask)
        return _Gated.apply(hidden, text, gamma, beta, contiguous(padding_mask), run)
    check_scale(scale, hidden)
    if run != "torch" and isinstance(scale, Tensor):
        scale = scale.to(torch.float32)
    crosses = cross.to(dtype), _taken(cross_gamma, dtype), _taken(cross_beta, dtype)
    if run is None:
        moved = Modulated(text, gamma, beta), Modulated(*crosses)
        return composed(launchers.additive_query_composed, hidden, *moved, scale)
    return _Additive.apply(hidden, text, gamma, beta, *crosses, scale, run)
