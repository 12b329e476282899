"""`lowrank_projections` on every backend that runs here, against the definition in float64."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowrank_cases import error
from projections_cases import LAYOUTS, Problem, arguments, assert_as_accurate_as_torch, call, expected, masks_of, run
from test_lowrank_linear import saved_storages

import peft_kernels
from peft_kernels import BackendUnavailableError, lowrank_linear, lowrank_projections
from peft_kernels.benchmarks.timing import peak_bytes
from peft_kernels.ops import lowrank_projections as op
from peft_kernels.records import MOST_PROJECTIONS

BACKENDS = ("torch", "triton")
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
HALVES = (torch.bfloat16, torch.float16)
PLACES = ("input", "rank")


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradients(backend, layout, dtype, device):
    assert_as_accurate_as_torch(Problem(**LAYOUTS[layout], dtype=dtype), device, backend)


@on_every_backend
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", ["lora", "aurora", "four"])
def test_dropout(backend, layout, place, device):
    """Against masks of `lowrank_linear` for the same seeds: each projection has one of its own."""
    problem = Problem(**LAYOUTS[layout], dropout_p=0.3, dropout_on=place)
    masks = masks_of(problem, device, backend)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == problem.count
    assert_as_accurate_as_torch(problem, device, backend)


SIZES = [
    {"rows": 1, "inputs": 1, "outputs": (1, 1), "rank": 1},  # everything is a tail
    {"rows": 63, "inputs": 63, "outputs": (65, 1, 63), "rank": 3},  # no vector width divides them
    {"rows": 33, "inputs": 760, "outputs": (16, 8), "rank": 16},  # a K loop with a ragged end
    {"rows": 16, "inputs": 16, "outputs": (8, 1128, 300), "rank": 33},  # many column tiles, rank over a power of two
    {"rows": 300, "inputs": 16, "outputs": (24, 8), "rank": 64},  # several strips, the largest kernel rank
]


@on_every_backend
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes.values())))
@pytest.mark.parametrize("place", [None, "input"])
def test_ugly_sizes(backend, sizes, place, device):
    dropout = {} if place is None else {"dropout_p": 0.5, "dropout_on": place, "shared": True}
    assert_as_accurate_as_torch(Problem(**sizes, **dropout), device, backend)


@on_every_backend
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float32_factors_under_half_precision(backend, dtype, device):
    """Masters stay float32 and so do their gradients. down_bwd makes dz itself here, through either mask."""
    for place in PLACES:
        problem = Problem(dtype=dtype, factor_dtype=torch.float32, core="diagonal", dropout_p=0.3, dropout_on=place)
        assert_as_accurate_as_torch(problem, device, backend)


def test_float64_is_exact_and_matches_finite_differences(device):
    problem = Problem(rows=3, inputs=4, outputs=(3, 2), rank=2, core="dense", dtype=torch.float64)
    tensors = problem.tensors(device)

    def forward(*values):
        return call(problem, dict(zip(tensors, values)), "torch")

    assert torch.autograd.gradcheck(forward, tuple(tensors.values()))
    oracle = expected(problem, device, None)
    assert all(error(value, oracle[name]) < 1e-14 for name, value in run(problem, device, "torch").items())


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 70),
    inputs=st.integers(1, 50),
    outputs=st.lists(st.integers(1, 50), min_size=1, max_size=4).map(tuple),
    rank=st.integers(1, 20),
    shared=st.booleans(),
    stacked=st.booleans(),
    core=st.sampled_from([None, "diagonal", "dense"]),
    place=st.sampled_from([None, *PLACES]),
    backend=st.sampled_from(BACKENDS),
)
@pytest.mark.kernels
def test_any_shape(backend, place, **sizes):
    dropout = {} if place is None else {"dropout_p": 0.25, "dropout_on": place}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert_as_accurate_as_torch(Problem(**sizes, **dropout), device, backend, conditioned=True)


@on_every_backend
@pytest.mark.parametrize("used", [(0,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("sizes", [{}, {"shared": True, "dropout_on": "rank"}], ids=["lora", "aurora"])
def test_outputs_that_nothing_used(backend, used, sizes, device):
    """Theirs are no gradients, and the others keep their masks."""
    assert_as_accurate_as_torch(Problem(**{"dropout_p": 0.3} | sizes), device, backend, used=used)


@on_every_backend
@pytest.mark.parametrize("needed", ["x", "weight1", "bias2", "down0", "up2", "core1"])
def test_one_gradient_at_a_time(backend, needed, device):
    """Whatever the others need, a gradient comes out the same; what is not needed is not computed."""
    problem = Problem(core="dense", dropout_p=0.2, dropout_on="rank")
    everything, tensors = run(problem, device, backend), problem.tensors(device)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == needed)
    ys = call(problem, tensors, backend)
    torch.autograd.backward(ys, problem.gradients(device))
    for name, tensor in tensors.items():
        if name == needed:
            torch.testing.assert_close(tensor.grad, everything[name], rtol=1e-6, atol=1e-6)
        else:
            assert tensor.grad is None


@on_every_backend
@pytest.mark.parametrize("place", PLACES)
def test_results_repeat_bit_for_bit(backend, place, device):
    problem = Problem(rows=150, dropout_p=0.2, dropout_on=place, dtype=torch.float16)
    first, second = (run(problem, device, backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["y2"], run(problem, device, backend, seed=8)["y2"])


@on_every_backend
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_stacked_weights_give_the_same_bits(backend, shared, dtype, device):
    """The outputs are columns of one memory. The frozen weights' product is one, and may round otherwise: it is 0."""
    apart, together = (Problem(shared=shared, dtype=dtype, stacked=stacked, dropout_p=0.3) for stacked in (False, True))
    results = []
    for problem in (apart, together):
        tensors = problem.tensors(device)
        with torch.no_grad():
            for j in range(problem.count):
                tensors[f"weight{j}"].zero_()
        ys = call(problem, tensors, backend)
        torch.autograd.backward(ys, problem.gradients(device))
        results.append((*ys, *[t.grad for t in tensors.values()]))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert len({y.untyped_storage().data_ptr() for y in results[1][:3]}) == 1
    assert len({y.untyped_storage().data_ptr() for y in results[0][:3]}) == 3
    assert [y.stride() for y in results[1][:3]] == [(80, 1)] * 3
    results[1][0].add_(1)  # a module behind may write into its input
    assert torch.equal(results[1][1], results[0][1])


