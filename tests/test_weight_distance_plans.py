"""What a call of `weight_distance` keeps for the next one of its kind never shows: changed calls are as in a process
of their own, to the last bit."""

import gc
import threading
import weakref

import pytest
import torch
from test_weight_distance import SHAPES, problem
from torch.nn import Parameter

from peft_kernels import momentum_weight_distance, use_backend, weight_distance
from peft_kernels.looks import in_python
from peft_kernels.ops import weight_distance as op

NAMES = ("target", "base", "left", "right")


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def no_plans():
    op._plans.clear()


def call(given, backend, live=None, reduction="mean", decay=0.9):
    """The loss, the gradients of whatever requires them, and the teachers that have moved, as copies."""
    lists = [given[name] for name in NAMES]
    target, base, left, right = lists
    options = {"reduction": reduction, "backend": backend}
    if live is None:
        loss = weight_distance(target, base, left, right, **options)
    else:
        loss = momentum_weight_distance(live, target, base, left, right, decay=decay, **options)
    tensors = [t for each in lists for t in ([each] if isinstance(each, torch.Tensor) else each)]
    wanted = [t for t in {id(t): t for t in tensors}.values() if t.requires_grad]
    grads = torch.autograd.grad(2 * loss, wanted) if loss.requires_grad else []
    return [loss.detach(), *grads, *(t.clone() for t in tensors if live is not None and not t.requires_grad)]


