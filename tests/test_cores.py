"""The cores of Aurora's decompositions, against their definitions spelled out element by element."""

from functools import partial
from itertools import product

import pytest
import torch

from peft_kernels import cp_core, lowrank_linear, reconstruct_stack, tucker_core


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_cp_is_the_papers_sum_of_outer_products():
    u, v, lam, p = random(7, 3), random(5, 3), random(3), random(4, 3)
    stack = reconstruct_stack(u.t(), v, cp_core(lam, p))
    for k in range(4):
        update = sum(lam[r] * p[k, r] * torch.outer(v[:, r], u[:, r]) for r in range(3))
        assert torch.allclose(stack[k], update, atol=1e-14)


@pytest.mark.parametrize("layout", ["blocks", "released"])
@pytest.mark.parametrize("slots", [1, 4])
def test_tucker_element_by_element(slots, layout):
    rank, C, p = 3, random(3, 3, 3), random(slots, 3)
    core = tucker_core(C, p, layout)
    for s, r, a in product(range(slots), range(rank), range(rank)):
        b, k = (r, s) if layout == "blocks" else divmod(s * rank + r, slots)
        assert torch.allclose(core[s, r, a], sum(C[a, b, c] * p[k, c] for c in range(rank)), atol=1e-14)


def test_released_layout_is_another_order_of_several_slots_only():
    C, p = random(3, 3, 3), random(4, 3)
    assert not torch.allclose(tucker_core(C, p), tucker_core(C, p, "released"))
    assert torch.equal(tucker_core(C, p[:1]), tucker_core(C, p[:1], "released"))


def test_superdiagonal_tucker_is_cp():
    p, lam = random(4, 3), random(3)
    C = torch.zeros(3, 3, 3, dtype=torch.float64)
    C[range(3), range(3), range(3)] = lam.detach()
    assert torch.allclose(tucker_core(C, p), torch.diag_embed(cp_core(lam, p)), atol=1e-15)


def test_gradients():
    assert torch.autograd.gradcheck(cp_core, (random(3), random(4, 3)))
    for layout in ("blocks", "released"):
        assert torch.autograd.gradcheck(partial(tucker_core, layout=layout), (random(3, 3, 3), random(4, 3)))


def test_a_fused_qkv_is_three_slots_of_the_stack():
    """`lowrank_linear` with the cores as output blocks computes what the reconstructed weights compute."""
    u, v, p, x = random(8, 3), random(6, 3), random(3, 3), random(5, 8)
    for core in (cp_core(random(3), p), tucker_core(random(3, 3, 3), p)):
        weights = reconstruct_stack(u.t(), v, core).flatten(0, 1)
        y = lowrank_linear(x, torch.zeros_like(weights), None, u.t(), v, core[:, None])
        assert torch.allclose(y, x @ weights.t(), atol=1e-13)


BAD = [
    (cp_core, (torch.ones(3), torch.ones(4, 2)), "p"),
    (cp_core, (torch.ones(3, 1), torch.ones(4, 3)), "lam"),
    (cp_core, (torch.ones(3), torch.ones(4, 3).half()), "p"),
    (cp_core, (3.0, torch.ones(4, 3)), "lam"),
    (tucker_core, (torch.ones(3, 3, 2), torch.ones(4, 2)), "C"),
    (tucker_core, (torch.ones(3, 3, 3), torch.ones(4, 2)), "C"),
    (tucker_core, (torch.ones(3, 3, 3), torch.ones(4, 3), "fc2"), "layout"),
    (tucker_core, (torch.ones(3, 3, 3), torch.ones(4, 3, dtype=torch.int64)), "p"),
]


@pytest.mark.parametrize(("function", "arguments", "name"), BAD)
def test_bad_input_names_the_argument(function, arguments, name):
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b"):
        function(*arguments)
