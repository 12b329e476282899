"""Training state on disk, so that a stopped run goes on as if it had not been: safetensors, nothing pickled."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from peft_kernels.adapters.checkpoint import save_tensors


def save_training(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, record: dict[str, Any]) -> None:
    """All that is not computed anew: the model, the optimizer's moments, torch's generators, and `record`."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    slots: dict[str, dict[str, Any]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                slots.setdefault(str(index), {})[name] = value
    tensors["generator"] = torch.get_rng_state()
    if (device := _device(model)).type == "cuda":
        tensors["cuda_generator"] = torch.cuda.get_rng_state(device)
    save_tensors(path, tensors, {"record": json.dumps({"record": record, "slots": slots})})


def load_training(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The inverse, into a model and an optimizer that were made alike; returns the record."""
    device = _device(model)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["record"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in header["slots"].items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})  # which moves tensors to their parameters'
    torch.set_rng_state(tensors["generator"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda_generator"], device)
    return header["record"]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
