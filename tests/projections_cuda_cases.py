"""Problems for the CUDA kernels of the low-rank projections, and their float64 definition."""

import random
from dataclasses import dataclass, replace

import torch
from cuda_cases import BF16, FLOAT, HALF, OFFSET, SEED, P, compare, keep_mask, laid_out

from peft_kernels.cuda_kernels import lowrank_projections as kernels
from peft_kernels.ops.lowrank_projections import lowrank_projections_reference
from peft_kernels.records import KEEP_ALL, Dropout, ProjectionNeeds, Projections


@dataclass(frozen=True)
class Case:
    widths: tuple = (96, 63, 40)
    rows: int = 63
    columns: int = 63
    rank: int = 16
    shared: bool = False
    hidden: bool = False  # z comes from elsewhere
    drop: str = "no"  # no | input | rank
    dtype: torch.dtype = FLOAT
    factors: torch.dtype | None = None  # None: as dtype
    layout: str = "dense"  # dense | strided (16-byte accesses still possible) | unaligned
    stacked: bool = False  # all weights in one memory
    biases: str = "all"  # all | some | none
    strips: bool = True  # False: every pass is one strip of rows, so that its loop over tiles runs

    def __str__(self):
        words = ["x".join(map(str, (self.rows, self.columns, *self.widths))), f"r{self.rank}", self.drop]
        words += [str(self.dtype).removeprefix("torch."), self.layout]
        flags = "shared", "hidden", "factors", "stacked", "biases", "strips"
        return "-".join(words + [name for name in flags if getattr(self, name) != getattr(Case, name)])


def sampled(count):
    """A fixed random sample of the grid; its rare values have a reason each."""
    draw = random.Random(11).choice
    for _ in range(count):
        shared, drop = draw([False, False, True]), draw(["no", "input", "rank"])
        yield Case(
            widths=tuple(draw([1, 16, 63, 136, 200]) for _ in range(draw([2, 3, 3, 4]))),
            rows=draw([1, 5, 63, 130, 130]),  # 130: two full tiles and a rest
            columns=draw([1, 16, 63, 96, 264]),
            rank=draw([1, 3, 16, 16, 33, 48]),  # 33, 48: shared memory holds two projections' factors
            shared=shared,
            hidden=shared and drop != "input" and draw([False, True]),
            drop=drop,
            dtype=draw([FLOAT, BF16, HALF]),
            factors=draw([None, FLOAT]),
            layout=draw(["dense", "strided", "unaligned"]),
            stacked=draw([True, False]),
            biases=draw(["all", "some", "none"]),
            strips=draw([True, False]),
        )


SENSITIVE = [  # what mutants are tried on
    Case((136, 40), rows=70, columns=200, rank=40, dtype=BF16),
    Case((136, 40, 16), rows=70, columns=63, rank=40, drop="input"),
    Case((16, 200), rows=70, columns=63, rank=40, drop="rank", dtype=BF16),
    Case((16, 40), rows=70, columns=40, rank=40, drop="rank", shared=True),
    Case((16, 40), rows=70, columns=40, rank=40, drop="input", shared=True),
]
CASES = [
    *SENSITIVE,
    *sampled(70),
    *(Case(rank=100, dtype=dtype, drop=drop, rows=70) for dtype in (FLOAT, HALF) for drop in ("input", "rank")),
    Case((64, 64, 64, 64), rank=64, rows=130, drop="input", dtype=BF16, strips=False),
    Case((1128, 760), rows=65, columns=760, dtype=BF16, factors=FLOAT),
    Case((128, 128, 264), rows=65, columns=1128, rank=32, drop="input", dtype=HALF),
    Case((200, 72), rank=128, shared=True, drop="input", dtype=BF16, rows=130, strips=False),
    Case((200, 72, 16), rank=128, shared=True, drop="rank"),
    Case((200, 72, 16), rank=128, shared=True, drop="rank", hidden=True, dtype=BF16, layout="unaligned"),
    Case((63,)),  # what is left where one output alone was used
    Case((63,), drop="input"),
    Case((63,), drop="rank"),
    Case((63,), shared=True, hidden=True),
]


@dataclass
class Problem:
    """Inputs in the case's dtypes, and what is needed to call either side."""

    case: Case
    tensors: dict  # x, weights, biases, downs (one of them if shared), ups, hidden
    dys: list
    scales: list
    rng: torch.Tensor | None
    masks: list | None


