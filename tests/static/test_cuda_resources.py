"""What the assembler made of the CUDA kernels, read from the built peft_kernels._C; no GPU is needed."""

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100": 227 * 1024}  # bytes a block may take
TYPES = {"f": "float32", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}
DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}
# Kernels that multiply matrices, one for each dtype and largest rank; and the one that takes any rank.
PRODUCTS = "shrink", "expand", "wide_bwd", "projections_down_bwd", "batched_shrink", "batched_expand", "gram"
OF_SEVERAL = {"shrink_of_4": 32, "shrink_of_2": 64}  # for one largest rank each
MULTIPLYING = *PRODUCTS, *OF_SEVERAL
SUMS = "wide_bwd", "projections_down_bwd", "gram"
RECONSTRUCT = "reconstruct", "reconstruct_from_float", "reconstruct_dense_from_float"
DISTANCE = "distance", "product"  # float32 throughout, any rank
GATED_QUERY = "additive_query_fwd", "additive_query_bwd", "gated_query_fwd", "gated_query_bwd"


@dataclass(frozen=True)
class Kernel:
    name: str
    dtype: str  # "" for a kernel of no particular type
    rank: int  # the largest it takes, 0 for any
    arch: str
    registers: int
    local: int  # bytes of stack and local memory: spills
    code: str  # SASS

    def __str__(self):
        return f"{self.name}<{self.dtype}, {self.rank}> for {self.arch}"


def library():
    spec = importlib.util.find_spec("peft_kernels._C")
    return None if spec is None else Path(spec.origin)


def cuobjdump(*arguments):
    """Triton's, which every CI machine has; or the toolkit's."""
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    tool = str(bundled) if bundled and bundled.is_file() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump: neither triton nor a CUDA toolkit is installed")
    return subprocess.run([tool, *arguments, str(library())], capture_output=True, text=True, check=True).stdout


def identify(symbol):
    """_ZN4peft…shrink_kernelI6__halfLi32ELi4EE… -> shrink_of_4, float16, 32; …reconstruct_kernelI6__halffLb1EE… -> that
    float16 weight from float32 factors and a dense core."""
    name, dtype, rank, count, operand, dense = re.search(
        r"\d+([a-z_]+)_kernel(?:I(f|13__nv_bfloat16|6__half)(?:Li(\d+))?(?:ELi(\d+))?(?:(f|S\d*_)Lb([01])E)?)?", symbol
    ).groups()
    if count and count != "1":
        name += f"_of_{count}"
    if operand:
        name += ("_dense" if dense == "1" else "") + ("_from_float" if operand == "f" else "")
    return name, TYPES.get(dtype, ""), int(rank or 0)


def sections(text, start):
    """(first line, the rest) of each part of `text` that begins with `start`."""
    return [part.split("\n", 1) for part in text.split(start)[1:]]


@cache
def code_for(arch):
    return dict(sections(cuobjdump("--dump-sass", "-arch", arch), "\t\tFunction : "))


@cache
def kernels():
    found = []
    for section, usage in sections(cuobjdump("--dump-resource-usage"), "arch = "):
        arch = section.strip()
        for symbol, line in sections(usage, " Function "):
            symbol = symbol.rstrip(":")
            used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
            found.append(
                Kernel(*identify(symbol), arch, used["REG"], used["STACK"] + used["LOCAL"], code_for(arch)[symbol])
            )
    return found


@pytest.fixture(autouse=True)
def built():
    if library() is None:
        pytest.skip("no CUDA build: peft_kernels._C was left out, as there was no nvcc or PEFT_KERNELS_CUDA=off")


def failures(wrong, names=None, dtypes=None):
    """The kernels that `wrong` is true of, among those named; there must be some to ask."""
    asked = [k for k in kernels() if (names is None or k.name in names) and (dtypes is None or k.dtype in dtypes)]
    assert asked
    return [str(kernel) for kernel in asked if wrong(kernel)]


def test_every_architecture_has_every_kernel():
    from peft_kernels import _C

    archs = {arch for arch in _C.build_info()["architectures"] if arch.startswith("sm_")}
    assert archs == {kernel.arch for kernel in kernels()}
    expected = {(name, dtype, rank) for name in PRODUCTS for dtype in DTYPE_CODES for rank in (32, 64, 128)}
    expected |= {(name, dtype, rank) for name, rank in OF_SEVERAL.items() for dtype in DTYPE_CODES}
    any_rank = "mix", "hidden_bwd", "projections_hidden_bwd", "reduce"
    any_rank += *RECONSTRUCT[1:], *GATED_QUERY, "gated_query_finish"
    expected |= {(name, dtype, 0) for name in any_rank for dtype in DTYPE_CODES}
    expected |= {("reconstruct", dtype, 0) for dtype in ("bfloat16", "float16")}
    expected |= {(name, "", 0) for name in (*DISTANCE, "finish")}
    for arch in archs:
        assert expected <= {(k.name, k.dtype, k.rank) for k in kernels() if k.arch == arch}


def test_no_local_memory():
    assert not failures(lambda k: k.local > 0)


