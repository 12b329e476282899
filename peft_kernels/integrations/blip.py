"""BLIP in transformers (4.57 to 5.24) drops the mask of what cross-attention reads: padding of questions is read, too.

Its attention block gets the mask as `attention_mask` and hands it to `crossattention.self` under that name, where only
`encoder_attention_mask` counts. An answer then depends on how long the other questions of its batch are.
"""

from typing import Any

from torch import nn


def hand_on_encoder_masks(model: nn.Module) -> None:
    """Let cross-attention leave out what `encoder_attention_mask` leaves out, as in BLIP's own code; once is enough.

    model: a BLIP of transformers, or a part with its layers, adapted or not. It is changed by hooks, in place.
    `BlipForQuestionAnswering.generate` makes a mask of ones by itself: give the question's to `text_decoder.generate`.
    Raises ValueError where no layer has cross-attention.
    """
    found = [layer.crossattention.self for layer in model.modules() if hasattr(layer, "crossattention")]
    if not found:
        raise ValueError("model: expected a BLIP with cross-attention, found none")
    for attention in found:
        if _hand_on not in attention._forward_pre_hooks.values():
            attention.register_forward_pre_hook(_hand_on, with_kwargs=True)


def _hand_on(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if kwargs.get("encoder_hidden_states") is not None and kwargs.get("encoder_attention_mask") is None:
        kwargs = {**kwargs, "encoder_attention_mask": kwargs.get("attention_mask")}
    return args, kwargs
