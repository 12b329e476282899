"""Question answering with BLIP, about images or videos: what trains it, and how it answers.

The question reads the image; a decoder that reads the question's states writes the answer. Several frames are read one
after the other, as one long image ("concat", Aurora's), or as their mean, place by place ("mean").
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from common.blip import fuse, moved, see
from common.data import Example, fail, read_json, records
from peft_kernels.objectives import normalize_answer, vqa_accuracy, weighted_answer_loss


def add_options(options: argparse.ArgumentParser, inference: str) -> None:
    """inference: the default"""
    add = options.add_argument
    add("--inference", choices=("rank", "generate"), default=inference, help="(default: %(default)s)")
    add("--beams", type=int, default=1, help="of generation: 1 in Aurora's release, 3 in BLIP's (default: 1)")
    add("--answers", type=int, default=3128, help="candidates: the training split's most frequent (default: 3128)")
    add("--answer-list", type=Path, help="candidates: a JSON list instead, such as BLIP's answer_list.json")
    add(
        "--label-smoothing",
        type=float,
        default=0.0,
        help="0.1 in BLIP's own training, none in the release (default: 0)",
    )


def candidates(args: argparse.Namespace, train: Sequence[Example]) -> list[str] | None:
    """What --inference rank chooses from."""
    if args.inference != "rank":
        return None
    if args.answer_list is not None:
        return records(read_json(args.answer_list), args.answer_list)
    found = common_answers(train, args.answers)
    if not found:
        fail("--train: no answers to choose from")
    return found


def common_answers(examples: Sequence[Example], most: int | None = None) -> list[str]:
    """What most annotators say, of all questions: the most frequent first, then by letters.

    A single answer stays as it is written, because `accuracy` compares it so.
    """
    given = (e.answers if len(e.answers) == 1 else map(normalize_answer, e.answers) for e in examples)
    first = (Counter(answers).most_common(1) for answers in given)
    counts = Counter(found[0][0] for found in first if found)
    counts.pop("", None)
    return [answer for answer, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))][:most]


class Answering:
    """model: BlipForQuestionAnswering;  tokenizer: its own;  frames: "concat" | "mean";  scale: of the loss"""

    def __init__(
        self, args: argparse.Namespace, model: nn.Module, tokenizer: Any, frames: str = "concat", scale: float = 1.0
    ):
        self.args, self.model, self.tokenizer, self.frames, self.scale = args, model, tokenizer, frames, scale
        self.text = model.config.text_config

    def question(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(states (B, T, d), mask (B, T)) of the questions that read their images."""
        states = see(self.model, batch["pixels"])
        if self.frames == "mean":
            states = states.mean(dim=1, keepdim=True)
        mask = batch["attention_mask"]
        return fuse(self.model, batch["input_ids"], mask, states), mask

    def tokens(self, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(ids, mask), (A, T): [DEC], the answer, [SEP]"""
        tokens = self.tokenizer(list(answers), padding=True, return_tensors="pt").to(self.args.device)
        ids = tokens["input_ids"]
        ids[:, 0] = self.text.bos_token_id
        return ids, tokens["attention_mask"]

    def loss(self, batch: dict[str, Any], progress: float) -> Tensor:
        """Of every answer that a question was given, by the part of the annotators who gave it."""
        batch = moved(batch, self.args.device)
        given = [Counter(example.answers) for example in batch["examples"]]
        counts = torch.tensor([len(each) for each in given])
        weights = [n / each.total() for each in given for n in each.values()]
        ids, mask = self.tokens([answer for each in given for answer in each])
        states, seen = (t.repeat_interleave(counts.to(t.device), dim=0) for t in self.question(batch))
        logits = self.model.text_decoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=states, encoder_attention_mask=seen
        ).logits.float()
        labels = ids.masked_fill(mask == 0, -100)
        weights = self.scale * torch.tensor(weights, device=ids.device)
        return weighted_answer_loss(logits, labels, weights, counts, label_smoothing=self.args.label_smoothing)

    def answer(self, batch: dict[str, Any], candidates: Sequence[str] | None) -> list[str]:
        """One answer for each question: of the candidates, or else written freely."""
        states, mask = self.question(moved(batch, self.args.device))
        if candidates is None:
            return self.generate(states, mask)
        ids, real = self.tokens(candidates)
        return [candidates[self.rank(s[None], m[None], ids, real)] for s, m in zip(states, mask)]

    def rank(self, states: Tensor, mask: Tensor, ids: Tensor, real: Tensor) -> int:
        """The likeliest candidate of the k whose first token is the likeliest."""
        decoder = self.model.text_decoder
        start = decoder(input_ids=ids[:1, :1], encoder_hidden_states=states, encoder_attention_mask=mask).logits
        near = start[0, 0][ids[:, 1]].topk(min(self.args.k_test, len(ids))).indices
        ids, real = ids[near], real[near]
        logits = decoder(
            input_ids=ids,
            attention_mask=real,
            encoder_hidden_states=states.expand(len(near), -1, -1),
            encoder_attention_mask=mask.expand(len(near), -1),
        ).logits
        labels = ids.masked_fill(real == 0, -100)[:, 1:]
        unlikely = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, reduction="none").sum(dim=1)
        return near[unlikely.argmin()].item()

    def generate(self, states: Tensor, mask: Tensor) -> list[str]:
        """(The release's reads the padding of a batch's shorter questions, so that answers depend on the batch.)"""
        written = self.model.text_decoder.generate(
            input_ids=torch.full((len(states), 1), self.text.bos_token_id, device=states.device),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            eos_token_id=self.text.sep_token_id,
            pad_token_id=self.text.pad_token_id,
            max_new_tokens=9,
            num_beams=self.args.beams,
            do_sample=False,
        )
        return self.tokenizer.batch_decode(written[:, 1:], skip_special_tokens=True)

    @torch.no_grad()
    def predict(self, batches: DataLoader, candidates: Sequence[str] | None) -> dict[Any, str]:
        """{the question's key: an answer}"""
        answers = {}
        for batch in batches:
            keys = [example.key for example in batch["examples"]]
            answers |= zip(keys, self.answer(batch, candidates))
        return answers


def accuracy(examples: Sequence[Example], predictions: dict[Any, str]) -> float:
    """With the ten answers of VQA the challenge's; with a single one, how many are the same, letter by letter."""
    if all(len(example.answers) >= 4 for example in examples):
        return vqa_accuracy([predictions[example.key] for example in examples], [e.answers for e in examples])
    return sum(predictions[e.key] == e.answers[0] for e in examples) / len(examples)
