"""`lowrank_linear` and `lowrank_hidden` on every backend that runs here, against the definition in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowrank_cases import LAYOUTS, Problem, assert_as_accurate_as_torch, error, expected, run, skip_unless_runnable

import peft_kernels
from peft_kernels import lowrank_hidden, lowrank_linear
from peft_kernels.ops import lowrank_linear as op

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_and_gradients(backend_design, layout, dtype, device):
    problem = Problem(**LAYOUTS[layout], dtype=dtype)
    skip_unless_runnable(problem, backend_design[1])
    assert_as_accurate_as_torch(problem, device, *backend_design)


@pytest.mark.parametrize("layout", ["lora", "aurora-fc2", "aurora-fused-qkv-released"])
@pytest.mark.parametrize("place", [None, "rank", "core"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_precomputed_hidden(backend, layout, place, device):
    """`down` and x get their low-rank gradients through `lowrank_hidden`."""
    dropout = {} if place is None else {"dropout_p": 0.3, "dropout_on": place}
    problem = Problem(**LAYOUTS[layout], **dropout, precomputed_hidden=True)
    assert_as_accurate_as_torch(problem, device, backend)


@pytest.mark.parametrize(
    "sizes",
    [
        {"rows": 1, "columns_in": 1, "columns_out": 1, "rank": 1},  # everything is a tail
        {"rows": 63, "columns_in": 63, "columns_out": 65, "rank": 3},  # no vector width divides them
        {"rows": 33, "columns_in": 760, "columns_out": 16, "rank": 16},  # a K loop with a ragged end
        {"rows": 16, "columns_in": 16, "columns_out": 1128, "rank": 33},  # many column tiles, rank over a power of two
        {"rows": 300, "columns_in": 16, "columns_out": 8, "rank": 64},  # several strips, the largest kernel rank
    ],
    ids=lambda sizes: "x".join(map(str, sizes.values())),
)
@pytest.mark.parametrize("place", [None, "input"])
def test_ugly_sizes(backend_design, sizes, place, device):
    problem = Problem(**sizes) if place is None else Problem(**sizes, dropout_p=0.5, dropout_on=place)
    skip_unless_runnable(problem, backend_design[1])
    assert_as_accurate_as_torch(problem, device, *backend_design)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float32_factors_under_half_precision(backend_design, dtype, device):
    """Masters stay float32 and so do their gradients."""
    assert_as_accurate_as_torch(
        Problem(core="flat dense", dtype=dtype, factor_dtype=torch.float32), device, *backend_design
    )


def test_float64_is_exact_and_matches_finite_differences(device):
    problem = Problem(rows=3, columns_in=4, columns_out=3, rank=2, core="dense", out_blocks=2, in_blocks=2)
    problem = replace(problem, dtype=torch.float64)
    tensors = problem.tensors(device)

    def forward(x, weight, bias, down, up, core):
        return lowrank_linear(x, weight, bias, down, up, core, scale=0.7)

    assert torch.autograd.gradcheck(forward, tuple(tensors.values()))
    oracle = expected(problem, device, None)
    assert all(error(value, oracle[name]) < 1e-14 for name, value in run(problem, device, "torch").items())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 70),
    columns_in=st.integers(1, 50),
    columns_out=st.integers(1, 50),
    rank=st.integers(1, 20),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    core=st.sampled_from([None, "diagonal", "dense"]),
    place=st.sampled_from([None, "input", "rank", "core"]),
    backend=st.sampled_from(["torch", "triton"]),
)
@pytest.mark.kernels
def test_any_shape(rows, columns_in, columns_out, rank, blocks, core, place, backend):
    out_blocks, in_blocks = blocks if core else (1, 1)
    dropout = {} if place is None else {"dropout_p": 0.25, "dropout_on": place}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = Problem(rows, columns_in, columns_out, rank, out_blocks, in_blocks, core, **dropout)
    assert_as_accurate_as_torch(problem, device, backend, conditioned=True)


@pytest.mark.parametrize("needed", ["x", "weight", "bias", "down", "up", "core"])
def test_one_gradient_at_a_time(backend_design, needed, device):
    """Whatever the others need, a gradient comes out the same; what is not needed is not computed."""
    problem = Problem(core="dense", out_blocks=3, dropout_p=0.2, dropout_on="core")
    backend, design = backend_design
    everything = run(problem, device, backend, design=design)
    tensors = problem.tensors(device)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == needed)
    torch.manual_seed(7)
    y = lowrank_linear(**tensors, scale=problem.scale, dropout_p=0.2, dropout_on="core", backend=backend, design=design)
    y.backward(problem.gradient(device))
    for name, tensor in tensors.items():
        if name == needed:
            torch.testing.assert_close(tensor.grad, everything[name], rtol=1e-6, atol=1e-6)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("blocks", [{}, {"core": "dense", "out_blocks": 2, "in_blocks": 2}])
def test_the_reference_takes_leading_dimensions(blocks):
    tensors = {name: t.double() for name, t in Problem(**blocks).tensors("cpu").items()}
    x = tensors.pop("x")[:6]
    batched, by_rows = (op.lowrank_linear_reference(each, **tensors) for each in (x.view(2, 3, -1), x))
    torch.testing.assert_close(batched.view(6, -1), by_rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (1, 2, 3, 24), (24,)])
def test_leading_dimensions_and_strides(backend_design, shape, device):
    problem = Problem()
    backend, design = backend_design
    tensors = problem.tensors(device)
    del tensors["x"]
    x = torch.randn(*shape[:-1], 48, device=device)[..., ::2]  # no unit stride anywhere
    options = {"backend": backend, "design": design}
    y = lowrank_linear(x, **tensors, **options)
    assert y.shape == (*shape[:-1], 40)
    torch.testing.assert_close(y, lowrank_linear(x.contiguous(), **tensors, **options))
    rows = torch.randn(6, 50, device=device)[:, 3:27]  # rows a stride apart, an unaligned start
    torch.testing.assert_close(
        lowrank_linear(rows, **tensors, **options), op.lowrank_linear_reference(rows, **tensors), rtol=1e-5, atol=1e-5
    )
    transposed = torch.randn(24, 6, device=device).t().requires_grad_()
    lowrank_linear(transposed, **tensors, **options).sum().backward()  # an expanded gradient of stride 0
    reference = transposed.detach().requires_grad_()
    op.lowrank_linear_reference(reference, **tensors).sum().backward()
    torch.testing.assert_close(transposed.grad, reference.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.kernels(run=False)
@pytest.mark.parametrize("given", [False, True], ids=["own", "hidden"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_row_without_a_batch(backend, given, device):
    """As one row of a batch, whatever needs a gradient: x, hidden, weight and bias, too."""
    results = []
    for row in (lambda t: t, lambda t: t[None]):
        t = Problem(rows=1, core="diagonal", out_blocks=2).tensors(device)
        hidden = torch.linspace(-1, 1, 4, device=device).requires_grad_() if given else None
        x = t["x"].detach()[0].requires_grad_()
        down = t["down"].detach() if given else t["down"]
        y = lowrank_linear(
            row(x), t["weight"], t["bias"], down, t["up"], t["core"], hidden=None if hidden is None else row(hidden),
            backend=backend,
        )  # fmt: skip
        leaves = [x, t["weight"], t["bias"], t["up"], t["core"], hidden if given else down]
        results.append((y.view(-1), *torch.autograd.grad(y.square().sum(), leaves)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_hidden_of_any_strides(backend, device):
    """A contiguous hidden first: what is kept of that call must not read the next one."""
    t, results = Problem(core="diagonal", out_blocks=2).tensors(device), []
    wide = torch.randn(37, 12, device=device)
    for hidden in (wide[:, :4].contiguous(), wide[:, :4], wide.t().contiguous().t()[:, :4]):
        hidden = hidden.detach().requires_grad_()
        y = lowrank_linear(**t, hidden=hidden, backend=backend)
        leaves = [t[name] for name in ("x", "weight", "bias", "up", "core")]
        results.append((y, *torch.autograd.grad(y.square().sum(), [*leaves, hidden])))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)


@pytest.mark.kernels
def test_one_kernel_reads_a_weight_of_any_strides(device):
    """A contiguous weight first: what is kept of that call must not read the next one."""
    t = Problem().tensors(device)
    weight, results = t.pop("weight").detach(), []
    wide = torch.cat([weight, weight], 1)
    for each in (weight, weight.t().contiguous().t(), wide[:, : weight.shape[1]]):
        results.append(lowrank_linear(weight=each, **t, backend="triton", design="fused"))
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])


def test_empty_batch(backend_design, device):
    tensors = Problem().tensors(device)
    x = torch.empty(2, 0, 24, device=device, requires_grad=True)
    y = lowrank_linear(**tensors | {"x": x}, backend=backend_design[0], design=backend_design[1])
    assert y.shape == (2, 0, 40)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all((tensors[name].grad == 0).all() for name in ("weight", "bias", "down", "up"))


def test_nan_in_means_nan_out(backend_design, device):
    tensors = {name: t.detach() for name, t in Problem().tensors(device).items()}
    tensors["x"][3, 5] = float("nan")
    y = lowrank_linear(**tensors, backend=backend_design[0], design=backend_design[1])
    assert y[3].isnan().all() and not y[:3].isnan().any() and not y[4:].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_scale_as_tensor(backend_design, dtype, device):
    """A 0-d tensor of any type scales exactly as the number it holds."""
    tensors = Problem().tensors(device)
    options = {"backend": backend_design[0], "design": backend_design[1]}
    number = lowrank_linear(**tensors, scale=0.375, **options)
    tensor = lowrank_linear(**tensors, scale=torch.tensor(0.375, device=device, dtype=dtype), **options)
    torch.testing.assert_close(number, tensor, rtol=1e-6, atol=1e-6)


def test_autocast(backend_design, device):
    """x, weight and bias are cast as linear casts them; float32 factors get float32 gradients."""
    tensors = Problem().tensors(device)
    with torch.autocast(device, torch.bfloat16):
        y = lowrank_linear(**tensors, backend=backend_design[0], design=backend_design[1])
    assert y.dtype == torch.bfloat16
    y.backward(torch.ones_like(y))
    assert all(t.grad.dtype == torch.float32 for t in tensors.values())
    oracle = op.lowrank_linear_reference(*(tensors[n].detach().double() for n in ("x", "weight", "bias", "down", "up")))
    assert error(y.detach(), oracle) < 1e-2


def test_hidden_has_the_dtype_of_the_autocast_around_it(device):
    x, down = torch.ones(3, 8, device=device), torch.ones(2, 8, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device, dtype):
            assert peft_kernels.lowrank_hidden(x, down).dtype == dtype
    assert peft_kernels.lowrank_hidden(x, down).dtype == torch.float32


@pytest.mark.parametrize("outer", [torch.bfloat16, torch.float16])
def test_backward_inside_another_autocast(backend_design, outer, device):
    """What was computed without autocast is differentiated without it, wherever backward is called."""
    plain, inside = (Problem(core="flat diagonal").tensors(device) for _ in range(2))
    options = {"dropout_p": 0.2, "dropout_on": "rank", "backend": backend_design[0], "design": backend_design[1]}
    torch.manual_seed(0)
    lowrank_linear(**plain, **options).sum().backward()
    with torch.autocast(device, outer):
        with torch.autocast(device, enabled=False):
            torch.manual_seed(0)
            y = lowrank_linear(**inside, **options)
        y.sum().backward()
    assert all(torch.equal(plain[name].grad, inside[name].grad) for name in plain)


def test_strided_bias_and_factors(backend_design, device):
    tensors = {name: t.detach() for name, t in Problem(rank=4).tensors(device).items()}
    options = {"backend": backend_design[0], "design": backend_design[1]}
    expected = lowrank_linear(**tensors, **options)
    strided = dict(tensors)
    for name in ("bias", "down", "up", "weight"):
        strided[name] = torch.stack([tensors[name]] * 2, -1)[..., 0]
    torch.testing.assert_close(lowrank_linear(**strided, **options), expected, rtol=1e-6, atol=1e-6)
    same = {**tensors, "bias": tensors["bias"][:1].expand(40)}
    torch.testing.assert_close(
        lowrank_linear(**same, **options), expected - tensors["bias"] + tensors["bias"][0], rtol=1e-5, atol=1e-5
    )


def test_second_derivatives_are_refused(backend_design, device):
    tensors = Problem().tensors(device)
    y = lowrank_linear(**tensors, backend=backend_design[0], design=backend_design[1])
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(y.sum(), tensors["x"], create_graph=True)


@pytest.mark.parametrize("wrong", ["shape", "dtype", "type"])
def test_what_dequantize_returns_is_checked(wrong, device):
    tensors = Problem().tensors(device)
    returned = {"shape": torch.ones(24, 40), "dtype": torch.ones(40, 24).half(), "type": None}[wrong]

    class Broken:
        shape = (40, 24)

        def dequantize(self, dtype):
            return returned

    with pytest.raises(ValueError, match=r"^weight: expected dequantize"):
        lowrank_linear(**tensors | {"weight": Broken()})


class Quantized:
    """A weight kept as int8 with one step per row."""

    def __init__(self, weight: torch.Tensor):
        self.step = weight.abs().amax(1, keepdim=True) / 127
        self.codes = (weight / self.step).round().to(torch.int8)
        self.shape, self.calls = weight.shape, 0

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        self.calls += 1
        return (self.codes * self.step).to(dtype)


def test_quantized_weight(backend_design, device):
    """Made dense afresh in each direction; nothing dense is kept."""
    tensors = {name: t.detach() for name, t in Problem(columns_in=64, columns_out=64).tensors(device).items()}
    quantized, dense = Quantized(tensors["weight"]), tensors["weight"]
    dense.copy_(quantized.dequantize(dense.dtype))
    options = {"backend": backend_design[0], "design": backend_design[1]}
    x = tensors["x"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = lowrank_linear(**tensors | {"weight": quantized}, **options)
    assert not any(t.shape == dense.shape for t in kept)
    y.sum().backward()
    assert quantized.calls == 3
    gradient, x.grad = x.grad, None
    again = lowrank_linear(**tensors, **options)
    again.sum().backward()
    assert torch.equal(y, again) and torch.equal(gradient, x.grad)


def saved_storages(forward) -> dict[int, int]:
    """Bytes by storage of what one forward keeps for its backward, parameters left out."""
    storages = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        forward()
    return storages


def test_saved_for_backward(backend_design, device):
    """x once for q, k and v, a thin z each, 16 bytes of seed (torch: a 1-byte mask); PEFT keeps a dropped copy of x."""
    rows, width, rank = 64, 96, 4
    backend, design = backend_design
    x = torch.randn(rows, width, device=device, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(width, width, device=device), requires_grad=False)
    down, up = (torch.nn.Parameter(torch.randn(s, device=device)) for s in ((rank, width), (width, rank)))
    options = {"dropout_p": 0.1, "backend": backend, "design": design}
    saved = saved_storages(lambda: [lowrank_linear(x, weight, None, down, up, **options) for _ in range(3)])
    x_bytes, z_bytes = 4 * rows * width, 4 * rows * rank
    assert saved.pop(x.untyped_storage().data_ptr()) == x_bytes
    random_bytes = rows * width if backend == "torch" else 16
    assert sorted(saved.values()) == sorted([z_bytes, random_bytes] * 3)

    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(width, width, device=device))
    config = peft.LoraConfig(r=rank, lora_dropout=0.1, target_modules=["0"])
    theirs = saved_storages(lambda: peft.get_peft_model(model, config)(x))
    ours = saved_storages(lambda: lowrank_linear(x, weight, None, down, up, **options))
    assert sum(ours.values()) < sum(theirs.values())


@pytest.mark.parametrize("layout", ["lora", "aurora-fused-qkv", "aurora-fc2-released"])
@pytest.mark.parametrize("tiles", [2, 3])
@pytest.mark.kernels
def test_strips_of_several_tiles(layout, tiles, monkeypatch, device):
    """At full size every program walks through many tiles of rows; 300 rows would give it one."""
    from peft_kernels.triton_kernels import lowrank_linear_bwd

    monkeypatch.setattr(lowrank_linear_bwd, "strip_tiles", lambda *sizes: tiles)
    problem = Problem(**LAYOUTS[layout], rows=300, dropout_p=0.2, dropout_on="input")
    assert_as_accurate_as_torch(problem, device, "triton")


@pytest.mark.kernels
def test_hidden_alone(device):
    from peft_kernels.triton_kernels.common import record_launches

    for backend in ("torch", "triton"):
        x = torch.randn(3, 5, 24, device=device, requires_grad=True)
        down = torch.randn(4, 12, device=device, requires_grad=True)
        with record_launches() as launched:
            z = lowrank_hidden(x, down, 2, backend=backend)
        assert z.shape == (3, 5, 8) and bool(launched) == (backend == "triton")
        gradient = torch.randn_like(z)
        reference = (x.unflatten(-1, (2, 12)) @ down.t()).flatten(-2)
        torch.testing.assert_close(z, reference, rtol=1e-5, atol=1e-5)
        ours = torch.autograd.grad(z, (x, down), gradient)
        theirs = torch.autograd.grad(reference, (x, down), gradient)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.kernels
def test_one_hidden_serves_q_k_and_v(device):
    """docs/method.md, section 1: one x Aᵀ for three projections that share A, or one stacked A with a slice each."""
    problem = Problem()
    for backend in ("torch", "triton"):
        tensors = problem.tensors(device)
        x, down, ups = tensors["x"], tensors["down"], [torch.randn(40, 4, device=device) for _ in range(3)]
        stacked = torch.cat([down, 2 * down, 3 * down])
        hidden = lowrank_hidden(x, stacked, backend=backend)
        for i, up in enumerate(ups):
            y = lowrank_linear(
                x, tensors["weight"], None, (i + 1) * down, up, hidden=hidden[:, 4 * i : 4 * i + 4], backend=backend
            )
            alone = lowrank_linear(x, tensors["weight"], None, (i + 1) * down, up, backend=backend)
            torch.testing.assert_close(y, alone, rtol=1e-5, atol=1e-5)


def test_public_names():
    assert {"lowrank_linear", "lowrank_hidden", "use_backend", "resolve"} <= set(peft_kernels.__all__)
