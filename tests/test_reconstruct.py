"""`reconstruct` and `reconstruct_stack` on every backend that runs here, against the definition in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_cases import INTERPRETED, ULP, error
from reconstruct_cases import Problem, assert_as_accurate_as_torch, expected, run

from peft_kernels import reconstruct, reconstruct_stack
from peft_kernels.ops import reconstruct as op
from peft_kernels.ops.reconstruct import reconstruct_reference
from peft_kernels.records import Factors
from peft_kernels.torch_kernels import reconstruct as torch_kernels

HALVES = (torch.bfloat16, torch.float16)
LAYOUTS = {  # the users in docs/method.md, sections 1 and 2
    "lora": Problem(),
    "lora-update": Problem(base=None),
    "aurora-paper": Problem(core="flat diagonal"),
    "aurora-released": Problem(core="flat dense"),
    "aurora-fused-qkv": Problem(core="diagonal", out_blocks=3),
    "aurora-fc1-released": Problem(core="dense", out_blocks=4, base=None),
    "aurora-fc2": Problem(core="diagonal", in_blocks=4),
    "aurora-fc2-released": Problem(core="dense", in_blocks=4),
    "grid": Problem(core="dense", out_blocks=2, in_blocks=2),
    "stack": Problem(core="diagonal", out_blocks=3, stack=True),
    "stack-on-one-base": Problem(core="dense", out_blocks=3, stack=True, base="shared"),
    "stack-update": Problem(core="dense", out_blocks=3, stack=True, base=None),
}


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_result_and_gradients(backend, layout, dtype, device):
    assert_as_accurate_as_torch(replace(LAYOUTS[layout], dtype=dtype), device, backend)


@pytest.mark.parametrize("slots", [1, 3, 36, 108])
@pytest.mark.parametrize("rank", [1, 32, 64, 96, 128])
def test_any_number_of_slots_and_ranks(backend, slots, rank, device):
    """Rectangular blocks of a width that no vector width divides; a diagonal and a dense core in turns."""
    slow = INTERPRETED and backend == "triton" and slots > 3
    slots = slots // 6 if slow else slots  # programs of one launch differ by their number alone
    core = "diagonal" if slow or rank in (1, 64, 128) else "dense"
    rows = 23 if slow else 63  # one tile
    assert_as_accurate_as_torch(Problem(rows, 40, rank, slots, core=core, stack=True), device, backend)


BASE, LARGE = (384, 512) if INTERPRETED else (768, 1024)  # more than one tile of every kind


@pytest.mark.parametrize(
    "problem",
    [
        Problem(BASE, BASE, 64, 1, core="diagonal", stack=True),
        Problem(BASE, BASE, 32, 1, core="dense", stack=True),
        Problem(LARGE, LARGE, 16),
        Problem(LARGE, 63, 96, 1, core="dense", stack=True),  # a tall one
        Problem(63, LARGE, 8, core="diagonal", in_blocks=2),  # a wide one
        Problem(16, 16, 16, 16, core="diagonal", stack=True),  # N = R: a transposed core would go unnoticed in shapes
        Problem(16, 16, 16, 16, core="dense", stack=True),
        Problem(1, 1, 1),
    ],
    ids=str,
)
def test_widths(backend, problem, device):
    assert_as_accurate_as_torch(problem, device, backend)


@pytest.mark.parametrize("core", ["diagonal", "dense"])
def test_all_projections_of_a_model(core, device):
    """36 matrices of 768², ViLT-B's, at Aurora's rank; interpreted on the torch backend, and half as wide."""
    backend, width = ("torch", 384) if INTERPRETED else ("triton", 768)
    assert_as_accurate_as_torch(Problem(width, width, 64, 36, core=core, stack=True, base="shared"), device, backend)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", ["lora", "aurora-fc2", "stack-on-one-base"])
def test_float32_factors_on_a_half_precision_base(backend, layout, dtype, device):
    """Masters stay float32, and so do their gradients."""
    assert_as_accurate_as_torch(replace(LAYOUTS[layout], dtype=dtype, factor_dtype=torch.float32), device, backend)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("strip", [2**24, 300])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_masters_get_float32_gradients_from_a_half_precision_one(backend, dtype, strip, size, device, monkeypatch):
    """As autograd of (base.float() + s · B core A).to(half) gives them: nothing overflows or vanishes on the way."""
    monkeypatch.setattr(op, "_STRIP", strip)
    problem = Problem(core="dense", out_blocks=3, in_blocks=2, dtype=dtype, factor_dtype=torch.float32)
    t = problem.tensors(device)
    w = reconstruct(t["down"], t["up"], t["core"], scale=problem.scale, base=t["base"], backend=backend)
    dw = (problem.gradient(w).float() * size).to(dtype)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in t.items()}
    reconstruct_reference(exact["down"], exact["up"], exact["core"], scale=problem.scale).backward(dw.double())
    for name, grad in zip(("down", "up", "core"), torch.autograd.grad(w, (t["down"], t["up"], t["core"]), dw)):
        assert error(grad, exact[name].grad) <= 1e-6, name


@pytest.mark.parametrize("core", ["diagonal", "dense"])
@pytest.mark.parametrize("stack", [False, True])
def test_float64_is_exact_and_matches_finite_differences(stack, core, device):
    blocks = {"out_blocks": 3} if stack else {"out_blocks": 2, "in_blocks": 2}
    problem = Problem(4, 5, 2, core=core, stack=stack, dtype=torch.float64, **blocks)
    function = reconstruct_stack if stack else reconstruct
    tensors = tuple(problem.tensors(device).values())
    assert torch.autograd.gradcheck(lambda *t: function(*t[:3], scale=0.7, base=t[3]), tensors)
    oracle = expected(problem, device)
    assert all(error(value, oracle[name]) < 1e-14 for name, value in run(problem, device, "torch").items())


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 140),
    rank=st.integers(1, 40),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    core=st.sampled_from([None, "diagonal", "dense"]),
    base=st.sampled_from([None, "full"]),
    backend=st.sampled_from(["torch", "triton"]),
)
@pytest.mark.kernels
def test_any_shape(rows, columns, rank, blocks, core, base, backend):
    out_blocks, in_blocks = blocks if core else (1, 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert_as_accurate_as_torch(Problem(rows, columns, rank, out_blocks, in_blocks, core, base), device, backend)


# ---- merging --------------------------------------------------------------------------------------------------------


def ulps_apart(a, b):
    """How many representable numbers lie between two half-precision tensors, by their ordered bit patterns."""
    a, b = (t.view(torch.int16).int() for t in (a, b))
    a, b = (torch.where(t < 0, -32768 - t, t) for t in (a, b))
    return (a - b).abs()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("core", [None, "flat diagonal", "flat dense"])
@pytest.mark.parametrize("factor_dtype", [None, torch.float32], ids=str)
def test_merging_rounds_once_and_correctly(dtype, core, factor_dtype, device):
    """99.9 % of elements are the correctly rounded sum, none is beyond its neighbour. (The interpreter truncates.)"""
    backend = "torch" if INTERPRETED else "triton"
    problem = Problem(300, 200, 16, core=core, dtype=dtype, factor_dtype=factor_dtype, scale=0.3)
    apart = ulps_apart(run(problem, device, backend)["w"], expected(problem, device)["w"].to(dtype))
    assert (apart == 0).float().mean() >= 0.999 and apart.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("batch", [1, 2 * 40 * 24, 2**26])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_in_batches(layout, batch, dtype, monkeypatch):
    """As a GPU does it: in one product, or few blocks at a time where memory is short."""
    monkeypatch.setattr(torch_kernels, "_BATCH", batch)
    problem = replace(LAYOUTS[layout], dtype=dtype)
    t = {name: tensor.detach() for name, tensor in problem.tensors("cpu").items()}
    core, base = t.get("core"), t.get("base")
    if core is not None:
        core = core[:, None] if problem.stack else core[None, None] if "flat" in problem.core else core
    base = base if base is None else base.flatten(0, -2)
    one = torch_kernels.reconstruct_fwd(Factors(t["down"], t["up"], core, problem.scale), base, dtype)
    batched = torch.full_like(one, torch.nan)
    torch_kernels._in_batches(batched, t["down"].float(), t["up"].float() * problem.scale, core, base)
    assert error(batched, one.double()) <= ULP[dtype] / 2


def test_merging_twice_rounded_would_be_noticed(device):
    """The test above can fail: an update rounded before it is added is off in more elements than that."""
    problem = Problem(300, 200, 16, dtype=torch.bfloat16, scale=0.3)
    down, up, base = (problem.tensors(device)[name].detach() for name in ("down", "up", "base"))
    twice = base + (problem.scale * (up.float() @ down.float())).to(torch.bfloat16)
    assert (ulps_apart(twice, expected(problem, device)["w"].to(torch.bfloat16)) == 0).float().mean() < 0.99


# ---- what users lean on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", ["down", "up", "core", "base"])
def test_one_gradient_at_a_time(backend, needed, device):
    problem = Problem(core="dense", out_blocks=3, in_blocks=2)
    everything = run(problem, device, backend)
    tensors = {name: t.detach().requires_grad_(name == needed) for name, t in problem.tensors(device).items()}
    w = reconstruct(
        tensors["down"], tensors["up"], tensors["core"], scale=problem.scale, base=tensors["base"], backend=backend
    )
    w.backward(problem.gradient(w))
    assert torch.equal(tensors[needed].grad, everything[needed])
    assert all(t.grad is None for name, t in tensors.items() if name != needed)


@pytest.mark.parametrize("layout", ["grid", "stack"])
def test_bits_repeat(backend, layout, device):
    first, again = (run(LAYOUTS[layout], device, backend) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_strides_and_tensor_scales(backend, device):
    """Transposed factors, a transposed base and a scale in memory give what contiguous ones and a number give."""
    t = {name: value.detach() for name, value in Problem(core="dense", out_blocks=2).tensors(device).items()}
    plain = reconstruct(t["down"], t["up"], t["core"], scale=0.5, base=t["base"], backend=backend)
    t = {name: value.transpose(-1, -2).contiguous().transpose(-1, -2) for name, value in t.items()}
    scale = torch.tensor(0.5, device=device)
    assert torch.equal(plain, reconstruct(t["down"], t["up"], t["core"], scale=scale, base=t["base"], backend=backend))


def test_an_expanded_gradient(backend, device):
    tensors = Problem(base=None).tensors(device)
    reconstruct(tensors["down"], tensors["up"], backend=backend).sum().backward()
    assert torch.allclose(tensors["up"].grad, tensors["down"].detach().sum(1).expand(40, -1), atol=1e-5)


def test_factors_of_two_types_give_float32(backend, device):
    down, up = torch.randn(3, 8, device=device), torch.randn(6, 3, device=device, dtype=torch.bfloat16)
    w = reconstruct(down, up, backend=backend)
    assert w.dtype == torch.float32 and torch.allclose(w, up.float() @ down, atol=1e-5)


@pytest.mark.kernels(run=False)
def test_an_empty_stack(backend, device):
    down, up = torch.randn(3, 8, device=device, requires_grad=True), torch.randn(6, 3, device=device)
    w = reconstruct_stack(down, up, torch.randn(0, 3, device=device), backend=backend)
    assert w.shape == (0, 6, 8)
    w.sum().backward()
    assert not down.grad.any()


def test_autocast_changes_nothing(backend, device):
    tensors = LAYOUTS["grid"].tensors(device)
    arguments = (tensors["down"], tensors["up"], tensors["core"])
    plain = reconstruct(*arguments, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        inside = reconstruct(*arguments, backend=backend)
        inside.sum().backward()
    assert torch.equal(plain, inside) and tensors["down"].grad.dtype == torch.float32


def test_second_derivatives_are_refused(device):
    tensors = Problem().tensors(device)
    w = reconstruct(tensors["down"], tensors["up"])
    with pytest.raises(RuntimeError, match="first derivatives"):
        torch.autograd.grad(w.sum(), tensors["down"], create_graph=True)


def test_no_temporary_of_the_stacks_size(device):
    """Between forward and backward only the factors are kept, and a float32 stack is written in place."""
    tensors = Problem(96, 96, 4, 12, core="diagonal", stack=True, base=None).tensors(device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        reconstruct_stack(tensors["down"], tensors["up"], tensors["core"], backend="torch")
    assert sum(kept) == sum(t.numel() for t in tensors.values())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_as_one_graph(backend, device):
    torch._dynamo.reset()
    compiled = torch.compile(reconstruct_stack, fullgraph=True, backend="aot_eager")
    problem = Problem(core="dense", out_blocks=3, stack=True)
    tensors = problem.tensors(device)
    arguments = (tensors["down"], tensors["up"], tensors["core"])
    w = compiled(*arguments, scale=torch.tensor(problem.scale, device=device), base=tensors["base"], backend=backend)
    w.backward(problem.gradient(w))
    eager = run(problem, device, backend)
    assert error(w, eager["w"].double()) < 1e-6
    assert all(error(t.grad, eager[name].double()) < 1e-6 for name, t in tensors.items())


@pytest.mark.kernels
def test_operator(device):
    tensors = [t.detach() for t in Problem(core="dense", out_blocks=2, in_blocks=3).tensors(device).values()]
    factors = Factors(*tensors[:3], scale=torch.tensor(2.0, device=device))
    arguments = (*factors, tensors[3], torch.float32, "triton")
    torch.library.opcheck(torch.ops.peft_kernels.reconstruct_fwd.default, arguments)


# ---- bad input ------------------------------------------------------------------------------------------------------

ONES = torch.ones
BAD = [
    ("down", {"down": [[1.0]]}, TypeError),
    ("down", {"down": ONES(2, 12, dtype=torch.int64)}, TypeError),
    ("down", {"down": ONES(2)}, ValueError),
    ("down", {"down": ONES(0, 12)}, ValueError),
    ("down", {"down": ONES(2, 12, 1)}, ValueError),
    ("down", {"down": ONES(2, 12, dtype=torch.bfloat16)}, TypeError),  # on a float32 base
    ("up", {"up": ONES(8, 3)}, ValueError),
    ("up", {"up": ONES(8, 2, 1)}, ValueError),
    ("up", {"up": ONES(8, 2, dtype=torch.float64)}, TypeError),
    ("up", {"up": ONES(8, 2, device="meta")}, ValueError),
    ("core", {"core": ONES(3)}, ValueError),
    ("core", {"core": ONES(2, 3)}, ValueError),
    ("core", {"core": ONES(1, 1, 2, dtype=torch.int32)}, TypeError),
    ("base", {"base": ONES(8, 11)}, ValueError),
    ("base", {"base": ONES(1, 8, 12)}, ValueError),
    ("base", {"core": ONES(2, 1, 2)}, ValueError),  # two output blocks
    ("base", {"base": "weight"}, TypeError),
    ("scale", {"scale": float("nan")}, ValueError),
    ("scale", {"scale": ONES(2)}, ValueError),
    ("backend", {"backend": "cublas"}, ValueError),
]


@pytest.mark.parametrize(("argument", "change", "kind"), BAD, ids=[f"{i}-{row[0]}" for i, row in enumerate(BAD)])
def test_reconstruct_names_the_argument(argument, change, kind):
    good = {"down": ONES(2, 12), "up": ONES(8, 2), "base": ONES(8, 12)}
    with pytest.raises(kind, match=rf"^{argument}\b"):
        reconstruct(**good | change)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("core", {"core": None}),
        ("core", {"core": ONES(3, 1, 2)}),
        ("core", {"core": ONES(3, 2, 1)}),
        ("core", {"core": ONES(2)}),
        ("base", {"base": ONES(4, 8, 12)}),
        ("base", {"base": ONES(24, 12)}),
        ("up", {"up": ONES(8, 3)}),
    ],
)
def test_reconstruct_stack_names_the_argument(argument, change):
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}\b"):
        reconstruct_stack(**{"down": ONES(2, 12), "up": ONES(8, 2), "core": ONES(3, 2)} | change)
