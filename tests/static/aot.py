"""Compile a recorded Triton launch to machine code without a GPU, and read what the assembler says of it."""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture: its PTX, and registers, spills (bytes) and shared memory (bytes)."""

    name: str
    ptx: str
    sass: str
    registers: int
    spills: int
    shared: int


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
    usage = _cuobjdump("--dump-resource-usage", compiled.asm["cubin"])
    number = lambda field: int(re.search(rf"{field}:(\d+)", usage).group(1))  # noqa: E731
    return Compiled(
        kernel.__name__,
        compiled.asm["ptx"],
        _cuobjdump("--dump-sass", compiled.asm["cubin"]),
        number("REG"),
        number("LOCAL") + number("STACK"),
        compiled.metadata.shared,
    )


def _kind(value) -> str | None:
    """The signature's word for one argument; None for what is compiled in."""
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if isinstance(value, int) and not isinstance(value, bool) else None


@cache
def _tool() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _cuobjdump(action: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        return subprocess.run([_tool(), action, file.name], capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(file.name)
