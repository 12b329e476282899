"""A driver of Triton's for a machine without a GPU: kernels are compiled as for one, and a launch is checked, not run.

What the driver of a GPU would refuse, or would take and then read nonsense from, raises BadLaunch here.
"""

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from .pretend import GPU, H100, is_address, is_there

TARGET = GPUTarget("cuda", 90, 32)
GRID = (2**31 - 1, 65_535, 65_535)
_DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "i1": torch.bool,
    "u1": torch.bool,
    "i8": torch.int8,
    "u8": torch.uint8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
}


class BadLaunch(RuntimeError):
    """A launch that a GPU would not survive; the message says which argument of which kernel, and why."""


class Launcher:
    """Made once for each compiled kernel, called for each launch, as the one in triton/backends/nvidia/driver.py is."""

    launches: ClassVar[Counter[str]] = Counter()  # by name of the kernel

    def __init__(self, src: Any, metadata: Any):
        self.name, self.kinds = metadata.name, dict(src.signature)
        self.constants = {_path(src, key): value for key, value in src.constants.items()}
        self.aligned = {path[0] for path, facts in src.attrs.items() if ["tt.divisibility", 16] in map(list, facts)}
        self.threads = 32 * metadata.num_warps * metadata.num_ctas

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        """rest: the packed metadata, that of the launch, two hooks, then the kernel's arguments"""
        self._check_grid((x, y, z))
        args = rest[4:]
        if len(args) != len(self.kinds):
            raise BadLaunch(f"{self.name}: {len(args)} arguments for {len(self.kinds)} parameters")
        for index, (name, kind) in enumerate(self.kinds.items()):
            if problem := self._problem(index, kind, args[index]):
                raise BadLaunch(f"{self.name}: {name}: {problem}")
        Launcher.launches[self.name] += 1

    def _check_grid(self, grid: tuple[int, int, int]) -> None:
        """Triton launches nothing where the product of the three is not above 0 as an int of 32 bits."""
        for axis, size, most in zip("xyz", grid, GRID):
            if not 0 <= size <= most:
                raise BadLaunch(f"{self.name}: grid: {size} blocks along {axis}, not from 0 to {most}")
        if (blocks := grid[0] * grid[1] * grid[2]) >= 2**31:
            raise BadLaunch(f"{self.name}: grid: {blocks} blocks overflow the launcher's int: it might launch nothing")

    def _problem(self, index: int, kind: Any, value: Any) -> str | None:
        if kind == "constexpr":
            compiled = self.constants.get((index,), value)
            if compiled is None and _is_number(value):
                return None  # replay.py: some address in the place of a tensor that is not there, and is not read
            return None if _same(compiled, value) else f"compiled for {compiled!r}, got {value!r}"
        if not isinstance(kind, str):
            return None  # a tuple: none of ours has any
        aligned = index in self.aligned
        if kind[0] == "*":
            return _pointer_problem(kind[1:], value, aligned)
        return _number_problem(kind, value, aligned)


def _path(src: Any, key: Any) -> tuple[int, ...]:
    return (src.fn.arg_names.index(key),) if isinstance(key, str) else key


def _same(compiled: Any, value: Any) -> bool:
    return compiled is value or (type(compiled) is type(value) and bool(compiled == value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _pointer_problem(element: str, value: Any, aligned: bool) -> str | None:
    """value: a tensor, or from replay.py an address, of which nobody knows the type."""
    if _is_number(value):
        if not is_address(value):
            return f"expected an address on the GPU, got {value:#x}"
        address = value
    elif not isinstance(value, Tensor):
        return f"expected a tensor of {element}, got {type(value).__name__}"
    elif not is_there(value):
        return f"expected a tensor on the GPU, got one on {value.device}"
    elif value.dtype != _DTYPES[element]:
        return f"expected {_DTYPES[element]}, got {value.dtype}"
    else:
        address = value.data_ptr()
    if address % _DTYPES[element].itemsize:
        return f"its address is no multiple of {_DTYPES[element].itemsize} bytes"
    if aligned and address % 16:
        return f"compiled for addresses that 16 divides, got {address % 16} more"
    return None


def _number_problem(kind: str, value: Any, aligned: bool) -> str | None:
    if integer := re.fullmatch(r"([iu])(\d+)", kind):
        if not isinstance(value, int):
            return f"expected a whole number, got {type(value).__name__}"
        bits = int(integer[2])
        least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if integer[1] == "i" else (0, 2**bits - 1)
        if bits > 1 and not least <= value <= most:
            return f"{value} does not fit {kind}"
        return f"compiled for multiples of 16, got {value}" if aligned and value % 16 else None
    return None if isinstance(value, float | int) else f"expected a number, got {type(value).__name__}"


class _Utils:
    """What Triton's compiled module answers on a GPU."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {
            "max_shared_mem": H100.shared_memory_per_block_optin,
            "max_num_regs": H100.regs_per_multiprocessor,
            "multiprocessor_count": H100.multi_processor_count,
            "warpSize": H100.warp_size,
        }

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """-> module, function, registers of a thread, spilled ones, most threads of a block"""
        registers, spilled = resources(binary)
        warps = H100.regs_per_multiprocessor // (256 * -(-registers // 8))  # a thread's come in groups of eight
        return 1, 1, registers, spilled // 4, min(1024, 32 * warps)


def resources(binary: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its local memory), as the assembler chose them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    used = {field: int(number) for field, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout)}
    return used["REG"], used["STACK"] + used["LOCAL"]


class Driver:
    """The parts of triton.backends.driver.GPUDriver that Triton asks for, 3.6 to 3.7."""

    utils, launcher_cls = _Utils, Launcher
    numbers: ClassVar[Iterator[int]] = itertools.count(1000)

    def __init__(self) -> None:
        # Kernels keep what they have loaded by the device's number: nothing may be taken for what a GPU has loaded.
        self.device = next(self.numbers)

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return H100.major, H100.minor

    def get_active_torch_device(self) -> torch.device:
        return GPU

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_empty_cache_for_benchmark(self) -> Tensor:
        return torch.empty(256 * 2**20, dtype=torch.int8, device=GPU)

    def clear_cache(self, cache: Tensor) -> None:
        cache.zero_()


@contextmanager
def checked_launches() -> Iterator[Counter[str]]:
    """Triton's launches go through Launcher until the block ends; yields how many did, by name of the kernel."""
    before, Launcher.launches = driver._active, Counter()
    driver.set_active(Driver())
    try:
        yield Launcher.launches
    finally:
        driver._active, Launcher.launches = before, Counter()
