"""The small tensors between shared factors: from a decomposition's own parameters to one core per adapted weight.

Aurora (arXiv 2305.08381; docs/method.md, section 4) stacks the weights of all adapted projections and decomposes their
update:

    "cp" (the paper)          ΔW_k = V diag(λ ∘ p_k) Uᵀ                       a diagonal core for each slot k
    "tucker" (its release)    ΔW_k = V K_kᵀ Uᵀ,  K_k[a, b] = Σ_c C[a, b, c] p_k[c]    a dense one
"""

import torch
from torch import Tensor

from peft_kernels.checks import check_choice, check_shape, check_tensor

LAYOUTS = ("blocks", "released")


def cp_core(lam: Tensor, p: Tensor) -> Tensor:
    """λ ∘ p_k for every slot: the diagonal cores of a CP decomposition. Differentiable.

    lam: (R,);  p: (N, R)
    returns core: (N, R), for `reconstruct_stack`; a row of it, or N = O · I of them as (O, I, R), for `lowrank_linear`
    Raises ValueError or TypeError, naming the argument.
    """
    check_tensor("lam", lam)
    check_tensor("p", p, lam, dtypes=(lam.dtype,))
    if lam.dim() != 1 or p.dim() != 2 or not lam.numel():
        got = f"{tuple(lam.shape)} and {tuple(p.shape)}"
        raise ValueError(f"lam, p: expected shapes (R,) and (N, R) with R ≥ 1, got {got}")
    check_shape("p", p, (p.shape[0], lam.shape[0]), "(N, R)")
    return lam * p


def tucker_core(C: Tensor, p: Tensor, layout: str = "blocks") -> Tensor:
    """K_kᵀ for every slot: the dense cores of Aurora's released code, all in one product. Differentiable.

    C: (R, R, R);  p: (N, R)
    layout: "blocks" | "released". The released code cuts the N blocks of one layer (fc1 and fc2 have four) out of their
        joint matrix in another order: column r of block s is column b of slot k with (b, k) = divmod(s · R + r, N).
        p then holds the N slots of that one layer. With one slot the layouts agree.
    returns core: (N, R, R), row a of core_k being Σ_c C[:, a, c] p_k[c]. The released fc2 takes the transposed cores.
    Raises ValueError or TypeError, naming the argument.
    """
    check_tensor("C", C)
    check_tensor("p", p, C, dtypes=(C.dtype,))
    check_choice("layout", layout, LAYOUTS)
    if p.dim() != 2 or C.shape != (p.shape[1],) * 3 or not C.numel():
        got = f"{tuple(C.shape)} and {tuple(p.shape)}"
        raise ValueError(f"C, p: expected shapes (R, R, R) and (N, R) with R ≥ 1, got {got}")
    slots, rank = p.shape
    matrices = torch.matmul(C.reshape(rank * rank, rank), p.t()).view(rank, rank, slots)  # K_k[a, b] at [a, b, k]
    if layout == "released":
        return matrices.view(rank, slots, rank).permute(1, 2, 0)
    return matrices.permute(2, 1, 0)
