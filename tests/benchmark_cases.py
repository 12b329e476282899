"""What the tests of the benchmarks share."""

import dataclasses

import torch

from peft_kernels.benchmarks import runner
from peft_kernels.benchmarks.gpu import work as gpu_work

# One shape for each operation, and the providers that need no compiler.
TINY = gpu_work.SMALL
EAGER = {"frozen linear", "frozen linears", "one by one, torch", "PEFT", "torch einsum", "torch bmm", "ours, torch"}
EAGER |= {"loop of lowrank_linear", "authors' formula", "W0 + B A shared", "low-rank form, autograd", "formula, eager"}


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
