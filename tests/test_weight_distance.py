"""`weight_distance` and `momentum_weight_distance` on every backend that runs here, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from imitation_cases import relative
from lowrank_cases import INTERPRETED
from torch._dynamo.testing import CompileCounter

from peft_kernels import momentum_weight_distance, weight_distance
from peft_kernels.ops import weight_distance as op
from peft_kernels.ops.weight_distance import weight_distance_reference

REDUCTIONS = ("mean", "sum", "relative")
SHAPES = {  # (out, in, rank) of each matrix
    "one": [(40, 24, 5)],
    "one element": [(1, 1, 1)],
    "ragged": [(63, 65, 3)],
    "tall": [(300, 16, 8)],
    "wide": [(16, 760, 33)],
    "rank of a hybrid": [(96, 96, 192)],
    "different shapes": [(40, 24, 5), (24, 40, 2), (63, 96, 8)],
    "shapes in turn": [(40, 24, 5), (24, 40, 5), (40, 24, 5), (24, 40, 5), (8, 8, 8)],
    "36 of them": [(63, 40, 8)] * 36,
}


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


def problem(shapes, device, dtype=torch.float32, drift=1e-2):
    """target, base, left, right: lists of matrices; what trains requires grad."""
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    lists = [[], [], [], []]
    for out, columns, rank in shapes:
        base = random(out, columns) / columns**0.5
        left, right = random(out, rank) * (drift / rank) ** 0.5, random(rank, columns) * (drift / rank) ** 0.5
        matrices = (base + drift * random(out, columns), base, left, right)
        for each, matrix in zip(lists, matrices):
            each.append(matrix.to(device, dtype))
    for matrix in (*lists[2], *lists[3]):
        matrix.requires_grad_()
    return lists


def oracle(target, base, left, right, reduction, dtype=torch.float64):
    """Loss, and gradients by every left and right, by autograd of the definition."""
    lists = [[t.detach().to(dtype) for t in each] for each in (target, base, left, right)]
    thin = [t.requires_grad_() for each in lists[2:] for t in each]
    loss = sum(weight_distance_reference(*matrices, reduction=reduction) for matrices in zip(*lists))
    return loss.detach(), torch.autograd.grad(loss, thin)


def gradients(loss, left, right):
    return torch.autograd.grad(loss, [*left, *right])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shapes", SHAPES)
def test_loss_and_gradients(backend, shapes, reduction, device):
    """The loss within 1e-6, gradients within 1e-5 of float64's."""
    target, base, left, right = problem(SHAPES[shapes], device)
    loss = weight_distance(target, base, left, right, reduction=reduction, backend=backend)
    exact, grads = oracle(target, base, left, right, reduction)
    assert loss.dim() == 0 and abs(loss.item() / exact.item() - 1) <= 1e-6
    assert all(relative(ours, grad) <= 1e-5 for ours, grad in zip(gradients(loss, left, right), grads))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("live_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_teacher_follows_in_the_same_pass(backend, live_dtype, reduction, device):
    """In place by the hand formula; live is not changed; the loss is from the teacher as it is then."""
    teacher, base, left, right = problem(SHAPES["different shapes"], device)
    live = [(t + 1e-2 * torch.randn_like(t)).to(live_dtype) for t in teacher]
    before, kept = [t.clone() for t in teacher], [t.clone() for t in live]
    loss = momentum_weight_distance(live, teacher, base, left, right, decay=0.9, reduction=reduction, backend=backend)
    for now, then, own in zip(teacher, before, live):
        torch.testing.assert_close(now, 0.9 * then + 0.1 * own.float(), rtol=3e-7, atol=1e-9)
    assert all(map(torch.equal, live, kept))
    exact, grads = oracle(teacher, base, left, right, reduction)
    assert abs(loss.item() / exact.item() - 1) <= 1e-6
    assert all(relative(ours, grad) <= 1e-5 for ours, grad in zip(gradients(loss, left, right), grads))


def test_vilts_width(backend, device):
    width = 384 if INTERPRETED and backend == "triton" else 768  # six tiles either way
    target, base, left, right = problem([(width, width, 192)], device)
    loss = weight_distance(target, base, left, right, backend=backend)
    exact, grads = oracle(target, base, left, right, "mean")
    assert abs(loss.item() / exact.item() - 1) <= 1e-6
    assert all(relative(ours, grad) <= 1e-5 for ours, grad in zip(gradients(loss, left, right), grads))


@settings(max_examples=20, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 140), st.integers(1, 40)), min_size=1, max_size=4),
    reduction=st.sampled_from(REDUCTIONS),
    backend=st.sampled_from(["torch", "triton"]),
)
@pytest.mark.kernels
def test_any_shapes(shapes, reduction, backend):
    check_shapes(shapes, reduction, backend)


