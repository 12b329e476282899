"""What all adapters have in common: wrapping a model, its parameters, its files, merging and taking off."""

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from peft_kernels.adapters.called import watch_calls
from peft_kernels.adapters.config import AdapterConfig
from peft_kernels.adapters.groups import form_groups
from peft_kernels.adapters.heads import find_heads, warn_of_frozen_heads
from peft_kernels.adapters.mlps import recompute_activations
from peft_kernels.adapters.model_checks import check_not_offloaded, check_tensors
from peft_kernels.adapters.state_files import AdapterFiles, Parts
from peft_kernels.adapters.targets import Match, find_targets
from peft_kernels.backend import Choice, explain
from peft_kernels.layers.adapted_linear import HOOKS_OFF, AdaptedLinear
from peft_kernels.presets import PRESETS

KINDS = ("adapter", "live", "head")
Self = TypeVar("Self", bound="Adapter")


class Adapter(AdapterFiles):
    """An adapter of a model, which it changes in place: linear layers are swapped, all else is frozen but the heads.

    model: the wrapped model, still of its own class;  config: as given
    layers: the swapped layers by name;  heads: names of the parameters outside of them that train
    """

    method: ClassVar[str]
    config_class: ClassVar[type[AdapterConfig]]

    def __init__(self, model: nn.Module, config: AdapterConfig, parts: Parts):
        """Use `wrap` or `from_pretrained`."""
        self._head_names = self.find_heads(model, config, parts)  # with the buffers of heads
        self.model, self.config, self.layers, self.modules = model, config, parts.layers, parts.modules
        self._required = {name: p.requires_grad for name, p in model.named_parameters()}
        self.heads = [name for name in self._head_names if name in self._required]
        for name in self.heads:
            if not model.get_parameter(name).is_floating_point():
                raise TypeError(f"modules_to_save: {name} is of {model.get_parameter(name).dtype} and cannot train")
        self._places = _places(model, {name: model.get_submodule(name) for name in parts.layers})
        self.removed = self._told_of_lost = False
        model.requires_grad_(False)
        for name, parent, attribute, _ in self._places:
            setattr(parent, attribute, parts.layers[name])
            parts.layers[name].recompute = config.recompute
        for name, module in parts.modules.items():
            parent, _, attribute = name.rpartition(".")
            model.get_submodule(parent).add_module(attribute, module)
            module.train(model.get_submodule(parent).training)
        for name in self.heads:
            model.get_parameter(name).requires_grad_(True)
        recompute_activations(model, parts.layers.values() if config.recompute else ())
        self._watches = watch_calls(model, parts.layers)

    @classmethod
    @abstractmethod
    def build(
        cls, model: nn.Module, config: AdapterConfig, matches: Sequence[Match], device: torch.device | str | None
    ) -> Parts:
        """New layers and modules, adapters on `device` (None: where their layers are). Changes nothing in the model."""

    @classmethod
    @torch.inference_mode(False)  # what is made in it could not train
    def wrap(cls: type[Self], model: nn.Module, config: AdapterConfig | None = None) -> Self:
        """Adapt `model`, in place.

        The first forward warns, by name, of layers that the model goes past, reading their weights instead of calling
        them: `Target(…, reads_weight=True)` is for these. Inside torch.compile it does not.
        Raises ValueError or TypeError before anything is changed: a name that matches nothing is told the nearest ones.
        """
        cls._check(model, config)
        config = cls.config_class() if config is None else config
        matches = cls.find(model, config)
        check_not_offloaded("model", model, {f"{match.name}.weight": match.linear.weight for match in matches})
        adapter = cls(model, config, cls.build(model, config, matches, None))
        adapter._form_groups(matches)
        if config.modules_to_save is None:
            warn_of_frozen_heads(model)
        return adapter

    def _form_groups(self, matches: Sequence[Match]) -> None:
        there = [match for match in matches if match.name in self.layers]
        members = ((match.name, self.layers[match.name], match.target) for match in there)
        form_groups(self.model, members, self.config.group, self.config.stack)

    @classmethod
    def find(cls, model: nn.Module, config: AdapterConfig) -> list[Match]:
        """The linear layers that `config` means."""
        return find_targets(model, config)

    @classmethod
    def _check(cls, model: object, config: object) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        if isinstance(model, nn.Linear):
            raise TypeError("model: is an nn.Linear itself, which cannot be swapped in place; wrap what it is part of")
        if config is not None and not isinstance(config, cls.config_class):
            instead = "; integrations.peft has accelerate and fast, and LoRA.from_peft reads checkpoints"
            of_peft = type(config).__module__.startswith("peft.")
            got = f"{type(config).__name__}{f' of peft{instead}' if of_peft else ''}"
            raise TypeError(f"config: expected {cls.config_class.__name__}, got {got}")
        if any(isinstance(module, AdaptedLinear) for module in model.modules()):
            raise ValueError("model: has an adapter already; remove() it first")

    @classmethod
    def find_heads(cls, model: nn.Module, config: AdapterConfig, parts: Parts) -> list[str]:
        """Names of what trains besides. A preset's heads need not be there, those asked for must be."""
        asked = config.modules_to_save
        if asked is None:
            asked = () if config.preset is None else PRESETS[config.preset].heads
        return find_heads(model, asked, parts.layers, required=config.modules_to_save is not None)

    # ---- parameters -------------------------------------------------------------------------------------------------

    def named_parameters(self, kind: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """What trains, by its name in the model.

        kind: "adapter" | "live" (MoIL's full weights) | "head" | None for all
        """
        if kind not in (None, *KINDS):
            raise ValueError(f"kind: expected one of {KINDS} or None, got {kind!r}")
        self._warn_of_lost("named_parameters")
        new = {
            id(tensor): "live" if name.rpartition(".")[2].startswith("live_") else "adapter"
            for name, tensor in Parts(self.layers, self.modules).state().items()
        }
        heads = set(self.heads)
        for name, p in self.model.named_parameters():
            own = "head" if name in heads else new.get(id(p))
            if own is not None and kind in (None, own):
                yield name, p

    def parameters(self, kind: str | None = None) -> Iterator[nn.Parameter]:
        """As `named_parameters`, without names."""
        return (p for _, p in self.named_parameters(kind))

    def num_parameters(self, kind: str | None = None) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.parameters(kind))

    def param_groups(
        self,
        lr: float,
        adapter_lr: float | None = None,
        adapter_eps: float | None = None,
        weight_decay: float = 0.05,
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer: heads and live weights, then adapters; each without decay for vectors and biases.

        lr: of all;  adapter_lr: of the adapters, instead;  adapter_eps: their "eps", for Adam and its kin
        weight_decay: of matrices; the authors' 0.05
        Raises ValueError where hooks of accelerate offload them: no gradient reaches an offloaded parameter.
        """
        check_not_offloaded("param_groups", self.model, dict(self.named_parameters()))
        others = {"lr": lr}
        adapters = {"lr": lr if adapter_lr is None else adapter_lr}
        if adapter_eps is not None:
            adapters["eps"] = adapter_eps
        return [
            *_groups([*self.parameters("live"), *self.parameters("head")], weight_decay, **others),
            *_groups(self.parameters("adapter"), weight_decay, **adapters),
        ]

    def print_trainable_parameters(self) -> None:
        """One line: what trains, out of how many."""
        parts = {kind: self.num_parameters(kind) for kind in KINDS}
        total = sum(p.numel() for p in self.model.parameters())
        listed = ", ".join(f"{kind} {count:,}" for kind, count in parts.items() if count)
        trained = sum(parts.values())
        print(f"trained: {trained:,} ({listed}) of {total:,} parameters, {100 * trained / max(total, 1):.4f} %")

    def explain(self) -> dict[str, Choice]:
        """The backend that each layer's next forward takes, and why."""
        return explain(self.model)

    # ---- merging ----------------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        return any(layer.merged for layer in self.layers.values())

    def merge(self, keep_on: torch.device | str | None = None) -> None:
        """Put every update into its weight, summed in float32 and rounded once.

        keep_on: the device of the originals that `unmerge` needs; None: beside the weights
        Raises ValueError or TypeError, before anything is changed, if weights are shared, sharded, quantised or
        offloaded, or if a layer is no longer in the model.
        """
        self._check_ready("merge")
        if not self.layers:
            raise ValueError(f"merge: {self.method!r} adapts no linear layer")
        self._check_shared()
        done = []
        try:
            for layer in self.layers.values():
                layer.merge(keep_on)
                done.append(layer)
        except BaseException:
            for layer in done:
                layer.unmerge()
            raise

    def unmerge(self) -> None:
        """Give every weight its original bits back."""
        if not self.merged:
            raise ValueError("unmerge: the model is not merged")
        self._check_tensors("unmerge")
        for layer in self.layers.values():
            if layer.merged:
                layer.unmerge()

    def remove(self) -> nn.Module:
        """Take the adapter off and give the model back: with merged weights if it is merged, and heads as trained."""
        self._check_on("remove")
        if hooked := [name for name, layer in self.layers.items() if "_hf_hook" in vars(layer)]:
            raise ValueError(f"remove: {hooked[0]} has a hook of accelerate; {HOOKS_OFF}")
        for watch in self._watches:
            watch.detach()
        for name, parent, attribute, original in self._places:
            layer = self.layers[name]
            original.weight, original.bias = layer.base_weight, layer.base_bias
            original.train(layer.training)
            if parent._modules.get(attribute) is layer:  # and nothing that was put there since
                setattr(parent, attribute, original)
        recompute_activations(self.model)
        there = dict(self.model.named_modules(remove_duplicate=False))
        for name, module in self.modules.items():
            if there.get(name) is module:
                parent, _, attribute = name.rpartition(".")
                delattr(there[parent], attribute)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required.get(name, parameter.requires_grad))
        self.layers, self.modules, self._places, self.removed = {}, {}, [], True
        return self.model

    # ---- what actions ask first -------------------------------------------------------------------------------------

    def _check_on(self, action: str) -> None:
        if self.removed:
            raise ValueError(f"{action}: the adapter was removed from its model")

    def _check_ready(self, action: str, instead: str = "do it on a copy that is not sharded") -> None:
        """The adapter is in its model, with tensors that can be read and written."""
        self._check_on(action)
        if lost := self._lost():
            raise ValueError(f"{action}: {_no_longer_there(lost)}; remove() the adapter and wrap the model anew")
        self._check_tensors(action, instead)
        if any(tensor.is_meta for tensor in (*self.model.parameters(), *self.model.buffers())):
            raise ValueError(f"{action}: the model is on the meta device and holds no values")

    def _check_tensors(self, action: str, instead: str = "do it on a copy that is not sharded") -> None:
        owners = {**self.layers, **self.modules}
        tensors = {
            f"{name}.{key}": tensor
            for name, owner in owners.items()
            for key, tensor in (*owner.named_parameters(), *owner.named_buffers())
        }
        heads = set(self.heads)
        tensors |= {name: p for name, p in self.model.named_parameters() if name in heads}
        check_tensors(action, self.model, tensors, owners.values(), instead)

    def _lost(self) -> list[str]:
        """Names of layers and modules that are no longer in the model: it has put others in their places."""
        there = set(map(id, self.model.modules()))
        return [name for name, module in {**self.layers, **self.modules}.items() if id(module) not in there]

    def _warn_of_lost(self, action: str, stacklevel: int = 3) -> None:
        """Once. Nothing runs them, and nothing trains them."""
        if not self._told_of_lost and (lost := self._lost()):
            self._told_of_lost = True
            warnings.warn(f"{action}: {_no_longer_there(lost)}", stacklevel=stacklevel)

    def _check_shared(self) -> None:
        """Parameters may be tied, or be views of one memory."""
        users: dict[object, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            users.setdefault(_memory(parameter), []).append(name)
        for name, layer in self.layers.items():
            for kind, parameter in (("weight", layer.base_weight), ("bias", layer.base_bias)):
                for other in () if parameter is None else users[_memory(parameter)]:
                    if self.model.get_submodule(other.rpartition(".")[0]) is not layer:
                        raise ValueError(f"merge: the {kind} of {name} is shared with {other}, which would change too")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.layers)} layers, {self.num_parameters():,} trained, {self.config})"


def _no_longer_there(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    verb = "is" if len(names) == 1 else "are"
    return (
        f"{', '.join(names[:3])}{more} of the adapter {verb} no longer in the model, where others took the place "
        "(resize_token_embeddings does that to an lm_head)"
    )


def _memory(parameter: nn.Parameter) -> object:
    """Equal for parameters that a write in place changes together."""
    return id(parameter) if parameter.is_meta or not parameter.numel() else (parameter.device, parameter.data_ptr())


def _groups(parameters: Iterable[nn.Parameter], weight_decay: float, **options: float) -> list[dict[str, Any]]:
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        groups[parameter.dim() > 1].append(parameter)
    return [
        {"params": params, **options, "weight_decay": weight_decay if is_matrix else 0.0}
        for is_matrix, params in groups.items()
        if params
    ]


def _places(model: nn.Module, linears: dict[str, nn.Linear]) -> list[tuple[str, nn.Module, str, nn.Linear]]:
    """(name, parent, attribute, linear) of every place where one of the linears stands: a module may be tied."""
    names = {id(linear): name for name, linear in linears.items()}
    return [
        (names[id(child)], parent, attribute, child)
        for parent in model.modules()
        for attribute, child in parent._modules.items()
        if id(child) in names
    ]
