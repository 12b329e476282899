"""Fused Triton and CUDA kernels for low-rank adapters of vision-language models (LoRA, MoIL, Aurora)."""

import os.path
from importlib.metadata import PackageNotFoundError, version

if not os.path.isdir(os.path.join(__path__[0], "triton_kernels")):
    __path__.append(os.path.dirname(__path__[0]))  # a checkout has triton_kernels and benchmarks beside this folder

from peft_kernels.adapters import (
    Adapter,
    AdapterConfig,
    Aurora,
    AuroraConfig,
    FullTuning,
    FullTuningConfig,
    LoRA,
    LoRAConfig,
    MoIL,
    MoILConfig,
    UniAdapter,
    UniAdapterConfig,
)
from peft_kernels.backend import BackendUnavailableError, Choice, explain, resolve, use_backend
from peft_kernels.blocks.linears import MlpLinear
from peft_kernels.blocks.mlp import adapted_mlp
from peft_kernels.cores import cp_core, tucker_core
from peft_kernels.imitation import ImitationGroup, Transform, hybrid_factors, imitation_step
from peft_kernels.ops.batched_lowrank_linear import (
    AdapterSegments,
    adapter_segments,
    batched_lowrank_linear,
    stack_adapters,
)
from peft_kernels.ops.gated_query import gated_query
from peft_kernels.ops.lowrank_linear import lowrank_hidden, lowrank_linear
from peft_kernels.ops.lowrank_projections import lowrank_projections
from peft_kernels.ops.reconstruct import reconstruct, reconstruct_stack
from peft_kernels.ops.weight_distance import momentum_weight_distance, weight_distance

try:
    __version__ = version("peft_kernels")
except PackageNotFoundError:  # an uninstalled checkout
    __version__ = "0+unknown"

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterSegments",
    "Aurora",
    "AuroraConfig",
    "BackendUnavailableError",
    "Choice",
    "FullTuning",
    "FullTuningConfig",
    "ImitationGroup",
    "LoRA",
    "LoRAConfig",
    "MlpLinear",
    "MoIL",
    "MoILConfig",
    "Transform",
    "UniAdapter",
    "UniAdapterConfig",
    "adapted_mlp",
    "adapter_segments",
    "batched_lowrank_linear",
    "cp_core",
    "explain",
    "gated_query",
    "hybrid_factors",
    "imitation_step",
    "lowrank_hidden",
    "lowrank_linear",
    "lowrank_projections",
    "momentum_weight_distance",
    "reconstruct",
    "reconstruct_stack",
    "resolve",
    "stack_adapters",
    "tucker_core",
    "use_backend",
    "weight_distance",
]
