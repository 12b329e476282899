"""Adapters on disk: adapter_config.json and adapter_model.safetensors, whole or not there at all.

The weights' file carries the configuration in its header, so that one atomic rename decides what a folder holds;
adapter_config.json is its readable copy. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_kernels.adapters.writing import write_atomically, write_together

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"  # older releases of peft wrote it
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_DTYPES |= {"BOOL": torch.bool}
_HALVES = (torch.bfloat16, torch.float16)
_LEVELS = 16  # lists and dictionaries inside each other: no configuration has more than a few


# ---- writing --------------------------------------------------------------------------------------------------------


def write_checkpoint(folder: str | os.PathLike, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Both files into `folder`, which is made if it is not there. Tensors may share memory."""
    # One entry: with two, safetensors writes them in any order, and equal adapters would differ in bytes
    metadata = {"adapter_config": _text(config)}
    write_with_config(folder, {**config, "sha256": _digest(config)}, tensors, metadata)


def write_with_config(
    folder: str | os.PathLike, config: dict[str, Any], tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """The weights with `metadata` in their header, and then adapter_config.json. Raises as `save_tensors`."""
    weights, text = Path(folder) / WEIGHTS_FILE, _text(config)
    separate = _separate(weights, tensors)
    writers = {
        WEIGHTS_FILE: lambda path: save_file(separate, path, metadata=metadata),
        CONFIG_FILE: lambda path: path.write_text(text, encoding="utf-8"),
    }
    write_together(weights.parent, writers)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, atomically; tensors may share memory, and each is written whole.

    Raises ValueError for a value that is not finite, which nothing would load: an earlier file stays.
    """
    separate = _separate(path, tensors)
    write_atomically(path, lambda new: save_file(separate, new, metadata=metadata))


def _separate(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: on the CPU, contiguous, and no two in one memory."""
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
    return separate


def _text(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


# ---- reading --------------------------------------------------------------------------------------------------------


class Checkpoint:
    """An opened folder: its configuration, and the names and shapes of its tensors; values are read by `tensors`.

    The file stays open: whatever is saved into the folder meanwhile, all of this is of one save.
    Raises FileNotFoundError where a file is missing, and ValueError, naming the file, where one is broken.
    """

    def __init__(self, folder: str | os.PathLike):
        self.path, copy = Path(folder) / WEIGHTS_FILE, Path(folder) / CONFIG_FILE
        _check_folder(Path(folder))
        _check_file(self.path)
        try:
            with self.path.open("rb") as file:  # safetensors opens by name twice: header and values of two saves
                handle = f"/dev/fd/{file.fileno()}"
                self._file = safe_open(handle if os.path.exists(handle) else self.path, "pt")
            metadata = self._file.metadata() or {}
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118, not a dict
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(f"{self.path}: not a whole safetensors file: {error}") from None
        self.shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
        kinds = {name: each.get_dtype() for name, each in slices.items()}
        self.dtypes = {name: _DTYPES.get(kind, kind) for name, kind in kinds.items()}
        self.stored = {name: name for name in slices}  # in the file, by the names that `shapes` and `dtypes` go by
        own = metadata.get("adapter_config")
        self.config = read_json(copy) if own is None else _parsed(own, self.path)
        self.config.pop("sha256", None)  # who writes tensors anew, without a header, leaves the copy as it is
        if own is not None:
            with suppress(FileNotFoundError):  # there is none, or a save that goes on has just removed it
                self._check_copy(copy)

    def _check_copy(self, copy: Path) -> None:
        """A copy that says by its digest that nobody has edited it was written by another save, and loses to the
        header. Where somebody has edited it, the adapter that they expect is not there."""
        config = read_json(copy)
        digest = config.pop("sha256", None)
        if config == self.config:
            return
        if digest != _digest(config):
            raise ValueError(
                f"{copy}: is not the configuration that {self.path.name} was saved with, which its header holds; "
                f"remove {copy.name} to take that one"
            )
        warnings.warn(
            f"{copy}: was written by another save than {self.path.name}, whose own configuration, in its header, is "
            f"taken; remove {copy.name} to be rid of this warning",
            stacklevel=2,
        )

    def tensors(self, expected: dict[str, Tensor]) -> dict[str, Tensor]:
        """All of them, on the CPU. Raises ValueError unless they have the names and shapes of `expected`, and values
        that are finite, in the dtypes there too."""
        check_state(str(self.path), {name: (self.shapes[name], self.dtypes[name]) for name in self.shapes}, expected)
        return {name: self.value(stored, expected[name].dtype) for name, stored in self.stored.items()}

    def value(self, stored: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor of the file. Raises ValueError unless its values are finite, in `dtype` too."""
        try:
            value = self._file.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path}: not a whole safetensors file: {error}") from None
        if not torch.isfinite(value.to(dtype or value.dtype)).all():
            raise ValueError(f"{self.path}: {stored} holds values that are not finite")
        return value


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
    """Raises FileNotFoundError or ValueError, naming the file."""
    _check_file(path)
    try:
        return _parsed(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:  # since it was looked at
        raise FileNotFoundError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def _check_folder(folder: Path) -> None:
    """What users of hubs and of older files bring is told what is read."""
    if not os.path.lexists(folder):
        raise FileNotFoundError(
            f"{folder / WEIGHTS_FILE}: no such file, and no such folder. A local one is read; "
            "huggingface_hub.snapshot_download(…) gets one of a hub"
        )
    if os.path.lexists(folder / PICKLED_FILE) and not os.path.lexists(folder / WEIGHTS_FILE):
        raise FileNotFoundError(
            f"{folder / WEIGHTS_FILE}: no such file. {PICKLED_FILE} is there, but pickles are never read: load it with "
            "peft, whose save_pretrained writes safetensors"
        )


def _check_file(path: Path) -> None:
    """A FIFO would be waited for."""
    try:
        if path.is_file():
            return
    except OSError as error:  # a name that is too long, or a folder that is not ours
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if os.path.lexists(path) and not path.is_file():  # it may have come since the first look
        raise ValueError(f"{path}: expected a file, got a folder, a broken link, or something else that is none")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # ValueError alone for a number of 4,300 digits
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    if _deeper(value, _LEVELS):
        raise ValueError(f"{path}: expected at most {_LEVELS} lists and objects inside each other")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name!r} is there twice")
        values[name] = value
    return values


def _deeper(value: object, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper(child, levels - 1) for child in children)


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
