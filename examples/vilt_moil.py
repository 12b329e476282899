"""Fine-tune ViLT with MoIL on VQA v2, NLVR2 or Flickr30K/COCO retrieval.

The attention's full weights train, a teacher follows them, low-rank adapters imitate the teacher; what is kept is the
student that the adapters are. Every evaluation gives student, live weights and teacher. Defaults are those of MoIL's
release (github.com/luogen1996/MoIL, vilt/config.py and README.md): ranks 96, decay 0.9996, transforms of standard
deviation 0.02 (--init default starts them at the identity), 10 epochs with a tenth of warm-up, batches of 256 (128 for
NLVR2) by accumulation, fp16, dropout 0.1, weight decay 0.01, a tenfold rate for the head of VQA, and RandAugment for
Flickr30K alone. The pooler, which is pretrained, stays frozen. Of retrieval the ranking of one caption among 15 wrong
ones trains alone: the release names a matching loss of weight 0.5, but runs what has weight 1 only.

As in the release the validation split trains, too, but for what --split evaluates: of VQA the questions about 1,000
images (--held-out; which ones the release took is not known), of Flickr30K all of it. NLVR2 and retrieval are evaluated
on the test split, where the release also chooses its best epoch; NLVR2's dev split is the default here.

What differs: wrong captions are those of other images, not of all; the questions held out are evaluated whether or not
an answer is a label. As in the release the teacher moves with every micro-batch, so that its pace depends on how
batches are cut (--ema-per optimizer_step does not).
rank_output starts from the head that pre-training matched images and captions with, which the hub's vilt-b32-mlm has
lost: --itm-head takes it from ViLT's own vilt_200k_mlm_itm.ckpt; without, rank_output starts at random, and says so.

    python examples/vilt_moil.py --task vqa --data vqa2
    python examples/vilt_moil.py --task vqa --data vqa2 --evaluate runs/vilt_moil/epoch_10 --split test-dev2015
    python examples/vilt_moil.py --task nlvr2 --data nlvr2
    python examples/vilt_moil.py --task retrieval --data flickr30k --itm-head vilt_200k_mlm_itm.ckpt
"""

import argparse
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import moil as imitation
from common import questions, training
from common.blip import saved
from common.data import Example, Examples, checked, fail, karpathy_dataset, loader, read_karpathy
from common.randaugment import rand_augment
from common.vilt import Batches, Task
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForQuestionAnswering,
    ViltModel,
)

from peft_kernels import MoIL

# batch_size · accumulate is the release's batch; how it is cut depends on a GPU's memory
PUBLISHED = {
    "vqa": {"batch_size": 16, "accumulate": 16, "head_lr": 1e-3},
    "nlvr2": {"batch_size": 32, "accumulate": 4, "head_lr": 1e-4},
    "retrieval": {"batch_size": 4, "accumulate": 64, "head_lr": 1e-4},
}


