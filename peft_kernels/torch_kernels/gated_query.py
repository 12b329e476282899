"""`gated_query` in torch: in float32 at least, each result rounded once.

Shapes as in peft_kernels/ops/gated_query.py, whose (..., d) come as rows (M, d), M = B·S for "gated".
"""

import torch
from torch import Tensor

from peft_kernels.records import Gate, Modulated, Scale


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def additive_query_fwd(hidden: Tensor, text: Modulated, cross: Modulated, scale: Scale) -> Tensor:
    """-> out (M, d)"""
    betas = (_wide(text.beta) + _wide(cross.beta)) * scale
    out = torch.addcmul(betas, _wide(text.values), _wide(text.gamma) * scale)
    return out.addcmul_(_wide(cross.values), _wide(cross.gamma) * scale).add_(hidden).to(hidden.dtype)


def additive_query_bwd(
    dy: Tensor, text: Modulated, cross: Modulated, scale: Scale, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """-> d_text, d_gamma, d_beta, d_cross, d_cross_gamma, d_cross_beta, as `needs` says in that order.

    Values are read for the gradients of their gammas only; the betas tell a dtype.
    """
    needs_text, needs_gamma, needs_beta, needs_cross, needs_cross_gamma, needs_cross_beta = needs
    (text, gamma, beta), (cross, cross_gamma, cross_beta) = text, cross
    wide = _wide(dy)
    d_text = (wide * (_wide(gamma) * scale)).to(dy.dtype) if needs_text else None
    d_cross = (wide * (_wide(cross_gamma) * scale)).to(dy.dtype) if needs_cross else None
    d_gamma = ((wide * text).sum(0) * scale).to(gamma.dtype) if needs_gamma else None
    d_cross_gamma = ((wide * cross).sum(0) * scale).to(cross_gamma.dtype) if needs_cross_gamma else None
    d_beta = d_cross_beta = None
    if needs_beta or needs_cross_beta:
        total = wide.sum(0) * scale
        d_beta = total.to(beta.dtype) if needs_beta else None
        d_cross_beta = total.to(cross_beta.dtype, copy=True) if needs_cross_beta else None
    return d_text, d_gamma, d_beta, d_cross, d_cross_gamma, d_cross_beta


def gated_query_fwd(
    hidden: Tensor, text: Modulated, padding_mask: Tensor | None, positions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out (M, d), g (B, S) and τ (B, d), both float32 at least; padding_mask (B, S), positions: S"""
    wide, moved = _wide(hidden).unflatten(0, (-1, positions)), _moved(text).unflatten(0, (-1, positions))
    total = _of_real_tokens(moved, padding_mask).sum(1)
    gate = _gate((wide * total[:, None]).sum(-1), padding_mask)
    return moved.lerp_(wide, gate[..., None]).flatten(0, 1).to(hidden.dtype), gate, total


def gated_query_bwd(
    dy: Tensor, hidden: Tensor, text: Modulated, padding_mask: Tensor | None, gate: Gate, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """-> d_hidden, d_text, d_gamma, d_beta, as `needs` says in that order"""
    needs_hidden, needs_text, needs_gamma, needs_beta = needs
    d_hidden = d_text = d_gamma = d_beta = None
    difference = _moved(text).neg_().add_(hidden)
    (text, gamma, beta), (gate, total) = text, gate
    wide, f = _wide(dy).unflatten(0, gate.shape), _wide(hidden).unflatten(0, gate.shape)
    difference = difference.unflatten(0, gate.shape)
    q = difference.mul_(wide).sum(-1)
    ds = (q - (gate * q).sum(-1, keepdim=True)).mul_(gate)
    if needs_hidden:
        d_hidden = (wide * gate[..., None]).addcmul_(ds[..., None], total[:, None])
        d_hidden = d_hidden.flatten(0, 1).to(dy.dtype)
    if needs_text or needs_gamma or needs_beta:
        d_total = (f * ds[..., None]).sum(1, keepdim=True)
        kept = torch.ones_like(gate) if padding_mask is None else padding_mask.to(gate.dtype)
        d_moved = (wide * (1 - gate)[..., None]).addcmul_(kept[..., None], d_total).flatten(0, 1)
        d_text = (d_moved * gamma).to(dy.dtype) if needs_text else None
        d_gamma = (d_moved * text).sum(0).to(gamma.dtype) if needs_gamma else None
        d_beta = d_moved.sum(0).to(beta.dtype) if needs_beta else None
    return d_hidden, d_text, d_gamma, d_beta


def additive_query_composed(hidden: Tensor, text: Modulated, cross: Modulated, scale: Scale) -> Tensor:
    """-> out (..., d), by differentiable operations alone, none in place"""
    return (_wide(hidden) + (_shifted(text) + _shifted(cross)) * scale).to(hidden.dtype)


def gated_query_composed(hidden: Tensor, text: Modulated, padding_mask: Tensor | None) -> Tensor:
    """-> out (..., S, d), likewise; padding_mask (..., S)"""
    wide, moved = _wide(hidden), _shifted(text)
    total = _of_real_tokens(moved, padding_mask).sum(-2, keepdim=True)
    gate = _gate((wide * total).sum(-1), padding_mask)
    return torch.lerp(moved, wide, gate[..., None]).to(hidden.dtype)


def _of_real_tokens(moved: Tensor, padding_mask: Tensor | None) -> Tensor:
    return moved if padding_mask is None else torch.where(padding_mask[..., None], moved, 0)


def _gate(scores: Tensor, padding_mask: Tensor | None) -> Tensor:
    """g (..., S), 0 for padding; where all is padding the softmax is NaN, and taken nowhere."""
    if padding_mask is None:
        return scores.softmax(-1)
    return torch.where(padding_mask, torch.where(padding_mask, scores, -torch.inf).softmax(-1), 0)


def _shifted(text: Modulated) -> Tensor:
    return _wide(text.values) * _wide(text.gamma) + _wide(text.beta)


def _moved(text: Modulated) -> Tensor:
    """t' (M, d), memory of its own"""
    return torch.addcmul(_wide(text.beta), _wide(text.values), _wide(text.gamma))
