"""The student of MoIL as one low-rank update of the frozen weight, and a bias.

With the frozen W0, b0, a projection's own adapter A, B and its layer's transform A_d, a_d, B_d, c_d:

    placement "input"    W̄ = (W0 + B A)(I + B_d A_d)      b̄ = (W0 + B A)(B_d a_d + c_d) + b0
    placement "output"   W̄ = (I + B_d A_d)(W0 + B A)      b̄ = (I + B_d A_d) b0 + B_d a_d + c_d

Either is W0 + F C, exactly. Source: docs/method.md, section 3 (MoIL, doi 10.1109/TPAMI.2024.3435790, and its authors'
code).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.checks import check_choice, check_shape, check_tensor
from peft_kernels.ops.weight_distance import WIDE

PLACEMENTS = ("input", "output")


class Transform(NamedTuple):
    """The linear transform that one layer's projections share; d is in_features, or for "output" out_features."""

    down: Tensor  # A_d (r_d, d)
    down_bias: Tensor  # a_d (r_d,)
    up: Tensor  # B_d (d, r_d)
    up_bias: Tensor  # c_d (d,)


def check_student(
    weight0: Tensor,
    bias0: Tensor | None,
    lora: tuple[Tensor, Tensor] | None,
    transform: Transform | None,
    placement: str,
) -> None:
    check_choice("placement", placement, PLACEMENTS)
    check_tensor("weight0", weight0, dtypes=WIDE)
    if weight0.dim() != 2:
        raise ValueError(f"weight0: expected (out_features, in_features), got {tuple(weight0.shape)}")
    if lora is None and transform is None:
        raise ValueError("lora: expected factors, a transform, or both, got neither")
    (out, columns), ranks = weight0.shape, []
    for name, factors in (("lora", lora), ("transform", transform)):
        if factors is not None:
            parts = ("A", "B") if name == "lora" else Transform._fields
            if not isinstance(factors, tuple | list) or len(factors) != len(parts):
                raise ValueError(f"{name}: expected ({', '.join(parts)}), got {factors!r:.80}")
            check_tensor("lora A" if name == "lora" else "transform.down", factors[0], weight0, dtypes=(weight0.dtype,))
        ranks.append(1 if factors is None or factors[0].dim() == 0 else factors[0].shape[0])
    (rank, depth), width = ranks, columns if placement == "input" else out
    expected = {} if bias0 is None else {"bias0": (bias0, (out,))}
    if lora is not None:
        expected |= {"lora A": (lora[0], (rank, columns)), "lora B": (lora[1], (out, rank))}
    if transform is not None:
        shapes = ((depth, width), (depth,), (width, depth), (width,))
        expected |= {f"transform.{n}": (t, s) for n, t, s in zip(Transform._fields, transform, shapes)}
    for name, (tensor, shape) in {"weight0": (weight0, (out, columns)), **expected}.items():
        check_tensor(name, tensor, weight0, dtypes=(weight0.dtype,))
        check_shape(name, tensor, shape, "what weight0 and the ranks ask for")
        if tensor.numel() == 0:
            raise ValueError(f"{name}: expected ranks and features ≥ 1, got shape {tuple(tensor.shape)}")


def hybrid_factors(
    weight0: Tensor,
    bias0: Tensor | None,
    lora: tuple[Tensor, Tensor] | None,
    transform: Transform | None,
    placement: str = "input",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(F, C, b̄) with W̄ = W0 + F C: the student as one low-rank update and a bias. Differentiable.

    weight0: (out, in);  bias0: (out,) or None
    lora: (A (R, in), B (out, R)) or None;  transform: Transform(A_d, a_d, B_d, c_d) or None
    placement: "input" | "output": on which side of the weight the transform stands;  all float32, or all float64
    returns factors: (out, R + r_d) left, (R + r_d, in) right, and (out,) bias, None if there is no bias0

    Raises ValueError or TypeError, naming the argument.
    """
    check_student(weight0, bias0, lora, transform, placement)
    lefts, rights, bias = [], [], bias0
    if lora is not None:
        rights.append(lora[0])
        lefts.append(lora[1])
    if transform is not None:
        down, down_bias, up, up_bias = transform
        if placement == "input":
            left, right = _through(weight0, lora, up), down
            shift = None if bias0 is None else _through(weight0, lora, (up @ down_bias + up_bias)[:, None])[:, 0]
        else:
            left = up
            right = down @ weight0 if lora is None else down @ weight0 + (down @ lora[1]) @ lora[0]
            shift = None if bias0 is None else up @ (down @ bias0 + down_bias) + up_bias
        lefts.append(left)
        rights.append(right)
        bias = None if bias0 is None else bias0 + shift
    return torch.cat(lefts, dim=1), torch.cat(rights), bias


def _through(weight0: Tensor, lora: tuple[Tensor, Tensor] | None, v: Tensor) -> Tensor:
    """(W0 + B A) v"""
    return weight0 @ v if lora is None else weight0 @ v + lora[1] @ (lora[0] @ v)