def check_shapes(shapes, reduction, backend):
    """Loss and gradients of random matrices, one of each shape (out, in, rank), against float64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target, base, left, right = problem(shapes, device)
    loss = weight_distance(target, base, left, right, reduction=reduction, backend=backend)
    exact, grads = oracle(target, base, left, right, reduction)
    assert abs(loss.item() / exact.item() - 1) <= 2e-6
    for ours, grad in zip(gradients(loss, left, right), grads):
        assert relative(ours, grad) <= 2e-5


def test_gradients_by_finite_differences(device):
    target, base, left, right = (
        torch.stack(matrices).detach().requires_grad_()
        for matrices in problem([(4, 5, 2)] * 2, device, torch.float64, 1.0)
    )
    for reduction in ("mean", "sum"):
        assert torch.autograd.gradcheck(
            lambda *t, reduction=reduction: weight_distance(*t, reduction=reduction), (target, base, left, right)
        )


def test_close_to_the_target(backend, device):
    """Factors within 1e-3 of the target: no worse than 1.25 × the direct form in float32 torch."""
    target, base, left, right = problem([(96, 96, 8)] * 3, device)
    target = [b + (lo @ r).detach() * (1 + 1e-3 * torch.randn_like(b)) for b, lo, r in zip(base, left, right)]
    loss = weight_distance(target, base, left, right, backend=backend)
    ours = gradients(loss, left, right)
    exact, grads = oracle(target, base, left, right, "mean")
    direct = sum((lo @ r + (b - t)).square().mean() for t, b, lo, r in zip(target, base, left, right))
    peers = gradients(direct, left, right)
    assert abs(loss.item() / exact.item() - 1) <= 1.25 * abs(direct.item() / exact.item() - 1) + 1e-6
    worst = max(relative(a, b) for a, b in zip(peers, grads))
    assert all(relative(a, b) <= 1.25 * worst + 1e-7 for a, b in zip(ours, grads))


# ---- what users lean on ---------------------------------------------------------------------------------------------


def test_stacks_lists_and_one_base(backend, device):
    target, base, left, right = problem([(40, 24, 5)] * 3, device)
    base = [base[0]] * 3
    listed = weight_distance(target, base, left, right, backend=backend)
    stacks = [torch.stack(each).detach().requires_grad_() for each in (left, right)]
    stacked = weight_distance(torch.stack(target), base[0], *stacks, backend=backend)
    assert torch.equal(listed, stacked)
    grads = gradients(listed, left, right)
    for ours, parts in zip(torch.autograd.grad(stacked, stacks), (grads[:3], grads[3:])):
        assert torch.equal(ours, torch.stack(parts))


def test_gradient_by_target_and_base(backend, device):
    target, base, left, right = problem(SHAPES["different shapes"], device)
    wide = [t.requires_grad_() for t in (*target, *base)]
    ours = torch.autograd.grad(3 * weight_distance(target, base, left, right, backend=backend), wide)
    exact = sum(weight_distance_reference(*matrices) for matrices in zip(target, base, left, right))
    assert all(relative(a, b) <= 1e-5 for a, b in zip(ours, torch.autograd.grad(3 * exact, wide)))


def test_only_what_is_needed(backend, device):
    target, base, left, right = problem(SHAPES["different shapes"], device)
    whole = gradients(weight_distance(target, base, left, right, backend=backend), left, right)
    left[1].requires_grad_(False)
    some = weight_distance(target, base, left, right, backend=backend)
    assert torch.equal(torch.autograd.grad(some, right[1])[0], whole[4])
    with torch.no_grad():
        assert torch.equal(weight_distance(target, base, left, right, backend=backend), some)


def test_strides(backend, device):
    """Columns of a wider buffer and transposed factors give what contiguous ones give."""
    target, base, left, right = ([t.detach() for t in each] for each in problem([(40, 24, 5)], device))
    plain = weight_distance(target, base, left, right, backend=backend)
    wide = torch.full((40, 60), float("nan"), device=device)
    placed = [wide[:, 3:27].copy_(target[0])], [wide[:, 30:54].copy_(base[0])]
    transposed = [left[0].t().contiguous().t()], [right[0].t().contiguous().t()]
    torch.testing.assert_close(plain, weight_distance(*placed, *transposed, backend=backend), rtol=1e-6, atol=0)


def test_bits_repeat(backend, device):
    results = []
    for _ in range(2):
        matrices = problem(SHAPES["different shapes"], device)
        loss = weight_distance(*matrices, backend=backend)
        results.append([loss, *gradients(loss, *matrices[2:])])
    assert all(map(torch.equal, *results))


@pytest.mark.kernels
def test_three_launches_for_any_number_of_matrices(device):
    common = pytest.importorskip("peft_kernels.triton_kernels.common")
    with common.record_launches() as launches:
        weight_distance(*problem(SHAPES["different shapes"], device), backend="triton")
    assert len(launches) == 3  # the pass over the weights, its sums, all products; and torch adds up the losses


def test_relative_to_a_target_that_never_left_zeros(backend, device):
    zeros = torch.zeros(3, 4, device=device)
    left, right = torch.ones(3, 1, device=device, requires_grad=True), torch.ones(1, 4, device=device)
    loss = weight_distance(zeros, zeros, left, right, reduction="relative", backend=backend)
    loss.backward()
    assert loss == 0 and not left.grad.any()


@pytest.mark.kernels
def test_no_gradient_product_without_a_gradient(device):
    common = pytest.importorskip("peft_kernels.triton_kernels.common")
    with torch.no_grad(), common.record_launches() as launches:
        weight_distance(*problem(SHAPES["different shapes"], device), backend="triton")
    assert len(launches) == 2


def test_not_a_number_stays_one(backend, device):
    target, base, left, right = problem([(40, 24, 5)], device)
    target[0][3, 4] = float("nan")
    loss = weight_distance(target, base, left, right, backend=backend)
    assert loss.isnan() and gradients(loss, left, right)[0][3].isnan().all()


def test_autocast_changes_nothing(backend, device):
    matrices = problem([(40, 24, 5)], device)
    plain = weight_distance(*matrices, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(plain, weight_distance(*matrices, backend=backend))


def test_second_derivatives_are_refused(device):
    matrices = problem([(40, 24, 5)], device)
    with pytest.raises(RuntimeError, match="first derivatives"):
        torch.autograd.grad(weight_distance(*matrices), matrices[2], create_graph=True)


def test_a_teachers_change_is_noticed_by_autograd(device):
    teacher, base, left, right = problem([(8, 6, 2)], device)
    kept = (teacher[0] * torch.ones(1, device=device, requires_grad=True)).sum()
    momentum_weight_distance([teacher[0].clone()], teacher, base, left, right, decay=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


# ---- mutants of the plain-torch backend ------------------------------------------------------------------------------


def biased_sums(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_square", lambda t: t.square().sum() * 1.001)


def wrong_factor(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_coefficient", lambda sums, count, reduction: 1 / (count + 1))


def flipped_products(kernels, monkeypatch):
    add = kernels._add_product
    monkeypatch.setattr(kernels, "_add_product", lambda result, *rest: add(result.flip(0), *rest))


@pytest.mark.parametrize("mutant", [biased_sums, wrong_factor, flipped_products])
def test_mutant_is_noticed(mutant, monkeypatch, device):
    from peft_kernels.torch_kernels import weight_distance as kernels

    test_loss_and_gradients("torch", "different shapes", "mean", device)
    mutant(kernels, monkeypatch)
    with pytest.raises(AssertionError):
        test_loss_and_gradients("torch", "different shapes", "mean", device)


@pytest.mark.parametrize("momentum", [False, True])
def test_graphs_break_around_it_once(momentum, device):
    """Nothing of it is traced: what it keeps between calls, and a teacher that moves, are no graph's business."""
    torch._dynamo.reset()
    target, base, left, right = problem(SHAPES["different shapes"], device)
    counter, before = CompileCounter(), [t.clone() for t in target]

    @torch.compile(backend=counter)
    def distance(weight):
        if momentum:
            return weight * momentum_weight_distance(base, target, base, left, right, decay=0.5)
        return weight * weight_distance(target, base, left, right)

    for step in (1, 2):
        found = distance(torch.ones((), device=device))
        kept = 0.5**step if momentum else 1
        for moved, first, b in zip(target, before, base):
            torch.testing.assert_close(moved, kept * first + (1 - kept) * b)
        torch.testing.assert_close(found, sum(map(weight_distance_reference, target, base, left, right)))
    assert counter.frame_count == counter.op_count == 1


