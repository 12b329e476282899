"""Records for the CUDA kernels of the weight distance, laid out as a case says, and their float64 definitions."""

import random
from dataclasses import dataclass

import torch
from cuda_cases import BF16, FLOAT, HALF
from cuda_emulation import guarded

from peft_kernels.cuda_kernels import weight_distance as kernels
from peft_kernels.records import Distance, Product, Results, Term

EPS = torch.finfo(FLOAT).eps
EXTRA = {"dense": (0, 0), "strided": (24, 16), "unaligned": (5, 3)}  # elements between rows, and before the first


@dataclass(frozen=True)
class Case:
    """Matrices of one call: (out, in, ranks of the pairs)."""

    shapes: tuple = ((63, 130, (16,)), (96, 63, (8, 33)), (1, 1, ()))
    live: torch.dtype | None = FLOAT
    layout: str = "dense"  # strided: 16-byte accesses still possible | unaligned
    bias: str = "none"  # none | plain | shift: all of its parts | last: only its last one
    decay: float | None = 0.9
    reduction: str = "mean"
    tensor_scale: bool = False

    def __str__(self):
        words = ["+".join(f"{out}x{columns}r{'_'.join(map(str, ranks))}" for out, columns, ranks in self.shapes)]
        words += [str(self.live).removeprefix("torch."), self.layout, f"bias_{self.bias}", self.reduction]
        return "-".join([*words, *(["rest"] if self.decay is None else []), *(["scaled"] if self.tensor_scale else [])])


def sampled(count):
    """A fixed random sample of the grid."""
    draw = random.Random(7).choice
    sizes = [1, 5, 63, 96, 130]  # 130: two tiles and a rest
    for _ in range(count):
        ranks = [(), (1,), (8,), (16, 3), (33, 40)]  # 33: one rank beyond a step of 32
        yield Case(
            shapes=tuple((draw(sizes), draw(sizes), draw(ranks)) for _ in range(draw([1, 2, 4]))),
            live=draw([None, FLOAT, BF16, HALF]),
            layout=draw(["dense", "strided", "unaligned"]),
            bias=draw(["none", "plain", "shift", "last"]),
            decay=draw([0.9, 0.9996, 0.9, None]),
            reduction=draw(["mean", "sum", "relative"]),
            tensor_scale=draw([True, False]),
        )


CASES = [
    *sampled(40),
    *(Case(live=live, bias="shift", layout=layout) for live in (BF16, HALF) for layout in ("dense", "unaligned")),
    Case(((700, 8, (3,)), (8, 300, (3,)), (130, 136, (96, 96))), bias="shift", reduction="relative"),
]


class Placer:
    """Puts values where a case wants them, between NaNs that must stay; fenced if asked: "begin" or "end"."""

    def __init__(self, layout, device, fence=None):
        self.extra, self.device, self.fence, self.gaps = EXTRA[layout], device, fence, []
        self.generator = torch.Generator().manual_seed(1)

    def matrix(self, value, dtype=FLOAT):
        (rows, columns), (extra, first) = value.shape, self.extra
        first = 0 if self.fence else first
        if self.fence:
            buffer = guarded((rows * (columns + extra) - extra,), dtype, self.fence == "end")
        else:
            buffer = torch.full((first + rows * (columns + extra),), torch.nan, dtype=dtype, device=self.device)
        place = buffer.as_strided((rows, columns), (columns + extra, 1), first)
        place.copy_(value)
        self.gaps.append((buffer, place))
        return place

    def vector(self, value, dtype=FLOAT):
        """Contiguous where matrices are, otherwise a column."""
        if self.extra == (0, 0):
            return self.matrix(value[None], dtype)[0]
        return self.matrix(value[:, None], dtype)[:, 0]

    def normal(self, *shape, size=1.0):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64) * size

    def assert_gaps_untouched(self):
        for buffer, place in self.gaps:
            rest = buffer.clone()
            rest.as_strided(place.shape, place.stride(), place.storage_offset()).zero_()
            assert rest.isnan().sum() == rest.numel() - place.numel()


# ---- distances -------------------------------------------------------------------------------------------------------


