"""Aurora's layer: the update comes from a decomposition that many layers share.

A decomposition has one U and V for each pair of block widths, and one row p_k for each slot, a block of a layer's
weight (docs/method.md, section 4):

    "cp"      ΔW_k = V diag(λ ∘ p_k) Uᵀ
    "tucker"  ΔW_k = V K_kᵀ Uᵀ,  K_k[a, b] = Σ_c C[a, b, c] p_k[c]
"""

import math
from collections.abc import Sequence
from types import EllipsisType

import torch
from torch import Tensor, nn

from peft_kernels.autocast import autocast_off
from peft_kernels.checks import check_choice, check_integer
from peft_kernels.cores import LAYOUTS, tucker_core
from peft_kernels.layers.adapted_linear import AdaptedLinear, check_blocks, check_linear_module
from peft_kernels.layers.group import Projection
from peft_kernels.layers.per_pass import PerPass, in_recomputation, sharing_state
from peft_kernels.ops.lowrank_linear import lowrank_hidden

DECOMPOSITIONS = ("cp", "tucker")


class Decomposition(nn.Module):
    """Factors of a stack of weights.

    widths: (KB, NB) of every layer's blocks, repeats allowed;  rank: R;  core: "cp" | "tucker"
    down["KBxNB"]: Uᵀ (R, KB);  up["KBxNB"]: V (NB, R);  slots: P (N, R), the rows of a layer neighbours
    lam: λ (R,) of "cp";  modes: C (R, R, R) of "tucker"
    fans: for each layer (slots, n): its slots, and with "tucker" the n of their start, uniform ±√(6 / (R + n))
    """

    def __init__(
        self,
        widths: Sequence[tuple[int, int]],
        fans: Sequence[tuple[int, int]],
        rank: int,
        core: str = "cp",
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        check_integer("rank", rank)
        check_choice("core", core, DECOMPOSITIONS)
        factory = {"dtype": dtype, "device": device}
        self.rank, self.core, self.fans = rank, core, list(fans)
        pairs = sorted(set(widths))
        self.down = nn.ParameterDict({f"{k}x{n}": nn.Parameter(torch.empty(rank, k, **factory)) for k, n in pairs})
        self.up = nn.ParameterDict({f"{k}x{n}": nn.Parameter(torch.empty(n, rank, **factory)) for k, n in pairs})
        self.slots = nn.Parameter(torch.empty(sum(slots for slots, _ in fans), rank, **factory))
        if core == "cp":
            self.lam = nn.Parameter(torch.empty(rank, **factory))
        else:
            self.modes = nn.Parameter(torch.empty(rank, rank, rank, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for down, up in zip(self.down.values(), self.up.values()):
            down.uniform_(-1 / math.sqrt(down.shape[1]), 1 / math.sqrt(down.shape[1]))
            up.zero_()
        if self.core == "cp":
            self.lam.fill_(1)
            nn.init.xavier_uniform_(self.slots)
            return
        nn.init.xavier_uniform_(self.modes)
        first = 0
        for slots, n in self.fans:
            bound = math.sqrt(6 / (self.rank + n))
            self.slots[first : first + slots].uniform_(-bound, bound)
            first += slots

    def factors(self, pair: str) -> tuple[Tensor, Tensor]:
        """Uᵀ and V, past the slow way of a ParameterDict to them."""
        modules = self._modules
        return modules["down"]._parameters[pair], modules["up"]._parameters[pair]

    def core_parameters(self) -> tuple[Tensor, Tensor]:
        """P, and what goes with it: λ or C"""
        own = self._parameters
        return own["slots"], own["lam" if self.core == "cp" else "modes"]

    def cores(self, slots: Tensor, small: Tensor) -> Tensor:
        """(N, R) or (N, R, R), for any rows of P; in the factors' precision under autocast, too."""
        if self.core == "cp":
            return small * slots  # `cp_core`, which autocast leaves alone
        with autocast_off(slots):
            return tucker_core(small, slots)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, core={self.core}, slots={len(self.slots)}"


class SharedCores:
    """The cores of several layers of one decomposition, by one product in each pass."""

    def __init__(self, decomposition: Decomposition):
        self.decomposition, self.shared, self.several = decomposition, PerPass(), False
        self.rows: list[slice] = []

    def join(self, first: int, count: int) -> int:
        """A layer's number among those that share; its slots are rows first, first + 1, … of P."""
        self.rows.append(slice(first, first + count))
        self.several = len(self.rows) > 1
        self.counts = [rows.stop - rows.start for rows in self.rows]
        self.neighbours = all(a.stop == b.start for a, b in zip(self.rows, self.rows[1:]))
        return self.shared.join()

    def get(self, member: int, state: tuple | EllipsisType | None = ...) -> Tensor:
        """(count, R) or (count, R, R) of that layer;  state: as in PerPass.get"""
        of = self.decomposition
        slots, small = of.core_parameters()
        state = sharing_state(slots) if self.several and state is ... else state
        if not self.several or state is None or slots.is_inference() or state[-1] is not None or in_recomputation():
            return of.cores(slots[self.rows[member]], small)  # checkpointing recomputes what each region took
        return self.shared.get(member, (slots, small), self._all, state)[member]

    def _all(self) -> tuple[Tensor, ...]:
        slots, small = self.decomposition.core_parameters()
        if self.neighbours:
            slots = slots[self.rows[0].start : self.rows[-1].stop]
        else:
            slots = torch.cat([slots[rows] for rows in self.rows])
        return self.decomposition.cores(slots, small).split_with_sizes(self.counts)


class ModeLinear(AdaptedLinear):
    """Takes the place of `linear`; block (o, i) of its weight gets V core[o, i] Uᵀ of the shared decomposition.

    cores, first: where its O · I slots stand: rows first, first + 1, … of P, block rows first
    hidden: shared by layers that read the same tensor through the same U: one x U serves them all
    layout: "blocks" | "released": as the released code arranges the tucker cores of a fc1 or fc2 (and not of a qkv)
    dropout_on: "core" (vision) | "rank" (text)
    """

    def __init__(
        self,
        linear: nn.Linear,
        cores: SharedCores,
        first: int,
        *,
        hidden: PerPass | None = None,
        out_blocks: int = 1,
        in_blocks: int = 1,
        layout: str = "blocks",
        scale: float = 1.0,
        dropout_p: float = 0.0,
        dropout_on: str = "rank",
        backend: str = "auto",
        freeze: bool = True,
    ):
        check_linear_module(linear)
        check_choice("layout", layout, LAYOUTS)
        check_blocks("out_blocks", out_blocks, linear.out_features)
        check_blocks("in_blocks", in_blocks, linear.in_features)
        super().__init__(
            linear, scale=scale, dropout_p=dropout_p, dropout_on=dropout_on, backend=backend, freeze=freeze
        )
        self.out_blocks, self.in_blocks, self.layout = out_blocks, in_blocks, layout
        self._pair = f"{linear.in_features // in_blocks}x{linear.out_features // out_blocks}"
        # Plain attributes: the decomposition is the model's, under one name, and not this layer's too
        self._cores, self._hidden = cores, hidden or PerPass()
        self._core_member = cores.join(first, out_blocks * in_blocks)
        self._hidden_member = self._hidden.join()

    @property
    def rank(self) -> int:
        return self._cores.decomposition.rank

    def factors(self, state: tuple | EllipsisType | None = ...) -> tuple[Tensor, Tensor, Tensor]:
        """As AdaptedLinear's;  state: as in PerPass.get"""
        decomposition = self._cores.decomposition
        core = self._cores.get(self._core_member, state)
        if core.ndim == 3:
            core = self._arranged(core)
        down, up = decomposition.factors(self._pair)
        return down, up, core.reshape(self.out_blocks, self.in_blocks, *core.shape[1:])

    def reads(self) -> dict[str, Tensor | None]:
        of = self._cores.decomposition
        shared = zip(("down", "up", "slots", "small"), (*of.factors(self._pair), *of.core_parameters()))
        return {**self._parameters, **dict(shared)}

    def group_kind(self) -> tuple[tuple | None, str]:
        core = "diagonal" if self._cores.decomposition.core == "cp" else "dense"
        kind, why = self._group_kind(self.rank, (self.out_blocks, self.in_blocks), core)
        return kind if kind is None else (*kind, id(self._cores.decomposition)), why

    def _arranged(self, core: Tensor) -> Tensor:
        """The released code's order of what it cut out of (R, R, N) matrices; its fc2 is transposed."""
        if self.layout == "blocks" or len(core) == 1:
            return core
        count, rank = core.shape[:2]
        core = core.permute(2, 1, 0).reshape(rank, count, rank).permute(1, 2, 0)
        return core.transpose(1, 2) if self.in_blocks > 1 else core

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)"""
        if self._original is not None:
            return super().forward(x)
        if self.group is not None:
            group, member = self.group
            if (y := group.get(member, self, x)) is not None:
                self._hidden.needed_by(y)
                return y
        hidden = self._hidden
        if hidden.members == 1:
            return self._adapted(x, self.factors())
        state = sharing_state(x)
        factors = self.factors(state)
        down = factors[0]
        y = self._adapted(x, factors, self._shared_hidden(x, down, state))
        hidden.needed_by(y)
        return y

    def _shared_hidden(self, x: Tensor, down: Tensor, state: tuple | None) -> Tensor:
        return self._hidden.get(
            self._hidden_member, (x, down), lambda: lowrank_hidden(x, down, self.in_blocks, self.backend), state
        )

    def projection(self, x: Tensor) -> Projection | None:
        """As AdaptedLinear's, with the x U that layers of other groups share."""
        state = sharing_state(x)
        own = super().projection(x, self.factors(state))
        if own is None or self._hidden.members <= len(self.group[0].layers):
            return own
        return own._replace(hidden=self._shared_hidden(x, own.down, state))

    def _describe(self) -> list[str]:
        kind = self._cores.decomposition.core
        return [f"rank={self.rank}", *super()._describe(), f"core={kind}", f"blocks={self.out_blocks}x{self.in_blocks}"]
