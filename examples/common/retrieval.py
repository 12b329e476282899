"""Retrieval with BLIP, of images or of videos (several frames): what trains it, and what it is judged by."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from common import predictions
from common.blip import Batches, embed_frames, embed_images, fuse, moved, read, see, similarities
from common.data import Example, Examples, loader
from common.hooks import frame_aware, frame_weights
from peft_kernels import Adapter
from peft_kernels.objectives import (
    MomentumQueue,
    contrastive_loss,
    enhance_context,
    matching_loss,
    matching_negatives,
    momentum_copy,
    momentum_update,
    retrieval_ranks,
)

LEFT_OUT = -100.0  # a candidate's score if the matching head has not seen it: behind the others, by similarity


def add_options(options: argparse.ArgumentParser, beta: float) -> None:
    """beta: the default"""
    add = options.add_argument
    add("--queue-size", type=int, default=57_600, help="of momentum pairs; 0: none (default: %(default)s)")
    add(
        "--queue-start",
        choices=("random", "empty"),
        default="random",
        help="random: vectors that are wrong candidates until pairs take their places, as released; empty: none",
    )
    add("--alpha", type=float, default=0.4, help="weight of soft targets; 0: none (default: %(default)s)")
    add("--momentum", type=float, default=0.995, help="of the momentum encoder (default: %(default)s)")
    add(
        "--momentum-of",
        choices=("layers", "all"),
        default="layers",
        help="what it averages: heads and what each layer has for itself, beside Aurora's U, V and C as they are at "
        "every moment, as released; or all that trains (default: layers)",
    )
    add(
        "--temperature",
        type=float,
        default=0.07,
        help="stays as it is; the release's as its checkpoint has it, which transformers' have not (default: 0.07)",
    )
    add(
        "--enhance",
        choices=("positives", "all", "none"),
        default="positives",
        help="context enhancement; as released all positives and no negatives get the same shift, by which a matching "
        "head can tell them apart; 'all' shifts both (default: positives)",
    )
    add("--beta", type=float, default=beta, help="weight of the similarity in the ranking (default: %(default)s)")


def shared_factors(adapter: Adapter) -> list[nn.Parameter]:
    """Aurora's U, V and λ or C: all of its decompositions but what each layer has for itself."""
    return [p for name, p in adapter.named_parameters() if name.startswith("aurora.") and not name.endswith(".slots")]


class RetrievalLoss:
    """ITC + ITM. Make it when the model is wrapped: the momentum encoder shares what is frozen then.

    aware: of frames, of which a text reads more if they are like it
    """

    def __init__(self, args: argparse.Namespace, adapter: Adapter, aware: bool = False):
        self.args, self.model, self.aware = args, adapter.model, aware
        self.teacher, self.queue = None, None
        if args.queue_size or args.alpha:
            live = shared_factors(adapter) if args.momentum_of == "layers" else []
            self.teacher = momentum_copy(self.model.train(), live)
        if args.queue_size:
            width = self.model.vision_proj.out_features
            self.queue = MomentumQueue(args.queue_size, width, args.device)
            if args.queue_start == "random":  # without an image, and so nobody's positives
                vectors = torch.randn(2, args.queue_size, width, device=args.device)
                self.queue.enqueue(*F.normalize(vectors, dim=-1))

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
            own = torch.arange(len(ids), device=ids.device)
            texts, images = torch.cat([own, wrong_text, own]), torch.cat([own, own, wrong_image])
            weights = frame_weights(text[texts], embed_frames(self.model, states)[images]) if self.aware else None
        with frame_aware(self.model, weights):
            fused = fuse(self.model, ids[texts], mask[texts], states[images])[:, 0]
        if self.args.enhance != "none":
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
        """What the momentum encoder averages, and the queue."""
        own = dict(self.model.named_parameters())
        moving = {} if self.teacher is None else dict(self.teacher.named_parameters())
        return {
            "teacher": {name: p.detach() for name, p in moving.items() if p is not own[name]},
            "queue": None if self.queue is None else self.queue.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"], strict=False)
        if self.queue is not None:
            self.queue.load_state_dict(state["queue"])


class RetrievalTest:
    """Recall and ranks of `examples`: all similarities first, then each query's best --k-test by the matching head.

    draw: which frames of a video are read
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        batches: Batches,
        examples: Sequence[Example],
        draw: Callable | None = None,
    ):
        self.args, self.model, self.batches, self.examples = args, model, batches, examples
        owners = {example.owner: example for example in reversed(examples)}
        self.places = {owner: place for place, owner in enumerate(sorted(owners))}
        self.images: DataLoader = loader(args, Examples([owners[o] for o in self.places], draw=draw), batches)

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

        image_to_text, text_to_image = similarity + LEFT_OUT, similarity + LEFT_OUT
        for place, row in enumerate(similarity):
            near, best = row.topk(min(self.args.k_test, len(row)))
            seen = states[place].to(device).expand(len(best), -1, -1, -1)
            score = self.match(ids[best], mask[best], seen)
            image_to_text[place, best] = score + self.args.beta * near
        for place, column in enumerate(similarity.t()):
            near, best = column.topk(min(self.args.k_test, len(column)))
            score = self.match(ids[place].expand(len(best), -1), mask[place].expand(len(best), -1), states[best.cpu()])
            text_to_image[best, place] = score + self.args.beta * near

        rows = predictions.retrieval_rows(self.examples, self.places, image_to_text.cpu(), text_to_image.cpu())
        predictions.save(self.args.out, rows)
        positives = torch.tensor([self.places[example.owner] for example in self.examples], device=device)
        found = {}
        for way, scores in (("image_to_text", image_to_text), ("text_to_image", text_to_image)):
            ranks = getattr(retrieval_ranks(scores, positives), way).double()
            found |= {f"{way}_recall_{k}": (ranks <= k).double().mean().item() for k in (1, 5, 10)}
            found[f"{way}_median_rank"] = ranks.quantile(0.5).item()
            found[f"{way}_mean_rank"] = ranks.mean().item()
        return found

    def match(self, ids: Tensor, mask: Tensor, states: Tensor) -> Tensor:
        """The matching head's score of each pair: its logit of a match, as BLIP and Aurora rank."""
        fused = fuse(self.model, ids, mask, states.to(self.args.device))
        return self.model.itm_head(fused[:, 0])[:, 1].float()
