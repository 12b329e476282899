"""What trains whole beside an adapter: heads, asked for by the name of a module or of a parameter."""

import warnings
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from peft_kernels.adapters.targets import TASK_HEADS, nearest
from peft_kernels.layers.adapted_linear import AdaptedLinear

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # peft saves none of them as a module


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model's state dict, Parameters as such, each by its first name: some are tied."""
    names = first_names(model)
    return {name: tensor for name, tensor in _state(model) if names[id(tensor)] == name}


def first_names(model: nn.Module) -> dict[int, str]:
    """By the id of each tensor of the state dict, the first of its names."""
    names: dict[int, str] = {}
    for name, tensor in _state(model):
        names.setdefault(id(tensor), name)
    return names


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, t) for name, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)]


def find_heads(model: nn.Module, asked: Sequence[str], layers: dict[str, AdaptedLinear], required: bool) -> list[str]:
    """Names of the parameters and buffers that are asked for: "classifier" holds net.classifier.0.weight.

    layers: what gets an adapter, by name: no head may hold one;  required: all that is asked for must be there
    Raises ValueError, naming what is nearest.
    """
    names = first_names(model)
    adapted = {id(p): name for name, layer in layers.items() for p in (layer.base_weight, layer.base_bias)}
    heads: dict[str, None] = {}
    for head in asked:
        found = [tensor for name, tensor in _state(model) if f".{head}." in f".{name}."]
        if required and not found:
            known = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if name]
            raise ValueError(f"modules_to_save: {head!r} holds no parameter of the model; {nearest([head], known)}")
        for tensor in found:
            if id(tensor) in adapted:
                raise ValueError(f"modules_to_save: {head!r} holds {adapted[id(tensor)]}, which gets an adapter")
        heads |= dict.fromkeys(names[id(tensor)] for tensor in found)
    return list(heads)


def warn_of_frozen_heads(model: nn.Module) -> None:
    """Says by name what stays frozen at a random start: transformers 5 marks what it loads; elsewhere names tell."""
    anew = _made_anew(model)
    if frozen := _frozen_heads(model) if anew is None else anew:
        more = f" and {len(frozen) - 5} more" if len(frozen) > 5 else ""
        warnings.warn(
            f"modules_to_save: {', '.join(frozen[:5])}{more}: frozen. What no checkpoint has values for starts, and "
            "stays, at random: name it in modules_to_save (with [] this is not said)",
            UserWarning,
            stacklevel=4,  # behind `wrap` and its decorator
        )


def _made_anew(model: nn.Module) -> list[str] | None:
    """Modules with frozen parameters that from_pretrained found no values for; None where it has loaded nothing."""
    parameters = dict(model.named_parameters())
    loaded = {name for name, p in parameters.items() if getattr(p, "_is_hf_initialized", False)}
    frozen = [name for name, p in parameters.items() if not p.requires_grad and name not in loaded]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in frozen)) if loaded else None


def _frozen_heads(model: nn.Module) -> list[str]:
    frozen = []
    for name, child in model.named_children():
        parameters = list(child.parameters())
        pools = name == "head" and not (isinstance(child, nn.Linear) or hasattr(child, "fc"))  # SigLIP's, pretrained
        if name in TASK_HEADS and not pools and parameters and not any(p.requires_grad for p in parameters):
            frozen.append(name)
    return frozen


def head_modules(model: nn.Module, heads: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """The outermost modules that are heads as a whole, each with its state.

    Raises ValueError for a tensor that is also outside of them: stock LoRA trains copies of whole modules.
    """
    heads, names = set(heads), first_names(model)
    whole: dict[str, dict[str, Tensor]] = {}
    for name, module in model.named_modules():
        own = dict(_state(module))
        inside = not name or isinstance(module, _CONTAINERS) or any(name.startswith(f"{outer}.") for outer in whole)
        if own and not inside and all(names[id(tensor)] in heads for tensor in own.values()):
            whole[name] = own
    for name, tensor in _state(model):
        if names[id(tensor)] in heads and not any(name.startswith(f"{module}.") for module in whole):
            raise ValueError(f"export_lora: {name} trains without the module it is in, which stock LoRA cannot hold")
    return whole
