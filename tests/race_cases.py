"""Calls of every operation whose launches have several programs along each dimension and loops of several iterations.

Tiles are as they are used, of 64 × 128 elements or 32 × 64, except where only large shapes would fill several.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, product

import batched_cases
import gated_query_cases
import imitation_cases
import lowrank_cases
import projections_cases
import pytest
import reconstruct_cases
import torch
from imitation_cases import Layer
from torch import Tensor

from peft_kernels.imitation import imitation_step
from peft_kernels.triton_kernels import (
    batched_lowrank_linear,
    common,
    config,
    gated_query,
    gated_query_kernels,
    lowrank_linear,
    lowrank_linear_bwd,
    lowrank_linear_fwd,
    lowrank_projections,
    lowrank_projections_kernels,
    reconstruct,
    weight_distance,
    weight_distance_product,
    weight_distance_records,
)
from peft_kernels.triton_kernels.config import GatedQueryConfig, Tile, WeightDistanceConfig

Results = dict[str, Tensor | None]
Run = Callable[[], Results]
HALF = torch.float16  # what the interpreter rounds as a GPU does
PLACES = ("input", "rank", "core")
MODULES = {
    "lowrank_linear": [lowrank_linear, lowrank_linear_fwd, lowrank_linear_bwd, common],
    "lowrank_projections": [lowrank_projections, lowrank_projections_kernels],
    "batched_lowrank_linear": [batched_lowrank_linear],
    "gated_query": [gated_query, gated_query_kernels],
    "reconstruct": [reconstruct],
    "weight_distance": [weight_distance, weight_distance_product, weight_distance_records],
}


def small_tiles(patch: pytest.MonkeyPatch) -> None:
    """Two tiles of rows in a strip, two strips of an adapter's rows; narrow tiles where they would hold a whole row."""
    for module in (lowrank_linear_bwd, gated_query):
        patch.setattr(module, "strip_tiles", lambda *sizes: 2)
    patch.setattr(batched_lowrank_linear, "adapter_strips", lambda *sizes: 2)
    patch.setattr(config, "SUM", Tile(1, 64, stages=1))
    one = Tile(8, 64, stages=1)
    gated = GatedQueryConfig(one, one, one, replace(one, rows=2))
    patch.setattr(gated_query, "gated_query_config", lambda columns: gated)
    tile = Tile(32, 32, depth=16)
    distances = WeightDistanceConfig(tile, tile, Tile(32, 16, depth=2), tile)
    patch.setattr(weight_distance, "weight_distance_config", lambda *sizes: distances)


def lowrank(needs: str = "x weight bias down up core", design: str | None = None, **sizes) -> Run:
    problem = lowrank_cases.Problem(**{"rows": 130, "columns_in": 132, "columns_out": 132, "rank": 40} | sizes)
    return lambda: lowrank_cases.run(_needing(problem, needs), "cpu", "triton", design=design)


def projected(needs: str = "x weight0 bias0 down0 down1 up0 up1 down", **sizes) -> Run:
    problem = projections_cases.Problem(**{"rows": 130, "inputs": 132, "outputs": (132, 40), "rank": 40} | sizes)
    return lambda: projections_cases.run(_needing(problem, needs), "cpu", "triton")


def batched(needs: str = "x weight bias down up", **sizes) -> Run:
    rows = batched_cases.rows_of(5, 130, 0, 70, 1)
    problem = batched_cases.Problem(**{"index": rows, "inputs": 132, "outputs": 132, "rank": 40} | sizes)
    return lambda: batched_cases.run(_needing(problem, needs), "cpu", "triton")


def gated(mode: str, needs: str, **sizes) -> Run:
    problem = gated_query_cases.Problem(mode, **{"batch": 3, "positions": 11, "width": 72} | sizes)
    return lambda: gated_query_cases.run(_needing(problem, needs), "cpu", "triton")


def reconstructed(**sizes) -> Run:
    problem = reconstruct_cases.Problem(**{"rows": 66, "columns": 136, "rank": 40} | sizes)
    return lambda: reconstruct_cases.run(problem, "cpu", "triton")


def imitated(*layers: Layer, decay: float | None = 0.9, reduction: str = "mean") -> Run:
    """Gradients are added to what is there; the teachers change in place."""

    def run() -> Results:
        groups = [layer.group("cpu") for layer in layers]
        for t in imitation_cases.adapters(groups):
            t.grad = torch.ones_like(t)
        loss, errors = imitation_step(
            groups, decay=decay or 0, reduction=reduction, update_teacher=decay is not None, backend="triton",
            return_errors=True,
        )  # fmt: skip
        changed = [t.grad for t in imitation_cases.adapters(groups)]
        changed += [t for group in groups for t in (*group.teacher, *(group.teacher_bias or ()))]
        return {"loss": loss, "errors": errors} | {str(index): t for index, t in enumerate(changed)}

    return run


def _needing(problem, needs: str):
    """The same problem, in which only these tensors require a gradient."""

    class Partly(type(problem)):
        def tensors(self, device: str) -> dict[str, Tensor]:
            return {name: t.requires_grad_(name in needs.split()) for name, t in super().tensors(device).items()}

    return Partly(**vars(problem))