def problem(case, device):
    M, K, R, widths = case.rows, case.columns, case.rank, case.widths
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    put = lambda t: laid_out(t.to(device, case.dtype), case.layout)  # noqa: E731
    weights = (normal(sum(widths), K) / K**0.5).to(device, case.dtype).split(widths)
    biased = {"all": (0, 1, 2, 3), "some": (0, 2), "none": ()}[case.biases]
    factors = case.factors or case.dtype
    values = {
        "x": put(normal(M, K)),
        "weights": list(weights) if case.stacked else [weight.clone() for weight in weights],
        "biases": [normal(n).to(device, case.dtype) if j in biased else None for j, n in enumerate(widths)],
        "downs": [(normal(R, K) / K**0.5).to(device, factors) for _ in widths[: 1 if case.shared else 4]],
        "ups": [(normal(n, R) / R**0.5).to(device, factors) for n in widths],
        "hidden": put(normal(M, R)) if case.hidden else None,
    }
    rng = masks = None
    if case.drop != "no":
        rng = torch.tensor([[SEED + j, OFFSET + 7 * j] for j in range(len(widths))], device=device)
        masks = [keep_mask(pair, P, M, K if case.drop == "input" else R) for pair in rng]
    scales = [torch.tensor(0.7 - 0.4 * j, device=device) for j in range(len(widths))]
    return Problem(case, values, [put(normal(M, n)) for n in widths], scales, rng, masks)


def through_kernels(p, needs=None):
    """-> {"y": all y_j side by side, "dx", "down", "up": one above the other, "hidden"}, None where not needed."""
    t, dropout = p.tensors, KEEP_ALL if p.rng is None else Dropout(p.rng, P, p.case.drop)
    chosen = Projections([] if p.case.hidden else t["downs"], t["ups"], p.scales, t["hidden"])
    ys = kernels.lowrank_projections_fwd(t["x"], t["weights"], t["biases"], chosen, dropout)
    if not p.case.hidden:
        *ys, z = ys
        chosen = chosen._replace(z=z)
    assert len(ys) == len(p.case.widths)
    needs = ProjectionNeeds(*needs or (True, not p.case.hidden, True, p.case.hidden))
    chosen = chosen if needs.up else chosen._replace(z=None)
    x, weights = t["x"] if needs.down else None, t["weights"] if needs.x else []
    grads = kernels.lowrank_projections_bwd(p.dys, x, weights, chosen, dropout, needs)
    assert [grad is not None for grad in grads] == list(needs)
    return dict(zip(("y", "dx", "down", "up", "hidden"), (torch.cat(ys, 1), *grads)))


def through_reference(p, dtype):
    """The same by autograd of the definition, in `dtype`."""
    leaves = {name: each(t, lambda t: t.detach().clone().requires_grad_()) for name, t in p.tensors.items()}
    x, weights, biases, downs, ups, hidden = (each(t, lambda t: t.to(dtype)) for t in leaves.values())
    ys = lowrank_projections_reference(
        x, weights, biases, downs[0] if p.case.shared else downs, ups, scales=[s.to(dtype) for s in p.scales],
        hidden=hidden, masks=p.masks, dropout_p=P, dropout_on="input" if p.masks is None else p.case.drop,
    )  # fmt: skip
    torch.autograd.backward(ys, [dy.to(dtype) for dy in p.dys])
    results = {"y": torch.cat(ys, 1).detach(), "dx": leaves["x"].grad, "up": torch.cat([t.grad for t in leaves["ups"]])}
    if hidden is not None:
        return results | {"hidden": leaves["hidden"].grad}
    return results | {"down": torch.cat([t.grad for t in leaves["downs"]])}


def each(value, change):
    if isinstance(value, list):
        return [each(one, change) for one in value]
    return None if value is None else change(value)


def exact_of(p, change=lambda t: t):
    """The reference in float64, gradients included; of changed inputs if asked."""
    wide = {name: each(t, lambda t: change(t.double())) for name, t in p.tensors.items()}
    changed = replace(p, tensors=wide, dys=each(p.dys, change), scales=each(p.scales, change))
    return through_reference(changed, torch.float64)


def verify(case, device):
    p = problem(case, device)
    exact, absolute = exact_of(p), exact_of(p, torch.abs)
    compare(through_kernels(p), exact, through_reference(p, case.dtype), absolute, case.dtype)
