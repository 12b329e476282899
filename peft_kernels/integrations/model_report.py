"""`python -m peft_kernels explain FOLDER`: which linear layers of a model an adapter would take, and on which backend.

FOLDER holds a model of transformers, or its config.json alone: no weights are read. Layers of a stack are one line.
"""

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import nn

from peft_kernels import kinds
from peft_kernels.adapters.lora import LoRAConfig
from peft_kernels.adapters.targets import find_targets
from peft_kernels.backend import resolve
from peft_kernels.presets import PRESETS


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report and return 0, or 1 where there is no model to report on."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_kernels explain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default: 8)")
    parser.add_argument("--dropout", action="store_true", help="adapters that drop, as in training")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(argv)
    try:
        model = model_without_weights(given.folder)
        like = torch.empty(0, dtype=getattr(torch, given.dtype), device=given.device)
    except (ValueError, RuntimeError) as error:
        print(f"explain: {error}", file=sys.stderr)
        return 1
    print(report(model, like, given.rank, given.dropout))
    return 0


def model_without_weights(folder: Path) -> nn.Module:
    """The model that config.json names, on the meta device. Raises ValueError, naming the file, where there is none."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["architectures"][0]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path}: expected the configuration of a model of transformers, got {error!r}") from None
    if not isinstance(known := getattr(transformers, str(kind), None), type):
        raise ValueError(f"{path}: transformers {transformers.__version__} has no model named {kind!r}")
    with torch.device("meta"):
        return known(known.config_class.from_dict(config))


def report(model: nn.Module, like: torch.Tensor, rank: int, dropout: bool) -> str:
    """like: a tensor of the dtype and on the device that the model would compute on"""
    presets = fitting(model)
    taken = defaultdict(list)  # preset names by layer
    for preset, names in presets.items():
        for name in names:
            taken[name].append(preset)
    rows, counts, reasons = {}, Counter(), set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kind = re.sub(r"\.\d+(?=\.|$)", ".*", name)
            shape = f"{module.in_features} → {module.out_features}"
            counts[kind, shape] += 1
            wide = kinds.linear(module.in_features, module.out_features, dropout)
            choice = resolve("lowrank_linear", (like,), rank=rank, kind=wide)
            reasons.add(f"{choice.name}: {choice.reason}")
            rows.setdefault((kind, shape), (kind, shape, choice.name, ", ".join(taken[name]) or "–"))
    widths = [max((len(row[column]) for row in rows.values()), default=0) for column in range(3)]
    told = [f"{type(model).__name__}: {sum(counts.values())} linear layers"]
    told += [f"  preset {preset}: {len(names)} of them" for preset, names in presets.items()]
    for key, (*cells, which) in rows.items():
        aligned = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths))
        told.append(f"  {counts[key]:>3} × {aligned}  {which}")
    return "\n".join([*told, *sorted(reasons)])


def fitting(model: nn.Module) -> dict[str, list[str]]:
    """The layers that each preset takes of this model, for the presets that fit it."""
    found = {}
    for preset in PRESETS:
        try:
            found[preset] = [match.name for match in find_targets(model, LoRAConfig(preset=preset))]
        except (TypeError, ValueError):  # the preset is for other models
            continue
    return found
