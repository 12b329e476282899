"""A small model with Aurora as PEFT builds it, and the same by docs/method.md, section 4, in float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

peft = pytest.importorskip("peft", minversion="0.21")  # whoever imports this is skipped without

from peft_kernels.integrations.peft import AuroraConfig, register  # noqa: E402

register()

CORES = ("cp", "tucker")
EXACT = {"rtol": 1e-12, "atol": 1e-13}  # in float64
BLOCKS = {"q": (1, 1), "k": (1, 1), "fc1": (4, 1), "fc2": (1, 4), "vision_fc1": (4, 1), "wide": (1, 1)}


class Net(nn.Module):
    """Siblings that read one tensor, layers of four blocks, a layer of other widths, one without bias, a head."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.fc1, self.fc2 = nn.Linear(8, 32), nn.Linear(32, 8, bias=False)
        self.vision_fc1, self.wide = nn.Linear(8, 32), nn.Linear(8, 12)
        self.head = nn.Linear(44, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.q(x)) * self.k(x)
        x = x + self.fc2(torch.relu(self.fc1(x)))
        return self.head(torch.cat([self.vision_fc1(x), self.wide(x)], dim=-1))


def base(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def config(**options) -> AuroraConfig:
    return AuroraConfig(**{"target_modules": [*BLOCKS], "rank": 3, "dropout": 0.0, "init_weights": False, **options})


def adapted(dtype: torch.dtype = torch.float64, **options) -> peft.PeftModel:
    return stir(peft.get_peft_model(base(dtype), config(**options)).eval())


@torch.no_grad()
def stir(model: nn.Module) -> nn.Module:
    """Values that show, λ's too."""
    for index, (name, p) in enumerate(model.named_parameters()):
        if "aurora_" in name:
            generator = torch.Generator().manual_seed(index)
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    return model


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def factors(model: peft.PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """The adapter's parameters by what the file calls them."""
    named = {name.removeprefix("base_model."): p for name, p in model.named_parameters() if "aurora_" in name}
    return {name.replace(f".{adapter}", ""): p for name, p in named.items() if f".{adapter}" in name}


def delta(tensors: dict[str, Tensor], layer: str) -> Tensor:
    """ΔW by docs/method.md, section 4, one block after the other."""
    p, (out_blocks, in_blocks) = tensors[f"model.{layer}.aurora_p"], BLOCKS[layer]
    pair = "8x12" if layer == "wide" else "8x8"
    u, v = tensors[f"aurora_shared.down_{pair}"].T, tensors[f"aurora_shared.up_{pair}"]

    def block(k: int) -> Tensor:
        if "aurora_shared.lam" in tensors:
            return v @ torch.diag(tensors["aurora_shared.lam"] * p[k]) @ u.T
        return v @ torch.einsum("abc,c->ab", tensors["aurora_shared.modes"], p[k]).T @ u.T

    rows = [torch.cat([block(o * in_blocks + i) for i in range(in_blocks)], 1) for o in range(out_blocks)]
    return torch.cat(rows)


def defined(tensors: dict[str, Tensor], x: Tensor, scale: float = 1.0, layers=tuple(BLOCKS), net=None) -> Tensor:
    net = base() if net is None else net
    weights = {f"{name}.weight": net.get_submodule(name).weight + scale * delta(tensors, name) for name in layers}
    return functional_call(net, weights, (x,))
