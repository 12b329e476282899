"""The training loop of all examples: AdamW, a schedule, mixed precision, and a checkpoint after every epoch.

OUT/epoch_1/        the adapter, by save_pretrained: what --evaluate and from_pretrained read
OUT/state.pt        everything that --resume needs, of the last whole epoch
OUT/run.json        what trains, with which settings, and how large a saved epoch is
OUT/losses.jsonl    the loss of every optimizer step
OUT/results.json    loss and metrics of every epoch
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.data import fail
from peft_kernels import Adapter
from peft_kernels.adapters.base import KINDS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What may differ between a run and its continuation
PLACES = {"script", "data", "images", "features", "tokenizer", "itm_head", "out", "device", "workers"}
PLACES |= {"resume", "zero_shot", "evaluate", "eval_every"}


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def parser(description: str, *, model: str | None, out: str, weight_decay: float = 0.05) -> argparse.ArgumentParser:
    """The options that all examples have. out: "runs/SCRIPT" """
    options = argparse.ArgumentParser(description=description)
    options.set_defaults(script=Path(out).name)
    add = options.add_argument
    add("--model", default=model, help="a folder or a name on the Hugging Face hub (default: %(default)s)")
    add("--data", type=Path, required=True, help="the data set's folder")
    add("--out", type=Path, default=Path(out), help="for checkpoints and results (default: %(default)s)")
    add("--resume", action="store_true", help="continue the run in --out after its last whole epoch")
    add("--zero-shot", action="store_true", help="evaluate the model as it is, without any adapter")
    add("--evaluate", type=Path, metavar="FOLDER", help="evaluate a saved adapter, such as OUT/epoch_4")
    add("--eval-every", type=int, default=1, metavar="EPOCHS", help="always after the last (default: %(default)s)")
    add("--epochs", type=int)
    add("--batch-size", type=int)
    add("--accumulate", type=int, default=1, help="batches for one optimizer step (default: %(default)s)")
    add("--lr", type=float)
    add("--weight-decay", type=float, default=weight_decay, help="(default: %(default)s)")
    add("--precision", choices=DTYPES, default="fp32", help="of autocast; weights stay float32 (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=0, help="processes that load images (default: %(default)s)")
    add("--limit", type=int, help="take the first so many examples of each split, for a quick try")
    add("--seed", type=int, default=0)
    add("--backend", default="auto", choices=("auto", "cuda", "triton", "torch"), help="of the adapters' kernels")
    return options


def parse(options: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parsed, checked, and seeded."""
    args = options.parse_args(argv)
    for name in ("epochs", "batch_size", "accumulate", "limit", "eval_every"):
        value = getattr(args, name)
        if value is not None and value < 1:
            fail(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    needed = [("--resume", args.out / "state.pt")] if args.resume else []
    needed += [("--evaluate", args.evaluate / "adapter_config.json")] if args.evaluate is not None else []
    for option, file in needed:
        if not file.is_file():
            fail(f"{option}: {file}: no such file")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        fail("--device: torch sees no CUDA device here")
    torch.manual_seed(args.seed)
    return args


def fill(args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Options that were not given, where what they should be depends on others."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def only_evaluates(args: argparse.Namespace) -> bool:
    return args.zero_shot or args.evaluate is not None


def cosine_by_epoch(progress: float, epochs: int) -> float:
    """BLIP's and Aurora's: the rate of a whole epoch, from 1 towards 0. progress: epochs done, with a fraction"""
    return (1 + math.cos(math.pi * int(progress) / epochs)) / 2


def linear_with_warmup(progress: float, epochs: int) -> float:
    """ViLT's and MoIL's: up for the first tenth, then down to 0, at every step."""
    warm = 0.1 * epochs
    return progress / warm if progress < warm else (epochs - progress) / (epochs - warm)


def autocast(args: argparse.Namespace) -> AbstractContextManager:
    return torch.autocast(torch.device(args.device).type, DTYPES[args.precision], enabled=args.precision != "fp32")


@torch.no_grad()
def measure(args: argparse.Namespace, model: nn.Module, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The metrics, always of the same random numbers (ViLT draws the order of its patches); training's go on after."""
    model.eval()
    with torch.random.fork_rng(), autocast(args):
        torch.manual_seed(args.seed)
        return evaluate()


def report(args: argparse.Namespace, model: nn.Module, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Evaluation alone, without training."""
    results = measure(args, model, evaluate)
    print(json.dumps(results), flush=True)
    save_json(args.out / "evaluation.json", results)
    return results


def fit(
    args: argparse.Namespace,
    adapter: Adapter,
    batches: DataLoader,
    loss: Callable[[dict, float], Tensor],
    evaluate: Callable[[], dict[str, float]],
    *,
    groups: list[dict] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    schedule: Callable[[float, int], float] = cosine_by_epoch,
    before_step: Callable[[float, int], object] | None = None,
    after_step: Callable[[], object] | None = None,
    state: dict[str, Stateful] | None = None,
) -> list[dict[str, float]]:
    """Train for args.epochs.

    loss(batch, progress): a 0-d tensor;  evaluate(): metrics
    groups: of the optimizer, otherwise adapter.param_groups(args.lr)
    before_step(loss_scale, micro_batches): when gradients are there, as MoIL wants it;  after_step(): for averages
    state: what else a resumed run needs
    returns one dictionary for each epoch
    """
    optimizer = torch.optim.AdamW(groups or adapter.param_groups(args.lr, weight_decay=args.weight_decay), betas=betas)
    rates = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.precision == "fp16")
    kept: dict[str, Stateful] = {"adapter": adapter, "optimizer": optimizer, "scaler": scaler, **(state or {})}
    history = resume(args, kept) if args.resume else []
    adapter.print_trainable_parameters()
    run = described(args, adapter)
    save_json(args.out / "run.json", run)
    steps = math.ceil(len(batches) / args.accumulate)
    losses = earlier_losses(args.out / "losses.jsonl", steps * len(history))
    for epoch in range(len(history), args.epochs):
        adapter.model.train()
        stream, of_steps = iter(batches), torch.zeros(steps, device=args.device)  # nothing waits for the device
        for step in range(steps):
            progress = epoch + step / steps
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * schedule(progress, args.epochs)
            window = list(islice(stream, args.accumulate))
            for batch in window:
                with autocast(args):
                    value = loss(batch, progress)
                scaler.scale(value / len(window)).backward()
                of_steps[step] += value.detach() / len(window)
            if before_step is not None:
                before_step(scaler.get_scale(), len(window))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if after_step is not None:
                after_step()
        losses += of_steps.tolist()
        save_lines(args.out / "losses.jsonl", [{"step": n, "loss": value} for n, value in enumerate(losses, 1)])
        mean = sum(losses[-steps:]) / steps
        if not math.isfinite(mean):
            fail(f"the loss of epoch {epoch + 1} is {mean}; the last checkpoint is the epoch before's")
        record = {"epoch": epoch + 1, "step": len(losses), "loss": mean, "lr": optimizer.param_groups[0]["lr"]}
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            record |= measure(args, adapter.model, evaluate)
        history.append(record)
        print(json.dumps(record), flush=True)
        folder = args.out / f"epoch_{epoch + 1}"
        adapter.save_pretrained(folder)
        save_json(args.out / "run.json", run | {"stored_bytes": sum(f.stat().st_size for f in folder.iterdir())})
        save_json(args.out / "results.json", history)
        save_state(args, kept, history)
    return history


# ---- files ----------------------------------------------------------------------------------------------------------


def save_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """A crash leaves the earlier file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_text(path: Path, text: str) -> None:
    save_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def save_json(path: Path, value: Any) -> None:
    save_text(path, json.dumps(value, indent=2) + "\n")


def save_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """.jsonl; what JSON does not know, such as a path, as text"""
    save_text(path, "".join(json.dumps(row, default=str) + "\n" for row in rows))


def described(args: argparse.Namespace, adapter: Adapter) -> dict[str, Any]:
    """What run.json says: all that can be said of a run before it is over."""
    return {
        "script": args.script,
        "method": adapter.method,
        "trained": {kind: adapter.num_parameters(kind) for kind in KINDS},
        "total": sum(p.numel() for p in adapter.model.parameters()),
        "settings": {name: str(value) for name, value in vars(args).items()},
    }


def earlier_losses(path: Path, steps: int) -> list[float]:
    """The losses of the epochs that a resumed run has behind it."""
    lines = path.read_text(encoding="utf-8").splitlines()[:steps] if steps and path.is_file() else []
    if len(lines) < steps:
        fail(f"--resume: {path}: expected the losses of {steps} steps, got {len(lines)}")
    return [json.loads(line)["loss"] for line in lines]


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) for name, value in vars(args).items() if name not in PLACES}


def save_state(args: argparse.Namespace, kept: dict[str, Stateful], history: list[dict]) -> None:
    state = {name: each.state_dict() for name, each in kept.items()}
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state_all()
    whole = {"state": state, "random": random, "history": history, "settings": settings(args)}
    save_atomically(args.out / "state.pt", lambda file: torch.save(whole, file))


def resume(args: argparse.Namespace, kept: dict[str, Stateful]) -> list[dict]:
    """Put everything back as it was after the last whole epoch; returns the epochs until then."""
    path = args.out / "state.pt"
    whole = torch.load(path, map_location="cpu", weights_only=True)  # tensors and numbers, no code
    different = [name for name, value in settings(args).items() if whole["settings"].get(name) != value]
    if different:
        was = ", ".join(f"--{name.replace('_', '-')} {whole['settings'].get(name)}" for name in different)
        fail(f"--resume: {path} was trained with {was}")
    for name, each in kept.items():
        each.load_state_dict(whole["state"][name])
    torch.set_rng_state(whole["random"]["cpu"])
    if torch.cuda.is_available() and "cuda" in whole["random"]:
        torch.cuda.set_rng_state_all(whole["random"]["cuda"])
    return whole["history"]
