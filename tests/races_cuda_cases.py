"""What the CUDA kernels run under ThreadSanitizer: a few problems in which every loop has more than one iteration (one
iteration hides whatever is carried from one to the next), or all problems of the operations' tests."""

import contextlib
import random

import cuda_cases
import projections_cuda_cases as projections
import test_batched_lowrank_linear_cuda as batched
import test_gated_query_cuda as gated
import test_reconstruct_cuda as reconstruct
import weight_distance_cuda_cases as distance
from cuda_cases import BF16

from peft_kernels.cuda_kernels import common

LARGE = {"rows": 130, "out_cols": 264, "in_cols": 264, "rank": 40, "strips": False}
CHOSEN = {
    "lowrank_linear": [
        cuda_cases.Case(**LARGE, core="dense", drop="input"),
        cuda_cases.Case(**LARGE, dtype=BF16),  # the pass over x makes dz, here and below
        cuda_cases.Case(**LARGE, drop="rank"),
    ],
    "lowrank_projections": [  # with more projections than thread blocks have room for; with as many
        projections.Case((264, 136, 40), 130, 264, rank=40, drop="input", strips=False),
        projections.Case((264, 40), 130, 264, rank=40, dtype=BF16, strips=False),
    ],
    "batched_lowrank_linear": [batched.Case(**LARGE, adapters=2), batched.Case(**LARGE, index="one", dtype=BF16)],
    "reconstruct": [
        reconstruct.Case(130, 264, 40, core="dense"),
        reconstruct.Case(130, 264, 40, dtype=BF16),
    ],
    "weight_distance": [
        distance.Case(((130, 264, (40, 33)),), bias="shift"),
        *((seed, "dense") for seed in range(2)),
    ],
    "gated_query": [
        gated.Problem("gated", 2, 600, 264, "some"),  # more positions than threads
        gated.Problem("gated", 2, 130, 264, dtype=BF16),
        gated.Problem("additive", 130, 2, 264),
    ],
}
ALL = {
    "lowrank_linear": cuda_cases.CASES,
    "lowrank_projections": projections.CASES,
    "batched_lowrank_linear": batched.CASES,
    "reconstruct": reconstruct.CASES,
    "weight_distance": [*distance.CASES, *((seed, layout) for seed in range(6) for layout in distance.EXTRA)],
    "gated_query": gated.PROBLEMS,
}


def run(operation, case):
    """-> what the operation's kernels, forward and backward, give on this problem."""
    return RUN[operation](case)


def _lowrank_linear(case):
    with _strips(case):
        return cuda_cases.through_kernels(cuda_cases.problem(case, "cpu"))


def _lowrank_projections(case):
    with _strips(case):
        return projections.through_kernels(projections.problem(case, "cpu"))


def _batched_lowrank_linear(case):
    with _strips(case):
        return batched.through_kernels(batched.problem(case, "cpu"))


@contextlib.contextmanager
def _strips(case):
    before = common.PROCESSORS
    common.PROCESSORS = before if case.strips else 0
    try:
        yield
    finally:
        common.PROCESSORS = before


def _weight_distance(case):
    if isinstance(case, distance.Case):
        records, _, results, _ = distance.run(case, distance.Placer(case.layout, "cpu"))
        return [record.error for record in records] + [record.target for record in records] + list(results)
    seed, layout = case
    records = distance.products(distance.Placer(layout, "cpu"), random.Random(seed).choice, 6)
    distance.multiply(records)
    return [record.result for record in records]


RUN = {
    "lowrank_linear": _lowrank_linear,
    "lowrank_projections": _lowrank_projections,
    "batched_lowrank_linear": _batched_lowrank_linear,
    "reconstruct": lambda case: reconstruct.kernels.reconstruct_fwd(*reconstruct.arguments(case, "cpu")),
    "weight_distance": _weight_distance,
    "gated_query": lambda problem: gated.through_kernels(problem, *gated.arguments(problem, "cpu")),
}
