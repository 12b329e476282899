"""The kinds of calls whose fastest backend is chosen apart: by width and dropout, core or mode, never by rows.

A choice that hung on the rows would compile a model anew for another batch.
"""

WIDE = 1024  # a layer's larger side, above which the frozen product takes most of the time


def linear(in_features: int, out_features: int, dropout: bool) -> str:
    """Of `lowrank_linear`, `lowrank_hidden` and `batched_lowrank_linear`."""
    return ("wide" if max(in_features, out_features) > WIDE else "narrow") + (", dropout" if dropout else "")


def core(dimensions: int | None) -> str:
    """Of `reconstruct` with a core[o, i] of so many dimensions, None without one."""
    return {None: "no core", 1: "diagonal core", 2: "dense core"}[dimensions]