def test_one_row_has_no_next_one(backend, device):
    """Its stride says nothing, whatever it is."""
    live, base, left, right = (torch.randn(shape, device=device) for shape in ((1, 40), (1, 40), (1, 2), (2, 40)))
    whole = base + 0.5
    row = whole.clone().as_strided((1, 40), (1, 1))
    losses = [momentum_weight_distance(live, t, base, left, right, decay=0.5, backend=backend) for t in (row, whole)]
    assert torch.equal(*losses) and torch.equal(row, whole)


# ---- bad input ------------------------------------------------------------------------------------------------------

ONES = torch.ones
BAD = [
    ("target", {"target": "weights"}, TypeError),
    ("target", {"target": ONES(8, 11)}, ValueError),
    ("target", {"target": []}, ValueError),
    ("target", {"target": ONES(8, 12, dtype=torch.bfloat16)}, TypeError),
    ("base", {"base": ONES(2, 8, 12)}, ValueError),
    ("base", {"base": ONES(8)}, TypeError),
    ("left", {"left": ONES(0, 2)}, ValueError),
    ("left", {"left": ONES(8, 2, dtype=torch.int64)}, TypeError),
    ("right", {"right": ONES(3, 12)}, ValueError),
    ("right", {"right": [ONES(2, 12), ONES(2, 12)]}, ValueError),
    ("right", {"right": ONES(2, 12, device="meta")}, ValueError),
    ("right", {"right": ONES(2, 12, dtype=torch.float64)}, TypeError),
    ("reduction", {"reduction": "max"}, ValueError),
    ("backend", {"backend": "cublas"}, ValueError),
]


