"""Problems for the CUDA kernels of the low-rank linear, their float64 definition, and the bound on the error that the
batched operation's tests use too."""

import random
from dataclasses import dataclass, replace

import torch

from peft_kernels.cuda_kernels import common, extension
from peft_kernels.cuda_kernels import lowrank_linear as kernels
from peft_kernels.ops.lowrank_linear import lowrank_linear_reference
from peft_kernels.records import KEEP_ALL, Dropout, Factors, Needs

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
SEED, OFFSET, P = 0x1234_5678_9ABC_DEF0, 0x0FED_CBA9_8765_4321, 0.3


@dataclass(frozen=True)
class Case:
    rows: int = 63
    out_cols: int = 96  # of one block
    in_cols: int = 63
    rank: int = 16
    blocks: tuple = (1, 1)
    core: str = "none"  # none | diag | dense
    drop: str = "no"  # no | input | rank | core
    dtype: torch.dtype = FLOAT
    factors: torch.dtype | None = None  # None: as dtype
    layout: str = "dense"  # dense | strided (16-byte accesses still possible) | unaligned
    bias: bool = True
    hidden: bool = False
    tensor_scale: bool = False
    strips: bool = True  # False: every pass is one strip of rows, so that its loop over tiles runs

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        words = [
            f"{self.rows}x{self.out_cols}x{self.in_cols}",
            f"r{self.rank}",
            "{}o{}i".format(*self.blocks),
            self.core,
            self.drop,
            dtype,
        ]
        flags = "factors", "layout", "bias", "hidden", "tensor_scale", "strips"
        return "-".join(words + [name for name in flags if getattr(self, name) != getattr(Case, name)])


def sampled(count):
    """A fixed random sample of the grid; its rare values have a reason each."""
    draw = random.Random(7).choice
    for _ in range(count):
        blocks = draw([(1, 1), (1, 1), (3, 1), (1, 4), (4, 1), (2, 2)])
        widths = (
            [16, 63, 96, 200] if blocks == (1, 1) else [16, 21, 63, 136]
        )  # 21, 63: blocks of x that begin between two draws
        drop = draw(["no", "input", "rank", "core"])
        yield Case(
            rows=draw([1, 5, 63, 130, 130]),  # 130: two full tiles and a rest
            out_cols=draw(widths),
            in_cols=draw(widths),
            rank=draw([1, 3, 8, 16, 16, 33, 48]) if random.Random(blocks[0]).random() else 16,
            blocks=blocks,
            core=draw(["diag", "dense"] if blocks != (1, 1) else ["none", "none", "diag", "dense"]),
            drop=drop,
            dtype=draw([FLOAT, BF16, HALF]),
            factors=draw([None, FLOAT]),
            layout=draw(["dense", "strided", "unaligned"]),
            bias=draw([True, False]),
            hidden=drop != "input" and draw([False, False, True]),
            tensor_scale=draw([True, False]),
            strips=draw([True, False]),
        )


CASES = [
    *sampled(90),
    *(
        Case(rank=96, core=core, dtype=dtype, drop="core", rows=70)
        for core in ("none", "dense")
        for dtype in (FLOAT, BF16)
    ),
    Case(rank=128, in_cols=200, out_cols=200, dtype=HALF, rows=65),
    Case(rank=128, dtype=BF16, factors=FLOAT, drop="input", rows=33, blocks=(2, 2), core="diag"),
]


@dataclass
class Problem:
    """Inputs in the case's dtypes, and what is needed to call either side."""

    case: Case
    tensors: dict  # x, weight, bias, down, up, core, hidden (some None), in the order of the reference
    dy: torch.Tensor
    scale: object
    rng: torch.Tensor | None
    mask: torch.Tensor | None


def laid_out(t, layout):
    """The same values with other strides, between large ones. (Not NaN: torch's own bfloat16 product on a CPU reads,
    and multiplies by zero, the element after a row of odd length.)"""
    if layout == "dense":
        return t.clone()
    extra, first = (24, 16) if layout == "strided" else (5, 3)
    buffer = torch.full((t.numel() + t.shape[0] * extra + 64,), 3e4, dtype=t.dtype, device=t.device)
    view = buffer[first:].as_strided(t.shape, (t.shape[1] + extra, 1), first)
    return view.copy_(t)


def keep_mask(rng, p, rows, columns, launch=common.launch):
    """The kernels' own mask, made by a launch that is none of an operation's."""
    keep = torch.empty(rows, columns, dtype=torch.uint8, device=rng.device)

    def mask(_, stream):
        extension().philox_mask(rng.data_ptr(), p, rows, columns, keep.data_ptr(), stream)

    launch(mask, None, keep)
    return keep.bool()


