"""Inside the peft library, 0.21 or newer: `accelerate` a built model, or ask for fused layers by `fast(LoraConfig(…))`.
`register()` makes Aurora one of PEFT's methods.

Raises ImportError on import if peft is missing or older.
"""

import importlib.metadata
import re

PEFT_WANTED = (0, 21)


def _check_version() -> None:
    wanted = "peft_kernels.integrations.peft needs peft >= " + ".".join(map(str, PEFT_WANTED))
    try:
        installed = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{wanted}, which is not installed (pip install 'peft>=0.21')", name="peft") from None
    if tuple(map(int, re.findall(r"\d+", installed)[:2])) < PEFT_WANTED:
        raise ImportError(f"{wanted}, found {installed} (pip install -U 'peft>=0.21')", name="peft")


_check_version()

from peft_kernels.integrations.peft.aurora import AuroraConfig, register  # noqa: E402
from peft_kernels.integrations.peft.fused_linear import FusedLinear  # noqa: E402
from peft_kernels.integrations.peft.lora import Report, accelerate, fast, restore  # noqa: E402

__all__ = ["AuroraConfig", "FusedLinear", "Report", "accelerate", "fast", "register", "restore"]
