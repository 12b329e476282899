"""Tiny random vision-language models of transformers, built from configurations, with inputs and losses.

`MODELS[kind]()` gives (model, batch): `model(**batch)` runs; `output(model, batch)` is one tensor of it, and
`loss(model, batch)` a task loss. Everything is seeded, in float32, on the CPU, without dropout unless asked for.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers as hf

hf.logging.set_verbosity_error()

SIZE, PATCH, TEXT, BATCH = 32, 16, 7, 3
_TEXT = {"num_hidden_layers": 2, "num_attention_heads": 2}


def _tokens(vocabulary: int = 40) -> dict[str, Tensor]:
    ids = torch.randint(5, vocabulary, (BATCH, TEXT))
    mask = torch.ones(BATCH, TEXT, dtype=torch.long)
    mask[1, 5:] = 0  # padding
    return {"input_ids": ids, "attention_mask": mask}


def _pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, SIZE, SIZE)}


def blip_config(dropout: float = 0.0, vision: int = 16, layers: int = 2) -> hf.BlipConfig:
    """vision: the image width, 16 as the text's; another one gives rectangular cross-attention."""
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    text = {"hidden_size": 16, "intermediate_size": 64, "vocab_size": 40, **_TEXT, **drop}
    text |= {"encoder_hidden_size": vision}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 2, "num_hidden_layers": layers}
    image = {"hidden_size": vision, "intermediate_size": 4 * vision, "num_hidden_layers": layers}
    image |= {"num_attention_heads": 2, "image_size": SIZE, "patch_size": PATCH}
    image |= {"initializer_range": 0.02}  # with BLIP's own, 1e-10, no image would matter
    return hf.BlipConfig(text_config=text, vision_config=image, image_text_hidden_size=8, projection_dim=8)


def blip_retrieval(**options) -> tuple[nn.Module, dict]:
    return hf.BlipForImageTextRetrieval(blip_config(**options)), {**_tokens(), **_pixels()}


def blip_vqa(**options) -> tuple[nn.Module, dict]:
    labels = torch.randint(5, 40, (BATCH, 4))
    batch = {**_tokens(), **_pixels(), "labels": labels, "decoder_input_ids": labels}
    return hf.BlipForQuestionAnswering(blip_config(**options)), batch


def blip_captioning(**options) -> tuple[nn.Module, dict]:
    batch = {**_tokens(), **_pixels()}
    return hf.BlipForConditionalGeneration(blip_config(**options)), {**batch, "labels": batch["input_ids"]}


def _vilt_config(dropout: float = 0.0, **more) -> hf.ViltConfig:
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    sizes = {"hidden_size": 16, "intermediate_size": 64, "image_size": SIZE, "patch_size": PATCH, "vocab_size": 40}
    return hf.ViltConfig(**{**sizes, **_TEXT, **drop, "max_image_length": -1, **more})


def vilt_vqa(**options) -> tuple[nn.Module, dict]:
    model = hf.ViltForQuestionAnswering(_vilt_config(num_labels=4, **options))
    return model, {**_tokens(), **_pixels(), "labels": torch.eye(4)[: BATCH]}


def vilt_retrieval(**options) -> tuple[nn.Module, dict]:
    return hf.ViltForImageAndTextRetrieval(_vilt_config(**options)), {**_tokens(), **_pixels()}


def bridgetower() -> tuple[nn.Module, dict]:
    text = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 40, **_TEXT, "hidden_dropout_prob": 0.0}
    text |= {"attention_probs_dropout_prob": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    image = {"hidden_size": 64, "num_hidden_layers": 2, "image_size": SIZE, "patch_size": PATCH}
    config = hf.BridgeTowerConfig(
        hidden_size=64, intermediate_size=128, **_TEXT, text_config=text, vision_config=image, hidden_dropout_prob=0.0
    )
    return hf.BridgeTowerForImageAndTextRetrieval(config), {**_tokens(), **_pixels()}


def visualbert() -> tuple[nn.Module, dict]:
    sizes = {"hidden_size": 16, "intermediate_size": 64, "vocab_size": 40, "visual_embedding_dim": 12, "num_labels": 4}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = hf.VisualBertForQuestionAnswering(hf.VisualBertConfig(**sizes, **_TEXT, **drop))
    regions = {"visual_embeds": torch.randn(BATCH, 5, 12), "visual_attention_mask": torch.ones(BATCH, 5)}
    regions["visual_token_type_ids"] = torch.ones(BATCH, 5, dtype=torch.long)
    return model, {**_tokens(), **regions, "labels": torch.eye(4)[: BATCH]}


def lxmert() -> tuple[nn.Module, dict]:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 64, "visual_feat_dim": 12}
    layers = {"l_layers": 1, "x_layers": 2, "r_layers": 1, "vocab_size": 40, "num_qa_labels": 4}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    regions = {"visual_feats": torch.randn(BATCH, 5, 12), "visual_pos": torch.rand(BATCH, 5, 4)}
    model = hf.LxmertForQuestionAnswering(hf.LxmertConfig(**sizes, **layers, **drop))
    return model, {**_tokens(), **regions, "labels": torch.arange(BATCH)}


def clip() -> tuple[nn.Module, dict]:
    sizes = {"hidden_size": 16, "intermediate_size": 64, **_TEXT}
    text = {**sizes, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = hf.CLIPConfig(
        text_config=text, vision_config={**sizes, "image_size": SIZE, "patch_size": PATCH}, projection_dim=8
    )
    return hf.CLIPModel(config), {**_tokens(), **_pixels(), "return_loss": True}


MODELS: dict[str, Callable[..., tuple[nn.Module, dict]]] = {
    each.__name__: each
    for each in (
        *(blip_retrieval, blip_vqa, blip_captioning, vilt_vqa, vilt_retrieval),
        *(bridgetower, visualbert, lxmert, clip),
    )
}
# The preset of MoIL and LoRA, and Aurora's
PRESET = {
    **dict.fromkeys(("blip_retrieval", "blip_vqa", "blip_captioning"), "blip"),
    **dict.fromkeys(("vilt_vqa", "vilt_retrieval"), "vilt"),
    **{name: name for name in ("bridgetower", "visualbert", "lxmert", "clip")},
}


def build(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options) -> tuple[nn.Module, dict]:
    """A model in evaluation mode, and a batch for it. options: of the builder."""
    torch.manual_seed(seed)
    model, batch = MODELS[kind](**options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):  # the usual 0.02 hides what an adapter does behind rounding
                module.weight.mul_(10)
    batch = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    return model.to(dtype).eval(), batch


def output(model: nn.Module, batch: dict) -> Tensor:
    """One tensor of the model's result. ViLT draws the order of its patches: every call draws the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = model(**batch)
    if isinstance(model, hf.BlipForQuestionAnswering):
        return result.loss[None]
    for name in ("itm_score", "logits", "logits_per_image", "question_answering_score"):
        value = getattr(result, name, None)
        if value is not None:
            return value
    raise KeyError(list(result))


def loss(model: nn.Module, batch: dict) -> Tensor:
    """The model's own task loss, or else the cross-entropy of its scores against 1, 0, 1, …"""
    with torch.random.fork_rng(devices=[], enabled=not model.training):
        if not model.training:
            torch.manual_seed(0)
        result = model(**batch)
    if getattr(result, "loss", None) is not None:
        return result.loss
    scores = output(model, batch)
    if scores.shape[-1] == 1:
        scores = torch.cat([torch.zeros_like(scores), scores], dim=-1)
    return nn.functional.cross_entropy(scores.float(), (torch.arange(len(scores)) + 1) % 2)
