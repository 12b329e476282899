"""`lowrank_linear` in Triton: thin passes around torch's GEMM ("passes"), or one kernel for small widths ("fused").

The mathematics and every shape: peft_kernels/ops/lowrank_linear.py. M rows; K = I·KB inputs; N = O·NB outputs; rank R.

    forward    shrink      x -> z
               mix         z -> S: core and masks, where there are any
               expand      S -> s·S Bᵀ + b;  then torch adds x Wᵀ          ("fused": all of it in one kernel)
    backward   up_bwd      dy, S -> dy B by chunks of columns, dB by strips of rows  (S by mix, from z)
               hidden_bwd  those chunks -> dz              core_bwd  those chunks, z -> d_core by strips
               down_bwd    x, dz -> dA by strips, mask ∘ (dz A);  then torch adds dy W
               sums        dB, dA and d_core of their strips

Where there is no core and few chunks, down_bwd makes dz of them itself: a LoRA layer takes five launches for both
directions. dy and x are read once each by the thin passes. Sums have a fixed order: gradients repeat bit for bit.

What does not depend on rows or addresses is worked out once for each kind of call and kept: `_forward`, `_backward`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..records import Dropout, Factors, Needs
from .common import NULL, Sums, allows_tf32, architecture, dropout_arguments, scale_arguments
from .config import LowRankShape, lowrank_linear_config
from .lowrank_linear_bwd import CoreBwd, DownBwd, HiddenBwd, UpBwd
from .lowrank_linear_fwd import Drop, Expand, Fused, Mix, Setting, Shrink

KEEP = Drop(*dropout_arguments(None, 0.0))
MOST_CHUNK_READS = 64  # of each row of t, by all column tiles of down_bwd; above it, hidden_bwd's launch costs less


def lowrank_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, dropout: Dropout, design: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """-> y (M, N), z (M, I·R); z is None when factors.z was given."""
    down, up, core, scale, z = factors
    run = _forward(
        lowrank_linear_config, *_kind(x, weight.shape[1], weight.shape[0], factors, dropout), design, bias is None
    )
    scale, drop = scale_arguments(scale), _drop(dropout)
    bias, core = NULL if bias is None else bias, NULL if core is None else core
    if run.fused is not None and z is None:
        return run.fused(x, weight, bias, factors, scale, drop)
    hidden = z
    if z is None:
        hidden = run.shrink(x, down, drop, x.is_contiguous())
    plain = z is None or z.is_contiguous()
    s = hidden if run.mix is None else run.mix(hidden, core, drop, plain)
    y = run.expand(s, up, bias, scale, plain).addmm_(x, weight.t())
    return y, hidden if z is None else None


def lowrank_linear_bwd(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, factors: Factors, dropout: Dropout, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """-> dx, d_down, d_up, d_core, dz, as `needs` says in that order. factors.down is None if z came from outside.

    The same for every design: dB needs a read of dy, which yields dy B at no further traffic.
    """
    down, up, core, scale, z = factors
    columns = 0 if down is None else down.shape[1] * (1 if core is None else core.shape[1])
    run = _backward(lowrank_linear_config, *_kind(dy, columns, dy.shape[1], factors, dropout), needs)
    scale, drop = scale_arguments(scale), _drop(dropout)
    plain = all(map(Tensor.is_contiguous, (t for t in (dy, x, z) if t is not None)))
    core_or_null, s, t, dz, dx, sums = NULL if core is None else core, z, None, None, None, []
    if run.mix is not None:
        s = run.mix(z, core_or_null, drop, plain)
    if run.up is not None:
        t, d_up = run.up(dy, s, up, scale, plain)
        sums.append((d_up, up))
    if run.core is not None:
        sums.append((run.core(t, z, core, scale, drop, plain), core))
    if run.hidden is not None:
        dz = run.hidden(t, core_or_null, scale, drop)
    if run.down is not None:
        dx, d_down = run.down(x, t if dz is None else dz, down, scale, drop, plain)
        sums.append((d_down, down))
    if needs.x:
        dx = dy @ weight if dx is None or dx is NULL else dx.addmm_(dy, weight)
    added = iter(run.sums([each for each in sums if each[0] is not NULL]))
    d_up = next(added) if needs.up else None
    d_core = next(added) if needs.core else None
    d_down = next(added) if needs.down else None
    return dx if needs.x else None, d_down, d_up, d_core, dz if needs.z else None


def lowrank_hidden_fwd(x: Tensor, down: Tensor, input_blocks: int) -> Tensor:
    """-> z (M, I·R)"""
    run = _hidden(lowrank_linear_config, x.dtype, x.device, *down.shape, input_blocks, down.dtype, _precise(x), None)
    return run.shrink(x, down, KEEP, x.is_contiguous())


def lowrank_hidden_bwd(
    dz: Tensor, x: Tensor | None, down: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """-> dx, d_down; `needs` says which, in that order."""
    blocks = dz.shape[1] // down.shape[0]
    run = _hidden(lowrank_linear_config, dz.dtype, dz.device, *down.shape, blocks, down.dtype, _precise(dz), (*needs,))
    plain = dz.is_contiguous() and (x is None or x.is_contiguous())
    dx, d_down = run.down(x, dz, down, (NULL, 1.0), KEEP, plain)
    return dx if needs[0] else None, run.sums([(d_down, down)])[0] if needs[1] else None


# ---- what is worked out once ----------------------------------------------------------------------------------------


class _Forward:
    def __init__(self, to: Setting):
        self.shrink, self.expand = Shrink(to), Expand(to)
        self.mix = Mix(to) if _mixes(to) else None
        self.fused = Fused(to) if to.config.design == "fused" else None


class _Backward:
    def __init__(self, to: Setting, needs: Needs):
        through_down = needs.x and to.shape.in_features > 0
        needs_dz, both = needs.down or needs.z or through_down, (through_down, needs.down)
        self.mix = Mix(to) if needs.up and _mixes(to) else None
        self.up = UpBwd(to, needs_dz or needs.core, needs.up) if needs_dz or needs.core or needs.up else None
        self.core = CoreBwd(to) if needs.core else None
        self.hidden, self.down = HiddenBwd(to) if needs_dz else None, DownBwd(to, *both) if any(both) else None
        makes_dz = self.down is not None and not needs.z and to.core == "none"
        if makes_dz and self.up.chunks * self.down.column_tiles <= MOST_CHUNK_READS:
            self.hidden, self.down = None, DownBwd(to, *both, chunks=self.up.chunks)
        self.sums = Sums(to.device)


class _Hidden:
    def __init__(self, to: Setting, needs: tuple[bool, ...] | None):
        self.shrink = Shrink(to) if needs is None else None
        self.down, self.sums = (None, None) if needs is None else (DownBwd(to, *needs), Sums(to.device))


def _mixes(to: Setting) -> bool:
    """Is S anything else than z?"""
    return to.core != "none" or to.place in ("rank", "core")


def _kind(x: Tensor, in_features: int, out_features: int, factors: Factors, dropout: Dropout) -> tuple:
    """What kernels of one call depend on, as `_setting` takes it; the dtypes at the end decide what is compiled."""
    down, up, core, scale, _ = factors
    return (
        x.dtype, x.device, in_features, out_features, up.shape[1], None if core is None else core.shape,
        "none" if dropout.rng is None else dropout.on, _precise(x),
        None if down is None else down.dtype, up.dtype, None if core is None else core.dtype, type(scale),
    )  # fmt: skip


def _setting(
    choose: Callable, dtype: torch.dtype, device: torch.device, in_features: int, out_features: int, rank: int,
    core: torch.Size | None, place: str, *_: Any, design: str | None = None,
) -> Setting:  # fmt: skip
    out_blocks, in_blocks = (1, 1) if core is None else core[:2]
    shape = LowRankShape(in_features, out_features, rank, in_blocks, out_blocks, place == "input")
    kind = "none" if core is None else "diagonal" if len(core) == 3 else "dense"
    return Setting(shape, dtype, device, kind, place, choose(shape, dtype, architecture(device), design))


@functools.lru_cache(maxsize=1024)
def _forward(choose: Callable, *kind: Any) -> _Forward:
    *kind, design, _ = kind
    return _Forward(_setting(choose, *kind, design=design))


@functools.lru_cache(maxsize=1024)
def _backward(choose: Callable, *kind: Any) -> _Backward:
    *kind, needs = kind
    return _Backward(_setting(choose, *kind), needs)


@functools.lru_cache(maxsize=1024)
def _hidden(
    choose: Callable, dtype: torch.dtype, device: torch.device, rank: int, columns: int, blocks: int, *rest: Any
) -> _Hidden:
    shape = LowRankShape(blocks * columns, 0, rank, blocks)
    config = choose(shape, dtype, architecture(device), None)
    return _Hidden(Setting(shape, dtype, device, "none", "none", config), rest[-1])


def _precise(x: Tensor) -> bool:
    """What `dot_constants` asks: does float32 stay float32?"""
    return x.dtype is not torch.float32 or not allows_tf32()


def _drop(dropout: Dropout) -> Drop:
    return KEEP if dropout.rng is None else Drop(*dropout_arguments(dropout.rng, dropout.p))
