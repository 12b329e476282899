"""`adapted_mlp`: an MLP as one node, against its definition and against the operations that it is made of."""

import dataclasses
import functools

import pytest
import torch
from kept_cases import kept
from mlp_cases import TENSORS, Mlp, assert_as_accurate_as_torch, drawing, one_by_one, ours, reference, results
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from peft_kernels import MlpLinear, adapted_mlp, use_backend
from peft_kernels.blocks import mlp
from peft_kernels.blocks.activations import ACTIVATIONS

RANKS = {
    "both": (None, 4, 3),
    "fc1": (None, 4, 0),
    "fc2": (None, 0, 3),
    "none": (None, 0, 0),
    "gated, alike": (4, 4, 3),
    "gated, apart": (2, 4, 3),
    "gated, gate": (2, 0, 3),
    "gated, fc1": (0, 2, 0),
    "gated, fc2": (0, 0, 3),
}
HALF = {"dtype": torch.bfloat16, "factor_dtype": torch.float32}


def equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


# ---- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("ranks", ["both", "gated, alike", "gated, apart"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bits_of_the_operations_one_by_one(activation, ranks, dropout):
    for options in ({}, HALF):
        case = Mlp(RANKS[ranks], activation, dropout_p=dropout, **options)
        equal(results(case, ours(case, "torch")), results(case, one_by_one(case)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("ranks", RANKS)
def test_the_definition(ranks, activation, monkeypatch):
    for dropout in (0.0, 0.3):
        case = Mlp(RANKS[ranks], activation, dtype=torch.float64, dropout_p=dropout)
        masks = drawing(monkeypatch, case) if dropout else (None, None, None)
        found, expected = results(case, ours(case, "torch")), results(case, reference(case, masks))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [{}, HALF, {"dtype": torch.float16}], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("ranks", "activation"), [("both", "gelu"), ("fc2", "quick_gelu"), ("gated, apart", "silu")])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_as_accurate_as_torch(backend, ranks, activation, dtype):
    assert_as_accurate_as_torch(Mlp(RANKS[ranks], activation, **dtype), backend)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu"])
def test_a_gate_and_fc1_as_one_call_as_accurate_as_torch(activation):
    assert_as_accurate_as_torch(Mlp(RANKS["gated, alike"], activation), "torch")


def test_a_wrong_derivative_shows(monkeypatch):
    wrong = ACTIVATIONS["gelu"]._replace(bwd=ACTIVATIONS["gelu_tanh"].bwd)
    monkeypatch.setitem(ACTIVATIONS, "gelu", wrong)
    with pytest.raises(AssertionError, match="x"):
        assert_as_accurate_as_torch(Mlp(), "torch")


@pytest.mark.parametrize(("ranks", "activation"), [("both", "gelu"), ("gated, alike", "silu"), ("gated, gate", "relu")])
def test_gradcheck(ranks, activation):
    case = Mlp(RANKS[ranks], activation, dtype=torch.float64, sizes=(3, 4, 2), shape=(3,))
    tensors = case.tensors()

    def run(*values):
        named = dict(zip(tensors, values))
        return ours(case, "torch")(named["x"], **case.layers(named))

    assert torch.autograd.gradcheck(run, [*tensors.values()])


def test_dropout_on_kernels_follows_the_seed():
    case = Mlp(dropout_p=0.4)
    with use_backend("triton"):
        first, again, other = (results(case, ours(case), seed=seed) for seed in (1, 1, 2))
    equal(first, again)
    assert not torch.equal(first["y"], other["y"])
    off = Mlp(dropout_p=0.0)
    tensors = case.tensors()
    y = adapted_mlp(tensors["x"], **case.layers(tensors), dropout_p=0.4, training=False)
    assert torch.equal(y, ours(off)(tensors["x"], **off.layers(tensors)))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0,), (2, 0)])
@pytest.mark.parametrize("ranks", ["both", "gated, alike", "fc2"])
def test_leading_dimensions_and_empty_batches(ranks, shape):
    case = Mlp(RANKS[ranks], "silu", dtype=torch.float64, shape=shape)
    found, expected = results(case, ours(case)), results(case, reference(case))
    assert found["y"].shape == (*shape, 17)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-12, msg=name)


def test_no_kernel_is_launched_for_no_rows():
    case = Mlp(shape=(0,))
    tensors = case.tensors()
    plan = mlp._checked(tensors["x"], *case.layers(tensors).values(), None, "gelu", "triton", False)
    assert [backend for backend, _ in plan.calls] == ["torch", "torch"]
    assert results(case, ours(case, "triton"))["fc1.down"].abs().sum() == 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strides_and_scales_of_any_kind(backend):
    case = Mlp(shape=(6,))
    tensors = case.tensors()
    expected = results(case, ours(case, backend), tensors)
    for name in tensors:
        turned = tensors[name].detach().t().contiguous().t() if tensors[name].ndim == 2 else tensors[name].detach()
        tensors[name] = turned.requires_grad_()
    for scale in (1.7, torch.tensor(1.7), torch.tensor(1.7, dtype=torch.float64)):
        found = results(dataclasses.replace(case, scale=scale), ours(case, backend), tensors)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(results(dataclasses.replace(case, scale=1), ours(case), tensors)["y"], expected["y"])


