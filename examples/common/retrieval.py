"""Retrieval with BLIP, of images or of videos (several frames): what trains it, and what it is judged by."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.blip import Batches, embed_images, fuse, moved, read, see, similarities
from common.data import Example, Examples, loader
from peft_kernels import Adapter
from peft_kernels.objectives import (
    MomentumQueue,
    contrastive_loss,
    enhance_context,
    matching_loss,
    matching_negatives,
    momentum_copy,
    momentum_update,
    recall_at_k,
)


def add_options(options: argparse.ArgumentParser, beta: float) -> None:
    """beta: the default"""
    add = options.add_argument
    add("--queue-size", type=int, default=57_600, help="of momentum pairs; 0: none (default: %(default)s)")
    add("--alpha", type=float, default=0.4, help="weight of soft targets; 0: none (default: %(default)s)")
    add("--momentum", type=float, default=0.995, help="of the momentum encoder (default: %(default)s)")
    add("--temperature", type=float, default=0.07, help="stays as it is, as in Aurora's release (default: %(default)s)")
    add("--enhance", nargs="?", const="positives", choices=("positives", "all"), help="context enhancement")
    add("--beta", type=float, default=beta, help="weight of the similarity in the ranking (default: %(default)s)")


class RetrievalLoss:
    """ITC + ITM. Make it when the model is wrapped: the momentum encoder shares what is frozen then."""

    def __init__(self, args: argparse.Namespace, adapter: Adapter):
        self.args, self.model = args, adapter.model
        self.trained = [name for name, _ in adapter.named_parameters()]
        self.teacher = momentum_copy(self.model.train()) if args.queue_size or args.alpha else None
        self.queue = None
        if args.queue_size:
            self.queue = MomentumQueue(args.queue_size, self.model.vision_proj.out_features, args.device)

    def __call__(self, batch: dict[str, Any], progress: float) -> Tensor:
        batch = moved(batch, self.args.device)
        ids, mask, owners = (batch[name] for name in ("input_ids", "attention_mask", "owners"))
        states = see(self.model, batch["pixels"])
        image = embed_images(self.model, states)
        first, text = read(self.model, ids, mask)
        contrast = self.contrast(batch, image, text, progress)

        with torch.no_grad():
            similarity = similarities(image, text) / self.args.temperature
        wrong_text, wrong_image = matching_negatives(similarity, similarity.t(), owners)
        fused = fuse(
            self.model,
            torch.cat([ids, ids[wrong_text], ids]),
            torch.cat([mask, mask[wrong_text], mask]),
            torch.cat([states, states, states[wrong_image]]),
        )[:, 0]
        if self.args.enhance:
            fused = enhance_context(fused, first, to=self.args.enhance)
        match = self.model.itm_head(fused)
        return contrast + matching_loss(match[: len(ids)], match[len(ids) :])

    def contrast(self, batch: dict[str, Any], image: Tensor, text: Tensor, progress: float) -> Tensor:
        owners, extra = batch["owners"], {}
        if self.teacher is not None:
            with torch.no_grad():
                extra["momentum_image"] = embed_images(self.teacher, see(self.teacher, batch["pixels"]))
                extra["momentum_text"] = read(self.teacher, batch["input_ids"], batch["attention_mask"])[1]
            extra["alpha"] = self.args.alpha * min(1.0, progress)  # grows in the first epoch
        bank = {} if self.queue is None else self.queue.bank()
        loss = contrastive_loss(image, text, self.args.temperature, image_ids=owners, **extra, **bank)
        if self.queue is not None:
            self.queue.enqueue(extra["momentum_image"], extra["momentum_text"], owners)
        return loss

    def after_step(self) -> None:
        if self.teacher is not None:
            momentum_update(self.teacher, self.model, self.args.momentum)

    def state_dict(self) -> dict[str, Any]:
        """Of what moves."""
        moving = {} if self.teacher is None else dict(self.teacher.named_parameters())
        return {
            "teacher": {name: moving[name].detach() for name in self.trained if name in moving},
            "queue": None if self.queue is None else self.queue.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"], strict=False)
        if self.queue is not None:
            self.queue.load_state_dict(state["queue"])


class RetrievalTest:
    """Recall of `examples`: all similarities first, then each query's best --k-test by the matching head."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        batches: Batches,
        examples: Sequence[Example],
        frames: int | None = None,
    ):
        self.args, self.model, self.batches, self.examples = args, model, batches, examples
        owners = {example.owner: example for example in reversed(examples)}
        self.places = {owner: place for place, owner in enumerate(sorted(owners))}
        self.images: DataLoader = loader(args, Examples([owners[o] for o in self.places], frames), batches)

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        device = self.args.device
        states, images = [], []
        for batch in self.images:
            states.append(see(self.model, batch["pixels"].to(device)).cpu())  # 9 GB for COCO's 5,000 test images
            images.append(embed_images(self.model, states[-1].to(device)))
        states = torch.cat(states)
        tokens = moved(self.batches.tokens([example.text for example in self.examples]), device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        texts = [read(self.model, *part)[1] for part in zip(ids.split(256), mask.split(256))]
        similarity = similarities(torch.cat(images), torch.cat(texts))

        image_to_text = torch.full_like(similarity, -torch.inf)
        text_to_image = image_to_text.clone()
        for place, row in enumerate(similarity):
            near, best = row.topk(min(self.args.k_test, len(row)))
            seen = states[place].to(device).expand(len(best), -1, -1, -1)
            score = self.match(ids[best], mask[best], seen)
            image_to_text[place, best] = score + self.args.beta * near
        for place, column in enumerate(similarity.t()):
            near, best = column.topk(min(self.args.k_test, len(column)))
            score = self.match(ids[place].expand(len(best), -1), mask[place].expand(len(best), -1), states[best.cpu()])
            text_to_image[best, place] = score + self.args.beta * near

        positives = torch.tensor([self.places[example.owner] for example in self.examples], device=device)
        found = {
            "image_to_text": recall_at_k(image_to_text, positives=positives).image_to_text,
            "text_to_image": recall_at_k(text_to_image, positives=positives).text_to_image,
        }
        return {f"{way}_recall_{k}": value for way, recalls in found.items() for k, value in recalls.items()}

    def match(self, ids: Tensor, mask: Tensor, states: Tensor) -> Tensor:
        """The matching head's score of each pair: its logit of a match, as BLIP and Aurora rank."""
        fused = fuse(self.model, ids, mask, states.to(self.args.device))
        return self.model.itm_head(fused[:, 0])[:, 1].float()
