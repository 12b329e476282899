"""torch.func's transforms and forward-mode differentiation: they see through plain torch, and not through kernels."""

import torch
from torch.autograd import forward_ad

WHY_NOT = "torch.func and forward-mode differentiation see through plain torch alone"
in_torch_func = torch._C._are_functorch_transforms_active


def transformed() -> bool:
    """Is this call inside grad, vmap, jvp or another transform of torch.func, or a level of forward-mode dual tensors?

    Operations are then composed of differentiable torch operations, none in place: what transforms can transform.
    """
    return in_torch_func() or forward_ad._current_level >= 0
