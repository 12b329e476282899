"""Fine-tune a two-stage model, which sees an image as a detector's regions, on VQA v2 or NLVR2.

--kind lxmert and visualbert are transformers' classes; bert is Oscar's and VinVL's way, a BERT whose words are followed
by a projection of region features with their boxes. Regions come from files (--features, any number of them); images
are not read. --method is moil (github.com/luogen1996/MoIL), aurora or lora.

MoIL's article has results of a two-stage model, its release neither code nor settings for one. So the defaults are
those of the release for ViLT, one recipe to compare all kinds by: rates 1e-4 and for VQA's head 1e-3, 10 epochs with a
tenth of warm-up, batches of 256 (128 for NLVR2), weight decay 0.01, fp16, 40 tokens, rank 96; of Aurora its article's
rank of 64. Dropout is the checkpoint's own. Oscar's release, which tunes all of VinVL, has instead: VQA 5e-5, 25
epochs, batches of 32, 128 tokens; NLVR2 3e-5, 20 epochs, batches of 72, 55 tokens; no warm-up, or 10,000 steps; decay
0.05, dropout 0.3, and 50 or 40 regions of an image (--regions). It also writes the detected objects' names behind the
question, which these files do not have, and which are left out here. The pooler, which is pretrained, stays frozen;
what the checkpoint has no values for trains whole. VisualBERT answers from the word before [SEP].

    python examples/two_stage.py --kind lxmert --task vqa --data vqa2 --features train2014.tsv val2014.tsv
    python examples/two_stage.py --kind bert --model vinvl/base --task nlvr2 --data nlvr2 --features regions/
"""

import argparse
from pathlib import Path
from typing import Any

from common import moil as imitation
from common import questions, training
from common.blip import saved
from common.data import Example, fail, loader
from common.region_models import KINDS, Batches, Task
from common.regions import RegionExamples, RegionFiles
from torch import nn
from transformers import BertTokenizer

from peft_kernels import Adapter, Aurora, AuroraConfig, LoRA, LoRAConfig, MoIL
from peft_kernels.presets import PRESETS

# What --model and --tokenizer are by default; VinVL's own checkpoint is a folder, and VisualBERT's has no tokenizer
HUB = {
    "lxmert": {"model": "unc-nlp/lxmert-base-uncased"},
    "visualbert": {"model": "uclanlp/visualbert-vqa-coco-pre", "tokenizer": "google-bert/bert-base-uncased"},
    "bert": {"model": "google-bert/bert-base-uncased"},
}
DEFAULTS = {
    "vqa": {"batch_size": 64, "accumulate": 4, "head_lr": 1e-3},
    "nlvr2": {"batch_size": 32, "accumulate": 4, "head_lr": 1e-4},
}
RANKS = {"moil": 96, "lora": 96, "aurora": 64}


def configured(args: argparse.Namespace, width: int) -> Any:
    """The model's configuration; ends where the model reads other regions than those of the files.

    width: numbers in a region's feature, without its box
    """
    config_class = KINDS[args.kind][0]
    written = config_class.get_config_dict(args.model)[0].get(
        "model_type", config_class.model_type
    )  # Oscar writes none
    if written != config_class.model_type:
        fail(f"--model: {args.model}: expected a checkpoint of {config_class.model_type}, got one of {written}")
    config = config_class.from_pretrained(args.model)
    if args.dropout is not None:
        config.hidden_dropout_prob = args.dropout
    if args.kind == "bert":
        config.img_feature_dim = getattr(config, "img_feature_dim", width + 6)
        config.num_images = 2 if args.task == "nlvr2" else 1
        widths = [config.img_feature_dim - box for box in (6, 4, 0)]
    else:
        widths = [config.visual_feat_dim if args.kind == "lxmert" else config.visual_embedding_dim]
    if width not in widths:
        wanted = " or ".join(map(str, widths))
        fail(f"--features: regions have {width} numbers, without their boxes; {args.model} reads {wanted}")
    return config


