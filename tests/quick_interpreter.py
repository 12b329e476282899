"""Triton's interpreter in a quarter of its time: what it does anew in every call is done once.

Every launch, and every call of a device function, patches all of triton.language; every operation builds a table of
numpy's types to look one up, new types for the blocks it takes and gives, and copies of a small operand as large as the
large one, which numpy would have broadcast. Seen in triton 3.6.0, 3.7.1 and 3.8.0.
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
    interpreter._patch_lang_tensor = _with_an_index(interpreter._patch_lang_tensor)
    interpreter._patch_lang = _once(interpreter, interpreter._patch_lang)
    interpreter._patch_attr = _directly(interpreter)
    interpreter._get_np_dtype = _remembering(interpreter, interpreter._get_np_dtype)
    core, semantic = interpreter.tl.core, interpreter.TritonSemantic
    core.block_type.__init__ = _known_blocks(core, core.block_type.__init__)
    core.tensor.__init__ = _known_shapes(core.tensor.__init__)
    semantic.binary_op_type_checking_impl = _known_operands(core, semantic.binary_op_type_checking_impl)
    semantic.binary_op_sanitize_overflow_impl = lambda *operation: None  # it works out an overflow and lets it pass
    interpreter.TensorHandle.__init__ = _known_handles(interpreter.TensorHandle)


def _with_an_index(patch_lang_tensor):
    """A scalar, an array of one element, as an integer: Triton 3.6 asks for it in a way that numpy 2.4 refuses."""

    @wraps(patch_lang_tensor)
    def patch(tensor, scope):
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch


def _once(interpreter, patch_lang):
    """What a launch patches stays: it would be the same for the next one, and for each function that it calls."""
    patched = set()

    @wraps(patch_lang)
    def patch(fn):
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            patch_lang(fn)
        return interpreter._LangPatchScope()

    return patch


def _directly(interpreter):
    """A builtin of the language is called without the two functions that look for its semantic among the arguments."""

    def patch(obj, name, member, builder, scope):
        function, semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic
        scope.set_attr(obj, name, lambda *args, **named: function(*args, **{**named, "_semantic": semantic}))

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


def _known_handles(handle):
    """That numbers of one size fit a type is checked once."""
    known = set()

    @wraps(handle.__init__)
    def __init__(self, data, dtype, attr=None):
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        if (dtype.name, data.itemsize) not in known:
            self.__post_init__()
            known.add((dtype.name, data.itemsize))

    return __init__


def _known_blocks(core, initialise):
    """All blocks of one shape and element share what their types know of themselves."""
    known = {}

    @wraps(initialise)
    def __init__(self, element_ty, shape):
        key = element_ty.name, *[size.value if isinstance(size, core.constexpr) else size for size in shape]
        if key not in known:
            initialise(self, element_ty, shape)
            known[key] = self.__dict__
        self.__dict__.update(known[key], element_ty=element_ty)

    return __init__


def _known_shapes(initialise):
    """All tensors of one type share their shape."""
    known = {}

    @wraps(initialise)
    def __init__(self, handle, type):
        if type.name not in known:
            initialise(self, handle, type)
            known[type.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known[type.name]

    return __init__


def _known_operands(core, check):
    """Two operands become what two such operands became before, but numpy may broadcast them."""
    known, numbers = {}, {}

    def kind(operand):
        return (operand.type.name, operand.dtype.is_const()) if isinstance(operand, core.tensor) else type(operand)

    def become(semantic, operand, type):
        if isinstance(operand, core.tensor):
            if operand.type.name == type.name:
                return operand
            return core.tensor(semantic.cast(operand, type.scalar).handle, type)
        if (operand, type.name) not in numbers:
            numbers[operand, type.name] = core.tensor(semantic.scalar_constant(operand, type.scalar).handle, type)
        return numbers[operand, type.name]

    @wraps(check)
    def operands(self, left, right, *rules, **named):
        key = kind(left), kind(right), *rules, *named.items()
        if key in known:
            return become(self, left, known[key][0]), become(self, right, known[key][1])
        checked = check(self, left, right, *rules, **named)
        # A number's own type follows from its value: only where it takes a tensor's is that known for the next one.
        tensors = [operand for operand in (left, right) if isinstance(operand, core.tensor)]
        if checked[0].dtype.name in [tensor.dtype.name for tensor in tensors]:
            known[key] = checked[0].type, checked[1].type
        return checked

    return operands
