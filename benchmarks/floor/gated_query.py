"""What `gated_query` costs, by formula: peft_kernels/ops/gated_query.py. All of it is memory.

Sizes: B sequences of S rows of d, `size` bytes per element; "gated" comes with a padding mask of a byte for each row.
"""

from . import Pass, Work

DESIGNS = ("fused",)
# Arithmetic for each element of (B, S, d), forward and backward, by formula.
FLOPS = {"additive": (7, 8), "gated": (8, 16)}
TENSORS = {"additive": (4, 5), "gated": (3, 5)}  # (B, S, d), read or written: backward dh is dy itself
VECTORS = {"additive": (4, 6), "gated": (2, 4)}  # (d,)


def compulsory(mode: str, B: int, S: int, d: int, size: int) -> tuple[Work, Work]:
    """(forward, backward), all gradients: what no design can avoid. What is kept from one to the other need not be."""
    mask = B * S if mode == "gated" else 0
    forward, backward = (
        Work(flops * B * S * d, (wide * B * S + thin) * d * size + mask)
        for flops, wide, thin in zip(FLOPS[mode], TENSORS[mode], VECTORS[mode])
    )
    return forward, backward


def passes(design: str, mode: str, B: int, S: int, d: int, size: int, strips: int) -> tuple[list[Pass], list[Pass]]:
    """(forward, backward) of one design; what "gated" reads again comes from the caches and is not counted.

    strips: of rows, whose sums the last launch adds; B for "gated". Kept: g and τ, in float32.
    """
    if design not in DESIGNS:
        raise ValueError(f"design: expected one of {DESIGNS}, got {design!r}")
    forward, backward = compulsory(mode, B, S, d, size)
    kept = 4 * B * (S + d) if mode == "gated" else 0
    vectors = 3 if mode == "additive" else 2  # dβ_c is dβ
    grads = (4 if mode == "additive" else 2) * d * size
    sums, partial = vectors * strips * d, 4 * vectors * strips * d
    main = Pass("gradients", backward.flops, backward.bytes - grads + kept + partial)
    return [Pass("mix", forward.flops, forward.bytes + kept)], [main, Pass("vectors' sums", sums, partial + grads)]
