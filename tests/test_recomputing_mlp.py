"""MLPs that recompute what their activation would keep: which are found, when their own forward runs, what users see.

How much they keep, with the bits of the model's own: test_recomputed.py.
"""

import copy
import pickle
import warnings

import pytest
import torch
from kept_cases import WIDE, WIDTH, adapted, batch, gradients, kept, mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from peft_kernels import LoRA, LoRAConfig
from peft_kernels.adapters.mlps import mlp_parts
from peft_kernels.blocks.activations import ACTIVATIONS, activated, recomputed_activation
from peft_kernels.layers.mlp import RecomputingMlp


class Mlp(nn.Module):
    """Meta's and timm's way to write a gated MLP."""

    def __init__(self, act: nn.Module | None = None, drop: float = 0.0):
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(WIDTH, WIDE), nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH)
        self.act, self.drop, self.norm = act or nn.SiLU(), nn.Dropout(drop), nn.Identity()

    def forward(self, x):
        return self.w2(self.norm(self.drop(self.act(self.w1(x)) * self.w3(x))))


class UpFirst(Mlp):
    def forward(self, x):
        up = self.w3(x)
        return self.drop(self.w2(torch.mul(up, F.gelu(self.w1(x), approximate="tanh"))))


class NamedArgument(Mlp):
    def forward(self, x, scale=None):
        y = self.w2(self.act(self.w1(x)) * self.w3(x))
        return y if scale is None else y * scale


# ---- which are found ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, activation, first, gate, last",
    [
        ("blip", "gelu", ("fc1",), "fc1", "fc2"),
        ("vit", "gelu", ("fc1",), "fc1", "fc2"),
        ("siglip", "gelu_tanh", ("fc1",), "fc1", "fc2"),
        ("clip", "quick_gelu", ("fc1",), "fc1", "fc2"),
        ("llama", "silu", ("gate_proj", "up_proj"), "gate_proj", "down_proj"),
        ("qwen2", "silu", ("gate_proj", "up_proj"), "gate_proj", "down_proj"),
        ("gemma", "gelu_tanh", ("gate_proj", "up_proj"), "gate_proj", "down_proj"),
    ],
)
def test_mlps_of_transformers(kind, activation, first, gate, last):
    parts = mlp_parts(mlp(kind)[0])
    assert parts[:4] == (activation, first, gate, last) and parts.idle == ()


def test_mlps_of_others():
    module = Mlp()
    assert mlp_parts(module) == ("silu", ("w1", "w3"), "w1", "w2", ("act", module.act), ("drop", "norm"))
    assert mlp_parts(UpFirst()) == ("gelu_tanh", ("w3", "w1"), "w1", "w2", None, ("drop",))
    for each in (NamedArgument(), ByMethods()):
        assert mlp_parts(each)[:4] == ("silu", ("w1", "w3"), "w1", "w2")
    for name, each in {"gelu": nn.GELU(), "relu": nn.ReLU(), "gelu_tanh": nn.GELU("tanh")}.items():
        assert mlp_parts(Mlp(each)).activation == name


def forward_of(function) -> Mlp:
    return type("Other", (Mlp,), {"forward": function})()


def leave_something(self, x):
    self.gate = self.act(self.w1(x))
    return self.w2(self.gate * self.w3(x))


class ByMethods(Mlp):
    def gated(self, x):
        return self.act(self.w1(x)) * self.w3(x)

    def forward(self, x):
        return self.w2(self.gated(x))


class LeavesByMethod(ByMethods):
    def gated(self, x):
        self.seen = x
        return super().gated(x)


