"""What models of several towers and other libraries name alike, and mean differently."""

import warnings

import adapter_models
import pytest
import torch
from adapter_cases import assert_unchanged, snapshot
from torch import nn

from peft_kernels.adapters import LoRA, LoRAConfig

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 16}


@pytest.mark.parametrize("preset", ["clip", "vit"])
def test_the_pooling_head_of_siglip_stays_as_it_was_trained(preset):
    """It is called `head`, as timm's classifier is."""
    hf = adapter_models.hf
    model = hf.SiglipForImageClassification(hf.SiglipConfig(text_config=SIZES, vision_config=IMAGE, num_labels=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = LoRA.wrap(model, LoRAConfig(preset=preset, rank=2))
        vision = hf.SiglipVisionModel(hf.SiglipVisionConfig(**IMAGE))
        LoRA.wrap(vision, LoRAConfig(targets=["q_proj"], rank=2))
    assert len(adapter.layers) == 6 and not any(".head." in name for name in adapter.heads)


@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPVisionModel"])
def test_one_tower_of_clip(kind):
    """transformers 5 names its layers as if they were a whole model."""
    whole = adapter_models.clip()[0].config
    config = whole.text_config if "Text" in kind else whole.vision_config
    adapter = LoRA.wrap(getattr(adapter_models.hf, kind)(config), LoRAConfig(preset="clip", rank=2))
    assert len(adapter.layers) == 6


class Attention(nn.Module):
    """As in BEiT, and in timm's."""

    def __init__(self, separate: bool):
        super().__init__()
        self.qkv, self.qkv_bias_separate = nn.Linear(8, 24, bias=False), separate
        self.q_bias = nn.Parameter(torch.zeros(8))


def test_biases_that_are_added_past_the_layer():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attn": Attention(False)})])})
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^targets: blocks.0.attn.qkv is part of a Attention that reads its weight"):
        LoRA.wrap(model, LoRAConfig(preset="vit", rank=2))
    assert_unchanged(model, before)
    model["blocks"][0]["attn"] = Attention(True)
    assert len(LoRA.wrap(model, LoRAConfig(preset="vit", rank=2)).layers) == 1


def test_no_layer_is_suggested_that_would_be_refused():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match=r"nearest: mlp; peft adapts an nn.MultiheadAttention"):
        LoRA.wrap(model, LoRAConfig(preset="vit", rank=2))
