"""Adapt a small vision transformer to another domain, with LowRankLinear against full tuning. `make demo` runs this.

The transformer is pre-trained here on scikit-learn's 1,797 real handwritten digits. The new domain is the same digits
rotated by a quarter turn and inverted. Each method gets 300 labelled images of it, chooses its learning rate on a
validation split by the same search, and reads the test split once. Takes about two minutes on two CPU cores.

    python examples/demo.py [--seed 0] [--rank 8] [--backend auto] [--device cpu]
"""

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import peft_kernels
from peft_kernels.layers import LowRankLinear

WIDTH, LAYERS, HEADS, PATCH = 96, 4, 4, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.projection(attended)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DigitTransformer(nn.Module):
    """images (batch, 8, 8) -> logits (batch, 10)"""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn((8 // PATCH) ** 2, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        return self.head(self.norm(self.blocks(self.embed(patches) + self.position)).mean(1))


@dataclass
class Split:
    images: Tensor
    labels: Tensor


def domains(seed: int, device: str) -> tuple[Split, dict[str, Split]]:
    """Digits for pre-training, and other digits in the new domain as train, validation and test splits."""
    digits = load_digits()
    order = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.images, dtype=torch.float32)[order].to(device) / 16
    labels = torch.tensor(digits.target)[order].to(device)
    shifted = 1 - images.rot90(1, (1, 2))
    bounds = {"train": (800, 1100), "validation": (1100, 1350), "test": (1350, len(images))}
    new = {name: Split(shifted[a:b], labels[a:b]) for name, (a, b) in bounds.items()}
    return Split(images[:800], labels[:800]), new


def fit(model: nn.Module, split: Split, rate: float, epochs: int, batch: int = 50) -> float:
    """Train in place; returns seconds per step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    steps = epochs * (len(split.images) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    start = time.perf_counter()
    for _ in range(epochs):
        for chosen in torch.randperm(len(split.images), device=split.images.device).split(batch):
            if len(chosen) < batch:
                continue
            optimizer.zero_grad()
            F.cross_entropy(model(split.images[chosen]), split.labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return (time.perf_counter() - start) / steps


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    model.eval()
    return (model(split.images).argmax(-1) == split.labels).float().mean().item()


def adapt(model: nn.Module, method: str, rank: int, backend: str) -> nn.Module:
    """A copy of the model with the parameters that `method` trains left free."""
    model = copy.deepcopy(model)
    if method == "full tuning":
        return model
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    if method == "head only":
        return model
    options = {"scale": 2.0, "dropout_p": 0.1, "backend": backend}
    for block in model.blocks:
        if method == "LoRA":
            for name in ("qkv", "projection", "fc1", "fc2"):
                setattr(block, name, LowRankLinear(getattr(block, name), rank, **options))
        else:  # one A and one B for q, k and v, each with its own diagonal: method, section 1
            blocks = {"core": "diagonal", "out_blocks": 3, "dropout_on": "core"}
            block.qkv = LowRankLinear(block.qkv, rank, **options, **blocks)
    return model


def merged(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.merge()
    return model


RATES = {"full tuning": (3e-4, 1e-3, 3e-3), "head only": (3e-3, 1e-2, 3e-2)}
ADAPTER_RATES = (1e-3, 3e-3, 1e-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--backend", default="auto", choices=("auto", "torch", "triton", "cuda"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=40, help="of adaptation")
    parser.add_argument("--pretraining-epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("demo_out"))
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    pretraining, new = domains(arguments.seed, arguments.device)
    model = DigitTransformer().to(arguments.device)
    print(f"pre-training on {len(pretraining.images)} digits ...", flush=True)
    fit(model, pretraining, 2e-3, arguments.pretraining_epochs)
    print(f"accuracy where it was trained {accuracy(model, pretraining):.1%}; turned and inverted, unadapted: ", end="")
    print(f"{accuracy(model, new['test']):.1%}\n")

    results = []
    for method in ("head only", "LoRA", "shared A and B", "full tuning"):
        candidates = []
        for rate in RATES.get(method, ADAPTER_RATES):
            torch.manual_seed(arguments.seed)
            candidate = adapt(model, method, arguments.rank, arguments.backend)
            seconds = fit(candidate, new["train"], rate, arguments.epochs)
            candidates.append((accuracy(candidate, new["validation"]), rate, seconds, candidate))
        validation, rate, seconds, best = max(candidates, key=lambda found: found[0])
        row = {
            "method": method,
            "test_accuracy": accuracy(best, new["test"]),
            "merged_accuracy": accuracy(merged(best), new["test"]),
            "validation_accuracy": validation,
            "learning_rate": rate,
            "trained_parameters": sum(p.numel() for p in best.parameters() if p.requires_grad),
            "milliseconds_per_step": 1e3 * seconds,
            "backend": sorted({choice.name for choice in peft_kernels.explain(best).values()}),
        }
        results.append(row)
        if len(results) == 1:
            print(f"{'method':<16}{'test':>7}{'merged':>8}{'trained':>9}{'ms/step':>9}  backend")
        backend = ", ".join(row["backend"]) or "–"
        print(
            f"{method:<16}{row['test_accuracy']:>7.1%}{row['merged_accuracy']:>8.1%}{row['trained_parameters']:>9,}"
            f"{row['milliseconds_per_step']:>9.1f}  {backend}",
            flush=True,
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.json"
    settings = {name: str(value) for name, value in vars(arguments).items() if name != "out"}
    path.write_text(json.dumps({"settings": settings, "torch": torch.__version__, "results": results}, indent=2))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
