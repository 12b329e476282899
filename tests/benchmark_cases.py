"""What the tests of the benchmarks share."""

import dataclasses

import torch

from peft_kernels.benchmarks import runner

# One --shapes for each operation, and the providers that need no compiler.
TINY = {
    "lowrank_linear": (24, 16, 40, 4),
    "reconstruct": (3, 24, 40, 5),
    "batched_lowrank_linear": (4, 6, 24, 40, 3, 4),
    "weight_distance": (3, 24, 5, 3),
    "gated_query": (3, 7, 24),
}
EAGER = {"frozen linear", "PEFT", "torch einsum", "torch bmm", "loop of lowrank_linear", "ours, torch"}
EAGER |= {"authors' formula", "W0 + B A shared", "low-rank form, autograd", "formula, eager"}


def tiny(bench):
    """The bench with its real providers, those of a compiler left out, and one shape in one dtype."""
    providers = {name: each for name, each in bench.providers.items() if name in EAGER}
    shape = TINY[bench.op]
    return dataclasses.replace(
        bench,
        providers=providers,
        cases=lambda on_cpu, dtypes: bench.shaped(shape, dtypes[0]),
        presets=dict.fromkeys(bench.presets, (shape,)),
    )


def reason(bench, provider, case, *others):
    """Why a provider of a bench's own kind is not timed: its words in the record, where the others are."""
    named = dataclasses.replace(bench, providers={**bench.providers, "new": provider})
    record = runner.measure(named, case, torch.device("cpu"), [*others, "new"], rounds=1)
    assert {row["provider"] for row in record["results"]} == set(others)
    return record["absent"]["new"]
