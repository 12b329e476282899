"""No launch depends on the order of its programs: every kernel in a random one, all it reads and writes recorded.

What is checked: triton_races.py. That the shapes reach every loop and choice of the kernels: triton_census.py. The
chosen cases run in CI; `pytest -m sweep` runs all of race_cases.py.
"""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from peft_kernels.triton_kernels import common

if not common.INTERPRETED:
    pytest.skip("the order of programs is the interpreter's to choose", allow_module_level=True)

import triton
import triton.language as tl
from race_cases import CASES, MODULES, SWEEP, Run, lowrank, small_tiles
from triton_census import KERNELS, Census, jitted, launched
from triton_races import Checker, Fault, checked_launches


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    small_tiles(monkeypatch)


def check(run: Run, seed: int) -> Checker:
    """No fault, and the results of the usual order bit for bit."""
    usual = run()
    with checked_launches(seed) as checker:
        shuffled = run()
    assert any(launch.order != sorted(launch.order) for launch in checker.launches)
    assert shuffled.keys() == usual.keys()
    for name, value in usual.items():
        assert (value is None and shuffled[name] is None) or torch.equal(value, shuffled[name]), name
    return checker


@pytest.mark.parametrize("op", CASES)
def test_no_launch_depends_on_the_order_of_its_programs(op, monkeypatch):
    """One test for all cases of an operation, which together reach all of its kernels' source."""
    census = Census(MODULES[op], monkeypatch)
    for seed, run in enumerate(CASES[op].values()):
        census.launches += check(run, seed).launches
    assert list(census.problems()) == []


@pytest.mark.sweep
@pytest.mark.parametrize(("op", "case"), [(op, case) for op in SWEEP for case in SWEEP[op]])
def test_no_launch_of_the_sweep_does(op, case):
    check(SWEEP[op][case], seed=1)


def test_every_kernel_is_launched_in_a_module_that_has_cases():
    with_cases = {Path(module.__file__).resolve() for modules in MODULES.values() for module in modules}
    kernels = {path.resolve(): launched(path) for path in KERNELS.rglob("*.py")}
    assert {path for path, names in kernels.items() if names} <= with_cases
    assert {path.resolve() for path in KERNELS.rglob("*.py") if list(jitted(path))} <= with_cases
    written = {function.name for path in kernels for function in jitted(path) if function.name.endswith("_kernel")}
    assert written == set().union(*kernels.values())


def test_the_census_notices_what_was_not_reached(monkeypatch):
    small = lowrank("down", rows=20, columns_in=24, columns_out=24, rank=4)
    census = Census(MODULES["lowrank_linear"], monkeypatch)
    with checked_launches(0) as checker:
        small()
    census.launches += checker.launches
    problems = list(census.problems())
    for problem in (
        "_core_bwd_kernel was not launched",
        "_shrink_kernel: one program in a dimension of every grid: [(1, 1)]",
        "lowrank_linear_bwd.py: _up_bwd_kernel: never with NEEDS_UP = True",
        "lowrank_linear_bwd.py: _down_bwd_kernel: never with CHUNKS = True",
        "lowrank_linear_bwd.py: load_d_mixed: never with CHUNKS == 0: False",
        "lowrank_linear_fwd.py: _mix_kernel: never with DROPOUT = core",
    ):
        assert problem in problems
    assert any(problem.startswith("lowrank_linear_fwd.py: _shrink_kernel, line ") for problem in problems)


# ---- planted faults -------------------------------------------------------------------------------------------------