def problem(case, device):
    O, I = case.blocks
    M, R, N, K = case.rows, case.rank, O * case.out_cols, I * case.in_cols
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    core = {"none": None, "diag": normal(O, I, R), "dense": normal(O, I, R, R) / R**0.5}[case.core]
    values = {
        "x": normal(M, K),
        "weight": normal(N, K) / K**0.5,
        "bias": normal(N) if case.bias else None,
        "down": normal(R, case.in_cols) / case.in_cols**0.5,
        "up": normal(case.out_cols, R) / R**0.5,
        "core": core,
        "hidden": normal(M, I * R) if case.hidden else None,
    }
    factors = case.factors or case.dtype
    for name, value in values.items():
        if value is not None:
            value = value.to(device, factors if name in ("down", "up", "core") else case.dtype)
            values[name] = laid_out(value, case.layout) if name in ("x", "weight", "hidden") else value
    dy = laid_out(normal(M, N).to(device, case.dtype), case.layout)
    scale = torch.tensor(0.7, device=device) if case.tensor_scale else 0.7
    rng = mask = None
    if case.drop != "no":
        rng = torch.tensor([SEED, OFFSET], device=device)
        mask = keep_mask(rng, P, M, {"input": K, "rank": I * R, "core": O * R}[case.drop])
    return Problem(case, values, dy, scale, rng, mask)


def dropout_of(p):
    return KEEP_ALL if p.rng is None else Dropout(p.rng, P, p.case.drop)


def through_kernels(p, needs=None):
    """-> {"y", "dx", "down", "up", "core", "hidden"}, None where not needed."""
    t, dropout = p.tensors, dropout_of(p)
    hidden = t["hidden"] is not None
    factors = Factors(None if hidden else t["down"], t["up"], t["core"], p.scale, t["hidden"])
    y, z = kernels.lowrank_linear_fwd(t["x"], t["weight"], t["bias"], factors, dropout)
    assert (z is None) == hidden
    needs = Needs(*needs or (True, not hidden, True, t["core"] is not None, hidden))
    factors = factors if hidden else factors._replace(z=z)
    grads = kernels.lowrank_linear_bwd(p.dy, t["x"] if needs.down else None, t["weight"], factors, dropout, needs)
    assert [g is not None for g in grads] == list(needs)
    return dict(zip(("y", "dx", "down", "up", "core", "hidden"), (y, *grads)))


def through_reference(p, dtype):
    """The same by autograd of the definition, in `dtype`."""
    leaves = {
        n: None if t is None else t.detach().clone().requires_grad_(n not in ("weight", "bias"))
        for n, t in p.tensors.items()
    }
    inputs = {n: None if t is None else t.to(dtype) for n, t in leaves.items()}
    hidden = inputs.pop("hidden")
    scale = p.scale.to(dtype) if isinstance(p.scale, torch.Tensor) else p.scale
    if hidden is not None:
        leaves["down"] = None
    y = lowrank_linear_reference(
        **inputs,
        scale=scale,
        hidden=hidden,
        mask=p.mask,
        dropout_p=P,
        dropout_on=p.case.drop if p.mask is not None else "input",
    )
    y.backward(p.dy.to(dtype))
    return {
        "y": y.detach(),
        **{"dx" if n == "x" else n: t.grad for n, t in leaves.items() if t is not None and t.grad is not None},
    }


def exact_of(p, change=lambda t: t):
    """The reference in float64, gradients included; of changed inputs if asked."""
    wide = {n: None if t is None else change(t.double()) for n, t in p.tensors.items()}
    return through_reference(replace(p, tensors=wide, dy=change(p.dy)), torch.float64)


def verify(case, device):
    p = problem(case, device)
    exact, absolute = exact_of(p), exact_of(p, torch.abs)
    compare(through_kernels(p), exact, through_reference(p, case.dtype), absolute, case.dtype)


def compare(ours, exact, eager, absolute, dtype):
    """err(kernels) <= 1.25 err(torch, same dtype) + eps, in the root mean square and, more loosely, for every element.

    eps: a rounding of the result, and of a float32 sum of the absolute terms: the order of the sum is not torch's.
    Each argument is a dictionary of results by name; None: not asked for.
    """
    for name, value in ours.items():
        if value is None:
            continue
        assert value.dtype == eager[name].dtype and value.shape == exact[name].shape, name
        for measure, ratio, slack in ((rms, 1.25, 0.5), (largest, 2.5, 2.0)):
            error, allowed = measure(value - exact[name]), measure(eager[name] - exact[name])
            epsilon = torch.finfo(dtype).eps * measure(exact[name]) + torch.finfo(FLOAT).eps * measure(absolute[name])
            bound = ratio * allowed + slack * epsilon
            assert error <= bound, (
                f"{name}: {measure.__name__} error {error:.3g}, torch has {allowed:.3g}, bound {bound:.3g}"
            )


def rms(t):
    return t.double().square().mean().sqrt().item()


def largest(t):
    return t.double().abs().max().item()
