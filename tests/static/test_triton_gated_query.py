"""The Triton kernels of `gated_query` as machine code for three architectures, in config.py's tiles, without a GPU."""

from dataclasses import dataclass, replace

import pytest
import torch
from aot import ARCHITECTURES, BF16, FP16, FP32, binaries, check_resident, check_resources, compile_launch

from peft_kernels.records import Gate, Modulated
from peft_kernels.triton_kernels import common, gated_query


@dataclass(frozen=True)
class Call:
    """Forward and backward of one call, all gradients; the sizes stand for every size of the same divisibility."""

    mode: str = "gated"
    dtype: torch.dtype = BF16
    vector_dtype: torch.dtype = FP32
    batch: int = 8
    positions: int = 40
    width: int = 768
    padding: bool = True
    tensor_scale: bool = True

    def launches(self) -> list[common.Launch]:
        def empty(*shape, dtype=self.dtype):
            return torch.empty(shape, dtype=dtype)

        hidden, text, cross, dy = (empty(self.batch * self.positions, self.width) for _ in range(4))
        vectors = [empty(self.width, dtype=self.vector_dtype) for _ in range(4)]
        moved = Modulated(text, *vectors[:2])
        with common.record_launches(run=False) as launches:
            if self.mode == "additive":
                args = (moved, Modulated(cross, *vectors[2:]), torch.ones(()) if self.tensor_scale else 0.1)
                gated_query.additive_query_fwd(hidden, *args)
                gated_query.additive_query_bwd(dy, *args, (True,) * 6)
            else:
                mask = empty(self.batch, self.positions, dtype=torch.bool) if self.padding else None
                _, *gate = gated_query.gated_query_fwd(hidden, moved, mask, self.positions)
                gated_query.gated_query_bwd(dy, hidden, moved, mask, Gate(*gate), (True,) * 4)
        return launches


CALLS = {"blip-additive": Call("additive"), "blip-gated": Call(), "blip-gated-float32": Call(dtype=FP32)}
SWEEP = {
    f"{mode}-{dtype}-{vector_dtype}-{width}-{padding}": Call(mode, dtype, vector_dtype, width=width, padding=padding)
    for mode in ("additive", "gated")
    for dtype, vector_dtype in ((BF16, BF16), (BF16, FP32), (FP16, FP32), (FP32, FP32))
    for width in (16, 768, 1024, 2560)
    for padding in (True, False)
    if padding or mode == "gated"
}


def check(call: Call, arch: int, monkeypatch) -> None:
    monkeypatch.setattr(common, "architecture", lambda device: arch)
    for launch in call.launches():
        kernel = compile_launch(launch, arch)
        where = check_resources(kernel, arch)
        assert not kernel.uses_tensor_cores(), where
        if kernel.name == "additive_bwd_kernel":
            check_resident(kernel, exactly=call.width > 16)
        if kernel.name == "finish_kernel" or call.width < 256:
            continue
        assert kernel.reads_16_bytes(), f"{where}: nothing is read 16 bytes at a time"
        assert "st.global.b16" not in kernel.ptx, f"{where}: a row is written element by element"
        if call.dtype != call.vector_dtype:  # only rows are half precision
            assert not kernel.reads_2_bytes(), f"{where}: a row is read element by element"
        if call.mode == "gated":  # between phases of one program: each reads what other threads have written
            assert kernel.ptx.count("bar.sync") >= 2, where


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", CALLS)
def test_machine_code(name, arch, monkeypatch):
    check(CALLS[name], arch, monkeypatch)


@pytest.mark.sweep
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", SWEEP)
def test_machine_code_of_every_configuration(name, arch, monkeypatch):
    check(SWEEP[name], arch, monkeypatch)


@pytest.mark.parametrize("mode", ["additive", "gated"])
def test_one_binary_for_all_batches_positions_and_scales(mode):
    base = Call(mode)
    for other in (replace(base, batch=1), replace(base, batch=33), replace(base, positions=1)):
        assert binaries(base.launches()) == binaries(other.launches())
    assert binaries(base.launches()) == binaries(replace(base, positions=577).launches())
    assert binaries(base.launches()) != binaries(replace(base, width=760).launches())
    number = replace(base, tensor_scale=False)
    assert (binaries(base.launches()) != binaries(number.launches())) == (mode == "additive")


@pytest.mark.parametrize("mode", ["additive", "gated"])
def test_one_launch_forward_and_two_backward(mode):
    names = [launch.kernel.__name__ for launch in Call(mode).launches()]
    assert names == [f"{mode}_fwd_kernel", f"{mode}_bwd_kernel", "finish_kernel"]


def test_programs():
    """Of "gated" one for each sequence; of "additive" as many as an H100 runs at a time, or nearly."""
    gated, additive = ([launch.grid for launch in Call(mode).launches()[:2]] for mode in ("gated", "additive"))
    assert gated == [(8,), (8,)]
    assert additive == [(120,), (3, 40)]
