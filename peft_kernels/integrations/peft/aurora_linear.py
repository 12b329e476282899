"""Aurora's layer inside PEFT: a base layer, its own slots of each adapter, and factors that all layers share.

    y = base_layer(x) + scale · S Vᵀ      S = core(x U), block by block: docs/method.md, section 4, on `lowrank_linear`

One adapter on a plain nn.Linear is one fused call, the base's product included. Several active adapters, other base
layers, and whatever hooks would see of the base layer are plain torch: `why_plain` and `peft_kernels.explain` tell.
"""

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from peft_kernels import kinds
from peft_kernels.adapters.aurora import blocks_of, reading_of
from peft_kernels.adapters.targets import Match, guess_target
from peft_kernels.autocast import autocast_off
from peft_kernels.backend import Choice, resolve
from peft_kernels.cores import cp_core, tucker_core
from peft_kernels.integrations.peft.fused_linear import why_not_base, why_not_input, why_not_now
from peft_kernels.layers.per_pass import PerPass
from peft_kernels.ops.lowrank_linear import lowrank_hidden, lowrank_linear
from peft_kernels.ops.reconstruct import reconstruct


class SharedFactors(nn.Module):
    """What the layers of one adapter share.

    down_KBxNB: Uᵀ (R, KB);  up_KBxNB: V (NB, R), of each pair of block widths
    lam: λ (R,) of "cp";  modes: C (R, R, R) of "tucker"
    Flat names: PEFT takes the name before the last one for the adapter's.
    """

    def __init__(self, rank: int, core: str):
        super().__init__()
        self.rank, self.core = rank, core
        if core == "cp":
            self.lam = nn.Parameter(torch.ones(rank))
        else:
            self.modes = nn.Parameter(torch.empty(rank, rank, rank))

    def add(self, pair: str) -> None:
        """Factors of another pair of widths, in torch's default dtype; `reset` fills them."""
        if not hasattr(self, f"down_{pair}"):
            columns, rows = map(int, pair.split("x"))
            self.register_parameter(f"down_{pair}", nn.Parameter(torch.empty(self.rank, columns)))
            self.register_parameter(f"up_{pair}", nn.Parameter(torch.empty(rows, self.rank)))

    @torch.no_grad()
    def reset(self, zero: bool) -> None:
        """Start afresh, as `Decomposition` does. zero: with V = 0, an update of nothing; otherwise V is as U."""
        for name, factor in self.named_parameters():
            if name.startswith("down_"):
                factor.uniform_(-1 / math.sqrt(factor.shape[1]), 1 / math.sqrt(factor.shape[1]))
            elif name.startswith("up_"):
                bound = 0 if zero else 1 / math.sqrt(factor.shape[0])
                factor.uniform_(-bound, bound)
            elif name == "lam":
                factor.fill_(1)
            else:
                nn.init.xavier_uniform_(factor)

    def small(self) -> Tensor:
        """What goes with the slots: λ or C."""
        return self.lam if self.core == "cp" else self.modes


