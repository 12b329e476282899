"""What an action asks of a wrapped model: that the tensors it reads and writes are whole, dense and hold values."""

from collections.abc import Iterable

from torch import Tensor, nn

from peft_kernels.checks import check_dense
from peft_kernels.layers.adapted_linear import DENSE_FIRST, HOOKS_OFF


def check_tensors(
    action: str, model: nn.Module, tensors: dict[str, Tensor], owners: Iterable[nn.Module], instead: str
) -> None:
    """Raises ValueError or TypeError, naming the action, before it changes anything.

    tensors: by name, those that the action reads or writes;  owners: the modules that the adapter brought
    instead: what to do where they are sharded
    """
    if any(hasattr(tensor, "to_local") for tensor in tensors.values()):  # a DTensor, of FSDP2 for instance
        raise ValueError(f"{action}: the weights are sharded, and it needs them whole; {instead}")
    # FSDP marks the modules that it manages. Between a forward and reshard() their weights are plain tensors, which
    # reshard() throws away with whatever was written to them.
    if any(getattr(owner, "_is_fsdp_managed_module", False) for owner in owners):
        raise ValueError(f"{action}: the weights are FSDP's, which are whole for a moment only; {instead}")
    for name, tensor in tensors.items():
        check_dense(f"{action}: {name}", tensor, DENSE_FIRST)
    check_not_offloaded(action, model, tensors)


def check_not_offloaded(action: str, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError where hooks of accelerate keep the values elsewhere, and bring copies for each forward."""
    away = [name for name, tensor in tensors.items() if tensor.is_meta]
    if away and any("_hf_hook" in vars(module) for module in model.modules()):
        raise ValueError(f"{action}: {away[0]} is offloaded by hooks of accelerate; {HOOKS_OFF}")
