"""What every Triton operation shares: one way to launch, operand types, and the dropout mask."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from . import config
from .config import Tile

LONGEST_CHAIN = tl.constexpr(config.LONGEST_CHAIN)
PHILOX_ROUNDS = tl.constexpr(config.PHILOX_ROUNDS)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Launch(NamedTuple):
    """One kernel launch: what the static tests compile ahead of time and the benchmarks count."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple
    constants: dict[str, Any]
    tile: Tile

    def run(self) -> CompiledKernel | None:
        """On the device of the first tensor, on torch's current stream. Returns what Triton compiled, if it did."""
        device = next(arg.device for arg in self.args if isinstance(arg, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return self.kernel[self.grid](*self.args, **self._options)

    def compile(self) -> None:
        """Without running it."""
        self.kernel.warmup(*self.args, grid=self.grid, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {**self.constants, "num_warps": self.tile.warps, "num_stages": self.tile.stages}


_record: list[Launch] | None = None
_running = True
_recording = threading.local()  # .launches: those of `replay.py`, with what was compiled


@contextmanager
def record_launches(run: bool = True) -> Iterator[list[Launch]]:
    """Collect the launches made inside the block; run=False only collects, so that no GPU is needed."""
    global _record, _running
    previous = _record, _running
    _record, _running = [], run
    try:
        yield _record
    finally:
        _record, _running = previous


def launch(kernel: JITFunction, grid: tuple[int, ...], args: tuple, constants: dict[str, Any], tile: Tile) -> None:
    """Run `kernel` over `grid`, unless launches are only recorded."""
    launched = Launch(kernel, grid, args, constants, tile)
    if _record is not None:
        _record.append(launched)
    if not _running:
        return
    compiled = launched.run()
    if (recording := getattr(_recording, "launches", None)) is not None:
        recording.append((launched, compiled))


def architecture(device: torch.device) -> int:
    """80 for sm_80, 90 for sm_90 and so on; the interpreter on a CPU takes sm_90's choices."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def dot_constants(dtype: torch.dtype) -> dict[str, Any]:
    """Operand type and input precision of every product on tensors of `dtype`.

    float32 stays float32 unless torch's own matmuls are allowed tf32. The interpreter's bfloat16 arithmetic is wrong
    (triton 3.6 to 3.9), so there every operand becomes float32.
    """
    dot = tl.float32 if INTERPRETED else DOT_TYPES[dtype]
    return {"DOT": dot, "PRECISION": "tf32" if allows_tf32() else "ieee"}


@triton.jit
def add_dot(acc, a, b, PRECISION: tl.constexpr):
    """acc + a · b, in float32.

    Without tensor cores a product is a chain of fused multiply-adds, and a loop that hands `acc` on makes one chain of
    all its products: 4,096 terms then err six times as much as in chains of 64, and more than cuBLAS's sums of slices.
    So where float32 stays float32 each product starts afresh. max_num_imprecise_acc keeps the addition out of it:
    without that, the compiler (triton 3.6 and 3.7) folds `acc` back into the chain, which the static tests would see.
    """
    if a.dtype == tl.float32 and PRECISION == "ieee":
        acc += tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=LONGEST_CHAIN)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_afresh(acc, a, b, PRECISION: tl.constexpr):
    """acc + a · b of float32 operands, whose product starts from zero, in "tf32x3" or "tf32".

    Three tf32 products take in 22 bits of each operand, which are enough unless `acc` and the product cancel: then they
    err four times as much as float32, seen on an H200. Tensor cores cut off what does not fit their sum, at every 8
    terms and always towards zero: handed on from product to product, that errs several times as much as float32's
    rounding, and the longer the worse. So each product is short, and what adds them up rounds. max_num_imprecise_acc
    as in `add_dot`.
    """
    return acc + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=LONGEST_CHAIN)


def allows_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"  # inherits the global setting where it has none


def dropout_arguments(rng: Tensor | None, p: float) -> tuple[Tensor | None, int, float]:
    """(rng, threshold, keep_scale): an element is kept iff its 16 random bits are >= threshold."""
    if rng is None:
        return None, 0, 1.0
    return rng, min(round(p * 65536), 65535), 1 / (1 - p)


@triton.jit
def load_rng(rng_ptr):
    """(seed, offset): once and before a loop, where they would be read again for every tile."""
    return tl.load(rng_ptr), tl.load(rng_ptr + 1)


@triton.jit
def keep_mask(rng, rows, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) of booleans, a pure function of (seed, offset, row, column): the same whatever the tiling.

    Philox-4x32-7, keyed by the seed; one call gives the 16 bits each of eight neighbouring columns. first_column and
    COLUMNS are multiples of 8.
    """
    seed, offset = rng
    zero = tl.zeros((ROWS, COLUMNS // 8), tl.uint32)
    groups = first_column // 8 + tl.arange(0, COLUMNS // 8)
    counter_row = zero + rows[:, None].to(tl.uint32)
    counter_group = zero + groups[None, :].to(tl.uint32)
    low = zero + (offset & 0xFFFFFFFF).to(tl.uint32)
    high = zero + (offset >> 32).to(tl.uint32)
    w0, w1, w2, w3 = _philox(counter_row, counter_group, low, high, seed)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    threshold = threshold.to(tl.uint32)
    return tl.reshape(tl.join((words & 0xFFFF) >= threshold, words >= (threshold << 16)), (ROWS, COLUMNS))


@triton.jit
def _philox(c0, c1, c2, c3, seed):
    """Philox-4x32 as `tl.philox` has it, but that one multiplication gives both halves of each product."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(PHILOX_ROUNDS):
        first, second = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (second >> 32).to(tl.uint32) ^ c1 ^ k0, (first >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = second.to(tl.uint32), first.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


def scale_arguments(scale: float | Tensor) -> tuple[Tensor | None, float]:
    """(scale_ptr, scale): the kernels read the number from memory if there is a pointer."""
    if isinstance(scale, Tensor):
        return scale, 1.0
    return None, float(scale)


@triton.jit
def load_scale(scale_ptr, scale):
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    return scale


@triton.jit
def _add_parts(partial_ptr, out_ptr, block, count, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """One block of out = Σ of `count` partial sums, PARTS of them side by side in a fixed order.

    One after another, 12 programs of BLIP's factors would wait 80 times for memory.
    """
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((PARTS, BLOCK), tl.float32)
    for first in range(0, count, PARTS):
        parts = first + tl.arange(0, PARTS)
        pointers = partial_ptr + parts[:, None].to(tl.int64) * size + offsets[None, :]
        total += tl.load(pointers, mask=(parts < count)[:, None] & (offsets < size)[None, :], other=0.0)
    out = tl.sum(total, axis=0)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=offsets < size)


@triton.jit(do_not_specialize=["count_a", "count_b", "count_c"])
def _sum_kernel(
    a_ptr, a_out_ptr, b_ptr, b_out_ptr, c_ptr, c_out_ptr, count_a, size_a, count_b, size_b, count_c, size_c,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Up to three sums of partial sums; grid (blocks of the first's elements, then of the second's, …)."""
    block = tl.program_id(0)
    end_a = tl.cdiv(size_a, BLOCK)
    end_b = end_a + tl.cdiv(size_b, BLOCK)
    if block < end_a:
        _add_parts(a_ptr, a_out_ptr, block, count_a, size_a, PARTS, BLOCK)
    if b_ptr is not None:  # noqa: SIM102 (a constant, and a branch)
        if (block >= end_a) & (block < end_b):
            _add_parts(b_ptr, b_out_ptr, block - end_a, count_b, size_b, PARTS, BLOCK)
    if c_ptr is not None:  # noqa: SIM102
        if block >= end_b:
            _add_parts(c_ptr, c_out_ptr, block - end_b, count_c, size_c, PARTS, BLOCK)


def sum_partials(sums: Sequence[tuple[Tensor | None, Tensor | None]]) -> list[Tensor | None]:
    """Up to three times (P, ...) float32 and a tensor of the result's dtype: added in an order that P alone decides.

    None for what there is no sum of.
    """
    tile, args, numbers, blocks = config.SUM, [], [], 0
    outs = [None if parts is None else like.new_empty(parts.shape[1:]) for parts, like in sums]
    for (parts, _), out in zip(sums, outs):
        if parts is not None:
            args += (parts, out)
            numbers += (parts.shape[0], out.numel())
            blocks += triton.cdiv(out.numel(), tile.columns)
    missing = 6 - len(args)
    if args:
        args = (*args, *[None] * missing, *numbers, *[0] * missing)
        launch(_sum_kernel, (blocks,), args, {"PARTS": tile.rows, "BLOCK": tile.columns}, tile)
    return outs


@triton.jit
def in_eights(number, ALIGNED: tl.constexpr):
    """A rank or a row's stride, which the compiler then knows to be a multiple of 8 if ALIGNED says that it is one.

    A row of R halves or floats is then read and written 16 bytes at a time, not one by one. Triton itself would only
    look for multiples of 16, and rank 8 is PEFT's default. It reads the promise off the product; the assumption lets
    LLVM take the number as it came, in no register of its own.
    """
    if ALIGNED:
        tl.assume(number % 8 == 0)
        number = number // 8 * 8
    return number


# ---- tables in device memory: kernels that work on many tensors of different shapes find them there -----------------


@triton.jit
def load_pointer(place_ptr, TYPE: tl.constexpr, ALIGNED: tl.constexpr = False):
    """The pointer that a table holds; ALIGNED promises 16 bytes."""
    pointer = tl.load(place_ptr).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_size(place_ptr, MULTIPLE: tl.constexpr = 1):
    """A size or a stride that a table holds, and the promise that it is a multiple of MULTIPLE.

    The promise sticks to this very load: where another branch does without it, that branch loads the number again.
    """
    return tl.multiple_of(tl.load(place_ptr), MULTIPLE)
