"""The comparison with the oracle must notice a broken backend: each mutant breaks one thing and has to fail it."""

import pytest
import torch
from projections_cases import Problem, assert_as_accurate_as_torch
from test_lowrank_linear_mutants import with_dropout

from peft_kernels.ops import lowrank_projections as op
from peft_kernels.records import Projections
from peft_kernels.torch_kernels import lowrank_projections as kernels


def zero_outputs(fwd, bwd):
    return lambda *args, **named: [torch.zeros_like(t) for t in fwd(*args, **named)], bwd


def scales_in_another_order(fwd, bwd):
    return with_projections(fwd, lambda each: {"scales": each.scales[::-1]}), bwd


def scales_in_another_order_in_backward(fwd, bwd):
    return fwd, with_projections(bwd, lambda each: {"scales": each.scales[::-1]})


def one_mask_for_all(fwd, bwd):
    return fwd, with_dropout(bwd, lambda dropout: {"rng": dropout.rng[:1].expand_as(dropout.rng)})


def no_rescaling(fwd, bwd):
    return tuple(with_dropout(launcher, lambda dropout: {"p": 0.0}) for launcher in (fwd, bwd))


def gradients_in_another_order(fwd, bwd):
    def broken(*args, **named):
        dx, d_down, *others = bwd(*args, **named)
        return dx, torch.cat(d_down.chunk(2)[::-1]), *others

    return fwd, broken


def with_projections(launcher, change):
    def broken(*args, **named):
        assert any(isinstance(arg, Projections) for arg in args)
        return launcher(*[a._replace(**change(a)) if isinstance(a, Projections) else a for a in args], **named)

    return broken


TWO = {"outputs": (24, 40)}
DROPPED, ON_RANK = ({"dropout_p": 0.3, "dropout_on": place} for place in ("input", "rank"))
MUTANTS = [
    (zero_outputs, TWO),
    (scales_in_another_order, TWO),
    (scales_in_another_order_in_backward, TWO),
    (one_mask_for_all, TWO | DROPPED),
    (no_rescaling, TWO | ON_RANK),
    (gradients_in_another_order, TWO),
]


@pytest.mark.parametrize(("mutant", "problem"), MUTANTS, ids=[m.__name__ for m, _ in MUTANTS])
def test_mutant_is_noticed(mutant, problem, monkeypatch, device):
    assert_as_accurate_as_torch(Problem(**problem), device, "torch")
    fwd, bwd = mutant(kernels.lowrank_projections_fwd, kernels.lowrank_projections_bwd)
    monkeypatch.setattr(kernels, "lowrank_projections_fwd", fwd)
    monkeypatch.setattr(kernels, "lowrank_projections_bwd", bwd)
    with pytest.raises(AssertionError):
        assert_as_accurate_as_torch(Problem(**problem), device, "torch")


