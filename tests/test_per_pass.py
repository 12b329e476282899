"""PerPass: whatever order layers are called in, and whatever changes between, they give what they would give alone."""

import pytest
import torch
from per_pass_cases import RANK, D, Stack, close, count_products, data, expected_grads, grads, same
from torch import nn

from peft_kernels.layers.mode_linear import Decomposition, SharedCores
from peft_kernels.ops import lowrank_linear as op


@pytest.fixture(params=["cp", "tucker"])
def stack(request) -> Stack:
    return Stack(request.param)


@pytest.fixture
def products(monkeypatch) -> list[int]:
    return count_products(monkeypatch)


def test_one_product_and_the_same_gradients(stack, products):
    x = data(True)
    expected = expected_grads(stack, x)
    del products[:]
    close(grads(stack, x, lambda: stack(x).square().sum().backward()), expected)
    assert len(products) == 1
    y = stack(x)
    assert stack.layers[0]._hidden._pass is None and y.requires_grad  # nothing waits for anyone
    stack(x)
    assert len(products) == 3  # once for each pass


@pytest.mark.parametrize("order", [(2, 0, 1), (0, 0, 1, 2), (1, 2, 1, 0), (0, 1, 2, 2, 1, 0)])
def test_any_order(stack, order):
    x = data(True)
    same(stack, x, *order)
    close(
        grads(stack, x, lambda: sum(stack.layers[m](x).square().sum() for m in order).backward()),
        expected_grads(stack, x, order),
    )


@pytest.mark.parametrize("rows", [[(0, 2), (2, 4)], [(3, 1), (4, 2)], [(0, 1), (7, 1), (2, 1)], [(4, 2), (0, 1)]])
@pytest.mark.parametrize("core", ["cp", "tucker"])
def test_cores_stand_anywhere(core, rows):
    of = Decomposition([(D, D)], [(8, D)], RANK, core)
    shared = SharedCores(of)
    members = [shared.join(*its) for its in rows]
    for member, (first, count) in zip(members, rows):
        expected = of.cores(of.slots[first : first + count], of.core_parameters()[1])
        torch.testing.assert_close(shared.get(member), expected)


def test_changes_in_place_between_members(stack):
    x, other = data(), data()
    same(stack, x, 0)
    x.add_(1)
    same(stack, x, 1)
    same(stack, other, 2)
    same(stack, x, 2)
    with torch.no_grad():
        stack.decomposition.down[f"{D}x{D}"].mul_(2)
    same(stack, x, 0)
    with torch.no_grad():
        stack.decomposition.slots.mul_(2)
    same(stack, x, 1)
    with torch.no_grad():
        stack.decomposition.core_parameters()[1].mul_(2)
    same(stack, x, 2)
    stack.decomposition.down[f"{D}x{D}"] = nn.Parameter(torch.randn(RANK, D, dtype=torch.float64))
    same(stack, x, 0)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_an_optimizer_step_with_cached_features(stack, options):
    """A fused optimizer's writes are not counted: the backward before it ends the pass."""
    x = data()
    optimizer = torch.optim.AdamW(stack.decomposition.parameters(), lr=0.1, **options)
    for member in (0, 1, 2):
        same(stack, x, member)[0].square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        same(stack, x, 0, 1, 2)


@pytest.mark.parametrize("retain", [False, True])
def test_backward_between_members(stack, retain):
    """The first member's backward frees the graph that the next one would join."""
    x = data(True)

    def run():
        for layer in stack.layers:
            layer(x).square().sum().backward(retain_graph=retain)

    close(grads(stack, x, run), expected_grads(stack, x))


@pytest.mark.parametrize("first", [0, 2])
def test_two_passes_before_two_backwards(stack, first):
    """A whole pass, or one that ended early, and then another with the same image."""
    x = data(True)

    def run():
        part = sum(layer(x).square().sum() for layer in stack.layers[: first + 1])
        whole = stack(x).square().sum()
        part.backward()
        whole.backward()

    expected = [a + b for a, b in zip(expected_grads(stack, x, range(first + 1)), expected_grads(stack, x))]
    close(grads(stack, x, run), expected)


def test_layers_of_one_pass_are_one_graph(stack):
    """The limit that the docstring names."""
    x = data()
    first, second = (stack.layers[m](x).sum() for m in (0, 1))
    first.backward(retain_graph=True)
    second.backward()


def test_switches_of_grad_mode_and_requires_grad(stack):
    x = data()
    with torch.no_grad():
        assert not same(stack, x, 0)[0].requires_grad
    close(grads(stack, x, lambda: stack.layers[1](x).square().sum().backward()), expected_grads(stack, x, [1]))
    same(stack, x, 0)
    x.requires_grad_()  # changes no version
    close(grads(stack, x, lambda: stack.layers[1](x).square().sum().backward()), expected_grads(stack, x, [1]))
    same(stack, x, 0)
    down = stack.decomposition.down[f"{D}x{D}"].requires_grad_(False)
    close(grads(stack, x, lambda: stack.layers[2](x).square().sum().backward()), expected_grads(stack, x, [2]))
    down.requires_grad_()
    y = stack.layers[0](x)
    x.detach_()
    assert stack.layers[1](x).requires_grad and y.requires_grad and not x.requires_grad


def test_autocast_switched_between_members():
    stack = Stack().float()
    x = torch.randn(4, D)
    with torch.autocast("cpu", torch.bfloat16):
        first = stack.layers[0](x)
        assert first.dtype == torch.bfloat16
    second = stack.layers[1](x)
    assert second.dtype == torch.float32
    torch.testing.assert_close(second, stack.twins[1](x))


def test_inference_mode(stack):
    """Tensors made in it count no changes: neither an input nor parameters may be trusted to be what they were."""
    x = data()
    with torch.inference_mode():
        same(stack, x, 0)
        inside = data()
        same(stack, inside, 0, 1)
        inside.add_(1)
        same(stack, inside, 2)
        made = Stack()
        same(made, x, 0, 1)
        for p in made.decomposition.parameters():
            p.mul_(2)
        same(made, x, 2)
    with torch.no_grad():
        same(stack, inside, 0, 1, 2)
        same(made, x, 0, 1, 2)
    same(stack, x, 1, 2)


def test_an_error_in_mid_pass(stack, monkeypatch):
    x = data(True)
    same(stack, x, 0)
    with pytest.raises(ValueError, match=r"^down: .* for x \(4, 3\)"):
        stack.layers[1](x[:, :3])
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(op, "lowrank_hidden_fwd", lambda *_: (_ for _ in ()).throw(MemoryError))
        stack(data())
    close(grads(stack, x, lambda: stack(x).square().sum().backward()), expected_grads(stack, x))


@pytest.mark.filterwarnings("ignore")
def test_traced_in_mid_pass(stack):
    x = data(True)
    same(stack, x, 0)
    traced = torch.jit.trace(stack, (x,), check_trace=False)
    other = data()
    torch.testing.assert_close(traced(other), torch.stack([twin(other) for twin in stack.twins]))
    same(stack, x, 1, 2)
