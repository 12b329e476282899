"""Which layers of a model run as one call: neighbours that read the same tensor and whose adapters are alike."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from peft_kernels.layers.group import LinearGroup, Member
from peft_kernels.presets import Target
from peft_kernels.records import MOST_PROJECTIONS

# Names of layers that read one tensor side by side. Others of a parent, as attention's output, read what these give.
FAMILIES = (
    r"(to_)?(q|k|v|query|key|value)|[qkv]_(proj|lin|linear)|(query|key|value)_proj|w[qkv]",
    r"(gate|up)(_proj)?|w[13]|wi_[01]",
)
OFF = "by itself, as the configuration asks"


def form_groups(
    model: nn.Module, members: Iterable[tuple[str, Member, Target]], wanted: bool = True, stack: bool = False
) -> None:
    """Make groups of the model's layers and let each layer know of its own, or why it runs by itself.

    members: module name, layer and target of each;  wanted: False dissolves the groups that there are
    stack: lay the frozen weights of each group in one memory, but for those that other parameters share
    """
    users = Counter(_memory(t) for t in (*_all_parameters(model), *model.buffers())) if stack else {}
    found: dict[tuple, list[tuple[str, Member]]] = {}
    for name, layer, target in members:
        layer.group, layer.why_alone = None, "" if wanted else OFF
        parent, _, last = name.rpartition(".")
        family = next((place for place, names in enumerate(FAMILIES) if re.fullmatch(names, last)), None)
        if wanted and family is not None:
            found.setdefault((parent, target.input, family), []).append((name, layer))
        elif wanted:
            layer.why_alone = "by itself: its name is not one of layers that read one tensor, as q, k and v"
    for together in found.values():
        alike: dict[tuple, list[tuple[str, Member]]] = {}
        for name, layer in together:
            kind, layer.why_alone = layer.group_kind()
            if kind is not None:
                alike.setdefault((type(layer), *kind), []).append((name, layer))
        for group in alike.values():
            if len(group) > 1:
                names = [name.rpartition(".")[2] for name, _ in group[:MOST_PROJECTIONS]]
                made = LinearGroup([layer for _, layer in group[:MOST_PROJECTIONS]], names)
                for member, layer in enumerate(made.layers):
                    layer.group = made, member
                if stack and all(_can_be_stacked(layer.reads()["weight"], users) for layer in made.layers):
                    made.stack()
            for _, layer in group if len(group) == 1 else group[MOST_PROJECTIONS:]:
                layer.why_alone = "by itself: no neighbour reads the same tensor with an adapter like its own"


def _all_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Tied ones as often as modules have them."""
    return (parameter for _, parameter in model.named_parameters(remove_duplicate=False))


def _memory(t: Tensor) -> object:
    return id(t) if t.is_meta or type(t) not in (Tensor, nn.Parameter) else t.untyped_storage().data_ptr()


def _can_be_stacked(weight: Tensor, users: Counter) -> bool:
    plain = type(weight) is nn.Parameter and not weight.is_meta and not weight.requires_grad
    return plain and weight.is_contiguous() and users[_memory(weight)] == 1
