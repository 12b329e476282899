"""Many low-rank adapters on one frozen linear layer, in one batch: every row goes through its own adapter, or none.

    y[m] = x[m] Wᵀ + b + s_l · (x[m] A_lᵀ) B_lᵀ    with l = adapter_index[m];   the last term is missing where l = −1

    z[m] = x[m] A_lᵀ    (M, R)

Backward, with G = ∂L/∂y; the sums run over the rows of adapter l, and an adapter without rows gets zeros:

    dz[m] = s_l · G[m] B_l;    dx[m] = G[m] W + dz[m] A_l
    dB_l = s_l Σ_m G[m]ᵀ z[m];    dA_l = Σ_m dz[m]ᵀ x[m]

One frozen product serves the whole batch. Around it, thin passes over rows in the order of their adapters, which
`adapter_segments` finds on the device, once for all layers that a batch runs through. Nothing here waits for the
device, so that a CUDA graph can capture it. Kept for the backward: x itself, z, and the order.

Uses: training several adapters at once on one frozen base; unmerged inference for many tasks. Sources: LoRA (arXiv
2106.09685); adapters side by side in one batch (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels import kinds
from peft_kernels.autocast import autocast_off
from peft_kernels.backend import resolve
from peft_kernels.checks import (
    check_factor,
    check_flag,
    check_integer,
    check_linear,
    check_scale,
    check_shape,
    check_tensor,
    kind_of,
    refuse_second_derivative,
)
from peft_kernels.operator import Operator, composed
from peft_kernels.quantized import QuantizedWeight, dense
from peft_kernels.records import AdapterSegments, Factors
from peft_kernels.rows import contiguous, rows, shaped
from peft_kernels.torch_kernels import batched_lowrank_linear as launchers
from peft_kernels.transforms import transformed
from peft_kernels.triton_kernels.config import SEGMENT_ROWS


def _fwd_shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, segments: AdapterSegments
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], factors.down.shape[1])


def _bwd_shapes(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, factors: Factors, segments: AdapterSegments, needs: list[bool]
) -> list[Tensor | None]:
    down, up = factors[:2]
    grads = dy.new_empty(dy.shape[0], down.shape[2]), torch.empty_like(down), torch.empty_like(up)
    return [grad if needed else None for grad, needed in zip(grads, needs)]


# On a CPU the torch backend reads how many rows each adapter has
batched_lowrank_linear_fwd = Operator(launchers.batched_lowrank_linear_fwd, reads=True, fake=_fwd_shapes)
batched_lowrank_linear_bwd = Operator(launchers.batched_lowrank_linear_bwd, reads=True, fake=_bwd_shapes)


def batched_lowrank_linear_reference(x, weight, bias, down, up, adapter_index, *, scale=1.0):
    """The definition, in the precision of its arguments; adapter_index has one entry per row."""
    y = F.linear(x, weight, bias)
    scale = torch.as_tensor(scale, dtype=x.dtype, device=x.device).expand(down.shape[0])
    index = adapter_index.clamp_min(0)
    z = torch.einsum("...k,...rk->...r", x, down[index])
    update = scale[index][..., None] * torch.einsum("...r,...nr->...n", z, up[index])
    return y + torch.where(adapter_index[..., None] >= 0, update, 0)


def adapter_segments(adapter_index: Tensor, adapters: int, *, validate: bool = False) -> AdapterSegments:
    """Sort rows by adapter, on the device: once per batch, for every `batched_lowrank_linear` that it runs through.

    adapter_index: (M,) int32 or int64, one adapter 0 … adapters − 1 for each row, or −1 for none
    adapters: L, how many there are
    validate: on a GPU, check the index too, which waits for the device; on a CPU it is always checked. Unchecked, and
        in compiled graphs and torch.func, an index out of range counts as none.
    returns segments: (order, offsets, tile_adapter, tile_first), by about thirty small launches: share them

    Raises TypeError or ValueError, naming the argument.
    """
    check_integer("adapters", adapters)
    if adapters >= 2**31:
        raise ValueError(f"adapters: expected fewer than 2³¹, got {adapters:.3g}")
    check_flag("validate", validate)
    check_tensor("adapter_index", adapter_index, dtypes=(torch.int64, torch.int32))
    if adapter_index.dim() != 1:
        raise ValueError(f"adapter_index: expected shape (M,), got {tuple(adapter_index.shape)}")
    index, M, device = adapter_index.long(), adapter_index.numel(), adapter_index.device
    wrong = (index < -1) | (index >= adapters)
    if (validate or device.type == "cpu") and not (torch.compiler.is_compiling() or transformed()) and wrong.any():
        bad = int(index[wrong][0])
        raise ValueError(f"adapter_index: expected -1 … {adapters - 1}, for {adapters} adapters, got {bad}")
    key = torch.int16 if adapters < torch.iinfo(torch.int16).max else torch.int64  # a GPU sorts byte by byte
    sorted_index, order = index.masked_fill(wrong, -1).to(key).sort(stable=True)
    offsets = torch.searchsorted(sorted_index, torch.arange(adapters + 1, dtype=key, device=device))
    first = F.pad(offsets, (1, 0))  # of each group: no adapter, then every adapter; and the end
    tiles = (first.diff() + SEGMENT_ROWS - 1) // SEGMENT_ROWS
    last = tiles.cumsum(0)
    tile = torch.arange(M // SEGMENT_ROWS + adapters + 1, device=device)
    group = torch.searchsorted(last, tile, right=True)
    beyond = group > adapters
    group = group.clamp_max(adapters)
    place = first[group] + (tile - last[group] + tiles[group]) * SEGMENT_ROWS
    return AdapterSegments(order, offsets, (group - 1).masked_fill(beyond, -1), place.masked_fill(beyond, M))


def stack_adapters(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Factors of several adapters, of any ranks, as the (L, R, in) and (L, out, R) that the batched operation takes.

    factors: (down, up) of each adapter, (R_l, in_features) and (out_features, R_l); differentiable
    returns both stacks: (L, R, in_features) and (L, out_features, R), R the largest rank; the rest is zeros, which
        change no result and get no gradient
    Raises ValueError or TypeError on shapes and dtypes that do not go together.
    """
    if not isinstance(factors, Sequence):
        raise TypeError(f"factors: expected a list of (down, up), got {kind_of(factors)}")
    if not factors:
        raise ValueError("factors: expected at least one (down, up), got none")
    for index, pair in enumerate(factors):
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"factors[{index}]: expected (down, up), got {pair!r:.80}")
        check_tensor(f"factors[{index}] down", pair[0])
        check_tensor(f"factors[{index}] up", pair[1])
    first_down, first_up = factors[0]
    for index, (down, up) in enumerate(factors):
        check_tensor(f"factors[{index}] down", down, first_down, dtypes=(first_down.dtype,))
        check_tensor(f"factors[{index}] up", up, first_up, dtypes=(first_up.dtype,))
        if down.dim() != 2 or up.dim() != 2:
            raise ValueError(f"factors[{index}]: expected 2 dimensions, got {tuple(down.shape)} and {tuple(up.shape)}")
        check_shape(f"factors[{index}] down", down, (down.shape[0], first_down.shape[1]), "(R, in_features)")
        check_shape(f"factors[{index}] up", up, (first_up.shape[0], down.shape[0]), "(out_features, R)")
    rank = max(down.shape[0] for down, _ in factors)
    if rank == 0:
        raise ValueError("factors: expected rank ≥ 1 of one adapter at least, got 0 of all")
    downs = [F.pad(down, (0, 0, 0, rank - down.shape[0])) for down, _ in factors]
    return torch.stack(downs), torch.stack([F.pad(up, (0, rank - up.shape[1])) for _, up in factors])


