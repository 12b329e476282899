"""Adapters on the tiny models of adapter_models: each method's configuration there, and values that show."""

import torch
from adapter_models import PRESET, build
from torch import nn

from peft_kernels.adapters import (
    Adapter,
    AdapterConfig,
    Aurora,
    AuroraConfig,
    FullTuning,
    FullTuningConfig,
    LoRA,
    LoRAConfig,
    MoIL,
    MoILConfig,
    UniAdapter,
    UniAdapterConfig,
)

METHODS: dict[str, tuple[type[Adapter], type[AdapterConfig], dict]] = {
    "lora": (LoRA, LoRAConfig, {"rank": 3, "alpha": 5}),
    "moil": (MoIL, MoILConfig, {"rank": 3, "transform_rank": 2}),
    "aurora": (Aurora, AuroraConfig, {"rank": 3, "dropout": 0.0}),
    "uniadapter": (UniAdapter, UniAdapterConfig, {"rank": 3}),
    "full": (FullTuning, FullTuningConfig, {}),
}
MERGING = ("lora", "moil", "aurora")
ACTIONS = ("merge", "save_pretrained", "export_lora")


def config(method: str, kind: str | None = None, **options) -> AdapterConfig:
    """kind: of the model, for its preset, unless options say what is adapted"""
    _, config_class, sizes = METHODS[method]
    if kind is not None and "targets" not in options and method != "full":
        options = {"preset": PRESET[kind], **options}
    return config_class(**{**sizes, **options})


def wrap(method: str, model: nn.Module, kind: str | None = None, **options) -> Adapter:
    return METHODS[method][0].wrap(model, config(method, kind, **options))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.value, self.norm = nn.Linear(32, 32), nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, x):
        return self.norm(self.query(x) * self.value(x))


def small(method: str, model: nn.Module | None = None) -> Adapter:
    return wrap(method, Small() if model is None else model, targets=["query", "value"])


def act(adapter: Adapter, action: str, folder) -> None:
    """One of `ACTIONS`, in a folder if it takes one."""
    getattr(adapter, action)(*[folder] * (action in ("save_pretrained", "export_lora")))


@torch.no_grad()
def stir(adapter: Adapter, seed: int = 1) -> None:
    """Random values in everything that an adapter owns: heads and their buffers, live weights and teachers, too."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor))


def adapted(method: str, kind: str, dtype: torch.dtype = torch.float32, **options) -> tuple[Adapter, dict]:
    """(adapter on a new model, with values that show, batch)"""
    model, batch = build(kind, dtype)
    adapter = wrap(method, model, kind, **options)
    stir(adapter)
    return adapter, batch


def snapshot(model: nn.Module) -> tuple:
    """What an operation that fails must leave as it was: state, modules, requires_grad, hooks and modes."""
    modules = {
        name: (module, module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    return modules, state, parameters, set(vars(model))


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    modules, state, parameters, attributes = snapshot(model)
    assert attributes == before[3]
    assert modules.keys() == before[0].keys()
    assert all(now[0] is then[0] and now[1:] == then[1:] for now, then in zip(modules.values(), before[0].values()))
    assert state.keys() == before[1].keys()
    assert all(torch.equal(state[name], before[1][name]) for name in state)
    assert parameters.keys() == before[2].keys()
    assert all(p is before[2][name][0] and on == before[2][name][1] for name, (p, on) in parameters.items())
