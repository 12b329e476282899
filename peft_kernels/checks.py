"""Argument checks of the operations: ValueError or TypeError naming the argument, what it got and what it expects."""

import sys

import torch
from torch import Tensor, nn

from peft_kernels.autocast import autocasts, linear_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NUMBERS = (float, int, torch.SymFloat, torch.SymInt)  # a tuple: a union would be made anew in every call
_INTEGERS, _FLAGS = (int, torch.SymInt), (bool, torch.SymBool)
_MOST = torch.finfo(torch.float32).max
_PLAIN = (Tensor, nn.Parameter)
_OR_PASS = ", or pass an object with .dequantize(dtype) and .shape"


def check_tensor(
    name: str, value: object, like: Tensor | None = None, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> None:
    """`value` is a dense tensor of one of `dtypes`, on the device of `like`."""
    if type(value) not in _PLAIN or value.layout is not torch.strided or value.is_nested:
        check_dense(name, value, "dequantize it first" + _OR_PASS * (name == "weight"))
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {value.dtype}")
    if like is not None and value.device != like.device:
        empty = "; nothing is there, hooks of accelerate may have offloaded it" if value.is_meta else ""
        raise ValueError(f"{name}: expected device {like.device}, as the others, got {value.device}{empty}")


def check_dense(name: str, value: object, instead: str) -> None:
    """A tensor with one number at every place of its shape, in memory of its own, whatever its type.

    instead: what to do with one that a library has packed. torch's own types (DTensor, fake and functional tensors) are
    left to torch, as are those of others whose memory is where it seems.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {kind_of(value)}")
    if value.is_nested:
        raise TypeError(f"{name}: expected a dense Tensor, got a nested one; pad it, or pass its parts one by one")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense Tensor, got layout {value.layout}; make it dense first")
    library, kind = type(value).__module__.partition(".")[0], type(value)
    if library == "torch":
        return
    packed = not value.is_floating_point()  # as bitsandbytes does, in a Parameter of bytes
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not packed:
        packed = torch.compiler.is_compiling() or (value.numel() and not value.data_ptr())
    if packed:
        raise TypeError(f"{name}: expected a dense Tensor, got a {kind.__name__} of {library}; {instead}")


def kind_of(value: object) -> str:
    """The name of a value's type, after its library's: numpy.float32."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def check_shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected} = {meaning}, got {tuple(value.shape)}")


def check_scale(scale: object, like: Tensor, name: str = "scale", or_else: str = "") -> None:
    """A finite number, or a 0-d tensor on the device of `like` that takes no gradient. or_else: or what else."""
    if not isinstance(scale, Tensor):
        if isinstance(scale, bool) or not isinstance(scale, _NUMBERS):
            raise TypeError(f"{name}: expected a number or a 0-d Tensor{or_else}, got {kind_of(scale)}")
        # A compiled graph keeps a changing number symbolic; asking for its value would recompile for each.
        if not torch.compiler.is_compiling():
            check_finite(name, scale, like.dtype)
        return
    check_tensor(name, scale, like)
    if scale.dim() != 0:
        raise ValueError(f"{name}: expected a 0-d Tensor{or_else}, got shape {tuple(scale.shape)}")
    if scale.requires_grad:
        raise ValueError(f"{name}: takes no gradient; a trainable scale belongs in the factors or the core")


def check_finite(name: str, number: float, dtype: torch.dtype = torch.float32) -> None:
    """The number is finite in `dtype`; half precisions are computed with in float32."""
    if -_MOST <= number <= _MOST:
        return
    got = f"an integer of {number.bit_length()} bits" if isinstance(number, int) else number
    if not -sys.float_info.max <= number <= sys.float_info.max:
        raise ValueError(f"{name}: expected a finite number, got {got}")
    if dtype != torch.float64:
        raise ValueError(f"{name}: expected a number up to ±{_MOST:.4g}, where float32 overflows, got {got}")


