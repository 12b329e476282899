"""Random problems for `lowrank_projections`, their oracle in float64, and torch's own error in the same dtype."""

import importlib
from dataclasses import dataclass

import torch
from lowrank_cases import compare
from torch import Tensor

from peft_kernels import lowrank_hidden, lowrank_projections
from peft_kernels.ops.lowrank_linear import draw
from peft_kernels.ops.lowrank_projections import lowrank_projections_reference
from peft_kernels.records import Dropout, Factors, Needs

LAYOUTS = {
    "lora": {},
    "grouped queries": {"outputs": (48, 16, 16), "stacked": True},
    "key and value": {"outputs": (24, 24), "biases": (False, False)},
    "aurora": {"shared": True, "core": "diagonal"},
    "aurora-released": {"shared": True, "core": "dense", "outputs": (24, 24)},
    "aurora's context": {"shared": True, "core": "diagonal", "outputs": (24, 24), "precomputed_hidden": True},
    "four": {"outputs": (40, 24, 24, 8), "biases": (True, False, True, True), "core": "dense"},
}


@dataclass(frozen=True)
class Problem:
    """Sizes as in peft_kernels/ops/lowrank_projections.py: x (rows, inputs), y_j (rows, outputs[j])."""

    rows: int = 37
    inputs: int = 24
    outputs: tuple[int, ...] = (40, 16, 24)
    rank: int = 4
    shared: bool = False  # one A for all
    core: str | None = None  # "diagonal" | "dense"
    dtype: torch.dtype = torch.float32
    factor_dtype: torch.dtype | None = None
    biases: tuple[bool, ...] = (True, False, True)
    stacked: bool = False  # the weights are slices of one memory
    precomputed_hidden: bool = False  # x Aᵀ comes from `lowrank_hidden`
    dropout_p: float = 0.0
    dropout_on: str = "input"

    @property
    def count(self) -> int:
        return len(self.outputs)

    @property
    def scales(self) -> list[float]:
        return [1.7, 0.5, -0.8, 1.0][: self.count]

    def tensors(self, device: str) -> dict[str, Tensor]:
        """Leaves that require grad, by name; the same numbers whenever the shapes are the same."""
        rank, shapes = self.rank, {"x": (self.rows, self.inputs)}
        if self.shared:
            shapes["down"] = (rank, self.inputs)
        for j, width in enumerate(self.outputs):
            shapes[f"weight{j}"] = (width, self.inputs)
            if self.biases[j % len(self.biases)]:
                shapes[f"bias{j}"] = (width,)
            if not self.shared:
                shapes[f"down{j}"] = (rank, self.inputs)
            shapes[f"up{j}"] = (width, rank)
            if self.core:
                shapes[f"core{j}"] = (rank,) if self.core == "diagonal" else (rank, rank)
        generator = torch.Generator().manual_seed(sum(map(ord, repr(shapes))))
        tensors = {}
        for name, shape in shapes.items():
            is_factor = name.rstrip("0123456789") in ("down", "up", "core")
            numbers = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
            dtype = (self.factor_dtype or self.dtype) if is_factor else self.dtype
            tensors[name] = numbers.to(self.dtype).to(dtype).to(device)
        if self.stacked:
            together = torch.cat([tensors[f"weight{j}"] for j in range(self.count)]).split(self.outputs)
            tensors |= {f"weight{j}": weight for j, weight in enumerate(together)}
        return {name: t.detach().requires_grad_() for name, t in tensors.items()}

    def gradients(self, device: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        shapes = [(self.rows, width) for width in self.outputs]
        numbers = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return [each.to(self.dtype).to(device) for each in numbers]


def arguments(problem: Problem, tensors: dict[str, Tensor]) -> tuple:
    """x, weights, biases, downs, ups and cores, as the operation takes them."""
    weights, biases, downs, ups, cores = (
        [tensors.get(f"{name}{j}") for j in range(problem.count)] for name in ("weight", "bias", "down", "up", "core")
    )
    return tensors["x"], weights, biases, tensors.get("down", downs), ups, cores if problem.core else None


def call(problem: Problem, tensors: dict[str, Tensor], backend: str, *, seed: int = 7) -> tuple[Tensor, ...]:
    hidden = None
    if problem.precomputed_hidden:
        hidden = lowrank_hidden(tensors["x"], tensors["down"], backend=backend)
    torch.manual_seed(seed)
    return lowrank_projections(
        *arguments(problem, tensors), scales=problem.scales, dropout_p=problem.dropout_p, dropout_on=problem.dropout_on,
        hidden=hidden, backend=backend,
    )  # fmt: skip


def run(problem: Problem, device: str, backend: str, *, seed: int = 7, used: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Every y_j and every gradient by our operation, detached; used: the outputs that have a gradient, () for all."""
    tensors = problem.tensors(device)
    ys = call(problem, tensors, backend, seed=seed)
    return _differentiated(problem, tensors, ys, problem.gradients(device), used)


def expected(
    problem: Problem, device: str, masks: list[Tensor] | None, dtype: torch.dtype = torch.float64,
    absolute: bool = False, used: tuple[int, ...] = (),
) -> dict[str, Tensor]:  # fmt: skip
    """The same by the definition and autograd in `dtype`; absolute: the sums of the absolute terms."""
    tensors = {name: t.detach().to(dtype) for name, t in problem.tensors(device).items()}
    tensors = {name: (t.abs() if absolute else t).requires_grad_() for name, t in tensors.items()}
    ys = lowrank_projections_reference(
        *arguments(problem, tensors), scales=[abs(s) if absolute else s for s in problem.scales], masks=masks,
        dropout_p=problem.dropout_p, dropout_on=problem.dropout_on,
    )  # fmt: skip
    dys = [dy.abs().to(dtype) if absolute else dy.to(dtype) for dy in problem.gradients(device)]
    return _differentiated(problem, tensors, ys, dys, used)


def _differentiated(problem: Problem, tensors: dict[str, Tensor], ys, dys, used: tuple[int, ...]) -> dict[str, Tensor]:
    used = used or range(problem.count)
    torch.autograd.backward([ys[j] for j in used], [dys[j] for j in used])
    results = {f"y{j}": y.detach() for j, y in enumerate(ys)}
    return results | {name: t.grad for name, t in tensors.items() if t.grad is not None}


def masks_of(problem: Problem, device: str, backend: str, *, seed: int = 7) -> list[Tensor]:
    """The keep-masks that a call with this seed draws: those of `lowrank_linear` for the same seeds.

    A backend's own are read off the gradient of x, or of z, which is zero just where an element was dropped.
    """
    x, on_input = problem.tensors(device)["x"].detach(), problem.dropout_on == "input"
    columns = problem.inputs if on_input else problem.rank
    torch.manual_seed(seed)
    rng = draw(x, backend, problem.dropout_p, columns, problem.count)
    if backend == "torch":
        return list(rng)
    module, masks = importlib.import_module(f"peft_kernels.{backend}_kernels.lowrank_linear"), []
    dy = torch.ones(problem.rows, 8, device=device)
    down, up = (torch.ones(shape, device=device) for shape in ((problem.rank, problem.inputs), (8, problem.rank)))
    weight = torch.zeros(8, problem.inputs, device=device)
    for j in range(problem.count):
        dropout, needs = Dropout(rng[j], problem.dropout_p, problem.dropout_on), Needs(x=on_input, z=not on_input)
        z = None if on_input else torch.ones(problem.rows, problem.rank, device=device)
        factors = Factors(down if on_input else None, up, None, 1.0, z)
        dx, *_, dz = module.lowrank_linear_bwd(dy, None, weight, factors, dropout, needs)
        masks.append((dx if on_input else dz) != 0)
    return masks


def assert_as_accurate_as_torch(
    problem: Problem, device: str, backend: str, *, used: tuple[int, ...] = (), conditioned: bool = False
) -> None:
    """The rule of lowrank_cases.py, for every output and every gradient."""
    masks = masks_of(problem, device, backend) if problem.dropout_p else None
    ours = run(problem, device, backend, used=used)
    oracle, peer = (expected(problem, device, masks, dtype, used=used) for dtype in (torch.float64, problem.dtype))
    terms = expected(problem, device, masks, absolute=True, used=used) if conditioned else {}
    compare(ours, oracle, peer, terms, problem, backend)
