"""How arguments are passed to kernels, on every backend: small records of what belongs together.

torch.library knows no records: `peft_kernels/operator.py` flattens them, and nothing else does.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Scale = float | Tensor  # a number, or a 0-d tensor whose changes recompile nothing


class Case(NamedTuple):
    """A call, as its backends are asked about it."""

    op: str
    device: torch.device
    dtype: torch.dtype
    rank: int = 1
    blocks: tuple[int, int] = (1, 1)  # O, I
    shape: tuple[int, int] = (1, 1)  # rows and columns of what is computed, or of one block
    live: torch.dtype | None = None  # the dtype of weights that a teacher follows
    projections: int = 1  # J


# ---- low-rank updates (docs/method.md, section 1) -------------------------------------------------------------------


class Factors(NamedTuple):
    """The update s · B core(A ·) of a weight that consists of O × I blocks; A, B and core in x's dtype or float32."""

    down: Tensor | None  # A (R, KB); None where z comes from elsewhere
    up: Tensor  # B (NB, R)
    core: Tensor | None = None  # (O, I, R) diagonals or (O, I, R, R) matrices; None with O = I = 1
    scale: Scale = 1.0  # s
    z: Tensor | None = None  # x Aᵀ of each input block, (M, I·R): where it is at hand, kernels do not compute it

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def blocks(self) -> tuple[int, int]:
        """O, I"""
        return (1, 1) if self.core is None else (self.core.shape[0], self.core.shape[1])


class Dropout(NamedTuple):
    """What one call drops, if there is an rng. A mask is a function of it: the backward gets the same record."""

    rng: Tensor | None = None  # torch: the keep-mask (M, columns); kernels: (seed, offset), int64
    p: float = 0.0
    on: str = "none"  # "none" | "input": x | "rank": z | "core": S


KEEP_ALL = Dropout()


class Needs(NamedTuple):
    """Which gradients a backward computes."""

    x: bool = False
    down: bool = False
    up: bool = False
    core: bool = False
    z: bool = False


MOST_PROJECTIONS = 4  # of one tensor in one call of kernels, which take a pointer to each; csrc is compiled with it


class Projections(NamedTuple):
    """The updates s_j · B_j A_j of J weights that read one tensor, of one rank; A and B in x's dtype or float32."""

    downs: list[Tensor]  # A_j (R, K): J of them, or one that all share, or none where z comes from elsewhere
    ups: list[Tensor]  # B_j (N_j, R)
    scales: list[Tensor]  # s_j, 0-d, in float32 on kernel backends
    z: Tensor | None = None  # x A_jᵀ side by side (M, J·R), or one (M, R) for all

    @property
    def rank(self) -> int:
        return self.ups[0].shape[1]

    @property
    def widths(self) -> list[int]:
        """N_j"""
        return [up.shape[0] for up in self.ups]


class ProjectionNeeds(NamedTuple):
    """Which gradients the backward of projections computes; down and up: of all A_j, of all B_j."""

    x: bool = False
    down: bool = False
    up: bool = False
    z: bool = False


class AdapterSegments(NamedTuple):
    """The rows of one batch in the order of their adapters; what `adapter_segments` returns, on the batch's device."""

    order: Tensor  # (M,) row numbers, those without an adapter first
    offsets: Tensor  # (L + 1,) adapter l has order[offsets[l] : offsets[l + 1]]
    tile_adapter: Tensor  # (M // 64 + L + 1,) the adapter of each run of at most 64 places in `order`, −1 for none
    tile_first: Tensor  # likewise, the first place; M for tiles that are not needed


# ---- gated queries (docs/method.md, section 4) ----------------------------------------------------------------------


class Modulated(NamedTuple):
    """values ∘ γ + β: what a gated query takes up of an attention block's output."""

    values: Tensor | None  # (M, d), unit column stride; None in a backward that does not read them
    gamma: Tensor | None  # (d,), likewise;  both vectors in values' dtype or float32
    beta: Tensor  # (d,)


class Gate(NamedTuple):
    """What the backward of a gate keeps of the forward, of B sequences of S rows; float32 at least."""

    weights: Tensor  # g (B, S)
    total: Tensor  # τ (B, d)


# ---- distances of weights, and products of many matrices (docs/method.md, section 3) --------------------------------
#
# A stage is a list of distances, or of products, that run side by side; stages run one after the other. A backend turns
# them into tables once (`…_tables`) and runs these as often as wanted; on a GPU a stage is one or two launches for all
# its records together, whatever their shapes, and nothing is read back. Every matrix has unit column stride and any row
# stride, and is float32 unless said otherwise (the torch backend takes float64, too).


class Distance(NamedTuple):
    """One matrix: target ← decay · target + (1 − decay) · live, then error = Σ left · right + (base − target).

    With a bias: the same for target_bias, then e = base_bias + shift · shift_vector + shift_last − target_bias.
    """

    target: Tensor  # (out, in), changed in place if there is a live one
    base: Tensor  # (out, in)
    pairs: tuple[tuple[Tensor, Tensor], ...]  # none to two (left (out, R), right (R, in))
    error: Tensor  # (out, in), written
    live: Tensor | None = None  # (out, in) float32, bfloat16 or float16
    target_bias: Tensor | None = None  # (out,), changed in place if there is a live one
    base_bias: Tensor | None = None  # (out,)
    live_bias: Tensor | None = None  # (out,) likewise
    shift: Tensor | None = None  # (out, k), with shift_vector (k,)
    shift_vector: Tensor | None = None
    shift_last: Tensor | None = None  # (out,), any stride
    bias_gradient: Tensor | None = None  # (out,), any stride: the loss's gradient by e is written here


class Results(NamedTuple):
    """What `weight_distance_fwd` writes for each of n matrices."""

    sums: Tensor  # (n, 6): Σ error², Σ (target − base)², Σ base²; Σ e², Σ (target_bias − base_bias)², Σ base_bias²
    losses: Tensor  # (n,): weight and bias, reduced
    factors: Tensor  # (n,): the loss's gradient by the error is this factor times the error; times loss_scale


class Term(NamedTuple):
    """factor · op(left) · op(right), transposed as the product's form says."""

    left: Tensor
    right: Tensor
    factor: Tensor | None = None  # 0-d
    right_last: Tensor | None = None  # (K,), form "nn" only: one more column of `right`, kept elsewhere


class Product(NamedTuple):
    """result = Σ terms, or += where it accumulates. Products that run together do not depend on each other."""

    form: str  # "nn": left (M, K), right (K, N) | "nt": right (N, K) | "tn": left (K, M), right (K, N)
    result: Tensor  # (M, N)
    terms: tuple[Term, ...]
    accumulate: bool = False
    result_last: Tensor | None = None  # (M,): where the product has one column more than `result`, its last one


Stage = Sequence[Distance] | Sequence[Product]