def check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, _INTEGERS) or value < 1:
        raise ValueError(f"{name}: expected an integer ≥ 1, got {value!r:.80}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, _FLAGS):
        raise TypeError(f"{name}: expected True or False, got {kind_of(value)}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r:.80}")


def check_probability(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name}: expected a number, got {kind_of(value)}")
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {value}")


def check_factor(name: str, factor: Tensor, x: Tensor) -> None:
    """A factor has x's dtype, or is a float32 master under half-precision x; both come contiguous to the kernels."""
    check_tensor(name, factor, x, dtypes=(x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32))


def check_factors(core: Tensor | None, x: Tensor, weight, down: Tensor, up: Tensor) -> Tensor | None:
    """Check the factors against x and weight; the core as (O, I, R) or (O, I, R, R)."""
    for name, factor in (("down", down), ("up", up)):
        check_factor(name, factor, x)
        if factor.dim() != 2:
            raise ValueError(f"{name}: expected 2 dimensions, got shape {tuple(factor.shape)}")
    rank = down.shape[0]
    if rank == 0:
        raise ValueError(f"down: expected rank ≥ 1, got shape {tuple(down.shape)}")
    if core is not None:
        check_factor("core", core, x)
        check_core(core, rank)
        core = core[None, None] if core.dim() < 3 else core
    out_blocks, in_blocks = (1, 1) if core is None else core.shape[:2]
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected {weight.shape[1]} = in_features columns, got shape {tuple(x.shape)}")
    if down.shape[1] * in_blocks != weight.shape[1]:
        expected = f"(R, in_features / input blocks) = ({rank}, {weight.shape[1]} / {in_blocks})"
        raise ValueError(f"down: expected shape {expected}, got {tuple(down.shape)}")
    if up.shape[0] * out_blocks != weight.shape[0] or up.shape[1] != rank:
        expected = f"(out_features / output blocks, R) = ({weight.shape[0]} / {out_blocks}, {rank})"
        raise ValueError(f"up: expected shape {expected}, got {tuple(up.shape)}")
    return core


def check_core(core: Tensor, rank: int) -> None:
    square = {1: (rank,), 2: (rank, rank), 3: (rank,), 4: (rank, rank)}.get(core.dim())
    if square is None or core.shape[-len(square) :] != square or 0 in core.shape:
        raise ValueError(
            f"core: expected (R,), (R, R), (O, I, R) or (O, I, R, R) with R = {rank}, got {tuple(core.shape)}"
        )


def check_linear(x: object, weight: object, bias: Tensor | None, hidden: Tensor | None):
    """x, weight, bias and hidden after autocast, of one dtype."""
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a 0-d Tensor")
    quantized = not isinstance(weight, Tensor)
    if quantized:
        _check_quantized(weight)
    else:
        check_tensor("weight", weight, x)
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected (out_features, in_features), neither 0, got shape {tuple(weight.shape)}")
    for name, tensor in (("bias", bias), ("hidden", hidden)):
        if tensor is not None:
            check_tensor(name, tensor, x)
    tensors = {"weight": None if quantized else weight, "bias": bias, "hidden": hidden}
    if autocasts(x):
        dtype = linear_dtype(x)
        x = x.to(dtype)
        tensors = {name: tensor if tensor is None else tensor.to(dtype) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected dtype {x.dtype}, as x, got {tensor.dtype}")
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],), "(out_features,)")
    return x, weight if quantized else tensors["weight"], tensors["bias"], tensors["hidden"]


def _check_quantized(weight: object) -> None:
    shaped = isinstance(getattr(weight, "shape", None), tuple | list)
    if not shaped or not callable(getattr(weight, "dequantize", None)):
        raise TypeError(
            f"weight: expected a Tensor or an object with .dequantize(dtype) and .shape, got {kind_of(weight)}"
        )


def refuse_second_derivative(name: str) -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name}: has first derivatives only; call backward without create_graph=True")