class AuroraLinear(nn.Module, BaseTunerLayer):
    """Stands in the place of `base_layer`, an nn.Linear or a transformers Conv1D, and keeps it whole.

    name: of the base layer in the model, which tells blocks and where dropout is, as for `peft_kernels.Aurora`
    shared: the tuner's factors by adapter; the layer does not own them, so that a file has them once
    aurora_p: by adapter P (O · I, R), the slots of this layer, block rows first
    """

    adapter_layer_names = ("aurora_p", "aurora_shared")
    other_param_names = ("aurora_scale", "aurora_dropout", "aurora_hidden")

    def __init__(self, base_layer: nn.Module, name: str, shared: nn.ModuleDict):
        super().__init__()
        self.base_layer = base_layer
        inner = self.get_base_layer()
        self.turned = isinstance(inner, Conv1D)  # its weight is (in_features, out_features)
        if not (self.turned or isinstance(inner, nn.Linear)):
            kind = type(inner).__name__
            raise TypeError(f"target_modules: {name} is of class {kind}, expected nn.Linear or transformers' Conv1D")
        rows, columns = inner.weight.shape[::-1] if self.turned else (inner.out_features, inner.in_features)
        self.in_features, self.out_features = columns, rows
        match = Match(name, like := nn.Linear(columns, rows, device="meta"), guess_target(name, name, like))
        self.out_blocks, self.in_blocks = blocks_of(match)
        self.pair = f"{columns // self.in_blocks}x{rows // self.out_blocks}"
        self.reads = (*reading_of(match), self.pair, self.in_blocks)
        self.dropout_on = "core" if match.target.modality == "vision" else "rank"
        self.aurora_p = nn.ParameterDict()
        self.__dict__["aurora_shared"] = shared  # past nn.Module, which would make it a submodule
        self.aurora_scale: dict[str, float] = {}
        self.aurora_dropout: dict[str, float] = {}
        self.aurora_hidden: dict[str, tuple[PerPass, int]] = {}
        self._disable_adapters, self.merged_adapters = False, []
        self._original: Tensor | None = None

    # ---- adapters ---------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, scale: float, dropout: float, inference_mode: bool) -> None:
        """Take part in an adapter that `aurora_shared` has; `reset_slots` fills what is new."""
        shared = self.aurora_shared[adapter_name]
        shared.add(self.pair)
        self.aurora_p[adapter_name] = nn.Parameter(torch.empty(self.out_blocks * self.in_blocks, shared.rank))
        self.aurora_scale[adapter_name], self.aurora_dropout[adapter_name] = scale, dropout
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @torch.no_grad()
    def reset_slots(self, adapter_name: str, slots: int) -> None:
        """P of this layer afresh. slots: of all layers of the adapter, N in Xavier's ±√(6 / (R + N)) of "cp" """
        p = self.aurora_p[adapter_name]
        fan = slots if self.aurora_shared[adapter_name].core == "cp" else len(p)
        p.uniform_(-math.sqrt(6 / (p.shape[1] + fan)), math.sqrt(6 / (p.shape[1] + fan)))

    def forget(self, adapter_name: str) -> None:
        """Drop what is of this layer alone, whether it is there or not."""
        for held in (self.aurora_p, self.aurora_scale, self.aurora_dropout, self.aurora_hidden):
            if adapter_name in held:
                del held[adapter_name]

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """(Uᵀ, V, core) of an adapter, as `lowrank_linear` takes them, on the device of the layer's slots."""
        p, *others = self._parameters_of(adapter_name)
        down, up, small = (t.to(p.device) for t in others)
        make = cp_core if small.dim() == 1 else tucker_core
        with autocast_off(p):
            core = make(small, p.to(small.dtype))
        return down, up, core.unflatten(0, (self.out_blocks, self.in_blocks))

    def _parameters_of(self, adapter: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(P, Uᵀ, V, λ or C)"""
        shared = self.aurora_shared[adapter]
        down, up = getattr(shared, f"down_{self.pair}"), getattr(shared, f"up_{self.pair}")
        return self.aurora_p[adapter], down, up, shared.small()

    def _get_available_adapters(self) -> set[str]:
        return set(self.aurora_p)  # and not whatever other layers have

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self.aurora_p:
            required = self.aurora_p[adapter_name].requires_grad  # PEFT makes new parameters, which train
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)
            self.aurora_p[adapter_name].requires_grad_(required)

    def _present(self) -> list[str]:
        return [adapter for adapter in self.active_adapters if adapter in self.aurora_p]

    # ---- forward ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (..., in_features) -> (..., out_features)"""
        if self.disable_adapters and self.merged:
            self.unmerge()
        present = [] if self.disable_adapters or self.merged else self._present()
        if len(present) != 1 or args or kwargs or self._why_plain(present[0], x) is not None:
            y = self.base_layer(x, *args, **kwargs)
            for adapter in present:
                y = y + self._update(x, adapter).to(y.dtype)
            return y
        adapter, base = present[0], self.base_layer
        down, up, core = self.factors(adapter)
        hidden, member = self.aurora_hidden.get(adapter, (None, 0))
        z = None
        if hidden is not None:
            z = hidden.get(member, (x, down), lambda: lowrank_hidden(x, down, self.in_blocks))
        y = lowrank_linear(
            x,
            base.weight,
            base.bias,
            down,
            up,
            core,
            scale=self.aurora_scale[adapter],
            dropout_p=self.aurora_dropout[adapter],
            dropout_on=self.dropout_on,
            training=self.training,
            hidden=z,
        )
        if hidden is not None:
            hidden.needed_by(y)
        return y

    def _update(self, x: Tensor, adapter: str) -> Tensor:
        """The adapter's part of the output, by torch's own operations."""
        down, up, core = self.factors(adapter)
        p = self.aurora_dropout[adapter]
        z = F.linear(self._cast_input_dtype(x, down.dtype).unflatten(-1, (self.in_blocks, -1)), down)
        z = F.dropout(z, p, self.training and self.dropout_on == "rank")
        s = torch.einsum("...ir,oir->...or" if core.dim() == 3 else "...ib,oiab->...oa", z, core.to(z.dtype))
        s = F.dropout(s, p, self.training and self.dropout_on == "core")
        return self.aurora_scale[adapter] * F.linear(s, up).flatten(-2)

    def why_plain(self) -> str | None:
        """Why the next forward is not one fused call, on an input that fits; None if it is."""
        if self.disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return "adapters are merged into the weight"
        present = self._present()
        return f"{len(present)} active adapters are on this layer" if len(present) != 1 else self._why_plain(present[0])

    def _why_plain(self, adapter: str, x: Tensor | None = None) -> str | None:
        if reason := why_not_base(self.base_layer) or why_not_now():
            return reason
        factors = self._parameters_of(adapter)
        if any(type(t) not in (nn.Parameter, Tensor) for t in factors) or len({t.dtype for t in factors}) > 1:
            return f"adapter {adapter!r} is not of plain tensors of one dtype"
        return None if x is None else why_not_input(self.base_layer.weight, factors[0], adapter, x)

    def backend_choice(self) -> Choice:
        """The backend that the next forward on the weight's device takes, and the reason."""
        if reason := self.why_plain():
            return Choice("torch", f"plain torch: {reason}")
        adapter = self._present()[0]
        factors, weight = self.factors(adapter), self.base_layer.weight
        kind = kinds.linear(*weight.shape[::-1], self.training and self.aurora_dropout[adapter] > 0)
        return resolve("lowrank_linear", (weight, self.base_layer.bias, *factors), rank=factors[0].shape[0], kind=kind)

    # ---- merging ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _sum(self, adapter: str, base: Tensor | None) -> Tensor:
        """The update in the layout of the weight, or base and update, summed in float32 at least and rounded once."""
        weight = self.get_base_weight()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        factors = [t.to(weight.device, dtype) for t in self.factors(adapter)]
        base = base.t().contiguous() if self.turned and base is not None else base
        total = reconstruct(*factors, scale=self.aurora_scale[adapter], base=base)
        return total.t().contiguous() if self.turned else total

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of the base layer's weight, in its layout and in the adapter's dtype."""
        return self._sum(adapter, None).to(self.aurora_p[adapter].dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight, each rounded once; a copy of the original bits is kept for `unmerge`.

        Raises ValueError with safe_merge if a sum is not finite, before that adapter is merged.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.aurora_p:
                continue
            weight = self.get_base_weight()
            merged = self._sum(adapter, weight)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"merge: adapter {adapter!r} makes weights that are not finite; it seems to be broken")
            if self._original is None:
                self._original = weight.clone()
            weight.copy_(merged)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Give the weight its original bits back. Nothing to do unless merged."""
        if self._original is not None:
            self.get_base_weight().copy_(self._original)
        self._original, self.merged_adapters = None, []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def extra_repr(self) -> str:
        return f"blocks={self.out_blocks}x{self.in_blocks}, dropout on {self.dropout_on}"

    def __repr__(self) -> str:
        return "aurora." + super().__repr__()
