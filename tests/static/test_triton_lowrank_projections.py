"""The Triton kernels of `lowrank_projections` as machine code for three architectures, in config.py's tiles.

No spill, shared memory within the limit, 16-byte accesses though a program picks its pointers, no tf32 in float32.
"""

import re
from dataclasses import dataclass, replace

import pytest
import torch
from aot import (
    ARCHITECTURES,
    BF16,
    FP16,
    FP32,
    Compiled,
    binaries,
    check_chains,
    check_resident,
    check_resources,
    compile_launch,
)

from peft_kernels.records import KEEP_ALL, Dropout, ProjectionNeeds, Projections
from peft_kernels.triton_kernels import common, lowrank_linear_bwd, lowrank_projections
from peft_kernels.triton_kernels.config import ProjectionsShape, projections_config


@dataclass(frozen=True)
class Call:
    """One forward and backward whose launches are compiled; the sizes stand for every size of the same divisibility."""

    dtype: torch.dtype = BF16
    factor_dtype: torch.dtype = FP32
    rank: int = 16
    rows: int = 64
    width: int = 768
    outputs: tuple[int, ...] = (768, 768, 768)
    shared: bool = False
    stacked: bool = False
    dropout_on: str | None = None
    has_bias: bool = True

    def launches(self) -> list[common.Launch]:
        def empty(*shape, dtype=self.dtype):
            return torch.empty(shape, dtype=dtype)

        count, rank, kind = len(self.outputs), self.rank, self.factor_dtype
        x, weights = empty(self.rows, self.width), [empty(n, self.width) for n in self.outputs]
        if self.stacked:
            weights = list(empty(sum(self.outputs), self.width).split(self.outputs))
        downs = [empty(rank, self.width, dtype=kind) for _ in range(1 if self.shared else count)]
        ups, scales = [empty(n, rank, dtype=kind) for n in self.outputs], [torch.ones(()) for _ in self.outputs]
        biases = [empty(n) if self.has_bias else None for n in self.outputs[:-1]] + [None]
        dropout = KEEP_ALL
        if self.dropout_on:
            dropout = Dropout(torch.zeros(count, 2, dtype=torch.int64), 0.1, self.dropout_on)
        with common.record_launches(run=False) as launches:
            *ys, z = lowrank_projections.lowrank_projections_fwd(
                x, weights, biases, Projections(downs, ups, scales), dropout
            )
            dys = ys if self.stacked else [torch.empty_like(y) for y in ys]
            lowrank_projections.lowrank_projections_bwd(
                dys, x, weights, Projections(downs, ups, scales, z), dropout, ProjectionNeeds(True, True, True)
            )
        return launches

    def launched(self, arch: int, monkeypatch) -> dict[str, common.Launch]:
        for module in (lowrank_projections, lowrank_linear_bwd):
            monkeypatch.setattr(module, "architecture", lambda device: arch)
        return {launch.kernel.__name__: launch for launch in self.launches()}


NARROW = (256, 256)
# The calls that users make, each with the dropout that costs its kernels most registers.
CALLS = {
    "lora": Call(dropout_on="input"),
    "lora-grouped-queries": Call(outputs=(768, 256, 256), dropout_on="input", stacked=True),
    "lora-without-dropout-bf16-factors": Call(factor_dtype=BF16, rank=8),
    "lora-32-fp16": Call(FP16, rank=32, dropout_on="input"),
    "lora-64": Call(rank=64, dropout_on="input"),
    "lora-12": Call(rank=12, dropout_on="input"),
    "lora-64-without-dropout": Call(rank=64),
    "lora-four": Call(outputs=(256,) * 4, dropout_on="input"),
    "aurora": Call(rank=64, shared=True, dropout_on="rank"),
    "lora-32-fp32": Call(FP32, rank=32, dropout_on="input"),
    "lora-64-fp32": Call(FP32, rank=64, dropout_on="input"),
}
KERNELS = ("shrink_kernel", "expand_kernel", "up_bwd_kernel", "hidden_bwd_kernel", "down_bwd_kernel")
SWEEP = {
    f"{dtype}-{rank}-{len(outputs)}-{place}-{'one A' if shared else 'A each'}": Call(
        dtype, FP32, rank, outputs=outputs, shared=shared, stacked=shared, dropout_on=place
    )
    for dtype in (BF16, FP16, FP32)
    for rank in (16, 32, 64)
    for outputs in ((768, 768), (768, 768, 768), (768, 256, 256, 768))
    for place in (None, "input", "rank")
    for shared in (False, True)
}


