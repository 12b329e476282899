"""ViLT in transformers on three tasks: batches, losses and metrics. Images are resized by its processor as in MoIL's
release (vilt/transforms/pixelbert.py): the shorter edge 384, the longer at most 639, both multiples of 32.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F

from common import predictions, questions
from common.blip import moved
from common.data import Example, Examples, loader
from peft_kernels.objectives import recall_at_k

MAX_TOKENS, WRONG_TEXTS = 40, 15


class Batches:
    """Examples to what the model takes, in the loader's processes: one image, or NLVR2's two, (B, 2, 3, H, W).

    answers: VQA's labels;  wrong: captions to draw wrong ones from: texts are then (B · 16) with the right ones first
    """

    def __init__(self, processor: Any, answers: Sequence[str] = (), wrong: Sequence[Example] = ()):
        self.processor, self.wrong = processor, wrong
        self.labels = {answer: label for label, answer in enumerate(answers)}

    def __call__(self, loaded: Sequence[tuple[Example, list[Image]]]) -> dict[str, Any]:
        examples = [example for example, _ in loaded]
        seen = self.processor.image_processor([image for _, each in loaded for image in each], return_tensors="pt")
        batch = {name: seen[name] for name in ("pixel_values", "pixel_mask")}
        if len(loaded[0][1]) > 1:
            batch = {name: tensor.unflatten(0, (len(examples), -1)) for name, tensor in batch.items()}
        batch |= self.tokens([text for example in examples for text in (example.text, *self.wrong_texts(example))])
        if self.labels:
            batch["labels"] = torch.stack([questions.soft_scores(example, self.labels) for example in examples])
        elif examples[0].answers:
            batch["labels"] = torch.tensor([example.answers[0] == "True" for example in examples]).long()
        return {"examples": examples, **batch}

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return dict(
            self.processor.tokenizer(
                list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            )
        )

    def wrong_texts(self, example: Example) -> list[str]:
        texts: list[str] = []
        while self.wrong and len(texts) < WRONG_TEXTS:
            other = self.wrong[int(torch.randint(len(self.wrong), ()))]
            texts += [other.text] if other.owner != example.owner else []
        return texts


class Task:
    """What trains the model, and what it is judged by. answers: VQA's labels"""

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        processor: Any,
        test: Sequence[Example],
        answers: Sequence[str],
    ):
        self.args, self.model, self.test, self.answers = args, model, test, answers
        self.batches = Batches(processor, answers)
        # of retrieval every image once: its captions are read for themselves
        once = list({example.owner: example for example in reversed(test)}.values())[::-1]
        self.loader = loader(args, Examples(once if args.task == "retrieval" else test), self.batches)

    def loss(self, batch: dict[str, Any], progress: float) -> Tensor:
        batch = moved(batch, self.args.device)
        examples = batch.pop("examples")
        if self.args.task != "retrieval":
            return self.model(**batch).loss
        for name in ("pixel_values", "pixel_mask"):
            batch[name] = batch[name].repeat_interleave(1 + WRONG_TEXTS, dim=0)
        scores = self.model(**batch).logits.float().view(len(examples), 1 + WRONG_TEXTS)
        return F.cross_entropy(scores, scores.new_zeros(len(examples), dtype=torch.long))  # the right one is the first

    def evaluate(self, mode: str = "") -> dict[str, float]:
        """Metrics; mode: as `predictions.save` has it, whose file this writes"""
        return self.recall(mode) if self.args.task == "retrieval" else self.answer(mode)

    def answer(self, mode: str) -> dict[str, float]:
        found = {}
        for batch in self.loader:
            batch = moved(batch, self.args.device)
            examples = batch.pop("examples")
            batch.pop("labels", None)
            for example, label in zip(examples, self.model(**batch).logits.argmax(dim=-1).tolist()):
                found[example.key] = self.answers[label] if self.answers else str(bool(label))
        return questions.judge(self.args, self.test, found, mode)

    def recall(self, mode: str) -> dict[str, float]:
        """Of all pairs of images and captions, each read together: of 1,000 images and their captions 5 million."""
        tokens = moved(self.batches.tokens([example.text for example in self.test]), self.args.device)
        size, rows = self.args.batch_size * (1 + WRONG_TEXTS), []
        for batch in self.loader:
            batch = moved(batch, self.args.device)
            for pixels, mask in zip(batch["pixel_values"], batch["pixel_mask"]):
                row = []
                for start in range(0, len(self.test), size):
                    part = {name: tensor[start : start + size] for name, tensor in tokens.items()}
                    part["pixel_values"] = pixels.expand(len(part["input_ids"]), -1, -1, -1)
                    part["pixel_mask"] = mask.expand(len(part["input_ids"]), -1, -1)
                    row.append(self.model(**part).logits[:, 0].float())
                rows.append(torch.cat(row))
        places = {owner: place for place, owner in enumerate(dict.fromkeys(example.owner for example in self.test))}
        positives = torch.tensor([places[example.owner] for example in self.test], device=self.args.device)
        scores = torch.stack(rows)
        table = scores.cpu()
        predictions.save(self.args.out, predictions.retrieval_rows(self.test, places, table, table), mode)
        found = recall_at_k(scores, positives=positives)._asdict()
        return {f"{way}_recall_{k}": value for way, recalls in found.items() for k, value in recalls.items()}
