"""nn.Modules over the operations: parameters, initialisation, and one call in forward."""

from peft_kernels.layers.lowrank_linear import LowRankLinear

__all__ = ["LowRankLinear"]
