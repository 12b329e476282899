"""torch.compile, custom operators and activation checkpointing: one full graph, few recompilations, the same masks."""

import pytest
import torch
from lowrank_cases import Problem
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from peft_kernels import lowrank_hidden, lowrank_linear, use_backend
from peft_kernels.layers import LowRankLinear
from peft_kernels.ops import lowrank_linear as op
from peft_kernels.records import KEEP_ALL, Dropout, Factors, Needs

BACKENDS = ["torch", "triton"]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(y, tensors):
    return (y, *torch.autograd.grad(y, tensors, torch.ones_like(y)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_full_graph_forward_and_backward(backend, compiler, device):
    tensors = Problem(core="dense", out_blocks=3).tensors(device)

    def forward(**tensors):
        hidden = lowrank_hidden(tensors["x"], tensors["down"], backend=backend)
        return lowrank_linear(**tensors, backend=backend) + lowrank_linear(**tensors, hidden=hidden, backend=backend)

    compiled = torch.compile(forward, fullgraph=True, backend=compiler)
    leaves = list(tensors.values())
    torch.testing.assert_close(gradients(compiled(**tensors), leaves), gradients(forward(**tensors), leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_recompiles_once_for_rows_and_never_for_scale_or_weights(backend, device):
    layer = LowRankLinear(torch.nn.Linear(24, 40, device=device), 4, dropout_p=0.1, backend=backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for step, shape in enumerate([(5, 24), (7, 24), (9, 24), (33, 24)]):
        layer.set_scale(1.0 + step)
        with torch.no_grad():
            layer.up.normal_()
        compiled(torch.randn(shape, device=device, requires_grad=True)).sum().backward()
    assert counter.frame_count == 2  # the second number of rows made it dynamic


@pytest.mark.kernels
def test_use_backend_inside_and_around_a_compiled_function(device):
    tensors = Problem().tensors(device)
    kernels_called = []

    def compiler(graph, inputs):
        graphs = [module.graph for module in graph.modules() if hasattr(module, "graph")]
        targets = [str(node.target) for graph in graphs for node in graph.nodes]
        kernels_called.append(any("peft_kernels.lowrank_linear_fwd" in target for target in targets))
        return graph.forward

    def inside(**tensors):
        with use_backend("triton"):
            return lowrank_linear(**tensors)

    expected = lowrank_linear(**tensors, backend="torch")
    torch.testing.assert_close(torch.compile(inside, fullgraph=True, backend=compiler)(**tensors), expected)
    around = torch.compile(lambda **t: lowrank_linear(**t), fullgraph=True, backend=compiler)
    for name in ("torch", "triton"):
        with use_backend(name):
            torch.testing.assert_close(around(**tensors), expected)
    assert kernels_called == [True, False, True]  # a change of backend outside makes a new graph


def dropping(backend, place):
    """A block to checkpoint, with dropout, and a nonlinearity whose result the backward takes."""

    def block(x, weight, bias, down, up, core):
        y = lowrank_linear(
            x, weight, bias, down, up, core, dropout_p=0.5, dropout_on=place, training=True, backend=backend
        )
        return y.relu()

    return block, lambda *args: checkpoint(block, *args, use_reentrant=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("place", op.DROPOUT_PLACES)
def test_checkpointing_repeats_the_mask(backend, compiled, place, device):
    """The recomputed forward draws the mask that the first one drew: the gradients are those without a checkpoint."""
    tensors = Problem(core="diagonal", out_blocks=2).tensors(device)
    leaves = list(tensors.values())
    plain, checkpointed = dropping(backend, place)
    if compiled:
        plain, checkpointed = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (plain, checkpointed))
    results = []
    # On a GPU a draw that is compiled to be repeated has a generator, and so a mask, of its own unless told otherwise
    with torch._inductor.config.patch(fallback_random=True):
        for function in (plain, checkpointed):
            torch.manual_seed(3)
            results.append(gradients(function(*leaves), leaves))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", [None, "aot_eager", "inductor"])
@pytest.mark.parametrize("place", op.DROPOUT_PLACES)
def test_gradients_take_the_mask_of_their_own_forward(backend, compiler, place, device):
    """From any generator: y and the gradient of x are both mask / (1 - p) where nothing else is in them."""
    _, function = dropping(backend, place)
    if compiler is not None:
        function = torch.compile(function, fullgraph=True, backend=compiler)
    weight, down, up = torch.zeros(16, 16, device=device), *torch.eye(16, device=device).repeat(2, 1, 1)
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        leaves = [torch.ones(8, 16, device=device, requires_grad=True) for _ in order]
        results = [function(x, weight, None, down, up, None) for x in leaves]
        assert all(y.unique().tolist() == [0, 2] for y in results) and not results[0].equal(results[1])
        for i in order:
            results[i].sum().backward()
            assert leaves[i].grad.equal(results[i])


def flat(*args):
    """As an operator takes them: the fields of records one after the other."""
    return [part for arg in args for part in (arg if hasattr(arg, "_fields") else (arg,))]


def operators(device: str):
    problem = Problem(core="dense", out_blocks=2, in_blocks=2)
    t = {name: tensor.detach() for name, tensor in problem.tensors(device).items()}
    factors = Factors(t["down"], t["up"], t["core"], torch.tensor(0.5, device=device))
    dy, z = problem.gradient(device), torch.randn(problem.rows, 8, device=device)
    outside, all_own = factors._replace(down=None, z=z), Needs(x=True, down=True, up=True, core=True)
    rng = torch.tensor([3, 4], device=device)
    ns = torch.ops.peft_kernels
    forward = t["x"], t["weight"], t["bias"]
    yield ns.lowrank_linear_fwd, flat(*forward, factors, Dropout(rng, 0.3, "core"), None, "triton")
    yield ns.lowrank_linear_fwd, flat(*forward, outside, KEEP_ALL, None, "triton")
    backward = dy, t["x"], t["weight"], factors._replace(z=z), Dropout(rng, 0.3, "rank"), all_own
    yield ns.lowrank_linear_bwd, flat(*backward, "triton")
    backward = dy, None, t["weight"], outside, KEEP_ALL, Needs(x=True, core=True, z=True)
    yield ns.lowrank_linear_bwd, flat(*backward, "triton")
    yield ns.lowrank_hidden_fwd, (t["x"], t["down"], 2, "triton")
    yield ns.lowrank_hidden_bwd, (z, t["x"], t["down"], [True, True], "triton")
    yield ns.lowrank_hidden_bwd, (z, None, t["down"], [True, False], "triton")


@pytest.mark.parametrize("index", range(7))
@pytest.mark.kernels
def test_operators_pass_opcheck(index, device):
    operator, args = list(operators(device))[index]
    # Autograd is the Function's: the operators themselves only run inside it.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator.default, args, test_utils=tests)
