"""What adapters are compared with, in plain torch: UniAdapter, and tuning a whole model or parts of it.

UniAdapter (arXiv 2302.06605), with y the result of a layer's attention or feed-forward part, of modality m:

    y ← y + 0.1 · (relu(y Dᵀ + d) U_mᵀ + u_m)        D (r, width), U_m (width, r)

D is shared by all modalities and U_m is a modality's own, both anew at every depth: for the three modalities of
BLIP-base and r = 512, 12 · 4 · 768 · 512 = 18.9 M weights. The authors' normalisations and the text's second way
through cross-attention are left out.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_kernels.adapters.base import Adapter
from peft_kernels.adapters.config import AdapterConfig, check_count, check_number
from peft_kernels.adapters.heads import named_state
from peft_kernels.adapters.state_files import Parts
from peft_kernels.adapters.targets import Match, find_targets
from peft_kernels.backend import Choice
from peft_kernels.layers.adapted_linear import AdaptedLinear
from peft_kernels.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class UniAdapterConfig(AdapterConfig):
    """rank: r, the width of the bottlenecks;  scale: of what they add
    and what every `AdapterConfig` has; targets: the linear layers that end attention and feed-forward parts
    """

    rank: int = 128
    scale: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        check_count(self.rank)
        check_number(self.scale, "scale")
        if self.targets is None and not PRESETS[self.preset].outputs:
            known = ", ".join(name for name, preset in PRESETS.items() if preset.outputs)
            raise ValueError(f"preset: expected one that knows where layers end: {known}; got {self.preset!r}")


class Bottleneck(nn.Module):
    """D and d of one depth and width, and U_m and u_m of each of its modalities; U_m and u_m start at zero."""

    def __init__(self, width: int, rank: int, modalities: Sequence[str], *, dtype=None, device=None):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.down = nn.Parameter(torch.empty(rank, width, **factory))
        self.down_bias = nn.Parameter(torch.empty(rank, **factory))
        self.up = nn.ParameterDict({m: nn.Parameter(torch.empty(width, rank, **factory)) for m in modalities})
        self.up_bias = nn.ParameterDict({m: nn.Parameter(torch.empty(width, **factory)) for m in modalities})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        for parameter in (self.down_bias, *self.up.values(), *self.up_bias.values()):
            nn.init.zeros_(parameter)

    def forward(self, y: Tensor, modality: str) -> Tensor:
        """(..., width) -> (..., width), in y's dtype"""
        y = y.to(self.down.dtype)
        return F.linear(F.relu(F.linear(y, self.down, self.down_bias)), self.up[modality], self.up_bias[modality])


class BottleneckLinear(AdaptedLinear):
    """Takes the place of `linear`; a bottleneck, which is the model's, adds to what comes out. It cannot be merged."""

    def __init__(self, linear: nn.Linear, bottleneck: Bottleneck, modality: str, *, scale: float, freeze: bool = True):
        super().__init__(linear, scale=scale, freeze=freeze)
        self.modality = modality
        self._bottleneck = (bottleneck,)  # in a tuple: the model's module, under one name, and not this layer's too

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)"""
        y = F.linear(x, self.weight, self.bias)
        return y + (self.scale * self._bottleneck[0](y, self.modality)).to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor, None]:
        raise ValueError("UniAdapter: a bottleneck with a ReLU is no update of a weight: no merge and no export")

    def backend_choice(self) -> Choice:
        return Choice("torch", "UniAdapter is a baseline in plain torch")

    def _describe(self) -> list[str]:
        return [f"rank={len(self._bottleneck[0].down)}", *super()._describe(), f"modality={self.modality}"]


class UniAdapter(Adapter):
    """Bottlenecks behind attention and feed-forward parts. See `Adapter` for what all methods do, but for merging.

    The model gets one new module, `uniadapter`, with the bottlenecks of each depth.
    """

    method = "uniadapter"
    config_class = UniAdapterConfig

    @classmethod
    def find(cls, model: nn.Module, config: UniAdapterConfig) -> list[Match]:
        if config.targets is None:
            config = replace(config, targets=PRESETS[config.preset].outputs)
        return find_targets(model, config)

    @classmethod
    def build(
        cls,
        model: nn.Module,
        config: UniAdapterConfig,
        matches: Sequence[Match],
        device: torch.device | str | None = None,
    ) -> Parts:
        if hasattr(model, "uniadapter"):
            raise ValueError("model: has an attribute 'uniadapter' already, the name of what this adapter adds")
        modalities: dict[str, dict[str, None]] = {}
        for match in matches:
            modalities.setdefault(_depth(match), {})[match.target.modality] = None
        bottlenecks, layers = nn.ModuleDict(), {}
        if read := [match.name for match in matches if match.target.reads_weight]:
            raise ValueError(f"targets: {read[0]} is not called, but its weight is read: there is no output to add to")
        for match in matches:
            weight, depth = match.linear.weight, _depth(match)
            if depth not in bottlenecks:
                factory = {"dtype": config.dtype_for(weight), "device": device or weight.device}
                bottlenecks[depth] = Bottleneck(weight.shape[0], config.rank, list(modalities[depth]), **factory)
            layers[match.name] = BottleneckLinear(
                match.linear, bottlenecks[depth], match.target.modality, scale=config.scale, freeze=False
            )
        return Parts(layers, {"uniadapter": bottlenecks})


def _depth(match: Match) -> str:
    """Equal for layers that share a D: the last number in their names, and their width."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", f".{match.name}.")
    return f"{numbers[-1] if numbers else 0}x{match.linear.out_features}"


@dataclass(frozen=True, kw_only=True)
class FullTuningConfig(AdapterConfig):
    """modules_to_save: what trains, by module or parameter name; None: all of it
    Nothing else of an `AdapterConfig` has a meaning here.
    """

    needs_targets = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("preset", "targets", "adapter_dtype"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: full tuning has no adapters; modules_to_save names parts of a model")


class FullTuning(Adapter):
    """All of a model, or named parts of it, train. See `Adapter` for what all methods do, but for merging."""

    method = "full"
    config_class = FullTuningConfig

    @classmethod
    def find(cls, model: nn.Module, config: FullTuningConfig) -> list[Match]:
        return []

    @classmethod
    def build(
        cls,
        model: nn.Module,
        config: FullTuningConfig,
        matches: Sequence[Match],
        device: torch.device | str | None = None,
    ) -> Parts:
        return Parts({}, {})

    @classmethod
    def find_heads(cls, model: nn.Module, config: FullTuningConfig, parts: Parts) -> list[str]:
        return list(named_state(model)) if config.modules_to_save is None else super().find_heads(model, config, parts)
