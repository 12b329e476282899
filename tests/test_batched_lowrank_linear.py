"""`batched_lowrank_linear` on every backend that runs here, against the definition in float64."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from batched_cases import NAMES, Problem, assert_as_accurate_as_torch, expected, rows_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_cases import error
from torch._dynamo.testing import CompileCounterWithBackend

from peft_kernels import adapter_segments, batched_lowrank_linear, lowrank_linear, stack_adapters
from peft_kernels.ops import batched_lowrank_linear as op
from peft_kernels.records import Factors
from peft_kernels.torch_kernels import batched_lowrank_linear as torch_kernels

HALVES = (torch.bfloat16, torch.float16)
MIXTURES = {
    "usual": Problem(),
    "one adapter": Problem(index=(0,) * 70, adapters=1),
    "nobody": Problem(index=(-1,) * 9),
    "one row": Problem(index=(2,)),
    "one row, no adapter": Problem(index=(-1,)),
    "exactly whole tiles": Problem(index=rows_of(64, 64, 128), adapters=2),
    "only the last": Problem(index=(3,) * 65),
    "more adapters than rows": Problem(index=(30, 2, 2, 31, 7), adapters=32),
    "128 adapters": Problem(index=rows_of(2, *[1, 0, 2, 0] * 32), adapters=128, inputs=16, outputs=8, rank=2),
    "many adapters": Problem(index=rows_of(*[0, 1, 2, 3] * 8), adapters=31, inputs=16, outputs=8, rank=2),
}


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixtures(backend, mixture, device):
    assert_as_accurate_as_torch(MIXTURES[mixture], device, backend)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("factor_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1.7, None])
def test_types_and_scales(backend, dtype, factor_dtype, scale, device):
    assert_as_accurate_as_torch(Problem(dtype=dtype, factor_dtype=factor_dtype, scale=scale), device, backend)


@pytest.mark.parametrize(
    "sizes",
    [
        {"inputs": 1, "outputs": 1, "rank": 1},  # everything is a tail
        {"inputs": 63, "outputs": 65, "rank": 3},  # no vector width divides them
        {"inputs": 760, "outputs": 16, "rank": 16},  # a ragged end of the long loop
        {"inputs": 16, "outputs": 1128, "rank": 33, "bias": False},  # many column tiles, rank over a power of two
        {"inputs": 24, "outputs": 40, "rank": 64},  # the largest rank of every kernel
    ],
    ids=lambda sizes: "x".join(map(str, sizes.values())),
)
def test_ugly_sizes(backend, sizes, device):
    assert_as_accurate_as_torch(Problem(**sizes), device, backend)


@settings(max_examples=25, deadline=None)
@given(
    index=st.lists(st.integers(-1, 4), min_size=1, max_size=90),
    adapters=st.integers(5, 7),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    rank=st.integers(1, 20),
    backend=st.sampled_from(["torch", "triton"]),
)
@pytest.mark.kernels
def test_any_pattern(index, adapters, inputs, outputs, rank, backend):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert_as_accurate_as_torch(Problem(tuple(index), adapters, inputs, outputs, rank), device, backend)


class Elsewhere(torch.Tensor):
    """As much of a tensor on a GPU as this backend looks at."""

    device = torch.device("cuda")


@pytest.mark.parametrize("mixture", ["usual", "one adapter", "nobody", "many adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_way_for_gpus_on_the_torch_backend(mixture, dtype, device):
    """Every row through every adapter, masked: what the torch backend does where reading counts would wait."""
    problem = replace(MIXTURES[mixture], dtype=dtype, scale=None)
    t = {name: tensor.detach() for name, tensor in problem.tensors(device).items()}
    segments = adapter_segments(torch.tensor(problem.index, device=device), problem.adapters)
    scale, dy = problem.scales(device), problem.gradient(device)
    x, weight, bias = t["x"].as_subclass(Elsewhere), t["weight"], t["bias"]
    y, z = torch_kernels.batched_lowrank_linear_fwd(
        x, weight, bias, Factors(t["down"], t["up"], None, scale, None), segments
    )
    factors = Factors(t["down"], t["up"], None, scale, z)
    needs = (True, True, True)
    grads = torch_kernels.batched_lowrank_linear_bwd(dy.as_subclass(Elsewhere), x, weight, factors, segments, needs)
    y, z, dx, d_down, d_up = (each.as_subclass(torch.Tensor) for each in (y, z, *grads))
    assert d_down.is_contiguous() and d_up.is_contiguous()  # as operators promise
    overflowing = t["x"] @ t["down"].index_fill(0, torch.tensor(0, device=device), torch.inf).flatten(0, 1).t()
    mine = torch.tensor(problem.index, device=device) != 0
    assert torch.equal(torch_kernels._own(overflowing, segments)[0][mine], z[mine])  # another adapter's is not ours
    grads = {"weight": dy.t() @ t["x"], "bias": dy.sum(0)}
    results = {"y": y, "x": dx, "down": d_down, "up": d_up} | grads
    assert_as_accurate_as_torch(problem, device, "torch", results)


# ---- against the operation that it batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 9), (2, 3, 6)])
@pytest.mark.parametrize("per_entry", [False, True])
def test_equals_a_loop_of_lowrank_linear(shape, per_entry, device):
    """In float64, with adapters of different ranks, padded; one index per row, or per leading entry."""
    generator = torch.Generator().manual_seed(5)

    def random(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(device).requires_grad_()

    x, weight, bias = random(*shape, 12), random(10, 12), random(10)
    factors = [(random(rank, 12), random(10, rank)) for rank in (1, 4, 2)]
    scales = torch.tensor([0.5, 2.0, 1.5], device=device)
    index = torch.randint(-1, 3, shape[:1] if per_entry else shape, generator=generator).to(device)
    y = batched_lowrank_linear(x, weight, bias, *stack_adapters(factors), index, scale=scales)
    loop = torch.nn.functional.linear(x, weight, bias)
    for adapter, (down, up) in enumerate(factors):
        rows = index == adapter
        own = lowrank_linear(x[rows], weight, bias, down, up, scale=scales[adapter])
        loop = loop.index_put((rows,), own)
    leaves = [x, weight, bias, *(factor for pair in factors for factor in pair)]
    dy = random(*y.shape).detach()
    assert torch.allclose(y, loop, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(loop, leaves, dy)):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_finite_differences(device):
    problem = Problem(rows_of(2, 3, 0, 1), 3, 4, 3, 2, dtype=torch.float64)
    index = torch.tensor(problem.index, device=device)
    assert torch.autograd.gradcheck(
        lambda *t: batched_lowrank_linear(*t, index, scale=0.7), tuple(problem.tensors(device).values())
    )


# ---- segments -------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.sampled_from([0, 0, 1, 5, 63, 64, 65, 130]), min_size=2, max_size=6), shuffled=st.booleans())
def test_segments_cover_every_row_once_in_its_own_adapters_tiles(counts, shuffled):
    index = torch.arange(-1, len(counts) - 1).repeat_interleave(torch.tensor(counts))
    index = index[torch.randperm(len(index))] if shuffled else index
    segments = adapter_segments(index, len(counts) - 1)
    order, offsets, tile_adapter, tile_first = segments
    assert offsets.diff().tolist() == counts[1:] and offsets[-1] == len(index)
    assert len(tile_adapter) == len(tile_first) == len(index) // op.SEGMENT_ROWS + len(counts)
    places = []
    for adapter, first in zip(tile_adapter.tolist(), tile_first.tolist()):
        end = min(first + op.SEGMENT_ROWS, offsets[adapter + 1].item())
        assert all(index[order[place]] == adapter for place in range(first, end))
        places += range(first, end)
    assert sorted(places) == list(range(len(index)))
    for first, end in pairwise([0, *offsets.tolist()]):
        assert torch.equal(order[first:end], order[first:end].sort().values)  # a stable sort keeps memory in order


def test_segments_are_shared_between_layers(backend, device):
    problem = Problem()
    index, t = torch.tensor(problem.index, device=device), problem.tensors(device)
    arguments = [t[name].detach() for name in NAMES]
    segments = adapter_segments(index, problem.adapters)
    once, each = (batched_lowrank_linear(*arguments, given, backend=backend) for given in (segments, index))
    assert torch.equal(once, each)
    assert torch.equal(once, batched_lowrank_linear(*arguments, index.int(), backend=backend))


def test_kernels_agree_on_a_tiles_rows():
    C = pytest.importorskip("peft_kernels._C")
    assert C.SEGMENT_ROWS == op.SEGMENT_ROWS


# ---- what users lean on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", NAMES)
def test_one_gradient_at_a_time(backend, needed, device):
    problem = Problem()
    everything = run(problem, device, backend)
    tensors = {name: t.detach().requires_grad_(name == needed) for name, t in problem.tensors(device).items()}
    index = torch.tensor(problem.index, device=device)
    y = batched_lowrank_linear(*tensors.values(), index, scale=problem.scale, backend=backend)
    y.backward(problem.gradient(device))
    assert torch.equal(tensors[needed].grad, everything[needed])
    assert all(t.grad is None for name, t in tensors.items() if name != needed)


def test_bits_repeat(backend, device):
    first, again = (run(Problem(index=rows_of(9, 300, 40), adapters=2), device, backend) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_an_adapters_result_does_not_depend_on_its_neighbours(backend, device):
    """Rows of one adapter give the same bits alone and in a mixture: what serving many tasks relies on."""
    problem = Problem()
    t, index = problem.tensors(device), torch.tensor(problem.index, device=device)
    x, weight, bias, down, up = (t[name].detach() for name in NAMES)
    mixed = batched_lowrank_linear(x, weight, bias, down, up, index, backend=backend)
    mine = torch.where(index == 2, 2, -1)
    alone = batched_lowrank_linear(x, weight, bias, down, up, mine, backend=backend)
    assert torch.equal(mixed[index == 2], alone[index == 2])


def test_rows_without_an_adapter_are_the_frozen_layers(device):
    problem = Problem()
    t, index = problem.tensors(device), torch.tensor(problem.index, device=device)
    x, weight, bias, down, up = (t[name].detach() for name in NAMES)
    y = batched_lowrank_linear(x, weight, bias, down.fill_(float("nan")), up, index, backend="torch")
    assert torch.equal(y[index < 0], torch.nn.functional.linear(x, weight, bias)[index < 0])
    assert y[index >= 0].isnan().all()


def test_what_overflows_in_one_adapters_rows_stays_there(backend):
    """On a CPU; torch's way for GPUs multiplies every row's gradient with every adapter, if by 0."""
    problem = Problem()
    tensors, index = problem.tensors("cpu"), torch.tensor(problem.index)
    dy = problem.gradient("cpu")
    dy[index == 2] = float("nan")
    batched_lowrank_linear(*tensors.values(), index, backend=backend).backward(dy)
    for name in ("down", "up"):
        assert [bool(t.isnan().any()) for t in tensors[name].grad] == [i == 2 for i in range(problem.adapters)]
    assert torch.equal(tensors["x"].grad.isnan().any(1), index == 2)


def test_strided_input(backend, device):
    problem = Problem()
    t, index = problem.tensors(device), torch.tensor(problem.index, device=device)
    x, weight, bias, down, up = (t[name].detach() for name in NAMES)
    wide = torch.full((x.shape[0], 64), float("nan"), device=device)
    for first in (3, 8):
        view = wide[:, first : first + x.shape[1]].copy_(x)
        same = batched_lowrank_linear(view, weight, bias, down, up, index, backend=backend)
        assert error(same, batched_lowrank_linear(x, weight, bias, down, up, index, backend=backend).double()) < 1e-6


def test_one_row_without_a_leading_dimension(backend, device):
    problem = Problem(index=(2,))
    t = problem.tensors(device)
    x, weight, bias, down, up = (t[name].detach() for name in NAMES)
    y = batched_lowrank_linear(x[0], weight, bias, down, up, torch.tensor(2, device=device), backend=backend)
    assert torch.equal(
        y, batched_lowrank_linear(x, weight, bias, down, up, torch.tensor([2], device=device), backend=backend)[0]
    )


def test_compiled_float64_keeps_its_scale(device):
    problem = Problem(dtype=torch.float64, scale=0.1)
    t, index = problem.tensors(device), torch.tensor(problem.index, device=device)
    torch._dynamo.reset()
    y = torch.compile(batched_lowrank_linear, backend="aot_eager")(*t.values(), index, scale=0.1)
    assert error(y, expected(problem, device)["y"]) < 1e-14


@pytest.mark.kernels(run=False)
def test_no_rows(backend, device):
    problem = Problem(index=())
    results = run(problem, device, backend)
    assert results["y"].shape == (0, problem.outputs) and not results["down"].any() and not results["up"].any()


@pytest.mark.kernels(run=False)
def test_an_index_out_of_range_touches_nothing_where_it_is_not_checked(backend, device, monkeypatch):
    """On a GPU, and in compiled graphs, it counts as none; here the check is passed over."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    segments = adapter_segments(torch.tensor([9, 0, -7, 1], device=device), 2)
    monkeypatch.undo()
    assert torch.equal(segments.offsets, torch.tensor([2, 3, 4], device=device))


