"""What `reconstruct` and its stack cost, by formula: peft_kernels/ops/reconstruct.py.

Sizes: N matrices of `rows` × `columns`, rank R, core "none" (N = 1), "diagonal" or "dense", with a base of their own or
none, `size` bytes per element. Products with a diagonal are not counted: they cost what reading the factor does.
"""

from . import Pass, Work

DESIGNS = ("fused", "torch", "loop", "bmm", "formula")
TILE_COLUMNS = 128  # of the kernels' tiles; each of them forms its rows of up · core again


def _core(N: int, R: int, core: str) -> int:
    """Elements."""
    return {"none": 0, "diagonal": N * R, "dense": N * R * R}[core]


def compulsory(N: int, rows: int, columns: int, R: int, core: str, base: bool, size: int) -> tuple[Work, Work]:
    """(forward, backward): what no design can avoid; the base is frozen.

    Backward: Q = H Aᵀ and Fᵀ H; with dense cores also F = B K, Q Kᵀ and Bᵀ Q, all thin.
    """
    result, parameters = N * rows * columns, R * (rows + columns) + _core(N, R, core)
    thin = 2 * N * rows * R * R if core == "dense" else 0
    folded = 2 * N * min(rows, columns) * R * R if core == "dense" else 0
    forward = Work(2 * result * R + folded, ((2 if base else 1) * result + parameters) * size)
    return forward, Work(4 * result * R + 2 * thin, (result + 2 * parameters) * size)


def passes(
    design: str, N: int, rows: int, columns: int, R: int, core: str, base: bool, size: int
) -> tuple[list[Pass], None]:
    """(forward, None) of one design; backward is composed of small products that are not modelled.

    "loop" and "bmm" differ in launches alone, A staying in the cache; "formula" scales and adds what it has written;
    "torch" is the loop for float32, and for half precision multiplies in float32 and rounds each block.
    """
    result, under = (n * size for n in (N * rows * columns, N * rows * columns if base else 0))
    down, up, left, cores = (n * size for n in (R * columns, rows * R, N * rows * R, _core(N, R, core)))
    gemm, fold = 2 * N * rows * columns * R, 2 * N * rows * R * R if core == "dense" else 0

    if design == "fused":
        again = fold * -(-columns // TILE_COLUMNS)
        return [Pass("base + s B core A", gemm + again, down + up + cores + under + result)], None

    scaled = Pass("s B", rows * R, 2 * up)
    mixed = [Pass("B core", fold or N * rows * R, up + cores + left)] if core != "none" else []
    product = Pass("base + B core A", gemm, left + down + under + result)
    if design == "bmm":
        return [scaled, *mixed, product], None
    if design == "loop" or (design == "torch" and size >= 4):
        return [scaled, *_split([*mixed, product], N)], None
    if design == "torch":
        wide = 4 // size  # a float32 beside an element
        widened = [Pass("A and B in float32", 0, (1 + wide) * part) for part in (down, up)]
        each = [Pass("core in float32", 0, (1 + wide) * cores)] if core != "none" else []
        each += [Pass("B core", part.flops, wide * part.bytes) for part in mixed]
        each += [Pass("B core A", gemm, wide * (left + down + result))]
        each += [Pass("add", N * rows * columns, 2 * wide * result + under)] if base else []
        each += [Pass("rounded", 0, (wide + 1) * result)]
        return [*widened, Pass("s B", rows * R, 2 * wide * up), *_split(each, N)], None
    if design == "formula":
        added = [Pass("times s", N * rows * columns, 2 * result), Pass("add", N * rows * columns, 3 * result)]
        return [*mixed, Pass("B core A", gemm, left + down + result), *(added if base else added[:1])], None
    raise ValueError(f"design: expected one of {DESIGNS}, got {design!r}")


def _split(parts: list[Pass], N: int) -> list[Pass]:
    """Each pass as N launches that share its work."""
    return [Pass(part.name, part.flops // N, part.bytes // N) for part in parts for _ in range(N)]
