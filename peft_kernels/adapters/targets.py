"""Which modules of a model a configuration means."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from peft_kernels.adapters.config import AdapterConfig
from peft_kernels.checks import kind_of
from peft_kernels.layers.adapted_linear import check_linear_module
from peft_kernels.presets import PRESETS, Target

# These read the weights of their linears themselves: an adapter in there would be passed by.
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_IN_PEFT = "peft adapts an nn.MultiheadAttention that is itself named in its LoraConfig's target_modules"
# What models' own classes call the part that makes a task's result; checkpoints of a base have no values for it
TASK_HEADS = ("classifier", "cls_classifier", "distillation_classifier", "score", "qa_outputs", "head", "rank_output")
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Match:
    """A linear layer to adapt, under its first name in the model."""

    name: str
    linear: nn.Linear
    target: Target

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def siblings(self) -> tuple:
        """Equal for layers of one parent that read the same tensor."""
        return self.parent, self.target.input, self.target.placement, self.linear.in_features, self.linear.bias is None

    @property
    def tower(self) -> str:
        """Equal for the same place in all layers of a stack."""
        return re.sub(r"\d+", "*", self.parent)


def guess_target(pattern: str, name: str, linear: nn.Linear) -> Target:
    """What names tell of a layer that was not given as a `Target`."""
    lower, last = name.lower(), name.lower().rpartition(".")[2]
    crossing = re.search(r"cross|encoder_attn", lower)
    modality = "cross" if crossing else "vision" if re.search(r"vis[iun]|image|vit\b", lower) else "text"
    is_query = re.fullmatch(r"q|query|q_proj|to_q|wq|q_lin", last)
    shrinks = linear.in_features > linear.out_features
    is_output = re.fullmatch(r"fc2|down_proj|c_proj|w2|lin2|linear2", last) or lower.endswith("output.dense")
    fused = re.fullmatch(r"qkv|qkv_proj|wqkv|c_attn|in_proj|query_key_value", last)
    return Target(
        re.escape(name),
        modality,
        "context" if crossing and not is_query else "hidden",
        3 if fused and linear.out_features % 3 == 0 else 1,
        "output" if shrinks and is_output else "input",
    )


def find_targets(model: nn.Module, config: AdapterConfig, ffn: bool = False) -> list[Match]:
    """Every linear layer that `config` names, in the model's order.

    ffn: the preset's feed-forward layers, too
    Raises ValueError naming the nearest modules when a name, or a whole preset, matches nothing, and where the modules
    that it matches cannot take an adapter.
    """
    modules = dict(model.named_modules())
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    if ffn and (config.targets or not PRESETS[config.preset].ffn):
        raise ValueError("ffn: expected a preset that knows feed-forward layers; name them in targets otherwise")
    if config.targets is None:
        preset = PRESETS[config.preset]
        wanted = [*preset.targets, *(preset.ffn if ffn else ())]
        found = [(name, target) for name in linears for target in wanted if re.fullmatch(target.pattern, name)]
        if not found:
            names = ["query", "key", "value", "qkv", "q_proj", "fc1"]
            called = [name for name in linears if not isinstance(modules[name.rpartition(".")[0]], _READS_WEIGHTS)]
            inside = "" if len(called) == len(linears) else f"; {_IN_PEFT}"
            raise ValueError(f"preset: {config.preset!r} matches no linear layer; {nearest(names, called)}{inside}")
        there = [target for _, target in found]
        if preset.whole and (absent := [target.pattern for target in preset.targets if target not in there]):
            raise ValueError(
                f"preset: {config.preset!r} is for another model: it expects layers named {', '.join(absent)}, too, "
                f"and heads {', '.join(preset.heads) or 'of no name'}; name what you mean in targets"
            )
        if ffn and not any(target in preset.ffn for _, target in found):
            names = ["mlp.fc1", "mlp.fc2", "intermediate.dense"]
            raise ValueError(f"ffn: {config.preset!r} matches no feed-forward layer; {nearest(names, linears)}")
    else:
        found = _found(config.targets, modules, linears)
    matches: dict[str, Match] = {}
    for name, target in found:
        matches.setdefault(name, Match(name, linears[name], target))
    for match in matches.values():
        if not match.target.reads_weight:
            _check_called(match, modules[match.parent])
        try:
            check_linear_module(match.linear)
        except (TypeError, ValueError) as error:
            raise type(error)(f"targets: {match.name}: {error}") from None
    order = {name: place for place, name in enumerate(modules)}
    return sorted(matches.values(), key=lambda match: order[match.name])


def _check_called(match: Match, parent: nn.Module) -> None:
    kind = type(parent).__name__
    if isinstance(parent, _READS_WEIGHTS):
        raise ValueError(
            f"targets: {match.name} is part of an nn.{kind}, which reads its weight past any adapter; {_IN_PEFT}"
        )
    if _adds_biases_itself(match.linear, parent):
        raise ValueError(
            f"targets: {match.name} is part of a {kind} that reads its weight past any adapter, to add q_bias and "
            "v_bias; name it by a Target with reads_weight=True, as the preset 'vlmo' does (in timm "
            "qkv_bias_separate=True has it called)"
        )


def _adds_biases_itself(linear: nn.Linear, parent: nn.Module) -> bool:
    """BEiT's way, in timm and in code that comes from it: F.linear(x, self.qkv.weight, cat(q_bias, k_bias, v_bias))."""
    separate = getattr(parent, "q_bias", None) is not None and getattr(parent, "qkv", None) is linear
    return separate and not getattr(parent, "qkv_bias_separate", False)


