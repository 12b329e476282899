"""What the tests of the benchmarks share."""

# One --shape for each operation, and the providers that need no compiler.
TINY = {
    "lowrank_linear": (24, 16, 40, 4),
    "reconstruct": (3, 24, 40, 5),
    "batched_lowrank_linear": (4, 6, 24, 40, 3, 4),
    "weight_distance": (3, 24, 5, 3),
    "gated_query": (3, 7, 24),
}
EAGER = {"frozen linear", "PEFT", "torch einsum", "torch bmm", "loop of lowrank_linear", "ours, torch"}
EAGER |= {"authors' formula", "W0 + B A shared", "low-rank form, autograd", "formula, eager"}
