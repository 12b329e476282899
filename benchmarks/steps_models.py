"""What steps.py trains: BLIP-base and ViLT-B with random weights, their batches and losses.

    BLIP     image-text matching: 384 × 384 pixels in patches of 16, 577 image tokens that 35 of text look at
    ViLT     question answering with 3,129 answers: 384 × 384 pixels in patches of 32, 145 image tokens with 40 of text

Shapes are those of the published checkpoints, from transformers' configurations; every second text is five tokens
short. Both are run by their own parts, without what no CUDA graph can hold: the masks, for which the host waits for
values, are made once, and ViLT's draw of patches, which changes nothing but their order, is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHORTER = 5  # tokens that every second text has less


@dataclass(frozen=True)
class Size:
    """ranks: of LoRA, of Aurora, and of MoIL's pairs and transforms;  compiler: of torch.compile"""

    width: int
    layers: int
    heads: int
    pixels: int
    words: int
    answers: int
    ranks: tuple[int, int, int]
    compiler: str = "inductor"


# The tiny one is for tests: what it compiles is traced, and no code is made of it.
SIZES = {
    "base": Size(768, 12, 12, 384, 30524, 3129, (16, 64, 96)),
    "tiny": Size(32, 2, 2, 64, 40, 10, (4, 4, 4), "aot_eager"),
}


class Batch(NamedTuple):
    """mask: (B, tokens), 1 for real ones;  padding: (B, 1, 1, tokens), what attention adds;  targets: of the loss"""

    words: Tensor
    mask: Tensor
    padding: Tensor
    pixels: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Model:
    """preset: of LoRA and MoIL;  aurora: Aurora's preset and gates;  heads: modules that train whole, with every method
    lr: of adapters, and of methods that train whole weights: four steps shall change the loss, and not end at 0
    layers: the classes of what is compiled;  embeddings: what gives the first of them their input
    """

    title: str
    preset: str
    aurora: dict[str, Any]
    heads: tuple[str, ...]
    layers: tuple[str, ...]
    embeddings: tuple[str, ...]
    tokens: int
    lr: tuple[float, float]
    configured: Callable[[Size], nn.Module]
    logits: Callable[[nn.Module, Batch], Tensor]
    targets: Callable[[Size, int], Tensor]
    criterion: Callable[[Tensor, Tensor], Tensor]  # of float32 logits and targets

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.criterion(self.logits(model, batch).float(), batch.targets)

    def build(self, size: Size, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Filled where it is to be, the same every time: transformers' initialisation takes seconds on a CPU."""
        with torch.device("meta"):
            model = self.configured(size)
        model = model.to(dtype).to_empty(device=device)
        draw = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for module in model.modules():
                for name, p in module.named_parameters(recurse=False):
                    if p.dim() > 1:
                        fan_in = p[0].numel() if isinstance(module, nn.Conv2d) else p.shape[-1]
                        p.normal_(std=fan_in**-0.5, generator=draw)
                    else:
                        p.fill_(isinstance(module, nn.LayerNorm) and name == "weight")
            for name, buffer in model.named_buffers():
                positions = name.endswith("position_ids")
                buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer)) if positions else buffer.zero_()
        return model

    def batch(self, size: Size, count: int, device: torch.device, dtype: torch.dtype) -> Batch:
        draw = torch.Generator().manual_seed(0)
        words = torch.randint(5, size.words, (count, self.tokens), generator=draw)
        mask = torch.ones_like(words)
        mask[1::2, -SHORTER:] = 0
        padding = (1 - mask)[:, None, None].to(dtype) * torch.finfo(dtype).min
        pixels = torch.randn(count, 3, size.pixels, size.pixels, generator=draw).to(dtype)
        return Batch(*(each.to(device) for each in (words, mask, padding, pixels, self.targets(size, count))))


def own_logits(model: nn.Module, batch: Batch) -> Tensor:
    """By the model's own forward."""
    result = model(input_ids=batch.words, attention_mask=batch.mask, pixel_values=batch.pixels)
    return result.itm_score if hasattr(result, "itm_score") else result.logits


def _tower(size: Size) -> dict[str, int]:
    sizes = {"hidden_size": size.width, "intermediate_size": 4 * size.width}
    return {**sizes, "num_hidden_layers": size.layers, "num_attention_heads": size.heads}


def _blip(size: Size) -> nn.Module:
    import transformers as hf

    special = {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0}
    text = {**_tower(size), **special, "vocab_size": size.words, "encoder_hidden_size": size.width}
    image = {**_tower(size), "image_size": size.pixels, "patch_size": 16}
    return hf.BlipForImageTextRetrieval(hf.BlipConfig(text_config=text, vision_config=image))


def _blip_logits(model: nn.Module, batch: Batch) -> Tensor:
    states = model.vision_model(pixel_values=batch.pixels).last_hidden_state
    fused = model.text_encoder(input_ids=batch.words, attention_mask=batch.padding, encoder_hidden_states=states)
    return model.itm_head(fused.last_hidden_state[:, 0])


def _vilt(size: Size) -> nn.Module:
    import transformers as hf

    image = {"image_size": size.pixels, "patch_size": 32, "max_image_length": -1}
    config = hf.ViltConfig(**_tower(size), **image, vocab_size=size.words, num_labels=size.answers)
    return hf.ViltForQuestionAnswering(config)


def _vilt_logits(model: nn.Module, batch: Batch) -> Tensor:
    vilt, parts = model.vilt, model.vilt.embeddings
    patches = parts.patch_embeddings(batch.pixels).flatten(2).transpose(1, 2)
    patches = torch.cat([parts.cls_token.expand(len(patches), -1, -1), patches], dim=1) + parts.position_embeddings
    seen = batch.mask.new_ones(patches.shape[:2])
    states, _ = parts(batch.words, batch.mask, None, None, seen, None, patches)
    padding = F.pad(batch.padding, (0, patches.shape[1]))  # of the text, which comes first
    states = vilt.encoder(states, attention_mask=padding).last_hidden_state
    return model.classifier(vilt.pooler(vilt.layernorm(states)))


def _answers(size: Size, count: int) -> Tensor:
    """Soft ones, as VQA has."""
    return torch.rand(count, size.answers, generator=torch.Generator().manual_seed(1))


MODELS = {
    "blip": Model(
        title="BLIP-base",
        preset="blip",
        aurora={"preset": "blip-retrieval", "gates": "additive"},
        heads=("itm_head",),
        layers=("BlipEncoderLayer", "BlipTextLayer"),
        embeddings=("vision_model.embeddings", "text_encoder.embeddings"),
        tokens=35,
        lr=(1e-5, 1e-6),
        configured=_blip,
        logits=_blip_logits,
        targets=lambda size, count: torch.arange(count) % 2,
        criterion=F.cross_entropy,
    ),
    "vilt": Model(
        title="ViLT-B",
        preset="vilt",
        aurora={"preset": "vilt"},
        heads=("classifier",),
        layers=("ViltLayer",),
        embeddings=("vilt.embeddings",),
        tokens=40,
        lr=(1e-4, 1e-4),
        configured=_vilt,
        logits=_vilt_logits,
        targets=_answers,
        criterion=lambda logits, answers: F.binary_cross_entropy_with_logits(logits, answers) * logits.shape[1],
    ),
}