class _BatchedLowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scale, order, offsets, tile_adapter, tile_first, backend):
        segments, factors = AdapterSegments(order, offsets, tile_adapter, tile_first), Factors(down, up, scale=scale)
        needs_x, needs_weight, _, needs_down, needs_up = ctx.needs_input_grad[:5]
        y, z = batched_lowrank_linear_fwd(backend, rows(x), dense(weight, x.dtype), bias, factors, segments)
        ctx.save_for_backward(
            x if needs_weight or needs_down else None,
            weight if needs_x and isinstance(weight, Tensor) else None,
            down,
            up,
            scale if isinstance(scale, Tensor) else None,
            z if needs_up else None,
            *segments,
        )
        ctx.scale = None if isinstance(scale, Tensor) else scale
        ctx.quantized = None if isinstance(weight, Tensor) else weight
        ctx.x_shape, ctx.backend = x.shape, backend
        return shaped(y, *x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivative("batched_lowrank_linear")
        x, weight, down, up, scale, z, *segments = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_down, needs_up = ctx.needs_input_grad[:5]
        if needs_x and ctx.quantized is not None:
            weight = dense(ctx.quantized, dy.dtype)
        dy = rows(dy)
        x = None if x is None else rows(x)
        dx = d_down = d_up = None
        if any(needs := (needs_x, needs_down, needs_up)):
            factors = Factors(down, up, None, ctx.scale if scale is None else scale, z)
            args = (dy, x if needs_down else None, weight, factors, AdapterSegments(*segments), needs)
            dx, d_down, d_up = batched_lowrank_linear_bwd(ctx.backend, *args)
        with autocast_off(dy):
            d_weight = dy.t() @ x if needs_weight else None
            d_bias = dy.sum(0) if needs_bias else None
        return None if dx is None else dx.view(ctx.x_shape), d_weight, d_bias, d_down, d_up, *[None] * 6


def _check_adapters(x: Tensor, weight, down: Tensor, up: Tensor, scale: float | Tensor) -> None:
    for name, factor in (("down", down), ("up", up)):
        check_factor(name, factor, x)
        if factor.dim() != 3 or 0 in factor.shape:
            raise ValueError(f"{name}: expected 3 dimensions, none of them 0, got shape {tuple(factor.shape)}")
    (adapters, rank, _), (out_features, in_features) = down.shape, weight.shape
    if x.shape[-1] != in_features:
        raise ValueError(f"x: expected {in_features} = in_features columns, got shape {tuple(x.shape)}")
    check_shape("down", down, (adapters, rank, in_features), "(L, R, in_features)")
    check_shape("up", up, (adapters, out_features, rank), "(L, out_features, R)")
    if not isinstance(scale, Tensor) or scale.dim() == 0:
        check_scale(scale, x, or_else=f" or a Tensor ({adapters},)")
        return
    check_tensor("scale", scale, x)
    check_shape("scale", scale, (adapters,), "(L,)")
    if scale.requires_grad:
        raise ValueError("scale: takes no gradient; a trainable scale belongs in up")


_SEGMENTS, _INT64 = [f"adapter_index.{field}" for field in AdapterSegments._fields], (torch.int64,)


def _segments(adapter_index, x: Tensor, adapters: int, validate: bool) -> AdapterSegments:
    """The rows of x in order, from one index per row, one per leading entry, or what a caller has sorted before."""
    M = x.numel() // x.shape[-1]
    if isinstance(adapter_index, AdapterSegments):
        tiles = M // SEGMENT_ROWS + adapters + 1, "(M // 64 + L + 1,)"
        sizes = (M, "the rows of x"), (adapters + 1, "(L + 1,)"), tiles, tiles
        for name, tensor, (size, meaning) in zip(_SEGMENTS, adapter_index, sizes):
            check_tensor(name, tensor, x, dtypes=_INT64)
            check_shape(name, tensor, (size,), meaning)
        return adapter_index
    check_tensor("adapter_index", adapter_index, x, dtypes=(torch.int64, torch.int32))
    leading = x.shape[:-1]
    if tuple(adapter_index.shape) not in (tuple(leading), tuple(leading[:1])):
        expected = f"{tuple(leading)} or {tuple(leading[:1])}"
        raise ValueError(f"adapter_index: expected shape {expected}, got {tuple(adapter_index.shape)}")
    missing = len(leading) - adapter_index.dim()
    per_row = adapter_index.reshape((*adapter_index.shape, *[1] * missing)).expand(leading).reshape(-1)
    return adapter_segments(per_row, adapters, validate=validate)


def batched_lowrank_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    adapter_index: Tensor | AdapterSegments,
    *,
    scale: float | Tensor = 1.0,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor:
    """y = x Wᵀ + b + scale · (the update of x by each row's own adapter), differentiable in all but scale and index.

    x: (..., in_features), any strides, float32, bfloat16, float16 or (torch backend) float64
    weight: (out_features, in_features) in x's dtype, or an object with `.dequantize(dtype) -> Tensor` and `.shape`
    bias: (out_features,) or None
    down: (L, R, in_features);  up: (L, out_features, R);  each in x's dtype, or float32. Adapters of smaller rank are
        padded with zeros: `stack_adapters`.
    adapter_index: one int32 or int64 per row, x.shape[:-1], or per leading entry, (x.shape[0],): an adapter 0 … L − 1,
        or −1 for none; or the result of `adapter_segments`, shared by all layers of a batch
    scale: a number, a 0-d tensor, or (L,), one for each adapter
    backend: "auto" | "cuda" | "triton" | "torch"
    validate: check the index on a GPU too, which waits for the device; on a CPU it is always checked. Unchecked, and in
        compiled graphs and torch.func, an index out of range counts as none.
    returns y: (..., out_features) in x's dtype

    Under autocast, x, weight and bias are cast as `torch.nn.functional.linear` would; the factors are not. On a GPU the
    torch backend multiplies every row by all L adapters.
    Raises ValueError or TypeError, naming the argument, before anything runs; BackendUnavailableError (a ValueError)
    if a backend asked for by name cannot run.
    """
    x, weight, bias, _ = check_linear(x, weight, bias, None)
    _check_adapters(x, weight, down, up, scale)
    adapters, rank = down.shape[:2]
    kind = kinds.linear(weight.shape[1], weight.shape[0], dropout=False)
    shape = (x.numel() // x.shape[-1], x.shape[-1])
    choice = resolve("batched_lowrank_linear", (x, bias, down, up), backend, kind=kind, rank=rank, shape=shape)
    segments = _segments(adapter_index, x, adapters, validate)
    run = choice.name if x.numel() else "torch"  # no rows: nothing to launch
    wide = torch.promote_types(x.dtype, torch.float32)
    if torch.compiler.is_compiling() and not isinstance(scale, Tensor):  # an operator would make it 0-d
        scale = torch.full((), scale, dtype=wide, device=x.device)
    if isinstance(scale, Tensor):
        scale = scale.to(wide).expand(adapters).contiguous()
    if transformed():
        weight, factors = dense(weight, x.dtype), Factors(down, up, scale=scale)
        y = composed(launchers.batched_lowrank_linear_composed, rows(x), weight, bias, factors, segments)
        return y.unflatten(0, x.shape[:-1])
    args = (x, weight, contiguous(bias), down.contiguous(), up.contiguous(), scale)
    return _BatchedLowRankLinear.apply(*args, *segments, run)
