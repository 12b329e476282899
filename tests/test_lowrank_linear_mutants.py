"""The comparison with the oracle must notice a broken backend: each mutant breaks one thing and has to fail it."""

from contextlib import nullcontext

import pytest
import torch
from lowrank_cases import Problem, assert_as_accurate_as_torch

from peft_kernels.torch_kernels import lowrank_linear as kernels

BLOCKS = {"core": "diagonal", "out_blocks": 2, "in_blocks": 2}


def zero_output(fwd, bwd):
    return lambda *args: tuple(None if t is None else torch.zeros_like(t) for t in fwd(*args)), bwd


def swapped_blocks(fwd, bwd):
    def broken(x, weight, bias, down, up, core, *rest):
        return fwd(x, weight, bias, down, up, core.flip(0), *rest)

    return broken, bwd


def missing_scale(fwd, bwd):
    def broken(*args):
        return fwd(*args[:6], 1.0, *args[7:])

    return broken, bwd


def missing_scale_in_backward(fwd, bwd):
    def broken(*args):
        return bwd(*args[:6], 1.0, *args[7:])

    return fwd, broken


def wrong_mask_in_backward(fwd, bwd):
    def broken(*args):
        return bwd(*args[:8], args[8].roll(1, 0), *args[9:])

    return fwd, broken


def plain_x_in_d_down(fwd, bwd):
    def broken(*args):
        dx, d_down, *rest = bwd(*args)
        x, down, rng, p = args[1], args[3], args[8], args[9]
        dz = (args[0] @ args[4]) * args[6]
        assert rng is not None and d_down is not None and down is not None
        return dx, dz.t() @ x / (1 - p) * (1 - p), *rest

    return fwd, broken


def no_rescaling(fwd, bwd):
    return (lambda *args: fwd(*args[:9], 0.0, *args[10:])), (lambda *args: bwd(*args[:9], 0.0, *args[10:]))


def transposed_core(fwd, bwd):
    def broken(*args):
        return fwd(*args[:5], args[5].transpose(-1, -2).contiguous(), *args[6:])

    return broken, bwd


FUSED = ({"dropout_p": 0.3, "dropout_on": "input"}, "fused")
ON_CORE = {"dropout_p": 0.3, "dropout_on": "core"}
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


# The same for the kernels themselves: one line of Triton replaced, the module loaded afresh.
TRITON_MUTANTS = {
    "another mask in backward": ("_bwd", "keep_input(rng, rows, i,", "keep_input(rng, rows + 1, i,", DROPPED),
    "plain x in dA": ("_bwd", "x = tl.where(kept, x, 0.0)", "pass", DROPPED),
    "dx not masked": ("_bwd", "dx = tl.where(kept, dx, 0.0)", "pass", DROPPED),
    "first chunk only": ("_bwd", "for _ in range(chunks):", "for _ in range(1):", {"columns_out": 300}),
    "scale missing in dB": ("_bwd", "acc * load_scale(scale_ptr, scale)", "acc", {}),
    "scale missing in y": ("_fwd", " * load_scale(scale_ptr, scale)\n    if bias_ptr", "\n    if bias_ptr", {}),
    "o ignored": ("_fwd", "core_ptr, o * I + i, R, BLOCK_R", "core_ptr, i, R, BLOCK_R", BLOCKS),
    "bias of the first block": ("_fwd", "bias_ptr + o * NB + offs_n", "bias_ptr + offs_n", BLOCKS),
    "tail of K lost": ("_fwd", "range(0, KB, BLOCK_K)", "range(0, KB - BLOCK_K + 1, BLOCK_K)", {"columns_in": 72}),
    "fused: no core mask": ("_fwd", 'if DROPOUT == "core":\n        kept', "if False:\n        kept", ON_CORE, "fused"),
    "fused: plain x": ("_fwd", "x = tl.where(keep_input(rng, rows, 0,", "tl.where(keep_input(rng, rows, 0,", *FUSED),
    "z's mask missing in dz": ("_bwd", 'if DROPOUT == "rank":', "if False:", {"dropout_p": 0.3, "dropout_on": "rank"}),
    "S's mask missing in dS": ("_bwd", 'if DROPOUT == "core":', "if False:", ON_CORE),
    "strips overlap": ("_bwd", "(strip * tiles + tile) * BLOCK_M", "(strip + tile) * BLOCK_M", {"rows": 300}),
}


@pytest.mark.parametrize("mutated", [False, True], ids=["control", "mutant"])
@pytest.mark.parametrize("name", TRITON_MUTANTS)
def test_triton_mutant_is_noticed(name, mutated, monkeypatch, device, tmp_path):
    """The control loads the same source afresh without the change, and passes."""
    pytest.importorskip("triton")
    from peft_kernels.triton_kernels import lowrank_linear, lowrank_linear_bwd, lowrank_linear_fwd

    side, good, bad, sizes, *design = TRITON_MUTANTS[name]
    design = design[0] if design else None
    module = lowrank_linear_fwd if side == "_fwd" else lowrank_linear_bwd
    with open(module.__file__) as file:
        source = file.read()
    assert good in source, "the mutant's line is gone; write it anew"
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(good, bad) if mutated else source)
    namespace = {"__name__": module.__name__, "__package__": module.__package__, "__file__": str(path)}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    namespace["strip_tiles"] = lambda *sizes: 2
    for launcher in ("shrink", "mix", "expand", "fused", "up_bwd", "hidden_bwd", "core_bwd", "down_bwd"):
        if launcher in namespace and launcher in vars(module) and namespace[launcher].__module__ == module.__name__:
            monkeypatch.setattr(lowrank_linear, launcher, namespace[launcher])
    with pytest.raises(AssertionError) if mutated else nullcontext():
        assert_as_accurate_as_torch(Problem(**sizes), device, "triton", design)
