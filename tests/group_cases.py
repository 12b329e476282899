"""A small attention whose layers an adapter runs as one call, beside the same one without groups."""

import pytest
import torch
from torch import Tensor, nn

from peft_kernels import Aurora, AuroraConfig, LoRA, LoRAConfig, MoIL, MoILConfig
from peft_kernels.layers import adapted_linear, group, imitation_linear

NAMES = ("query", "key", "value", "output")
D, RANK = 8, 3


class Attention(nn.Module):
    """query, key, value of x, and output, which reads what the query gives."""

    def __init__(self):
        super().__init__()
        for name in NAMES:
            self.add_module(name, nn.Linear(D, D, bias=name != "key", dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        query, key, value = self.query(x), self.key(x), self.value(x)
        return query, key, value, self.output(torch.tanh(query))


class Crossing(nn.Module):
    """The same where keys and values are of another tensor."""

    def __init__(self):
        super().__init__()
        self.crossattention = Attention()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        inner, context = self.crossattention, x * 2
        query, key, value = inner.query(x), inner.key(context), inner.value(context)
        return query, key, value, inner.output(torch.tanh(query))


def make(
    kind: str, dropout: float = 0.0, *, group: bool = True, crossing: bool = False, stack: bool = False
) -> nn.Module:
    """The adapted model, in training but for MoIL's student; the same numbers whatever `group` is."""
    torch.manual_seed(0)
    model = Crossing() if crossing else Attention()
    targets = list(NAMES)
    if kind == "peft":
        peft = pytest.importorskip("peft", minversion="0.21")
        from peft_kernels.integrations.peft import accelerate

        config = peft.LoraConfig(r=RANK, lora_dropout=dropout, target_modules=targets)
        wrapped = peft.get_peft_model(model, config)
        accelerate(wrapped, group=group, stack=stack)
        model, named = wrapped.get_base_model(), wrapped.named_parameters()
    else:
        method, config = {
            "lora": (LoRA, lambda **options: LoRAConfig(rank=RANK, dropout=dropout, **options)),
            "aurora": (Aurora, lambda **options: AuroraConfig(rank=RANK, dropout=dropout, **options)),
            "moil": (MoIL, lambda **options: MoILConfig(rank=RANK, transform_rank=2, **options)),
        }[kind]
        adapter = method.wrap(model, config(targets=targets, group=group, stack=stack))
        named = adapter.named_parameters("adapter")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in named:
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
    return model.train(kind != "moil")


def gradients(model: nn.Module, seed: int = 0, run=None, used: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    """Outputs and gradients of a loss of the outputs named in `used`.  run: what calls the model"""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, D, generator=generator, dtype=torch.float64, requires_grad=True)
    model.zero_grad()
    torch.manual_seed(seed)
    ys = dict(zip(NAMES, model(x) if run is None else run(model, x)))
    sum((place + 1) * ys[name].square().sum() for place, name in enumerate(used)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**{name: y.detach() for name, y in ys.items()}, "x": x.grad, **found}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-13, msg=name)


def calls_of(monkeypatch: pytest.MonkeyPatch) -> dict:
    """together: the number of members of each call of a group;  alone: how many layers ran by themselves"""
    calls = {"together": [], "alone": 0}

    def counted(module, name, note):
        function = getattr(module, name)

        def call(x, weights, *args, **kwargs):
            note(weights)
            return function(x, weights, *args, **kwargs)

        monkeypatch.setattr(module, name, call)

    def alone(_):
        calls["alone"] += 1

    counted(group, "lowrank_projections", lambda weights: calls["together"].append(len(weights)))
    modules = [adapted_linear, imitation_linear]
    try:
        from peft_kernels.integrations.peft import fused_linear
    except ImportError:
        pass
    else:
        modules.append(fused_linear)
    for module in modules:
        counted(module, "lowrank_linear", alone)
    return calls
