"""LoRA (arXiv 2106.09685) with the meaning it has in the peft library, on the fused layers of this package."""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from peft_kernels.adapters.base import Adapter, Parts
from peft_kernels.adapters.config import (
    AdapterConfig,
    by_pattern,
    check_count,
    check_number,
    check_patterns,
    matches_end,
)
from peft_kernels.adapters.lora_files import StockLora
from peft_kernels.adapters.targets import Match, nearest
from peft_kernels.checks import check_choice, check_flag, check_probability
from peft_kernels.layers.lowrank_linear import INITS, LowRankLinear
from peft_kernels.layers.weight_read import LowRankWeight


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """rank: r;  alpha: the update is scaled by alpha / r, or alpha / √r with rslora (arXiv 2312.03732)
    dropout: of the update's input;  init: "kaiming" | "gaussian", of A; B starts at zero
    rank_pattern, alpha_pattern: other ranks and alphas by module name, or as in peft by an expression for its end
    scale_pattern: other scales, instead of those of alpha and rank, likewise
    and what every `AdapterConfig` has
    """

    rank: int = 8
    alpha: float = 8.0
    rslora: bool = False
    dropout: float = 0.0
    init: str = "kaiming"
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    scale_pattern: dict[str, float] | None = None

    def __post_init__(self):
        super().__post_init__()
        check_count(self.rank)
        check_number(self.alpha, "alpha")
        check_flag("rslora", self.rslora)
        check_probability("dropout", self.dropout)
        check_choice("init", self.init, INITS)
        for name, check in self._patterns().items():
            check_patterns(getattr(self, name), name, check)

    @staticmethod
    def _patterns() -> dict[str, Callable[[object, str], None]]:
        return {"rank_pattern": check_count, "alpha_pattern": check_number, "scale_pattern": check_number}

    def layer(self, name: str) -> tuple[int, float]:
        """(rank, scale) of a module."""
        rank = by_pattern(self.rank_pattern, name, self.rank)
        alpha = by_pattern(self.alpha_pattern, name, self.alpha)
        return rank, by_pattern(self.scale_pattern, name, alpha / (math.sqrt(rank) if self.rslora else rank))

    def check_patterns_match(self, names: Sequence[str]) -> None:
        """Raises ValueError for a pattern that none of the adapted modules' names match."""
        for field in self._patterns():
            for pattern in getattr(self, field) or ():
                if not any(matches_end(pattern, name) for name in names):
                    raise ValueError(f"{field}: {pattern!r} gets no adapter; {nearest([pattern], names)}")


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
        config.check_patterns_match([match.name for match in matches])
        for match in matches:
            rank, scale = config.layer(match.name)
            kind = LowRankWeight if match.target.reads_weight else LowRankLinear
            layers[match.name] = kind(
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
    def from_peft(
        cls,
        model: nn.Module,
        folder: str | os.PathLike,
        *,
        backend: str = "auto",
        adapter_dtype: str | None = None,
        dropout: float | None = None,
        group: bool = True,
        stack: bool = False,
        recompute: bool = True,
    ) -> "LoRA":
        """Adapt `model` by a LoRA checkpoint of the peft library, heads included.

        folder: a local one, with adapter_model.safetensors;  dropout: None: the checkpoint's
        backend, adapter_dtype, group, stack, recompute: as in LoRAConfig
        Base weights that the checkpoint brings, of embeddings that were resized, go into the model, as in peft.
        Raises FileNotFoundError, ValueError or TypeError, naming the file and what in it is not a LoRA of nn.Linear
        layers (DoRA, trained biases, embeddings, initialisations that change the base, …); the model is unchanged then.
        """
        cls._check(model, None)
        stock = StockLora(folder)
        named = dict(model.named_modules())
        if missing := [name for name in stock.ranks if not isinstance(named.get(name), nn.Linear)]:
            raise ValueError(f"model: has no nn.Linear named {missing[0]}, as {stock.path} asks for")
        bases, base_values = stock.base_parameters(model), stock.base_values()
        config = LoRAConfig(
            targets="|".join(re.escape(name) for name in stock.ranks),
            modules_to_save=stock.heads,
            rank_pattern=stock.ranks,
            scale_pattern=stock.scales,
            dropout=stock.dropout if dropout is None else dropout,
            backend=backend,
            adapter_dtype=adapter_dtype,
            group=group,
            stack=stack,
            recompute=recompute,
        )
        adapter = cls._filled(model, config, cls.find(model, config), stock)
        with torch.no_grad():
            for name, parameter in bases.items():
                parameter.copy_(base_values[name])
        return adapter
