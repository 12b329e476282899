"""What `weight_distance` and the imitation step cost, by formula: ops/weight_distance.py and imitation/plan.py.

Sizes: L layers of three projections of d × d with a bias each, adapters of rank R and, unless `depth` is 0, a transform
of rank `depth` on their input; or (step False) a plain distance of 3 L matrices from targets that stay, with no bias.
All float32. Operands that the projections of a layer share are counted once per layer: they stay in the cache.
"""

from . import Pass, Work

DESIGNS = ("fused", "torch", "authors", "lerp")
PROJECTIONS = 3  # q, k, v
FOLLOW = 3  # operations per element of a teacher


def _adapters(L: int, d: int, R: int, depth: int) -> int:
    """Elements."""
    return PROJECTIONS * L * 2 * R * d + (L * (2 * depth * d + depth + d) if depth else 0)


def compulsory(L: int, d: int, R: int, depth: int, step: bool, design: str | None = None) -> tuple[Work]:
    """Everything at once: what no design can avoid.

    Bytes: live, teacher and frozen weights and biases read once, teachers written once, each adapter read and its
    gradient written. Arithmetic: the low-rank form's products, F C, dF and dC over the whole rank, G and dX over the
    transform's with its column for the bias, and the thin ones. The teachers alone for "lerp", which does no more.
    """
    N, weights, follow = PROJECTIONS * L, d * d, FOLLOW if step else 0
    own = weights + (d if step else 0)
    if design == "lerp":
        return (Work(follow * N * own, 4 * 3 * N * own),)
    columns = depth + 1 if depth else 0
    products = 2 * weights * (3 * (R + depth) + 2 * columns) + 6 * 2 * d * R * columns
    return (Work(N * (products + follow * own), 4 * (N * own * (4 if step else 2) + 2 * _adapters(L, d, R, depth))),)


def passes(design: str, L: int, d: int, R: int, depth: int, step: bool, device: str) -> tuple[list[Pass] | None]:
    """All launches of one design; None where it does not do that, or nobody has modelled it."""
    if design not in DESIGNS:
        raise ValueError(f"design: expected one of {DESIGNS}, got {design!r}")
    if design == "lerp":  # a GPU's are counted
        return ([Pass("teachers", *compulsory(L, d, R, depth, step, design)[0])] if step else None,)
    if design == "torch" and device != "cpu":
        return (None,)
    return ({"fused": _fused, "torch": _torch, "authors": _authors}[design](L, d, R, depth, step),)


def _pass(name: str, flops: int, *elements: int) -> Pass:
    return Pass(name, flops, 4 * sum(elements))


def _map(name: str, elements: int, arrays: int) -> Pass:
    """Elementwise: one operation and so many arrays read or written for each element."""
    return _pass(name, elements, arrays * elements)


def _product(name: str, m: int, k: int, n: int) -> Pass:
    """A matmul; one that accumulates in torch does so in a result which is still in the cache."""
    return _pass(f"product {name}", 2 * m * k * n, m * k, k * n, m * n)


def _fused(L: int, d: int, R: int, depth: int, step: bool) -> list[Pass]:
    """One launch for each stage of the plan. Each product reads its operands itself: E twice in a stage. Gradients are
    written by the first product of each, since there were none."""
    N, n, c = PROJECTIONS * L, d * d, depth + 1 if depth else 0
    down, up, thin = N * R * d, N * d * R, N * d * c  # A; B; G and dG
    shared = L * d * depth  # each of A_d and B_d
    own = N * (n + d) if step else N * n
    distance = _pass(
        "distance",
        2 * N * n * (R + depth) + FOLLOW * own * step + 10 * N * n,
        *(N * n * (5 if step else 3), down, up, thin, shared),
    )
    finish = _pass("finish", 2 * N * d * c, thin, 5 * N * d * step)
    losses = _pass("sum of the losses", N, N)
    if not step:
        both = _pass("dB, dA", 4 * N * n * R, 2 * N * n, 2 * (down + up))
        return [distance, finish, both, losses, _pass("the loss's gradient", 0, 1), _scaled(N, d, R)]
    if not depth:
        after = [_pass(name, 2 * N * n * R, N * n, down, up) for name in ("dB", "dA")]
        return [distance, finish, *after, losses]
    middle = N * R * c  # each of P and U
    return [
        _pass("P", 2 * down * c, down, L * d * c, middle),
        _pass("G", 2 * (N * n + up) * c, N * n, L * d * c, up, middle, thin),
        distance,
        finish,
        _pass("dB, dG", 2 * N * (n * (R + depth) + d * depth), 2 * N * n, down, shared, up, thin),
        _pass(
            "dA, dA_d, da_d, U",
            2 * N * (n * (R + depth) + d * depth) + 2 * up * c,
            *(2 * N * n, 2 * up, down, 2 * thin, shared, middle),
        ),
        _pass(
            "dX, dB, dA",
            2 * N * n * c + 6 * down * c,
            *(N * n, thin, 3 * down, L * d * c, 2 * up, 2 * middle, L * d * c),
        ),
        losses,
    ]


