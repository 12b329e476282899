"""Activations that a backward makes anew from what autograd keeps of them anyway.

A linear behind an activation, as fc2 is, would keep its input a = act(h) for the gradient of its factors, beside the h
that the activation's own node keeps: at width 3072 the largest tensor of a transformer's MLP, twice. The node knows
what a was made of, and the same operation of torch makes the same bits again.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_kernels.autocast import autocast_off

Recipe = tuple[Callable[..., Tensor], tuple[Tensor, ...]]  # an operation, and the very tensors that the node keeps
# By the name of autograd's node: its operation, and what it keeps of its arguments. ReLU keeps its result, which is a.
_MADE_BY = {
    "GeluBackward0": (F.gelu, ("self",), ("approximate",)),
    "SiluBackward0": (F.silu, ("self",), ()),
    "MulBackward0": (torch.mul, ("self", "other"), ()),  # gated MLPs, and activations that models write out
    "_RecomputedActivationBackward": (None, (), ()),  # blocks/activations.py, whose nodes know their operation
}
_PLAIN = (Tensor, nn.Parameter)
_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def recipe_of(a: Tensor) -> Recipe | None:
    """How `a` is made of tensors that are kept for the backward anyway. None: it has to be kept itself.

    None, too, where reading what a node keeps would run hooks (activation checkpointing, offloading), where `a` or what
    it was made of changed in place since, and in compiled graphs. Writes that torch does not count, through .data, are
    not seen: the backward then has `a` as the activation gave it.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    node = a.grad_fn
    found = _MADE_BY.get(type(node).__name__)
    if found is None or a._version or _saved_tensor_hooks(True) is not None:
        return None
    operation, names, options = found
    try:
        if operation is None:
            operation, of = node.made_by, _kept_by_ours(node)
        else:
            of = tuple([_kept(node, name) for name in names])
    except RuntimeError:  # changed in place since, or a backward has freed it
        return None
    for t in of:
        if type(t) not in _PLAIN or t.shape != a.shape or t.dtype != a.dtype:
            return None
    if options:
        operation = functools.partial(operation, **{name: getattr(node, f"_saved_{name}") for name in options})
    return operation, of


def _kept(node: torch.autograd.graph.Node, name: str) -> Tensor | None:
    """None for what is not kept, or only through hooks, as of a region of checkpointing that has ended."""
    return None if getattr(node, f"_raw_saved_{name}").unpack_hook is not None else getattr(node, f"_saved_{name}")


def _kept_by_ours(node: torch.autograd.function.FunctionCtx) -> tuple[Tensor | None, ...]:
    for raw in node._raw_saved_tensors:
        if raw.unpack_hook is not None:
            return (None,)
    return node.saved_tensors


def made(operation: Callable[..., Tensor], of: list[Tensor]) -> Tensor:
    """of: as autograd gives them back, which looks whether they changed"""
    with autocast_off(of[0]):
        return operation(*of)
