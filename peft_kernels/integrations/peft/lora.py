"""Fused LoRA linears in PEFT's models: in one that is built already, in place, or in one that PEFT builds next."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from peft import LoraConfig, PeftMixedModel, PeftModel, PeftType
from peft.tuners.lora.layer import dispatch_default
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from peft_kernels.adapters.groups import form_groups
from peft_kernels.adapters.mlps import recompute_activations
from peft_kernels.adapters.targets import guess_target
from peft_kernels.integrations.peft.fused_linear import FusedLinear, StockLinear, why_not_adapter, why_not_base

FUSED_ALREADY = "it is fused already"


@dataclass(frozen=True)
class Report:
    """What `accelerate` did, by module name. swapped: layers fused now;  left: other adapter layers, with reasons"""

    swapped: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        before = [name for name, reason in self.left.items() if reason == FUSED_ALREADY]
        total, others = len(self.swapped) + len(self.left), self.left.keys() - {*before}
        head = f"{total - len(others)} of {total} adapter layers are fused now"
        if before:
            head += f", {len(before)} of them from before" if self.swapped or others else ": all were fused already"
        return "\n".join([head, *(f"  left {name}: {why}" for name, why in self.left.items() if name in others)])


def accelerate(peft_model: nn.Module, group: bool = True, stack: bool = False, recompute: bool = True) -> Report:
    """Fuse the LoRA linears of a model that PEFT built, in place. `restore` undoes it; doing it again adds new layers.

    peft_model: from get_peft_model, PeftModel.from_pretrained, or anything else with PEFT's layers inside
    group: do layers that read one tensor, as q, k and v do, run as one call? `peft_kernels.explain` tells which do
    stack: are the frozen weights of such layers laid in one memory, for one product?
    recompute: does the backward compute activations again, to the same bits, where they would be kept? The input of
        layers behind one, as fc2, and in gated MLPs and those with QuickGELU the factors of that input
    returns report: which layers are fused, and why the others are left as they were; print it
    Raises TypeError for a model without any layer of PEFT's.
    """
    swapped, left = [], {}
    for name, layer in _adapter_layers(peft_model):
        if reason := _why_left(layer):
            left[name] = reason
        else:
            _fuse(layer)
            swapped.append(name)
    fused = [(name, layer) for name, layer in _adapter_layers(peft_model) if type(layer) is FusedLinear]
    members = ((name, layer, guess_target("", name, layer.base_layer)) for name, layer in fused)
    form_groups(peft_model, members, group, stack)
    for _, layer in fused:
        layer.recompute = recompute
    recompute_activations(peft_model, [layer for _, layer in fused if recompute])
    return Report(tuple(swapped), left)


def restore(peft_model: nn.Module) -> tuple[str, ...]:
    """Make every fused layer PEFT's own again, in place, however it was fused; its name is returned.

    Raises TypeError for a model without any layer of PEFT's.
    """
    fused = [(name, layer) for name, layer in _adapter_layers(peft_model) if type(layer) is FusedLinear]
    recompute_activations(peft_model)
    for _, layer in fused:
        scaling = layer.__dict__.pop("_scaling")
        for attribute in ("group", "why_alone", "recompute"):
            layer.__dict__.pop(attribute, None)
        layer.__class__ = StockLinear
        layer.scaling = dict(scaling)
    return tuple(name for name, _ in fused)


def fast(config: LoraConfig) -> LoraConfig:
    """A copy of `config` by which PEFT builds fused layers at once, wherever `accelerate` would swap the base layer.

    What is saved is stock PEFT's. The copy goes where a configuration does: get_peft_model, add_adapter, and
    PeftModel.from_pretrained(…, config=fast(LoraConfig.from_pretrained(folder))).
    Raises TypeError for anything but a LoraConfig (AdaLora's has layers of its own).
    """
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise TypeError(f"config: expected a peft.LoraConfig, got {type(config).__name__}")
    config = copy.copy(config)
    config._custom_modules = {**(config._custom_modules or {})}
    config._register_custom_module({nn.Linear: _build})
    return config


def _build(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs) -> nn.Module | None:
    """What PEFT calls in place of a class for each nn.Linear, or subclass of it; None leaves the layer to PEFT."""
    if isinstance(target, BaseTunerLayer) or why_not_base(target) is not None:
        return None
    layer = dispatch_default(target, adapter_name, config=config, **kwargs)
    if type(layer) is StockLinear:
        _fuse(layer)
    return layer


def _fuse(layer: StockLinear) -> None:
    scaling = layer.__dict__.pop("scaling")
    layer.__class__ = FusedLinear
    layer.scaling = scaling


def _adapter_layers(peft_model: object) -> Iterator[tuple[str, BaseTunerLayer]]:
    layers = []
    if isinstance(peft_model, nn.Module):
        layers = [(name, each) for name, each in peft_model.named_modules() if isinstance(each, BaseTunerLayer)]
    if not layers and not isinstance(peft_model, PeftModel | PeftMixedModel | BaseTuner):
        raise TypeError(f"peft_model: expected a model with layers of PEFT's, got {type(peft_model).__name__}")
    return iter(layers)


def _why_left(layer: BaseTunerLayer) -> str | None:
    if isinstance(layer, FusedLinear):
        return FUSED_ALREADY
    if type(layer) is not StockLinear:
        return f"it is a {type(layer).__module__}.{type(layer).__name__}, not PEFT's lora.Linear"
    if "forward" in layer.__dict__:
        return "it has a forward of its own"
    if reason := why_not_base(layer.base_layer):
        return reason
    reasons = [why_not_adapter(layer, adapter) for adapter in layer.lora_A]
    return (reasons[0] if reasons else "it has no adapter") if all(reasons) else None
