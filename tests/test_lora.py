"""LoRA means what it means in peft: outputs, gradients, training, and checkpoints in both directions."""

import json
import warnings

import pytest
import torch
from adapter_cases import MERGING, adapted, stir
from adapter_models import build, loss, output
from torch import nn

from peft_kernels.adapters import LoRA, LoRAConfig

peft = pytest.importorskip("peft")

STOCK = {
    "plain": {"r": 4, "lora_alpha": 7},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 7,
        "rank_pattern": {"layer.1.attention.attention.query": 2, "value": 5},
        "alpha_pattern": {r"layer.\d.attention.attention.value": 3},
    },
    "gaussian": {"r": 4, "init_lora_weights": "gaussian", "lora_dropout": 0.1},
    "heads": {"r": 2, "modules_to_save": ["classifier", "pooler"]},
}


def stock(model: nn.Module, **options):
    """A model wrapped by peft, with values that show."""
    options = {"target_modules": ["query", "value"], **options}
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    return model.eval()


def ours_of(name: str) -> str:
    """peft's name of a trained parameter as this package's."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    return name.replace(".lora_A.default.weight", ".down").replace(".lora_B.default.weight", ".up")


def gradients(model: nn.Module) -> dict:
    return {ours_of(name): p.grad for name, p in model.named_parameters() if p.grad is not None}


# ---- from peft ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", STOCK)
def test_checkpoints_of_peft(which, tmp_path):
    base, batch = build("vilt_vqa", torch.float64)
    model = stock(base, **STOCK[which])
    model.save_pretrained(tmp_path)
    adapter = LoRA.from_peft(build("vilt_vqa", torch.float64)[0], tmp_path)
    expected = output(model, batch)
    assert torch.allclose(output(adapter.model, batch), expected, rtol=1e-13, atol=1e-13)
    assert not torch.allclose(expected, output(build("vilt_vqa", torch.float64)[0], batch), atol=1e-3)
    loss(model, batch).backward()
    loss(adapter.model, batch).backward()
    theirs, ours = gradients(model), gradients(adapter.model)
    assert theirs.keys() == ours.keys() == dict(adapter.named_parameters()).keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-13, msg=name)
    assert adapter.config.dropout == STOCK[which].get("lora_dropout", 0.0)
    # and it saves, loads and exports as any other
    adapter.save_pretrained(tmp_path / "ours")
    again = LoRA.from_pretrained(build("vilt_vqa", torch.float64)[0], tmp_path / "ours")
    assert torch.equal(output(again.model, batch), output(adapter.model, batch))


def test_names_that_end_alike(tmp_path):
    """peft's list would mean both; what was trained is in the file."""

    def make():
        torch.manual_seed(0)
        inner = nn.ModuleDict({"layer": nn.ModuleDict({"query": nn.Linear(4, 4)})})
        return nn.ModuleDict({"layer": nn.ModuleDict({"query": nn.Linear(4, 4)}), "x": inner})

    stock(make(), target_modules=r"layer\.query").save_pretrained(tmp_path)
    adapter = LoRA.from_peft(make(), tmp_path)
    assert list(adapter.layers) == ["layer.query"]
    adapter.save_pretrained(tmp_path / "ours")
    assert list(LoRA.from_pretrained(make(), tmp_path / "ours").layers) == ["layer.query"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_peft_in_other_dtypes(dtype, tmp_path):
    """peft keeps float32 adapters under a half-precision model, and so does this."""
    model = stock(build("vilt_vqa", dtype)[0])
    model.save_pretrained(tmp_path)
    base, batch = build("vilt_vqa", dtype)
    adapter = LoRA.from_peft(base, tmp_path)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    exact = LoRA.from_peft(build("vilt_vqa", torch.float64)[0], tmp_path)
    stored = dict(exact.named_parameters())
    assert all(torch.equal(p.double(), stored[name]) for name, p in adapter.named_parameters())
    with torch.no_grad():
        ours, theirs = output(adapter.model, batch).float(), output(model, batch).float()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["blip_retrieval", "vilt_vqa"])
@pytest.mark.parametrize("rslora", [False, True])
def test_training_equals_pefts(kind, rslora):
    base, batch = build(kind, torch.float64)
    names = ["query", "value", "qkv"]
    adapter = LoRA.wrap(base, LoRAConfig(rank=3, alpha=5, rslora=rslora, targets=[n for n in names if has(base, n)]))
    theirs = peft.get_peft_model(
        build(kind, torch.float64)[0], peft.LoraConfig(r=3, lora_alpha=5, use_rslora=rslora, target_modules=names)
    ).eval()
    ours = dict(adapter.named_parameters())
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad:
                p.copy_(ours[ours_of(name)])
    optimizers = [torch.optim.AdamW(params, lr=1e-2) for params in (adapter.parameters(), theirs.parameters())]
    losses = []
    for _ in range(5):
        for model, optimizer in zip((adapter.model, theirs), optimizers):
            optimizer.zero_grad()
            value = loss(model, batch)
            value.backward()
            optimizer.step()
            losses.append(value.item())
    assert losses[-1] < losses[0] - 1e-3
    assert losses[::2] == pytest.approx(losses[1::2], rel=1e-12)
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(ours[ours_of(name)], p, rtol=1e-9, atol=1e-12)


def has(model: nn.Module, name: str) -> bool:
    return any(each.endswith(f".{name}") for each, _ in model.named_modules())