def load(args: argparse.Namespace, width: int) -> tuple[nn.Module, list[str], list[str]]:
    """(model, VQA's labels, modules that train whole): its heads, and what the checkpoint has no values for."""
    answers: list[str] = []
    model_class = KINDS[args.kind][1 if args.task == "vqa" else 2]
    try:
        config = configured(args, width)
        if args.task == "vqa":
            answers = questions.known_answers(args)
        setattr(config, "num_qa_labels" if args.kind == "lxmert" else "num_labels", len(answers) or 2)
        model, loaded = model_class.from_pretrained(
            args.model, config=config, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        fail(f"--model: {args.model}: {error}")
    missing = list(loaded["missing_keys"])
    lost = [name for name in missing if "att" in name.lower()]
    if lost:
        fail(f"--model: {args.model}: no values for {lost[0]}: is it a checkpoint of {args.kind}?")
    whole = {name: None for name in PRESETS[args.kind].heads if hasattr(model, name)}
    whole |= {name.rpartition(".")[0]: None for name in sorted(missing)}
    return model.to(args.device), answers, list(whole)


def wrap(args: argparse.Namespace, model: nn.Module, whole: list[str]) -> Adapter:
    if args.method == "moil":
        return MoIL.wrap(model, imitation.config(args, args.kind, modules_to_save=whole))
    common = {"preset": args.kind, "rank": args.rank, "dropout": args.adapter_dropout, "backend": args.backend}
    common["modules_to_save"] = whole
    if args.method == "lora":
        return LoRA.wrap(model, LoRAConfig(alpha=args.rank, **common))
    return Aurora.wrap(model, AuroraConfig(**common))


def read(args: argparse.Namespace) -> tuple[list[Example], list[Example], RegionFiles]:
    """(training examples, test examples, the regions of their images)"""
    train, test = questions.read(args)
    files = RegionFiles(args.features)
    files.check(train + test)
    return train, test, files


def main(argv: list[str] | None = None) -> list[dict] | dict:
    """Returns what every epoch's line prints; of an evaluation alone, its metrics."""
    options = training.parser(__doc__.splitlines()[0], model=None, out="runs/two_stage", weight_decay=0.01)
    options.set_defaults(lr=1e-4, epochs=10, accumulate=None, precision="fp16")
    add = options.add_argument
    add("--kind", choices=KINDS, required=True)
    add("--task", choices=DEFAULTS, required=True)
    add("--features", type=Path, nargs="+", required=True, metavar="PATH", help=".tsv files, folders of .npz files")
    add("--method", choices=RANKS, default="moil", help="(default: %(default)s)")
    add("--split", help="to evaluate: vqa's held-out, val2014 or test(-dev)2015, nlvr2's dev or test1")
    add("--tokenizer", help="a folder or a name on the hub (default: the model's, of VisualBERT BERT's)")
    add("--regions", type=int, default=50, help="of an image, at most (default: %(default)s)")
    add("--max-tokens", type=int, default=40, help="(default: %(default)s)")
    add("--rank", type=int, help="(default: 96, of Aurora 64)")
    add("--dropout", type=float, help="the model's (default: the checkpoint's own)")
    add("--adapter-dropout", type=float, default=0.1, help="of lora and aurora (default: %(default)s)")
    questions.add_options(options)
    imitation.add_options(options)
    imitation.add_rates(options)
    args = training.parse(options, argv)
    training.fill(args, {**HUB[args.kind], **DEFAULTS[args.task], "rank": RANKS[args.method]})

    train, test, files = read(args)
    try:
        tokenizer = BertTokenizer.from_pretrained(args.tokenizer or args.model)
    except (OSError, ValueError) as error:
        fail(f"--tokenizer: {args.tokenizer or args.model}: {error}")
    model, answers, whole = load(args, files.width)
    batches = Batches(tokenizer, args.max_tokens, answers)
    task = Task(args, model, loader(args, RegionExamples(test, files, args.regions), batches), test, answers)
    if args.zero_shot:
        return training.report(args, model, task.evaluate)
    if args.evaluate is not None:
        saved(args.evaluate, model)
        return training.report(args, model, task.evaluate)
    adapter = wrap(args, model, whole)
    imitates = isinstance(adapter, MoIL)
    if answers:
        train = questions.answerable(train, answers)
    return training.fit(
        args,
        adapter,
        loader(args, RegionExamples(train, files, args.regions), batches, train=True),
        task.loss,
        (lambda: imitation.evaluate(adapter, task.evaluate)) if imitates else task.evaluate,
        groups=imitation.groups(args, adapter),
        betas=(0.9, 0.98),
        schedule=training.linear_with_warmup,
        before_step=(lambda scale, micro_batches: adapter.step(scale, micro_batches)) if imitates else None,
    )


if __name__ == "__main__":
    main()
