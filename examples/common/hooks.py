"""What the BLIP of Aurora's release does in training and transformers' does not, as hooks on its modules.

    drop-path               a branch of a vision layer is left out for some of the images (CP/vit.py)
    frame-aware attention   a text reads more of the frames that are like it (CP/med.py)

The files are those of github.com/WillDreamer/Aurora.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class DropPath:
    """Stochastic depth (arXiv 1603.09382), in training: image b's branch is 0 with probability p, else over 1 − p."""

    def __init__(self, p: float):
        self.p = p

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not module.training or self.p == 0:
            return output
        branch, *rest = output if isinstance(output, tuple) else (output,)
        kept = branch.new_empty(len(branch), *[1] * (branch.dim() - 1)).bernoulli_(1 - self.p) / (1 - self.p)
        return (branch * kept, *rest) if isinstance(output, tuple) else branch * kept


def add_drop_path(model: nn.Module, most: float) -> None:
    """p rises evenly from 0 in the first vision layer to `most` in the last one."""
    layers = model.vision_model.encoder.layers
    for layer, p in zip(layers, torch.linspace(0, most, len(layers)).tolist()):
        for branch in (layer.self_attn, layer.mlp):
            branch.register_forward_hook(DropPath(p))


@torch.no_grad()
def frame_weights(text: Tensor, frames: Tensor) -> Tensor:
    """text: (B, e), frames: (B, F, e), both of length 1 -> (B, F): F · softmax over frames of their similarity / 4"""
    similarity = torch.einsum("be,bfe->bf", text.float(), frames.float())
    return (similarity / 4).softmax(dim=1) * frames.shape[1]


@contextmanager
def frame_aware(model: nn.Module, weights: Tensor | None) -> Iterator[None]:
    """Inside, keys of cross-attention are those of frame f times weights[:, f], but for each frame's first, its [CLS].

    weights: (B, F); None: nothing is done
    """

    def weigh(module: nn.Module, inputs: Any, key: Tensor) -> Tensor:
        key = key.unflatten(1, (weights.shape[1], -1))
        patches = key[:, :, 1:] * weights[:, :, None, None].to(key.dtype)
        return torch.cat([key[:, :, :1], patches], dim=2).flatten(1, 2)

    keys = [m for name, m in model.text_encoder.named_modules() if name.endswith("crossattention.self.key")]
    hooks = [] if weights is None else [key.register_forward_hook(weigh) for key in keys]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
