"""The interpreter that tests run in does its work once, and is the interpreter otherwise."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from peft_kernels.triton_kernels import common

if not common.INTERPRETED:
    pytest.skip("kernels are not interpreted here", allow_module_level=True)


QUICKENED = (
    (tl.core.block_type, "__init__"),
    (tl.core.tensor, "__init__"),
    (interpreter.TritonSemantic, "binary_op_type_checking_impl"),
    (interpreter.TensorHandle, "__init__"),
)


@triton.jit
def _mixed_kernel(x, counts, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Operands of every kind: blocks of two shapes, scalars, numbers, pointers, in every kind of dtype."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    for step in range(2):  # the second time, all is known
        block = tl.load(x + rows)[:, None] * 2 + tl.load(x + columns)[None, :] / 3 - step
        count = tl.load(counts) + rows[:, None] * COLUMNS + columns[None, :]
        half = (block.to(tl.float16) * -0.5 + 1).to(tl.float32) + block.to(tl.bfloat16) * block
        result = tl.where((count % 3 == 1) & (block > -1), half, block * count) + (count // 4 > 2)
        result += (count * 0.5 + count * 1e300 * 1e-300).to(tl.float32)  # a number that only float64 holds
        tl.store(out + step * ROWS * COLUMNS + rows[:, None] * COLUMNS + columns[None, :], -0.0 - result)


@triton.jit
def _misfit_kernel(x, counts, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tl.store(out + tl.arange(0, ROWS), tl.load(x + tl.arange(0, ROWS)) + tl.arange(0, COLUMNS))


@triton.jit
def _number_kernel(x, counts, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tl.store(out, (tl.load(counts) + 2**31).to(tl.float32))


def launch(kernel):
    out = torch.zeros(2, 4, 8)
    kernel[(1,)](torch.linspace(-1, 2, 8), torch.tensor([2], dtype=torch.int32), out, ROWS=4, COLUMNS=8)
    return out


@pytest.fixture
def plain(monkeypatch):
    """Triton's own functions again, when called."""
    return lambda: [monkeypatch.setattr(kind, name, getattr(kind, name).__wrapped__) for kind, name in QUICKENED]


def test_results_are_the_plain_interpreters(plain):
    quick = launch(_mixed_kernel)
    plain()
    torch.testing.assert_close(quick, launch(_mixed_kernel), rtol=0, atol=0)
    assert quick.unique().numel() > 40


@pytest.mark.parametrize("kernel", [_misfit_kernel, _number_kernel], ids=lambda kernel: kernel.__name__)
def test_what_the_plain_interpreter_refuses_is_refused_each_time(kernel, plain):
    for _ in range(2):
        with pytest.raises(InterpreterError):
            launch(kernel)
    plain()
    with pytest.raises(InterpreterError):
        launch(kernel)


def test_numbers_too_large_for_their_type_are_refused_each_time():
    for _ in range(2):
        interpreter.TensorHandle(np.zeros(1, np.float32), tl.float32)
        with pytest.raises(ValueError, match="exceeds"):
            interpreter.TensorHandle(np.zeros(1, np.float64), tl.float32)


def test_the_language_is_patched_once(monkeypatch):
    launch(_mixed_kernel)
    monkeypatch.setattr(interpreter, "_patch_builtin", None)
    launch(_mixed_kernel)


def test_types_are_numpys_as_before():
    get = interpreter._get_np_dtype
    scalars = [
        tl.int1,
        tl.int8,
        tl.uint8,
        tl.int32,
        tl.uint32,
        tl.int64,
        tl.uint64,
        tl.float16,
        tl.bfloat16,
        tl.float32,
    ]
    for scalar in scalars:
        for kind in (scalar, tl.block_type(scalar, [4]), tl.pointer_type(scalar)):
            assert get(kind) == get.__wrapped__(kind)
        assert get(tl.block_type(tl.pointer_type(scalar), [4])) == np.uint64