def copied(value):
    """The same strides and place behind a multiple of 16 bytes; one copy for each tensor, however often it is there."""
    known = {}

    def copy(t):
        if id(t) not in known:
            storage = torch.empty(t.untyped_storage().nbytes() // t.element_size(), dtype=t.dtype, device=t.device)
            storage.copy_(torch.as_strided(t.detach(), storage.shape, (1,), 0))
            known[id(t)] = storage.as_strided(t.shape, t.stride(), t.storage_offset()).requires_grad_(t.requires_grad)
        return known[id(t)]

    if isinstance(value, torch.Tensor):
        return copy(value)
    return {name: copied(each) for name, each in value.items()} if isinstance(value, dict) else [*map(copy, value)]


DIFFERENT, SAME = [(40, 24, 5), (24, 40, 2), (33, 48, 8)], [(24, 40, 8)] * 4


def made(device, shapes=DIFFERENT):
    return dict(zip(NAMES, problem(shapes, device)))


def moved(given, name, index, change):
    """One tensor as `change` makes it of what it was."""
    t = given[name][index]
    given[name][index] = change(t.detach()).requires_grad_(t.requires_grad)


def wider(t):
    wide = torch.full((t.shape[0], t.shape[1] + 16), float("nan"), device=t.device)
    return wide[:, : t.shape[1]].copy_(t)


def shifted(t):
    """No multiple of 16 bytes."""
    return torch.full((t.numel() + 1,), float("nan"), device=t.device)[1:].view(t.shape).copy_(t)


def other_sizes(given):
    given.update(made(given["base"][0].device, SAME))


def fewer(given):
    for each in given.values():
        del each[1]


def reordered(given):
    for each in given.values():
        each.reverse()


def one_base(given):
    other_sizes(given)
    given["base"] = given["base"][0]


def stacks(given):
    other_sizes(given)
    for name, each in given.items():
        given[name] = torch.stack(each).detach().requires_grad_(each[0].requires_grad)


def stacks_apart(given):
    stacks(given)
    given["left"] = torch.cat([given["left"].detach()] * 2, dim=2)[:, :, :8].requires_grad_()


def tied(given):
    other_sizes(given)
    given["left"] = given["left"][:2] * 2


def in_place(given):
    for each in given.values():
        for t in each:
            t.data.mul_(1.5)


def elsewhere(given):
    for each in given.values():
        for t in each:
            t.data = t.data.clone() * 1.25


def turned(given):
    """Of four matrices that have been there before."""
    for t in (*given["target"], *given["base"]):
        t.data = t.data.view(40, 24)
    given["left"] = [torch.cat([t.detach()] * 2)[:40].requires_grad_() for t in given["left"]]
    given["right"] = [t.detach().flatten()[: 8 * 24].view(8, 24).requires_grad_() for t in given["right"]]


def parameters(given):
    given["left"] = [Parameter(t.data) for t in given["left"]]


CHANGES = {
    "nothing": lambda given: None,
    "sizes": other_sizes,
    "number of matrices": fewer,
    "order": reordered,
    "one base": one_base,
    "stacks": stacks,
    "stacks with gaps": stacks_apart,
    "one left for two matrices": tied,
    "numbers": in_place,
    "addresses": elsewhere,
    "sizes in the same place": turned,
    "parameters": parameters,
    "strides of a target": lambda given: moved(given, "target", 0, wider),
    "strides of a right": lambda given: moved(given, "right", 1, wider),
    "a transposed left": lambda given: moved(given, "left", 0, lambda t: t.t().contiguous().t()),
    "a transposed base": lambda given: moved(given, "base", 2, lambda t: t.t().contiguous().t()),
    "alignment of a target": lambda given: moved(given, "target", 1, shifted),
    "alignment of a left": lambda given: moved(given, "left", 0, shifted),
    "a left without a gradient": lambda given: given["left"][1].requires_grad_(False),
    "rights without gradients": lambda given: [t.requires_grad_(False) for t in given["right"]],
    "no gradient at all": lambda given: [t.requires_grad_(False) for t in (*given["left"], *given["right"])],
    "a base with a gradient": lambda given: given["base"][1].requires_grad_(),
    "targets with gradients": lambda given: [t.requires_grad_() for t in given["target"]],
    "one base with a gradient": lambda given: (one_base(given), given["base"].requires_grad_()),
    "a stack with a gradient": lambda given: (stacks(given), given["target"].requires_grad_()),
}


OF_SAME = ("sizes in the same place", "one left for two matrices")


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_call_is_as_the_first_of_its_kind(change, backend, device):
    given = made(device, SAME if change in OF_SAME else DIFFERENT)
    for _ in range(2):
        call(given, backend)
    CHANGES[change](given)
    again = [call(copied(given), backend) for _ in range(2)]
    again.append(call(given, backend))
    op._plans.clear()
    first = call(copied(given), backend)
    assert first[0].isfinite() and all(all(map(torch.equal, first, each)) for each in again)


MUTANTS = {  # a part of the signature that is left out, and a change that shows it
    "sizes": "sizes in the same place",
    "strides": "strides of a target",
    "needs": "a base with a gradient",
}


@pytest.mark.kernels
@pytest.mark.parametrize("field", MUTANTS)
def test_a_part_of_the_signature_is_missed(field, monkeypatch, device):
    signature, missed = op._signature, {field: None}
    if field == "needs":
        monkeypatch.setattr(op, "_signature", lambda *call: signature(*call)._replace(**missed))
    else:
        monkeypatch.setattr(op, "looks", lambda tensors: in_python(tensors, False)._replace(**missed))
    with pytest.raises((AssertionError, RuntimeError)):
        test_a_changed_call_is_as_the_first_of_its_kind(MUTANTS[field], "triton", device)


@pytest.mark.kernels
def test_alignment_is_promised_where_it_is(device):
    common = pytest.importorskip("peft_kernels.triton_kernels.common")
    given, promises = made(device, SAME), []
    for change in ("nothing", "alignment of a target", "nothing", "alignment of a left"):
        now = copied(given)
        CHANGES[change](now)
        with common.record_launches(run=False) as launches:
            call(now, "triton")
        distance = next(each.constants for each in launches if "THIN_ALIGNED" in each.constants)
        promises.append((distance["ALIGNED"], distance["THIN_ALIGNED"]))
    assert promises == [(True, True), (False, True), (True, True), (True, False)]


@pytest.mark.parametrize("change", ["nothing", "sizes", "numbers", "addresses", "alignment of a target", "stacks"])
@pytest.mark.parametrize("live_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_teachers_move_as_the_first_time(change, live_dtype, backend, device):
    given = made(device)
    lives = lambda: [(1.01 * t.detach()).to(live_dtype) for t in given["base"]]  # noqa: E731
    for _ in range(2):
        call(given, backend, lives())
    CHANGES[change](given)
    live, reduction, decay = lives(), "relative", 0.5
    again = call(copied(given), backend, live, reduction, decay)
    op._plans.clear()
    assert all(map(torch.equal, again, call(copied(given), backend, live, reduction, decay)))


@pytest.mark.kernels
def test_numbers_and_backends_are_no_part_of_what_is_kept(device):
    given = made(device)
    for reduction in ("mean", "sum", "relative", "mean"):
        for backend in ("torch", "triton"):
            with use_backend(backend):
                again = call(given, "auto", reduction=reduction)
            op._plans.clear()
            assert all(map(torch.equal, again, call(given, backend, reduction=reduction)))
    wide = {name: [t.detach().double() for t in each] for name, each in given.items()}
    assert call(wide, "torch")[0].dtype == torch.float64


def test_gradients_only_where_they_are_recorded(backend, device):
    given = made(device)
    loss, *_ = call(given, backend)
    with torch.no_grad():
        silent = call(given, backend)
    assert len(silent) == 1 and torch.equal(silent[0], loss) and len(call(given, backend)) == 7


def test_what_was_right_once_is_refused_when_it_is_wrong(backend, device):
    """Of the same sizes and strides as the calls before."""
    given = made(device)
    live = [t.detach().clone() for t in given["base"]]
    for _ in range(2):
        call(given, backend, live)
    before = [t.clone() for t in given["target"]]
    shared = {
        "live": ([*live[:2], given["target"][2]], given["target"]),
        "twice": (live[:1] * 3, [given["target"][0]] * 3),
    }
    for lives, teachers in shared.values():
        with pytest.raises(ValueError, match=r"^teacher: .*(shares its memory|expected)"):
            call(given | {"target": teachers}, backend, lives)
    with pytest.raises(ValueError, match=r"^teacher: takes no gradient"):
        call(given | {"target": [t.clone().requires_grad_() for t in given["target"]]}, backend, live)
    with torch.inference_mode():
        made_there = [t.clone() for t in given["target"]]
    with pytest.raises(ValueError, match=r"^teacher: .*inference mode"):
        call(given | {"target": made_there}, backend, live)
    for name, change in (("left", torch.Tensor.double), ("base", lambda t: t.to("meta")), ("right", lambda t: t[:-1])):
        with pytest.raises((ValueError, TypeError), match=rf"^({name}|target|left|right)\b"):
            call(given | {name: [change(t.detach()) for t in given[name]]}, backend)
    with pytest.raises(ValueError, match=r"^reduction"):
        call(given, backend, reduction="max")
    assert all(map(torch.equal, before, given["target"]))


def test_what_was_right_once_is_looked_at_once(monkeypatch, device):
    given = made(device)
    live = [t.detach().clone() for t in given["base"]]
    call(given, "torch", live)
    monkeypatch.setattr(op, "check_changed", None)
    call(given, "torch", live)


class Other(torch.Tensor):
    """Plain, and of another type."""


@pytest.mark.parametrize("name", NAMES)
def test_other_types_are_asked_every_time(name, backend, device):
    given = made(device)
    first = call(copied(given), backend)
    op._plans.clear()
    given[name] = [t.detach().as_subclass(Other).requires_grad_(t.requires_grad) for t in given[name]]
    again = [call(given, backend) for _ in range(2)]
    assert not op._plans and all(all(map(torch.equal, first, each)) for each in again)


def test_neither_tensors_nor_memory_are_kept(backend, device):
    given = made(device)
    call(given, backend)
    kept = [weakref.ref(t) for each in given.values() for t in each]
    del given
    gc.collect()
    assert op._plans and not any(reference() is not None for reference in kept)


def test_an_address_may_be_taken_by_another_tensor(backend, device):
    """As an allocator hands out what was freed, at once, to what is as large."""
    given = made(device, SAME)
    flat, targets = torch.empty(4, 24, 40, device=device), torch.stack(given["target"])
    results = []
    for seed in range(3):
        given["target"] = [*flat.copy_(targets * (1 + seed))]
        results.append(call(given, backend))
        op._plans.clear()
        assert all(map(torch.equal, results[-1], call(given, backend)))
    assert len({loss.item() for loss, *_ in results}) == 3


def test_no_more_is_kept_than_so_many_kinds_of_calls(monkeypatch, device):
    monkeypatch.setattr(op, "MOST_PLANS", 2)
    first = call(made(device), "torch")
    for shapes in (*(SHAPES[name] for name in ("ragged", "tall", "one")), DIFFERENT):
        last = call(made(device, shapes), "torch")
        assert 1 <= len(op._plans) <= 2
    assert all(map(torch.equal, first, last))


def test_threads_keep_apart(device):
    expected, found = {name: call(made(device, SHAPES[name]), "torch") for name in SHAPES}, {}
    op._plans.clear()

    def run(name):
        given = made(device, SHAPES[name])
        found[name] = [call(given, "torch") for _ in range(5)]

    threads = [threading.Thread(target=run, args=(name,)) for name in SHAPES]
    for act in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            act(thread)
    assert all(all(map(torch.equal, expected[name], each)) for name in SHAPES for each in found[name])