def _found(targets: str | tuple, modules: dict, linears: dict) -> list[tuple[str, Target]]:
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return [(name, guess_target(name, name, linears[name])) for name in _all_linear(modules, linears)]
    found = []
    for wanted in (targets,) if isinstance(targets, str) else targets:
        if isinstance(wanted, Target) or isinstance(targets, str):
            pattern = wanted.pattern if isinstance(wanted, Target) else wanted
            try:
                expression = re.compile(pattern)
            except re.error as error:
                raise ValueError(f"targets: {pattern!r} is not a regular expression: {error}") from None
            names = [name for name in modules if expression.fullmatch(name)]
        else:
            pattern, names = wanted, [name for name in modules if f".{name}".endswith(f".{wanted}")]
        fitting = [name for name in names if name in linears]
        if not fitting:
            others = sorted({kind_of(modules[name]).removeprefix("torch.") for name in names})
            what = f"matches no nn.Linear, but {', '.join(others)}" if others else "matches no module"
            if isinstance(targets, str) and not others:
                what += " by its whole name (a list would give suffixes)"
            instead = _instead([modules[name] for name in names])
            raise ValueError(f"targets: {pattern!r} {what}; {instead or nearest([pattern], linears)}")
        for name in fitting:
            target = wanted if isinstance(wanted, Target) else guess_target(pattern, name, linears[name])
            found.append((name, target))
    return found


def _all_linear(modules: dict[str, nn.Module], linears: dict[str, nn.Linear]) -> list[str]:
    """What peft takes by this name, too: all but the output embeddings and the heads of a task."""
    model = modules[""]
    outputs = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
    found = [
        name for name, linear in linears.items() if linear is not outputs and name.partition(".")[0] not in TASK_HEADS
    ]
    if not found:
        raise ValueError(f"targets: {ALL_LINEAR!r} matches nothing; {nearest([], linears)}")
    return found


def _instead(modules: list[nn.Module]) -> str:
    """What takes adapters in modules that have weights and are no nn.Linear; "" for those without weights."""
    if any(isinstance(module, nn.MultiheadAttention) for module in modules):
        return _IN_PEFT
    own = [p for module in modules for p in module.parameters(recurse=False)]
    if any(p.dim() == 3 for p in own) and not any(isinstance(m, nn.Conv1d | nn.ConvTranspose1d) for m in modules):
        return "peft adapts weights of experts: name them in its LoraConfig's target_parameters"
    if any(p.dim() > 1 for p in own):
        return "peft adapts such layers, and peft_kernels.integrations.peft.accelerate then fuses the linear ones"
    return ""


def nearest(wanted: list[str], known: Iterable[str]) -> str:
    """The known names nearest to the wanted ones, layers of a stack counted once."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in known))
    if not kinds:
        return "the model has no nn.Linear at all"
    scored = {
        kind: max(
            difflib.SequenceMatcher(None, name, part).ratio() for name in wanted for part in (kind, kind.split(".")[-1])
        )
        for kind in kinds
    }
    return f"nearest: {', '.join(sorted(kinds, key=lambda kind: -scored[kind])[:6])}"