def _scaled(N: int, d: int, R: int) -> Pass:
    return _map("gradients times the loss's", 2 * N * R * d, 2)


def _squared(n: int, rows: int) -> list[Pass]:
    each = [_map("norms of rows", n, 1), _map("their squares", rows, 2), _map("their sum", rows, 1)]
    return [*each, _pass("kept", 0, 2)]


def _torch(L: int, d: int, R: int, depth: int, step: bool) -> list[Pass]:
    """The torch backend on a CPU, layer by layer: a call for each term of each product, up to 18 for each distance."""
    N, n = PROJECTIONS * L, d * d
    follow = [_pass("Ŵ towards W", 3 * n, 3 * n)] if step else []
    each = [*follow, _map("W0 − Ŵ", n, 3), *_squared(n, d) * 2, _product("B A", d, R, d)]
    each += [_product("G A_d", d, depth, d)] * bool(depth)
    each += [*_squared(n, d), _pass("loss", 1, 2), _pass("loss kept", 0, 2), _pass("factor", 0, 1)]
    if not step:
        each += [_product("dB", d, d, R), _product("dA", R, d, d), _pass("no bias", 0, 3)]
        return [*each * N, _pass("sum of the losses", N, N), _pass("the loss's gradient", 0, 1), _scaled(N, d, R)]
    each += [_map("bias", d, 3), _map("bias", d, 3), *_squared(d, 1) * 3]
    each += [_pass("shift", 2 * d * depth, d * depth, d), _map("shift", d, 3)] * bool(depth)
    each += [_pass("loss", 1, 2)] * 3 + [_map("bias gradient", d, 2)] * (2 * bool(depth))
    each += [_product("dB", d, d, R), _product("dA", R, d, d)]
    whole = [_pass("gradients to zero", 0, _adapters(1, d, R, depth))] * L
    whole += [_pass("all losses", 0, 2 * N)] * (L > 1) + [_pass("sum of the losses", N, N)]
    if not depth:
        return [*whole, *each * N]
    for rows, inner in ((R, d), (d, d), (d, R)):  # P = A X, G = W0 X + B P, X = [B_d | c_d]
        each += [_product("X", rows, inner, depth), _product("X", rows, inner, 1)] if inner == d else []
        each += [] if inner == d else [_product("B P", d, R, depth + 1)]
    each += [_product("dG", d, d, depth), _product("dG", d, 1, depth)]
    each += [_product("dA_d", depth, d, d), _product("da_d", depth, d, 1)]
    each += [_product("U", R, d, depth + 1), _product("dB", d, depth, R), _product("dB", d, 1, R)]
    each += [_product("dA", R, depth, d), _product("dA", R, 1, d)]
    for inner in (d, R):  # dX = W0ᵀ dG + Aᵀ U
        each += [_product("dB_d", d, inner, depth), _product("dc_d", d, inner, 1)]
    return [*whole, *each * N]


def _authors(L: int, d: int, R: int, depth: int, step: bool) -> list[Pass]:
    """The formula of docs/method.md, section 3, eagerly, with autograd: W̄ materialised for each projection."""
    N, n = PROJECTIONS * L, d * d
    each, shared = [], []
    if step:
        for size in (n, d):
            each += [_map("μ Ŵ", size, 2), _pass("+ (1 − μ) W", 2 * size, 3 * size)]
    each += [_product("B A", d, R, d), _map("W0 + B A", n, 3), _product("dB", d, d, R), _product("dA", R, d, d)]
    for size in (n, d) if step else (n,):
        each += [_pass("mean square", 3 * size, 2 * size), _map("total", 1, 3)]
        each += [_pass("its gradient", 2 * size, 3 * size)] * (size == n or depth > 0)
    if depth:
        each += [_product("B_d A_d", d, depth, d), _map("I + B_d A_d", n, 3), _product("W̄", d, d, d)]
        each += [_product("W̄'s gradients", d, d, d)] * 2 + [
            _product("dB_d", d, d, depth),
            _product("dA_d", depth, d, d),
        ]
        each += [_pass("B_d a_d", 2 * d * depth, d * depth, 2 * d), _map("+ c_d", d, 3), _map("+ b0", d, 3)]
        each += [_pass("(W0 + B A) v", 2 * n, n, 2 * d), _pass("v's gradient", 2 * n, n, 2 * d), _map("g vᵀ", n, 1)]
        each += [_map("dv a_dᵀ", d * depth, 1), _pass("da_d", 2 * d * depth, d * depth, d)]
        each += [_product("B A", d, R, d), _map("W0 + B A", n, 3), _product("dB", d, d, R), _product("dA", R, d, d)]
        each += [_map("both gradients", R * d, 3)] * 2  # once more in b̄
        again = PROJECTIONS - 1  # the projections' gradients of their transform add up
        shared = [_map("dB_d", d * depth, 3)] * (again + PROJECTIONS) + [_map("dA_d", d * depth, 3)] * again
        shared += [_map("da_d", depth, 3), _map("dc_d", d, 3)] * again
    return [*each * N, *shared * L, _pass("the loss's gradient", 0, 1)]
