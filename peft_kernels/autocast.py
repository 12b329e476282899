"""What autocast does to a linear layer, and how to keep it out where every dtype has been chosen."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocasts(x: Tensor) -> bool:
    """Does autocast, as it is now, cast what a linear layer takes? (It leaves float64 alone.)"""
    return _autocast_enabled(x) and x.dtype != torch.float64


def autocast_off(t: Tensor) -> AbstractContextManager:
    """Where every dtype has been chosen already, and autocast would choose others."""
    return torch.autocast(t.device.type, enabled=False) if _autocast_enabled(t) else _AS_IT_IS


_AS_IT_IS = nullcontext()


def _autocast_enabled(t: Tensor) -> bool:
    device = t.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # meta knows no autocast, and raises


def linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which torch.nn.functional.linear would compute on x here."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype
