"""The record of reads and writes must notice a racy kernel: one piece of Triton replaced, the module reloaded.

Some of these mutants compute the right numbers in the interpreter, whatever the order: only a GPU would show them.
"""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from peft_kernels.triton_kernels import common

if not common.INTERPRETED:
    pytest.skip("the order of programs is the interpreter's to choose", allow_module_level=True)

from imitation_cases import Layer
from race_cases import MODULES, batched, gated, imitated, lowrank, projected, reconstructed, small_tiles
from triton_census import KERNELS
from triton_mutants import load
from triton_races import Fault, checked_launches

from peft_kernels.triton_kernels import (
    batched_lowrank_linear,
    gated_query_kernels,
    lowrank_linear_bwd,
    lowrank_linear_fwd,
    lowrank_projections_kernels,
    weight_distance,
    weight_distance_product,
)
from peft_kernels.triton_kernels import reconstruct as reconstruct_kernels


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    small_tiles(monkeypatch)


GRID = lowrank(dtype=torch.float16, columns_in=40, columns_out=40, rank=5, core="diagonal", out_blocks=2, in_blocks=2)
DENSE = lowrank("core", rows=40, dtype=torch.float16, columns_in=24, columns_out=24, core="flat dense")
COLUMNS = lowrank("x down", rows=40, columns_in=136, columns_out=136, rank=12, dtype=torch.float16)
ONE_KERNEL = lowrank("x", design="fused", rows=70, columns_in=40, columns_out=72, rank=20)
PASSES = projected("x down0 down1 up0", rows=40, inputs=40, outputs=(40, 40), rank=20)  # float32: one after another
BATCH = batched("up", inputs=24, outputs=40, rank=5)
ADDITIVE, GATED = gated("additive", "text beta"), gated("gated", "hidden text beta", batch=2)
BLOCKS = reconstructed(rows=40, columns=136, rank=5, core="diagonal", out_blocks=2)
LORA, HYBRID = imitated(Layer((34, 40), 40, 5, None)), imitated(Layer((34,), 65, 5, 3))
BOTH_WRITE, READS, OUTSIDE, NO_BARRIER = "writes .*, and so does", "reads .*, which .* writes", "outside", "no barrier"
BARRIER = "    tl.debug_barrier()\n"
MUTANTS = {
    lowrank_linear_fwd: {
        "z of one input block": (" + i * R + offs_r[None, :], z,", " + offs_r[None, :], z,", GRID, BOTH_WRITE),
        "x beyond its rows": ("mask_m, mask_r = rows < M,", "mask_m, mask_r = rows >= 0,", GRID, OUTSIDE),
        "S of one output block": ("s_ptr + (rows[:, None] * O + o)", "s_ptr + (rows[:, None] * O)", GRID, BOTH_WRITE),
        "y beyond its block": ("mask=(rows < M)[:, None] & mask_n[None, :])", "mask=(rows < M)[:, None])", GRID, None),
        "z by every column tile": ("if column_tile == 0:", "if column_tile >= 0:", ONE_KERNEL, BOTH_WRITE),
        "z's rank not masked": (
            "z, mask=mask_m[:, None] & mask_r[None, :])\n    mixed",
            "z, mask=mask_m[:, None])\n    mixed",
            ONE_KERNEL,
            None,
        ),
    },
    lowrank_linear_bwd: {
        "dB without strips": ("part = o * tl.num_programs(1) + strip", "part = o + 0 * strip", GRID, BOTH_WRITE),
        "t of one chunk": ("((chunk * M + rows[:, None]) * O + o)", "(rows[:, None] * O + o)", COLUMNS, BOTH_WRITE),
        "dz of one input block": ("(rows[:, None] * I + i)", "(rows[:, None] * I)", GRID, BOTH_WRITE),
        "d_core without strips": ("part = strip * (O * I) + block", "part = block", GRID, BOTH_WRITE),
        "d_core's rows all the first": ("offs_r = a + tl.arange", "offs_r = 0 * a + tl.arange", DENSE, BOTH_WRITE),
        "dA without strips": ("part = i * tl.num_programs(1) + strip", "part = i + 0 * strip", GRID, BOTH_WRITE),
        "column tiles overlap": ("% column_tiles * BLOCK_K", "% column_tiles * (BLOCK_K - 8)", COLUMNS, None),
        "one chunk too many in down_bwd": ("static_range(CHUNKS)", "static_range(CHUNKS + 1)", COLUMNS, OUTSIDE),
        "chunks too far apart": ("tl.cast(M, tl.int64) * O * R", "tl.cast(M + 1, tl.int64) * O * R", COLUMNS, OUTSIDE),
        "d_core not masked": ("(offs_a < R)[:, None] & (offs_r", "(offs_a >= 0)[:, None] & (offs_r", DENSE, None),
    },
    common: {
        "sums beyond the end": ("mask=offsets < size)", "mask=offsets >= 0)", GRID, OUTSIDE),
        "two sums in one": ("_add_parts(b_ptr, b_out_ptr,", "_add_parts(b_ptr, a_out_ptr,", GRID, BOTH_WRITE),
        "sums overlap": (".to(tl.int64) * BLOCK + ", ".to(tl.int64) * (BLOCK - 1) + ", COLUMNS, BOTH_WRITE),
    },
    lowrank_projections_kernels: {
        "no barrier between passes over dx": (
            "            tl.debug_barrier()  # what other threads wrote of dx is read in the next pass\n",
            "            pass\n",
            PASSES,
            NO_BARRIER,
        ),
        "y of the first projection": ("y_ptr = _pick((y0_ptr, y1_ptr,", "y_ptr = _pick((y0_ptr, y0_ptr,", PASSES, None),
    },
    batched_lowrank_linear: {
        "the next adapter's first row": (
            "mask_m = places < tl.load(offsets_ptr + adapter + 1)",
            "mask_m = places < tl.load(offsets_ptr + adapter + 1) + 1",
            BATCH,
            None,
        ),
        "dB without strips": ("(part * W + offs_w[:, None])", "(adapter * W + offs_w[:, None])", BATCH, BOTH_WRITE),
    },
    gated_query_kernels: {
        "sums of one strip": ("partial_ptr + part * D", "partial_ptr + part * 0", ADDITIVE, BOTH_WRITE),
        "strips overlap": ("rows = (strip * tiles + tile)", "rows = (strip + tile)", ADDITIVE, BOTH_WRITE),
        "another sequence's total": ("_load_vector(total_ptr + batch * D,", "_load_vector(total_ptr,", GATED, READS),
        "no barrier after the total": (f"total, offs_d, D)\n{BARRIER}", "total, offs_d, D)\n", GATED, NO_BARRIER),
        "no barrier after the scores": (f"largest = larger\n{BARRIER}", "largest = larger\n", GATED, NO_BARRIER),
        "no barrier after q": (f"* q, 0)\n{BARRIER}", "* q, 0)\n", GATED, NO_BARRIER),
    },
    reconstruct_kernels: {
        "column tiles all the same": ("tile % column_tiles * BLOCK_K", "tile * 0", BLOCKS, BOTH_WRITE),
        "rows beyond the block": ("mask = (rows < NB)[:, None]", "mask = (rows <= NB)[:, None]", BLOCKS, None),
    },
    weight_distance: {
        "the next tile's sum": ("partial_ptr + pid * 3 + 2,", "partial_ptr + pid * 3 + 3,", LORA, None),
        "a neighbour's target": (
            "target = tl.load(target_pointers, mask=mask,",
            "target = tl.load(target_pointers + 1, mask=mask & (columns + 1 < N),",
            LORA,
            READS,
        ),
        "one column more": ("mask = (rows < M) & (columns < N)", "mask = (rows < M) & (columns <= N)", LORA, None),
        "the next matrix's sums": ("sums_ptr + index * 6 + 5", "sums_ptr + index * 6 + 6", LORA, None),
        "no barrier before the bias": (
            "    tl.debug_barrier()  # what other threads wrote above is read below\n",
            "",
            HYBRID,
            NO_BARRIER,
        ),
    },
    weight_distance_product: {
        "column tiles all the same": ("tile_n * BLOCK_N", "tile_n * 0", HYBRID, BOTH_WRITE),
        "rows of the last column all the same": (
            "ptr, tile_m, ALIGNED, BLOCK_M, B",
            "ptr, 0, ALIGNED, BLOCK_M, B",
            HYBRID,
            BOTH_WRITE,
        ),
    },
}