@pytest.mark.parametrize(
    "module",
    [
        Mlp(drop=0.1),
        Mlp(nn.Tanh()),
        Mlp(nn.LeakyReLU()),
        Mlp(nn.Sequential(nn.Linear(WIDE, WIDE), nn.SiLU())),
        Mlp(nn.PReLU()),
        forward_of(lambda self, x: x + self.w2(self.act(self.w1(x)) * self.w3(x))),
        forward_of(lambda self, x: self.w2(self.act(self.w1(x)) * self.w1(x))),
        forward_of(lambda self, x: self.w2(self.act(self.w1(x)) * self.act(self.w3(x)))),
        forward_of(lambda self, x: self.w2(self.act(self.w1(x))) * self.w3(x)),
        forward_of(lambda self, x: (self.w3(x), self.w2(self.act(self.w1(x))))[1]),
        forward_of(lambda self, x: self.w2(self.w1(x) * self.w3(x))),
        forward_of(lambda self, x: self.w2(F.silu(self.w1(x), inplace=True) * self.w3(x))),
        forward_of(lambda self, x, context: self.w2(self.act(self.w1(x)) * self.w3(context))),
        forward_of(lambda self, x: self.w2(self.act(self.w1(x)) * self.w3(x).detach())),
        forward_of(lambda self, x: self.w2(self.act(self.w1(x)) * self.w3(x * x))),
        forward_of(lambda self, x: self.w2(self.act(self.w1(x * x)) * self.w3(x))),
        forward_of(leave_something),
        LeavesByMethod(),
        forward_of(lambda self, x: super(Mlp, self).forward(x)),
        nn.Sequential(nn.Linear(WIDTH, WIDE), nn.GELU(), nn.Linear(WIDE, WIDTH)),
        nn.Linear(WIDTH, WIDTH),
    ],
)
def test_anything_else_is_left_alone(module):
    before, state = {**vars(module)}, torch.get_rng_state()
    assert mlp_parts(module) is None
    assert vars(module) == before and torch.equal(torch.get_rng_state(), state)


def test_a_forward_of_the_instance_is_left_alone():
    module = Mlp()
    module.forward = module.forward  # as hooks of accelerate leave it
    assert mlp_parts(module) is None


def test_only_where_an_adapter_stands_and_something_is_spared():
    model = nn.ModuleDict({"a": Mlp(), "b": Mlp(), "c": mlp("vit")[0]})
    adapter = LoRA.wrap(model, LoRAConfig(targets=["a.w3", "fc1", "fc2"]))
    assert [isinstance(each, RecomputingMlp) for each in model.values()] == [True, False, False]
    adapter.remove()
    assert [type(each) for each in model.values()][:2] == [Mlp, Mlp] and "recomputing" not in vars(model["a"])
    off = LoRA.wrap(model, LoRAConfig(targets=["w3"], recompute=False))
    assert type(model["a"]) is Mlp and off.config.recompute is False


# ---- the activation's node ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_of_any_order(name, count):
    hs = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    assert torch.autograd.gradcheck(lambda *hs: recomputed_activation(name, *hs), hs)
    assert torch.autograd.gradgradcheck(lambda *hs: recomputed_activation(name, *hs), hs)
    y, expected = recomputed_activation(name, *hs), activated(name, *hs)
    assert torch.equal(y, expected)
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), hs), torch.autograd.grad(expected.sum(), hs)))


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone(wanted):
    hs = [torch.randn(3, 4, requires_grad=place == wanted) for place in range(2)]
    (found,) = torch.autograd.grad(recomputed_activation("silu", *hs).sum(), hs[wanted])
    assert torch.equal(found, torch.autograd.grad(activated("silu", *hs).sum(), hs[wanted])[0])


# ---- the bits of the model's own forward, and when that runs --------------------------------------------------------


