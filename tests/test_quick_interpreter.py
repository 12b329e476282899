"""The interpreter that tests run in does its work once, and is the interpreter otherwise."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl
from triton.runtime import interpreter

from peft_kernels.triton_kernels import common
from peft_kernels.triton_kernels.gated_query import gated_query_fwd

if not common.INTERPRETED:
    pytest.skip("kernels are not interpreted here", allow_module_level=True)


def sums() -> None:
    """A kernel that calls no device function."""
    common.sum_partials(torch.ones(3, 4), torch.ones(4))


def gates() -> None:
    """One that calls many."""
    hidden, vector = torch.ones(6, 24), torch.ones(24)
    gated_query_fwd(hidden, hidden, vector, vector, None, 3)


def test_a_launch_patches_the_language_once_or_twice(monkeypatch):
    """Again where triton's own functions, which know tl.core, are called from kernels that know tl alone."""
    patched, patch = [], interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *args: patched.append(args[0]) or patch(*args))
    for run in (sums, gates, sums):
        patched.clear()
        run()
        assert 1 <= patched.count(tl) <= 2


def test_the_language_is_itself_after_a_launch():
    for run in (gates, sums):
        run()
        assert tl.core.is_builtin(tl.load)


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
