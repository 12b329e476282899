"""PEFT's LoRA linears with one fused call in their forward: the same modules, parameters, names and files.

A layer keeps everything that PEFT gave it; only its class becomes `FusedLinear`. Its forward is one `lowrank_linear`,
or for a mixed batch one `batched_lowrank_linear`, wherever that means what PEFT's own forward does, and PEFT's own
forward everywhere else: adapters disabled or merged, several active, none on this layer, variants such as DoRA, biases
of adapters, and whatever hooks would see of the modules inside. `why_stock` and `peft_kernels.explain` tell which.
"""

import functools
import math
from collections.abc import Callable

import torch
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from peft.tuners.lora.layer import Linear as StockLinear
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _all
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from peft_kernels import kinds
from peft_kernels.autocast import autocasts, linear_dtype
from peft_kernels.backend import Choice, resolve
from peft_kernels.checks import DTYPES
from peft_kernels.integrations.peft.mixed_batches import shared_rows, sorted_rows
from peft_kernels.layers.group import LinearGroup, Projection
from peft_kernels.layers.mlp import watched
from peft_kernels.ops.batched_lowrank_linear import batched_lowrank_linear, stack_adapters
from peft_kernels.ops.lowrank_linear import lowrank_linear
from peft_kernels.remembered import MOST
from peft_kernels.transforms import transformed

_PLAIN = (nn.Parameter, Tensor)  # subclasses (DTensor, quantised weights, …) have products of their own

# ---- when PEFT's own forward runs: each function gives the reason, or None for none ----------------------------------