@on_every_backend
def test_as_lowrank_linear_one_by_one(backend, device):
    problem = Problem(core="diagonal")
    tensors = problem.tensors(device)
    x, *each = arguments(problem, tensors)
    for j, y in enumerate(call(problem, tensors, backend)):
        alone = lowrank_linear(x, *[argument[j] for argument in each], scale=problem.scales[j], backend=backend)
        torch.testing.assert_close(y, alone, rtol=1e-5, atol=1e-5)


@on_every_backend
@pytest.mark.parametrize("shape", [(2, 3, 24), (24,)])
def test_leading_dimensions_and_strides(backend, shape, device):
    problem = Problem()
    tensors = problem.tensors(device)
    x = torch.randn(*shape[:-1], 48, device=device)[..., ::2]  # no unit stride anywhere
    ys = call(problem, tensors | {"x": x}, backend)
    assert [y.shape for y in ys] == [(*shape[:-1], width) for width in problem.outputs]
    torch.testing.assert_close(ys, call(problem, tensors | {"x": x.contiguous()}, backend))
    rows = torch.randn(6, 50, device=device)[:, 3:27].requires_grad_()  # rows a stride apart, an unaligned start
    ys = call(problem, tensors | {"x": rows}, backend)
    ys[0].sum().backward(retain_graph=True)  # an expanded gradient of stride 0
    dys = [torch.randn(6, 2 * y.shape[1], device=device)[:, : y.shape[1]] for y in ys]  # rows a stride apart
    torch.autograd.backward(ys, dys)
    reference = rows.detach().requires_grad_()
    theirs = op.lowrank_projections_reference(*arguments(problem, tensors | {"x": reference}), scales=problem.scales)
    torch.testing.assert_close(ys, theirs, rtol=1e-5, atol=1e-5)
    theirs[0].sum().backward(retain_graph=True)
    torch.autograd.backward(theirs, dys)
    torch.testing.assert_close(rows.grad, reference.grad, rtol=1e-5, atol=1e-5)


@on_every_backend
def test_strided_factors_and_scales_as_tensors(backend, device):
    problem = Problem()
    tensors = {name: t.detach() for name, t in problem.tensors(device).items()}
    wanted = call(problem, tensors, backend)
    strided = {n: t if n == "x" else torch.stack([t] * 2, -1)[..., 0] for n, t in tensors.items()}
    torch.testing.assert_close(call(problem, strided, backend), wanted, rtol=1e-6, atol=1e-6)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        scales = [torch.tensor(0.375, device=device, dtype=dtype), 0.375, torch.tensor(0.375, device=device)]
        ys = lowrank_projections(*arguments(problem, tensors), scales=scales, backend=backend)
        numbers = lowrank_projections(*arguments(problem, tensors), scales=0.375, backend=backend)
        assert all(map(torch.equal, ys, numbers))


