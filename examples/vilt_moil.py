"""Fine-tune ViLT with MoIL on VQA v2, NLVR2 or Flickr30K/COCO retrieval.

The attention's full weights train, a teacher follows them, low-rank adapters imitate the teacher; what is kept is the
student that the adapters are. Every evaluation gives student, live weights and teacher. Defaults are those of MoIL's
release (github.com/luogen1996/MoIL, vilt/config.py): ranks 96, decay 0.9996, 10 epochs with a tenth of warm-up, batches
of 256 (128 for NLVR2) by accumulation, weight decay 0.01, a tenfold rate for the head of VQA. Two are ours: the teacher
moves once per optimizer step (--ema-per micro_batch is the release's), and of retrieval's objectives there is the
ranking of one right among fifteen wrong captions, not the matching loss beside it, for which transformers' class has no
head. The release also augments images (--augment: random crops and flips), and trains VQA on most of the validation
split too; here that split is evaluated.

    python examples/vilt_moil.py --task vqa --data vqa2
    python examples/vilt_moil.py --task nlvr2 --data nlvr2
    python examples/vilt_moil.py --task retrieval --data flickr30k
"""

import argparse
import json
from pathlib import Path
from typing import Any

from common import training
from common.answering import common_answers
from common.blip import saved
from common.data import Example, Examples, checked, fail, loader, read_json, read_karpathy, read_nlvr2, read_vqa
from common.vilt import Batches, Task
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForQuestionAnswering,
    ViltModel,
)

from peft_kernels import MoIL, MoILConfig
from peft_kernels.objectives import normalize_answer

MODELS = {
    "vqa": ViltForQuestionAnswering,
    "nlvr2": ViltForImagesAndTextClassification,
    "retrieval": ViltForImageAndTextRetrieval,
}
# batch_size · accumulate is the release's batch; how it is cut depends on a GPU's memory
PUBLISHED = {
    "vqa": {"batch_size": 16, "accumulate": 16, "head_lr": 1e-3},
    "nlvr2": {"batch_size": 32, "accumulate": 4, "head_lr": 1e-4},
    "retrieval": {"batch_size": 4, "accumulate": 64, "head_lr": 1e-4},
}


def load(args: argparse.Namespace, train: list[Example]) -> tuple[nn.Module, Any, list[str]]:
    """(model, processor, VQA's labels): those of a model that has answered questions, or of the training split."""
    answers, options = [], {}
    try:
        config = AutoConfig.from_pretrained(args.model)
        if args.task == "vqa":
            answers = [config.id2label[label] for label in range(config.num_labels)]
            if "LABEL_0" in answers:  # never trained for it
                answers = training_answers(args, train)
                options = {"num_labels": len(answers), "id2label": dict(enumerate(answers))}
                options["label2id"] = {answer: label for label, answer in enumerate(answers)}
        elif args.task == "nlvr2":
            options = {"num_images": 2, "num_labels": 2, "modality_type_vocab_size": 3}
        model = MODELS[args.task].from_pretrained(args.model, ignore_mismatched_sizes=True, **options)
        processor = AutoProcessor.from_pretrained(args.model)
        if args.task == "nlvr2" and config.modality_type_vocab_size == 2:  # the second image is told as the first is
            known = ViltModel.from_pretrained(args.model).embeddings.token_type_embeddings.weight
            model.vilt.embeddings.token_type_embeddings.weight.data = known.data[[0, 1, 1]].clone()
    except (OSError, ValueError) as error:
        fail(f"--model: {args.model}: {error}")
    return model.to(args.device), processor, answers


def training_answers(args: argparse.Namespace, train: list[Example]) -> list[str]:
    """Written beside the checkpoints, whose head has them in this order."""
    if args.evaluate is not None or args.resume:
        return read_json((args.evaluate.parent if args.evaluate is not None else args.out) / "answers.json")
    answers = common_answers(train, least=args.min_answers)
    if not answers:
        fail(f"--min-answers: no answer is the first of {args.min_answers} questions")
    training.save_text(args.out / "answers.json", json.dumps(answers) + "\n")
    return answers


