"""Dropout in `lowrank_linear`: the three places, the masks' statistics and independence, and bitwise repeatability."""

from dataclasses import replace

import pytest
import torch
from lowrank_cases import LAYOUTS, Problem, assert_as_accurate_as_torch, recover_mask, run, skip_unless_runnable

from peft_kernels import lowrank_linear
from peft_kernels.ops import lowrank_linear as op


@pytest.mark.parametrize("place", ["input", "rank", "core"])
@pytest.mark.parametrize("layout", ["lora", "aurora-fused-qkv", "aurora-fc2-released", "grid"])
def test_dropout(backend_design, layout, place, device):
    problem = Problem(**LAYOUTS[layout], dropout_p=0.3, dropout_on=place)
    skip_unless_runnable(problem, backend_design[1])
    assert_as_accurate_as_torch(problem, device, *backend_design)


@pytest.mark.parametrize("place", ["input", "rank", "core"])
def test_results_repeat_bit_for_bit(backend_design, place, device):
    problem = Problem(rows=300, core="diagonal", out_blocks=3, dropout_p=0.2, dropout_on=place, dtype=torch.float16)
    backend, design = backend_design
    first, second = (run(problem, device, backend, design=design) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = run(problem, device, backend, design=design, seed=8)
    assert not torch.equal(first["y"], other["y"])


@pytest.mark.parametrize("place", ["input", "rank", "core"])
def test_masks_are_bernoulli(backend_design, place, device):
    """The kept share is 1 - p within five standard deviations, in all and per column, and two seeds differ."""
    problem = Problem(rows=400, columns_in=40, rank=24, dropout_p=0.3, dropout_on=place)
    backend, design = backend_design
    mask, other = (recover_mask(problem, device, backend, design=design, seed=seed) for seed in (7, 8))
    assert mask.shape == (400, problem.mask_columns)
    assert mask.unique(dim=0).shape == mask.shape and mask.unique(dim=1).shape == mask.shape  # no row or column twice
    assert ((mask.double().mean(1) - 0.7).abs() < 5.5 * (0.3 * 0.7 / problem.mask_columns) ** 0.5).all()
    deviation = (0.3 * 0.7 / mask.numel()) ** 0.5
    assert abs(mask.double().mean() - 0.7) < 5 * deviation
    per_column = mask.double().mean(0)
    assert ((per_column - 0.7).abs() < 5 * (0.3 * 0.7 / 400) ** 0.5).all()
    assert abs((mask == other).double().mean() - (0.7**2 + 0.3**2)) < 5 * (0.58 * 0.42 / mask.numel()) ** 0.5


def test_consecutive_calls_draw_new_masks(backend_design, device):
    tensors = Problem().tensors(device)
    options = {"dropout_p": 0.5, "backend": backend_design[0], "design": backend_design[1]}
    torch.manual_seed(0)
    first, second = lowrank_linear(**tensors, **options), lowrank_linear(**tensors, **options)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, lowrank_linear(**tensors, **options))
    still = lowrank_linear(**tensors, **options, training=False)
    assert torch.equal(still, lowrank_linear(**tensors, **options | {"dropout_p": 0.0}))


@pytest.mark.kernels
def test_masks_do_not_depend_on_tiles(monkeypatch, device):
    """A mask is a function of seed, row and column alone: other tiles, the same mask."""
    from peft_kernels.triton_kernels import lowrank_linear as launchers

    problem = Problem(rows=100, columns_in=72, in_blocks=2, core="diagonal", rank=20, dropout_p=0.4)
    masks = {place: recover_mask(replace(problem, dropout_on=place), device, "triton") for place in op.DROPOUT_PLACES}
    choose = launchers.lowrank_linear_config

    def other_tiles(*args):
        config = choose(*args)
        return replace(
            config,
            shrink=replace(config.shrink, rows=16, columns=16),
            mix=replace(config.mix, rows=16),
            hidden_bwd=replace(config.hidden_bwd, rows=64),
            down_bwd=replace(config.down_bwd, columns=16),
        )

    monkeypatch.setattr(launchers, "lowrank_linear_config", other_tiles)
    monkeypatch.setattr(op, "_plans", {})  # which may hold launches with the usual tiles
    for place, mask in masks.items():
        assert torch.equal(mask, recover_mask(replace(problem, dropout_on=place), device, "triton"))