def pair(kind: str | type = Mlp, dropout: float = 0.2, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    """An adapted MLP that recomputes, and its twin that does not."""
    torch.manual_seed(0)
    base = mlp(kind)[0] if isinstance(kind, str) else kind()
    targets = {"targets": "w\\d|fc\\d", "rank": 4, "dropout": dropout}
    made = [copy.deepcopy(base).to(dtype) for _ in range(2)]
    for module, recompute in zip(made, (True, False)):
        adapter = LoRA.wrap(module, LoRAConfig(**targets, recompute=recompute))
        torch.manual_seed(1)
        for p in adapter.parameters():
            nn.init.normal_(p, std=0.3)
    assert [isinstance(each, RecomputingMlp) for each in made] == [True, False]
    return made


def found(module: nn.Module, x: torch.Tensor, run=None) -> list[torch.Tensor]:
    torch.manual_seed(5)
    y = module(x) if run is None else run(module, x)
    return [y, *gradients(module, x, y)]


def same(ours: nn.Module, stock: nn.Module, x: torch.Tensor, run=None) -> None:
    assert all(map(torch.equal, found(ours, x, run), found(stock, x, run)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [Mlp, UpFirst, "clip"])
def test_bits(kind, dtype):
    ours, stock = pair(kind, dtype=dtype)
    same(ours, stock, batch(dtype))
    assert sum(kept(ours(batch(dtype)), ours)) < sum(kept(stock(batch(dtype)), stock))
    with torch.no_grad():
        assert torch.equal(ours.eval()(batch(dtype)), stock.eval()(batch(dtype)))


def test_autocast_and_checkpointing():
    ours, stock = pair(), pair()
    with torch.autocast("cpu", torch.bfloat16):
        same(*ours, batch())
    same(*stock, batch(), lambda module, x: checkpoint(module, x, use_reentrant=False))


def ours_runs(monkeypatch) -> list:
    runs = []
    apply = recomputed_activation
    monkeypatch.setattr("peft_kernels.layers.mlp.recomputed_activation", lambda *a: runs.append(a[0]) or apply(*a))
    return runs


def test_what_a_user_changes_is_seen(monkeypatch):
    (ours, stock), runs = pair(), ours_runs(monkeypatch)
    same(ours, stock, batch())
    assert runs == ["silu"]
    for module in ours, stock:
        module.act = nn.GELU()
    same(ours, stock, batch())
    for module in ours, stock:
        module.drop.p = 0.4
    same(ours, stock, batch())
    ours, stock = pair()
    for module in ours, stock:
        module.act.register_forward_hook(lambda module, args, a: a * 2)
    same(ours, stock, batch())
    ours, stock = pair()
    for module in ours, stock:
        module.norm.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    same(ours, stock, batch())
    assert runs == ["silu"]


def test_hooks_on_layers_are_run(monkeypatch):
    (ours, stock), runs = pair(), ours_runs(monkeypatch)
    for module in ours, stock:
        module.w3.register_forward_hook(lambda module, args, y: y * 2)
        module.w2.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        module.register_forward_hook(lambda module, args, y: y - 1)
    same(ours, stock, batch())
    assert runs == ["silu"]


def test_layers_of_two_dtypes():
    ours, stock = pair()
    for module in ours, stock:
        module.w3.register_forward_hook(lambda module, args, y: y.double())
        module.w2.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    same(ours, stock, batch())


def test_where_its_own_forward_runs(monkeypatch):
    (ours, stock), runs = pair(NamedArgument, dropout=0.0), ours_runs(monkeypatch)
    x = batch()
    assert torch.equal(ours(x, scale=2.0), stock(x, scale=2.0)) and torch.equal(ours(x=x), stock(x=x))
    assert torch.equal(ours(x, 3.0), stock(x, 3.0))
    with torch.inference_mode():
        assert torch.equal(ours(x), stock(x))
    grads = [torch.func.grad(lambda x, each=each: each(x).square().sum())(x.detach()) for each in (ours, stock)]
    torch.testing.assert_close(*grads)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), stock(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that sizes are tensors then
        traced = torch.jit.trace(ours, x.detach(), check_trace=False)
    torch.testing.assert_close(traced(x), stock(x))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        ours(x)
    finally:
        handle.remove()
    assert runs == []
    ours(x)
    assert runs == ["silu"]


# ---- what users see -------------------------------------------------------------------------------------------------


def test_classes_names_copies_and_pickles(tmp_path):
    ours, stock = pair()
    assert isinstance(ours, Mlp) and type(ours).__name__ == "Mlp" and repr(ours) == repr(stock)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    torch.save(ours, tmp_path / "whole.pt")
    twins = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.copy(ours)]
    for twin in (*twins, torch.load(tmp_path / "whole.pt", weights_only=False)):
        assert type(twin) is type(ours)
        assert twin._recomputes()  # with an activation of its own, which it knows
        same(twin, stock, batch())
    twins[0].act = nn.GELU()
    assert not twins[0]._recomputes() and ours._recomputes()


@pytest.mark.parametrize("kind", ["clip", "llama"])
def test_accelerate_and_restore(kind):
    pytest.importorskip("peft", minversion="0.21")
    from peft_kernels.integrations.peft import accelerate, restore

    module = adapted(mlp(kind)[0], "peft")
    model = nn.ModuleDict({"mlp": module})
    stock = type(mlp(kind)[0])
    assert isinstance(module, RecomputingMlp) and isinstance(module, stock)
    expected = found(module, batch())
    accelerate(model, recompute=False)
    assert type(module) is stock
    accelerate(model)
    accelerate(model)
    assert isinstance(module, RecomputingMlp) and all(map(torch.equal, found(module, batch()), expected))
    restore(model)
    assert type(module) is stock