def read(args: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """(training, test) examples."""
    if args.task == "vqa":
        train, test = read_vqa(args.data, "train2014"), read_vqa(args.data, "val2014")
    elif args.task == "nlvr2":
        train, test = read_nlvr2(args.data, "train"), read_nlvr2(args.data, args.split or "dev")
    else:
        splits = read_karpathy(args.data, args.images)
        train, test = splits["train"], splits[args.split or "test"]
    train, test = train[: args.limit], test[: args.limit]
    checked(test if training.only_evaluates(args) else train + test)
    return train, test


def groups(args: argparse.Namespace, moil: MoIL) -> list[dict]:
    """The adapter's parameter groups, the heads (without the pooler) at their own rate."""
    heads = {id(p) for name, p in moil.named_parameters("head") if "pooler" not in name}
    split = []
    for group in moil.param_groups(args.lr, args.adapter_lr, args.adapter_eps, args.weight_decay):
        for rate, is_head in ((group["lr"], False), (args.head_lr, True)):
            params = [p for p in group["params"] if (id(p) in heads) == is_head]
            split += [{**group, "params": params, "lr": rate}] if params else []
    return split


def main(argv: list[str] | None = None) -> list[dict] | dict:
    """Returns what every epoch's line prints; of an evaluation alone, its metrics."""
    options = training.parser(
        __doc__.splitlines()[0], model="dandelin/vilt-b32-mlm", out="runs/vilt_moil", weight_decay=0.01
    )
    options.set_defaults(lr=1e-4, epochs=10, accumulate=None)
    add = options.add_argument
    add("--task", choices=MODELS, required=True)
    add("--images", type=Path, help="retrieval: instead of DATA/images, or DATA")
    add("--split", help="to evaluate: nlvr2's dev (the default) or test1, retrieval's val or test (the default)")
    add("--augment", action="store_true", help="random crops and flips")
    add("--min-answers", type=int, default=9, help="vqa: questions that make an answer a label (default: 9)")
    add("--rank", type=int, default=96, help="of pairs and of transforms (default: %(default)s)")
    add("--decay", type=float, default=0.9996, help="of the teacher; a short run needs less (default: %(default)s)")
    add("--ema-per", choices=("optimizer_step", "micro_batch"), default="optimizer_step")
    add("--reduction", choices=("mean", "sum", "relative"), default="mean", help="of the imitation (default: mean)")
    add("--head-lr", type=float)
    add("--adapter-lr", type=float, help="instead of --lr")
    add("--adapter-eps", type=float, help="Adam's, whose 1e-8 is more than most of the mean's gradients")
    args = training.parse(options, argv)
    training.fill(args, PUBLISHED[args.task])

    train, test = read(args)
    model, processor, answers = load(args, train)
    task = Task(args, model, processor, test, answers)
    if args.zero_shot:
        return training.report(args, model, task.evaluate)
    if args.evaluate is not None:
        saved(args.evaluate, model)  # of MoIL the student alone
        return training.report(args, model, task.evaluate)
    config = MoILConfig(
        preset="vilt",
        rank=args.rank,
        transform_rank=args.rank,
        decay=args.decay,
        ema_per=args.ema_per,
        reduction=args.reduction,
        backend=args.backend,
    )
    moil = MoIL.wrap(model, config)

    def evaluate() -> dict[str, float]:
        error = moil.last_relative_error
        results = {} if error is None else {"relative_error": error}
        for mode in ("student", "live", "teacher"):
            with moil.evaluate(mode):
                results |= {f"{mode}_{name}": value for name, value in task.evaluate().items()}
        return results

    wrong = ()
    if args.task == "retrieval":
        wrong = train
        if len({example.owner for example in train}) < 2:
            fail("the training split has a single image, and so no wrong captions")
    if answers:  # questions whose answers are no labels would teach that nothing is right
        train = [example for example in train if set(map(normalize_answer, example.answers)) & set(answers)]
    batches = Batches(processor, answers, wrong)
    history = training.fit(
        args,
        moil,
        loader(args, Examples(train, augment=args.augment), batches, train=True),
        task.loss,
        evaluate,
        groups=groups(args, moil),
        betas=(0.9, 0.98),
        schedule=training.linear_with_warmup,
        before_step=lambda scale, micro_batches: moil.step(scale, micro_batches),
    )
    moil.export_lora(args.out / "lora")
    return history


if __name__ == "__main__":
    main()
