"""What an adapted BLIP-base or ViLT-B costs to run, and to store: `steps.py --inference`.

    base       without an adapter
    unmerged   with its layers in the model
    merged     in the weights, and taken off; Aurora's gates on BLIP stay, since no weight can take them

Every method's three models take turns, after merged and unmerged outputs were compared. Adapters have random values:
fresh ones would change nothing. Latency is of one example, throughput of a batch, both of a whole forward without
gradients. Stored are the bytes of the adapter's file, the heads that train with every method included; PEFT's, too.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_kernels import explain
from peft_kernels.adapters.checkpoint import WEIGHTS_FILE

from . import steps_methods, timing
from .cases import WrongResult, errors
from .steps_methods import ALIKE, AURORA, LORA, MOIL, PEFT
from .steps_models import MODELS, SIZES, Batch, Model
from .steps_session import Absent, Options

METHODS = (PEFT, LORA, MOIL, AURORA)
BASE, UNMERGED, MERGED = STATES = ("base", "unmerged", "merged")
GPU_BATCH, CPU_BATCH = 64, 8
# Second factors, beside the first: with updates as large as the weights attention saturates and magnifies roundings.
# Aurora's are products of more factors.
UPDATE = {PEFT: 0.1, LORA: 0.1, MOIL: 0.1, AURORA: 10.0}
# Merged weights are rounded to the model's dtype. Of bfloat16's largest y that was 1 %, an adapter left out 8 % or more
MERGING = {"float32": ALIKE, "bfloat16": 0.03}


def measure(name: str, method: str, options: Options) -> list[dict]:
    """Three records, the base's first. Raises WrongResult before anything is timed, or Absent."""
    of, size, device, dtype = MODELS[name], SIZES[options.size], options.device, getattr(torch, options.dtype)
    if wrong := steps_methods.verify(of, [method], device):
        raise WrongResult(wrong[method])
    count = options.batch or (CPU_BATCH if device.type == "cpu" else GPU_BATCH)
    batches = {n: of.batch(size, n, device, dtype) for n in dict.fromkeys((1, count))}
    try:
        models = {BASE: of.build(size, device, dtype)}
        models[UNMERGED], adapter = steps_methods.wrapped(method, of, size, batches[1].pixels, UPDATE[method])
        models[MERGED], other = steps_methods.wrapped(method, of, size, batches[1].pixels, UPDATE[method])
        stored = stored_bytes(adapter, models[UNMERGED], of)
        backend = ", ".join(sorted({choice.name for choice in explain(models[UNMERGED]).values()})) or None
        merge(method, other, of)
        for model in models.values():
            model.eval()
        check(models, of, batches[count], options.dtype)
        found = {n: _times({s: partial(run, of, m, batch) for s, m in models.items()}, options)
                 for n, batch in batches.items()}  # fmt: skip
    except torch.cuda.OutOfMemoryError as error:
        raise Absent(str(error).strip().splitlines()[0]) from None
    return [
        {
            **{"model": name, "title": of.title, "size": options.size, "dtype": options.dtype, "state": state},
            "method": None if state == BASE else method,
            "backend": backend if state == UNMERGED else None,
            "stored_bytes": None if state == BASE else stored,
            **found[1][state],
            **{"batch": count, **{f"batch_{key}": value for key, value in found[count][state].items()}},
            "examples_per_s": 1e3 * count / found[count][state]["ms"],
        }
        for state in STATES
    ]


@torch.inference_mode()
def run(of: Model, model: nn.Module, batch: Batch) -> Tensor:
    return of.logits(model, batch)


def check(models: dict[str, nn.Module], of: Model, batch: Batch, dtype: str) -> None:
    """Raises WrongResult unless merging has changed nothing but roundings."""
    exact = run(of, models[UNMERGED], batch)
    error = errors({"y": run(of, models[MERGED], batch)}, {"y": exact})["y"]
    if not error <= MERGING[dtype]:  # so that NaN is wrong, too
        told = f"merged, y is off by {error:.1e} of its largest value, {MERGING[dtype]:.0e} is tolerated"
        raise WrongResult(told)


def merge(method: str, adapter: Any, of: Model) -> None:
    """adapter: ours, or a PeftModel"""
    if method == PEFT:
        adapter.merge_and_unload()
        return
    adapter.merge()
    if method != AURORA or "gates" not in of.aurora:
        adapter.remove()


def stored_bytes(adapter: Any, model: nn.Module, of: Model) -> int:
    """Of the file that the adapter is saved in. PEFT's model has no heads of its own: they are added as they are."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, WEIGHTS_FILE)
        if hasattr(adapter, "peft_config"):
            import peft

            heads = {n: p for n, p in model.named_parameters() if any(f".{head}." in f".{n}" for head in of.heads)}
            tensors = peft.get_peft_model_state_dict(adapter) | heads
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
        else:
            adapter.save_pretrained(folder)
        return path.stat().st_size


def _times(runs: dict[str, Callable[[], object]], options: Options) -> dict[str, dict]:
    """By state: milliseconds, half the distance of their quartiles, how many times as fast as the base; and in a CUDA
    graph, where one can be captured."""
    if options.device.type == "cpu":
        times, graphs = timing.time_on_cpu(runs, options.rounds), None
    else:
        times = {state: timing.time_on_gpu(lambda _, once=once: once(), 1) for state, once in runs.items()}
        try:
            graphs = timing.time_in_graphs(runs)
        except RuntimeError:  # what a graph cannot hold
            graphs = None
    return {
        state: {
            **{"ms": each.median * 1e3, "spread_ms": each.spread * 1e3},
            "vs_base": timing.speed_against(each, times[BASE]),
            "graph_ms": graphs[state].median * 1e3 if graphs else None,
            "graph_vs_base": timing.speed_against(graphs[state], graphs[BASE]) if graphs else None,
        }
        for state, each in times.items()
    }


def chosen(methods: Sequence[str] | None) -> list[str]:
    """Raises ValueError for a method that runs as the base does, or as another one."""
    others = [method for method in methods or () if method not in METHODS]
    if others:
        raise ValueError(f"--inference: {others[0]}: expected some of {', '.join(METHODS)}")
    return list(dict.fromkeys(methods or METHODS))
