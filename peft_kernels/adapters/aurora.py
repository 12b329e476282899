"""Aurora (arXiv 2305.08381): every weight's update from one decomposition that all of them share.

docs/method.md, section 4 has the formulas, the authors' code (github.com/WillDreamer/Aurora) the released variants.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from peft_kernels.adapters.base import Adapter, Parts
from peft_kernels.adapters.config import AdapterConfig, check_count, check_number
from peft_kernels.adapters.gates import LayerGate, build_gates
from peft_kernels.adapters.targets import Match
from peft_kernels.checks import check_choice, check_flag, check_probability
from peft_kernels.cores import LAYOUTS
from peft_kernels.layers.adapted_linear import adapter_dtype_for
from peft_kernels.layers.gated_query import MODES as GATES
from peft_kernels.layers.mode_linear import DECOMPOSITIONS, Decomposition, ModeLinear, SharedCores
from peft_kernels.layers.per_pass import PerPass
from peft_kernels.layers.weight_read import ModeWeight
from peft_kernels.presets import PRESETS

SHARING = ("global", "modality", "none")
MOST_BLOCKS = 16  # of a weight; an MLP has 4, of some models 8
_RELEASED_TYPO = "text_proj"  # frozen in the released code


@dataclass(frozen=True, kw_only=True)
class AuroraConfig(AdapterConfig):
    """rank: R;  core: "cp" (the paper) | "tucker" (the released code);  layout: "blocks" | "released" (tucker)
    sharing: U, V, λ (or C) and P "global" (the paper) | by "modality" | "none": each layer its own
    scale: of the update;  dropout: in vision on the core's output, elsewhere on x U
    gates: None | "additive" | "gated": the gated query transformation, in the layers that the preset names
    released: as in the released code, the preset's head text_proj stays frozen
    and what every `AdapterConfig` has. Context enhancement is a step of training: `objectives.enhance_context`.
    """

    rank: int = 64
    core: str = "cp"
    layout: str = "blocks"
    sharing: str = "global"
    scale: float = 1.0
    dropout: float = 0.1
    gates: str | None = None
    released: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_count(self.rank)
        check_choice("core", self.core, DECOMPOSITIONS)
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("sharing", self.sharing, SHARING)
        check_number(self.scale, "scale")
        check_probability("dropout", self.dropout)
        check_choice("gates", self.gates, (None, *GATES))
        check_flag("released", self.released)
        if self.layout == "released" and self.core == "cp":
            raise ValueError("layout: 'released' is a layout of the tucker core")
        if self.gates is not None and (self.preset is None or PRESETS[self.preset].gates is None):
            known = ", ".join(name for name, preset in PRESETS.items() if preset.gates)
            raise ValueError(f"gates: expected a preset that knows the layers, one of {known}, got {self.preset!r}")


class Aurora(Adapter):
    """Mode approximation in every layer that the configuration names. See `Adapter` for what all methods do.

    The model gets one new module, `aurora`, with the decompositions: "shared", or one for each modality or layer.
    """

    method = "aurora"
    config_class = AuroraConfig

    def __init__(self, model: nn.Module, config: AuroraConfig, parts: Parts):
        super().__init__(model, config, parts)
        for layer, gate in self._gates().items():
            gate.attach(model.get_submodule(layer))

    @classmethod
    def build(
        cls,
        model: nn.Module,
        config: AuroraConfig,
        matches: Sequence[Match],
        device: torch.device | str | None = None,
    ) -> Parts:
        if hasattr(model, "aurora"):
            raise ValueError("model: has an attribute 'aurora' already, the name of what this adapter adds")
        scopes: dict[str, list[Match]] = {}
        for match in matches:
            scope = {"global": "shared", "modality": match.target.modality, "none": match.name.replace(".", "/")}
            scopes.setdefault(scope[config.sharing], []).append(match)
        decompositions, layers, hidden = nn.ModuleDict(), {}, {}
        for scope, members in scopes.items():
            blocks = [blocks_of(match) for match in members]
            widths = [(m.linear.in_features // i, m.linear.out_features // o) for m, (o, i) in zip(members, blocks)]
            fans = [(o * i, _fan(match, o * i)) for match, (o, i) in zip(members, blocks)]
            dtype, place = _factory(members, config)
            decomposition = Decomposition(widths, fans, config.rank, config.core, dtype=dtype, device=device or place)
            decompositions[scope] = decomposition
            cores: dict[str, SharedCores] = {}
            first = 0
            for match, (out_blocks, in_blocks), width in zip(members, blocks, widths):
                vision = match.target.modality == "vision"
                fused = match.target.projections > 1
                layers[match.name] = (ModeWeight if match.target.reads_weight else ModeLinear)(
                    match.linear,
                    cores.setdefault(_tower(match), SharedCores(decomposition)),
                    first,
                    hidden=hidden.setdefault((scope, width, reading_of(match)), PerPass()),
                    out_blocks=out_blocks,
                    in_blocks=in_blocks,
                    layout="blocks" if fused else config.layout,
                    scale=config.scale,
                    dropout_p=config.dropout,
                    dropout_on="core" if vision else "rank",
                    backend=config.backend,
                    freeze=False,
                )
                first += out_blocks * in_blocks
        layers = {match.name: layers[match.name] for match in matches}
        gates = {}
        if config.gates is not None:
            options = {"backend": config.backend, "dtype_for": config.dtype_for, "device": device}
            gates = build_gates(model, config.gates, PRESETS[config.preset].gates, **options)
        return Parts(layers, {"aurora": decompositions, **gates})

    @classmethod
    def find_heads(cls, model: nn.Module, config: AuroraConfig, parts: Parts) -> list[str]:
        heads = super().find_heads(model, config, parts)
        typo = config.released and config.modules_to_save is None
        return [head for head in heads if not (typo and f".{_RELEASED_TYPO}." in f".{head}")]

    def _gates(self) -> dict[str, LayerGate]:
        """By the names of the layers they stand in."""
        return {n.rpartition(".")[0]: module for n, module in self.modules.items() if isinstance(module, LayerGate)}

    def remove(self) -> nn.Module:
        gates = self._gates()
        model = super().remove()
        for gate in gates.values():
            gate.detach()
        return model

    def export_lora(self, folder: str | os.PathLike, leave_out_gates: bool = False) -> None:
        """As every adapter's. Gates are no LoRA: with them it raises ValueError, unless told to leave them out."""
        if self._gates() and not leave_out_gates:
            raise ValueError("export_lora: gates are no LoRA; leave_out_gates=True exports the linear layers alone")
        super().export_lora(folder)


