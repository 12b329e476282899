"""What one frozen linear layer with its low-rank path costs on an H200 by the model of floor/lowrank_linear.py: µs of
forward and backward together, and how many times the floor that is. The passes run one after the other: a model, to be
measured before it is believed.

    python -m peft_kernels.benchmarks.floor
"""

from ..markdown import markdown
from . import H200, Device, lowrank_linear, modelled_seconds, total

RANK, DTYPE, SIZE = 16, "bfloat16", 2
SHAPES = {  # BLIP and ViLT have width 768 and an MLP of 3072; 9232 rows are 16 images of 577 tokens
    "8192 × 4096²": (8192, 4096, 4096),
    "9232 × 768²": (9232, 768, 768),
    "768→3072": (9232, 768, 3072),
    "3072→768": (9232, 3072, 768),
}
DESIGNS = {  # design, dropout
    "two frozen GEMMs": ("linear", False),
    "split graph (tail), mask regenerated": ("tail", True),
    "low-rank first (passes)": ("passes", True),
    "unsloth, no dropout": ("unsloth", False),
    "torch eager and PEFT, no dropout": ("eager", False),
    "torch eager and PEFT, dropout": ("eager", True),
}


def limits(device: Device = H200) -> dict[str, list[float]]:
    """Seconds of the floor and of every design, for each shape."""

    def least(shape: tuple[int, int, int]) -> float:
        return total(lowrank_linear.compulsory(*shape, RANK, SIZE)).seconds(device, DTYPE)

    def modelled(shape: tuple[int, int, int], design: str, dropout: bool) -> float:
        forward, backward = lowrank_linear.passes(design, *shape, RANK, SIZE, dropout)
        return modelled_seconds(forward + backward, device, DTYPE)

    found = {name: [modelled(shape, *which) for shape in SHAPES.values()] for name, which in DESIGNS.items()}
    return {"floor": [least(shape) for shape in SHAPES.values()], **found}


def table(found: dict[str, list[float]]) -> str:
    rows = []
    for name, values in found.items():
        times = [f"{value * 1e6:.{0 if value >= 1e-4 else 1}f}" for value in values]
        ratios = ["" if name == "floor" else f" ({v / least:.2f})" for v, least in zip(values, found["floor"])]
        rows.append([name, *map("".join, zip(times, ratios))])
    return markdown(("µs (× floor)", *SHAPES), rows)


if __name__ == "__main__":
    print(f"{H200.name}: {H200.source}; {DTYPE}, rank {RANK}\n\n{table(limits())}")
