"""LoRA (arXiv 2106.09685) with the meaning it has in the peft library, on the fused layers of this package."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft_kernels.adapters.base import Adapter, Parts
from peft_kernels.adapters.config import AdapterConfig, check_count, check_flag, check_number
from peft_kernels.adapters.lora_files import StockLora
from peft_kernels.adapters.targets import Match, nearest
from peft_kernels.checks import check_choice, check_probability
from peft_kernels.layers.lowrank_linear import INITS, LowRankLinear


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """rank: r;  alpha: the update is scaled by alpha / r, or alpha / √r with rslora (arXiv 2312.03732)
    dropout: of the update's input;  init: "kaiming" | "gaussian", of A; B starts at zero
    rank_pattern, scale_pattern: other ranks and scales by whole module name
    and what every `AdapterConfig` has
    """

    rank: int = 8
    alpha: float = 8.0
    rslora: bool = False
    dropout: float = 0.0
    init: str = "kaiming"
    rank_pattern: dict[str, int] | None = None
    scale_pattern: dict[str, float] | None = None

    def __post_init__(self):
        super().__post_init__()
        check_count(self.rank)
        check_number(self.alpha, "alpha")
        check_flag(self.rslora, "rslora")
        check_probability("dropout", self.dropout)
        check_choice("init", self.init, INITS)
        for name, check in (("rank_pattern", check_count), ("scale_pattern", check_number)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise TypeError(f"{name}: expected a dictionary by module name, got {value!r}")
            for module, own in (value or {}).items():
                check(own, f"{name}[{module!r}]")

    def layer(self, name: str) -> tuple[int, float]:
        """(rank, scale) of a module."""
        rank = (self.rank_pattern or {}).get(name, self.rank)
        scale = self.alpha / (math.sqrt(rank) if self.rslora else rank)
        return rank, (self.scale_pattern or {}).get(name, scale)


class LoRA(Adapter):
    """weight + alpha / r · B A in every layer that the configuration names. See `Adapter` for what all methods do."""

    method = "lora"
    config_class = LoRAConfig

    @classmethod
    def build(
        cls,
        model: nn.Module,
        config: LoRAConfig,
        matches: Sequence[Match],
        device: torch.device | str | None = None,
    ) -> Parts:
        layers = {}
        names = [match.name for match in matches]
        for patterns in (config.rank_pattern, config.scale_pattern):
            for name in set(patterns or ()) - set(names):
                raise ValueError(f"rank_pattern, scale_pattern: {name!r} gets no adapter; {nearest([name], names)}")
        for match in matches:
            rank, scale = config.layer(match.name)
            layers[match.name] = LowRankLinear(
                match.linear,
                rank,
                scale=scale,
                dropout_p=config.dropout,
                dropout_on="input",
                init=config.init,
                adapter_dtype=config.dtype_for(match.linear.weight),
                backend=config.backend,
                freeze=False,
                device=device,
            )
        return Parts(layers, {})

    @classmethod
    def from_peft(cls, model: nn.Module, folder: str | os.PathLike, **options: Any) -> "LoRA":
        """Adapt `model` by a LoRA checkpoint of the peft library, heads included.

        options: of LoRAConfig: backend, adapter_dtype, dropout
        Raises FileNotFoundError, ValueError or TypeError, naming the file and what in it is not a LoRA of nn.Linear
        layers (DoRA, trained biases, embeddings, initialisations that change the base, …); the model is unchanged then.
        """
        cls._check(model, None)
        stock = StockLora(folder)
        named = dict(model.named_modules())
        if missing := [name for name in stock.ranks if not isinstance(named.get(name), nn.Linear)]:
            raise ValueError(f"model: has no nn.Linear named {missing[0]}, as {stock.path} asks for")
        options = {"dropout": stock.dropout, **options}
        config = LoRAConfig(
            targets="|".join(re.escape(name) for name in stock.ranks),
            modules_to_save=stock.heads,
            rank_pattern=stock.ranks,
            scale_pattern=stock.scales,
            **options,
        )
        return cls._filled(model, config, cls.find(model, config), stock)
