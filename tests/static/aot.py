"""Compile a recorded Triton launch to machine code without a GPU, and read what the assembler says of it.

Importing it skips the importing tests where that cannot be done.
"""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels decorated under the interpreter cannot be compiled", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peft_kernels.triton_kernels.config import LONGEST_CHAIN, SHARED_MEMORY, Tile

ARCHITECTURES = (80, 90, 100)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}  # each architecture's widest product
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture: its PTX, and registers, spills (bytes) and shared memory (bytes)."""

    name: str
    arch: int
    tile: Tile
    ptx: str
    registers: int
    spills: int
    shared: int

    def resident(self) -> int:
        """Programs that a multiprocessor runs at a time: it has 64 warps and 65,536 registers, which warps take by 256
        and are given in fours; a program takes 1 KiB of shared memory more than it asks for."""
        warps = min(64, 65536 // (-(-self.registers * 32 // 256) * 256) // 4 * 4)
        return min(warps // self.tile.warps, (SHARED_MEMORY[self.arch] + 1024) // (self.shared + 1024))

    def reads_16_bytes(self) -> bool:
        return bool(re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.c[ag]\.shared\.global [^;]*0x10", self.ptx))

    def reads_2_bytes(self) -> bool:
        """Some half-precision tensor is read element by element."""
        return bool(re.search(r"ld\.global\S*\.b16", self.ptx))

    def narrow_accesses(self) -> int:
        """Those of memory that move less than 8 bytes of a thread's."""
        single = r"(?:ld|st)\.global(?:\.(?!v[24])[\w:]+)*\.[bfsu](?:8|16|32)\b"
        copied = r"cp\.async\.ca\.shared\.global [^;]*, 0x4[,;\s]"
        return len(re.findall(single, self.ptx)) + len(re.findall(copied, self.ptx))

    def writes_16_bytes(self) -> bool:
        """Nothing is written in smaller pieces."""
        stores = re.findall(r"st\.global\S*", self.ptx)
        return bool(stores) and all(".v4.b32" in store for store in stores)

    def uses_tensor_cores(self) -> bool:
        return bool(re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", self.ptx))

    def chains(self) -> tuple[int, int]:
        """The most fused multiply-adds in a row on one sum, and how many of them every pass through a loop adds to it.

        A loop hands a sum on by moves at its end, so every sweep over the instructions is one pass more. sm_100 adds to
        two sums at a time.
        """
        steps = []
        for kind, operands in re.findall(r"^\s*(fma\.rn\.f32|mov\.b)\S*\s+([^;]+);", self.ptx, re.M):
            to, *_, of = re.findall(r"\{[^}]*\}|[^,\s]+", operands)
            steps.append((kind != "mov.b", re.findall(r"%\w+", to), re.findall(r"%\w+", of)))
        length, before = {}, {}
        for _ in range(9):
            before = dict(length)
            for is_sum, targets, sources in steps:
                reached = max((length.get(of, 0) for of in sources), default=0) + is_sum
                for to in targets:
                    length[to] = max(length.get(to, 0), reached)
        return max(length.values()), max(length[to] - before[to] for to in length)


def compile_launch(launch, arch: int) -> Compiled:
    """`launch`: a peft_kernels.triton_kernels.common.Launch; its arguments decide types and alignment, as when run."""
    kernel = launch.kernel
    names = kernel.arg_names
    values = dict(zip(names, launch.args)) | launch.constants
    free = {names[i] if isinstance(i, int) else i for i in kernel.do_not_specialize}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value = values[name]
        kind = None if name in launch.constants else _kind(value)
        if kind is None or (kind == "i32" and value == 1 and name not in free):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        signature[name] = kind
        aligned = value.data_ptr() % 16 == 0 if isinstance(value, Tensor) else kind == "i32" and value % 16 == 0
        if aligned and name not in free:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    number = lambda field: int(re.search(rf"{field}:(\d+)", usage).group(1))  # noqa: E731
    return Compiled(
        kernel.__name__,
        arch,
        launch.tile,
        compiled.asm["ptx"],
        number("REG"),
        number("LOCAL") + number("STACK"),
        compiled.metadata.shared,
    )


def check_resources(kernel: Compiled, arch: int) -> str:
    """No spill, and the shared memory there is; returns the kernel in words, for what is asserted next."""
    where = f"{kernel.name} for sm_{arch}: {kernel.registers} registers"
    assert kernel.spills == 0, f"{where}, {kernel.spills} bytes spilled"
    assert kernel.shared <= SHARED_MEMORY[arch], f"{where}, {kernel.shared} bytes of shared memory"
    return where


def check_resident(kernel: Compiled, exactly: bool = True) -> None:
    """config.py plans as many programs on a multiprocessor as there can be, two at most; `exactly` or not more."""
    fit, planned = min(2, kernel.resident()), kernel.tile.resident
    what = f"{kernel.name} for sm_{kernel.arch}: {planned} on a multiprocessor, where {kernel.registers} registers and "
    what += f"{kernel.shared} bytes of shared memory allow {fit}"
    assert planned == fit if exactly else planned <= fit, what


def check_chains(kernel: Compiled) -> None:
    """Float32 products start afresh and are added as a whole. What is added element by element may go on."""
    longest, carried = kernel.chains()
    assert longest >= 16, f"{kernel.name} multiplies nothing"
    assert carried <= 2, f"{kernel.name}: every pass through a loop makes a chain of products {carried} terms longer"
    assert longest <= LONGEST_CHAIN, f"{kernel.name}: {longest} products are added in a row"


def binaries(launches: list) -> list:
    """What Triton compiles these launches for: two equal lists share their binaries."""
    keys = []
    for launch in launches:
        names = launch.kernel.arg_names
        free = {names[i] if isinstance(i, int) else i for i in launch.kernel.do_not_specialize}
        special = [
            (value == 1, value % 16 == 0) if isinstance(value, int) and name not in free else _type(value)
            for name, value in zip(names, launch.args)
        ]
        keys.append((launch.kernel.__name__, special, launch.constants, launch.tile))
    return keys


def _type(value):
    return value.dtype if isinstance(value, Tensor) else type(value)


def _kind(value) -> str | None:
    """The signature's word for one argument; None for what is compiled in."""
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if isinstance(value, int) and not isinstance(value, bool) else None


def _resource_usage(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        command = [tool, "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(file.name)
