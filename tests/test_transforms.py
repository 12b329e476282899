"""torch.func and forward-mode differentiation: operations become plain torch, with its own derivatives of any order."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from peft_kernels import (
    BackendUnavailableError,
    ImitationGroup,
    adapter_segments,
    batched_lowrank_linear,
    gated_query,
    imitation_step,
    lowrank_hidden,
    lowrank_linear,
    lowrank_projections,
    momentum_weight_distance,
    reconstruct,
    reconstruct_stack,
    use_backend,
    weight_distance,
)
from peft_kernels.layers import LowRankLinear
from peft_kernels.layers.gated_query import GatedQuery
from peft_kernels.ops.batched_lowrank_linear import batched_lowrank_linear_reference
from peft_kernels.ops.gated_query import gated_query_reference
from peft_kernels.ops.lowrank_linear import lowrank_linear_reference
from peft_kernels.ops.lowrank_projections import lowrank_projections_reference
from peft_kernels.ops.reconstruct import reconstruct_reference
from peft_kernels.ops.weight_distance import weight_distance_reference

S = torch.tensor(0.5, dtype=torch.float64)
INDEX = torch.tensor([0, 1, -1])
MASK = torch.tensor([[True, True, False]])


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def update(core=None, down=(2, 4), up=(5, 2)):
    return {"down": randn(*down), "up": randn(*up)} | ({} if core is None else {"core": randn(*core)})


def linear(**factors):
    return {"x": randn(3, 4), "weight": randn(5, 4), "bias": randn(5)} | (factors or update())


def query(names, *shape):
    return {name: randn(*(shape if name in ("hidden", "text", "cross") else shape[-1:])) for name in names}


def through_hidden(x, weight, bias, down, up):
    return lowrank_linear(x, weight, bias, down, up, hidden=lowrank_hidden(x, down), scale=S)


def together(function):
    """q and k of one x as one tensor, through cores; the second weight is half the first."""

    def both(x, weight, bias, down, up, core):
        lists = [weight, weight / 2], [bias, None], [down, -down], [up, up * 2], [core, core + 1]
        return torch.cat(function(x, *lists, scales=[S, S]), -1)

    return both


def stack_reference(down, up, core, base):
    return torch.stack([reconstruct_reference(down, up, each, base=base) for each in core])


def sorted_before(**t):
    return batched_lowrank_linear(**t, adapter_index=adapter_segments(INDEX, 2), scale=0.5)


ADDITIVE = ("hidden", "text", "gamma", "beta", "cross", "cross_gamma", "cross_beta")
# (operation, its definition, its tensors, all of them differentiable)
CASES = {
    "linear": (
        lambda **t: lowrank_linear(**t, scale=0.5),
        lambda **t: lowrank_linear_reference(**t, scale=0.5),
        linear(),
    ),
    "hidden": (through_hidden, lambda **t: lowrank_linear_reference(**t, scale=0.5), linear()),
    "diagonal": (
        lowrank_linear,
        lowrank_linear_reference,
        linear(**update((3, 2, 2), (2, 2), (5, 2)), weight=randn(15, 4), bias=randn(15)),
    ),
    "dense": (lowrank_linear, lowrank_linear_reference, linear(**update((2, 2)))),
    "projections": (together(lowrank_projections), together(lowrank_projections_reference), linear(**update((2,)))),
    "batched": (
        lambda **t: batched_lowrank_linear(**t, adapter_index=INDEX, scale=torch.tensor([2.0, 3.0])),
        lambda **t: batched_lowrank_linear_reference(**t, adapter_index=INDEX, scale=torch.tensor([2.0, 3.0])),
        linear(**update(down=(2, 2, 4), up=(2, 5, 2))),
    ),
    "sorted": (
        sorted_before,
        lambda **t: batched_lowrank_linear_reference(**t, adapter_index=INDEX, scale=0.5),
        linear(**update(down=(2, 2, 4), up=(2, 5, 2))),
    ),
    "additive": (
        lambda **t: gated_query("additive", **t, scale=S),
        lambda **t: gated_query_reference("additive", **t, scale=S),
        query(ADDITIVE, 3, 4),
    ),
    "gated": (
        lambda **t: gated_query("gated", **t, padding_mask=MASK),
        lambda **t: gated_query_reference("gated", **t, padding_mask=MASK),
        query(ADDITIVE[:4], 1, 3, 4),
    ),
    "reconstruct": (
        lambda **t: reconstruct(**t, scale=S),
        lambda **t: reconstruct_reference(**t, scale=S),
        update() | {"base": randn(5, 4)},
    ),
    "blocks": (reconstruct, reconstruct_reference, update((2, 3, 2, 2))),
    "stack": (reconstruct_stack, stack_reference, update((3, 2)) | {"base": randn(5, 4)}),
    **{
        reduction: (
            lambda reduction=reduction, **t: weight_distance(**t, reduction=reduction),
            lambda reduction=reduction, **t: weight_distance_reference(**t, reduction=reduction),
            {"target": randn(5, 4), "base": randn(5, 4), "left": randn(5, 2), "right": randn(2, 4)},
        )
        for reduction in ("mean", "sum", "relative")
    },
}


@pytest.fixture(params=CASES)
def case(request):
    """Both as functions of tensors in order, and the tensors."""
    operation, reference, tensors = CASES[request.param]
    named = [lambda *args, f=f: f(**dict(zip(tensors, args))) for f in (operation, reference)]
    named[0](*tensors.values())  # what a plain call keeps is not for transforms
    return *named, [*tensors.values()]


def compare(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_reverse_mode(case):
    *functions, tensors = case
    every = tuple(range(len(tensors)))
    compare(*(grad(lambda *t, f=f: f(*t).square().sum(), every)(*tensors) for f in functions))
    compare(*(jacrev(f, every)(*tensors) for f in functions))


def test_forward_mode(case):
    *functions, tensors = case
    tangents = tuple(map(torch.randn_like, tensors))
    compare(*(jvp(f, tuple(tensors), tangents) for f in functions))
    with forward_ad.dual_level():
        duals = [*map(forward_ad.make_dual, tensors, tangents)]
        compare(*(tuple(forward_ad.unpack_dual(f(*duals))) for f in functions))


def test_second_derivatives(case):
    *functions, tensors = case
    compare(*(hessian(lambda *t, f=f: f(*t).pow(3).sum(), (0, 1))(*tensors) for f in functions))
    compare(*(jacfwd(jacrev(lambda *t, f=f: f(*t).sin().sum(), -1), 0)(*tensors) for f in functions))


def test_vmap_over_each_tensor_and_over_all(case):
    operation, reference, tensors = case
    others = [t + 1 for t in tensors]
    for places in (*([place] for place in range(len(tensors))), range(len(tensors))):
        args = [torch.stack([t, o]) if i in places else t for i, (t, o) in enumerate(zip(tensors, others))]
        ours = vmap(operation, tuple(0 if i in places else None for i in range(len(tensors))))(*args)
        second = [o if i in places else t for i, (t, o) in enumerate(zip(tensors, others))]
        compare(ours, torch.stack([reference(*tensors), reference(*second)]))


def test_vmap_of_gradients():
    operation, reference, tensors = CASES["dense"]
    batch = torch.randn(3, *tensors["x"].shape, dtype=torch.float64)
    each = [vmap(grad(lambda x, f=f: f(**tensors | {"x": x}).square().sum()))(batch) for f in (operation, reference)]
    compare(*each)


def test_in_a_full_graph():
    operation, reference, tensors = CASES["linear"]
    torch._dynamo.reset()

    def gradient(function):
        return grad(lambda down: function(**tensors | {"down": down}).square().sum())(tensors["down"])

    compare(torch.compile(lambda: gradient(operation), fullgraph=True, backend="eager")(), gradient(reference))


@pytest.mark.parametrize("place", ["input", "rank", "core"])
def test_dropout_by_the_rules_of_vmap(place):
    eye, x = torch.eye(64), torch.ones(2, 64)
    weight = torch.zeros(64, 64)

    def drop(_):
        return lowrank_linear(x, weight, None, eye, eye, dropout_p=0.5, dropout_on=place)

    same, different = (vmap(drop, randomness=rule)(torch.zeros(3)) for rule in ("same", "different"))
    assert same[0].equal(same[1]) and not different[0].equal(different[1])
    assert {*same.unique().tolist(), *different.unique().tolist()} == {0, 2}
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(drop)(torch.zeros(3))
    slope = grad(lambda x: lowrank_linear(x, weight, None, eye, eye, dropout_p=0.5, dropout_on=place).sum())(x)
    assert {*slope.unique().tolist()} == {0, 2}


def test_half_precision_and_autocast_give_the_usual_dtypes():
    t = {name: tensor.float() for name, tensor in linear().items()}
    with torch.autocast("cpu", torch.bfloat16):
        expected = lowrank_linear(**t)
        y, slope = jvp(lambda x: lowrank_linear(**t | {"x": x}), (t["x"],), (t["x"],))
    assert y.dtype == slope.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_asked_for_by_name_raises(name):
    t = {argument: tensor.float() for argument, tensor in linear().items()}
    for call in (
        lambda x: lowrank_linear(**t | {"x": x}, backend=name),
        lambda x: lowrank_hidden(x, t["down"], 1, name),
    ):
        with pytest.raises(BackendUnavailableError, match=r"torch\.func"):
            grad(lambda x, call=call: call(x).sum())(t["x"])
        with pytest.raises(BackendUnavailableError, match=r"torch\.func"), use_backend(name), forward_ad.dual_level():
            call(forward_ad.make_dual(t["x"], t["x"]))


def test_what_is_changed_in_place_is_refused():
    t = {name: tensor.float() for name, tensor in CASES["mean"][2].items()}
    live, teacher = t["target"], t.pop("target").clone()
    group = ImitationGroup([live], [teacher], [t["base"]], down=[t["right"]], up=[t["left"]])
    for call, name in (
        (lambda left: momentum_weight_distance(live, teacher, t["base"], left, t["right"], decay=0.9), "teacher"),
        (lambda left: imitation_step([group], decay=0.9), "groups"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: .*in place"):
            grad(call)(t["left"])
    assert teacher.equal(live)


# ---- layers ---------------------------------------------------------------------------------------------------------


def layers():
    base = torch.nn.Linear(4, 4)
    yield LowRankLinear(base, 2, scale=2.0), (torch.randn(3, 4),)
    yield LowRankLinear(torch.nn.Linear(4, 4), 2, core="dense", out_blocks=2), (torch.randn(3, 4),)
    yield GatedQuery(4), (torch.randn(2, 3, 4),) * 3
    yield GatedQuery(4, "gated"), (torch.randn(2, 3, 4),) * 3


@pytest.mark.parametrize("index", range(4))
def test_layers(index):
    """functional_call with other parameters, without a transform and with some: an ensemble's gradients, one by one."""
    layer, args = [*layers()][index]
    own = dict(layer.named_parameters())
    sets = [{name: torch.randn_like(p) for name, p in own.items()} for _ in range(2)]
    stacked = {name: torch.stack([each[name] for each in sets]) for name in own}

    def energy(parameters):
        return functional_call(layer, parameters, args).square().sum()

    together = vmap(grad(energy))(stacked)
    for number, each in enumerate(sets):
        leaves = {name: t.clone().requires_grad_() for name, t in each.items()}
        slopes = torch.autograd.grad(energy(leaves), [*leaves.values()])
        for name, slope in zip(leaves, slopes):
            torch.testing.assert_close(together[name][number], slope, rtol=1e-4, atol=1e-4)
    assert all(layer.get_parameter(name) is p for name, p in own.items())
