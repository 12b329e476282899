"""A layer behind an activation keeps what the activation keeps anyway: which bytes and bits, and when it does not."""

import copy
import pickle

import pytest
import torch
from kept_cases import GATED, KINDS, RANK, ROWS, WIDE, WIDTH, adapted, batch, gradients, kept, mlp
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from peft_kernels import LoRA, LoRAConfig, lowrank_linear
from peft_kernels.blocks.activations import recomputed_activation
from peft_kernels.layers import LowRankLinear
from peft_kernels.recomputed import recipe_of

FLOAT = 4

# ---- whole MLPs of models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("how", ["lora", "peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_bits(kind, how, dropout):
    base, widths = mlp(kind)
    ours, other = (adapted(copy.deepcopy(base), how, dropout, recompute) for recompute in (True, False))
    results = []
    for model in (ours, other):
        x = batch()
        torch.manual_seed(5)
        y = model(x)
        results.append([kept(y, model), y, *gradients(model, x, y)])
    (our_bytes, *our_values), (other_bytes, *other_values) = results
    assert all(map(torch.equal, our_values, other_values))
    firsts = 2 if kind in GATED else 1  # gate and up are one call, with one z
    columns = [WIDTH, firsts * RANK, *widths, RANK]
    masks = [ROWS * WIDTH * firsts, ROWS * WIDE] if dropout else []
    assert our_bytes == sorted([*(ROWS * FLOAT * width for width in columns), *masks])
    more = 2 if kind in ("clip", *GATED) else 1  # what fc2 reads, and a factor of it: σ or act(g)
    assert other_bytes == sorted([*our_bytes, *[ROWS * FLOAT * WIDE] * more])


