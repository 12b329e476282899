"""An adapter's state: what a resumed training needs, what a file holds, and how one comes back from it."""

import os
from abc import ABC
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from peft_kernels.adapters.checkpoint import (
    CONFIG_FILE,
    Checkpoint,
    check_fingerprint,
    check_state,
    fingerprint,
    write_checkpoint,
)
from peft_kernels.adapters.config import AdapterConfig
from peft_kernels.adapters.heads import head_modules, named_state
from peft_kernels.adapters.lora_files import write_lora
from peft_kernels.adapters.model_checks import check_not_offloaded
from peft_kernels.adapters.targets import Match
from peft_kernels.layers.adapted_linear import AdaptedLinear

Self = TypeVar("Self", bound="AdapterFiles")
HOW_IT_RUNS = ("backend", "group", "stack", "recompute")  # fields of a configuration: not what an adapter is


class Parts(NamedTuple):
    """What a method puts into a model."""

    layers: dict[str, AdaptedLinear]  # by the names of the linear layers whose place they take
    modules: dict[str, nn.Module]  # new modules, by the names that they get: the factors that layers share, and gates

    def state(self) -> dict[str, Tensor]:
        """What they bring into the model's state dict."""
        return {
            f"{name}.{key}": tensor
            for name, owner in (*self.layers.items(), *self.modules.items())
            for key, tensor in owner.state_dict(keep_vars=True).items()
            if key not in ("weight", "bias") or not isinstance(owner, AdaptedLinear)
        }


class AdapterFiles(ABC):
    """The part of `Adapter` that knows of state and files."""

    method: ClassVar[str]
    training_state: ClassVar[tuple[str, ...]] = ()  # ends of names that are not part of the result

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed training needs of the adapter, by names of the model's own state dict."""
        self._check_on("state_dict")
        named = named_state(self.model) if self._head_names else {}
        state = {**Parts(self.layers, self.modules).state(), **{name: named[name] for name in self._head_names}}
        return {name: tensor.detach() for name, tensor in state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`. Raises ValueError on other names or shapes, before anything is changed."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected tensors by name, got {type(state).__name__}")
        own = self.state_dict()
        if self.merged:
            raise ValueError("load_state_dict: the model is merged, with what it would replace; unmerge it first")
        if any(not isinstance(tensor, Tensor) for tensor in state.values()):
            raise TypeError("state: expected tensors by name")
        check_state("state", {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}, own)
        if any(tensor.is_meta for tensor in (*own.values(), *state.values())):
            raise ValueError("state: a tensor on the meta device holds no values")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write adapter_config.json and adapter_model.safetensors: what was trained, without the training's own state.

        A crash while writing leaves the folder's earlier files whole.
        """
        _check_folder(folder)
        self._check_ready("save_pretrained")
        state = {name: tensor for name, tensor in self.state_dict().items() if self._is_saved(name)}
        frozen = {name: layer.frozen()[0] for name, layer in self.layers.items()}
        config = {"method": self.method, **self.config.to_dict(), "fingerprint": fingerprint(frozen)}
        for name in HOW_IT_RUNS:
            del config[name]
        write_checkpoint(folder, config, state)

    @classmethod
    def _is_saved(cls, name: str) -> bool:
        return not any(name.endswith(end) for end in cls.training_state)

    @classmethod
    def from_pretrained(
        cls: type[Self],
        model: nn.Module,
        folder: str | os.PathLike,
        check_base: bool = True,
        backend: str = "auto",
        group: bool = True,
        stack: bool = False,
        recompute: bool = True,
    ) -> Self:
        """Adapt `model` as a folder written by `save_pretrained` says, with its values.

        check_base: compare the model's weights with the ones that the adapter was trained on
        backend, group, stack, recompute: as in the configuration, whose files leave them out
        Raises FileNotFoundError, ValueError or TypeError, naming the file and what is wrong in it; the model is
        unchanged then.
        """
        cls._check(model, None)
        checkpoint = Checkpoint(folder)
        how_it_runs = dict(zip(HOW_IT_RUNS, (backend, group, stack, recompute), strict=True))
        path, values = Path(folder) / CONFIG_FILE, {**checkpoint.config, **how_it_runs}
        method, saved = values.pop("method", None), values.pop("fingerprint", {})
        if method != cls.method:
            kind = "a PEFT checkpoint (LoRA.from_peft reads it)" if "peft_type" in values else f"of method {method!r}"
            raise ValueError(f"{path}: expected an adapter of method {cls.method!r}, got {kind}")
        try:
            config = cls.config_class.from_dict(values)
            matches = cls.find(model, config)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None
        if check_base:
            check_fingerprint(path, saved, {match.name: match.linear.weight for match in matches})
        return cls._filled(model, config, matches, checkpoint)

    @classmethod
    @torch.inference_mode(False)  # as in `wrap`
    def _filled(
        cls: type[Self], model: nn.Module, config: AdapterConfig, matches: list[Match], checkpoint: Checkpoint
    ) -> Self:
        """An adapter with values from a file. All checks come first: a rank that only a file asks for costs nothing."""
        check_not_offloaded("model", model, dict(model.named_parameters()))
        if any(p.is_meta for p in model.parameters()):
            raise ValueError("model: is on the meta device; give it its weights first")
        try:
            parts = cls.build(model, config, matches, "meta")
            heads = cls.find_heads(model, config, parts)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{checkpoint.path.with_name(CONFIG_FILE)}: {error}") from None
        named = named_state(model)
        state = {**parts.state(), **{name: named[name] for name in heads}}
        values = checkpoint.tensors({name: tensor for name, tensor in state.items() if cls._is_saved(name)})
        adapter = cls(model, config, cls.build(model, config, matches, None))
        adapter._form_groups(matches)
        adapter.load_state_dict({**adapter.state_dict(), **values})
        return adapter

    def export_lora(self, folder: str | os.PathLike) -> None:
        """Write the adapter as stock LoRA, with its heads: `peft.PeftModel.from_pretrained(model, folder)` loads it.

        Raises ValueError where stock LoRA cannot say the same.
        """
        _check_folder(folder)
        self._check_ready("export_lora")
        factors = {name: layer.lora_factors() for name, layer in self.layers.items()}
        others = [name for name, _ in self.model.named_modules() if name not in factors]
        write_lora(folder, factors, head_modules(self.model, self._head_names), others)


def _check_folder(folder: object) -> None:
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder: expected a path, got {type(folder).__name__}")
    if not os.fspath(folder):  # pathlib would take the current one
        raise ValueError("folder: expected the path of a folder, got ''")
