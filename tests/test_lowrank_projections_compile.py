"""`lowrank_projections` under torch.compile: one full graph, few recompilations, operators that keep the rules."""

import pytest
import torch
from projections_cases import Problem, arguments
from torch._dynamo.testing import CompileCounterWithBackend

from peft_kernels import lowrank_hidden, lowrank_projections
from peft_kernels.ops.lowrank_linear import draw
from peft_kernels.records import KEEP_ALL, Dropout, ProjectionNeeds

BACKENDS = ["torch", "triton"]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"stacked": True}, {"shared": True, "core": "dense", "precomputed_hidden": True}],
    ids=["lora", "stacked", "aurora"],
)
def test_full_graph_forward_and_backward(backend, options, device):
    problem = Problem(**options)
    tensors = problem.tensors(device)

    def forward(**tensors):
        hidden = None
        if problem.precomputed_hidden:
            hidden = lowrank_hidden(tensors["x"], tensors["down"], backend=backend)
        args = arguments(problem, tensors)
        return torch.cat(lowrank_projections(*args, scales=problem.scales, hidden=hidden, backend=backend), -1)

    compiled, leaves = torch.compile(forward, fullgraph=True, backend="aot_eager"), list(tensors.values())
    results = []
    for function in (forward, compiled):
        y = function(**tensors)
        results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    torch.testing.assert_close(*results)


def test_recompiles_once_for_rows_and_never_for_scales_or_weights(device):
    problem, scale = Problem(dropout_p=0.1), torch.ones((), device=device)
    x, *others = arguments(problem, problem.tensors(device))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: lowrank_projections(x, *others, scales=scale), fullgraph=True, backend=counter)
    for step, rows in enumerate([5, 7, 9, 33]):
        with torch.no_grad():
            scale.fill_(1.0 + step)
            others[0][0].mul_(1.5)
        x = torch.randn(rows, problem.inputs, device=device)
        found = compiled(x)
        torch.testing.assert_close(found, lowrank_projections(x, *others, scales=scale))
    assert counter.frame_count == 2  # the second number of rows made it dynamic


def operators(device):
    """(operator, arguments): own z and a given one, each with a backward."""
    problem, ns = Problem(dtype=torch.float32), torch.ops.peft_kernels
    tensors = {name: t.detach() for name, t in problem.tensors(device).items()}
    x, weights, biases, downs, ups, _ = arguments(problem, tensors)
    scales, dys = [torch.full((), s, device=device) for s in problem.scales], problem.gradients(device)
    rng = draw(x, "triton", 0.3, problem.inputs, problem.count)
    z, shared = torch.randn(problem.rows, 3 * problem.rank, device=device), torch.randn(problem.rows, 4, device=device)
    on_input, on_rank = Dropout(rng, 0.3, "input"), Dropout(rng, 0.3, "rank")
    yield ns.lowrank_projections_fwd, (x, weights, biases, downs, ups, scales, None, *on_input)
    yield ns.lowrank_projections_fwd, (x, weights, biases, [], ups, scales, shared, *KEEP_ALL)
    needs = ProjectionNeeds(x=True, down=True, up=True)
    yield ns.lowrank_projections_bwd, (dys, x, weights, downs, ups, scales, z, *on_input, *needs)
    needs = ProjectionNeeds(x=True, up=True, z=True)
    yield ns.lowrank_projections_bwd, (dys, None, weights, [], ups, scales, shared, *on_rank, *needs)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.kernels
def test_operators_pass_opcheck(index, device):
    operator, args = list(operators(device))[index]
    # Autograd is the Function's: the operators themselves only run inside it.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator.default, (*args, "triton"), test_utils=tests)
