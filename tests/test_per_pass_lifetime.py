"""PerPass under activation checkpointing, in copies and threads, and that it holds on to nothing."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from per_pass_cases import Stack, close, count_products, data, expected_grads, grads, same
from torch.utils.checkpoint import checkpoint

from peft_kernels.layers import per_pass


@pytest.fixture(params=["cp", "tucker"])
def stack(request) -> Stack:
    return Stack(request.param)


@pytest.fixture
def products(monkeypatch) -> list[int]:
    return count_products(monkeypatch)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_checkpointed_regions(stack, use_reentrant, cached):
    """Each member in a region of its own, with x passed in or (cached) reached from outside; twice."""
    x, other = data(True), data(True)

    def region(layer, given):
        return layer(x if cached else given) + 0 * given

    def run():
        losses = [
            checkpoint(region, layer, other if cached else x, use_reentrant=use_reentrant).square().sum()
            for layer in stack.layers
        ]
        sum(losses).backward()

    expected = expected_grads(stack, x)
    for _ in range(2):
        close(grads(stack, x, run), expected)
    close(grads(stack, x, lambda: stack(x).square().sum().backward()), expected)


def test_checkpointing_of_the_whole_pass_shares_in_the_region(stack, products):
    x = data(True)
    expected = expected_grads(stack, x)
    del products[:]
    close(grads(stack, x, lambda: checkpoint(stack, x, use_reentrant=False).square().sum().backward()), expected)
    assert len(products) == 2  # the forward's and the recomputation's


def test_saved_tensors_kept_elsewhere(stack):
    x = data(True)
    expected = expected_grads(stack, x)
    with torch.autograd.graph.save_on_cpu():
        close(grads(stack, x, lambda: stack(x).square().sum().backward()), expected)
        first = stack.layers[0](x)
    same(stack, x, 1)
    first.sum().backward()


@pytest.mark.parametrize("members", [(0,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_nothing_is_kept_alive(stack, members, checkpointed):
    """Without a backward, neither x nor its x U outlives the results, even of a pass that ended early."""
    hidden = stack.layers[0]._hidden

    def part(x):
        return sum(stack.layers[m](x) for m in members)

    gc.disable()
    try:
        x = data(True) * 2
        watched = [weakref.ref(x)]
        y = checkpoint(part, x, use_reentrant=False) if checkpointed else part(x)
        if hidden._pass is not None:
            watched.append(weakref.ref(hidden._pass.value))
        assert None not in [ref() for ref in watched]
        del x
        assert watched[0]() is not None  # the graph of y needs it
        del y
        assert [ref() for ref in watched] == [None] * len(watched)
        with torch.no_grad():
            x = data()
            part(x)
            value = None if hidden._pass is None else weakref.ref(hidden._pass.value)
            del x
            assert value is None or value() is None
        stack.layers[0](data(True))  # the result is dropped
        assert hidden._pass.value is None
    finally:
        gc.enable()


def test_a_model_deleted_in_mid_pass_is_gone():
    stack, x = Stack(), data(True) * 2
    y, watched = stack.layers[0](x), weakref.ref(x)
    assert stack.layers[0]._hidden._pass.value is not None
    del stack, x, y
    gc.collect()
    assert watched() is None


def test_copies_and_pickles_share_among_themselves(stack, products):
    x = data(True)
    stack.layers[0](x * 2)  # in mid-pass, with a graph that could not be copied
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        del products[:]
        expected = stack(x)
        assert len(products) == 1
        assert torch.equal(other(x), expected) and len(products) == 2
        with torch.no_grad():
            for p in other.decomposition.parameters():
                p.mul_(3)
        assert not torch.allclose(other(x), expected) and torch.equal(stack(x), expected)
        close(grads(other, x, lambda other=other: other(x).square().sum().backward()), expected_grads(other, x))


def test_threads_share_nothing(stack):
    """Two threads in one model, with the same x: neither frees the other's graph nor takes its value."""
    x, errors = data(), []

    def train():
        try:
            for _ in range(60):
                for layer, twin in zip(stack.layers, stack.twins):
                    torch.testing.assert_close(layer(x), twin(x), rtol=1e-13, atol=1e-13)
                stack(x).sum().backward()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=train) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors


def test_what_it_asks_torch_for():
    """Names without a promise: torch 2.11 and 2.13 have them."""
    assert per_pass._saved_tensor_hooks(True) is None and not per_pass.in_recomputation()
    seen = []

    def region(x):
        seen.append((per_pass._saved_tensor_hooks(True), per_pass.in_recomputation()))
        return x.sin()

    for use_reentrant in (False, True):
        checkpoint(region, data(True), use_reentrant=use_reentrant).sum().backward()
    (a, before), (b, again), reentrant, recomputed = seen
    assert a is not None and b is not None and a != b and not before and again
    assert reentrant == (None, False) and recomputed == (None, True)
