"""The comparison with the oracle must notice a broken kernel: one piece of Triton replaced, the module reloaded."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from reconstruct_cases import Problem, assert_as_accurate_as_torch, expected, run

pytest.importorskip("triton")
from triton_mutants import load

from peft_kernels.triton_kernels import reconstruct as kernels

BLOCKS = Problem(core="diagonal", out_blocks=2, in_blocks=2)
DENSE = Problem(core="dense", out_blocks=2, rank=40)  # a rank of several chunks
STACK = Problem(core="diagonal", out_blocks=3, stack=True, base="shared")
MERGE = Problem(100, 72, 16, dtype=torch.float16, scale=0.3)
MERGE_CORE = replace(MERGE, core="flat diagonal")
FIRST_CHUNK = ("for b in range(0, R, CHUNK_R):", "for b in range(0, CHUNK_R, CHUNK_R):")
MUTANTS = {
    "scale missing": ("acc *= load_scale(scale_ptr, scale)", "pass", Problem()),
    "base missing": ("acc += base.to(tl.float32)", "pass", Problem()),
    "one base under every block": ("SHARED_BASE else offsets", "True else offsets", BLOCKS),
    "tiles taken for matrices": ("% O, tl.program_id(0) // O", "// O, tl.program_id(0) % O", STACK),
    "o and i swapped": ("o, i = block // I, block % I", "i, o = block // O, block % O", BLOCKS),
    "columns of the first block": (" * I * KB + i * KB + offs_k", " * I * KB + offs_k", BLOCKS),
    "diagonal of the first block": ("core_ptr + block * R + offs_r", "core_ptr + offs_r", BLOCKS),
    "core of the first block": ("load_dense(core_ptr, block, a", "load_dense(core_ptr, block * 0, a", DENSE),
    "core transposed": ("_add_product(mixed, up, core,", "_add_product(mixed, up, tl.trans(core),", DENSE),
    "chunks of the core swapped": ("block, a, b, R", "block, b, a, R", DENSE),
    "first chunk of the rank only": (*FIRST_CHUNK, Problem(rank=40)),
    "one chunk of each row of the core": (
        "for a in range(0, R, CHUNK_R):",
        "for a in range(b, b + 1, CHUNK_R):",
        DENSE,
    ),
    "column tiles all the same": ("tile % column_tiles * BLOCK_K", "tile * 0", Problem(40, 200)),
    "row tiles all the same": ("(tile // column_tiles).to(tl.int64)", "(tile * 0).to(tl.int64)", Problem(100, 24)),
    "rounded before the base is added": ("acc += base", "acc = acc.to(tl.float16).to(tl.float32) + base", MERGE),
    "a core's product rounded": (
        "acc = _add_product(acc, mixed,",
        "acc = _add_product(acc, mixed.to(tl.float16).to(tl.float32),",
        MERGE_CORE,
    ),
    "two parts of a float32": ("range(A_PARTS)", "range(min(A_PARTS, 2))", MERGE_CORE),
    "first part of the other operand only": ("range(min(B_PARTS, 3 - i))", "range(1)", MERGE_CORE),
}


def assert_right(problem: Problem, device: str) -> None:
    """As accurate as torch; and where a model is merged in float16, which the interpreter rounds as a GPU does, the
    correctly rounded sum in 99.9 % of elements."""
    assert_as_accurate_as_torch(problem, device, "triton")
    if problem.dtype == torch.float16:
        w = run(problem, device, "triton")["w"]
        assert (w == expected(problem, device)["w"].to(w.dtype)).float().mean() >= 0.999


@pytest.mark.parametrize("mutated", [False, True], ids=["control", "mutant"])
@pytest.mark.parametrize("name", MUTANTS)
def test_triton_mutant_is_noticed(name, mutated, monkeypatch, device, tmp_path):
    """The control loads the same source afresh without the change, and passes."""
    good, bad, problem = MUTANTS[name]
    mutant = load(kernels, good, bad if mutated else None, tmp_path)
    monkeypatch.setattr(kernels, "reconstruct_fwd", mutant["reconstruct_fwd"])
    with pytest.raises(AssertionError) if mutated else nullcontext():
        assert_right(problem, device)
