"""LoRA, Aurora, MoIL and baselines on whole models: `wrap`, train, `save_pretrained`, `merge`, `export_lora`."""

from peft_kernels.adapters.aurora import Aurora, AuroraConfig
from peft_kernels.adapters.base import Adapter
from peft_kernels.adapters.baselines import FullTuning, FullTuningConfig, UniAdapter, UniAdapterConfig
from peft_kernels.adapters.config import AdapterConfig
from peft_kernels.adapters.lora import LoRA, LoRAConfig
from peft_kernels.adapters.moil import MoIL, MoILConfig

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Aurora",
    "AuroraConfig",
    "FullTuning",
    "FullTuningConfig",
    "LoRA",
    "LoRAConfig",
    "MoIL",
    "MoILConfig",
    "UniAdapter",
    "UniAdapterConfig",
]
