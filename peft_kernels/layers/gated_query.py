"""Aurora's gated query transformation as a module beside a fusion layer."""

import torch
from torch import Tensor, nn

from peft_kernels.backend import BACKENDS, Choice, resolve
from peft_kernels.checks import check_choice
from peft_kernels.ops.gated_query import MODES, gated_query


class GatedQuery(nn.Module):
    """γ and β of one layer, and what becomes of its output; see peft_kernels.gated_query.

    features: d;  mode: "additive" (the released code: for the self- and for the cross-attention's output) | "gated"
    `gamma`, `beta`, and with "additive" `cross_gamma`, `cross_beta`, each (d,), start at a standard deviation of 2e-4;
    the gamma of "gated" around 1.
    """

    def __init__(self, features: int, mode: str = "additive", *, backend: str = "auto", dtype=None, device=None):
        super().__init__()
        check_choice("mode", mode, MODES)
        check_choice("backend", backend, ("auto", *BACKENDS))
        self.mode, self.backend = mode, backend
        for name in ("gamma", "beta", *(("cross_gamma", "cross_beta") if mode == "additive" else ())):
            self.register_parameter(name, nn.Parameter(torch.empty(features, dtype=dtype, device=device)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=2e-4)
        if self.mode == "gated":
            with torch.no_grad():
                self.gamma.add_(1)

    def forward(self, hidden: Tensor, text: Tensor, cross: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """hidden, text, cross: (..., S, d): the layer's, its self-attention's and its cross-attention's output

        padding_mask: (..., S), True for real tokens, which "gated" needs where sequences are padded -> (..., S, d)
        """
        if self.mode == "gated":
            return gated_query(
                self.mode, hidden, text, self.gamma, self.beta, padding_mask=padding_mask, backend=self.backend
            )
        factors = (self.gamma, self.beta, cross, self.cross_gamma, self.cross_beta)
        return gated_query(self.mode, hidden, text, *factors, backend=self.backend)

    def backend_choice(self) -> Choice:
        return resolve("gated_query", (self.gamma,), self.backend, kind=self.mode)

    def extra_repr(self) -> str:
        return f"{len(self.gamma)}, mode={self.mode}, backend={self.backend}"
