"""Aurora's update spelled out from docs/method.md, section 4, and wrapped tiny models to hold it against."""

import re

import torch
from adapter_models import build
from per_pass_cases import watch
from torch import Tensor, nn

from peft_kernels import Aurora, AuroraConfig

RANK = 3
CORES = [("cp", "blocks"), ("tucker", "blocks"), ("tucker", "released")]
# Module name → (O, I, fused); every other target is one slot
KINDS = {r".*\.qkv": (3, 1, True), r".*\.fc1": (4, 1, False), r".*\.fc2": (1, 4, False)}


def kind_of(name: str) -> tuple[int, int, bool]:
    return next((kind for pattern, kind in KINDS.items() if re.fullmatch(pattern, name)), (1, 1, False))


def wrapped(kind: str = "blip_retrieval", preset: str = "blip-retrieval", dtype=torch.float64, **options):
    """(adapter, model, batch), every adapter parameter moved off its start: C is asymmetric, V is not zero."""
    build_options = {key: options.pop(key) for key in ("vision", "layers", "dropout_prob") if key in options}
    build_options = {"dropout" if key == "dropout_prob" else key: value for key, value in build_options.items()}
    model, batch = build(kind, dtype, **build_options)
    options = {"rank": RANK, "dropout": 0.0, "backend": "torch", **options}
    adapter = Aurora.wrap(model, AuroraConfig(preset=preset, **options))
    scramble(adapter)
    return adapter, model, batch


@torch.no_grad()
def scramble(adapter: Aurora) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in adapter.parameters("adapter"):
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def slots_of(names: list[str]) -> dict[str, int]:
    """The first row of P of each layer, when they stand in the model's order."""
    first, places = 0, {}
    for name in names:
        places[name] = first
        first += kind_of(name)[0] * kind_of(name)[1]
    return places


def delta(name: str, linear: nn.Linear, parameters: dict[str, Tensor], first: int, layout: str) -> Tensor:
    """ΔW (out, in) of one layer, differentiable in U, V, P and λ or C: block by block, element by element.

    parameters: of the layer's decomposition, by their names in it; U is kept transposed
    """
    out_blocks, in_blocks, fused = kind_of(name)
    rows, columns = linear.out_features // out_blocks, linear.in_features // in_blocks
    U, V, P = parameters[f"down.{columns}x{rows}"].t(), parameters[f"up.{columns}x{rows}"], parameters["slots"]
    slots = out_blocks * in_blocks
    blocks = []
    for s in range(slots):
        if "lam" in parameters:
            blocks.append(torch.einsum("r,nr,mr,r->nm", parameters["lam"], V, U, P[first + s]))
            continue
        C = parameters["modes"]
        if layout == "blocks" or fused or slots == 1:
            K = torch.einsum("abc,c->ab", C, P[first + s])
            blocks.append(torch.einsum("nb,ab,ma->nm", V, K, U))
            continue
        joint = torch.stack([torch.einsum("abc,c->ab", C, P[first + k]) for k in range(slots)], dim=-1)
        read = [divmod(s * len(C) + r, slots) for r in range(len(C))]  # column r of the released block s
        M = torch.stack([joint[:, b, k] for b, k in read], dim=1)
        indices = "nr,ar,ma->nm" if in_blocks == 1 else "na,ar,mr->nm"  # V Mᵀ Uᵀ, and of fc2 V M Uᵀ
        blocks.append(torch.einsum(indices, V, M, U))
    return torch.cat(blocks, dim=0 if in_blocks == 1 else 1)


def parameters_of(model: nn.Module, scope: str = "shared") -> dict[str, Tensor]:
    return dict(model.get_submodule(f"aurora.{scope}").named_parameters())


def defined_weights(adapter: Aurora, layout: str = "blocks") -> dict[str, Tensor]:
    """W + ΔW of every layer that shares globally, by name; differentiable."""
    places, parameters = slots_of(list(adapter.layers)), parameters_of(adapter.model)
    return {
        name: layer.weight + adapter.config.scale * delta(name, layer, parameters, places[name], layout)
        for name, layer in adapter.layers.items()
    }


class Products:
    """Counts products with U: x Uᵀ for several layers, `hidden`, and those that a layer makes for itself alone.

    masks: of each projection, in the order of calls
    """

    def __init__(self, monkeypatch):
        self.hidden, self.alone, self.masks = 0, 0, []
        watch(monkeypatch, "lowrank_hidden_fwd", self._count_hidden)
        watch(monkeypatch, "lowrank_linear_fwd", self._count_linear)
        watch(monkeypatch, "lowrank_projections_fwd", self._count_group)

    def _count_hidden(self, *args):
        self.hidden += 1

    def _count_linear(self, x, weight, bias, factors, dropout, *design):
        self.alone += factors.z is None
        self.masks.append(dropout)

    def _count_group(self, x, weights, biases, projections, dropout):
        self.hidden += projections.z is None
        rngs = [None] * len(weights) if dropout.rng is None else dropout.rng
        self.masks += [dropout._replace(rng=rng) for rng in rngs]

    def take(self) -> tuple[int, int]:
        """(shared, alone) since the last time."""
        counts, self.hidden, self.alone = (self.hidden, self.alone), 0, 0
        return counts