class ViltForRetrieval(ViltForImageAndTextRetrieval):
    """With the matching head of ViLT's pre-training, by its name there, for `rank_output` to start from."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.itm_score = nn.ModuleDict({"fc": nn.Linear(config.hidden_size, 2)})


MODELS = {
    "vqa": ViltForQuestionAnswering,
    "nlvr2": ViltForImagesAndTextClassification,
    "retrieval": ViltForRetrieval,
}


def load(args: argparse.Namespace) -> tuple[nn.Module, Any, list[str]]:
    """(model, processor, VQA's labels): those of a model that has answered questions, or the frequent answers."""
    answers, options = [], {"hidden_dropout_prob": args.dropout}
    try:
        config = AutoConfig.from_pretrained(args.model)
        if args.task == "vqa":
            answers = [config.id2label[label] for label in range(config.num_labels)]
            if "LABEL_0" in answers:  # never trained for it
                answers = questions.known_answers(args)
                options |= {"num_labels": len(answers), "id2label": dict(enumerate(answers))}
                options["label2id"] = {answer: label for label, answer in enumerate(answers)}
        elif args.task == "nlvr2":
            options |= {"num_images": 2, "num_labels": 2, "modality_type_vocab_size": 3}
        model, loaded = MODELS[args.task].from_pretrained(
            args.model, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
        processor = AutoProcessor.from_pretrained(args.model)
        if args.task == "nlvr2" and config.modality_type_vocab_size == 2:  # the second image is told as the first is
            known = ViltModel.from_pretrained(args.model).embeddings.token_type_embeddings.weight
            told = model.vilt.embeddings.token_type_embeddings.weight
            told.data = known.data[[0, 1, 1]].clone()
            told._is_hf_initialized = True  # transformers' own mark, by which a frozen random start would be warned of
    except (OSError, ValueError) as error:
        fail(f"--model: {args.model}: {error}")
    if args.task == "retrieval":
        start_ranking(args, model, set(loaded["missing_keys"]))
    for layer in model.vilt.encoder.layer:  # ViLT drops here, too; transformers' class does not
        within = layer.intermediate
        within.intermediate_act_fn = nn.Sequential(within.intermediate_act_fn, nn.Dropout(args.dropout))
    return model.to(args.device), processor, answers


def start_ranking(args: argparse.Namespace, model: nn.Module, missing: set[str]) -> None:
    """Start `rank_output` from the matching head's row for a match. missing: names that the checkpoint does not have"""
    head = model.itm_score["fc"]
    del model.itm_score
    if args.itm_head is not None:
        weight, bias = read_itm_head(args.itm_head, head.weight.shape)
    elif "rank_output.weight" not in missing or "itm_score.fc.weight" in missing:
        if "rank_output.weight" in missing and args.evaluate is None:
            print(f"{args.model} has no matching head: rank_output starts at random (--itm-head)", file=sys.stderr)
        return
    else:
        weight, bias = head.weight.data, head.bias.data
    model.rank_output.weight.data.copy_(weight[1:])
    model.rank_output.bias.data.copy_(bias[1:])


def read_itm_head(path: Path, shape: torch.Size) -> tuple[Tensor, Tensor]:
    try:
        whole = torch.load(path, map_location="cpu", weights_only=True)  # tensors, no code
        state = whole.get("state_dict", whole)
        weight, bias = state["itm_score.fc.weight"], state["itm_score.fc.bias"]
    except (OSError, RuntimeError, pickle.UnpicklingError, AttributeError, KeyError) as error:
        fail(f"--itm-head: {path}: expected tensors, with itm_score.fc.weight and .bias: {error}")
    if weight.shape != shape or bias.shape != shape[:1]:
        fail(f"--itm-head: {path}: expected itm_score.fc of {tuple(shape)}, got {tuple(weight.shape)}")
    return weight, bias


def read(args: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """(training, test) examples."""
    if args.task == "retrieval":
        train, test = read_captions(args)
    else:
        train, test = questions.read(args)
    checked(test if training.only_evaluates(args) else train + test)
    return train, test


def read_captions(args: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    questions.check_split(args, ("test", "val"), "test")
    splits, train = read_karpathy(args.data, args.images), []
    trains = ["train"]
    if karpathy_dataset(args.data) == "flickr30k" and args.split != "val":
        trains.append("val")
    for name in trains:
        first = 1 + max((example.owner for example in train), default=-1)
        train += [replace(example, owner=first + example.owner) for example in splits[name]]
    # The release has every caption of an image once, even where two annotators wrote the same
    train, test = ({(e.owner, e.text): e for e in examples} for examples in (train, splits[args.split]))
    return list(train.values())[: args.limit], list(test.values())[: args.limit]


def main(argv: list[str] | None = None) -> list[dict] | dict:
    """Returns what every epoch's line prints; of an evaluation alone, its metrics."""
    options = training.parser(
        __doc__.splitlines()[0], model="dandelin/vilt-b32-mlm", out="runs/vilt_moil", weight_decay=0.01
    )
    options.set_defaults(lr=1e-4, epochs=10, accumulate=None, precision="fp16")
    add = options.add_argument
    add("--task", choices=MODELS, required=True)
    add("--images", type=Path, help="retrieval: instead of DATA/images, or DATA")
    add("--split", help="to evaluate: vqa's held-out, val2014 or test(-dev)2015, nlvr2's dev or test1, … test or val")
    add("--augment", choices=("none", "randaugment"), help="(default: randaugment for flickr30k, else none)")
    add("--dropout", type=float, default=0.1, help="(default: %(default)s)")
    add("--itm-head", type=Path, metavar="FILE", help="retrieval: a checkpoint with itm_score.fc to start from")
    add("--rank", type=int, default=96, help="of pairs and of transforms (default: %(default)s)")
    questions.add_options(options)
    imitation.add_options(options)
    imitation.add_rates(options)
    args = training.parse(options, argv)
    training.fill(args, PUBLISHED[args.task])

    train, test = read(args)
    if args.augment is None:
        is_flickr = args.task == "retrieval" and karpathy_dataset(args.data) == "flickr30k"
        args.augment = "randaugment" if is_flickr else "none"
    model, processor, answers = load(args)
    task = Task(args, model, processor, test, answers)
    if args.zero_shot:
        return training.report(args, model, task.evaluate)
    if args.evaluate is not None:
        saved(args.evaluate, model)  # of MoIL the student alone
        return training.report(args, model, task.evaluate)
    moil = MoIL.wrap(model, imitation.config(args, "vilt"))

    wrong = ()
    if args.task == "retrieval":
        wrong = train
        if len({example.owner for example in train}) < 2:
            fail("the training split has a single image, and so no wrong captions")
    if answers:
        train = questions.answerable(train, answers)
    batches, augment = Batches(processor, answers, wrong), rand_augment if args.augment == "randaugment" else None
    history = training.fit(
        args,
        moil,
        loader(args, Examples(train, augment), batches, train=True),
        task.loss,
        lambda: imitation.evaluate(moil, task.evaluate),
        groups=imitation.groups(args, moil),
        betas=(0.9, 0.98),
        schedule=training.linear_with_warmup,
        before_step=lambda scale, micro_batches: moil.step(scale, micro_batches),
    )
    moil.export_lora(args.out / "lora")
    return history


if __name__ == "__main__":
    main()