def check(call: Call, arch: int, monkeypatch) -> dict[str, Compiled]:
    """The kernels that were compiled and found good."""
    launches = call.launched(arch, monkeypatch)
    compiled = {name: compile_launch(launches[name], arch) for name in launches if name in KERNELS}
    for name, kernel in compiled.items():
        where = check_resources(kernel, arch)
        if call.dtype == FP32:
            assert ".tf32" not in kernel.ptx, where
            assert "mma" not in kernel.ptx, where
        if call.dtype == FP32 and name != "hidden_bwd_kernel":
            check_chains(kernel)
        if name in ("up_bwd_kernel", "down_bwd_kernel") and call.rank % 8 == 0:
            check_resident(kernel, exactly=False)
        if name in ("shrink_kernel", "up_bwd_kernel", "down_bwd_kernel"):
            assert kernel.reads_16_bytes(), f"{where}: its large tensor is not read 16 bytes at a time"
        if name == "expand_kernel" or (name == "down_bwd_kernel" and call.dtype != FP32):
            assert re.search(r"st\.global\S*\.v4\.b32", kernel.ptx), f"{where}: not written 16 bytes at a time"
    return compiled


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", CALLS)
def test_machine_code(name, arch, monkeypatch):
    assert {*KERNELS} - {"hidden_bwd_kernel"} <= {*check(CALLS[name], arch, monkeypatch)}


@pytest.mark.sweep
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", SWEEP)
def test_machine_code_of_every_configuration(name, arch, monkeypatch):
    assert check(SWEEP[name], arch, monkeypatch)


def test_widths_of_one_compile(monkeypatch):
    """Triton makes a constant of each number 1."""
    check_widths = replace(CALLS["lora"], outputs=(1, 768), width=1)
    for name, launch in check_widths.launched(90, monkeypatch).items():
        if name in KERNELS:
            check_resources(compile_launch(launch, 90), 90)


def test_one_binary_for_all_rows_and_ranks_of_a_bucket():
    """What a binary is compiled for does not change with rows, rank inside its bucket, or z's row stride.

    But a rank that is a multiple of 8 has one of its own.
    """
    base = binaries(Call().launches())
    assert base == binaries(Call(rows=1000).launches()) == binaries(Call(rows=37).launches())
    assert base == binaries(Call(rank=8).launches())
    other = binaries(Call(rank=9).launches())
    assert base != other == binaries(Call(rank=12).launches())
    assert other != binaries(Call(rank=17).launches())


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_thin_operands_move_in_wide_pieces(dtype, monkeypatch):
    """Up to 16 bytes at a time, as much as a thread has of a tile; what is narrow is the scales."""
    call = Call(dtype, dtype, rank=8, has_bias=False)
    for name, launch in call.launched(90, monkeypatch).items():
        if name in KERNELS:
            assert compile_launch(launch, 90).narrow_accesses() <= len(call.outputs), name
            if name in ("expand_kernel", "up_bwd_kernel", "hidden_bwd_kernel"):
                mutant = launch._replace(constants=launch.constants | {"ALIGNED": False})
                assert compile_launch(mutant, 90).narrow_accesses() > len(call.outputs), name


def test_launch_counts():
    """Two forward, and three or four backward, however many projections there are."""
    names = [launch.kernel.__name__ for launch in CALLS["lora-grouped-queries"].launches()]
    forward = ["shrink_kernel", "expand_kernel"]
    assert names == [*forward, "up_bwd_kernel", "hidden_bwd_kernel", "down_bwd_kernel", "_sum_kernel"]
    for call in (Call(outputs=NARROW), Call(outputs=NARROW, shared=True), Call(outputs=NARROW, dropout_on="input")):
        names = [launch.kernel.__name__ for launch in call.launches()]
        assert names == [*forward, "up_bwd_kernel", "down_bwd_kernel", "_sum_kernel"]


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("rank", [1, 16, 17, 64])
def test_a_config_is_chosen_for_every_shape(rank, parts):
    for arch in (80, 86, 89, 90, 100, 120):
        for dtype in (BF16, FP16, FP32):
            for dropout in (False, True):
                config = projections_config(ProjectionsShape(768, 768, rank, 4, parts, dropout), dtype, arch)
                assert config.block_r >= rank and parts % config.shrink_at_once == 0 == parts % config.down_at_once
    with pytest.raises(ValueError, match="ranks up to 64"):
        projections_config(ProjectionsShape(768, 768, 65, 4, parts), BF16, 90)
