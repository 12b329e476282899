"""BLIP in transformers, part by part, and its adapters. An image is a video of one frame everywhere here.

Sizes: B examples, F frames, S states of a frame (patches and [CLS]), T tokens, d features, e of an embedding.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoProcessor, BlipConfig

from common.augment import Augment
from common.data import Example, fail, field, read_json
from common.hooks import add_drop_path
from peft_kernels import Adapter, Aurora, AuroraConfig, LoRA, LoRAConfig, MoIL
from peft_kernels.adapters.config import AdapterConfig
from peft_kernels.integrations.blip import hand_on_encoder_masks
from peft_kernels.objectives import video_embedding

METHODS: dict[str, type[Adapter]] = {"aurora": Aurora, "lora": LoRA, "moil": MoIL}
MAX_TOKENS = 35
FLAG = argparse.BooleanOptionalAction


def add_options(options: argparse.ArgumentParser, preset: str, augment: bool = True) -> None:
    """preset, augment: the defaults"""
    add = options.add_argument
    add("--method", choices=("aurora", "lora"), default="aurora", help="(default: %(default)s)")
    add("--preset", default=preset, help="which layers; 'paper' and 'cross' are smaller (default: %(default)s)")
    add("--rank", type=int, help="the release's is 32, for video retrieval 64; the article's 64")
    add("--adapter-dropout", type=float, default=0.1, help="(default: %(default)s)")
    add("--dropout", type=float, default=0.1, help="of the texts' encoder and decoder (default: %(default)s)")
    add("--drop-path", type=float, help="of the last vision layer, less before it; 0.1 for answers, else 0")
    add(
        "--core",
        choices=("cp", "tucker"),
        default="tucker",
        help="Aurora's: the article's | the release's, the default",
    )
    add(
        "--layout",
        choices=("blocks", "released"),
        help="of Aurora's fc1 and fc2 (default: the release's with its core, else blocks)",
    )
    add(
        "--sharing",
        choices=("global", "modality", "none"),
        default="global",
        help="of Aurora's factors (default: %(default)s)",
    )
    add("--gates", choices=("additive", "gated", "none"), default="additive", help="Aurora's (default: additive)")
    add("--released", action=FLAG, default=True, help="Aurora: text_proj stays frozen, by a slip of the release")
    add("--decay-vectors", action=FLAG, default=True, help="weight decay for biases and scales too, as the release has")
    add("--augment", action=FLAG, default=augment, help="crop, flip and change training images as the release does")
    add("--image-size", type=int, help="of a side (default: the processor's, 384 as in the release; of frames 224)")
    add("--k-test", type=int, help="candidates that are ranked a second time, by reading all of the text")


def configuration(args: argparse.Namespace) -> AdapterConfig:
    """The adapter that the options ask for. Call it before anything else is done: it also checks them."""
    for name in ("frames", "image_size", "k_test", "answers", "beams"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            fail(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    for name in ("adapter_dropout", "dropout", "drop_path", "label_smoothing"):
        if not 0 <= (value := getattr(args, name, 0)) < 1:
            fail(f"--{name.replace('_', '-')}: expected at least 0 and less than 1, got {value}")
    common = {"preset": args.preset, "rank": args.rank, "dropout": args.adapter_dropout, "backend": args.backend}
    layout = args.layout or ("released" if args.core == "tucker" else "blocks")
    gates = None if args.gates == "none" else args.gates
    own = {"core": args.core, "layout": layout, "sharing": args.sharing, "gates": gates, "released": args.released}
    try:
        return LoRAConfig(alpha=args.rank, **common) if args.method == "lora" else AuroraConfig(**own, **common)
    except ValueError as error:
        fail(f"--method {args.method}: {error}")


def wrap(args: argparse.Namespace, model: nn.Module) -> Adapter:
    """A new adapter, or with --evaluate a saved one."""
    if args.evaluate is not None:
        return saved(args.evaluate, model)
    try:
        return METHODS[args.method].wrap(model, configuration(args))
    except ValueError as error:
        fail(f"--method {args.method}: {error}")


def groups(args: argparse.Namespace, adapter: Adapter) -> list[dict[str, Any]]:
    """The optimizer's: the release's AdamW decays vectors as it decays matrices."""
    made = adapter.param_groups(args.lr, weight_decay=args.weight_decay)
    return [{**group, "weight_decay": args.weight_decay} for group in made] if args.decay_vectors else made


def saved(folder: Path, model: nn.Module) -> Adapter:
    """An adapter that `save_pretrained` has written, of whatever method."""
    method = field(read_json(folder / "adapter_config.json"), "method", folder / "adapter_config.json")
    if method not in METHODS:
        fail(f"--evaluate: {folder}: expected a method of {', '.join(METHODS)}, got {method!r}")
    try:
        return METHODS[method].from_pretrained(model, folder)
    except (OSError, ValueError) as error:
        fail(f"--evaluate: {error}")


def load(args: argparse.Namespace, model_class: type) -> tuple[nn.Module, Any]:
    """(model, processor) of --model. What a checkpoint of the hub says of dropout is 0, not what BLIP trained with."""
    try:
        config = AutoConfig.from_pretrained(args.model)
        if not isinstance(config, BlipConfig):
            raise ValueError(f"expected a BLIP, got a model of the type {config.model_type!r}")
        config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = args.dropout
        processor = AutoProcessor.from_pretrained(args.model)
        model = model_class.from_pretrained(args.model, config=config)
    except (OSError, ValueError) as error:
        fail(f"--model: {args.model}: {error}")
    add_drop_path(model, args.drop_path)
    hand_on_encoder_masks(model)
    return model.to(args.device), processor


class Batches:
    """Examples to tensors, in the loader's processes: pixels (B, F, 3, H, W), input_ids and attention_mask (B, T).

    clean: of texts;  size: H and W; None: the processor's own, BLIP's 384
    crop: the middle of an image instead of all of it, squeezed;  normalize: pixels, by CLIP's mean and deviation
    """

    def __init__(
        self,
        processor: Any,
        clean: Callable[[str], str] = str,
        size: int | None = None,
        crop: bool = False,
        normalize: bool = True,
    ):
        self.processor, self.clean, self.crop = processor, clean, crop
        self.side = size or processor.image_processor.size["height"]
        self.options = {"size": {"height": self.side, "width": self.side}, "do_normalize": normalize}

    def augment(self, args: argparse.Namespace) -> Augment | None:
        """What --augment does to training images."""
        return Augment(self.side) if args.augment else None

    def __call__(self, loaded: Sequence[tuple[Example, list[Image.Image]]]) -> dict[str, Any]:
        examples = [example for example, _ in loaded]
        images = [image for _, each in loaded for image in each]
        if self.crop:
            images = [ImageOps.fit(image, (self.side, self.side), Image.Resampling.BILINEAR) for image in images]
        pixels = self.processor.image_processor(images, return_tensors="pt", **self.options)["pixel_values"]
        return {
            "examples": examples,
            "pixels": pixels.unflatten(0, (len(examples), -1)),
            "owners": torch.tensor([example.owner for example in examples]),
            **self.tokens([example.text for example in examples]),
        }

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        tokens = self.processor.tokenizer(
            [self.clean(text) for text in texts],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def fusion_token(model: nn.Module) -> int | None:
    """[ENC], with which BLIP was trained to begin a text that reads an image. Its checkpoints have it after [DEC], the
    first of an answer; transformers' own forward stays with [CLS] (huggingface/transformers issues 22732, 25629)."""
    text = model.config.text_config
    return text.bos_token_id + 1 if text.bos_token_id + 2 == text.vocab_size else None


