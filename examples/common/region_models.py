"""LXMERT, VisualBERT, and a BERT that reads regions beside its words (Oscar, VinVL): parts, batches, losses, answers.

Sizes: B examples, I images of an example (NLVR2: 2), V regions, T tokens, w numbers in a region's feature, d features.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    LxmertConfig,
    LxmertForQuestionAnswering,
    VisualBertConfig,
    VisualBertForQuestionAnswering,
    VisualBertForVisualReasoning,
)

from common import questions
from common.blip import moved
from common.data import Example


def pair_head(width: int) -> nn.Sequential:
    """Of two pooled states (B, 2 · width), as ViLT's and MoIL's for NLVR2."""
    return nn.Sequential(nn.Linear(2 * width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, 2))


# ---- models ---------------------------------------------------------------------------------------------------------


class LxmertForPairs(LxmertForQuestionAnswering):
    def __init__(self, config: LxmertConfig):
        super().__init__(config)
        self.answer_head = pair_head(config.hidden_size)
        self.post_init()


class RegionBert(BertModel):
    """Names of modules are Oscar's, whose checkpoints fit (github.com/microsoft/Oscar, oscar/modeling)."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.img_embedding = nn.Linear(config.img_feature_dim, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        if getattr(config, "use_img_layernorm", False):
            self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.img_layer_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, regions: Tensor, region_mask: Tensor) -> Tensor:
        """regions: (B, V, w) with the box's numbers behind the feature's -> pooled (B, d)"""
        seen = self.img_embedding(regions)
        seen = self.dropout(self.LayerNorm(seen) if hasattr(self, "LayerNorm") else seen)
        states = torch.cat([self.embeddings(input_ids=input_ids), seen], dim=1)
        mask = torch.cat([attention_mask, region_mask], dim=1)[:, None, None]
        hidden = (1 - mask.to(states.dtype)) * torch.finfo(states.dtype).min
        return self.pooler(self.encoder(states, attention_mask=hidden)[0])


class RegionBertForAnswers(BertPreTrainedModel):
    """config.num_images: whose pooled states the classifier reads side by side"""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = RegionBert(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        is_pair = config.num_images == 2
        self.classifier = pair_head(config.hidden_size) if is_pair else nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


def lxmert_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    images = batch["boxes"].shape[1]
    pooled = model.lxmert(
        input_ids=batch["input_ids"].repeat_interleave(images, dim=0),
        attention_mask=batch["attention_mask"].repeat_interleave(images, dim=0),
        visual_feats=batch["features"].flatten(0, 1),
        visual_pos=batch["boxes"].flatten(0, 1),
        visual_attention_mask=batch["region_mask"].flatten(0, 1),
    ).pooled_output
    return model.answer_head(pooled.unflatten(0, (-1, images)).flatten(1))


def visualbert_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The regions of NLVR2's two images stand in one sequence, of types 0 and 1; those of one image are of type 1."""
    mask = batch["region_mask"]
    images = mask.shape[1]
    types = torch.arange(2 - images, 2, device=mask.device)[:, None].expand_as(mask)
    return model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        visual_embeds=batch["features"].flatten(1, 2),
        visual_attention_mask=mask.flatten(1),
        visual_token_type_ids=types.flatten(1),
    ).logits


def bert_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    images, boxes = batch["boxes"].shape[1], batch["boxes"]
    shape = torch.cat([boxes, boxes[..., 2:] - boxes[..., :2]], dim=-1)  # and the box's width and height
    room = model.config.img_feature_dim - batch["features"].shape[-1]
    pooled = model.bert(
        batch["input_ids"].repeat_interleave(images, dim=0),
        batch["attention_mask"].repeat_interleave(images, dim=0),
        torch.cat([batch["features"], shape[..., :room]], dim=-1).flatten(0, 1),
        batch["region_mask"].flatten(0, 1),
    )
    return model.classifier(model.dropout(pooled.unflatten(0, (-1, images)).flatten(1)))


Logits = Callable[[nn.Module, dict[str, Tensor]], Tensor]
# By name, that of the preset, too: configuration, classes of VQA and of NLVR2, and what gives (B, labels)
KINDS: dict[str, tuple[type, type, type, Logits]] = {
    "lxmert": (LxmertConfig, LxmertForQuestionAnswering, LxmertForPairs, lxmert_logits),
    "visualbert": (
        *(VisualBertConfig, VisualBertForQuestionAnswering, VisualBertForVisualReasoning),
        visualbert_logits,
    ),
    "bert": (BertConfig, RegionBertForAnswers, RegionBertForAnswers, bert_logits),
}


# ---- batches and the task -------------------------------------------------------------------------------------------


class Batches:
    """Examples to tensors, in the loader's processes: input_ids, attention_mask (B, T), features (B, I, V, w), boxes
    (B, I, V, 4), region_mask (B, I, V), and where answers are known labels (B, labels) or (B,)."""

    def __init__(self, tokenizer: Any, max_tokens: int, answers: Sequence[str] = ()):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.labels = {answer: label for label, answer in enumerate(answers)}

    def __call__(self, loaded: Sequence[tuple[Example, list[tuple[Tensor, Tensor]]]]) -> dict[str, Any]:
        examples = [example for example, _ in loaded]
        seen = [image for _, images in loaded for image in images]
        features, boxes = (pad_sequence([image[part] for image in seen], batch_first=True) for part in (0, 1))
        counts = torch.tensor([len(each) for each, _ in seen])
        mask = (torch.arange(features.shape[1]) < counts[:, None]).long()
        batch = {"features": features, "boxes": boxes, "region_mask": mask}
        batch = {name: tensor.unflatten(0, (len(examples), -1)) for name, tensor in batch.items()}
        texts = [example.text for example in examples]
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        batch |= {name: tokens[name] for name in ("input_ids", "attention_mask")}
        if self.labels:
            batch["labels"] = torch.stack([questions.soft_scores(example, self.labels) for example in examples])
        else:
            batch["labels"] = torch.tensor([example.answers[0] == "True" for example in examples]).long()
        return {"examples": examples, **batch}


class Task:
    """What trains the model, and what it is judged by. answers: VQA's labels"""

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        batches: DataLoader,
        test: Sequence[Example],
        answers: Sequence[str],
    ):
        self.args, self.model, self.batches, self.test, self.answers = args, model, batches, test, answers
        self.logits = KINDS[args.kind][-1]

    def loss(self, batch: dict[str, Any], progress: float) -> Tensor:
        batch = moved(batch, self.args.device)
        logits, labels = self.logits(self.model, batch).float(), batch["labels"]
        if self.answers:  # the sum over labels, the mean over questions
            return F.binary_cross_entropy_with_logits(logits, labels) * labels.shape[1]
        return F.cross_entropy(logits, labels)

    def evaluate(self, mode: str = "") -> dict[str, float]:
        """Metrics; mode: as `predictions.save` has it, whose file this writes"""
        found = {}
        for batch in self.batches:
            labels = self.logits(self.model, moved(batch, self.args.device)).argmax(dim=-1).tolist()
            for example, label in zip(batch["examples"], labels):
                found[example.key] = self.answers[label] if self.answers else str(bool(label))
        return questions.judge(self.args, self.test, found, mode)