def distances(case, place):
    """Records whose targets lie 1e-2 from their bases, as the products of their factors are."""
    records = []
    for out, columns, ranks in case.shapes:
        base = place.normal(out, columns)
        pairs = [(place.normal(out, r, size=0.1 / r**0.5), place.normal(r, columns, size=0.1 / r**0.5)) for r in ranks]
        own = case.live is not None
        values = {"target": base + place.normal(out, columns, size=1e-2), "base": base, "error": 0 * base + 7}
        fields = {name: place.matrix(value) for name, value in values.items()}
        fields["pairs"] = tuple((place.matrix(left), place.matrix(right)) for left, right in pairs)
        fields["live"] = place.matrix(base + place.normal(out, columns, size=1e-2), case.live) if own else None
        if case.bias != "none":
            bias = place.normal(out)
            near = lambda: bias + place.normal(out, size=1e-2)  # noqa: B023, E731
            fields |= {"target_bias": place.vector(near()), "base_bias": place.vector(bias)}
            fields["live_bias"] = place.vector(near(), case.live) if own else None
            fields["bias_gradient"] = place.vector(torch.zeros(out) + 7) if out != 5 else None
        if case.bias in ("shift", "last"):
            fields["shift_last"] = place.vector(place.normal(out, size=1e-2))
        if case.bias == "shift":
            depth = 1 + out % 19
            fields["shift"], fields["shift_vector"] = (
                place.matrix(place.normal(out, depth, size=0.1)),
                place.vector(place.normal(depth, size=0.1)),
            )
        records.append(Distance(**fields))
    return records


def new_results(count, device):
    return Results(torch.empty(count, 6, device=device), torch.empty(count, device=device),
                   torch.empty(count, device=device))  # fmt: skip


def run(case, place):
    """-> records, a copy of them from before, results, loss scale"""
    records = distances(case, place)
    copy = lambda t: t.double() if isinstance(t, torch.Tensor) else t  # noqa: E731
    before = [Distance(*(tuple(tuple(map(copy, p)) for p in f) if isinstance(f, tuple) else copy(f) for f in d))
              for d in records]  # fmt: skip
    results = new_results(len(records), place.device)
    scale = torch.tensor(64.5, device=place.device) if case.tensor_scale else 64.5
    tables = kernels.weight_distance_tables([records]).at(results)
    kernels.weight_distance_fwd(tables, case.decay, case.reduction, scale)
    return records, before, results, float(scale)


def expect(name, ours, exact, bound):
    """Every element within its bound."""
    excess = ((ours.double() - exact).abs() / (bound + 1e-30)).max().item()
    assert excess <= 1, f"{name}: an error of {excess:.3g} times its bound"


def followed(ours, target, live, decay):
    """The bound on a followed target's error; the exact one."""
    if live is None or decay is None:
        return target, 0 * target
    return decay * target + (1 - decay) * live, 2 * EPS * (target.abs() + live.abs())


def reduce(squared, moved, base, count, reduction):
    """(what the sum is multiplied by, the product) in float64"""
    factor = 1 / torch.maximum(moved, 1e-12 * base) if reduction == "relative" else 1.0
    factor = 1 / count if reduction == "mean" else factor
    return factor, factor * squared


def squares(*tensors):
    return torch.stack([t.double().square().sum() for t in tensors])