@pytest.mark.parametrize(("argument", "change", "kind"), BAD, ids=[f"{i}-{row[0]}" for i, row in enumerate(BAD)])
def test_weight_distance_names_the_argument(argument, change, kind, monkeypatch):
    monkeypatch.setattr(op, "_WeightDistance", None)  # nothing may run
    good = {"target": ONES(8, 12), "base": ONES(8, 12), "left": ONES(8, 2), "right": ONES(2, 12)}
    with pytest.raises(kind, match=rf"^{argument}\b"):
        weight_distance(**good | change)


THREE = {"live": ONES(3, 8, 12), "left": ONES(3, 8, 2), "right": ONES(3, 2, 12)}
SHARED = {"base": ONES(8, 12), "live": ONES(8, 12)}


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("teacher", {"teacher": ONES(8, 12, dtype=torch.bfloat16)}),
        ("teacher", {"teacher": ONES(8, 12, requires_grad=True)}),
        ("teacher", {"teacher": ONES(12, 8).t()}),
        ("teacher", {"teacher": ONES(12).expand(8, 12)}),
        ("teacher", THREE | {"teacher": ONES(1, 8, 12).expand(3, 8, 12)}),
        ("teacher", SHARED | {"teacher": SHARED["base"]}),
        ("teacher", SHARED | {"teacher": SHARED["live"]}),
        ("live", {"live": ONES(8, 11)}),
        ("live", {"live": ONES(8, 12, dtype=torch.int8)}),
        ("live", {"live": [ONES(8, 12)] * 2}),
        ("decay", {"decay": 1.1}),
        ("decay", {"decay": "0.9"}),
    ],
)
def test_momentum_weight_distance_names_the_argument(argument, change, monkeypatch):
    monkeypatch.setattr(op, "_WeightDistance", None)
    good = {"live": ONES(8, 12), "teacher": ONES(8, 12), "base": ONES(8, 12), "left": ONES(8, 2), "right": ONES(2, 12)}
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}\b"):
        momentum_weight_distance(**good | {"decay": 0.9} | change)
