"""torch.compile and custom operators of `gated_query`: one full graph for each mode, and few recompilations."""

from dataclasses import replace

import pytest
import torch
from gated_query_cases import Problem, run
from lowrank_cases import error
from torch._dynamo.testing import CompileCounterWithBackend

from peft_kernels import gated_query

PROBLEMS = [Problem("additive"), Problem("gated", padding="some")]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.mode)
def test_full_graph_and_one_recompilation(backend, problem, device):
    """For batches and scales that change: the second batch made it dynamic, and a scale is a tensor."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gated_query, fullgraph=True, backend=counter)
    for batch in (3, 5, 6):
        case = replace(problem, batch=batch, scale=0.1 * batch)
        tensors, options = case.tensors(device), case.options(device)
        if "scale" in options:
            options["scale"] = torch.tensor(options["scale"], device=device)
        y = compiled(problem.mode, **tensors, **options, backend=backend)
        y.backward(problem.gradient(y))
        eager = run(case, device, backend)
        assert error(y, eager["y"].double()) < 1e-6
        assert all(error(t.grad, eager[name].double()) < 1e-6 for name, t in tensors.items())
    assert counter.frame_count == 2


def operators(device):
    ns = torch.ops.peft_kernels
    t = {name: tensor.detach() for name, tensor in PROBLEMS[0].tensors(device).items()}
    wide = {name: t[name].flatten(0, 1) for name in ("hidden", "text", "cross")}
    vectors, cross = (t["gamma"], t["beta"]), (t["cross_gamma"], t["cross_beta"])
    scale = torch.tensor(0.5, device=device)
    yield ns.additive_query_fwd, (wide["hidden"], wide["text"], *vectors, wide["cross"], *cross, scale, "triton")
    yield (
        ns.additive_query_bwd,
        (wide["hidden"], wide["text"], *vectors, wide["cross"], *cross, scale, [True] * 6, "triton"),
    )
    needs = [False, False, True, True, False, True]
    yield (
        ns.additive_query_bwd,
        (wide["hidden"], None, None, vectors[1], None, cross[0], cross[1], scale, needs, "triton"),
    )
    mask = PROBLEMS[1].options(device)["padding_mask"]
    gate, total = torch.rand(3, 7, device=device), torch.randn(3, 24, device=device)
    for padding_mask in (mask, None):
        yield ns.gated_query_fwd, (wide["hidden"], wide["text"], *vectors, padding_mask, 7, "triton")
        yield (
            ns.gated_query_bwd,
            (wide["cross"], wide["hidden"], wide["text"], *vectors, padding_mask, gate, total, [True] * 4, "triton"),
        )


@pytest.mark.parametrize("index", range(7))
@pytest.mark.kernels
def test_operators_pass_opcheck(index, device):
    operator, args = list(operators(device))[index]
    # Autograd is the Function's: the operators themselves only run inside it.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator.default, args, test_utils=tests)