@on_every_backend
def test_empty_batch(backend, device):
    problem = Problem()
    tensors = problem.tensors(device) | {"x": torch.empty(2, 0, 24, device=device, requires_grad=True)}
    ys = call(problem, tensors, backend)
    assert [y.shape for y in ys] == [(2, 0, width) for width in problem.outputs]
    sum(y.sum() for y in ys).backward()
    assert tensors["x"].grad.shape == (2, 0, 24)
    assert all((t.grad == 0).all() for name, t in tensors.items() if name != "x")


@on_every_backend
def test_nan_in_means_nan_out(backend, device):
    """In its row of every output; a bias of NaN, in its own projection alone."""
    problem = Problem()
    tensors = {name: t.detach() for name, t in problem.tensors(device).items()}
    tensors["x"][3, 5] = float("nan")
    tensors["bias2"][4] = float("nan")
    first, second, third = call(problem, tensors, backend)
    for y in (first, second):
        assert y[3].isnan().all() and not y[:3].isnan().any() and not y[4:].isnan().any()
    assert third[3].isnan().all() and third[:, 4].isnan().all() and third.isnan().sum() == 24 + 36


@on_every_backend
def test_autocast(backend, device):
    """x, weights and biases are cast as linear casts them; float32 factors get float32 gradients."""
    problem = Problem(core="diagonal")
    tensors = problem.tensors(device)
    with torch.autocast(device, torch.bfloat16):
        ys = call(problem, tensors, backend)
    assert {y.dtype for y in ys} == {torch.bfloat16}
    torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    assert all(t.grad.dtype == torch.float32 for t in tensors.values())
    oracle = expected(problem, device, None)
    assert all(error(y.detach(), oracle[f"y{j}"]) < 1e-2 for j, y in enumerate(ys))


@on_every_backend
@pytest.mark.parametrize("outer", HALVES)
def test_backward_inside_another_autocast(backend, outer, device):
    """What was computed without autocast is differentiated without it, wherever backward is called."""
    problem = Problem(core="diagonal", dropout_p=0.2, dropout_on="rank")
    plain, inside = run(problem, device, backend), problem.tensors(device)
    with torch.autocast(device, outer):
        with torch.autocast(device, enabled=False):
            ys = call(problem, inside, backend)
        torch.autograd.backward(ys, problem.gradients(device))
    assert all(torch.equal(plain[name], t.grad) for name, t in inside.items())


@on_every_backend
def test_second_derivatives_are_refused(backend, device):
    tensors = Problem().tensors(device)
    ys = call(Problem(), tensors, backend)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(ys[1].sum(), tensors["x"], create_graph=True)


@pytest.mark.kernels(run=False)
def test_kernels_take_four_projections(device):
    """As many as they have arguments for."""
    for count in (MOST_PROJECTIONS, MOST_PROJECTIONS + 1):
        x, weights = torch.ones(2, 8, device=device), [torch.ones(4, 8, device=device)] * count
        downs, ups = [torch.ones(2, 8, device=device)] * count, [torch.ones(4, 2, device=device)] * count
        args = x, weights, [None] * count, downs, ups
        assert len(lowrank_projections(*args, backend="torch")) == count
        if count > MOST_PROJECTIONS:
            with pytest.raises(BackendUnavailableError, match="take up to 4 projections, not 5"):
                lowrank_projections(*args, backend="triton")
        else:
            assert len(lowrank_projections(*args, backend="triton")) == count


@on_every_backend
@pytest.mark.parametrize("shared", [False, True])
def test_saved_for_backward(backend, shared, device):
    """x once, z of all projections, and 16 bytes of seed for each (torch: a 1-byte mask for each)."""
    rows, width, rank, count = 64, 96, 4, 3
    x = torch.randn(rows, width, device=device, requires_grad=True)
    parameter = lambda *shape: torch.nn.Parameter(torch.randn(shape, device=device))  # noqa: E731
    weights = [parameter(width, width).requires_grad_(False) for _ in range(count)]
    downs = parameter(rank, width) if shared else [parameter(rank, width) for _ in range(count)]
    ups, scales = [parameter(width, rank) for _ in range(count)], [parameter().requires_grad_(False)] * count
    for place in PLACES:
        options = {"scales": scales, "dropout_p": 0.1, "dropout_on": place, "backend": backend}
        saved = saved_storages(lambda: lowrank_projections(x, weights, [None] * count, downs, ups, **options))  # noqa: B023
        assert saved.pop(x.untyped_storage().data_ptr()) == 4 * rows * width
        z_bytes = 4 * rows * rank * (1 if shared and place == "rank" else count)
        columns = width if place == "input" else rank
        assert sorted(saved.values()) == sorted([z_bytes, count * (rows * columns if backend == "torch" else 16)])


