"""The least time an operation can take on a device, and what each design of it costs: all by formula.

A design is a list of passes. One pass is one kernel launch that reads its large operands once and writes its result
once, so that adding up the passes gives FLOPs, bytes and launches, and running them one after the other is a model of
its time. Each operation has a module with `compulsory`, what no design can avoid, and `passes`, what each design does.
`python -m peft_kernels.benchmarks.floor` prints what they come to for one layer.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Device:
    """What a machine can do. `flops_per_s` by the name of the dtype; a dtype nobody measured is left out."""

    name: str
    bytes_per_s: float
    flops_per_s: dict[str, float]
    source: str


H200 = Device(
    name="NVIDIA H200",
    bytes_per_s=4.3e12,
    flops_per_s={"bfloat16": 790e12},
    source="measured: 4.3 TB/s large copy, 788 TFLOP/s bfloat16 matmul of random data; November 2026",
)
H100 = Device(
    name="NVIDIA H100 80GB HBM3",
    bytes_per_s=3.0e12,
    flops_per_s={"bfloat16": 798e12},
    source="measured: 3.0 TB/s large copy, 798 TFLOP/s bfloat16 matmul of random data, torch 2.11; 2026-11-13",
)
RECORDS = (H200, H100)


class Work(NamedTuple):
    flops: int
    bytes: int

    def seconds(self, device: Device, dtype: str) -> float | None:
        """The floor: the slower of arithmetic and memory, each at its full rate; None if the rate is not known."""
        rate = device.flops_per_s.get(dtype)
        return None if rate is None else max(self.flops / rate, self.bytes / device.bytes_per_s)


class Pass(NamedTuple):
    name: str
    flops: int
    bytes: int


def total(parts: Iterable[Work | Pass]) -> Work:
    parts = list(parts)
    return Work(sum(part.flops for part in parts), sum(part.bytes for part in parts))


def modelled_seconds(parts: Iterable[Pass], device: Device, dtype: str) -> float:
    """The passes one after the other, each at its own floor."""
    return sum(Work(part.flops, part.bytes).seconds(device, dtype) for part in parts)


# ---- the rates of the machine at hand -------------------------------------------------------------------------------

PROBE_COPY, PROBE_MATMUL = 2**24, 1024  # elements of 4 bytes, beyond any cache; side of three square matrices
GPU_PROBE_COPY, GPU_PROBE_MATMUL = 2**28, 8192


def cpu_probes(dtype: str) -> dict[str, Callable[[], object]]:
    """A large copy and a large matmul of random data; timed among the providers, they tell the rates of just then."""
    return _probes(dtype, "cpu", PROBE_COPY, PROBE_MATMUL)


def cpu_record(copy_seconds: float, matmul_seconds: float, dtype: str) -> Device:
    """The CPU at hand, by the times of its probes."""
    return _record("CPU", copy_seconds, matmul_seconds, dtype, PROBE_COPY, PROBE_MATMUL)


def gpu_record(name: str, dtype: str) -> Device:
    """The record of a GPU by the name that torch gives; what has no record here is measured once in each run."""
    for record in RECORDS:
        if name.startswith(record.name) and dtype in record.flops_per_s:
            return record
    return _measured(name, dtype)


@functools.cache
def _measured(name: str, dtype: str) -> Device:
    from triton.testing import do_bench

    probes = _probes(dtype, "cuda", GPU_PROBE_COPY, GPU_PROBE_MATMUL)
    seconds = [do_bench(probe, return_mode="median") / 1e3 for probe in probes.values()]
    return _record(name, *seconds, dtype, GPU_PROBE_COPY, GPU_PROBE_MATMUL)


def _probes(dtype: str, device: str, elements: int, side: int) -> dict[str, Callable[[], object]]:
    values = torch.randn(elements, device=device)
    copy = values.clone()  # its pages exist
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return {"copy": lambda: copy.copy_(values), "matmul": lambda: a @ b}


def _record(name: str, copy_seconds: float, matmul_seconds: float, dtype: str, elements: int, side: int) -> Device:
    return Device(
        name=name,
        bytes_per_s=2 * 4 * elements / copy_seconds,
        flops_per_s={dtype: 2 * side**3 / matmul_seconds},
        source=f"measured: copy of {4 * elements >> 20} MiB, matmul of {side}³",
    )
