"""What "auto" takes on a GPU, by operation, kind of call and dtype: made by `make tables` from benchmarks/results/."""

SOURCE = "NVIDIA H200, 2026-11-27"
FASTEST: dict[tuple[str, str, str], str] = {
    ("batched_lowrank_linear", "narrow", "half"): "triton",
    ("gated_query", "additive", "half"): "cuda",
    ("gated_query", "gated", "half"): "triton",
    ("imitation_step", "", "float32"): "triton",
    ("lowrank_linear", "narrow", "float32"): "torch",
    ("lowrank_linear", "narrow", "half"): "triton",
    ("lowrank_linear", "narrow, dropout", "float32"): "cuda",
    ("lowrank_linear", "narrow, dropout", "half"): "triton",
    ("lowrank_linear", "wide", "float32"): "torch",
    ("lowrank_linear", "wide", "half"): "triton",
    ("lowrank_linear", "wide, dropout", "float32"): "triton",
    ("lowrank_linear", "wide, dropout", "half"): "triton",
    ("reconstruct", "dense core", "half"): "triton",
    ("reconstruct", "diagonal core", "half"): "triton",
    ("reconstruct", "no core", "half"): "triton",
    ("weight_distance", "", "float32"): "triton",
}
