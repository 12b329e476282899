"""torch.compile around whole models with each adapter: one graph, eager's numbers, and no compilation too many.

ViLT draws and counts its patches by their values, which no compiler traces: there the encoder is compiled, not the
embeddings, as one does without an adapter.
"""

from unittest import mock

import adapter_models
import pytest
import torch
from torch._dynamo import lookup_backend

from peft_kernels import Aurora, AuroraConfig, LoRA, LoRAConfig, MoIL, MoILConfig
from peft_kernels.ops import lowrank_linear

METHODS = {  # without groups, which compiled graphs have none of, and whose masks are drawn together
    "LoRA": lambda model, preset: LoRA.wrap(model, LoRAConfig(preset=preset, rank=4, dropout=0.1, group=False)),
    "Aurora": lambda model, preset: Aurora.wrap(model, AuroraConfig(preset=preset, rank=4, group=False)),
    "MoIL": lambda model, preset: MoIL.wrap(model, MoILConfig(preset=preset, rank=4, transform_rank=4)),
}
PRESETS = {("blip_retrieval", "Aurora"): "blip-retrieval"}  # with gates
KINDS = ("blip_retrieval", "vilt_vqa")
EVERY = [(kind, method) for kind in KINDS for method in METHODS]
CHOSEN = [("blip_retrieval", "Aurora"), ("vilt_vqa", "LoRA"), ("vilt_vqa", "MoIL")]  # each of both, and the gates, once


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def wrapped(kind, method):
    """(model in training mode with drawn adapters, adapter)"""
    options = {"layers": 1} if kind.startswith("blip") else {"num_hidden_layers": 1}
    model, _ = adapter_models.build(kind, **options)
    adapter = METHODS[method](model, PRESETS.get((kind, method), adapter_models.PRESET[kind]))
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():  # as wrapped, much is zero
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train(), adapter


def batch_of(kind, count, tokens):
    ids = torch.randint(5, 40, (count, tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(count, 3, 32, 32)}
    return batch | ({"labels": torch.eye(4)[torch.arange(count) % 4]} if kind == "vilt_vqa" else {})


def compiled(model, kind, backend):
    """The step's forward, with as much of the model in one graph as can be."""
    if kind == "vilt_vqa":
        encoder = model.vilt.encoder
        encoder.forward = torch.compile(encoder.forward, fullgraph=True, backend=backend)
        return model
    return torch.compile(model, fullgraph=True, backend=backend)


def gradients(run, kind, adapter, batch):
    torch.manual_seed(1)  # masks of dropout, ViLT's order of patches
    result = run(**batch)
    loss = result.loss if kind == "vilt_vqa" else result[0].square().mean()
    found = torch.autograd.grad(loss, [p for _, p in adapter.named_parameters() if p.requires_grad], allow_unused=True)
    return loss.detach(), found


def eager_gradients(model, kind, adapter, batch):
    """With the masks that a compiled call draws."""
    with mock.patch.object(lowrank_linear, "draw", drawn_as_compiled):
        return gradients(model, kind, adapter, batch)


def drawn_as_compiled(*arguments, draw=lowrank_linear.draw):
    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        return draw(*arguments)


def assert_close(found, expected, rtol, atol):
    """Losses to torch's own tolerance, gradients to this one."""
    torch.testing.assert_close(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("kind", "method"), CHOSEN)
def test_one_graph_with_eager_s_numbers_one_more_for_other_sizes_and_none_for_numbers(kind, method):
    model, adapter = wrapped(kind, method)
    graphs = []

    def backend(graph, inputs):  # autograd's part of the second takes longer than all else, and is tested by operation
        graphs.append(graph)
        return lookup_backend("aot_eager" if len(graphs) == 1 else "eager")(graph, inputs)

    batch = batch_of(kind, 3, 7)
    expected = eager_gradients(model, kind, adapter, batch)
    assert sum(grad is not None and bool(grad.any()) for grad in expected[1]) > 4
    run = compiled(model, kind, backend)
    assert_close(gradients(run, kind, adapter, batch), expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1

    def count(batch, tokens):
        gradients(run, kind, adapter, batch_of(kind, batch, tokens))
        return len(graphs)

    assert [count(2, 9), count(4, 9), count(2, 11), count(5, 8)] == [2, 2, 2, 2]
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.mul_(1.01)
    if isinstance(adapter, MoIL):
        for _, parameter in adapter.named_parameters("live"):
            parameter.grad = torch.ones_like(parameter)
        adapter.step()
        adapter.step()
    else:
        for layer in adapter.layers.values():
            layer.set_scale(0.37)
    assert count(3, 8) == 2


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("blip_retrieval", None), ("vilt_vqa", None), ("vilt_vqa", "aot_eager")],
    ids=["blip_retrieval-eager", "vilt_vqa-eager", "vilt_vqa-compiled"],
)
def test_checkpointing_draws_the_same_masks(kind, backend):
    batch, found = batch_of(kind, 3, 7), []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model, adapter = wrapped(kind, "LoRA")
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.disable_input_require_grads()  # or BLIP's frozen embeddings are changed in place: README, Limits
        losses = []
        for p in (0.0, 0.1):
            for layer in adapter.layers.values():
                layer.dropout_p = p
            losses.append(gradients(model, kind, adapter, batch)[0])
        assert not torch.equal(*losses)  # there is something to draw again
        torch._dynamo.reset()
        found.append(gradients(compiled(model, kind, backend) if backend else model, kind, adapter, batch))
    (loss, grads), (again, others) = found
    assert torch.equal(loss, again) and all(
        grad is other is None or torch.equal(grad, other) for grad, other in zip(grads, others, strict=True)
    )


@pytest.mark.parametrize(("kind", "method"), EVERY)
def test_checkpointing_gives_the_same_gradients(kind, method):
    found = []
    batch = batch_of(kind, 3, 7)
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model, adapter = wrapped(kind, method)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.disable_input_require_grads()
        found.append(gradients(model, kind, adapter, batch))
    assert_close(*found, rtol=1e-5, atol=1e-7)  # factors that layers share are summed in another order
