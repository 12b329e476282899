"""What "auto" takes on a GPU, by operation, kind, dtype and architecture: `make tables` makes it of results/."""

SOURCE = "NVIDIA H200, 2026-11-27"
FASTEST: dict[tuple[str, str, str, int], str] = {
    ("batched_lowrank_linear", "narrow", "half", 90): "triton",
    ("gated_query", "additive", "half", 90): "cuda",
    ("gated_query", "gated", "half", 90): "triton",
    ("imitation_step", "", "float32", 90): "triton",
    ("lowrank_linear", "narrow", "float32", 90): "torch",
    ("lowrank_linear", "narrow", "half", 90): "triton",
    ("lowrank_linear", "narrow, dropout", "float32", 90): "cuda",
    ("lowrank_linear", "narrow, dropout", "half", 90): "triton",
    ("lowrank_linear", "wide", "float32", 90): "torch",
    ("lowrank_linear", "wide", "half", 90): "triton",
    ("lowrank_linear", "wide, dropout", "float32", 90): "triton",
    ("lowrank_linear", "wide, dropout", "half", 90): "triton",
    ("reconstruct", "dense core", "half", 90): "triton",
    ("reconstruct", "diagonal core", "half", 90): "triton",
    ("reconstruct", "no core", "half", 90): "triton",
    ("weight_distance", "", "float32", 90): "triton",
}