@pytest.mark.parametrize("stacked", [False, True])
def test_memory_of_a_forward_in_torch(stacked):
    """The outputs, all z, the parts of which it is made and one of them scaled; and the masks, but no dropped x."""
    problem = Problem(rows=256, inputs=64, outputs=(128, 128, 64), dtype=torch.float32, stacked=stacked)
    outputs, z = (4 * problem.rows * columns for columns in (sum(problem.outputs), problem.count * problem.rank))
    for p, more in ((0.0, 0), (0.1, problem.count * problem.rows * problem.inputs)):
        each = replace(problem, dropout_p=p)
        _, peak = peak_bytes(partial(call, each, each.tensors("cpu"), "torch"), torch.device("cpu"))
        assert outputs + z + more <= peak < outputs + 3 * z + more, (p, peak)


@pytest.mark.parametrize(("p", "count"), [(0.0, 1), (0.1, 3)])
def test_memory_of_a_backward_in_torch(p, count):
    """dx; with masks also one dropped x, whose memory dz A takes, and one mask's numbers, whatever the projections."""
    problem = Problem(rows=256, inputs=256, outputs=(32, 32, 32), dropout_p=p)
    tensors, x_bytes = problem.tensors("cpu"), 4 * 256 * 256
    ys = call(problem, tensors, "torch")
    needed = [t for name, t in tensors.items() if not name.startswith(("weight", "bias"))]
    step = partial(torch.autograd.grad, ys, needed, problem.gradients("cpu"))
    _, peak = peak_bytes(step, torch.device("cpu"))
    assert count * x_bytes <= peak < (count + 0.5) * x_bytes, peak / x_bytes


# ---- the Triton kernels ----------------------------------------------------------------------------------------------


def launched(problem: Problem, device: str) -> tuple[list[str], list[str]]:
    from peft_kernels.triton_kernels.common import record_launches

    tensors = problem.tensors(device)
    with record_launches() as forward:
        ys = call(problem, tensors, "triton")
    with record_launches() as backward:
        torch.autograd.backward(ys, problem.gradients(device))
    return [launch.kernel.__name__ for launch in forward], [launch.kernel.__name__ for launch in backward]


@pytest.mark.kernels
def test_launches(device):
    """Two and three or four for all projections; one by one there would be six and nine."""
    for sizes in ({"dropout_p": 0.1}, {"dropout_p": 0.1, "dropout_on": "rank"}, {"shared": True}, {"stacked": True}):
        forward, backward = launched(Problem(rows=16, rank=16, dtype=torch.float16, **sizes), device)
        assert forward == ["shrink_kernel", "expand_kernel"]
        assert backward == ["up_bwd_kernel", "down_bwd_kernel", "_sum_kernel"]
    forward, backward = launched(Problem(rows=16, rank=16), device)  # in float32 hidden_bwd makes dz
    assert forward == ["shrink_kernel", "expand_kernel"]
    assert backward == ["up_bwd_kernel", "hidden_bwd_kernel", "down_bwd_kernel", "_sum_kernel"]


@pytest.mark.kernels
@pytest.mark.parametrize("place", [None, *PLACES])
@pytest.mark.parametrize("shared", [False, True])
def test_strips_chunks_and_passes(shared, place, monkeypatch, device):
    """As at full size: several tiles in a strip, several chunks of each dy_j, dz made early or late, x read twice."""
    from peft_kernels.triton_kernels import lowrank_linear_bwd
    from peft_kernels.triton_kernels import lowrank_projections as launchers

    choose = launchers.projections_config

    def small(*args):
        config = choose(*args)
        tile = replace(config.up_bwd, rows=16, columns=16)
        return replace(config, shrink_at_once=1, up_bwd=tile, down_bwd=replace(tile, columns=32), shrink=tile)

    monkeypatch.setattr(lowrank_linear_bwd, "strip_tiles", lambda *sizes: 2)
    monkeypatch.setattr(launchers, "projections_config", small)
    monkeypatch.setattr(op, "_plans", {})  # which may hold launches with the usual tiles
    dropout = {} if place is None else {"dropout_p": 0.2, "dropout_on": place}
    problem = Problem(rows=40, inputs=40, outputs=(24, 8), shared=shared, dtype=torch.float16, **dropout)
    for late in (False, True):
        monkeypatch.setattr(launchers, "down_bwd_makes_dz", lambda *sizes: late)  # noqa: B023
        op._plans.clear()
        assert ("hidden_bwd_kernel" in launched(problem, device)[1]) != late
        assert_as_accurate_as_torch(problem, device, "triton")


def test_public_names():
    assert "lowrank_projections" in peft_kernels.__all__