# The same for the kernels themselves: one line of Triton replaced, the module loaded afresh. In half precision down_bwd
# makes dz of the chunks, in float32 hidden_bwd does.
SCALE = "tl.load(_pick((scale0_ptr, scale1_ptr, scale2_ptr, scale3_ptr), j, J))"
SHARED, HALF, LONG = TWO | {"shared": True}, TWO | {"dtype": torch.float16}, {"rows": 150, "outputs": (24, 8)}
CHUNKED, HALF_CHUNKED = {"outputs": (136, 72)}, {"outputs": (264, 40), "dtype": torch.float16}
KEPT = "keep_input(rng, rows, 0, first_column"
DX, PASS = "tl.where(kept, tl.dot(dz, down, input_precision=PRECISION), 0.0)", "pass"
TRITON_MUTANTS = {
    "z: one mask for all": ("load_rng(rng_ptr + 2 * (first + m))", "load_rng(rng_ptr)", TWO | DROPPED),
    "z: not rescaled": ("acc *= keep_scale", PASS, TWO | DROPPED),
    "z: one A for all": ("downs[0 if SHARED else first + m]", "downs[0]", TWO),
    "z: all at one place": ("+ (first + m) * R +", "+", TWO),
    "z: tail of K lost": ("range(0, K, BLOCK_K)", "range(0, K - BLOCK_K + 1, BLOCK_K)", TWO | {"inputs": 136}),
    "first z for all": ("if not ONE_Z:", "if False:", TWO),
    "z's mask of the first": ("rng_ptr += 2 * j\n    z =", "pass\n    z =", TWO | ON_RANK),
    "y: scale of the first": (f"y *= {SCALE}", "y *= tl.load(scale0_ptr)", TWO),
    "y: every bias": ("mask_n & (j == m)", "mask_n", TWO | {"biases": (True, True)}),
    "y: row stride of its own": ("total if STACKED else N", "N", TWO | {"stacked": True}),
    "places: one tile too late": ("tile >= end", "tile > end", TWO),
    "places: columns before are forgotten": ("total + before", "total", TWO),
    "dB: scale of the first": (f"acc *= {SCALE}", "acc *= tl.load(scale0_ptr)", TWO),
    "dB: strips overlap": ("(strip * tiles + tile) * BLOCK_M", "(strip + tile) * BLOCK_M", LONG),
    "t: all chunks at one place": ("t_ptr += tl.program_id(0).to(tl.int64) * M * R", PASS, TWO),
    "dz: first chunk only": ("_pick(chunks, j, J), M, R", "1, M, R", CHUNKED),
    "dz: chunks of the first": ("first += tl.where(m < j, chunks[m], 0)", PASS, TWO),
    "dz: scale of the first": ("scale_ptr = _pick(scales, j, J)", "scale_ptr = scales[0]", TWO),
    "dz: z's mask of the first": ("mask_ptr += 2 * j", PASS, TWO | ON_RANK),
    "dz: the first alone, of a sum": ("in tl.static_range(J // PARTS)", "in tl.static_range(1)", SHARED),
    "late dz: first chunk only": ("BLOCK_R, CHUNKS\n", "BLOCK_R, 1\n", HALF_CHUNKED),
    "late dz: chunks of the first": ("first = CHUNKS0 * (j > 0)", "first = CHUNKS0 * (j > 1)", HALF),
    "late dz: scale of the first": ("dz_ptr, scales[j]", "dz_ptr, scales[0]", HALF),
    "late dz: z's mask of the first": ("rng_ptr += 2 * j\n    return", "pass\n    return", HALF | ON_RANK),
    "late dz: the first alone, of a sum": ("m + J // PARTS", "m + 1", HALF | SHARED),
    "another mask in backward": (KEPT, KEPT.replace("rows", "rows + 1"), TWO | DROPPED),
    "one mask in backward": ("load_rng(rng_ptr + 2 * part)", "load_rng(rng_ptr)", TWO | DROPPED),
    "plain x in dA": ("dropped = tl.where(kept, x, 0.0)", PASS, TWO | DROPPED),
    "dx not masked": (DX, "tl.dot(dz, down)", TWO | DROPPED),
    "dA: the last alone, of a sum": ("sums[0] if SHARED and m > 0", "accs[0] if SHARED", HALF | SHARED | DROPPED),
    "dA: all at one place": ("* SUMS + m", "* SUMS", TWO),
    "dA: all passes at one place": ("(strip * PASSES + turn)", "(strip * PASSES)", TWO | DROPPED),
    "dx: the last pass alone": ("mask & (turn > 0)", "mask & (turn < 0)", TWO | DROPPED),
    "dx: one A for all passes": ("_pick(downs, turn + m, 1 if SHARED else J)", "downs[m]", TWO | DROPPED),
    "dx: one A for all": ("tiles_of_down[0 if SHARED else m]", "tiles_of_down[0]", TWO),
}
CONTROLS = {repr(sizes): sizes for _, _, sizes in TRITON_MUTANTS.values()}


@pytest.mark.parametrize(
    ("good", "bad", "sizes"),
    [*TRITON_MUTANTS.values(), *(("", None, sizes) for sizes in CONTROLS.values())],
    ids=[*TRITON_MUTANTS, *(f"control: {name}" for name in CONTROLS)],
)
def test_triton_mutant_is_noticed(good, bad, sizes, monkeypatch, device, tmp_path):
    """A control loads the same source afresh without a change, and passes: one for each problem."""
    pytest.importorskip("triton")
    from triton_mutants import load

    from peft_kernels.triton_kernels import lowrank_linear_bwd, lowrank_projections, lowrank_projections_kernels

    namespace = load(lowrank_projections_kernels, good, bad, tmp_path)
    for name in [name for name in vars(lowrank_projections) if name.endswith("_kernel")]:
        monkeypatch.setattr(lowrank_projections, name, namespace[name])
    monkeypatch.setattr(lowrank_linear_bwd, "strip_tiles", lambda *sizes: 2)
    monkeypatch.setattr(op, "_plans", {})  # of the kernels that are replaced
    if bad is None:
        assert_as_accurate_as_torch(Problem(**sizes), device, "triton")
    else:
        with pytest.raises(AssertionError):
            assert_as_accurate_as_torch(Problem(**sizes), device, "triton")
