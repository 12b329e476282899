"""Stock LoRA checkpoints, in the format of the peft library, without that library."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peft_kernels.adapters.checkpoint import CONFIG_FILE, Checkpoint, read_json, write_with_config
from peft_kernels.adapters.config import by_pattern, check_count, check_number, check_patterns
from peft_kernels.checks import check_flag, check_probability

_PREFIX = "base_model.model."
# What a LoRA configuration may say besides weight + scaling · B A, without meaning anything else by it …
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),  # the others change the base
}
# … what says how to train, or is read below: and any other entry must be empty
_KNOWN = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "r"}
_KNOWN |= {"inference_mode", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora"}
_KNOWN |= {"modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"}
_KNOWN |= {"megatron_core", "eva_config", "qalora_group_size"}


def write_lora(
    folder: str | os.PathLike,
    factors: dict[str, tuple[Tensor, Tensor, Tensor | None]],
    heads: dict[str, dict[str, Tensor]],
    other_modules: Sequence[str],
) -> None:
    """A folder that `peft.PeftModel.from_pretrained` loads.

    factors: by module name (A (r, in), B (out, r), b (out,) or None): weight + B A, and bias + b
    heads: state of the modules that were trained whole, by name
    other_modules: names of the model's other modules, for whether a list of names is clear
    alpha is r, so that nothing is scaled, and lora_bias is set where there are biases: without it peft drops them.
    Raises ValueError for a folder with what `save_pretrained` wrote, which has the same names: it would be lost.
    """
    if not factors:
        raise ValueError("export_lora: there is no adapted linear layer")
    if _holds_our_own(Path(folder)):
        raise ValueError(f"export_lora: {folder} holds an adapter that save_pretrained wrote; take another folder")
    with_bias = any(bias is not None for _, _, bias in factors.values())
    tensors: dict[str, Tensor] = {}
    for name, (down, up, bias) in factors.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = down
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = up
        if with_bias:
            tensors[f"{_PREFIX}{name}.lora_B.bias"] = up.new_zeros(up.shape[0]) if bias is None else bias
    tensors |= {f"{_PREFIX}{name}.{key}": tensor for name, state in heads.items() for key, tensor in state.items()}
    ranks = {name: down.shape[0] for name, (down, _, _) in factors.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    patterns = {f"^{re.escape(name)}": own for name, own in ranks.items() if own != rank}
    unclear = any(other.endswith(f".{name}") for other in other_modules for name in ranks)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": "|".join(re.escape(name) for name in ranks) if unclear else list(ranks),
        "modules_to_save": list(heads) or None,
        "lora_dropout": 0.0,
        "lora_bias": with_bias,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    write_with_config(folder, config, tensors, {"format": "pt"})


def _holds_our_own(folder: Path) -> bool:
    for read in (lambda: read_json(folder / CONFIG_FILE), lambda: Checkpoint(folder).config):
        with suppress(OSError, ValueError):  # none there, or nothing that could be loaded
            if "method" in read():
                return True
    return False


class StockLora(Checkpoint):
    """A checkpoint of peft's, opened under the names of this package's LoRA; by module name the ranks and scales.

    Raises FileNotFoundError or ValueError, naming the file and what in it this package's LoRA does not do.
    """

    def __init__(self, folder: str | os.PathLike):
        super().__init__(folder)
        path, config = Path(folder) / CONFIG_FILE, self.config
        if config.get("peft_type") != "LORA":
            raise ValueError(f"{path}: expected peft_type 'LORA', got {config.get('peft_type')!r}")
        for name, value in config.items():
            if value not in _PLAIN[name] if name in _PLAIN else value and name not in _KNOWN:
                raise ValueError(f"{path}: {name}={value!r} is not supported; merge it with peft and adapt the result")
        try:
            self.dropout = _number(config, "lora_dropout", 0.0)
            check_probability("lora_dropout", self.dropout)
            check_flag("use_rslora", config.get("use_rslora", False))
            self._read(config)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None

    def _read(self, config: dict[str, Any]) -> None:
        self.ranks: dict[str, int] = {}
        self.scales: dict[str, float] = {}
        for name, check in (("rank_pattern", check_count), ("alpha_pattern", check_number)):
            check_patterns(config.get(name), name, check)
        alpha, trained, heads = _number(config, "lora_alpha", 8), config.get("modules_to_save") or (), {}
        self._bases: dict[str, str] = {}  # weights of the base, of embeddings for instance, by their names in the model
        self.stored = {self._our_name(name): name for name in self.shapes}
        if twice := set(self.shapes) - set(self.stored.values()):
            raise ValueError(f"{self.path.name} holds {min(twice)} twice, with and without {_PREFIX}")
        for own, name in self.stored.items():
            module, _, last = own.rpartition(".")
            if name.endswith(".lora_A.weight") and len(self.shapes[name]) == 2:
                rank = self.ranks[module] = self.shapes[name][0]
                if rank != (said := by_pattern(config.get("rank_pattern"), module, config.get("r", 8))):
                    raise ValueError(f"r, rank_pattern: {said} for {module}, whose lora_A.weight has rank {rank}")
                check_count(rank, f"rank of {module}")
                scale = by_pattern(config.get("alpha_pattern"), module, alpha)
                self.scales[module] = scale / (rank**0.5 if config.get("use_rslora") else rank)
            elif ".lora_" in name and last != "up":
                raise ValueError(f"{name} is not part of a LoRA of linear layers")
            elif last != "up" and any(f".{head}." in f".{own}" for head in trained):
                heads[module] = None
            elif last != "up":
                self._bases[own.replace(".base_layer.", ".")] = name
        if not self.ranks:
            raise ValueError(f"{self.path.name} holds no lora_A.weight")
        if "" in heads:
            raise ValueError(f"{self.path.name} holds a tensor that is of no module")
        self.heads = tuple(heads)
        self._base_shapes = {own: self.shapes[name] for own, name in self._bases.items()}
        self.stored = {own: name for own, name in self.stored.items() if name not in self._bases.values()}
        self.shapes = {own: self.shapes[name] for own, name in self.stored.items()}
        self.dtypes = {own: self.dtypes[name] for own, name in self.stored.items()}

    def base_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters that the file brings values for: of embeddings, which peft saves if they were resized.

        Raises ValueError for anything else.
        """
        modules, found = dict(model.named_modules()), {}
        outputs = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
        for name, shape in self._base_shapes.items():
            parent, _, attribute = name.rpartition(".")
            module = modules.get(parent)
            if not (isinstance(module, nn.Embedding) or parent in self.ranks or (outputs and module is outputs)):
                raise ValueError(f"{self.path}: {name} is of no adapter, no embedding, and none of modules_to_save")
            parameter = module._parameters.get(attribute)
            if parameter is None or tuple(parameter.shape) != shape:
                got = None if parameter is None else tuple(parameter.shape)
                expected = f"{name} of shape {shape}, which {self.path} has a value for"
                raise ValueError(f"model: expected {expected}, got {got}; call resize_token_embeddings first")
            found[name] = parameter
        return found

    def _our_name(self, name: str) -> str:
        name = name.removeprefix(_PREFIX)
        for end, ours in ((".lora_A.weight", ".down"), (".lora_B.weight", ".up")):
            if name.endswith(end):
                return name.removesuffix(end) + ours
        return name

    def base_values(self) -> dict[str, Tensor]:
        """What the file brings of the base, by the names of `base_parameters`."""
        return {name: self.value(stored) for name, stored in self._bases.items()}


def _number(values: dict[str, Any], name: str, default: float) -> float:
    check_number(values.get(name, default), name)
    return values.get(name, default)
