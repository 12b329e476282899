"""Checks that are made once for all calls that look alike: in Python they take as long as several launches."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from peft_kernels.autocast import linear_dtype
from peft_kernels.backend import requested_by
from peft_kernels.transforms import in_torch_func

MOST = 4096  # calls of a function that are told apart


def remembered(check: Callable) -> Callable:
    """A decorator: what `check` returned is returned again for arguments that look like those. Errors are not kept.

    check: looks at kinds, shapes and devices of its arguments (tensors, and records of them, the first one's autocast
        included), at strings and booleans, and at what backend is asked for around it; at numbers' types only
    """
    known: dict[tuple, Any] = {}

    @functools.wraps(check)
    def checked(*args: Any) -> Any:
        if torch.compiler.is_compiling() or in_torch_func() or forward_ad._current_level >= 0:  # `transformed()`, warm
            return check(*args)
        try:
            key = (*map(_looks, args), _first_dtype(args), requested_by("auto"))
            found = known.get(key)
        except (RuntimeError, TypeError, ValueError):
            return check(*args)  # which names what is no dense tensor, or no word
        if found is None:
            found = check(*args)
            if len(known) >= MOST:
                known.clear()
            known[key] = found
        return found

    return checked


def _looks(arg: Any) -> Any:
    kind = type(arg)
    if kind is Tensor or kind is nn.Parameter:
        return arg.dtype, arg.device, arg.layout, arg.shape, arg.requires_grad
    if isinstance(arg, tuple):
        return tuple(map(_looks, arg))
    if isinstance(arg, Tensor):
        raise TypeError("what other types of tensors hide changes without a sign")
    return kind if kind is float else (kind, arg)


def _first_dtype(args: tuple) -> torch.dtype:
    first = args[0][0] if isinstance(args[0], tuple) else args[0]
    if not isinstance(first, Tensor):
        raise TypeError("no tensor comes first")
    return linear_dtype(first)
