"""Where Aurora's gated query transformation stands: at the end of BLIP's text and fusion layers."""

import re
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from peft_kernels.layers.gated_query import GatedQuery

NAME = "gated_query"  # of the new module in each layer
_running = threading.local()  # what the attention blocks gave, of the layer that this thread is in


class LayerGate(GatedQuery):
    """A GatedQuery that takes what it needs from the layer it stands in, by hooks; only where cross-attention ran.

    All hooks are on the layer's parts: activation checkpointing recomputes the layer's forward, and no hook on it.
    """

    def attach(self, layer: nn.Module) -> None:
        self._hooks = [
            layer.attention.register_forward_hook(self._see_text, with_kwargs=True),
            layer.crossattention.register_forward_hook(self._see_cross),
            layer.output.register_forward_hook(self._gate),
        ]

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see_text(self, attention: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
        """The layer's first part, so that nothing is left of one that did not come to its end."""
        _running.seen = {"text": _first(output), "mask": args[1] if len(args) > 1 else kwargs.get("attention_mask")}

    def _see_cross(self, crossattention: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        getattr(_running, "seen", {})["cross"] = _first(output)

    def _gate(self, output: nn.Module, args: tuple, hidden: Tensor) -> Tensor | None:
        seen, _running.seen = getattr(_running, "seen", {}), {}
        if len(seen) < 3:  # no cross-attention, or a part of the layer was called alone
            return None
        mask = seen["mask"] if self.mode == "gated" else None
        return self(hidden, seen["text"], seen["cross"], None if mask is None else _real_tokens(mask, hidden))


def _first(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _real_tokens(mask: Tensor, hidden: Tensor) -> Tensor:
    """(B, S), True for real tokens, of an attention mask (B, 1, 1 or S, S): boolean, or 0 where attention may go."""
    seen = mask if mask.dtype == torch.bool else mask == 0
    return seen.flatten(1, -2).any(1).expand(hidden.shape[:2])


def build_gates(
    model: nn.Module,
    mode: str,
    pattern: str,
    *,
    backend: str,
    dtype_for: Callable[[Tensor], torch.dtype],
    device: torch.device | str | None,
) -> dict[str, LayerGate]:
    """One for each layer that `pattern` matches, by the names that they get.

    Raises ValueError where there is no such layer or its feed-forward part runs in chunks, and for "gated", which mixes
    positions, in a causal decoder.
    """
    gates = {}
    for name, layer in model.named_modules():
        if not re.fullmatch(pattern, name) or not hasattr(layer, "crossattention"):
            continue
        if mode == "gated" and "text_decoder" in name:
            raise ValueError(f"gates: 'gated' mixes positions, and {name} is part of a causal decoder; take 'additive'")
        if getattr(layer, "chunk_size_feed_forward", 0):
            raise ValueError(f"gates: {name} runs its feed-forward part in chunks; set chunk_size_feed_forward to 0")
        weight = layer.output.dense.weight
        gates[f"{name}.{NAME}"] = LayerGate(
            weight.shape[0], mode, backend=backend, dtype=dtype_for(weight), device=device or weight.device
        )
    if not gates:
        raise ValueError("gates: the model has no layer with cross-attention where the preset looks for it")
    return gates