# ---- what it keeps, and only what is asked for ----------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("ranks", RANKS)
def test_bytes_kept(ranks, dropout):
    """x, h (with a gate two), each z, and on the torch backend masks of one byte."""
    case = Mlp(RANKS[ranks], "silu", dropout_p=dropout, shape=(18,))
    tensors = case.tensors()
    parameters = nn.ParameterList([t for name, t in tensors.items() if name != "x"])  # their memory
    for name, t in tensors.items():
        t.requires_grad_(name.endswith(("x", "down", "up")))
    y = ours(case, "torch")(tensors["x"], **case.layers(tensors))
    gate, fc1, fc2 = case.ranks
    first = [rank for rank in (gate, fc1) if rank is not None]
    zs = [2 * fc1] if ranks == "gated, alike" else [rank for rank in first if rank]
    sizes = [4 * columns for columns in (*[24] * any(first), *[40] * len(first), *zs, *[fc2] * bool(fc2))]
    if dropout:
        sizes += [48] if ranks == "gated, alike" else [24 for rank in first if rank]
        sizes += [40] * bool(fc2)
    assert kept(y, parameters) == sorted(18 * size for size in sizes)


def test_backends_with_seeds_keep_no_mask():
    case = Mlp(dropout_p=0.3)
    tensors = case.tensors()
    y = ours(case, "triton")(tensors["x"], **case.layers(tensors))
    parameters = nn.ParameterList([t for name, t in tensors.items() if name != "x"])
    assert kept(y, parameters) == sorted([*(18 * 4 * columns for columns in (24, 40, 4, 3)), 16, 16])


@pytest.mark.parametrize("ranks", ["both", "gated, alike", "gated, gate"])
def test_each_gradient_alone(ranks):
    case = Mlp(RANKS[ranks], "silu", dropout_p=0.2)
    expected = results(case, ours(case, "torch"))
    for name in case.tensors():
        tensors = case.tensors()
        for other in tensors:
            tensors[other].requires_grad_(other == name)
        found = results(case, ours(case, "torch"), tensors)
        equal(found, {key: expected[key] for key in ("y", name)})
        y = ours(case, "torch")(tensors["x"], **case.layers(tensors))
        with torch.no_grad():
            gradients = y.grad_fn.apply(torch.ones_like(y))
        assert [each is not None for each in gradients] == list(y.grad_fn.needs_input_grad)


def test_no_derivative_is_computed_in_vain(monkeypatch):
    """Where only fc1 trains, none through the gate; where only fc2 does, none through the activation."""
    for trained, backwards in (("gate", 1), ("fc1", 0), ("fc2", 0)):
        case, calls = Mlp(RANKS["gated, apart"], "silu"), []
        own = ACTIVATIONS["silu"]
        counted = own._replace(bwd=lambda *args, calls=calls, own=own: (calls.append(1), own.bwd(*args))[1])
        with monkeypatch.context() as patch:
            patch.setitem(ACTIVATIONS, "silu", counted)
            tensors = case.tensors()
            for name, t in tensors.items():
                t.requires_grad_(name.startswith(trained))
            results(case, ours(case, "torch"), tensors)
        assert len(calls) == backwards, trained


def weights_kept(y, tensors):
    """By name. Who keeps one watches it, and it may change in place if nothing needs it."""
    own = {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None}
    return [name for name, t in tensors.items() if name.endswith("weight") and t.data_ptr() in own]


def test_nothing_is_kept_without_need():
    """Factors of fc2 alone: neither x nor fc1's z; without any gradient no graph."""
    case = Mlp(shape=(18,))
    tensors = case.tensors()
    for name, t in tensors.items():
        t.requires_grad_(name == "fc2.up")
    y = ours(case, "torch")(tensors["x"], **case.layers(tensors))
    assert kept(y, nn.ParameterList([*tensors.values()])) == [18 * 4 * 3]
    assert not weights_kept(y, tensors)
    tensors["fc1.down"].requires_grad_()  # whose gradient comes through fc2's weight
    y = ours(case, "torch")(tensors["x"], **case.layers(tensors))
    assert weights_kept(y, tensors) == ["fc2.weight"]
    with torch.no_grad():
        assert not ours(case)(tensors["x"], **case.layers(tensors)).requires_grad


# ---- what torch does around it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("ranks", ["both", "gated, alike"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast(activation, ranks, inside):
    """inside: the backward runs under it, too"""
    case, found = Mlp(RANKS[ranks], activation, dropout_p=0.2), []
    for run in (ours(case, "torch"), one_by_one(case)):
        tensors = case.tensors()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            y = run(tensors["x"], **case.layers(tensors))
        assert y.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found.append([y, *torch.autograd.grad(y, [*tensors.values()], case.gradient(y))])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("ranks", ["both", "none", "gated, fc1"])
