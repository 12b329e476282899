"""Measuring: time on a CPU and on a GPU, kernel launches, memory, and what a forward keeps for its backward."""

import itertools
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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
    """Every step once per round. Without a number of rounds, as many as fit into SECONDS, within reason."""
    for step in steps.values():
        for _ in range(warmup):
            step()
    return in_turns({name: lambda step=step: _seconds_on_cpu(step) for name, step in steps.items()}, rounds)


def _seconds_on_cpu(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def in_turns(clocks: dict[str, Callable[[], float]], rounds: int | None) -> dict[str, Times]:
    """A sample of every clock per round, so that whatever else the machine does strikes all alike: compare in a round.

    The order is drawn for every other round, and the next one runs backwards: nobody always follows the same neighbour,
    whose use of the caches doubles the time of a small step.
    """
    samples = {name: [] for name in clocks}
    order, draw = list(clocks), random.Random(0)
    begin = time.perf_counter()
    for turn in range(rounds or MOST_ROUNDS):
        if not rounds and turn >= FEWEST_ROUNDS and time.perf_counter() - begin > SECONDS:
            break
        draw.shuffle(order) if turn % 2 == 0 else order.reverse()
        for name in order:
            samples[name].append(clocks[name]())
    return {name: Times.of(values) for name, values in samples.items()}


def speed_against(times: Times, other: Times) -> float:
    """How many times as fast as `other`: the median of the rounds' ratios, or the ratio of medians between runs."""
    if len(times.samples) != len(other.samples):
        return other.median / times.median
    return statistics.median(theirs / ours for ours, theirs in zip(times.samples, other.samples))


def beyond(times: Times, other: Times) -> Times:
    """How much longer than `other`, round by round."""
    return Times.of([ours - theirs for ours, theirs in zip(times.samples, other.samples)])


# ---- the host --------------------------------------------------------------------------------------------------------

HOST_SECONDS = 4e-3  # a sample is of as many calls as take that long


def host_clock(
    run: Callable[[], object], running: Callable[[], AbstractContextManager], device: torch.device
) -> Callable[[], float]:
    """For `in_turns`: seconds per call that this process's threads computed; running: what a sample takes place in."""

    def seconds(calls: int) -> float:
        with running():
            start = time.process_time()
            for _ in range(calls):
                run()
            spent = time.process_time() - start
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return spent / calls

    calls = max(1, int(HOST_SECONDS / seconds(FEWEST_ROUNDS)))
    return lambda: seconds(calls)


# ---- on a GPU -------------------------------------------------------------------------------------------------------

CALLS, FEWEST_CALLS = 20, 3  # between two events: as many, or fewer of what takes long
SAMPLES, FEWEST_SAMPLES, GPU_SECONDS = 20, 5, 0.2
GRAPH_SECONDS = 1e-3  # replays between two events take that long, or one of them takes longer


def copies_beyond_cache(nbytes: int, device: torch.device) -> int:
    """How many sets of inputs to take turns with, so that none is still in a GPU's L2 cache when its turn comes."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(16, 2 + 2 * cache // nbytes)


def time_on_gpu(step: Callable[[int], object], copies: int) -> Times:
    """Eager, per call: calls issued back to back, as in training; `step(i)` runs on the i-th set of inputs.

    The device is idle when they begin, so that the slower of the two shows: the host that issues, or the device that
    computes. Triton's do_bench clears 256 MB before every call, and hides 90 µs of the host's time behind that.
    """
    turn = itertools.count()

    def issue() -> None:
        step(next(turn) % copies)

    _seconds_on_gpu(issue, copies)
    once = _seconds_on_gpu(issue, FEWEST_CALLS)
    calls = max(FEWEST_CALLS, min(CALLS, int(GPU_SECONDS / FEWEST_SAMPLES / once)))
    samples = max(FEWEST_SAMPLES, min(SAMPLES, int(GPU_SECONDS / calls / once)))
    return Times.of([_seconds_on_gpu(issue, calls) for _ in range(samples)])


def time_in_graph(step: Callable[[int], object], copies: int) -> Times:
    """The same without the cost of issuing: one call on each set of inputs in a CUDA graph, replayed; per call.

    The results stay alive until the last call, so that no call writes where another has left its lines in the cache.
    """
    times = time_in_graphs({"": lambda: [step(index) for index in range(copies)]})[""]
    return Times.of([sample / copies for sample in times.samples])


def time_in_graphs(steps: dict[str, Callable[[], object]], samples: int = SAMPLES) -> dict[str, Times]:
    """What each step puts on the device, in a CUDA graph of its own; the graphs are replayed in turns."""
    clocks = {}
    for name, step in steps.items():
        replay = _captured(step)
        count = max(1, int(GRAPH_SECONDS / _seconds_on_gpu(replay, FEWEST_CALLS)))
        clocks[name] = lambda replay=replay, count=count: _seconds_on_gpu(replay, count)
    return in_turns(clocks, samples)


def _captured(step: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def _seconds_on_gpu(run: Callable[[], object], count: int) -> float:
    """Per run, of `count` in a row between two events."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def fault(device: torch.device) -> str | None:
    """Why nothing runs on this device any more in this process, or None: what a kernel does wrong shows later."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


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


# ---- memory ---------------------------------------------------------------------------------------------------------


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
