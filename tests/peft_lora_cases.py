"""Pairs of PEFT models with the same weights: one as PEFT built it, one with fused LoRA linears."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft", minversion="0.21")  # whoever imports this is skipped without

from transformers.pytorch_utils import Conv1D  # noqa: E402

from peft_kernels.integrations.peft import FusedLinear, accelerate, fast, fused_linear  # noqa: E402
from peft_kernels.layers import group  # noqa: E402

ROUTES = ("accelerate", "fast")
TWO = {"a": {}, "b": {"r": 2, "lora_alpha": 5}}  # adapters of a layer
EXACT = {"rtol": 1e-12, "atol": 1e-13}  # in float64


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """[layers in lowrank_linear or lowrank_projections, calls of batched_lowrank_linear].

    A fallback that nobody notices shows there.
    """
    count = [0, 0]

    def counted(index, function):
        def call(x, weight, *args, **kwargs):
            count[index] += 1 if isinstance(weight, Tensor) else len(weight)
            return function(x, weight, *args, **kwargs)

        return call

    for index, module, name in (
        (0, fused_linear, "lowrank_linear"),
        (0, group, "lowrank_projections"),
        (1, fused_linear, "batched_lowrank_linear"),
    ):
        monkeypatch.setattr(module, name, counted(index, getattr(module, name)))
    return count


class Net(nn.Module):
    """Linears with and without bias, an embedding, a convolution, a Conv1D of transformers, attention, a head."""

    def __init__(self):
        super().__init__()
        self.words, self.conv = nn.Embedding(11, 8), nn.Conv1d(8, 8, 1)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 10, bias=False)
        self.turned, self.mha = Conv1D(8, 10), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.drop = nn.Dropout(0.0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.words(ids).transpose(1, 2)).transpose(1, 2)
        x = self.second(torch.tanh(self.first(self.drop(x))))
        x = self.turned(x)
        return self.head(x + self.mha(x, x, x, need_weights=False)[0])


def base(dtype: torch.dtype = torch.float64, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype).eval()


def ids() -> Tensor:
    return torch.arange(12).remainder(11).view(3, 4)


@torch.no_grad()
def stir(model: nn.Module) -> nn.Module:
    """Values that show in everything of PEFT's, the same for the same names."""
    for index, (name, p) in enumerate(sorted(model.named_parameters())):
        if "lora_" in name or "modules_to_save" in name:
            generator = torch.Generator().manual_seed(index)
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    return model


def stock(dtype: torch.dtype = torch.float64, **config) -> peft.PeftModel:
    return stir(wrapped(base(dtype), peft.LoraConfig(**{"target_modules": ["first", "second"], "r": 3, **config})))


def wrapped(model: nn.Module, config: peft.LoraConfig) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's word about fan_in_fan_out
        return peft.get_peft_model(model, config).eval()


def pair(dtype: torch.dtype = torch.float64, route: str = "accelerate", **config):
    """(as PEFT built it, fused), with the same weights."""
    theirs = stock(dtype, **config)
    if route == "accelerate":
        ours = stock(dtype, **config)
        accelerate(ours)
        return theirs, ours
    config = peft.LoraConfig(**{"target_modules": ["first", "second"], "r": 3, **config})
    return theirs, stir(wrapped(base(dtype), fast(config)))


def fused(model: nn.Module) -> list[str]:
    return [name.removeprefix("base_model.model.") for name, m in model.named_modules() if type(m) is FusedLinear]


def layers(dtype: torch.dtype = torch.float64, adapters: dict | None = None, **config):
    """(stock layer, fused layer) of 6 → 5 features, each with its adapters: name -> LoraConfig's options."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"x": nn.Linear(6, 5, dtype=dtype)})
    config = {"target_modules": ["x"], "r": 3, **config}
    for name, options in (adapters or {"default": {}}).items():
        merged = peft.LoraConfig(**{**config, **options})
        model = peft.PeftModel(model, merged, name) if not isinstance(model, peft.PeftModel) else model
        if name not in model.peft_config:
            model.add_adapter(name, merged)
    stir(model).eval()
    ours = copy.deepcopy(model)
    accelerate(ours)
    return model.base_model.model["x"], ours.base_model.model["x"]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def both(theirs: nn.Module, ours: nn.Module, x: Tensor, **tolerance) -> None:
    """The same output, and the same gradients of everything that trains and of the input."""
    results = []
    for model in (theirs, ours):
        given = x.detach().clone().requires_grad_(x.is_floating_point())
        y = model(given)
        generator = torch.Generator().manual_seed(1)
        y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype))
        results.append((y.detach(), given.grad, gradients(model)))
        model.zero_grad()
    (y, dx, grads), (our_y, our_dx, our_grads) = results
    assert our_y.dtype == y.dtype and our_grads.keys() == grads.keys() and grads
    torch.testing.assert_close(our_y, y, **tolerance)
    torch.testing.assert_close(our_dx, dx, **tolerance)
    for name in grads:
        torch.testing.assert_close(our_grads[name], grads[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def change(module: nn.Module, **attributes) -> None:
    for name, value in attributes.items():
        setattr(module, name, value)