def see(model: nn.Module, pixels: Tensor) -> Tensor:
    """pixels: (B, F, 3, H, W) of any size -> states (B, F, S, d)"""
    seen = model.vision_model(pixel_values=pixels.flatten(0, 1), interpolate_pos_encoding=True)
    return seen.last_hidden_state.unflatten(0, pixels.shape[:2])


def embed_images(model: nn.Module, states: Tensor) -> Tensor:
    """states: (B, F, S, d) -> (B, e), of length 1: the mean of the frames' projections"""
    return video_embedding(model.vision_proj(states[:, :, 0]))


def embed_frames(model: nn.Module, states: Tensor) -> Tensor:
    """states: (B, F, S, d) -> (B, F, e), each of length 1"""
    return F.normalize(model.vision_proj(states[:, :, 0]).float(), dim=-1)


def read(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The text alone: ([CLS] (B, d), embeddings (B, e) of length 1)"""
    states = model.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return states[:, 0], F.normalize(model.text_proj(states[:, 0]).float(), dim=-1)


def similarities(image: Tensor, text: Tensor) -> Tensor:
    """(B, e), (N, e) -> (B, N), in float32 whatever autocast says: rankings look at small differences"""
    with torch.autocast(image.device.type, enabled=False):
        return image @ text.t()


def fuse(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, states: Tensor) -> Tensor:
    """Texts that read images: states (B, F, S, d) of all frames -> (B, T, d)"""
    token = fusion_token(model)
    if token is not None:
        input_ids = input_ids.clone()
        input_ids[:, 0] = token
    states = states.flatten(1, 2)
    return model.text_encoder(
        input_ids=input_ids,
        attention_mask=attention_mask,
        encoder_hidden_states=states,
        encoder_attention_mask=attention_mask.new_ones(states.shape[:2]),
    ).last_hidden_state


def moved(batch: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
