"""MoIL's imitation step and `weight_distance`, against the authors' formula: verified first, then timed.

    python -m peft_kernels bench weight_distance
    pytest benchmarks/bench_weight_distance.py --benchmark-only

One call is a whole step of a whole model: every teacher follows its live weight and bias, the loss, and the gradients
of all adapters in `.grad`, which was None before. A plain distance has no teacher that moves and no bias. All float32,
whatever --dtype says: a model's dtype concerns the live weights alone. Two layers of the same shapes are verified: the
loss to 5e-7, teachers to twice the error of the authors' formula, gradients to that and what the order of their sums
may change; of the case itself, the losses agree.

"authors' formula": docs/method.md, section 3, as it stands, eagerly: W0 + B A once in W̄ and once in b̄, as in their
code; "W0 + B A shared" forms it once. "foreach lerp": the teachers alone, a floor. GB/s counts the compulsory bytes.
Peak memory is that of the first step, beyond weights and adapters: gradients count, and so does what is kept for later.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels import ImitationGroup, Transform, hybrid_factors, imitation_step, weight_distance

from . import cases, runner
from .cases import Draw
from .floor import weight_distance as costs
from .runner import Absent, Built, Provider

OP = "weight_distance"
PROJECTIONS = costs.PROJECTIONS
STEP, PLAIN = "imitation step", "distance"
DECAY = 0.9996  # the authors'
DRIFT, ADAPTED = 1e-2, 1e-1  # of live weight and teacher, and of the adapters' product, relative to the frozen weight
VERIFIED_LAYERS = 2
LOSS_ACCURACY = 5e-7


# ---- cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case(cases.Case):
    """Layers of three projections of width × width; R of each one's A and B, depth of a layer's transform or 0."""

    layers: int
    width: int
    R: int
    depth: int = 0
    kind: str = STEP  # or PLAIN, whose depth is 0

    def __str__(self) -> str:
        ranks = f"ranks {self.R} + {self.depth}" if self.depth else f"rank {self.R}"
        return f"{self.layers} · {PROJECTIONS} × {self.width}², {ranks}, {self.kind}"


class Tensors(NamedTuple):
    """Stacks: of a matrix or vector for each projection, or for each layer's transform; None where there is none."""

    live: Tensor
    teacher: Tensor
    weight0: Tensor
    live_bias: Tensor | None
    teacher_bias: Tensor | None
    bias0: Tensor | None
    down: Tensor
    up: Tensor
    transform_down: Tensor | None
    transform_down_bias: Tensor | None
    transform_up: Tensor | None
    transform_up_bias: Tensor | None

    @property
    def input(self) -> runner.Input:
        return None, None


TRANSFORM = Tensors._fields[-4:]

VILT_B = {"layers": 12, "width": 768, "R": 96}
HYBRID = {**VILT_B, "depth": 96}
CASES = (HYBRID, {**HYBRID, "layers": 2}, VILT_B, {**VILT_B, "kind": PLAIN})
PRESETS = {"vilt": ((12, 768, 96, 96),)}


def usual_cases(on_cpu: bool, dtypes: Sequence[str]) -> list[Case]:
    return [Case(**each) for each in CASES]


def shaped(shape: Sequence[int], dtype: str) -> list[Case]:
    """With and without the transform, and the plain distance."""
    return [Case(*shape), Case(*shape[:3]), Case(*shape[:3], kind=PLAIN)]


def proof(case: Case) -> Case:
    return replace(case, layers=min(case.layers, VERIFIED_LAYERS))