def blocks_of(match: Match) -> tuple[int, int]:
    """(O, I): as many slots as projections are fused, or as fc1 is times as high as wide, fc2 as wide as high.

    Keys and values of another modality are one slot, whatever its width; so is a head that is many times as wide as
    high, whose x U would be larger than x.
    """
    out, columns = match.linear.out_features, match.linear.in_features
    if match.target.projections > 1 or match.target.input == "context":
        return match.target.projections, 1
    if max(out, columns) > MOST_BLOCKS * min(out, columns):
        return 1, 1
    if out % columns == 0:
        return out // columns, 1
    return (1, columns // out) if columns % out == 0 else (1, 1)


def _factory(members: Sequence[Match], config: AuroraConfig) -> tuple[torch.dtype, torch.device]:
    """Of the factors that these layers share; float32 serves weights of several half precisions."""
    dtypes = {adapter_dtype_for(match.linear, config.dtype_for(match.linear.weight)) for match in members}
    devices = {str(match.linear.weight.device): match.linear.weight.device for match in members}
    if len(devices) > 1:
        raise ValueError(f"sharing: layers on {' and '.join(sorted(devices))} cannot share factors; take 'none'")
    return dtypes.pop() if len(dtypes) == 1 else torch.float32, *devices.values()


def _fan(match: Match, slots: int) -> int:
    """What the released code's initialisation of p counts: 4 for a vision layer's attention, 8 for its fc1 and fc2."""
    if match.target.modality != "vision":
        return slots
    return 8 if slots > 1 and match.target.projections == 1 else 4


def _tower(match: Match) -> str:
    """Towers may run, and free their graphs, one without the other."""
    return match.tower.partition("*")[0]


def reading_of(match: Match) -> tuple:
    """Equal for layers that read the same tensor: siblings; for the context of cross-attention, whole stacks."""
    if match.target.modality == "cross" and match.target.input == "context":
        return match.tower, "context"
    return match.siblings
