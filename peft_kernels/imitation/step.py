"""One call per optimizer step: teachers, loss and adapter gradients of a whole model, without autograd."""

import operator
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from itertools import chain

import torch
from torch import Tensor

from peft_kernels.autocast import autocast_off
from peft_kernels.backend import BACKENDS, requested_by, resolve
from peft_kernels.checks import check_choice, check_flag, check_scale, kind_of
from peft_kernels.imitation.groups import LISTS, ImitationGroup, check_group, named_teachers
from peft_kernels.imitation.plan import Memory, Plan
from peft_kernels.looks import looks
from peft_kernels.ops.weight_distance import REDUCTIONS, check_changed, check_decay
from peft_kernels.transforms import transformed

_PARTS = operator.attrgetter(*LISTS, "transform")
_BACKENDS = ("auto", *BACKENDS)
_NEEDS, _PLACEMENT = operator.attrgetter("requires_grad"), operator.attrgetter("placement")


class _Prepared:
    """Plans, and all that they depend on: `fits` says whether it is as it was."""

    def __init__(self, groups: list[ImitationGroup], requested: tuple[str, str], plans: list[Plan]):
        self.asked, self.plans = (requested, [*map(type, groups)]), plans
        self.structure, self.tensors = _structure(groups)
        self.differentiated = [t for group in groups for t in (*group.learners(), *group.teachers())]
        self.looks, self.needs = self._facts()

    def fits(self, groups: list[ImitationGroup], requested: tuple[str, str]) -> bool:
        """Same tensors in the same places of groups, none of them elsewhere or of another kind."""
        if self.asked != (requested, [*map(type, groups)]):
            return False
        try:
            structure, tensors = _structure(groups)
        except TypeError:  # which the checks will name
            return False
        same = structure == self.structure and all(map(operator.is_, tensors, self.tensors))
        return same and self._facts() == (self.looks, self.needs)

    def _facts(self) -> tuple[Hashable, list[bool]]:
        """What may change about the tensors; but for their numbers."""
        return looks(self.tensors, addresses=True), [*map(_NEEDS, self.differentiated)]


def _structure(groups: list[ImitationGroup]) -> tuple[tuple, list[Tensor]]:
    """Placements, how many tensors there are of each kind, None where there are none of it; and all of them."""
    parts = [*chain.from_iterable(map(_PARTS, groups))]
    given, absent = [part for part in parts if part is not None], [part is None for part in parts]
    tensors = [*chain.from_iterable(given)]
    return (absent, [*map(len, given)], [*map(_PLACEMENT, groups)]), tensors


def _plans(groups: list[ImitationGroup], backend: str) -> list[Plan]:
    """One for all layers together; on the torch backend, which gains nothing by that, one after the other in the same
    scratch memory, while a layer is in the cache."""
    memory = Memory(groups[0].weight0[0])
    return [Plan(part, backend, memory) for part in ([[g] for g in groups] if backend == "torch" else [groups])]


@torch._disable_dynamo
def imitation_step(
    groups: Sequence[ImitationGroup],
    *,
    decay: float,
    reduction: str = "mean",
    loss_scale: float | Tensor = 1.0,
    update_teacher: bool = True,
    backend: str = "auto",
    return_errors: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Teachers follow, students' distance from them, and its gradients added to the adapters' `.grad`.

    groups: (layers) of `ImitationGroup`, of any shapes, all on one device
    decay: in [0, 1], of teacher ← decay · teacher + (1 − decay) · live; the authors' 0.9996
    reduction: "mean" (the authors') | "sum" | "relative", of each weight's and each bias's squared distance; the loss
        is their sum
    loss_scale: a number or a 0-d tensor that multiplies the gradients, and not the returned loss
    update_teacher: False leaves the teachers as they are
    backend: "auto" | "cuda" | "triton" | "torch"
    return_errors: also return ‖Ŵ − W̄‖² / max(‖Ŵ − W0‖², 1e-12 ‖W0‖²) of each projection's weight, 0 where that is 0
    returns loss: () a 0-d tensor on the device, not waited for; with return_errors (loss, errors (projections,))

    No autograd graph and no activations: call it once per optimizer step; a compiled function breaks its graph here.
    An adapter without `.grad` gets one that lives with `groups` and is used again, overwritten, when `.grad` is None
    again: clone what is to outlive `zero_grad(set_to_none=True)`.
    Raises ValueError or TypeError, naming the argument, before anything runs; BackendUnavailableError (a ValueError)
    if a backend asked for by name cannot run. Source: docs/method.md, section 3.
    """
    check_decay(decay)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("backend", backend, _BACKENDS)
    check_flag("update_teacher", update_teacher)
    check_flag("return_errors", return_errors)
    if transformed():
        raise ValueError("groups: are changed in place, which transforms do not see through; call this outside")
    groups = [*groups] if hasattr(groups, "__iter__") and not isinstance(groups, Tensor) else [groups]
    plans = _prepared(groups, backend)
    like = plans[0].like
    check_scale(loss_scale, like, "loss_scale")
    if isinstance(loss_scale, Tensor):
        loss_scale = loss_scale.to(like.dtype)
    inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    with inference, torch.no_grad(), autocast_off(like):
        try:
            for plan in plans:
                plan.find_gradients()
            results = [plan.run(decay if update_teacher else None, reduction, loss_scale) for plan in plans]
        except BaseException:
            for plan in plans:
                plan.drop_unfinished()
            raise
        loss = _joined([each.losses for each in results]).sum()
        if not return_errors:
            return loss
        squared, moved, base = _joined([each.sums for each in results])[:, :3].unbind(1)
        denominator = torch.maximum(moved, 1e-12 * base)
        return loss, torch.where(denominator == 0, 0, squared / denominator)


def _prepared(groups: list[ImitationGroup], backend: str) -> list[Plan]:
    """The plans that the first group keeps, or new ones if anything has changed."""
    requested, kept = requested_by(backend), getattr(groups[0], "plan", None) if groups else None
    if kept is not None and kept.fits(groups, requested):
        return kept.plans
    if not groups or not all(isinstance(group, ImitationGroup) and group.weight0 for group in groups):
        raise TypeError("groups: expected ImitationGroups, at least one, each with at least one projection")
    like = groups[0].weight0[0]
    for index, group in enumerate(groups):
        for name, each in (*group.lists().items(), ("transform", group.transform or ())):
            if not all(isinstance(t, Tensor) for t in each):
                raise TypeError(f"groups[{index}].{name}: expected tensors, got {[*map(kind_of, each)]}")
    for index, group in enumerate(groups):
        check_group(f"groups[{index}]", group, like)
    largest = tuple(max(t.shape[dim] for group in groups for t in group.weight0) for dim in (0, 1))
    lives = (t.dtype for group in groups for t in (*group.live, *(group.live_bias or ())))
    widest = max(lives, key=lambda dtype: dtype.itemsize)
    name = resolve("imitation_step", (like,), backend, shape=largest, live=widest).name
    teachers = [pair for index, group in enumerate(groups) for pair in named_teachers(f"groups[{index}]", group)]
    check_changed(teachers, (t for group in groups for t in group.unchanged()))
    with torch.inference_mode(False), torch.no_grad():
        plans = _plans(groups, name)
    groups[0].plan = _Prepared(groups, requested, plans)
    return plans


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
