"""Layers of models that read `layer.weight` and `layer.bias` instead of calling the layer.

VLMo does, F.linear(x, self.qkv.weight, bias), and what comes from BEiT. There the names give the adapted weight, made
anew at each reading by `reconstruct`, whose adjoint takes the gradient to the factors: two passes over a dense matrix
more than a call costs, and no dropout. A layer that is called all the same is called as ever.
"""

from torch import Tensor

from peft_kernels import kinds
from peft_kernels.backend import Choice, resolve
from peft_kernels.layers.adapted_linear import AdaptedLinear
from peft_kernels.layers.imitation_linear import ImitationLinear
from peft_kernels.layers.lowrank_linear import LowRankLinear
from peft_kernels.layers.mode_linear import ModeLinear


class WeightRead(AdaptedLinear):
    """`base_weight` and `base_bias` are the frozen Parameters, which the state dict has under their old names."""

    def __init__(self, *args, dropout_p: float = 0.0, **options):
        if dropout_p:
            raise ValueError("dropout: expected 0 where a model reads the weight itself: its input never comes here")
        super().__init__(*args, **options)

    @property
    def weight(self) -> Tensor:
        return self.base_weight if self.merged else self.shown("weight")

    @property
    def bias(self) -> Tensor | None:
        return self.base_bias if self.merged else self.shown("bias")

    def group_kind(self) -> tuple[None, str]:
        return None, "by itself: the model reads its weight and does not call it"

    def shown(self, name: str) -> Tensor | None:
        """The adapted "weight" or "bias"."""
        return self.updated_weight() if name == "weight" else self.base_bias

    def backend_choice(self) -> Choice:
        if self.merged:
            return Choice("torch", "merged: a plain weight")
        down, up, core = self.factors()
        kind, blocks = (None, (1, 1)) if core is None else (core.dim() - 2, core.shape[:2])
        shape = (up.shape[0], down.shape[1])
        return resolve(
            "reconstruct", (self.base_weight,), self.backend, kind=kinds.core(kind), blocks=blocks, shape=shape
        )


class LowRankWeight(WeightRead, LowRankLinear):
    """The `LowRankLinear` of a model that reads its weight."""


class ModeWeight(WeightRead, ModeLinear):
    """The `ModeLinear` of a model that reads its weight."""


class ImitationWeight(WeightRead, ImitationLinear):
    """The `ImitationLinear` likewise: it shows the live weight in training, the student's in evaluation."""

    def shown(self, name: str) -> Tensor | None:
        return self.taken(name)

    def backend_choice(self) -> Choice:
        if self.mode_now != "student":
            return ImitationLinear.backend_choice(self)
        return super().backend_choice()
