"""VQA v2 and NLVR2 as classification: which examples train, VQA's labels and their scores, and what is written of an
evaluation. The splits and rules are those of MoIL's release (vilt/datasets, vilt/utils/write_vqa.py).
"""

import argparse
import json
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import predictions, training
from common.answering import accuracy
from common.data import Example, fail, field, read_json, read_nlvr2, read_vqa, records
from peft_kernels.objectives import normalize_answer

SPLITS = {"vqa": ("held-out", "val2014", "test2015", "test-dev2015"), "nlvr2": ("dev", "test1")}
SCORES = (0.0, 0.3, 0.6, 0.9)  # of an answer that 0, 1, 2, 3 annotators gave; 1 from the fourth on


def add_options(options: argparse.ArgumentParser) -> None:
    add = options.add_argument
    add("--held-out", type=int, default=1000, metavar="IMAGES", help="vqa: of val2014, not trained (default: 1000)")
    add("--min-answers", type=int, default=9, help="vqa: questions that make an answer a label (default: 9)")


def check_split(args: argparse.Namespace, splits: Sequence[str], default: str) -> None:
    args.split = args.split or default
    if args.split not in splits:
        fail(f"--split: expected {args.task}'s {', '.join(splits)}, got {args.split!r}")
    if args.split.startswith("test") and args.task == "vqa" and not training.only_evaluates(args):
        fail(f"--split: the answers of {args.split} are not public; take it with --evaluate or --zero-shot")


# ---- examples -------------------------------------------------------------------------------------------------------


def read(args: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """(training, test) examples of args.split; no training examples for an evaluation alone."""
    check_split(args, SPLITS[args.task], SPLITS[args.task][0])
    evaluates = training.only_evaluates(args)
    if args.task == "nlvr2":
        train = [] if evaluates else read_nlvr2(args.data, "train")
        return train[: args.limit], read_nlvr2(args.data, args.split)[: args.limit]
    train = [] if evaluates else read_vqa(args.data, "train2014")
    if args.split == "held-out":
        rest, test = held_out(read_vqa(args.data, "val2014"), args.held_out)
        train += [] if evaluates else rest
    else:
        test = read_vqa(args.data, args.split)
    return train[: args.limit], test[: args.limit]


def held_out(examples: Sequence[Example], count: int) -> tuple[list[Example], list[Example]]:
    """(the rest, the questions about `count` images, always the same): the release's are random, and not published."""
    images = sorted({example.images for example in examples})
    if not 1 <= count < len(images):
        fail(f"--held-out: expected 1 to {len(images) - 1} of the {len(images)} images of val2014, got {count}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    kept = {images[number] for number in order.tolist()}
    return [e for e in examples if e.images not in kept], [e for e in examples if e.images in kept]


# ---- VQA's labels ---------------------------------------------------------------------------------------------------


def known_answers(args: argparse.Namespace) -> list[str]:
    """VQA's labels, written beside the checkpoints, whose head has them in this order; read again for these."""
    if args.evaluate is not None or args.resume:
        return read_json((args.evaluate.parent if args.evaluate is not None else args.out) / "answers.json")
    splits = ("train2014",) if args.split == "val2014" else ("train2014", "val2014")
    answers = frequent_answers(args.data, splits, args.min_answers)
    if not answers:
        fail(f"--min-answers: no answer is that of {args.min_answers} questions")
    training.save_text(args.out / "answers.json", json.dumps(answers) + "\n")
    return answers


def frequent_answers(folder: Path, splits: Sequence[str], least: int) -> list[str]:
    """The answers that annotators agreed on in at least so many questions; of train2014 and val2014 9 give 3,129."""
    counts: Counter[str] = Counter()
    for split in splits:
        path = folder / f"v2_mscoco_{split}_annotations.json"
        for number, one in enumerate(records(field(read_json(path), "annotations", path), f"{path}: annotations")):
            counts[normalize_answer(field(one, "multiple_choice_answer", f"{path}: annotation {number}"))] += 1
    counts.pop("", None)
    return [answer for answer, n in counts.items() if n >= least]


def answerable(examples: Sequence[Example], answers: Container[str]) -> list[Example]:
    """Without the questions none of whose answers is a label: they would teach that nothing is right."""
    return [example for example in examples if any(answer in answers for answer in example.answers)]


def soft_scores(example: Example, labels: Mapping[str, int]) -> Tensor:
    """(labels,): an answer's score by how many annotators gave it, letter for letter"""
    scores = torch.zeros(len(labels))
    for answer, count in Counter(example.answers).items():
        if answer in labels:
            scores[labels[answer]] = SCORES[count] if count < len(SCORES) else 1.0
    return scores


# ---- evaluation -----------------------------------------------------------------------------------------------------


def judge(args: argparse.Namespace, test: Sequence[Example], found: dict[Any, str], mode: str = "") -> dict[str, float]:
    """Metrics of the answers `found`, by the examples' keys; writes them, as the data set's own evaluation reads them
    (answers_SPLIT.json of VQA, predictions_SPLIT.csv of NLVR2), and one by one (common/predictions.py).

    mode: as `predictions.save` has it; the data set's file is written of "" alone
    """
    predictions.save(args.out, predictions.answer_rows(test, found, accuracy), mode)
    if not mode and args.task == "vqa":
        rows = [{"question_id": key, "answer": answer} for key, answer in found.items()]
        training.save_text(args.out / f"answers_{args.split}.json", json.dumps(rows) + "\n")
    elif not mode:
        lines = (f"{key},{answer}\n" for key, answer in found.items())
        training.save_text(args.out / f"predictions_{args.split}.csv", "".join(lines))
    return {"accuracy": accuracy(test, found)} if test[0].answers else {"answered": len(found)}
