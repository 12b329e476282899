"""Aurora (arXiv 2305.08381) as a method of PEFT: `register()`, then PEFT's own functions with it.

Source: docs/method.md, section 4.

Not included: gates and context enhancement, which are no part of linear layers; `peft_kernels.Aurora` has gates.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from peft_kernels.adapters.config import check_count, check_number
from peft_kernels.checks import check_choice, check_flag, check_probability
from peft_kernels.integrations.peft.aurora_linear import AuroraLinear, SharedFactors
from peft_kernels.layers.mode_linear import DECOMPOSITIONS
from peft_kernels.layers.per_pass import PerPass

# These read the weights of their linears themselves: an adapter in there would be passed by.
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class AuroraType(str, Enum):
    """PEFT's name of the method; its own PeftType cannot be extended."""

    AURORA = "AURORA"


@dataclass
class AuroraConfig(PeftConfig):
    """PEFT's configuration of Aurora, with the meaning and defaults of `peft_kernels.AuroraConfig`.

    rank: R;  core: "cp" (the paper) | "tucker" (the released code)
    scale: of the update;  dropout: in vision on the core's output, elsewhere on x U
    target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in PEFT's LoraConfig
    init_weights: True starts with an update of zero; False with a random one, for tests
    U, V and λ (or C) are shared by all layers of an adapter, U and V by those of one pair of widths.
    Raises ValueError or TypeError, naming the argument; ValueError before `register()`.
    """

    rank: int = field(default=64)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    core: str = field(default="cp")
    scale: float = field(default=1.0)
    dropout: float = field(default=0.1)
    modules_to_save: list[str] | None = field(default=None)
    init_weights: bool = field(default=True)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)

    def __post_init__(self):
        super().__post_init__()
        if PEFT_TYPE_TO_CONFIG_MAPPING.get(AuroraType.AURORA) is not AuroraConfig:
            raise ValueError("AuroraConfig: PEFT does not know Aurora yet; call peft_kernels' register() first")
        self.peft_type = AuroraType.AURORA
        check_count(self.rank)
        check_choice("core", self.core, DECOMPOSITIONS)
        check_number(self.scale, "scale")
        check_probability("dropout", self.dropout)
        check_flag("init_weights", self.init_weights)
        for name in ("target_modules", "exclude_modules"):
            setattr(self, name, _names(name, getattr(self, name)))
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save: expected a list of names, got {self.modules_to_save!r}")
        _names("modules_to_save", self.modules_to_save)
        _names("layers_pattern", self.layers_pattern)
        layers = self.layers_to_transform
        if layers is not None:
            if not all(type(n) is int for n in (layers if isinstance(layers, list | tuple) else [layers])):
                raise TypeError(f"layers_to_transform: expected numbers of layers, got {layers!r}")
            if isinstance(self.target_modules, str):
                raise ValueError("layers_to_transform: expected target_modules as a list, not as a regular expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern: expected layers_to_transform besides, got None")


def _names(name: str, value: object) -> set[str] | str | None:
    """A list as a set, as PEFT's own configurations have it; a text is a regular expression."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{name}: {value!r} is not a regular expression: {error}") from None
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list | set | tuple) or not all(isinstance(each, str) and each for each in value):
        raise TypeError(f"{name}: expected names of modules, got {value!r}")
    return set(value)


class AuroraModel(BaseTuner):
    """What PEFT builds of a model and an `AuroraConfig`: `AuroraLinear`s in it, and beside it what they share.

    aurora_shared: by adapter the `SharedFactors` of all its layers
    """

    uses_shared_state = True
    prefix = "aurora_"
    tuner_layer_cls = AuroraLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _pre_injection_hook(self, model: nn.Module, config: AuroraConfig, adapter_name: str) -> None:
        self.aurora_shared = nn.ModuleDict()

    def _layers(self, adapter_name: str | None = None) -> list[AuroraLinear]:
        """In the model's order; those of an adapter, or all."""
        layers = [module for module in self.model.modules() if isinstance(module, AuroraLinear)]
        return [layer for layer in layers if adapter_name is None or adapter_name in layer.aurora_p]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's, which knows nothing of shared factors: starts them, and takes everything back if it fails."""
        existing = (*self._layers(), self.aurora_shared)
        required = [(p, p.requires_grad) for m in existing for n, p in m.named_parameters() if "base_layer." not in n]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            for layer in self._layers():
                layer.forget(adapter_name)
            if adapter_name in self.aurora_shared:
                del self.aurora_shared[adapter_name]
            raise
        finally:
            for p, own in required:
                p.requires_grad_(own)
        config, layers = self.peft_config[adapter_name], self._layers(adapter_name)
        self.aurora_shared[adapter_name].reset(zero=config.init_weights)
        for layer in layers:
            layer.reset_slots(adapter_name, sum(len(each.aurora_p[adapter_name]) for each in layers))
        readers: dict[tuple, list[AuroraLinear]] = {}
        for layer in layers:
            readers.setdefault(layer.reads, []).append(layer)
        for members in readers.values():
            hidden = PerPass()
            for layer in members if len(members) > 1 else ():
                layer.aurora_hidden[adapter_name] = hidden, hidden.join()

    def _create_and_replace(
        self,
        config: AuroraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(parent, _READS_WEIGHTS):
            kind = type(parent).__name__
            raise ValueError(
                f"target_modules: {current_key} is part of an nn.{kind}, which reads its weight past any adapter; "
                "name it in exclude_modules"
            )
        layer = target
        if not isinstance(target, AuroraLinear):
            layer = AuroraLinear(target, current_key, self.aurora_shared)
            layer.train(target.training)
            layer._active_adapter = self.active_adapter
        if adapter_name not in self.aurora_shared:
            self.aurora_shared[adapter_name] = SharedFactors(config.rank, config.core)
        layer.update_layer(adapter_name, config.scale, config.dropout, config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's looks for weights even in a head: an nn.Sequential in modules_to_save could not be unloaded."""
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's would not reach what is shared."""
        slots = [layer.aurora_p[adapter_name] for layer in self._layers(adapter_name)]
        for p in (*slots, *self.aurora_shared[adapter_name].parameters()) if autocast_adapter_dtype else ():
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))

    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> AbstractContextManager:
        """PEFT calls it around every forward, and would drop adapter_names without a word."""
        if adapter_names is not None:
            raise ValueError("adapter_names: Aurora knows no mixed batches; run each adapter's part by itself")
        return nullcontext()


def register() -> None:
    """Make Aurora known to PEFT in this process: `get_peft_model(model, AuroraConfig(…))`, and all that PEFT does then.

    Needed once before a configuration is made, or a saved adapter loaded; again does nothing.
    Raises ValueError if PEFT has another method of this name or prefix.
    """
    own = AuroraType.AURORA
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(own) is AuroraConfig:
        return
    if own in PEFT_TYPE_TO_CONFIG_MAPPING or AuroraModel.prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise ValueError(f"register: PEFT has a method named {own.value!r}, or the prefix 'aurora_', already")
    PEFT_TYPE_TO_PREFIX_MAPPING[own] = AuroraModel.prefix
    PEFT_TYPE_TO_TUNER_MAPPING[own] = AuroraModel
    PEFT_TYPE_TO_CONFIG_MAPPING[own] = AuroraConfig
