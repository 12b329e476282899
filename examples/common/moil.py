"""MoIL's options, optimizer groups and evaluations, the same for every model. Defaults are those of its release."""

import argparse
from collections.abc import Callable

from peft_kernels import Adapter, MoIL, MoILConfig


def add_options(options: argparse.ArgumentParser) -> None:
    add = options.add_argument
    add("--init", choices=("default", "released"), default="released", help="of the transforms (default: released)")
    add("--decay", type=float, default=0.9996, help="of the teacher; a short run needs less (default: %(default)s)")
    add("--ema-per", choices=("optimizer_step", "micro_batch"), default="micro_batch", help="(default: %(default)s)")
    add("--reduction", choices=("mean", "sum", "relative"), default="mean", help="of the imitation (default: mean)")


def add_rates(options: argparse.ArgumentParser) -> None:
    add = options.add_argument
    add("--head-lr", type=float)
    add("--adapter-lr", type=float, help="instead of --lr")
    add("--adapter-eps", type=float, help="Adam's, whose 1e-8 is more than most of the mean's gradients")


def config(args: argparse.Namespace, preset: str, **more: object) -> MoILConfig:
    return MoILConfig(
        preset=preset,
        rank=args.rank,
        transform_rank=args.rank,
        init=args.init,
        decay=args.decay,
        ema_per=args.ema_per,
        reduction=args.reduction,
        backend=args.backend,
        **more,
    )


def groups(args: argparse.Namespace, adapter: Adapter) -> list[dict]:
    """The adapter's parameter groups, its heads at their own rate. As in the release everything but biases decays: of
    the heads the scale of their LayerNorm, too."""
    heads = {id(p): not name.endswith("bias") for name, p in adapter.named_parameters("head")}
    split = []
    for group in adapter.param_groups(args.lr, args.adapter_lr, args.adapter_eps, args.weight_decay):
        rest = [p for p in group["params"] if id(p) not in heads]
        split += [{**group, "params": rest}] if rest else []
    for decays in (True, False):
        params = [p for p in adapter.parameters("head") if heads[id(p)] == decays]
        decay = args.weight_decay if decays else 0.0
        split += [{"params": params, "lr": args.head_lr, "weight_decay": decay}] if params else []
    return split


def evaluate(moil: MoIL, judge: Callable[[str], dict[str, float]]) -> dict[str, float]:
    """Metrics of student, live weights and teacher, whose names they begin with.

    judge(mode): metrics; mode as `predictions.save` has it, "" for the student, which is what is kept
    """
    error = moil.last_relative_error
    results = {} if error is None else {"relative_error": error}
    for mode in ("student", "live", "teacher"):
        with moil.evaluate(mode):
            found = judge("" if mode == "student" else mode)
        results |= {f"{mode}_{name}": value for name, value in found.items()}
    return results