def test_two_blocks_fit_a_multiprocessor():
    """65,536 registers: 128 for each of twice 256 threads, at the ranks that training uses most."""
    assert not failures(lambda k: k.rank in (32, 64) and k.registers > 128, ["wide_bwd"], ["bfloat16", "float16"])
    passes = ["shrink", "shrink_of_4", "expand"]
    assert not failures(lambda k: k.rank == 32 and k.registers > 128, passes, ["bfloat16", "float16"])
    batched = [name for name in PRODUCTS if name.startswith("batched")] + ["gram"]
    assert not failures(lambda k: k.rank in (32, 64) and k.registers > 128, batched, ["bfloat16", "float16"])
    assert not failures(lambda k: k.registers > 128, RECONSTRUCT)
    assert not failures(lambda k: k.registers > 80, RECONSTRUCT[:2])  # three
    assert not failures(lambda k: k.registers > 128, [*DISTANCE, *GATED_QUERY])  # one of 512 threads for "gated"


@pytest.mark.parametrize("rank", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPE_CODES)
def test_strips_are_planned_for_the_blocks_that_run_at_a_time(dtype, rank):
    """Two on a multiprocessor with registers (65,536, by 256 for a warp) and shared memory for two of every pass."""
    from peft_kernels import _C

    code = DTYPE_CODES[dtype]
    shared = max(_C.lowrank_linear_shared_bytes(code, rank), _C.batched_lowrank_linear_shared_bytes(code, rank)) + 1024
    fit = 2
    for kernel in kernels():
        if kernel.name in ("wide_bwd", "gram", "expand") and (kernel.dtype, kernel.rank) == (dtype, rank):
            warps = 65536 // (-(-kernel.registers * 32 // 256) * 256) // 4 * 4
            fit = min(fit, warps // 8, (SHARED_LIMIT[kernel.arch] + 1024) // shared)
    assert _C.lowrank_linear_resident(code, rank) == fit
    # The pass over x of several projections holds the gradients of all: strips are planned for one block.
    assert not failures(lambda k: k.registers <= 128, ["projections_down_bwd"])


def test_shared_memory_within_limits():
    from peft_kernels import _C

    for arch in _C.build_info()["architectures"]:
        for code in DTYPE_CODES.values():
            limit = SHARED_LIMIT.get(arch, 227 * 1024)
            assert max(_C.reconstruct_shared_bytes(code), _C.weight_distance_shared_bytes()) <= 48 * 1024, (arch, code)
            for rank in (1, 32, 33, 64, 65, _C.LOWRANK_LINEAR_MAX_RANK):
                assert _C.lowrank_linear_shared_bytes(code, rank) <= limit, (arch, code, rank)
                assert _C.lowrank_projections_shared_bytes(code, rank) <= limit, (arch, code, rank)
                assert _C.batched_lowrank_linear_shared_bytes(code, rank) <= limit, (arch, code, rank)


def test_half_precision_uses_tensor_cores():
    assert not failures(
        lambda k: "HMMA.16816.F32" not in k.code, [*MULTIPLYING, "reconstruct"], ["bfloat16", "float16"]
    )


def test_float32_stays_float32():
    assert not failures(lambda k: re.search("HMMA|GMMA|TF32", k.code), dtypes=["float32"])
    assert not failures(lambda k: "FFMA" not in k.code, MULTIPLYING, ["float32"])
    any_rank = [*RECONSTRUCT[1:], *DISTANCE, "finish", *GATED_QUERY]
    assert not failures(lambda k: re.search("HMMA|GMMA|TF32", k.code) or "FFMA" not in k.code, any_rank)


def test_float32_sums_are_sums_of_short_chains():
    """Each product of a step starts afresh and is added to what the other steps left: one addition for each element,
    beside the two steps' multiply-adds that the loop over a product has."""
    assert not failures(lambda k: 2 * k.code.count("FADD") < k.code.count("FFMA"), SUMS, ["float32"])


def test_float32_operands_are_read_in_pairs():
    """Eight bytes at a time: products in float32 are limited by reads of shared memory."""
    assert not failures(lambda k: k.code.count("LDS.64") < 8, [*MULTIPLYING, *RECONSTRUCT[1:]], ["float32"])
    assert not failures(lambda k: k.code.count("LDS.64") < 8, DISTANCE)


def test_wide_matrices_move_16_bytes_at_a_time():
    """Loads of x, dY, S and bases; stores of y0, of whole weights and, in one of the two kernels of each kind, dx0.
    Loads of live, target and base; stores of targets, errors and products. All activations that gates mix."""
    storing = [*RECONSTRUCT, *DISTANCE, *GATED_QUERY]
    assert not failures(lambda k: "LDG.E.128" not in k.code, [*MULTIPLYING, *storing])
    storing += "expand", "projections_down_bwd", "batched_expand"
    assert not failures(lambda k: "STG.E.128" not in k.code, storing)
    storing = {(k.arch, k.dtype, k.rank) for k in kernels() if k.name == "wide_bwd" and "STG.E.128" in k.code}
    assert storing == {(k.arch, k.dtype, k.rank) for k in kernels() if k.name == "wide_bwd"}


def test_no_atomics():
    assert not failures(lambda k: any(f" {word}." in k.code for word in ("ATOM", "ATOMG", "RED")))
