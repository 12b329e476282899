"""MoIL's definitions, everything materialised, and a small modality-expert transformer of the VLMo kind.

No transformers here: processes that a test starts import this alone.
"""

import os
from pathlib import Path

import torch
from imitation_cases import reduced, relative  # noqa: F401, its users' too
from torch import Tensor, nn
from torch.nn import functional as F

from peft_kernels.adapters import MoIL, MoILConfig
from peft_kernels.layers.imitation_linear import ImitationLinear

WIDTH, HEADS = 16, 2


class Attention(nn.Module):
    """style: "vit": one fused qkv | "bert": query, key and value"""

    def __init__(self, style: str, bias: bool):
        super().__init__()
        if style == "vit":
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        else:
            self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, dim=-1) if hasattr(self, "qkv") else (self.query(x), self.key(x), self.value(x))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH, bias=bias), nn.Linear(4 * WIDTH, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """Attention over both modalities together, then each one's own feed-forward expert."""

    def __init__(self, style: str, bias: bool, dropout: float):
        super().__init__()
        attention = Attention(style, bias)
        if style == "vit":
            self.attn = attention
        else:
            self.attention = nn.ModuleDict({"self": attention})
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp_text, self.mlp_imag = FeedForward(bias), FeedForward(bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, text: int) -> Tensor:
        attention = self.attn if hasattr(self, "attn") else self.attention["self"]
        x = x + self.dropout(attention(self.norm1(x)))
        h = self.norm2(x)
        # Contiguous: torch takes another product for other strides, whose last bits may differ
        parts = (part.contiguous() for part in (h[:, :text], h[:, text:]))
        return x + torch.cat([mlp(part) for mlp, part in zip((self.mlp_text, self.mlp_imag), parts)], dim=1)


class Experts(nn.Module):
    """text (B, T) of 20 tokens, image (B, S, 16) -> (B, 4)"""

    def __init__(self, style: str = "vit", bias: bool = True, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        layers = nn.ModuleList(Layer(style, bias, dropout) for _ in range(2))
        if style == "vit":
            self.blocks = layers
        else:
            self.encoder = nn.ModuleDict({"layer": layers})
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        x = torch.cat([self.embed(text), image.to(self.embed.weight.dtype)], dim=1)
        for layer in self.blocks if hasattr(self, "blocks") else self.encoder["layer"]:
            x = layer(x, text.shape[1])
        return self.head(x.mean(1))


def experts(seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> tuple[Experts, dict[str, Tensor]]:
    """A model, and a batch with labels (six rows)."""
    torch.manual_seed(seed)
    model = Experts(**options).to(dtype)
    batch = {"text": torch.randint(20, (6, 3)), "image": torch.randn(6, 4, WIDTH), "labels": torch.arange(6) % 4}
    return model, batch


def config(**options) -> MoILConfig:
    """Of queries, keys, values and every expert; small ranks, a decay for few steps."""
    targets = ("qkv", "fc1", "fc2") if "targets" not in options and "preset" not in options else None
    targets = options.pop("targets", targets)
    defaults = {"rank": 4, "transform_rank": 3, "decay": 0.9, "modules_to_save": ("head",)}
    return MoILConfig(targets=targets, **{**defaults, **options})


KINDS = {
    "vit": {},
    "vit, no bias": {"bias": False},
    "bert": {"style": "bert", "targets": ("query", "key", "value", "fc1", "fc2")},
    "lora": {"approximation": "lora"},
    "transform": {"approximation": "transform"},
}


def wrapped(kind: str = "vit", dtype: torch.dtype = torch.float64, **options) -> tuple[MoIL, dict[str, Tensor]]:
    model_options = {name: KINDS[kind][name] for name in ("style", "bias") if name in KINDS[kind]}
    model, batch = experts(dtype=dtype, **model_options)
    rest = {name: value for name, value in KINDS[kind].items() if name not in model_options}
    return MoIL.wrap(model, config(**{**rest, **options})), batch


def pull(moil: MoIL, batch: dict) -> None:
    """The task's gradients."""
    moil.model.train()
    moil.model.zero_grad()
    task_loss(moil.model, batch).backward()


def step(moil: MoIL, batch: dict, **options) -> Tensor | None:
    """A step that is not the first."""
    pull(moil, batch)
    moil.modules["moil"].steps += moil.steps == 0
    return moil.step(**options)


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["text"], batch["image"])


def task_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output(model, batch), batch["labels"])


def train(moil: MoIL, optimizer: torch.optim.Optimizer, batch: dict, steps: int, loss=task_loss, **options) -> list:
    """The task's loss at each step."""
    values = []
    moil.model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(moil.model, batch)
        value.backward()
        moil.step(**options)
        optimizer.step()
        values.append(value.item())
    return values


@torch.no_grad()
def scatter(moil: MoIL, size: float = 0.1, seed: int = 1) -> MoIL:
    """Adapters, live weights and teachers all somewhere else than where they start."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [*moil.parameters("adapter"), *moil.parameters("live")]
    for layer in moil.layers.values():
        tensors += [t for t in (layer.teacher_weight, layer.teacher_bias) if t is not None]
    for t in tensors:
        t += size * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
    return moil


# ---- definitions ----------------------------------------------------------------------------------------------------


def student(layer: ImitationLinear) -> tuple[Tensor, Tensor | None]:
    """W̄ and b̄ of a layer as docs/method.md, section 3, has them, differentiable in its adapters; fused ones in one."""
    weight, bias = layer.weight, layer.bias
    if layer.rank is not None:
        weight = weight + torch.cat([up @ down for down, up in zip(layer.down, layer.up)])
    transform = layer.transform
    if transform is None:
        return weight, bias
    whole = torch.eye(len(transform.up), dtype=weight.dtype) + transform.up @ transform.down
    if bias is None:
        return weight @ whole if layer.placement == "input" else whole @ weight, None
    shift = transform.up @ transform.down_bias + transform.up_bias
    if layer.placement == "input":
        return weight @ whole, weight @ shift + bias
    return whole @ weight, whole @ bias + shift


def imitation_loss(moil: MoIL, reduction: str = "mean") -> Tensor:
    """Of the teachers as they are now: over layers, projections, weights and biases."""
    total = torch.zeros((), dtype=torch.float64)
    for layer in moil.layers.values():
        (weight, bias), P = student(layer), layer.projections
        parts = [(layer.teacher_weight, weight, layer.weight)]
        parts += [] if bias is None else [(layer.teacher_bias, bias, layer.bias)]
        for teacher, own, frozen in parts:
            for t, s, f in zip(teacher.chunk(P), own.chunk(P), frozen.chunk(P)):
                total = total + reduced(t - s, t - f, f, reduction)
    return total


def adapter_gradients(moil: MoIL, reduction: str = "mean") -> list[Tensor]:
    """By autograd of the definition."""
    return list(torch.autograd.grad(imitation_loss(moil, reduction), list(moil.parameters("adapter"))))


# ---- a training that is interrupted ---------------------------------------------------------------------------------


def training(seed: int = 0) -> tuple[MoIL, torch.optim.Optimizer, dict[str, Tensor]]:
    """With dropout, so that the generator's state counts, too."""
    model, batch = experts(dropout=0.2)
    torch.manual_seed(seed)
    moil = MoIL.wrap(model, config(reduction="relative"))
    return moil, torch.optim.AdamW(moil.param_groups(1e-3, adapter_lr=1e-2)), batch


def interrupt(path: Path, moil: MoIL, optimizer: torch.optim.Optimizer) -> None:
    """As docs/raw_loop.md has it."""
    state = {"moil": moil.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    new = path.with_name(f"{path.name}.new")
    torch.save(state, new)
    os.replace(new, path)


def resumed(path: str | os.PathLike) -> tuple[MoIL, torch.optim.Optimizer, dict[str, Tensor]]:
    state = torch.load(path)
    moil, optimizer, batch = training(seed=99)  # what it starts from is replaced
    moil.load_state_dict(state["moil"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    return moil, optimizer, batch


def resume(path: str | os.PathLike, steps: int) -> dict[str, Tensor]:
    """In any process: the adapter's state after some more steps."""
    moil, optimizer, batch = resumed(path)
    train(moil, optimizer, batch, steps)
    return moil.state_dict()
