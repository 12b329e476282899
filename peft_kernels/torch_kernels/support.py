"""What plain torch cannot run."""

from peft_kernels.records import Case


def unsupported(case: Case) -> str | None:
    """Nothing: it is what runs everywhere."""
    return None
