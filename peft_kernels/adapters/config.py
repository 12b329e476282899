"""What every adapter's configuration has: where it goes, what trains beside it, and how it is written to a file."""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from peft_kernels.backend import BACKENDS
from peft_kernels.checks import check_choice, check_finite, check_flag
from peft_kernels.presets import PRESETS, Target

ADAPTER_DTYPES = (None, "float32", "float16", "bfloat16", "float64")
MAX_RANK = 65_536  # a file that asks for more is broken
Config = TypeVar("Config", bound="AdapterConfig")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """preset: a name of `peft_kernels.presets.PRESETS`, for the targets and heads of a model
    targets: instead of the preset's: suffixes of module names ["query", "value"], one regular expression "…" that whole
        names match, `Target`s, or "all-linear": every nn.Linear but the model's output embeddings and task heads
    modules_to_save: heads that train whole, by module or parameter name; None: the preset's; []: none
    adapter_dtype: None (the weight's; under half precision float32 masters, as in peft) | "float32" | "bfloat16" | …
    backend: "auto" | "cuda" | "triton" | "torch"
    group: do layers that read one tensor, as q, k and v do, run as one call?
    stack: are the frozen weights of such layers laid in one memory, for one product? While that is done, a layer's
        weights are there twice
    recompute: does the backward compute activations again, to the same bits, where they would be kept? The input of
        layers behind one, as fc2, and in gated MLPs and those with QuickGELU the factors of that input
    """

    needs_targets: ClassVar[bool] = True

    preset: str | None = None
    targets: str | tuple[str | Target, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    adapter_dtype: str | None = None
    backend: str = "auto"
    group: bool = True
    stack: bool = False
    recompute: bool = True

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        check_choice("preset", self.preset, (None, *PRESETS))
        check_choice("backend", self.backend, ("auto", *BACKENDS))
        check_flag("group", self.group)
        check_flag("stack", self.stack)
        check_flag("recompute", self.recompute)
        check_choice("adapter_dtype", self.adapter_dtype, ADAPTER_DTYPES)
        if not (isinstance(self.targets, str) and self.targets):
            object.__setattr__(self, "targets", _names("targets", self.targets, (str, Target)))
        object.__setattr__(self, "modules_to_save", _names("modules_to_save", self.modules_to_save, (str,)))
        if self.needs_targets and not self.targets and (self.preset is None or self.targets is not None):
            raise ValueError(f"preset, targets: expected one of {', '.join(PRESETS)}, or module names, got neither")

    def dtype_for(self, weight: Tensor) -> torch.dtype:
        """Of an adapter beside this weight."""
        if self.adapter_dtype is None:
            return torch.promote_types(weight.dtype, torch.float32)
        return getattr(torch, self.adapter_dtype)

    def to_dict(self) -> dict[str, Any]:
        """Of what JSON knows."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`. Raises ValueError on a name that the configuration does not have."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            names = ", ".join(sorted(known))
            raise ValueError(f"{cls.__name__}: expected some of {names}, got {', '.join(map(repr, unknown))}")
        return cls(**values)


def _plain(value: Any) -> Any:
    """numpy's scalars, in dictionaries too, as the Python numbers that JSON knows."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    is_scalar = getattr(value, "shape", None) == () and not isinstance(value, Tensor) and hasattr(value, "item")
    return value.item() if is_scalar else value


def _names(name: str, value: object, kinds: tuple[type, ...]) -> tuple | None:
    """A list, set or tuple as a tuple; targets come as dictionaries from JSON."""
    if value is None:
        return None
    if not isinstance(value, list | set | tuple):
        raise TypeError(f"{name}: expected names, got {value!r}")
    made = sorted(value) if isinstance(value, set) else value
    if Target in kinds:
        made = [_target(each) if isinstance(each, dict) else each for each in made]
    if not all(isinstance(each, kinds) and each != "" for each in made):
        raise TypeError(f"{name}: expected names, got {value!r}")
    return tuple(made)


def _target(values: dict[str, Any]) -> Target:
    known = [field.name for field in dataclasses.fields(Target)]
    if "pattern" not in values or not values.keys() <= set(known):
        raise ValueError(f"targets: expected some of {', '.join(known)}, and the first, got {values!r}")
    return Target(**values)


def by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of a module's own name, or of the first pattern that the end of its name matches, as in peft."""
    patterns = patterns or {}
    found = (value for pattern, value in patterns.items() if matches_end(pattern, module))
    return patterns[module] if module in patterns else next(found, default)


def matches_end(pattern: str, module: str) -> bool:
    return pattern == module or re.match(rf"(.*\.)?({pattern})$", module) is not None


def check_patterns(patterns: object, name: str, check: Callable[[object, str], None]) -> None:
    """A dictionary of regular expressions, each with a value that passes `check`, or None."""
    if patterns is not None and not isinstance(patterns, dict):
        raise TypeError(f"{name}: expected a dictionary by module name, got {patterns!r}")
    for pattern, value in (patterns or {}).items():
        try:
            re.compile(pattern)
        except (TypeError, re.error) as error:
            raise ValueError(f"{name}: {pattern!r} is not a regular expression: {error}") from None
        check(value, f"{name}[{pattern!r}]")


def check_count(value: object, name: str = "rank") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if not 1 <= value <= MAX_RANK:
        raise ValueError(f"{name}: expected 1 to {MAX_RANK:,}, got {value:,}")


def check_number(value: object, name: str, least: float = -math.inf, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    check_finite(name, value)
    if not least <= value <= most:
        expected = f"at least {least:g}" if most == math.inf else f"in [{least:g}, {most:g}]"
        raise ValueError(f"{name}: expected a number {expected}, got {value}")