def verify(case, device):
    """Sums are compared with those of the errors that came out, and these, element by element, with float64's."""
    place = Placer(case.layout, device)
    records, before, results, scale = run(case, place)
    place.assert_gaps_untouched()
    for index, (now, then) in enumerate(zip(records, before)):
        expect("target", now.target, *followed(now.target, then.target, then.live, case.decay))
        target = now.target.double()  # its roundings are the target's, not the error's
        low = sum(left @ right for left, right in then.pairs)
        absolute = sum(left.abs() @ right.abs() for left, right in then.pairs)
        moved = then.base - target
        expect("error", now.error, low + moved, 8 * EPS * (absolute + moved.abs()))
        sums, exact = results.sums[index], squares(now.error, moved, then.base)
        expect("sums", sums[:3], exact, 1e-6 * exact)
        factor, loss = reduce(*exact, moved.numel(), case.reduction)
        expect("factor", results.factors[index], 2 * factor * scale, 2e-6 * 2 * factor * scale)
        if then.target_bias is None:
            assert not sums[3:].any()
        else:
            expect("bias", now.target_bias, *followed(now.target_bias, then.target_bias, then.live_bias, case.decay))
            moved = then.base_bias - now.target_bias.double()
            e, absolute = moved, moved.abs()
            if then.shift is not None:
                e = e + then.shift @ then.shift_vector
                absolute = absolute + then.shift.abs() @ then.shift_vector.abs()
            if then.shift_last is not None:
                e, absolute = e + then.shift_last, absolute + then.shift_last.abs()
            exact = squares(e, moved, then.base_bias)
            expect("bias sums", sums[3:], exact, 2e-6 * exact + 8 * EPS * squares(absolute))
            factor, bias_loss = reduce(*exact, e.numel(), case.reduction)
            loss = loss + bias_loss
            if then.bias_gradient is not None:
                factor = 2 * factor * scale
                expect("bias gradient", now.bias_gradient, factor * e, factor * (8 * EPS * absolute + 2e-6 * e.abs()))
        expect("loss", results.losses[index], loss, 3e-6 * loss)
        for name in ("base", "live", "base_bias", "live_bias", "shift", "shift_vector", "shift_last"):
            assert getattr(then, name) is None or torch.equal(getattr(now, name).double(), getattr(then, name)), name


# ---- products --------------------------------------------------------------------------------------------------------


def products(place, draw, count):
    """Random records of every kind; two in three add to what is there."""
    sizes = [1, 8, 63, 70, 96, 128, 130]
    records = []
    for _ in range(count):
        form, M, N = draw(["nn", "nt", "tn"]), draw(sizes), draw(sizes)
        extra = draw([True, False]) and form != "nt"  # a column that lies elsewhere
        terms = []
        for _ in range(draw([1, 1, 2, 3])):
            K = draw([1, 9, 33, 64, 96])
            left, right = (K, M) if form == "tn" else (M, K), (N, K) if form == "nt" else (K, N)
            right = (K, N - 1 if form == "nn" else N + 1) if extra and N > 1 else right
            last = place.vector(place.normal(K)) if form == "nn" and extra and N > 1 else None
            factor = place.vector(place.normal(1))[0] if draw([True, False]) else None
            terms.append(Term(place.matrix(place.normal(*left)), place.matrix(place.normal(*right)), factor, last))
        last = place.vector(place.normal(M)) if form == "tn" and extra and N > 1 else None
        records.append(Product(form, place.matrix(place.normal(M, N)), tuple(terms), draw([True, True, False]), last))
    return records


def defined(product, change=lambda t: t):
    """(M, columns) in float64, the column that lies elsewhere included; of changed tensors if asked."""
    wide = lambda t: change(t.detach().double())  # noqa: E731
    last = [] if product.result_last is None else [product.result_last[:, None]]
    total = wide(torch.cat([product.result, *last], 1))
    total = total if product.accumulate else torch.zeros_like(total)
    for term in product.terms:
        right = term.right if term.right_last is None else torch.cat([term.right, term.right_last[:, None]], 1)
        left, right = wide(term.left), wide(right)
        factor = 1.0 if term.factor is None else wide(term.factor)
        total += factor * (left.t() if product.form == "tn" else left) @ (right.t() if product.form == "nt" else right)
    return total


def multiply(records):
    kernels.weight_distance_fwd(kernels.weight_distance_tables([records]).at(None), None, "mean", 1.0)


def verify_products(seed, layout, device):
    place = Placer(layout, device)
    place.generator.manual_seed(seed)
    records = products(place, random.Random(seed).choice, 6)
    exact, absolute = ([defined(p, change) for p in records] for change in (lambda t: t, torch.abs))
    multiply(records)
    place.assert_gaps_untouched()
    for product, value, bound in zip(records, exact, absolute):
        last = [] if product.result_last is None else [product.result_last[:, None]]
        expect(f"{product.form} product", torch.cat([product.result, *last], 1), value, 8 * EPS * bound)