GRID = {"out_blocks": 2, "in_blocks": 2}
WIDE = {"dtype": HALF, "columns_in": 264}
THIN = {"design": "fused", "dtype": HALF, "columns_in": 72, "rank": 20, "out_blocks": 2}
CASES: dict[str, dict[str, Run]] = {
    "lowrank_linear": {
        "lora": lowrank(**WIDE, rank=12, dropout_p=0.3),
        "diagonal": lowrank(core="diagonal", out_blocks=2, dtype=HALF, dropout_p=0.3, dropout_on="rank"),
        "dense": lowrank(core="dense", in_blocks=2, dtype=HALF, dropout_p=0.3, dropout_on="core"),
        "hidden": lowrank("x core", in_blocks=2, core="diagonal", dtype=HALF, precomputed_hidden=True),
        "float32, down": lowrank("down", rank=20),
        "one kernel": lowrank("core", **THIN, core="dense", dropout_p=0.3),
        "one kernel, diagonal": lowrank("up", **THIN, core="diagonal", dropout_p=0.3, dropout_on="core", bias=False),
    },
    "lowrank_projections": {
        "lora": projected(dtype=HALF, rank=12, dropout_p=0.3, stacked=True),
        "aurora": projected(dtype=HALF, shared=True, dropout_p=0.3, dropout_on="rank"),
        "one A, masks of x": projected("down", dtype=HALF, shared=True, rank=20, dropout_p=0.3),
        "float32, x": projected("x", dropout_p=0.3, dropout_on="rank"),
        "late, masks of z": projected("x", dtype=HALF, rank=12, shared=True, dropout_p=0.3, dropout_on="rank"),
        "up": projected("up1", rank=20),
    },
    "batched_lowrank_linear": {
        "float16": batched(dtype=HALF),
        "scales": batched("down", scale=None, inputs=72, outputs=72, rank=20),
    },
    "gated_query": {
        "additive": gated("additive", "text cross gamma beta cross_gamma cross_beta"),
        "additive, vectors": gated("additive", "gamma cross_beta"),
        "gated": gated("gated", "hidden text gamma beta"),
        "gated, padded": gated("gated", "beta", padding="some", dtype=HALF),
    },
    "reconstruct": {
        "lora": reconstructed(rows=130, columns=264, dtype=HALF),
        "stack": reconstructed(core="diagonal", out_blocks=3, stack=True, base="shared", rank=20),
        "dense": reconstructed(core="dense", **GRID, rows=40, rank=20, base=None),
    },
    "weight_distance": {
        "inputs": imitated(Layer((34,), 65, 20, 20), Layer((34,), 40, 20, None, live=torch.bfloat16)),
        "output": imitated(Layer((34,), 40, 20, 18, placement="output", live=HALF), reduction="relative"),
        "aligned": imitated(Layer((34, 34), 40, 20, 20, bias=False), decay=None, reduction="sum"),
    },
}

_CORES = (None, "flat diagonal", "flat dense", "diagonal", "dense")
_KINDS = (HALF, torch.float32, torch.bfloat16)
_NEEDS = {
    "lowrank_linear": ("x", "down", "up", "x down", "x down up", "up core", "core"),
    "batched_lowrank_linear": ("x", "down", "up", "x up"),
    "additive": ("text", "gamma", "beta", "cross", "cross_gamma", "cross_beta", "hidden text beta"),
    "gated": ("hidden", "text", "gamma", "beta", "hidden text gamma beta"),
}


def _lowrank_sweep() -> dict[str, Run]:
    """Every core with dropout in every place, in both designs; what needs a gradient, and the types, in turns."""
    sweep, turns = {}, cycle(_NEEDS["lowrank_linear"])
    for core, place, kind in product(_CORES, (None, *PLACES), _KINDS):
        blocks = GRID if core in ("diagonal", "dense") else {}
        needs, dropout = f"bias {next(turns)}", {} if place is None else {"dropout_p": 0.3, "dropout_on": place}
        sizes = {"dtype": kind, "core": core, **dropout}
        sweep[f"{core}-{place}-{kind}"] = lowrank(needs, **blocks, **sizes)
        thin = THIN | {"columns_in": 264, "out_blocks": 2 if blocks else 1}
        sweep[f"{core}-{place}-{kind}-one kernel"] = lowrank(needs, **thin | sizes)
    return sweep


SWEEP: dict[str, dict[str, Run]] = {
    "lowrank_linear": _lowrank_sweep(),
    "lowrank_projections": {
        f"{kind}-{place}-{needs}-{rank}": projected(
            needs,
            dtype=kind,
            rank=rank,
            shared="down" in needs.split(),
            outputs=(264, 40, 132),
            **({} if place is None else {"dropout_p": 0.3, "dropout_on": place}),
        )
        for kind, place, rank in product(_KINDS, (None, "input", "rank"), (8, 40))
        for needs in ("x down0 up1", "x down", "up0 down", "x", "down2")
    },
    "batched_lowrank_linear": {
        f"{kind}-{needs}-{rank}": batched(needs, dtype=kind, rank=rank, inputs=264, scale=1.7 if rank == 8 else None)
        for kind, needs, rank in product(_KINDS, _NEEDS["batched_lowrank_linear"], (8, 40))
    },
    "gated_query": {
        f"{mode}-{kind}-{needs}": gated(mode, needs, dtype=kind, batch=7, positions=19, width=264)
        for mode in gated_query_cases.MODES
        for kind, needs in product(_KINDS, _NEEDS[mode])
    },
    "reconstruct": {
        f"{kind}-{core}-{base}": reconstructed(core=core, base=base, dtype=kind, stack=True, out_blocks=3, rows=130)
        for kind, core, base in product(_KINDS, ("diagonal", "dense"), ("full", "shared", None))
    },
    "weight_distance": {
        f"{placement}-{kind}-{reduction}-{width}": imitated(
            *(Layer((out,), width, 40, depth, placement=placement, live=kind) for out in (130, 68)), reduction=reduction
        )
        for placement, kind, width in product(("input", "output"), _KINDS, (136, 137))
        for reduction, depth in (("mean", 20), ("sum", None), ("relative", 18))
    },
}
