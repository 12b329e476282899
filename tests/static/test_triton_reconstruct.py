"""The Triton kernel of `reconstruct` as machine code for three architectures, in config.py's tiles, without a GPU."""

from dataclasses import dataclass, replace

import pytest
import torch
from aot import ARCHITECTURES, BF16, FP16, FP32, TENSOR_CORES, binaries, check_chains, check_resources, compile_launch

from peft_kernels.records import Factors
from peft_kernels.triton_kernels import common, reconstruct


@dataclass(frozen=True)
class Call:
    """One launch to compile; the sizes stand for every size of the same divisibility."""

    dtype: torch.dtype = BF16
    factor_dtype: torch.dtype = FP32
    rank: int = 16
    width: int = 768
    out_blocks: int = 1
    in_blocks: int = 1
    core: str | None = None
    base: str | None = "full"  # | "shared" | None
    tensor_scale: bool = True

    def launches(self) -> list[common.Launch]:
        def empty(*shape, dtype=self.factor_dtype):
            return torch.empty(shape, dtype=dtype)

        down, up, core = empty(self.rank, self.width), empty(self.width, self.rank), None
        if self.core is not None:
            core = empty(self.out_blocks, self.in_blocks, *(self.rank,) * (1 if self.core == "diagonal" else 2))
        shape = (self.out_blocks * self.width, self.in_blocks * self.width)
        shape = (self.width, self.width) if self.base == "shared" else shape
        base = None if self.base is None else empty(*shape, dtype=self.dtype)
        scale = torch.ones(()) if self.tensor_scale else 2.0
        with common.record_launches(run=False) as launches:
            reconstruct.reconstruct_fwd(Factors(down, up, core, scale), base, self.dtype)
        return launches


CALLS = {
    "merge-lora": Call(factor_dtype=BF16),
    "merge-lora-float32-factors": Call(),
    "aurora-stack": Call(factor_dtype=BF16, rank=64, out_blocks=36, core="diagonal"),
    "aurora-stack-float32": Call(FP32, rank=64, out_blocks=36, core="diagonal", base=None),
    "aurora-released-stack-on-one-base": Call(rank=64, out_blocks=36, core="dense", base="shared"),
}
SWEEP = {
    f"{dtype}-{factor_dtype}-{rank}-{core}-{blocks}-{base}": Call(dtype, factor_dtype, rank, 768, *blocks, core, base)
    for dtype, factor_dtype in ((BF16, BF16), (BF16, FP32), (FP16, FP32), (FP32, FP32))
    for rank in (16, 96, 5)
    for core, blocks in ((None, (1, 1)), ("diagonal", (3, 1)), ("dense", (3, 1)), ("dense", (2, 2)))
    for base in ("full", "shared", None)
    if base != "shared" or blocks == (3, 1)
}


def check(call: Call, arch: int, monkeypatch) -> None:
    monkeypatch.setattr(reconstruct, "architecture", lambda device: arch)
    [launch] = call.launches()
    kernel = compile_launch(launch, arch)
    where = check_resources(kernel, arch)
    least = 2 if arch >= 100 or call.factor_dtype != BF16 else 3
    assert kernel.resident() >= least, f"{where}: {least} programs do not fit a multiprocessor"
    assert kernel.writes_16_bytes(), f"{where}: its result is not written 16 bytes at a time"
    if call.base is not None:
        assert kernel.reads_16_bytes(), f"{where}: its base is not read 16 bytes at a time"
        if call.dtype != call.factor_dtype:  # only the base is half precision
            assert not kernel.reads_2_bytes(), f"{where}: its base is read one by one"
    if call.dtype == FP32:
        assert ".tf32" not in kernel.ptx, where
        assert not kernel.uses_tensor_cores(), where
        check_chains(kernel)
    else:
        assert ".tf32" not in kernel.ptx, f"{where}: multiplied as tf32"
        assert TENSOR_CORES[arch] in kernel.ptx, f"{where}: no {TENSOR_CORES[arch]}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", CALLS)
def test_machine_code(name, arch, monkeypatch):
    check(CALLS[name], arch, monkeypatch)


@pytest.mark.sweep
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", SWEEP)
def test_machine_code_of_every_configuration(name, arch, monkeypatch):
    check(SWEEP[name], arch, monkeypatch)


@pytest.mark.parametrize(
    ("call", "kind", "parts"),
    [
        (Call(factor_dtype=BF16), "bf16", (1, 1)),
        (Call(FP16, FP16), "fp16", (1, 1)),
        (Call(factor_dtype=BF16, core="diagonal"), "bf16", (2, 1)),
        (Call(factor_dtype=BF16, core="dense"), "bf16", (3, 1)),
        (Call(FP16, FP16, core="diagonal"), "bf16", (3, 2)),
        *((Call(dtype, FP32, core=core), "bf16", (3, 3)) for dtype in (BF16, FP16) for core in (None, "diagonal")),
        (Call(FP32, FP32, core="dense"), "fp32", (1, 1)),
    ],
)
def test_a_half_precision_result_is_float32s_sum(call, kind, parts):
    """Every operand keeps its bits, 8 for a bfloat16 part. Fewer would not round correctly."""
    constants = call.launches()[0].constants
    assert (str(constants["KIND"]), constants["MIXED_PARTS"], constants["DOWN_PARTS"]) == (kind, *parts)
    assert constants["PRECISION"] == "ieee"


def test_one_binary_for_most_ranks_and_for_all_blocks_rows_and_scales():
    """A number of matrices that was not seen before compiles nothing; nor does a rank, but for one of a few kinds:
    up to 16 or above it, a multiple of 16 or not, or 1."""
    stack = Call(factor_dtype=BF16, rank=64, out_blocks=36, core="diagonal")
    base = binaries(stack.launches())
    assert all(base == binaries(replace(stack, rank=rank).launches()) for rank in (32, 96, 128))
    assert all(base == binaries(replace(stack, out_blocks=blocks).launches()) for blocks in (1, 3))
    assert base != binaries(replace(stack, width=760).launches())
    lora = Call(factor_dtype=BF16, tensor_scale=False)
    for ranks in ((4, 5, 8), (17, 24, 100)):
        assert len({repr(binaries(replace(lora, rank=rank).launches())) for rank in ranks}) == 1


def test_one_launch_whatever_it_sums():
    for call in (*CALLS.values(), *SWEEP.values()):
        assert [launch.kernel.__name__ for launch in call.launches()] == ["_reconstruct_kernel"]