@triton.jit
def _shift_kernel(
    x_ptr, out_ptr, count, STEP: tl.constexpr, OFFSET: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out = x + 1, by tiles that begin every STEP elements, read OFFSET elements further."""
    offsets = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    mask = offsets < (count if MASKED else 1 << 30)
    x = tl.load(x_ptr + offsets + OFFSET, mask=mask & (offsets + OFFSET < count), other=0.0)
    tl.store(out_ptr + offsets, x + 1, mask=mask)


@triton.jit
def _twice_kernel(x_ptr, out_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """out = 2 x by way of memory, reversed."""
    first, offsets = tl.program_id(0) * BLOCK, tl.arange(0, BLOCK)
    tl.store(out_ptr + first + offsets, 2 * tl.load(x_ptr + first + offsets))
    if BARRIER:
        tl.debug_barrier()
    mirrored = tl.load(out_ptr + first + BLOCK - 1 - offsets)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + first + offsets, mirrored)


@triton.jit
def _add_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(out_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)))


@triton.jit
def _table_kernel(places_ptr, out_ptr, EXTRA: tl.constexpr, TYPE: tl.constexpr):
    """out[i] = the first number of the i-th tensor of a table."""
    pointer = common.load_pointer(places_ptr + tl.program_id(0), TYPE)
    tl.store(out_ptr + tl.program_id(0), tl.load(pointer + EXTRA).to(tl.float32))


def shifted(
    step: int = 16, offset: int = 0, masked: bool = True, in_place: bool = False, count: int = 56, slack: int = 8
) -> torch.Tensor:
    x = torch.arange(count + slack, dtype=torch.float32)[:count]  # what lies behind it is memory of the same storage
    out = x if in_place else torch.zeros(count + slack)[:count]
    _shift_kernel[(4,)](x, out, count, step, offset, masked, 16)
    return out


def doubled(barrier: bool) -> torch.Tensor:
    out = torch.empty(64)
    _twice_kernel[(4,)](torch.arange(64.0), out, barrier, 16)
    return out


def pointed(extra: int, known: bool = True, kind=tl.float32) -> torch.Tensor:
    tensors, out = [torch.full((2,), float(index)) for index in range(4)], torch.empty(4)
    places = [t.data_ptr() if known else t.untyped_storage().data_ptr() for t in tensors]
    _table_kernel[(4,)](torch.tensor(places), out, extra, kind)
    return out


PLANTED = {
    "two write one": (lambda: shifted(step=15), r"program \(\d, 0, 0\) writes out_ptr\[\d+\], and so does \(\d, 0, 0"),
    "another's halo": (lambda: shifted(offset=1, in_place=True), r"reads x_ptr\[(16|32|48)\], which \(\d, 0, 0\) w"),
    "beyond the end": (lambda: shifted(masked=False), r"program \(3, 0, 0\) writes element 63 of out_ptr \(56,\)"),
    "before the begin": (lambda: shifted(offset=-1), r"program \(0, 0, 0\) reads element -1 of x_ptr"),
    "no barrier": (lambda: doubled(False), r"reads out_ptr\[\d+\] after writing it, with no barrier"),
    "an atomic": (lambda: _add_kernel[(4,)](torch.ones(64), torch.zeros(16), 16), r"uses an atomic"),
    "beyond a table's": (lambda: pointed(2), r"reads element 2 of a matrix of a table \(2,\), outside"),
    "from nowhere": (lambda: pointed(0, known=False), r"reads through a pointer that leads to no tensor"),
    "another type": (lambda: pointed(0, kind=tl.float16), r"reads 2 bytes for an element of a matrix of a table"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name):
    run, message = PLANTED[name]
    with pytest.raises(Fault, match=message), checked_launches(0):
        run()


def test_nothing_is_found_without_a_fault():
    with checked_launches(0) as checker:
        assert torch.equal(shifted(), torch.arange(56.0) + 1)
        assert torch.equal(shifted(in_place=True), torch.arange(56.0) + 1)
        assert torch.equal(doubled(True), torch.arange(64.0).view(4, 16).flip(1).flatten() * 2)
        assert torch.equal(pointed(1), torch.arange(4.0))
    assert [launch.kernel for launch in checker.launches] == ["_shift_kernel"] * 2 + ["_twice_kernel", "_table_kernel"]
    assert torch.equal(shifted(), torch.arange(56.0) + 1)  # and the interpreter is itself again


def test_seeds_choose_the_order():
    orders = []
    for seed in (0, 0, 1):
        with checked_launches(seed) as checker:
            shifted()
        orders.append(checker.launches[0].order)
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == [(index, 0, 0) for index in range(4)] for order in orders)


def test_a_result_that_depends_on_the_order_is_noticed(monkeypatch):
    """Even if the record saw nothing of it."""
    monkeypatch.setattr(Checker, "_restore_args_dev", lambda checker, original, executor, *args: original(*args))
    check(lambda: {"out": shifted(offset=1)}, 0)
    with pytest.raises(AssertionError, match="out"):
        check(lambda: {"out": shifted(offset=1, in_place=True)}, 0)
