"""The comparison with the oracle must notice a broken backend: each mutant breaks one thing and has to fail it."""

from contextlib import nullcontext

import pytest
import torch
from lowrank_cases import Problem, assert_as_accurate_as_torch

from peft_kernels.ops import lowrank_linear as op
from peft_kernels.records import Dropout, Factors, Needs
from peft_kernels.torch_kernels import lowrank_linear as kernels

BLOCKS = {"core": "diagonal", "out_blocks": 2, "in_blocks": 2}


def zero_output(fwd, bwd):
    return lambda *args, **named: tuple(None if t is None else torch.zeros_like(t) for t in fwd(*args, **named)), bwd


def swapped_blocks(fwd, bwd):
    return with_factors(fwd, lambda factors: {"core": factors.core.flip(0)}), bwd


def missing_scale(fwd, bwd):
    return with_factors(fwd, lambda factors: {"scale": 1.0}), bwd


def missing_scale_in_backward(fwd, bwd):
    return fwd, with_factors(bwd, lambda factors: {"scale": 1.0})


def wrong_mask_in_backward(fwd, bwd):
    return fwd, with_dropout(bwd, lambda dropout: {"rng": dropout.rng.roll(1, 0)})


def plain_x_in_d_down(fwd, bwd):
    def broken(dy, x, weight, factors, dropout, needs, **named):
        grads = dict(zip(Needs._fields, bwd(dy, x, weight, factors, dropout, needs, **named)))
        dz = (dy @ factors.up) * factors.scale
        assert dropout.rng is not None and needs.down and factors.down is not None
        return tuple((grads | {"down": dz.t() @ x}).values())

    return fwd, broken


def no_rescaling(fwd, bwd):
    return tuple(with_dropout(launcher, lambda dropout: {"p": 0.0}) for launcher in (fwd, bwd))


def transposed_core(fwd, bwd):
    return with_factors(fwd, lambda factors: {"core": factors.core.transpose(-1, -2).contiguous()}), bwd


def with_factors(launcher, change):
    """The launcher with other fields in its factors; its arguments are found by their kind."""
    return _changing(launcher, Factors, change)


def with_dropout(launcher, change):
    return _changing(launcher, Dropout, change)


def _changing(launcher, kind, change):
    def broken(*args, **named):
        assert any(isinstance(arg, kind) for arg in args)
        args = [arg._replace(**change(arg)) if isinstance(arg, kind) else arg for arg in args]
        return launcher(*args, **named)

    return broken


FUSED = ({"dropout_p": 0.3, "dropout_on": "input"}, "fused")
ON_CORE = {"dropout_p": 0.3, "dropout_on": "core"}
ON_RANK = {"dropout_p": 0.3, "dropout_on": "rank"}
DROPPED = {"dropout_p": 0.3, "dropout_on": "input"}
MUTANTS = [
    (zero_output, {}),
    (swapped_blocks, BLOCKS),
    (missing_scale, {}),
    (missing_scale_in_backward, {}),
    (wrong_mask_in_backward, DROPPED),
    (plain_x_in_d_down, DROPPED),
    (no_rescaling, DROPPED),
    (transposed_core, {"core": "dense", "out_blocks": 2, "in_blocks": 2}),
]


@pytest.mark.parametrize(("mutant", "problem"), MUTANTS, ids=[m.__name__ for m, _ in MUTANTS])
def test_mutant_is_noticed(mutant, problem, monkeypatch, device):
    assert_as_accurate_as_torch(Problem(**problem), device, "torch")
    fwd, bwd = mutant(kernels.lowrank_linear_fwd, kernels.lowrank_linear_bwd)
    monkeypatch.setattr(kernels, "lowrank_linear_fwd", fwd)
    monkeypatch.setattr(kernels, "lowrank_linear_bwd", bwd)
    with pytest.raises(AssertionError):
        assert_as_accurate_as_torch(Problem(**problem), device, "torch")