def make_tensors(case: Case, device: torch.device) -> Tensors:
    draw, d, N = Draw(case, device), case.width, PROJECTIONS * case.layers

    def near(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor + draw.normal(*tensor.shape, std=DRIFT) * tensor.std()

    def adapter(*shape: int) -> Tensor:
        return draw.normal(*shape, std=(ADAPTED / shape[-1]) ** 0.5)

    weight0, bias0 = draw.normal(N, d, d, std=d**-0.5), draw.normal(N, d) if case.kind == STEP else None
    shapes = ((case.depth, d), (case.depth,), (d, case.depth), (d,))
    transform = [adapter(case.layers, *shape) if case.depth else None for shape in shapes]
    lora = adapter(N, case.R, d), adapter(N, d, case.R)
    return Tensors(near(weight0), near(weight0), weight0, near(bias0), near(bias0), bias0, *lora, *transform)


# ---- providers ------------------------------------------------------------------------------------------------------


def own_groups(case: Case, t: Tensors) -> list[ImitationGroup]:
    """Layers with teachers and adapters of one provider's own; it shares with all others what nobody changes."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_()

    groups = []
    for layer in range(case.layers):
        own = slice(PROJECTIONS * layer, PROJECTIONS * (layer + 1))
        lists = {name: None if stack is None else list(stack[own]) for name, stack in t._asdict().items()}
        for name in ("teacher", "teacher_bias"):
            lists[name] = lists[name] and [tensor.clone() for tensor in lists[name]]
        for name in ("down", "up"):
            lists[name] = [leaf(tensor) for tensor in lists[name]]
        stacks = [getattr(t, name) for name in TRANSFORM]
        transform = Transform(*(leaf(stack[layer]) for stack in stacks)) if case.depth else None
        own_lists = {name: tensors for name, tensors in lists.items() if name not in TRANSFORM}
        groups.append(ImitationGroup(**own_lists, transform=transform))
    return groups


def _step(groups: Sequence[ImitationGroup], loss: Callable[[], Tensor], backward: bool = True) -> Built:
    """`loss` is differentiable, or without `backward` has left gradients in `.grad`."""
    adapters = [tensor for group in groups for tensor in group.adapters()]

    def forward(_: None) -> Tensor:
        for adapter in adapters:
            adapter.grad = None
        found = loss()
        if backward:
            found.backward()
        return found.detach()

    def found() -> dict[str, Tensor]:
        kinds = {"dA": [g.down for g in groups], "dB": [g.up for g in groups]}
        transforms = [group.transform for group in groups if group.transform]
        for name, tensors in zip(Transform._fields, zip(*transforms)):
            kinds[f"d{name}"] = [tensors]
        grads = {name: [t.grad.flatten() for each in lists for t in each] for name, lists in kinds.items()}
        return {name: torch.cat(each) for name, each in grads.items()} | _teachers(groups)

    return Built(forward, {}, found, loss if backward else None)


def _followers(groups: Sequence[ImitationGroup]) -> tuple[list[Tensor], list[Tensor]]:
    """Every teacher, weights and biases, and what it follows."""
    teachers = [teacher for group in groups for teacher in (*group.teacher, *(group.teacher_bias or ()))]
    return teachers, [live for group in groups for live in (*group.live, *(group.live_bias or ()))]


def _teachers(groups: Sequence[ImitationGroup]) -> dict[str, Tensor]:
    return {f"teacher {index}": teacher for index, teacher in enumerate(_followers(groups)[0])}


def _follow(teachers: Sequence[Tensor], lives: Sequence[Tensor]) -> None:
    for teacher, live in zip(teachers, lives):
        teacher.mul_(DECAY).add_(live, alpha=1 - DECAY)


def _by_autograd(case: Case, t: Tensors, distance: Callable[[ImitationGroup, int], Tensor]) -> Built:
    """distance: of one projection, differentiable."""
    groups = own_groups(case, t)

    def loss() -> Tensor:
        total = 0
        for group in groups:
            if case.kind == STEP:
                _follow(*_followers([group]))
            for m in range(PROJECTIONS):
                total = total + distance(group, m)
        return total

    return _step(groups, loss)


def _authors(case: Case, t: Tensors, shared: bool = False) -> Built:
    identity = torch.eye(case.width, dtype=t.weight0.dtype, device=t.weight0.device)

    def distance(group: ImitationGroup, m: int) -> Tensor:
        weight = group.weight0[m] + group.up[m] @ group.down[m]
        bias = None if group.bias0 is None else group.bias0[m]
        if group.transform is not None:
            down, down_bias, up, up_bias = group.transform
            again = weight if shared else group.weight0[m] + group.up[m] @ group.down[m]
            bias = again @ (up @ down_bias + up_bias) + bias
            weight = weight @ (identity + up @ down)
        loss = F.mse_loss(weight, group.teacher[m])
        return loss if bias is None else loss + F.mse_loss(bias, group.teacher_bias[m])

    return _by_autograd(case, t, distance)


def _low_rank(case: Case, t: Tensors) -> Built:
    def distance(group: ImitationGroup, m: int) -> Tensor:
        weight0, bias0 = group.weight0[m], None if group.bias0 is None else group.bias0[m]
        left, right, bias = hybrid_factors(weight0, bias0, (group.down[m], group.up[m]), group.transform)
        loss = torch.addmm(weight0 - group.teacher[m], left, right).square().mean()
        return loss if bias is None else loss + (bias - group.teacher_bias[m]).square().mean()

    return _by_autograd(case, t, distance)


def _teachers_alone(follow: Callable[[Sequence[Tensor], Sequence[Tensor]], object]) -> Callable[[Case, Tensors], Built]:
    """Its y is the first teacher."""

    def build(case: Case, t: Tensors) -> Built:
        if case.kind != STEP:
            raise Absent("no teacher follows anything in a plain distance")
        groups = own_groups(case, t)
        teachers, lives = _followers(groups)

        def forward(_: None) -> Tensor:
            follow(teachers, lives)
            return teachers[0]

        return Built(forward, {}, lambda: _teachers(groups))

    return build


def _lerp(teachers: Sequence[Tensor], lives: Sequence[Tensor]) -> None:
    torch._foreach_lerp_(teachers, lives, 1 - DECAY)


def _ours(backend: str) -> Callable[[Case, Tensors], Built]:
    def build(case: Case, t: Tensors) -> Built:
        groups = own_groups(case, t)
        names = ("teacher", "weight0", "up", "down")
        lists = [[tensor for group in groups for tensor in getattr(group, name)] for name in names]

        if case.kind == STEP:
            return _step(groups, partial(imitation_step, groups, decay=DECAY, backend=backend), backward=False)
        return _step(groups, partial(weight_distance, *lists, backend=backend))

    return build


PROVIDERS = {
    "authors' formula": Provider(_authors, "authors"),
    "W0 + B A shared": Provider(partial(_authors, shared=True), None),
    "low-rank form, autograd": Provider(_low_rank, None),
    "foreach lerp": Provider(_teachers_alone(_lerp), "lerp"),
    "ours, torch": Provider(_ours("torch"), "torch", "torch"),
    "ours, triton": Provider(_ours("triton"), "fused", "triton", ("cuda",)),
    "ours, cuda": Provider(_ours("cuda"), "fused", "cuda", ("cuda",)),
}


# ---- what is right, and what it costs -------------------------------------------------------------------------------


def reference(provider: Provider, problem: runner.Problem, built: Built, seed: int) -> tuple:
    return ("teachers", _teachers_alone(_follow)) if provider.design == "lerp" else ("step", _authors)


def _sizes(case: Case) -> tuple:
    return case.layers, case.width, case.R, case.depth, case.kind == STEP


def least(case: Case, design: str | None) -> tuple:
    return costs.compulsory(*_sizes(case), design)


def passes(case: Case, design: str, device: str) -> tuple:
    return costs.passes(design, *_sizes(case), device)


LAST = least, passes, proof, {"y": LOSS_ACCURACY}, PRESETS, "teacher"
BENCH = runner.Bench(OP, PROVIDERS, usual_cases, "LAYERS,WIDTH,R,R_D", shaped, make_tensors, reference, *LAST)


def pytest_generate_tests(metafunc) -> None:
    runner.parametrize(metafunc, BENCH)


def test_weight_distance(benchmark, case: Case, provider: str) -> None:
    runner.run_test(benchmark, BENCH, case, provider)
