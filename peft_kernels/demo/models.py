"""Vision-language models of transformers, sized for a CPU, and what training and testing need of them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import BlipConfig, BlipForImageTextRetrieval, ViltConfig, ViltForQuestionAnswering
from transformers.utils import logging

from peft_kernels import objectives
from peft_kernels.demo.scenes import SIZE, Scenes, vocabulary

logging.set_verbosity_error()
WIDTH, LAYERS, HEADS = 64, 3, 4
PATCH = 8  # a digit: with 4, pre-training takes twice as long to learn how digits stand to each other
PAIRS = 800  # matched at once in an evaluation
SHOWN, BEST = 4, 3  # captions, and images of each, that an evaluation shows


class Evaluation(NamedTuple):
    """scores: in percent, by name;  shown: of the first four captions the numbers of the three images found first"""

    scores: dict[str, float]
    shown: list[list[int]]


def build_blip() -> BlipForImageTextRetrieval:
    """A BLIP with two towers and a matching head: image-text retrieval."""
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0}
    layers = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    layers["intermediate_size"] = 4 * WIDTH
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    text = {"vocab_size": len(vocabulary()), "encoder_hidden_size": WIDTH, "max_position_embeddings": 32}
    config = BlipConfig(
        text_config={**layers, **tokens, **text, **none},
        vision_config={**layers, "image_size": SIZE, "patch_size": PATCH, "attention_dropout": 0.0},
        image_text_hidden_size=32,
        projection_dim=32,
    )
    return _started(BlipForImageTextRetrieval(config))


def build_vilt() -> ViltForQuestionAnswering:
    """A ViLT, one tower for image and text, that answers with one of ten digits."""
    layers = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    image = {"image_size": SIZE, "patch_size": PATCH, "max_image_length": -1}
    config = ViltConfig(
        **layers, **none, **image, intermediate_size=4 * WIDTH, vocab_size=len(vocabulary()), num_labels=10
    )
    return _started(ViltForQuestionAnswering(config))


def _started(model: nn.Module) -> nn.Module:
    """The usual standard deviation of 0.02 is meant for width 768: at 64 it hardly learns, least of all positions."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.2)
    for name, parameter in model.named_parameters():
        if name.endswith(("position_embedding", "position_embeddings")):
            nn.init.normal_(parameter, std=0.2)
    return model


class Retrieval:
    """Image-text contrast and matching, as BLIP is trained: `loss` of a batch, `evaluate` on scenes."""

    name, preset, build = "retrieval", "blip", staticmethod(build_blip)
    temperature, candidates = 0.07, 32

    def _image(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """(states (B, P, d), embeddings (B, 32))"""
        states = model.vision_model(pixel_values=images).last_hidden_state
        return states, nn.functional.normalize(model.vision_proj(states[:, 0]), dim=-1)

    def _text(self, model: nn.Module, scenes: Scenes) -> tuple[Tensor, Tensor]:
        """([CLS] (B, d), embeddings (B, 32))"""
        cls = model.text_encoder(input_ids=scenes.tokens, attention_mask=scenes.mask).last_hidden_state[:, 0]
        return cls, nn.functional.normalize(model.text_proj(cls), dim=-1)

    def _fused(self, model: nn.Module, scenes: Scenes, states: Tensor) -> Tensor:
        """[CLS] (B, d) of texts that look at images"""
        return model.text_encoder(
            input_ids=scenes.tokens,
            attention_mask=scenes.mask,
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=states.device),
        ).last_hidden_state[:, 0]

    def loss(self, model: nn.Module, scenes: Scenes, enhance: str | None = None) -> Tensor:
        states, image = self._image(model, scenes.images)
        cls, text = self._text(model, scenes)
        ids = scenes.story()  # scenes that one caption fits are no negatives of each other
        contrast = objectives.contrastive_loss(image, text, self.temperature, image_ids=ids)
        similarity = (image @ text.t()).detach() / self.temperature
        other_text, other_image = objectives.matching_negatives(similarity, similarity.t(), ids)
        batch = scenes.count()
        rows = torch.arange(batch, device=states.device)
        texts = scenes.take(torch.cat([rows, other_text, rows]))
        fused = self._fused(model, texts, states[torch.cat([rows, rows, other_image])])
        if enhance is not None:
            fused = objectives.enhance_context(fused, cls, to=enhance)
        odds = model.itm_head(fused)
        return contrast + objectives.matching_loss(odds[:batch], odds[batch:])

    @torch.no_grad()
    def scores(self, model: nn.Module, scenes: Scenes) -> Tensor:
        """(images, texts): nearest by contrast, the first 32 of each row and column ordered by matching."""
        states, image = self._image(model, scenes.images)
        similarity = image @ self._text(model, scenes)[1].t()
        score = similarity - 10  # below every matching score, which are log-odds
        count = min(self.candidates, scenes.count())
        nearest = torch.zeros_like(score, dtype=torch.bool)
        for dim in (0, 1):
            nearest.scatter_(dim, similarity.topk(count, dim).indices, True)
        for images, texts in zip(*(which.split(PAIRS) for which in nearest.nonzero(as_tuple=True))):
            odds = model.itm_head(self._fused(model, scenes.take(texts), states[images]))
            score[images, texts] = odds.log_softmax(-1)[:, 1] + similarity[images, texts]
        return score

    def evaluate(self, model: nn.Module, scenes: Scenes) -> Evaluation:
        """Recall@1 and @5 both ways; the model in evaluation mode."""
        matrix = self.scores(model, scenes)
        recall = objectives.recall_at_k(matrix, (1, 5))
        scores = {
            f"{short} R@{k}": 100 * values[k]
            for short, values in (("i→t", recall.image_to_text), ("t→i", recall.text_to_image))
            for k in (1, 5)
        }
        return Evaluation(scores, matrix[:, :SHOWN].topk(min(BEST, len(matrix)), dim=0).indices.t().tolist())


class Answering:
    """Visual question answering over the ten digits: "which digit is below the two"."""

    name, preset, build = "answering", "vilt", staticmethod(build_vilt)

    def _logits(self, model: nn.Module, scenes: Scenes) -> Tensor:
        return model(input_ids=scenes.questions, attention_mask=scenes.question_mask, pixel_values=scenes.images).logits

    def loss(self, model: nn.Module, scenes: Scenes, enhance: str | None = None) -> Tensor:
        return nn.functional.cross_entropy(self._logits(model, scenes), scenes.first)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, scenes: Scenes) -> Evaluation:
        """Accuracy. ViLT draws the order of its patches: here always the same."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            right = self._logits(model, scenes).argmax(-1) == scenes.first
        return Evaluation({"accuracy": 100 * right.double().mean().item()}, [])


Task = Retrieval | Answering
TASKS: dict[str, Task] = {task.name: task for task in (Retrieval(), Answering())}
