"""Measuring: time on a CPU and on a GPU, kernel launches, memory, and what a forward keeps for its backward."""

import itertools
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class Times(NamedTuple):
    """Seconds per call: the median, half the distance between the quartiles, and every sample."""

    median: float
    spread: float
    samples: list[float]

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Times":
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
        return cls(middle, (high - low) / 2, list(samples))


FEWEST_ROUNDS, MOST_ROUNDS, SECONDS = 6, 100, 1.2


def time_on_cpu(steps: dict[str, Callable[[], object]], rounds: int | None = None, warmup: int = 1) -> dict[str, Times]:
    """Every step once per round, so that whatever else the machine does strikes all alike; compare within a round.

    The order is drawn for every other round, and the next one runs backwards: nobody always follows the same neighbour,
    whose use of the caches doubles the time of a small step. Without a number of rounds, as many as fit into SECONDS,
    within reason.
    """
    for step in steps.values():
        for _ in range(warmup):
            step()
    samples = {name: [] for name in steps}
    order, draw = list(steps), random.Random(0)
    begin = time.perf_counter()
    for turn in range(rounds or MOST_ROUNDS):
        if not rounds and turn >= FEWEST_ROUNDS and time.perf_counter() - begin > SECONDS:
            break
        draw.shuffle(order) if turn % 2 == 0 else order.reverse()
        for name in order:
            start = time.perf_counter()
            steps[name]()
            samples[name].append(time.perf_counter() - start)
    return {name: Times.of(values) for name, values in samples.items()}


def speed_against(times: Times, other: Times) -> float:
    """How many times as fast as `other`: the median of the rounds' ratios, or the ratio of medians between runs."""
    if len(times.samples) != len(other.samples):
        return other.median / times.median
    return statistics.median(theirs / ours for ours, theirs in zip(times.samples, other.samples))


def copies_beyond_cache(nbytes: int, device: torch.device) -> int:
    """How many sets of inputs to take turns with, so that none is still in a GPU's L2 cache when its turn comes."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(16, 2 + 2 * cache // nbytes)


def time_on_gpu(step: Callable[[int], object], copies: int) -> Times:
    """Calls issued one by one, as in eager training; `step(i)` runs on the i-th set of inputs. A median by do_bench."""
    from triton.testing import do_bench

    turn = iter(range(10**9))
    milliseconds = do_bench(lambda: step(next(turn) % copies), warmup=50, rep=200, return_mode="all")
    return Times.of([value / 1e3 for value in milliseconds])


def time_in_graph(step: Callable[[int], object], copies: int, replays: int = 20) -> Times:
    """The same without the cost of issuing: one call on each set of inputs in a CUDA graph, replayed; per call.

    The results stay alive until the last call, so that no call writes where another has left its lines in the cache.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(copies):
            step(index)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [step(index) for index in range(copies)]
    samples = []
    for _ in range(3 + replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3 / copies)
    del kept
    return Times.of(samples[3:])


def count_launches(step: Callable[[], object]) -> int:
    """Kernels, copies and fills that one call puts on the GPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


def saved_bytes(
    forward: Callable[[Tensor | None], Tensor], x: Tensor | None, parameters: Sequence[Tensor | None]
) -> int:
    """Bytes kept between forward and backward besides x and the parameters, each storage once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *parameters) if tensor is not None}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward(x)  # alive until the end: its backward holds what was saved
    del y
    return sum(storages.values())


def peak_bytes(step: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, int]:
    """The step's result, and how much memory it takes at its peak beyond what was there before it, result included.

    In its first call that counts what is kept for later ones, too. On a CPU by the profiler, which sees every
    allocation of torch's, those inside of an operation included, but none of a BLAS library's.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # < 0: given back
    return result, max(itertools.accumulate(sizes, initial=0))


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing on stderr: the profiler's library says there that it starts and stops, once for each provider."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