def test_autocast(backend, device):
    problem = Problem()
    t, index = problem.tensors(device), torch.tensor(problem.index, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = batched_lowrank_linear(*t.values(), index, backend=backend)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and all(tensor.grad.dtype == torch.float32 for tensor in t.values())
    exact = expected(replace(problem, scale=1.0), device)
    assert error(y, exact["y"]) < 0.02


class Quantized:
    """Stands for a quantised weight."""

    def __init__(self, weight):
        self.weight, self.shape = weight, weight.shape

    def dequantize(self, dtype):
        return self.weight.to(dtype)


def test_quantised_weight(device):
    problem = Problem()
    t, index = problem.tensors(device), torch.tensor(problem.index, device=device)
    y = batched_lowrank_linear(
        t["x"], Quantized(t["weight"].detach()), t["bias"], t["down"], t["up"], index, scale=problem.scale
    )
    y.backward(problem.gradient(device))
    ours = run(problem, device, "torch")
    assert torch.equal(y, ours["y"]) and torch.equal(t["x"].grad, ours["x"]) and t["weight"].grad is None


def test_second_derivatives_are_refused(device):
    problem = Problem()
    t, index = problem.tensors(device), torch.tensor(problem.index, device=device)
    with pytest.raises(RuntimeError, match="first derivatives"):
        torch.autograd.grad(batched_lowrank_linear(*t.values(), index).sum(), t["down"], create_graph=True)


def test_compiles_as_one_graph_for_any_number_of_rows_and_any_index(backend, device):
    torch._dynamo.reset()
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(batched_lowrank_linear, fullgraph=True, backend=counted)
    for rows in (40, 70, 90):
        problem = Problem(index=rows_of(3, rows - 10, 0, 7))
        t, index = problem.tensors(device), torch.tensor(problem.index, device=device)
        scale = torch.full((4,), 1.7, device=device)
        y = compiled(*t.values(), index, scale=scale, backend=backend)
        y.backward(problem.gradient(device))
        eager = run(problem, device, backend)
        assert error(y, eager["y"].double()) < 1e-6
        assert all(error(tensor.grad, eager[name].double()) < 1e-6 for name, tensor in t.items())
    assert counted.frame_count == 2  # the second number of rows made it dynamic


def test_operators(backend, device):
    problem = Problem()
    t = [tensor.detach() for tensor in problem.tensors(device).values()]
    segments = adapter_segments(torch.tensor(problem.index, device=device), problem.adapters)
    scale, dy = torch.ones(4, device=device), problem.gradient(device)
    z = torch.randn(len(problem.index), problem.rank, device=device)
    ops, factors = torch.ops.peft_kernels, Factors(*t[3:], scale=scale)
    checks = ("test_schema", "test_faketensor")
    # rows of z without an adapter stay as they were allocated, and opcheck compares them: give every row one
    whole = adapter_segments(torch.tensor(problem.index, device=device).clamp_min(0), problem.adapters)
    arguments = (*t[:3], *factors, *whole, backend)
    torch.library.opcheck(ops.batched_lowrank_linear_fwd.default, arguments, test_utils=checks)
    arguments = (dy, *t[:2], *factors._replace(z=z), *segments, [True, True, True], backend)
    torch.library.opcheck(ops.batched_lowrank_linear_bwd.default, arguments, test_utils=checks)
