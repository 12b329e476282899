"""Adapters on disk: adapter_config.json and adapter_model.safetensors, whole or not there at all.

The weights' file carries the configuration in its header, so that one atomic rename decides what a folder holds;
adapter_config.json is its readable copy. Nothing is ever unpickled.
"""

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_DTYPES |= {"BOOL": torch.bool}
_HALVES = (torch.bfloat16, torch.float16)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a temporary file beside `path`, which then takes its place: a crash leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # what the umask allows, whatever `write` does
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_checkpoint(folder: str | os.PathLike, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Both files into `folder`, which is made if it is not there. Tensors may share memory."""
    folder = Path(folder)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    # One entry: with two, safetensors writes them in any order, and equal adapters would differ in bytes
    save_tensors(folder / WEIGHTS_FILE, tensors, {"adapter_config": text})
    write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, atomically; tensors may share memory, and each is written whole.

    Raises ValueError for a value that is not finite, which nothing would load: an earlier file stays.
    """
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: not written, since {name} holds values that are not finite")
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() > tensor.nbytes
        seen.add(storage.data_ptr())
        separate[name] = tensor.clone() if shared else tensor
    write_atomically(path, lambda temporary: save_file(separate, temporary, metadata=metadata))


class Checkpoint:
    """An opened folder: its configuration, and the names and shapes of its tensors; values are read by `tensors`.

    Raises FileNotFoundError where a file is missing, and ValueError, naming the file, where one is broken.
    """

    def __init__(self, folder: str | os.PathLike):
        self.path = Path(folder) / WEIGHTS_FILE
        copy = Path(folder) / CONFIG_FILE
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file")
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a dict
                self.shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
                kinds = {name: each.get_dtype() for name, each in slices.items()}
                self.dtypes = {name: _DTYPES.get(kind, kind) for name, kind in kinds.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path}: not a whole safetensors file: {error}") from None
        own = metadata.get("adapter_config")
        self.config = read_json(copy) if copy.is_file() else _parsed(own, self.path) if own else None
        if self.config is None:
            raise FileNotFoundError(f"{copy}: no such file")
        if own and self.config != _parsed(own, self.path):
            raise ValueError(
                f"{copy}: is not the configuration that {self.path.name} was saved with, which its header holds; "
                f"remove {copy.name} to take that one"
            )

    def tensors(self, expected: dict[str, Tensor]) -> dict[str, Tensor]:
        """All of them, on the CPU. Raises ValueError unless they have the names and shapes of `expected`, and values
        that are finite."""
        check_state(str(self.path), {name: (self.shapes[name], self.dtypes[name]) for name in self.shapes}, expected)
        try:
            with safe_open(self.path, "pt") as file:
                values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path}: not a whole safetensors file: {error}") from None
        for name, value in values.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"{self.path}: {name} holds values that are not finite")
        return values


def check_state(what: str, found: dict[str, tuple[tuple[int, ...], object]], expected: dict[str, Tensor]) -> None:
    """Raises ValueError unless `found`, shapes and dtypes by name, is as expected, but for the width of the floats."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not expected" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        (shape, dtype), like = found[name], expected[name]
        floats = like.is_floating_point() and isinstance(dtype, torch.dtype) and dtype.is_floating_point
        if tuple(shape) != tuple(like.shape):
            problems.append(f"{name} has shape {tuple(shape)}, expected {tuple(like.shape)}")
        elif dtype != like.dtype and not floats:
            problems.append(f"{name} has dtype {dtype}, expected {like.dtype}")
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{what}: {'; '.join(problems[:5])}{more}")


def read_json(path: Path) -> dict[str, Any]:
    try:
        return _parsed(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError alone for a number of 4,300 digits
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def fingerprint(weights: dict[str, Tensor]) -> dict[str, list[float]]:
    """Eight values of each weight: enough to know a base by, whatever dtype it is loaded in."""
    if any(weight.is_meta for weight in weights.values()):
        return {}
    samples = []
    for weight in weights.values():
        flat = weight.detach().reshape(-1)
        places = torch.linspace(0, flat.numel() - 1, 8, dtype=torch.float64).long().to(flat.device)
        samples.append(flat[places].to(torch.float32))
    values = torch.stack([sample.to(samples[0].device) for sample in samples]).tolist() if samples else []
    return dict(zip(weights, values))


def check_fingerprint(path: Path, saved: object, weights: dict[str, Tensor]) -> None:
    """Raises ValueError if the base is another one than the adapter was trained on. A dtype's rounding is forgiven."""
    if not isinstance(saved, dict) or not all(isinstance(v, list) and len(v) == 8 for v in saved.values()):
        raise ValueError(f"{path}: expected a fingerprint of the base, eight numbers for each layer")
    own, different = fingerprint(weights), []
    for name in own:
        if name not in saved:
            raise ValueError(f"{path}: the base's fingerprint knows no {name}; check_base=False loads it unchecked")
        try:
            there = torch.tensor([float(value) for value in saved[name]])
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{path}: expected numbers in the fingerprint of {name}") from None
        here = torch.tensor(own[name])
        narrow = weights[name].dtype in _HALVES or any(torch.equal(there.to(half).float(), there) for half in _HALVES)
        if not torch.allclose(here, there, rtol=2**-7 if narrow else 1e-6, atol=1e-6 if narrow else 0):
            different.append(name)
    if different:
        raise ValueError(
            f"model: is not the base that {path} was trained on: {len(different)} of {len(own)} weights differ, "
            f"{sorted(different)[0]} first; check_base=False loads it all the same"
        )
