"""MoIL's imitation step: students' factors, groups of projections, and the step itself."""

from peft_kernels.imitation.factors import Transform, hybrid_factors
from peft_kernels.imitation.groups import ImitationGroup
from peft_kernels.imitation.step import imitation_step

__all__ = ["ImitationGroup", "Transform", "hybrid_factors", "imitation_step"]