def use(patch: pytest.MonkeyPatch, module, good: str, bad: str | None, folder: Path) -> None:
    """Wherever a kernel of the module is launched, that of the changed source."""
    changed = load(module, good, bad, folder)
    kernels = {id(value): name for name, value in vars(module).items() if name.endswith("_kernel")}
    for holder in {id(m): m for modules in MODULES.values() for m in modules}.values():
        for name, value in list(vars(holder).items()):
            if id(value) in kernels:
                patch.setattr(holder, name, changed[kernels[id(value)]])


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in MUTANTS for name in MUTANTS[module]])
def test_mutant_is_found(module, name, monkeypatch, tmp_path):
    good, bad, run, message = MUTANTS[module][name]
    use(monkeypatch, module, good, bad, tmp_path)
    with pytest.raises(Fault, match=message or f"{BOTH_WRITE}|{READS}|{OUTSIDE}"), checked_launches(0):
        run()


def test_controls_of_the_mutants(monkeypatch, tmp_path):
    """The same sources loaded afresh without a change: nothing is found."""
    for module in MUTANTS:
        folder = tmp_path / module.__name__
        folder.mkdir()
        use(monkeypatch, module, "triton.jit", None, folder)
    for run in {mutant[2]: None for mutants in MUTANTS.values() for mutant in mutants.values()}:
        with checked_launches(0):
            run()


def test_every_barrier_has_its_mutant():
    removed = [mutant for mutants in MUTANTS.values() for mutant in mutants.values() if mutant[3] == NO_BARRIER]
    assert len(removed) == sum(path.read_text().count("tl.debug_barrier()") for path in KERNELS.rglob("*.py"))