# ---- one layer behind an activation ---------------------------------------------------------------------------------

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu, tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "silu, module": nn.SiLU(),
    "gated": lambda h: F.silu(h) * (h + 1),
    "square": lambda h: h * h,
}
KEPT_ITSELF = {
    "relu": F.relu,  # keeps its result, which is the layer's input
    "silu, in place": lambda h: F.silu(h + 0, inplace=True),
    "times a number": lambda h: F.gelu(h) * 2,
    "times a vector": lambda h: F.gelu(h) * torch.linspace(0, 1, WIDE, requires_grad=True),
    "times a constant": lambda h: F.gelu(h) * torch.linspace(0, 1, ROWS * WIDE).view(ROWS, WIDE),
    "two dtypes": lambda h: F.gelu(h.bfloat16()) * h,
    "dropout": lambda h: F.dropout(F.gelu(h), 0.5),
    "another view": lambda h: F.gelu(h).view(2, ROWS // 2, WIDE),
    "its own": torch.tanh,
}


def layer(**options) -> LowRankLinear:
    torch.manual_seed(0)
    made = LowRankLinear(nn.Linear(WIDE, WIDTH), RANK, **options)
    nn.init.normal_(made.up)
    return made


def hidden(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """h, no leaf"""
    return torch.randn(ROWS, WIDE, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_() * 1


def holds(y: torch.Tensor, a: torch.Tensor) -> bool:
    """Does y's own node keep a?"""
    return any(t is not None and t.data_ptr() == a.data_ptr() for t in y.grad_fn.saved_tensors)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_made_anew(name):
    own, a = layer(), ACTIVATIONS[name](hidden())
    make, of = recipe_of(a)
    with torch.no_grad():
        again = make(*of)
    assert torch.equal(again, a) and again.stride() == a.stride()
    assert not holds(own(a), a)


@pytest.mark.parametrize("name", KEPT_ITSELF)
def test_kept_itself(name):
    a = KEPT_ITSELF[name](hidden())
    assert recipe_of(a) is None and holds(layer()(a), a)


@pytest.mark.parametrize("options", [{"dropout_p": 0.3}, {"dropout_p": 0.3, "dropout_on": "rank"}, {"freeze": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_bit_changes(dtype, options):
    found = []
    for recompute in (True, False):
        own, h = layer(**options).to(dtype), hidden(dtype)
        own.recompute = recompute
        a = F.gelu(h)
        torch.manual_seed(1)
        y = own(a)
        assert holds(y, a) is not recompute
        wanted = [h, own.up, own.down] + [own.weight, own.bias] * ("freeze" in options)
        found.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    assert all(map(torch.equal, *found))


def test_a_layer_whose_input_has_strides_of_its_own():
    """As what one linear for gate and up gives is cut in two."""
    found = []
    for recompute in (True, False):
        own, both = layer(), torch.randn(ROWS, 2 * WIDE, generator=torch.Generator().manual_seed(4)).requires_grad_()
        own.recompute = recompute
        gate, up = (both * 1).chunk(2, -1)
        y = own(F.silu(gate.t()).t() * up)
        found.append([y, *torch.autograd.grad(y.square().sum(), [both, own.down])])
    assert all(map(torch.equal, *found))


def test_the_operation_does_it_when_asked():
    own, a = layer(), F.gelu(hidden())
    for recompute in (True, False):
        y = lowrank_linear(a, own.weight, own.bias, own.down, own.up, recompute=recompute)
        assert holds(y, a) is not recompute
    assert holds(lowrank_linear(a, own.weight, own.bias, own.down, own.up), a)


# ---- when it must leave things as they are --------------------------------------------------------------------------


def test_nothing_is_read_where_no_gradient_needs_it():
    own, a = layer(), F.gelu(hidden())
    own.down.requires_grad_(False)
    y = own(a)
    assert not any(t is not None and t.shape == a.shape for t in y.grad_fn.saved_tensors)
    own.down.requires_grad_(True)
    for around in (torch.no_grad, torch.inference_mode):
        with around():
            assert recipe_of(F.gelu(torch.randn(2, WIDE))) is None
    with torch.no_grad():
        assert recipe_of(a) is None
    assert recipe_of(torch.randn(2, WIDE)) is None and recipe_of(torch.randn(2, WIDE, requires_grad=True)) is None
    assert recipe_of(a.detach()) is None and recipe_of(nn.Parameter(a.detach())) is None


def hooks(log: list):
    return saved_tensors_hooks(lambda t: (log.append("pack"), t)[1], lambda t: (log.append("unpack"), t)[1])


def test_hooks_are_not_run_by_a_forward():
    """Hooks that are on now, and hooks that were on when the activation ran, as of a region that has ended."""
    own, log = layer(), []
    with hooks(log):
        a = F.gelu(hidden())
        y = own(a)
        assert holds(y, a) and "unpack" in log  # by `holds`
    log.clear()
    assert recipe_of(a) is None and recipe_of(F.gelu(hidden())) is not None and log == []
    b = F.gelu(hidden())
    with hooks(log):
        assert recipe_of(b) is None and log == []
    with hooks(log):
        gate, up = F.silu(hidden()), hidden() + 1
        c, d = gate * up, recomputed_activation("silu", gate, up)
    log.clear()
    assert recipe_of(c) is None is recipe_of(d) and log == []


class Counted:
    def __init__(self, linear: nn.Module):
        self.linear, self.calls = linear, 0

    def __call__(self, x):
        self.calls += 1
        return F.gelu(self.linear(x))


@pytest.mark.parametrize("how", ["hooks", "reentrant", "not reentrant", "region that ends before", "on the CPU"])
def test_checkpointing_and_offloading(how):
    base, _ = mlp("vit")
    found = []
    for recompute in (True, False):
        model = adapted(copy.deepcopy(base), "lora", 0.2, recompute)
        x = batch()
        torch.manual_seed(5)
        if how == "hooks":
            with hooks([]):
                y = model(x)
        elif how == "on the CPU":
            with save_on_cpu():
                y = model(x)
        elif how == "region that ends before":
            before = Counted(model.fc1)
            a = checkpoint(before, x, use_reentrant=False)
            assert recipe_of(a) is None and before.calls == 1
            y = model.fc2(a)
            assert before.calls == 1
        else:
            y = checkpoint(model, x, use_reentrant=how == "reentrant")
        trained = [p for p in model.parameters() if p.requires_grad]
        y.square().sum().backward()  # reentrant checkpointing knows no torch.autograd.grad
        found.append([y.detach(), x.grad, *(p.grad for p in trained)])
    assert all(map(torch.equal, *found))


def test_a_changed_activation_is_kept_itself():
    """In place before the layer: what the node keeps is not what it was made of any more."""
    found = []
    for recompute in (True, False):
        own, h = layer(), hidden()
        own.recompute = recompute
        a = F.gelu(h)
        with torch.no_grad():
            a.mul_(2)
        y = own(a)
        assert holds(y, a)
        found.append([y, *torch.autograd.grad(y.sum(), [own.down, own.up])])
    assert all(map(torch.equal, *found))


def test_a_changed_h_is_not_read():
    """In place before the layer, autograd says so in the backward, as without us, and only where it matters."""
    own, h = layer(), hidden()
    a = F.gelu(h)
    h.mul_(2)
    y = own(a)
    assert holds(y, a)
    torch.autograd.grad(y.sum(), [own.down], retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_changes_after_the_layer():
    """h: autograd says so. a itself: no matter, it is made anew, where a layer that kept it would have to refuse."""
    own, h = layer(), hidden()
    y = own(F.gelu(h))
    h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), [own.down])
    a = F.gelu(hidden())
    expected = torch.autograd.grad(own(a).sum(), [own.down], retain_graph=True)
    y = own(a)
    a.mul_(2)
    assert torch.equal(torch.autograd.grad(y.sum(), [own.down])[0], expected[0])


def test_a_graph_that_a_backward_has_freed():
    own, a = layer(), F.gelu(hidden())
    a.sum().backward()
    y = own(a)
    assert holds(y, a)
    torch.autograd.grad(y.sum(), [own.down])


def test_a_backward_that_is_run_twice():
    own, a = layer(), F.gelu(hidden())
    y = own(a).sum()
    first, second = (torch.autograd.grad(y, [own.down], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(y, [own.down], create_graph=True)
    torch.autograd.grad(y, [own.down])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, [own.down])


@pytest.mark.parametrize("inner", [torch.float32, torch.bfloat16])
def test_autocast(inner):
    """What autocast casts is no activation's result; what it gave to the activation already is one."""
    found = []
    for recompute in (True, False):
        own, h = layer(), hidden(inner)
        own.recompute = recompute
        with torch.autocast("cpu", torch.bfloat16):
            a = F.gelu(h)
            y = own(a)
        if inner == torch.bfloat16:
            assert holds(y, a) is not recompute
        else:
            assert any(
                t is not None and t.shape == a.shape and t.dtype == torch.bfloat16 for t in y.grad_fn.saved_tensors
            )
        found.append([y, *torch.autograd.grad(y.float().sum(), [own.down, own.up])])
        with torch.autocast("cpu", torch.bfloat16):  # a backward inside, too
            y = own(F.silu(h) * h)
            found[-1] += torch.autograd.grad(y.float().sum(), [own.down, own.up])
    assert all(map(torch.equal, *found))


def test_torch_func_and_compiled_graphs():
    own, h = layer(), hidden().detach()

    def loss(down, h):
        return lowrank_linear(F.gelu(h), own.weight, own.bias, down, own.up, recompute=True).square().sum()

    expected = torch.func.grad(loss)(own.down.detach(), h)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    own.down.requires_grad_(True)
    grad = torch.autograd.grad(compiled(own.down, h.requires_grad_()), own.down)[0]
    torch.testing.assert_close(grad, expected)


def test_subclasses_are_left_alone():
    class Own(torch.Tensor):
        pass

    assert recipe_of(F.gelu(hidden().as_subclass(Own))) is None


# ---- what users see -------------------------------------------------------------------------------------------------


def test_copies_pickles_and_files(tmp_path):
    base, _ = mlp("vit")
    models = [copy.deepcopy(base) for _ in range(2)]
    wrapped = [LoRA.wrap(m, LoRAConfig(targets=["fc1", "fc2"], recompute=on)) for m, on in zip(models, (True, False))]
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    for folder, adapter in zip("ab", wrapped):
        torch.manual_seed(0)
        for each in adapter.layers.values():
            each.reset_adapter()
        adapter.save_pretrained(tmp_path / folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):  # how it runs is not what it is
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    for on in (True, False):
        back = LoRA.from_pretrained(copy.deepcopy(base), tmp_path / "a", recompute=on)
        assert back.config.recompute is on and all(each.recompute is on for each in back.layers.values())
    for model in models:
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            x = batch()
            assert twin.fc2.recompute is model.fc2.recompute
            assert all(map(torch.equal, gradients(twin, x, twin(x)), gradients(model, x, model(x))))


def test_accelerate_and_restore():
    peft = pytest.importorskip("peft", minversion="0.21")
    from peft_kernels.integrations.peft import accelerate, fast, restore

    config = peft.LoraConfig(r=RANK, target_modules=["fc1", "fc2"])
    model = peft.get_peft_model(mlp("vit")[0], fast(config))
    layers = [model.base_model.model.fc1, model.base_model.model.fc2]
    assert all(each.recompute for each in layers)
    for on in (False, True, False):
        accelerate(model, recompute=on)
        assert all(each.recompute is on for each in layers)
    restore(model)
    assert not any(hasattr(each, "recompute") for each in layers)
