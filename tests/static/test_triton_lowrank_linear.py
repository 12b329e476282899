"""The Triton kernels of `lowrank_linear` as machine code for three architectures, in config.py's tiles, without a GPU.

No spill, shared memory within the limit, tensor cores where they belong, 16-byte accesses, no tf32 in float32 kernels.
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
    TENSOR_CORES,
    binaries,
    check_chains,
    check_resident,
    check_resources,
    compile_launch,
)
from triton_mutants import load

from peft_kernels.records import KEEP_ALL, Dropout, Factors, Needs
from peft_kernels.triton_kernels import common, lowrank_linear, lowrank_linear_bwd, lowrank_linear_fwd
from peft_kernels.triton_kernels.config import LowRankShape, lowrank_linear_config


@dataclass(frozen=True)
class Call:
    """One forward and backward whose launches are compiled; the sizes stand for every size of the same divisibility."""

    dtype: torch.dtype = BF16
    factor_dtype: torch.dtype = FP32
    rank: int = 16
    rows: int = 512
    width: int = 768
    outputs: int = 768
    out_blocks: int = 1
    in_blocks: int = 1
    core: str | None = None
    dropout_on: str | None = None
    design: str | None = None
    tensor_scale: bool = True  # what layers and compiled graphs pass
    needs_z: bool = False  # where it is given: then hidden_bwd makes dz, and down_bwd reads it
    has_bias: bool = True

    def launches(self) -> list[common.Launch]:
        def empty(*shape, dtype=self.dtype):
            return torch.empty(shape, dtype=dtype)

        x, weight = empty(self.rows, self.width), empty(self.outputs, self.width)
        bias = empty(self.outputs) if self.has_bias else None
        down = empty(self.rank, self.width // self.in_blocks, dtype=self.factor_dtype)
        up = empty(self.outputs // self.out_blocks, self.rank, dtype=self.factor_dtype)
        core = None
        if self.core is not None:
            shape = (self.rank,) if self.core == "diagonal" else (self.rank, self.rank)
            core = empty(self.out_blocks, self.in_blocks, *shape, dtype=self.factor_dtype)
        rng = torch.zeros(2, dtype=torch.int64)
        dropout = KEEP_ALL if self.dropout_on is None else Dropout(rng, 0.1, self.dropout_on)
        factors = Factors(down, up, core, torch.ones(()) if self.tensor_scale else 2.0)
        needs = Needs(x=True, down=True, up=True, core=core is not None, z=self.needs_z)
        with common.record_launches(run=False) as launches:
            y, z = lowrank_linear.lowrank_linear_fwd(x, weight, bias, factors, dropout, self.design)
            dy = torch.empty_like(y)
            lowrank_linear.lowrank_linear_bwd(dy, x, weight, factors._replace(z=z), dropout, needs)
        return launches

    @property
    def makes_dz_late(self) -> bool:
        """In down_bwd: then there is no hidden_bwd."""
        return self.dtype != FP32 and self.core is None and self.rank <= 32 and not self.needs_z


# The calls that users make, each with the dropout that costs its kernels most registers.
CALLS = {
    "lora": Call(dropout_on="input"),
    "lora-without-dropout-bf16-factors": Call(factor_dtype=BF16, rank=8, tensor_scale=False),
    "lora-fp16": Call(FP16, dropout_on="input"),
    "lora-32-fused": Call(rank=32, dropout_on="input", design="fused"),
    "lora-64": Call(rank=64, dropout_on="input"),
    "lora-12": Call(rank=12, dropout_on="input"),
    "aurora-qkv": Call(rank=64, out_blocks=3, core="diagonal", dropout_on="core"),
    "aurora-released": Call(rank=64, core="dense", dropout_on="rank"),
    "lora-32-fp32": Call(FP32, rank=32, dropout_on="input"),
    # Where sm_100 would take tf32
    "lora-64-fp32": Call(FP32, rank=64, dropout_on="input"),
    "aurora-released-fp32": Call(FP32, rank=64, core="dense", dropout_on="rank"),
}
PRODUCTS = ("_shrink_kernel", "_expand_kernel", "_fused_kernel", "_up_bwd_kernel", "_down_bwd_kernel")
STRIPS = ("_up_bwd_kernel", "_core_bwd_kernel", "_down_bwd_kernel")
SWEEP = {
    f"{dtype}-{rank}-{core}-{blocks}-{place}-{design}": Call(
        dtype, FP32, rank, 512, 768, 768, *blocks, core, place, design
    )
    for dtype in (BF16, FP32)
    for rank in (16, 32, 64)
    for core, blocks in ((None, (1, 1)), ("diagonal", (1, 4)), ("dense", (3, 1)))
    for place in ("input", "core" if rank == 32 else "rank")
    for design in (None, "fused")
    if design is None or (rank <= 32 and blocks[1] == 1)
}
MOST_CHUNKS = {16: 6, 32: 3}  # that down_bwd adds up


def check(call: Call, arch: int, monkeypatch) -> list[str]:
    """The names of the kernels that were compiled and found good."""
    for module in (lowrank_linear, lowrank_linear_bwd):
        monkeypatch.setattr(module, "architecture", lambda device: arch)
    compiled = {}
    for launch in call.launches():
        if launch.kernel.__name__ not in compiled:
            compiled[launch.kernel.__name__] = compile_launch(launch, arch)
    for name, kernel in compiled.items():
        where = check_resources(kernel, arch)
        if call.dtype == FP32:
            assert ".tf32" not in kernel.ptx, where
            assert "mma" not in kernel.ptx, where
        if call.dtype == FP32 and name in PRODUCTS:
            check_chains(kernel)
        if name in STRIPS and call.rank % 8 == 0:
            check_resident(kernel, exactly=call.core is None and call.dropout_on == "input")
        if name in ("_shrink_kernel", "_fused_kernel", "_up_bwd_kernel", "_down_bwd_kernel"):
            assert kernel.reads_16_bytes(), f"{where}: its large tensor is not read 16 bytes at a time"
        if name in ("_expand_kernel", "_fused_kernel", "_down_bwd_kernel"):
            assert re.search(r"st\.global\S*\.v4\.b32", kernel.ptx), f"{where}: not written 16 bytes at a time"
        if name == "_fused_kernel" and call.dtype != FP32:
            assert TENSOR_CORES[arch] in kernel.ptx, f"{where}: no {TENSOR_CORES[arch]}"
    return list(compiled)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", CALLS)
def test_machine_code(name, arch, monkeypatch):
    kernels = check(CALLS[name], arch, monkeypatch)
    expected = {"_fused_kernel"} if CALLS[name].design == "fused" else {"_shrink_kernel", "_expand_kernel"}
    assert expected | {"_up_bwd_kernel", "_down_bwd_kernel", "_sum_kernel"} <= set(kernels)
    assert ("_hidden_bwd_kernel" in kernels) == (not CALLS[name].makes_dz_late)
    if CALLS[name].core:
        assert {"_mix_kernel", "_core_bwd_kernel"} <= set(kernels)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rank", MOST_CHUNKS)
def test_machine_code_of_the_most_chunks(rank, arch, monkeypatch):
    """Each of them takes shared memory for every stage, and registers. With one more there is a hidden_bwd."""
    check_chunks(rank, arch, MOST_CHUNKS[rank], "input", monkeypatch)
    columns, call = _chunk_columns(rank, arch, monkeypatch), Call(rank=rank)
    for chunks, late in ((MOST_CHUNKS[rank], True), (MOST_CHUNKS[rank] + 1, False)):
        names = [each.kernel.__name__ for each in replace(call, width=16, outputs=chunks * columns).launches()]
        assert ("_hidden_bwd_kernel" in names) != late


@pytest.mark.sweep
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("place", [None, "input", "rank", "core"])
@pytest.mark.parametrize(("rank", "chunks"), [(rank, n + 1) for rank, most in MOST_CHUNKS.items() for n in range(most)])
def test_machine_code_of_every_number_of_chunks(rank, chunks, place, arch, monkeypatch):
    check_chunks(rank, arch, chunks, place, monkeypatch)


def check_chunks(rank: int, arch: int, chunks: int, place: str | None, monkeypatch) -> None:
    columns = _chunk_columns(rank, arch, monkeypatch)
    for tensor_scale in (False, True):
        call = Call(rank=rank, width=256, outputs=chunks * columns, dropout_on=place, tensor_scale=tensor_scale)
        (down_bwd,) = (launch for launch in call.launches() if launch.kernel.__name__ == "_down_bwd_kernel")
        assert down_bwd.constants["CHUNKS"] == chunks
        kernel = compile_launch(down_bwd, arch)
        check_resources(kernel, arch)
        check_resident(kernel, exactly=False)


def _chunk_columns(rank: int, arch: int, monkeypatch) -> int:
    for module in (lowrank_linear, lowrank_linear_bwd):
        monkeypatch.setattr(module, "architecture", lambda device: arch)
    return lowrank_linear_config(LowRankShape(0, 512, rank), BF16, arch).up_bwd.columns


@pytest.mark.sweep
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", SWEEP)
def test_machine_code_of_every_configuration(name, arch, monkeypatch):
    assert check(SWEEP[name], arch, monkeypatch)


def test_tf32_is_seen_when_torch_allows_it(monkeypatch):
    """The check above can fail: allow tf32 and it is there."""
    monkeypatch.setattr(common, "allows_tf32", lambda: True)
    shrink = next(launch for launch in CALLS["lora-32-fp32"].launches() if launch.kernel.__name__ == "_shrink_kernel")
    assert ".tf32" in compile_launch(shrink, 80).ptx


def test_a_product_folded_back_into_one_chain_is_seen(tmp_path):
    """What the compiler makes of a plain addition: it hands the sum on from product to product."""
    shrink = next(launch for launch in CALLS["lora-32-fp32"].launches() if launch.kernel.__name__ == "_shrink_kernel")
    good = "acc = add_dot(acc, x, tl.trans(down.to(DOT)), PRECISION)"
    plain = "acc += tl.dot(x, tl.trans(down.to(DOT)), input_precision=PRECISION)"
    mutant = load(lowrank_linear_fwd, good, plain, tmp_path)["_shrink_kernel"]
    with pytest.raises(AssertionError, match="64 terms longer"):
        check_chains(compile_launch(shrink._replace(kernel=mutant), 90))


def test_spills_are_seen():
    up_bwd = next(launch for launch in CALLS["lora-64-fp32"].launches() if launch.kernel.__name__ == "_up_bwd_kernel")
    check_resources(compile_launch(up_bwd, 90), 90)
    high = compile_launch(up_bwd._replace(constants=up_bwd.constants | {"BLOCK_M": 64}), 90)
    with pytest.raises(AssertionError, match="bytes spilled"):
        check_resources(high, 90)


def test_one_binary_for_all_rows_scales_and_ranks_of_a_bucket():
    """What a binary is compiled for does not change with rows, scale, rank inside its bucket, or z's row stride.

    But a rank that is a multiple of 8 has one of its own.
    """
    base = binaries(Call(rank=16).launches())
    assert base == binaries(Call(rank=16, rows=1000).launches()) == binaries(Call(rank=16, rows=37).launches())
    assert base == binaries(Call(rank=8).launches())
    assert base != binaries(Call(rank=24).launches())
    other = binaries(Call(rank=9).launches())
    assert base != other == binaries(Call(rank=12).launches()) == binaries(Call(rank=4).launches())
    assert other != binaries(Call(rank=17).launches())


# Without bias and scale in memory, what is narrow is R wide.
THIN = {
    "lora-8": Call(factor_dtype=BF16, rank=8, tensor_scale=False, has_bias=False),
    "lora-16": Call(rank=16, tensor_scale=False, has_bias=False, needs_z=True),
    "lora-fp32": Call(FP32, rank=8, tensor_scale=False, has_bias=False),
    "aurora-released": Call(rank=64, core="dense", tensor_scale=False, has_bias=False),
}


@pytest.mark.parametrize("name", THIN)
def test_thin_operands_move_in_wide_pieces(name, monkeypatch):
    """Up to 16 bytes at a time, as much as a thread has of a tile; row by row of R they go element by element."""
    for module in (lowrank_linear, lowrank_linear_bwd):
        monkeypatch.setattr(module, "architecture", lambda device: 90)
    launches = {launch.kernel.__name__: launch for launch in THIN[name].launches()}
    del launches["_sum_kernel"]
    for kernel, launch in launches.items():
        assert compile_launch(launch, 90).narrow_accesses() == 0, kernel
    for kernel in ("_expand_kernel", "_up_bwd_kernel"):
        launch = launches[kernel]._replace(constants=launches[kernel].constants | {"ALIGNED": False})
        assert compile_launch(launch, 90).narrow_accesses() >= 4, kernel


def test_what_is_aligned():
    """Rank and the rows of z together: a given z may be columns of a wider tensor."""
    config = lowrank_linear_config(LowRankShape(768, 768, 16), BF16, 90)
    for rank, stride, aligned in ((16, 0, True), (8, 24, True), (12, 0, False), (16, 20, False), (4, 8, False)):
        assert lowrank_linear_fwd.blocks(config, rank, stride)["ALIGNED"] == aligned


def test_launch_counts():
    """For LoRA two launches forward and three backward; cuBLAS adds one GEMM to each."""
    names = [launch.kernel.__name__ for launch in CALLS["lora"].launches()]
    assert names[:2] == ["_shrink_kernel", "_expand_kernel"]
    assert names[2:] == ["_up_bwd_kernel", "_down_bwd_kernel", "_sum_kernel"]
    names = [launch.kernel.__name__ for launch in replace(CALLS["lora"], needs_z=True).launches()]
    assert names[2:] == ["_up_bwd_kernel", "_hidden_bwd_kernel", "_down_bwd_kernel", "_sum_kernel"]
    assert CALLS["lora-32-fused"].launches()[0].kernel.__name__ == "_fused_kernel"