def test_dropout_is_on_the_updates_input():
    """As in peft, the frozen part sees all of x: each row's update is that of x under one of the 2⁶ masks."""
    linear = nn.Linear(6, 5, dtype=torch.float64)
    adapter = LoRA.wrap(nn.Sequential(linear), LoRAConfig(rank=2, alpha=3, dropout=0.4, targets=["0"]))
    stir(adapter)
    layer, x = adapter.layers["0"], torch.randn(1, 6, dtype=torch.float64).expand(4000, 6)
    with torch.no_grad():
        y = layer.train()(x)
        update = 1.5 * layer.up @ layer.down
        masks = torch.cartesian_prod(*[torch.tensor([0.0, 1 / 0.6], dtype=torch.float64)] * 6)
        possible = (masks * x[0]) @ update.T
        nearest = torch.cdist(y - linear(x), possible).min(dim=1).values
    assert nearest.max() < 1e-5
    spread = (y - linear(x)).std(0) / len(x) ** 0.5
    assert ((y - layer.eval()(x)).mean(0).abs() < 5 * spread).all()


# ---- to peft --------------------------------------------------------------------------------------------------------


def exported(adapter, kind, folder, dtype=torch.float64):
    """The model that stock peft makes of an export. What it warns of, as of missing keys, is an error."""
    adapter.export_lora(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(build(kind, dtype)[0], str(folder)).eval()


@pytest.mark.parametrize("method", MERGING)
@pytest.mark.parametrize("kind", ["blip_retrieval", "blip_captioning", "vilt_vqa", "lxmert", "clip"])
def test_peft_loads_the_same_function(method, kind, tmp_path):
    adapter, batch = adapted(method, kind, torch.float64)
    expected = output(adapter.model, batch)
    model = exported(adapter, kind, tmp_path)
    torch.testing.assert_close(output(model, batch), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(output(build(kind, torch.float64)[0], batch), expected, rtol=1e-4)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == len(adapter.layers)


def test_different_ranks_and_names_that_end_alike(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.ModuleList([nn.ModuleDict({"query": nn.Linear(4, 4)}) for _ in range(11)])
            self.x = nn.ModuleDict({"layer": nn.ModuleList([nn.ModuleDict({"query": nn.Linear(4, 4)})])})
            self.double()

        def forward(self, x):
            for layer in (*self.layer, *self.x["layer"]):
                x = layer["query"](x).tanh()
            return x

    x, ranks = torch.randn(3, 4, dtype=torch.float64), {"layer.0.query": 3, "layer.10.query": 4}
    for targets, count in ((r"layer\.\d+\.query", 11), (["layer.0.query", "layer.10.query", "layer.1.query"], 4)):
        adapter = LoRA.wrap(Net(), LoRAConfig(rank=2, targets=targets, rank_pattern=ranks))
        stir(adapter)
        adapter.export_lora(tmp_path)
        model = peft.PeftModel.from_pretrained(Net(), str(tmp_path))
        torch.testing.assert_close(model(x), adapter.model(x), rtol=1e-13, atol=1e-13)
        assert sum("lora_A" in name for name, _ in model.named_parameters()) == len(adapter.layers) == count


class Headed(nn.Module):
    """A body, a head with running statistics, and words that a decoder is tied to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.body = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False))
        self.decoder = nn.Linear(4, 7, bias=False)
        self.decoder.weight = self.words.weight
        self.temperature = nn.Parameter(torch.ones(()))
        self.double().eval()

    def forward(self, ids):
        return self.temperature * self.decoder(self.head(self.body(self.words(ids))))


def test_heads_go_along_with_their_buffers(tmp_path):
    ids = torch.arange(7)
    adapter = LoRA.wrap(Headed(), LoRAConfig(rank=2, targets=["body"], modules_to_save=["head", "head.0"]))
    stir(adapter)
    with torch.no_grad():
        adapter.model.head[2].running_var.abs_()
        adapter.model.head[1].running_var.abs_()
    adapter.export_lora(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["head"]
    model = peft.PeftModel.from_pretrained(Headed(), str(tmp_path)).eval()
    torch.testing.assert_close(model(ids), adapter.model(ids), rtol=1e-13, atol=1e-13)


def test_tied_heads_go_along_together(tmp_path):
    ids = torch.arange(7)
    adapter = LoRA.wrap(Headed(), LoRAConfig(rank=2, targets=["body"], modules_to_save=["decoder"]))
    stir(adapter)
    adapter.export_lora(tmp_path)
    model = peft.PeftModel.from_pretrained(Headed(), str(tmp_path)).eval()
    torch.testing.assert_close(model(ids), adapter.model(ids), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("heads", [["temperature"], ["head.1.weight"]])
def test_parameters_alone_are_not_exported(heads, tmp_path):
    adapter = LoRA.wrap(Headed(), LoRAConfig(rank=2, targets=["body"], modules_to_save=heads))
    with pytest.raises(ValueError, match=rf"^export_lora: {heads[0]} trains without the module it is in"):
        adapter.export_lora(tmp_path)
    adapter.remove()
    merged = LoRA.wrap(adapter.model, LoRAConfig(rank=2, targets=["body"]))
    merged.merge()
    with pytest.raises(ValueError, match=r"merged; unmerge it first"):
        merged.export_lora(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ours_and_back(tmp_path):
    adapter, batch = adapted("lora", "vilt_vqa", torch.float64, rslora=True)
    adapter.export_lora(tmp_path)
    back = LoRA.from_peft(build("vilt_vqa", torch.float64)[0], tmp_path)
    torch.testing.assert_close(output(back.model, batch), output(adapter.model, batch), rtol=1e-13, atol=1e-13)