def why_not_base(base: nn.Module) -> str | None:
    if isinstance(base, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight and never calls it"
    if hasattr(base, "base_layer"):
        return "its base layer is another adapter's layer"
    if not isinstance(base, nn.Linear) or type(base).forward is not nn.Linear.forward:
        return f"its base layer is a {type(base).__name__}, not an nn.Linear"
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if weight is None:
        return "its base layer's weight is parametrised"
    if type(weight) not in _PLAIN or weight.dtype not in DTYPES or 0 in weight.shape:
        return f"its base layer's weight is a {type(weight).__name__} of {weight.dtype}, {tuple(weight.shape)}"
    if bias is not None and (type(bias) not in _PLAIN or bias.dtype != weight.dtype):
        return f"its base layer's bias is a {type(bias).__name__} of {bias.dtype}"
    return "its base layer has hooks" if watched(base) else None


def why_not_adapter(layer: StockLinear, adapter: str) -> str | None:
    if adapter in layer.lora_variant:
        return f"adapter {adapter!r} is a variant of LoRA ({type(layer.lora_variant[adapter]).__name__})"
    down, up, dropout = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
    if type(down) is not nn.Linear or type(up) is not nn.Linear:
        return f"adapter {adapter!r} is made of {type(down).__name__} and {type(up).__name__}, not of nn.Linear"
    if down.bias is not None or up.bias is not None:
        return f"adapter {adapter!r} has a bias (lora_bias)"
    if type(dropout) is nn.Dropout:
        if dropout.inplace or not 0 <= dropout.p < 1:
            return f"adapter {adapter!r} has {dropout!r}"
    elif type(dropout) is not nn.Identity:
        return f"adapter {adapter!r} has a dropout of its own, {type(dropout).__name__}"
    if type(down.weight) not in _PLAIN or type(up.weight) not in _PLAIN or down.weight.dtype != up.weight.dtype:
        factors = " and ".join(f"{type(each.weight).__name__} of {each.weight.dtype}" for each in (down, up))
        return f"adapter {adapter!r} is made of {factors}"
    return f"adapter {adapter!r} has hooks" if watched(down) or watched(up) or watched(dropout) else None


def why_not_input(weight: Tensor, factor: Tensor, adapter: str, x: Tensor) -> str | None:
    """factor: one of the adapter's, whose dtype and device are all its factors'"""
    if type(x) not in _PLAIN or x.layout is not torch.strided or x.dtype not in DTYPES:
        return "the input is not a plain Tensor of floating-point numbers"
    if x.dim() == 0 or x.shape[-1] != weight.shape[1] or not x.device == weight.device == factor.device:
        return "the input does not go with the weights"  # as PEFT will say by its own error
    dtype = linear_dtype(x)
    if weight.dtype != dtype and (not autocasts(x) or weight.dtype == torch.float64):
        return f"the weight is {weight.dtype}, the input is computed on in {dtype}"
    if factor.dtype != dtype and (factor.dtype != torch.float32 or dtype == torch.float64):
        return f"adapter {adapter!r} is {factor.dtype}, the input is computed on in {dtype}"
    return None


def why_not_now() -> str | None:
    if transformed() or torch.jit.is_tracing():
        return "torch.func, forward-mode differentiation or torch.jit see through it"
    return "there are hooks on all modules" if _has_any_global_hook() else None


# ---- the layer ------------------------------------------------------------------------------------------------------


def _writing(name: str) -> Callable:
    """dict's method `name`, after which the tensors are those of what the dictionary holds."""
    method = getattr(dict, name)

    @functools.wraps(method)
    def write(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        tensors = {adapter: self._tensor(factor) for adapter, factor in self.items()}
        self.tensors = {adapter: tensor for adapter, tensor in tensors.items() if tensor is not None}
        return result

    return write


class Scaling(dict):
    """PEFT's factor by adapter; `tensors` holds each as a 0-d tensor, too, beside `weight`, for compiled graphs.

    A number that changes would make another graph. Who writes a number here writes the tensor; a factor that is no
    finite number, nor a 0-d tensor (as PEFT's hot-swapping has), has none.
    """

    def __init__(self, values: dict, weight: Tensor):
        self.dtype, self.device = torch.promote_types(weight.dtype, torch.float32), weight.device
        self.update(values)

    __setitem__, __delitem__, __ior__ = _writing("__setitem__"), _writing("__delitem__"), _writing("__ior__")
    update, setdefault = _writing("update"), _writing("setdefault")
    pop, popitem, clear = _writing("pop"), _writing("popitem"), _writing("clear")

    def _tensor(self, factor: float | Tensor) -> Tensor | None:
        if isinstance(factor, Tensor):
            return factor if factor.dim() == 0 and not factor.requires_grad and factor.dtype in DTYPES else None
        if not isinstance(factor, int | float) or not math.isfinite(factor):
            return None
        return torch.full((), factor, dtype=self.dtype, device=self.device)

    def __reduce__(self):
        return Scaling, (dict(self), torch.empty(0, dtype=self.dtype, device=self.device))


_fused: set[tuple] = set()  # how layers and inputs looked of which `why_stock` said None


def _remember(looks: tuple) -> None:
    if len(_fused) >= MOST:
        _fused.clear()
    _fused.add(looks)


class FusedLinear(StockLinear):
    """PEFT's lora.Linear with a fused forward; `accelerate` and `fast` make it of one by changing its class.

    group, why_alone: as in layers/group.py; `accelerate` finds the groups
    recompute: as in `lowrank_linear`
    """

    recompute = True
    group: tuple[LinearGroup, int] | None = None
    why_alone = ""

    @property
    def scaling(self) -> Scaling:
        return self._scaling

    @scaling.setter
    def scaling(self, values: dict) -> None:  # PEFT replaces the dictionary, too
        self._scaling = Scaling(values, self.base_layer.weight)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x: (..., in_features) -> (..., out_features); adapter_names: as PEFT's model passes it, for a mixed batch"""
        if args or (kwargs and not kwargs.keys() <= _UNUSED):
            return super().forward(x, *args, **kwargs)  # which calls _mixed_batch_forward if there are adapter_names
        if self.group is not None and not self._disable_adapters:
            group, member = self.group
            if (y := group.get(member, self, x)) is not None:
                return y
        if (adapter := self._fusible(x)) is None:
            return super().forward(x, *args, **kwargs)
        graph = torch.compiler.is_dynamo_compiling()
        base, modules, scaling = self._modules["base_layer"], self._modules, self._scaling
        dropout = modules["lora_dropout"]._modules[adapter]
        return lowrank_linear(
            x,
            base.weight if graph else base._parameters["weight"],
            base.bias if graph else base._parameters["bias"],
            modules["lora_A"]._modules[adapter]._parameters["weight"],
            modules["lora_B"]._modules[adapter]._parameters["weight"],
            scale=scaling.tensors[adapter] if graph else scaling[adapter],
            dropout_p=dropout.p if type(dropout) is nn.Dropout else 0.0,
            training=dropout.training,
            recompute=self.recompute,
        )

    def _fusible(self, x: Tensor) -> str | None:
        """The adapter whose update of x's product is fused; None where PEFT's own forward runs."""
        looks = None
        if not torch.compiler.is_dynamo_compiling():
            adapter = self._active()
            looks = self._looks(adapter, x)
            if looks is not None and looks in _fused:
                return adapter
        if self.why_stock(x) is not None:
            return None
        if looks is not None:
            _remember(looks)
        return self._present()[0]

    def reads(self, adapter: str | None = None) -> dict[str, Tensor | None]:
        """The parameters that the output depends on, by name.  adapter: the active one, if it is known"""
        modules, adapter = self._modules, adapter or self._active()
        own, down, up = modules["base_layer"]._parameters, modules["lora_A"]._modules, modules["lora_B"]._modules
        factors = (down[adapter]._parameters["weight"], up[adapter]._parameters["weight"]) if adapter in down else ()
        return {"weight": own["weight"], "bias": own["bias"], **dict(zip(("down", "up"), factors))}

    def projection(self, x: Tensor) -> Projection | None:
        """What a group's call on x takes, as layers/group.py says."""
        adapter = self._active()
        if self._looks(adapter, x) not in _fused and (adapter := self._fusible(x)) is None:
            return None
        modules, reads = self._modules, self.reads(adapter)
        dropout = modules["lora_dropout"]._modules[adapter]
        options = dropout.p if type(dropout) is nn.Dropout else 0.0, "input", dropout.training, "auto"
        return tuple.__new__(Projection, (*reads.values(), None, self._scaling.tensors[adapter], options, None))

    def group_kind(self) -> tuple[tuple | None, str]:
        """As layers/group.py's Member, for the adapter that is active now: each pass compares the active ones again."""
        if (adapter := next(iter(self._present()), None)) is None:
            return None, "by itself: no active adapter is on this layer"
        weight = self.base_layer.weight
        return (weight.shape[1], weight.dtype, len(self.lora_A[adapter].weight), str(self.lora_dropout[adapter])), ""

    def _active(self) -> str | None:
        active = self._active_adapter
        return active if type(active) is str else active[0] if active else None

    def _looks(self, adapter: str, x: Tensor) -> tuple | None:
        """All that `why_stock` looks at: layers and inputs that look the same are fused, or are not, alike.

        None where only `why_stock` can tell: several adapters are active, hooks are on, an attribute is missing.
        """
        try:
            modules = self._modules
            base, dropout = modules["base_layer"], modules["lora_dropout"]._modules[adapter]
            down, up = modules["lora_A"]._modules[adapter], modules["lora_B"]._modules[adapter]
            weight, bias = base._parameters["weight"], base._parameters["bias"]
            a, b, scale = down._parameters["weight"], up._parameters["weight"], self._scaling.tensors[adapter]
            active = self._active_adapter
            if (
                self._disable_adapters
                or self.merged_adapters
                or (type(active) is list and active != [adapter])
                or adapter in self.lora_variant
                or "base_layer" in base._modules
                or self._scaling.device != weight.device
                or down._parameters["bias"] is not None
                or up._parameters["bias"] is not None
                or _all._global_forward_hooks or _all._global_forward_pre_hooks
                or _all._global_backward_hooks or _all._global_backward_pre_hooks
                or forward_ad._current_level >= 0
                or torch._C._are_functorch_transforms_active()
                or torch._C._get_tracing_state() is not None
            ):  # fmt: skip
                return None
            for each in base, down, up, dropout:  # as `watched`, without a call
                if each._forward_hooks or each._forward_pre_hooks or each._backward_hooks or each._backward_pre_hooks:
                    return None
                if "forward" in each.__dict__:
                    return None
            return (
                type(base), type(base).forward, type(down), type(up), type(dropout), type(x), type(weight), type(bias),
                type(a), type(b), x.layout, x.dtype, x.device, x.shape[-1],
                weight.dtype, weight.device, weight.shape, None if bias is None else bias.dtype,
                a.dtype, a.device, b.dtype, scale.device, self.cast_input_dtype_enabled,
                (dropout.p, dropout.inplace) if type(dropout) is nn.Dropout else None,
                linear_dtype(x) if torch._C._is_any_autocast_enabled() else None,
            )  # fmt: skip
        except (AttributeError, IndexError, KeyError, TypeError):
            return None

    def why_stock(self, x: Tensor | None = None) -> str | None:
        """Why PEFT's own forward runs, as the layer is now and on x (None: on an input that fits); None if fused."""
        if reason := why_not_now():
            return reason
        if self.disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return "adapters are merged into the weight"
        present = self._present()
        if len(present) != 1:
            return f"{len(present)} active adapters are on this layer"
        return self._why_stock(present[0], x)

    def backend_choice(self) -> Choice:
        """The backend that the next forward on the weight's device takes, and the reason."""
        if reason := self.why_stock():
            return Choice("torch", f"PEFT's own forward: {reason}")
        base, adapter = self.base_layer, self._present()[0]
        tensors = (base.weight, base.bias, self.lora_A[adapter].weight, self.lora_B[adapter].weight)
        dropout = self.lora_dropout[adapter]
        kind = kinds.linear(*base.weight.shape[::-1], dropout.training and getattr(dropout, "p", 0.0) > 0)
        return resolve("lowrank_linear", tensors, rank=tensors[2].shape[0], kind=kind)

    def _present(self) -> list[str]:
        return [adapter for adapter in self.active_adapters if adapter in self.lora_A]

    def _why_stock(self, adapter: str, x: Tensor | None) -> str | None:
        reason = why_not_base(self.base_layer) or why_not_adapter(self, adapter)
        if reason is None and x is not None:
            weight, factor = self.base_layer.weight, self.lora_A[adapter].weight
            reason = why_not_input(weight, factor, adapter, x)
            if reason is None and factor.dtype != x.dtype and not self.cast_input_dtype_enabled and not autocasts(x):
                reason = "casting the input has been disabled"
        if reason is not None:
            return reason
        device = self.base_layer.weight.device
        if self.scaling.device != device:  # the weight was assigned, as from a file to a model on the meta device
            self.scaling = self.scaling
        own = self.scaling.tensors.get(adapter)
        if own is None or own.device != device:
            return f"adapter {adapter!r} is scaled by {self.scaling[adapter]!r}"
        return None

    def _mixed_batch_forward(self, x: Tensor, *args, adapter_names: list[str], **kwargs) -> Tensor:
        present = [name for name in dict.fromkeys(adapter_names) if name != "__base__" and name in self.lora_A]
        if args or not kwargs.keys() <= _UNUSED or not present or self._why_stock_mixed(present, x) is not None:
            return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        place = {name: index for index, name in enumerate(present)}
        index = tuple(place.get(name, -1) for name in adapter_names)
        batch = (index, len(present), math.prod(x.shape[1:-1]), x.device)
        segments = sorted_rows(*batch) if torch.compiler.is_compiling() else shared_rows(*batch)
        down, up = stack_adapters([(self.lora_A[name].weight, self.lora_B[name].weight) for name in present])
        scale = torch.stack([self.scaling.tensors[name].to(x.device, self.scaling.dtype) for name in present])
        base = self.base_layer
        return batched_lowrank_linear(x, base.weight, base.bias, down, up, segments, scale=scale)

    def _why_stock_mixed(self, present: list[str], x: Tensor) -> str | None:
        if reason := why_not_now():
            return reason
        for name in present:
            if reason := self._why_stock(name, x):
                return reason
            dropout = self.lora_dropout[name]
            if dropout.training and getattr(dropout, "p", 0.0) > 0:
                return "each adapter of a mixed batch would drop by its own probability"
        if len({self.lora_A[name].weight.dtype for name in present}) > 1:
            return "the adapters have several dtypes"
        return "there is nothing to mix" if x.dim() < 2 or x.numel() == 0 else None

    def _get_name(self) -> str:
        return "Linear"  # PEFT's model status takes the kind of a layer from its representation

    def extra_repr(self) -> str:
        return "fused"

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.scaling = self.scaling  # beside the weight again
        return self


_UNUSED = frozenset(VARIANT_KWARG_KEYS)  # passed to every layer, read by variants alone
