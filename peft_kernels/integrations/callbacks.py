"""What the callbacks of both trainers check."""

from collections.abc import Iterable
from typing import Any

from peft_kernels.adapters import MoIL


def check_moil(moil: Any) -> MoIL:
    """Raises TypeError for anything else."""
    if not isinstance(moil, MoIL):
        raise TypeError(f"moil: expected a MoIL, as MoIL.wrap returns it, got {type(moil).__name__}")
    return moil


def check_trained(moil: MoIL, optimizers: Iterable[Any]) -> None:
    """Raises ValueError if something of the MoIL that trains is in none of the optimizers."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in moil.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise ValueError(
            f"MoILCallback: the optimizer does not train {missing[0]} and {len(missing) - 1} others of the MoIL; "
            "make it after MoIL.wrap, over moil.param_groups(lr=…)"
        )
