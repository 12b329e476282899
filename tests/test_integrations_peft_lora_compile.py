"""torch.compile on fused layers: a full graph, forward and backward, that no change of a factor compiles anew."""

import pytest
import torch
from peft_lora_cases import layers, peft
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from peft_kernels.integrations.peft import accelerate


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(layer: nn.Module, x: torch.Tensor, compiled=None) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    factors = [p for p in layer.parameters() if p.requires_grad]
    y = layer(x) if compiled is None else compiled(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *factors])]


def test_one_graph_for_every_scale_and_weight():
    _, ours = layers(torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for step, rows in enumerate((4, 7, 9)):
        for change in (
            lambda step: ours.set_scale("default", 1.0 + step),
            lambda step: ours.scale_layer(0.5),
            lambda step: setattr(ours, "scaling", {"default": 3.0 + step}),  # as peft.helpers.rescale_adapter_scale
            lambda step: nn.init.normal_(ours.lora_B["default"].weight),
        ):
            change(step)
            x = torch.randn(rows, 6)
            torch.testing.assert_close(gradients(ours, x, compiled), gradients(ours, x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2  # the second number of rows made it dynamic


def test_whole_model_with_dropout_and_the_fallback():
    class Tall(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 6)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    torch.manual_seed(0)
    model = peft.get_peft_model(Tall(), peft.LoraConfig(target_modules=["first", "second"], r=2, lora_dropout=0.5))
    assert len(accelerate(model).swapped) == 2
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 6)
    assert compiled.train()(x).shape == (5, 6)
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))
    with model.disable_adapter():
        torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x), model(x))


def test_hot_swapped_scales_are_used_as_they_are():
    """PEFT's own way to keep a graph: a tensor in `scaling`, filled with the next adapter's factor."""
    _, ours = layers(torch.float32)
    ours.scaling["default"] = own = torch.tensor(2.0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    x = torch.randn(4, 6)
    before = compiled(x)
    own.fill_(5.0)
    assert not torch.allclose(compiled(x), before) and counter.frame_count == 1
    torch.testing.assert_close(compiled(x), ours(x))
