"""Triton's interpreter in about half of its time: what it does anew in every call is done once.

Every call of a device function patches all of triton.language, which the launch around it has patched already; every
operation builds a table of numpy's types to look one up. Seen in triton 3.6.0 and 3.7.1.
"""

import os
from functools import wraps


def quicken() -> None:
    """Does nothing where kernels are not interpreted, or triton is missing."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    interpreter._patch_lang = _once_per_launch(interpreter, interpreter._patch_lang)
    interpreter._get_np_dtype = _remembering(interpreter, interpreter._get_np_dtype)


def _once_per_launch(interpreter, patch_lang):
    """A launch restores what it patched; what a device function has patched is left as it is, and stays."""
    tl, patched = interpreter.tl, set()

    @wraps(patch_lang)
    def patch(fn):
        languages = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if languages and languages <= patched:
            return interpreter._LangPatchScope()
        scope = patch_lang(fn)
        if not patched:  # the launch's own
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        patched.update(languages)
        return scope

    return patch


def _remembering(interpreter, get_np_dtype):
    """Types are told apart by their names; blocks and pointers, which hold other types, are asked about as before."""
    tl, known = interpreter.tl, {}

    @wraps(get_np_dtype)
    def get(kind):
        if isinstance(kind, tl.block_type) and not isinstance(kind.element_ty, tl.pointer_type):
            kind = kind.element_ty
        if isinstance(kind, tl.pointer_type | tl.block_type):
            return get_np_dtype(kind)
        if kind.name not in known:
            known[kind.name] = get_np_dtype(kind)
        return known[kind.name]

    return get
