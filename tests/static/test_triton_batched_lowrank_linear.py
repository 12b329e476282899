"""The Triton kernels of `batched_lowrank_linear` as machine code for three architectures, without a GPU."""

from dataclasses import dataclass, replace

import pytest
import torch
from aot import ARCHITECTURES, BF16, FP16, FP32, binaries, check_chains, check_resident, check_resources, compile_launch

from peft_kernels.records import AdapterSegments, Factors
from peft_kernels.triton_kernels import batched_lowrank_linear as batched
from peft_kernels.triton_kernels import common
from peft_kernels.triton_kernels.config import SEGMENT_ROWS

SHRINK, EXPAND, GRAM = "_batched_shrink_kernel", "_batched_expand_kernel", "_gram_kernel"
EVERYTHING = {(kernel, up) for kernel in (SHRINK, EXPAND, GRAM) for up in (False, True)}


@dataclass(frozen=True)
class Call:
    """One forward and backward whose launches are compiled; with 64 adapters no gradient is summed by strips."""

    dtype: torch.dtype = BF16
    factor_dtype: torch.dtype = FP32
    rank: int = 16
    rows: int = 512
    width: int = 768
    adapters: int = 64
    tensor_scale: bool = True
    needs: tuple[bool, bool, bool] = (True, True, True)

    def launches(self) -> list[common.Launch]:
        def empty(*shape, dtype=self.dtype):
            return torch.empty(shape, dtype=dtype)

        x, weight, bias = empty(self.rows, self.width), empty(self.width, self.width), empty(self.width)
        down = empty(self.adapters, self.rank, self.width, dtype=self.factor_dtype)
        up = empty(self.adapters, self.width, self.rank, dtype=self.factor_dtype)
        tiles = self.rows // SEGMENT_ROWS + self.adapters + 1
        sizes = (self.rows, self.adapters + 1, tiles, tiles)
        segments = AdapterSegments(*(empty(size, dtype=torch.int64) for size in sizes))
        factors = Factors(down, up, scale=torch.ones(self.adapters) if self.tensor_scale else 2.0)
        with common.record_launches(run=False) as launches:
            y, z = batched.batched_lowrank_linear_fwd(x, weight, bias, factors, segments)
            batched.batched_lowrank_linear_bwd(y, x, weight, factors._replace(z=z), segments, self.needs)
        return launches


# (call, its kernels with and without UP): in float32 those that hold most registers.
CALLS = {
    "lora": (Call(), EVERYTHING),
    "lora-64-fp32": (Call(FP32, rank=64), {(SHRINK, True), (GRAM, False)}),
}
SWEEP = {
    f"{dtype}-{factor_dtype}-{rank}-{adapters}": Call(dtype, factor_dtype, rank, adapters=adapters)
    for dtype, factor_dtype in ((BF16, BF16), (BF16, FP32), (FP16, FP32), (FP32, FP32))
    for rank in (16, 32, 64)
    for adapters in (4, 64)
}


def check(call: Call, kernels: set[tuple[str, bool]], arch: int, monkeypatch) -> None:
    for module in (common, batched):
        monkeypatch.setattr(module, "architecture", lambda device: arch)
    launches = {(launch.kernel.__name__, launch.constants.get("UP")): launch for launch in call.launches()}
    assert kernels <= launches.keys()
    for name, up in sorted(kernels):
        kernel = compile_launch(launches[name, up], arch)
        where = check_resources(kernel, arch)
        assert kernel.uses_tensor_cores() == (call.dtype != FP32), where
        assert ".tf32" not in kernel.ptx, where
        if call.dtype == FP32:
            check_chains(kernel)
        if name == SHRINK:
            assert kernel.reads_16_bytes(), f"{where}: the rows it gathers are not read 16 bytes at a time"
            assert not (kernel.reads_2_bytes() and call.factor_dtype == FP32), f"{where}: they are read one by one"
        if name == GRAM:  # rows of z are short, and of any length: only the wide rows can be read so
            assert kernel.reads_16_bytes(), f"{where}: the rows it gathers are not read 16 bytes at a time"
            check_resident(kernel)
        if name == EXPAND or (name == GRAM and not up):
            assert kernel.writes_16_bytes(), f"{where}: not written 16 bytes at a time"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", CALLS)
def test_machine_code(name, arch, monkeypatch):
    check(*CALLS[name], arch, monkeypatch)


@pytest.mark.sweep
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", SWEEP)
def test_machine_code_of_every_configuration(name, arch, monkeypatch):
    check(SWEEP[name], EVERYTHING, arch, monkeypatch)


def test_one_binary_for_all_rows_adapters_scales_and_ranks_of_a_bucket():
    base = binaries(Call().launches())
    assert all(base == binaries(replace(Call(), rows=rows).launches()) for rows in (1, 37, 1000))
    assert all(base == binaries(replace(Call(), rank=rank).launches()) for rank in (1, 9))
    assert base == binaries(replace(Call(), adapters=100).launches())
    assert base != binaries(replace(Call(), rank=17).launches())


def test_launch_counts():
    """Two launches forward and four backward, whatever the number of adapters; with few of them, a sum of strips for
    each gradient. cuBLAS adds one GEMM to each."""
    names = lambda **sizes: [launch.kernel.__name__ for launch in Call(**sizes).launches()]  # noqa: E731
    assert names() == [SHRINK, EXPAND, GRAM, SHRINK, GRAM, EXPAND]
    assert names(adapters=2) == [SHRINK, EXPAND, GRAM, "_sum_kernel", SHRINK, GRAM, "_sum_kernel", EXPAND]
    assert names(needs=(False, False, False)) == [SHRINK, EXPAND]
    assert names(needs=(True, False, False)) == [SHRINK, EXPAND, SHRINK, EXPAND]
    assert names(needs=(False, False, True)) == [SHRINK, EXPAND, GRAM]