def test_a_backward_under_autocast_of_a_forward_outside(ranks):
    case = Mlp(RANKS[ranks], "silu")
    expected, tensors = results(case, ours(case)), case.tensors()
    y = ours(case)(tensors["x"], **case.layers(tensors))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, [*tensors.values()], case.gradient(y))
    equal({"y": y, **dict(zip(tensors, found))}, expected)


@pytest.mark.parametrize("ranks", ["both", "gated, alike", "gated, fc1"])
def test_torch_func(ranks):
    case = Mlp(RANKS[ranks], "silu", dtype=torch.float64, shape=(3,))
    tensors = {name: t.detach() for name, t in case.tensors().items()}

    def loss(run, tensors):
        return run(tensors["x"], **case.layers(tensors)).square().sum()

    found, expected = (grad(functools.partial(loss, run))(tensors) for run in (ours(case), reference(case)))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    own = case.layers(tensors)
    per_row, together = (
        f(tensors["x"]) for f in (vmap(lambda x: ours(case)(x, **own)), lambda x: ours(case)(x, **own))
    )
    torch.testing.assert_close(per_row, together)
    direction = torch.ones_like(tensors["x"])
    pairs = [
        jvp(lambda x, run=run: run(x, **own), (tensors["x"],), (direction,)) for run in (ours(case), reference(case))
    ]
    torch.testing.assert_close(*pairs)
    with forward_ad.dual_level():
        y = ours(case)(forward_ad.make_dual(tensors["x"], direction), **own)
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, pairs[0][1])


def test_torch_func_drops_too():
    case = Mlp(dtype=torch.float64, dropout_p=0.5)
    tensors = {name: t.detach() for name, t in case.tensors().items()}

    def loss(x, training=True):
        return adapted_mlp(x, **case.layers(tensors), dropout_p=0.5, training=training).square().sum()

    found = []
    for seed, training in ((1, True), (1, True), (2, True), (1, False)):
        torch.manual_seed(seed)
        found.append(grad(loss)(tensors["x"], training))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(found[3], grad(lambda x: ours(Mlp())(x, **case.layers(tensors)).square().sum())(tensors["x"]))


class Block(nn.Module):
    """As a model has it: parameters, and a scale in a buffer."""

    def __init__(self, case: Mlp, backend: str):
        super().__init__()
        self.case, self.backend = case, backend
        tensors = {
            name.replace(".", "_"): nn.Parameter(t.detach()) for name, t in case.tensors().items() if name != "x"
        }
        self.values = nn.ParameterDict(tensors)
        self.register_buffer("scale", torch.tensor(case.scale))

    def forward(self, x):
        layers = {
            name: MlpLinear(
                *(self.values.get(f"{name}_{key}", None) for key in TENSORS),
                self.scale,
            )
            for name in self.case.names
        }
        return adapted_mlp(x, **layers, activation=self.case.activation, backend=self.backend)


@pytest.mark.parametrize(
    ("ranks", "backend"), [("both", "torch"), ("both", "triton"), ("gated, alike", "torch"), ("gated, gate", "torch")]
)
def test_compiled(ranks, backend):
    case = Mlp(RANKS[ranks], "gelu_tanh")
    block, found = Block(case, backend), []
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for run in (block, compiled):
        x = case.tensors()["x"]
        y = run(x)
        found.append([y, *torch.autograd.grad(y, [x, *block.parameters()], case.gradient(y))])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


def test_a_changed_scale_is_no_other_graph():
    case = Mlp()
    block, x = Block(case, "torch"), case.tensors()["x"]
    torch.compiler.reset()
    counts = CompileCounterWithBackend("eager")
    compiled = torch.compile(block, backend=counts, fullgraph=True)
    for value in (1.7, 0.3):
        block.scale.fill_(value)
        torch.testing.assert_close(compiled(x), block(x))
    assert counts.frame_count == 1


def test_a_second_derivative_is_refused():
    case = Mlp()
    tensors = case.tensors()
    y = ours(case)(tensors["x"], **case.layers(tensors))
    with pytest.raises(RuntimeError, match=r"^adapted_mlp: has first derivatives only"):
        torch.autograd.grad(y.sum(), [tensors["x"]], create_graph=True)


def test_what_is_kept_is_watched():
    """h belongs to the node alone; x that changes in place is noticed."""
    case = Mlp()
    tensors = case.tensors()
    x = tensors["x"] * 1
    y = ours(case)(x, **case.layers(tensors))
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = ours(case)(tensors["x"], **case.layers(tensors))
    y += 1  # models may write into it
    y.sum().backward()


def test_functional_call():
    case = Mlp(dtype=torch.float64)
    block, x = Block(case, "torch").double(), case.tensors()["x"].detach()
    values = {name: p.detach() for name, p in block.named_parameters()}
    found = grad(lambda values: functional_call(block, values, (x,)).sum())(values)
    block(x).sum().backward()
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