# The same for the kernels themselves: one line of Triton replaced, the module loaded afresh. Without a core down_bwd
# makes dz in half precision; with one, and in float32, hidden_bwd does.
LAUNCHERS = ("shrink", "mix", "expand", "fused", "up_bwd", "hidden_bwd", "core_bwd", "down_bwd", "sum_partials")
CHUNKED, HALF = {"columns_out": 300}, {"dtype": torch.float16}
SCALED = "total *= load_scale(scale_ptr, scale)"
DOWN_DROPS = "dz = drop_hidden(total, rng_ptr, rows, 0, threshold, keep_scale, DROPOUT, BLOCK_M, BLOCK_R)"
DOWN_MIXES = "1, DROPOUT, BLOCK_M, BLOCK_R, BLOCK_R, CHUNKS,"
TRITON_MUTANTS = {
    "another mask in backward": ("_bwd", "keep_input(rng, rows, i,", "keep_input(rng, rows + 1, i,", DROPPED),
    "plain x in dA": ("_bwd", "x = tl.where(kept, x, 0.0)", "pass", DROPPED),
    "dx not masked": ("_bwd", "dx = tl.where(kept, dx, 0.0)", "pass", DROPPED),
    "first chunk only": ("_bwd", "for _ in range(chunks):", "for _ in range(1):", BLOCKS | CHUNKED),
    "first chunk only in down_bwd": ("_bwd", "static_range(CHUNKS)", "static_range(min(CHUNKS, 1))", HALF | CHUNKED),
    "scale missing in dB": ("_bwd", "acc * load_scale(scale_ptr, scale)", "acc", {}),
    "scale missing in dS": ("_bwd", SCALED, f"if CHUNKS:\n        {SCALED}", BLOCKS),
    "scale missing in down_bwd's dz": ("_bwd", SCALED, f"if CHUNKS == 0:\n        {SCALED}", HALF),
    "scale missing in y": ("_fwd", " * load_scale(scale_ptr, scale)\n    if bias_ptr", "\n    if bias_ptr", {}),
    "o ignored": ("_fwd", "core_ptr, o * I + i, R, BLOCK_R", "core_ptr, i, R, BLOCK_R", BLOCKS),
    "bias of the first block": ("_fwd", "bias_ptr + o * NB + offs_n", "bias_ptr + offs_n", BLOCKS),
    "tail of K lost": ("_fwd", "range(0, KB, BLOCK_K)", "range(0, KB - BLOCK_K + 1, BLOCK_K)", {"columns_in": 72}),
    "fused: no core mask": ("_fwd", 'if DROPOUT == "core":\n        kept', "if False:\n        kept", ON_CORE, "fused"),
    "fused: plain x": ("_fwd", "x = tl.where(keep_input(rng, rows, 0,", "tl.where(keep_input(rng, rows, 0,", *FUSED),
    "z's mask missing in dz": ("_bwd", 'if DROPOUT == "rank":', "if False:", BLOCKS | ON_RANK),
    "z's mask missing in down_bwd's dz": ("_bwd", DOWN_DROPS, "dz = total", HALF | ON_RANK),
    "x's rescaling missing in down_bwd's dz": ("_bwd", DOWN_DROPS, "dz = total", HALF | DROPPED),
    "S's mask missing in dS": ("_bwd", 'if DROPOUT == "core":', "if False:", BLOCKS | ON_CORE),
    "S's mask missing in down_bwd's dz": ("_bwd", DOWN_MIXES, DOWN_MIXES.replace("DROPOUT", '"none"'), HALF | ON_CORE),
    "strips overlap": ("_bwd", "(strip * tiles + tile) * BLOCK_M", "(strip + tile) * BLOCK_M", {"rows": 300}),
    "dA sums dB's parts": ("sum", "_add_parts(b_ptr, b_out_ptr,", "_add_parts(a_ptr, b_out_ptr,", {}),
    "dA sums its parts further on": ("sum", "block - end_a, count_b", "block, count_b", {}),
    "dB sums as few parts as dc": ("sum", "count_a, size_a, PARTS", "count_b, size_a, PARTS", BLOCKS),
    "dA sums dc's parts": ("sum", "_add_parts(c_ptr, c_out_ptr,", "_add_parts(b_ptr, c_out_ptr,", BLOCKS),
    "third sum left out": ("sum", "if block >= end_b:", "if False:", BLOCKS),
}


@pytest.mark.parametrize("mutated", [False, True], ids=["control", "mutant"])
@pytest.mark.parametrize("name", TRITON_MUTANTS)
def test_triton_mutant_is_noticed(name, mutated, monkeypatch, device, tmp_path):
    """The control loads the same source afresh without the change, and passes."""
    pytest.importorskip("triton")
    from triton_mutants import load

    from peft_kernels.triton_kernels import common, lowrank_linear, lowrank_linear_bwd, lowrank_linear_fwd

    side, good, bad, sizes, *design = TRITON_MUTANTS[name]
    design = design[0] if design else None
    module = {"_fwd": lowrank_linear_fwd, "_bwd": lowrank_linear_bwd, "sum": common}[side]
    namespace = load(module, good, bad if mutated else None, tmp_path)
    namespace["strip_tiles"] = lambda *sizes: 2
    for launcher in LAUNCHERS:
        if launcher in namespace and launcher in vars(module) and namespace[launcher].__module__ == module.__name__:
            monkeypatch.setattr(lowrank_linear, launcher, namespace[launcher])
    monkeypatch.setattr(op, "_plans", {})  # of the kernels that are replaced
    with pytest.raises(AssertionError) if mutated else nullcontext():
        assert_as_accurate_as_torch(Problem(**sizes), device, "triton", design)
