"""What one layer brings to the imitation step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from peft_kernels.checks import check_shape, check_tensor, kind_of
from peft_kernels.imitation.factors import Transform, check_student
from peft_kernels.ops.weight_distance import LIVE

LISTS = ("live", "teacher", "weight0", "live_bias", "teacher_bias", "bias0", "down", "up")


@dataclass
class ImitationGroup:
    """One layer's projections with the transform they share. Sequences have one tensor for each projection.

    live: weights that train, (out, in), float32, bfloat16 or float16
    teacher: their averages, float32, changed in place;  weight0: the frozen weights, float32
    live_bias, teacher_bias, bias0: likewise (out,); None for layers without bias
    down, up: A (R, in) and B (out, R) of each projection; None for the transform alone
    transform: Transform(A_d, a_d, B_d, c_d); None for A and B alone
    placement: of the transform, on the projections' "input" (q, k, v, fc1) or "output" (fc2)

    Keep groups from step to step, in one order: what kernels need to know about them is worked out once and kept with
    the first, as is the scratch memory. Adapters that do not require grad get none. Copies and pickles leave that out.
    """

    live: Sequence[Tensor]
    teacher: Sequence[Tensor]
    weight0: Sequence[Tensor]
    live_bias: Sequence[Tensor] | None = None
    teacher_bias: Sequence[Tensor] | None = None
    bias0: Sequence[Tensor] | None = None
    down: Sequence[Tensor] | None = None
    up: Sequence[Tensor] | None = None
    transform: Transform | None = None
    placement: str = "input"
    plan: object = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self):
        for name in LISTS:
            value = getattr(self, name)
            if value is not None:
                if isinstance(value, Tensor | str | dict) or not hasattr(value, "__iter__"):
                    raise TypeError(f"{name}: expected a list of tensors, got {kind_of(value)}")
                setattr(self, name, list(value))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"plan": None}

    def lists(self) -> dict[str, Sequence[Tensor]]:
        """The sequences that have one tensor for each projection."""
        return {name: getattr(self, name) for name in LISTS if getattr(self, name) is not None}

    def tensors(self) -> Iterator[Tensor]:
        for each in self.lists().values():
            yield from each
        yield from self.transform or ()

    def unchanged(self) -> Iterator[Tensor]:
        """All but the teachers."""
        for name, each in self.lists().items():
            yield from () if name.startswith("teacher") else each
        yield from self.transform or ()

    def teachers(self) -> list[Tensor]:
        """What follows."""
        return [*self.teacher, *(self.teacher_bias or ())]

    def learners(self) -> list[Tensor]:
        return [*(self.down or ()), *(self.up or ()), *(self.transform or ())]

    def adapters(self) -> list[Tensor]:
        """What gets gradients."""
        return [t for t in self.learners() if t.requires_grad]


def check_group(where: str, group: ImitationGroup, like: Tensor) -> None:
    """Raises ValueError or TypeError, naming the group and what is wrong in it."""
    lists = group.lists()
    if len({"live_bias", "teacher_bias", "bias0"} & lists.keys()) not in (0, 3):
        raise ValueError(f"{where}: expected live_bias, teacher_bias and bias0, or none of them")
    if ("down" in lists) != ("up" in lists):
        raise ValueError(f"{where}: expected down and up, or neither")
    for name, tensors in lists.items():
        if not tensors or len(tensors) != len(group.weight0):
            raise ValueError(
                f"{where}.{name}: expected {len(group.weight0)} tensors, one for each of weight0, got {len(tensors)}"
            )
    for m, weight0 in enumerate(group.weight0):
        bias0 = group.bias0[m] if "bias0" in lists else None
        lora = (group.down[m], group.up[m]) if "down" in lists else None
        check_tensor(f"{where}.weight0[{m}]", weight0, like, dtypes=(like.dtype,))
        try:
            check_student(weight0, bias0, lora, group.transform, group.placement)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}, projection {m}: {error}") from None
        for suffix, frozen in (("", weight0), ("_bias", bias0)):
            for name, dtypes in (("teacher", (like.dtype,)), ("live", LIVE)) if frozen is not None else ():
                tensor, its = lists[name + suffix][m], f"{where}.{name}{suffix}[{m}]"
                check_tensor(its, tensor, like, dtypes=dtypes)
                check_shape(its, tensor, tuple(frozen.shape), "that of weight0 or bias0")
    for tensor in group.tensors():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{where}: expected tensors with neighbouring elements in a row, got {tensor.stride()}")
    if not all(t.is_leaf for t in group.adapters()):
        raise ValueError(f"{where}: adapters get their gradients directly and must be leaves, not computed tensors")


def named_teachers(where: str, group: ImitationGroup) -> Iterator[tuple[str, Tensor]]:
    """What the step changes in place."""
    for name in ("teacher", "teacher_bias"):
        for m, tensor in enumerate(getattr(group, name) or ()):
            yield f"{where}.{name}[{m}]", tensor
