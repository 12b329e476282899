"""Tile choice: pure functions of (shape, dtype, architecture) to frozen records; searched offline, not at run time."""

from dataclasses import dataclass, replace

import torch

MAX_RANK = 64  # above it the tiles spill
SHARED_MEMORY = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes for one block
PROCESSORS = {80: 108, 90: 132, 100: 148}  # A100, H200, B200
LONGEST_CHAIN = 64  # float32 products that are added one after another; csrc is compiled with it
# All column tiles of down_bwd read each row of up_bwd's chunks; above so many, hidden_bwd costs less. So too for csrc.
MOST_CHUNK_READS = 64
# The masks' generator has so many: the fewest with which Philox-4x32 passes BigCrush in Salmon et al.'s own tests (doi
# 10.1145/2063384.2063405, section 5). 10, its authors' default, are a margin that dropping elements has no use for.
PHILOX_ROUNDS = 7  # csrc is compiled with it
LONGEST_RUN = 128  # tiles that one program adds up: 512 of 16 rows err more than torch, whose sums are sliced
SEGMENT_ROWS = 64  # rows of one tile of a batch sorted by adapter; csrc is compiled with it


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: `rows` × `columns` of the large tensor it reads or writes; `depth` where a product loops.

    resident: programs that registers and shared memory allow a multiprocessor at a time, two at most, in the variant of
    the kernel that takes most of them, at ranks that are multiples of 8. Strips of rows are planned for it, and static
    tests compare it with the code.
    """

    rows: int
    columns: int
    warps: int = 8
    stages: int = 3
    depth: int = 0
    resident: int = 2


SUM = Tile(rows=32, columns=64, warps=4, stages=1)  # partial sums side by side × elements of each


@dataclass(frozen=True)
class LowRankShape:
    """The sizes of one `lowrank_linear`: x (rows, in_features), y (rows, out_features), whatever the rows."""

    in_features: int
    out_features: int
    rank: int
    in_blocks: int = 1
    out_blocks: int = 1
    dropout: bool = False  # of x: its masks cost a thin pass more than its memory


@dataclass(frozen=True)
class LowRankLinearConfig:
    """design "passes": low-rank first, cuBLAS adds to it; "fused": one kernel for small widths. One tile per kernel."""

    design: str
    dtype: torch.dtype  # the activations'
    block_r: int
    chunk_r: int
    shrink: Tile
    mix: Tile
    expand: Tile
    up_bwd: Tile
    hidden_bwd: Tile
    core_bwd: Tile
    down_bwd: Tile
    fused: Tile


def lowrank_linear_config(
    shape: LowRankShape, dtype: torch.dtype, arch: int, design: str | None = None
) -> LowRankLinearConfig:
    """The design and tiles of one shape: passes wherever no committed measurement prefers another, and none does yet.

    Rank matters by its power of two only, so that another one recompiles nothing in its bucket.
    Raises ValueError for a rank above MAX_RANK, and if `design` is asked for and cannot run this shape.
    """
    block_r = _block_rank(shape.rank)
    problem = fused_problem(shape)
    if design == "fused" and problem:
        raise ValueError(f"design: 'fused' {problem}")
    tiles = _float32_tiles(block_r, arch) if dtype == torch.float32 else _half_tiles(shape, block_r, arch)
    chunk_r = min(block_r, 16 if dtype == torch.float32 else 32)
    return LowRankLinearConfig(design or "passes", dtype, block_r, chunk_r, **_fitted(tiles, arch))


# Wide tiles that Triton 3.7 compiles without spills for sm_80, sm_90 and sm_100, at widths divisible by 16, and whose
# programs share a multiprocessor as planned; 3.6 and 3.8, whose assemblers differ by some registers, do so in the calls
# that users make (tests/static). Where a choice looks odd, a wider tile spilled for one of the three.


def _half_tiles(shape: LowRankShape, block_r: int, arch: int) -> dict[str, Tile]:
    """bfloat16 and float16; sm_90's are the fastest of a search on an H200, by each launch alone at 9232 rows.

    up_bwd wants wide chunks where there are many: it writes block_r float32 sums per row for each of them. A mask keeps
    shrink's processors busy, which many small programs share evenly.
    """
    wide, small = Tile(64, 128), Tile(64, block_r, warps=4, stages=2)
    hopper, few_chunks = 90 <= arch < 100, shape.out_features <= 1024 * shape.out_blocks
    shrink, down_bwd = wide, replace(wide, resident=1)
    if hopper and shape.dropout:
        shrink, down_bwd = Tile(16, 128, warps=4), replace(down_bwd, stages=2)
    elif hopper and block_r == 16:
        shrink = replace(wide, warps=4)
    elif block_r == 16:
        down_bwd = Tile(32, 128, stages=2)
    elif arch >= 100 and block_r == 64:
        shrink, down_bwd = replace(wide, stages=2), replace(wide, stages=1)
    if block_r == 16:
        up_bwd = wide if hopper and few_chunks else Tile(64, 256, stages=2)
    elif arch >= 90:
        up_bwd = Tile(64, 256, resident=1) if block_r == 32 else wide
    else:
        up_bwd = Tile(32, 256, resident=1) if block_r == 32 else Tile(64, 64, resident=1)
    hidden_bwd, core_rows = small, 64 if block_r == 16 else 32
    if block_r == 64:
        hidden_bwd = Tile(64, 64, stages=2) if hopper else replace(small, rows=32)
    elif arch < 90:
        core_rows //= 2
    return {
        "shrink": shrink,
        "mix": small,
        "expand": wide,
        "up_bwd": up_bwd,
        "hidden_bwd": hidden_bwd,
        "core_bwd": replace(small, rows=core_rows),
        "down_bwd": down_bwd,
        "fused": Tile(128 if arch >= 90 else 64, 128, depth=32),
    }


def _float32_tiles(block_r: int, arch: int) -> dict[str, Tile]:
    """True float32 has no tensor cores: its operands live in registers, which allows smaller tiles only.

    For sm_100 Triton (3.6 and 3.7) compiles a product whose result has 64 rows to tf32, whatever precision it is asked
    for. There those of mix and fused have 32 rows; that of down_bwd lies on its side everywhere.
    """
    wide, small = Tile(32, 64), Tile(64, block_r, warps=4, stages=2)
    rows = 32 if arch >= 100 else 64
    return {
        "shrink": replace(wide, rows=16) if block_r == 64 and arch >= 100 else wide,
        "mix": replace(small, rows=16 if block_r == 64 and arch >= 100 else rows),
        "expand": wide,
        "up_bwd": replace(wide, rows=16, stages=2 if arch >= 90 else 1) if block_r == 64 else replace(wide, stages=2),
        "hidden_bwd": small if block_r == 16 else replace(small, rows=32),
        "core_bwd": Tile(16, block_r, stages=2),
        "down_bwd": replace(wide if block_r == 16 else Tile(16, 32, stages=2), resident=1),
        "fused": Tile(rows, 32, depth=32),
    }


def fused_problem(shape: LowRankShape) -> str | None:
    """Why the one-kernel design cannot run a shape; the only place that says what it takes."""
    if shape.in_blocks > 1:
        return f"takes one input block, not {shape.in_blocks}"
    if shape.rank > 32 or shape.in_features > 1024:
        return f"takes rank ≤ 32 and in_features ≤ 1024, not {shape.rank} and {shape.in_features}"
    return None


def down_bwd_makes_dz(config: LowRankLinearConfig, in_columns: int, out_columns: int) -> bool:
    """Where there is no core: does down_bwd add up_bwd's chunks itself, so that there is no hidden_bwd?

    It loads all of them ahead: more than these spill, or do not fit into shared memory. In float32 even one may spill.
    """
    most = 0 if config.dtype == torch.float32 else {16: 6, 32: 3, 64: 0}[config.block_r]
    chunks, column_tiles = -(-out_columns // config.up_bwd.columns), -(-in_columns // config.down_bwd.columns)
    return chunks <= most and chunks * column_tiles <= MOST_CHUNK_READS


@dataclass(frozen=True)
class ProjectionsShape:
    """The sizes of one `lowrank_projections`, whatever the rows."""

    in_features: int
    out_features: int  # the widest projection's
    rank: int
    count: int  # of projections
    parts: int  # of z: one where one A serves all without a mask on x, elsewhere as many as projections
    dropout: bool = False  # of x


@dataclass(frozen=True)
class ProjectionsConfig:
    """One tile per kernel of `lowrank_projections`."""

    dtype: torch.dtype  # the activations'
    block_r: int
    shrink_at_once: int  # parts of z that are added up at a time: all, or one
    down_at_once: int
    shrink: Tile
    expand: Tile
    up_bwd: Tile
    hidden_bwd: Tile
    down_bwd: Tile


def projections_config(shape: ProjectionsShape, dtype: torch.dtype, arch: int) -> ProjectionsConfig:
    """lowrank_linear's tiles, but smaller ones where the sums, or the masks, of several projections share registers.

    Where these do not fit, one projection after the other.
    """
    single = LowRankShape(shape.in_features, shape.out_features, shape.rank, dropout=shape.dropout)
    config = lowrank_linear_config(single, dtype, arch)
    block_r, shrink, down_bwd = config.block_r, config.shrink, config.down_bwd
    shrink_at_once = down_at_once = shape.parts
    if shape.parts > 1 and dtype == torch.float32:
        shrink_at_once = shape.parts if block_r == 16 and shape.parts <= 3 else 1
        down_at_once = 1 if shape.dropout else shrink_at_once
        shrink = replace(shrink, stages=1 if shape.dropout else 2) if block_r >= 32 else shrink
        down_bwd = replace(down_bwd, stages=1) if block_r < 64 or arch < 90 else down_bwd
    elif shape.parts > 1:
        shrink_at_once = 1 if block_r == 64 and (shape.dropout or shape.parts > 3) else shape.parts
        shrink = _half_shrink(block_r, shape.dropout, shape.parts > 3)
        down_bwd = _half_down_bwd(block_r, shape.dropout, shape.parts > 3, arch)
    up_bwd = replace(config.up_bwd, resident=1) if block_r == 64 else config.up_bwd  # with z through its mask
    if dtype == torch.float32 and (arch >= 100 or block_r == 32):  # z through its mask in 64 columns: tf32 on sm_100
        up_bwd = Tile(32, 32 if arch >= 100 else 64, stages=1, resident=1)
    # z through its mask: 255 registers and more in 64 columns, 48 in 32
    expand = replace(config.expand, columns=32) if dtype == torch.float32 and block_r == 64 else config.expand
    hidden_bwd = replace(config.hidden_bwd, rows=16)
    tiles = {"shrink": shrink, "expand": expand, "up_bwd": up_bwd, "hidden_bwd": hidden_bwd}
    return ProjectionsConfig(
        dtype, block_r, shrink_at_once, down_at_once, **_fitted(tiles | {"down_bwd": down_bwd}, arch)
    )


def _half_shrink(block_r: int, dropout: bool, many: bool) -> Tile:
    if dropout:
        return Tile(16, 128 if block_r == 16 and not many else 64, warps=4, stages=2)
    return Tile(64, 128, stages=2 if block_r == 64 else 3)


def _half_down_bwd(block_r: int, dropout: bool, many: bool, arch: int) -> Tile:
    if dropout:
        wide = block_r == 16 and not many
        tile = Tile(16 if arch >= 100 else 32, 128) if wide else Tile(16, 64, stages=2 if block_r == 64 else 1)
    else:
        rows = 32 if many and arch >= 100 else 64
        tile = {16: Tile(rows, 128, stages=2), 32: Tile(32, 128, stages=2), 64: Tile(32, 64, stages=2)}[block_r]
    return replace(tile, resident=1)


def strip_tiles(rows: int, tile: Tile, column_tiles: int, arch: int) -> int:
    """Row tiles that one program walks through, so that all programs run at a time: in one wave.

    But no more than LONGEST_RUN.
    """
    row_tiles = -(-rows // tile.rows)
    return min(LONGEST_RUN, max(1, -(-row_tiles // max(1, _programs(tile, arch) // column_tiles))))


@dataclass(frozen=True)
class BatchedConfig:
    """One tile per kernel of `batched_lowrank_linear`; `rows` divides SEGMENT_ROWS in the first two."""

    block_r: int
    shrink: Tile
    expand: Tile
    gram: Tile


def batched_config(rank: int, dtype: torch.dtype, arch: int) -> BatchedConfig:
    """The tiles for one rank, by its power of two alone. Raises ValueError for a rank above MAX_RANK."""
    block_r = _block_rank(rank)
    wide = Tile(32, 64) if dtype == torch.float32 else Tile(64, 128)
    shrink = gram = wide
    if block_r == 64:
        shrink = replace(wide, stages=2) if dtype == torch.float32 else Tile(64, 64)
        gram = replace(wide, resident=1) if dtype != torch.float32 and 90 <= arch < 100 else wide
        if dtype == torch.float32 and arch < 90:
            gram = replace(wide, stages=1)
    if block_r == 16 and arch < 90:
        gram = replace(wide, stages=2)
    return BatchedConfig(block_r, **_fitted({"shrink": shrink, "expand": wide, "gram": gram}, arch))


def adapter_strips(rows: int, adapters: int, tile: Tile, column_tiles: int, arch: int) -> int:
    """Strips of one adapter's rows, so that all programs run at a time.

    The number never depends on how the rows are spread over the adapters, which the host does not know.
    """
    wanted = _programs(tile, arch) // (adapters * column_tiles)
    return max(1, min(wanted, -(-rows // tile.rows)))


def _programs(tile: Tile, arch: int) -> int:
    """How many run at a time."""
    return tile.resident * PROCESSORS[_nearest(arch, PROCESSORS)]


def reconstruct_tile(rank: int, core: str, dtype: torch.dtype, split: bool, arch: int) -> Tile:
    """The tile of `reconstruct`: `rows` × `columns` of the result, `depth` of the rank at a time.

    split: some factor is multiplied in several parts, all of them in registers. Programs are small, so that two to four
    share a multiprocessor: while one multiplies, others read and write. A loop in a loop spends registers on stages.
    """
    if dtype == torch.float32:
        return Tile(32, 128, stages=2 if arch >= 100 and core == "none" else 1, depth=16)
    if arch < 90:
        return Tile(32, 128, warps=4, stages=2, depth=16)
    if 90 <= arch < 100 and core == "dense" and 32 < rank <= 64 and not split:  # mixed once for twice as many columns
        return Tile(64, 256, warps=4, stages=1, depth=64)
    depth = 16 if split or rank <= 16 else 32
    warps = 8 if arch >= 100 and not (split and core == "dense") else 4
    return Tile(64, 128, warps=warps, stages=1 if core == "dense" else 2, depth=depth)


def _block_rank(rank: int) -> int:
    """The power of two that a rank is padded to."""
    if rank > MAX_RANK:
        raise ValueError(f"rank: the Triton kernels take ranks up to {MAX_RANK}, not {rank}")
    return max(16, 1 << (rank - 1).bit_length())


def _fitted(tiles: dict[str, Tile], arch: int) -> dict[str, Tile]:
    """Fewer stages where a block has little shared memory."""
    if SHARED_MEMORY[_nearest(arch, SHARED_MEMORY)] < 128_000:
        return {kernel: replace(tile, stages=min(2, tile.stages)) for kernel, tile in tiles.items()}
    return tiles


def _nearest(arch: int, table: dict[int, int]) -> int:
    """The newest architecture of the table that is not newer than `arch`."""
    return max((known for known in table if known <= arch), default=min(table))


@dataclass(frozen=True)
class WeightDistanceConfig:
    """One tile per kernel of `weight_distance`; `depth` of a rank, or of what is added up, at a time."""

    distance: Tile
    unaligned: Tile  # distance's where not all rows are aligned, factors' included
    finish: Tile
    product: Tile


def weight_distance_config(arch: int) -> WeightDistanceConfig:
    """One launch takes matrices of every shape, so no shape chooses a tile.

    Products are long chains of short steps: some programs of a multiprocessor wait for memory or at a barrier while
    another multiplies. Steps of 32 terms were 4 % faster on an H200, but their sums err more. product's tiles have the
    64 rows that Hopper's tensor cores want, and 32 columns, which divide the common ranks.
    unaligned: the same rows and columns, which decide the order of sums; so many addresses leave sm_90's registers
    for short steps alone.
    finish: one program for each matrix, with as many rows as threads; `depth` partial sums at a time.
    """
    distance = Tile(64, 32, warps=4, depth=32) if arch >= 90 else Tile(32, 64, warps=4, stages=2, depth=16)
    return WeightDistanceConfig(
        distance=distance,
        unaligned=replace(distance, stages=2, depth=16) if arch < 100 else distance,
        finish=Tile(256, 32, stages=1, depth=512),
        product=Tile(64, 32, warps=4, stages=4 if arch >= 90 else 2, depth=16),
    )


@dataclass(frozen=True)
class GatedQueryConfig:
    """One tile for each kind of kernel of `gated_query`."""

    additive: Tile
    gated_fwd: Tile
    gated_bwd: Tile
    finish: Tile


def gated_query_config(columns: int) -> GatedQueryConfig:
    """The tiles for one width, by its power of two alone.

    additive: 8 × 256 makes 120 programs of BLIP's 8 · 40 rows of 768. gated: one program walks through a sequence, up
    to 1024 columns at once, and waits for memory at every step, so that it takes as many rows as registers hold: fewer
    where the loop over columns is unrolled.
    """
    width = max(16, 1 << (columns - 1).bit_length())
    return GatedQueryConfig(
        additive=Tile(8, min(width, 256), stages=1),
        gated_fwd=Tile(16 if width <= 1024 else 8, min(width, 1024), stages=1),
        gated_bwd=Tile(8, min(width, 1024), stages=1),
        finish=Tile(32, min(width, 64), warps=4, stages=1),
    )
