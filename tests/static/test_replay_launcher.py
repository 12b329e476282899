"""What replay.py calls in the place of Triton's launcher: the compiled function behind it, with the same arguments."""

import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels never reach Triton's launcher", allow_module_level=True)

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.backends.nvidia import driver
from triton.compiler.compiler import LazyDict
from triton.runtime import _allocation

from peft_kernels.benchmarks import nothing
from peft_kernels.triton_kernels import common, replay
from peft_kernels.triton_kernels.config import Tile


@triton.jit
def _copy_kernel(from_ptr, missing_ptr, to_ptr, count, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(to_ptr + offsets, tl.load(from_ptr + offsets, mask=offsets < count))


def copied(x: Tensor) -> tuple[Tensor]:
    y = torch.empty_like(x)
    common.launch(_copy_kernel, (3, 2), (x, None, y, x.numel()), {"BLOCK": 64}, Tile(1, 64, warps=2))
    return (y,)


def looks(args: tuple) -> list:
    """Addresses differ from call to call; hooks, which are empty, and what was compiled away may as well be None."""
    args = [*args[:-1], *args[-1]] if isinstance(args[-1], tuple) else args
    any_of = (Tensor, type(None), type(knobs.runtime.launch_enter_hook), LazyDict)
    return ["any" if isinstance(arg, any_of) or arg in PLACES else arg for arg in args]


PLACES: list[int] = []


@pytest.mark.parametrize("scratch", [0, 256])
def test_the_compiled_function_gets_what_tritons_launcher_passes(scratch, monkeypatch):
    """And where a kernel needs scratch memory, it is that launcher which calls it."""
    ran, seen, memo, made = [], [], {}, driver.CudaLauncher.__init__

    def with_scratch(self, *args):
        made(self, *args)
        self.global_scratch_size = scratch

    monkeypatch.setattr(driver.CudaLauncher, "__init__", with_scratch)
    monkeypatch.setattr(nothing, "_counting", lambda counts, name: lambda *args: ran.append(args))
    monkeypatch.setattr(_allocation, "_allocator", mock.Mock(get=lambda: lambda size, *_: f"{size} bytes"))
    function = mock.Mock(side_effect=copied)
    with nothing.launching_nothing():
        for x in (torch.zeros(64), torch.zeros(64)):
            (y,) = replay.replayed(memo, "one", lambda x=x: function(x), (x,))
            PLACES[:] = x.data_ptr(), y.data_ptr()
            seen.append(looks(ran.pop()))
            assert not ran
    assert function.call_count == 1 and seen[0] == seen[1]
    assert seen[0].count("any") >= 3 and seen[0][:3] == [3, 2, 1] and 64 in seen[0]
    assert (f"{3 * 2 * scratch} bytes" in seen[0]) == bool(scratch)
    ((launch, *_),) = memo["one"].launches
    takes_them_one_by_one = bool(scratch) or triton.__version__.startswith("3.6.")
    assert (launch.__module__ == replay.__name__) == takes_them_one_by_one
