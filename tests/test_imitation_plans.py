"""What a step keeps with the groups never shows: changed groups are as new ones, to the last bit."""

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
from imitation_cases import Layer, adapters
from torch.nn import Parameter

from peft_kernels import use_backend
from peft_kernels.imitation import imitation_step, step
from peft_kernels.looks import in_python

HYBRID, FC2, LORA = Layer((24, 40), 24, 5, 3), Layer((24,), 40, 4, 3, placement="output"), Layer((24,), 24, 4, None)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


def stepped(groups, backend, **options):
    """Everything that a step gives or changes, as copies."""
    options = {"decay": 0.9, "backend": backend, "return_errors": True} | options
    results = [*imitation_step(groups, **options)]
    results += [t.grad for t in adapters(groups)]
    results += [t for group in groups for t in (*group.teacher, *(group.teacher_bias or ()))]
    return [t.clone() for t in results]


def made(device):
    return [layer.group(device, seed=seed) for seed, layer in enumerate((HYBRID, FC2, LORA))]


def replaced(groups):
    groups[0].teacher[1] = groups[0].teacher[1] * 1.5
    groups[1].bias0 = [t * 1.5 for t in groups[1].bias0]


def same_memory(groups):
    groups[0].down[0] = Parameter(groups[0].down[0].data)


def elsewhere(groups):
    """What was there before is kept, so that what wrongly goes there finds something."""
    groups[0].before = [t.data for group in groups for t in group.tensors()]
    for group in groups:
        for t in group.tensors():
            t.data = 1.5 * t.data


def another_dtype(groups):
    for group in groups:
        for t in (*group.live, *(group.live_bias or ())):
            t.data = t.data.bfloat16()


def another_half(groups):
    """What was freed is taken by the next that is as large."""
    another_dtype(groups)
    stepped(groups, "triton")
    for group in groups:
        for t in (*group.live, *(group.live_bias or ())):
            t.data = t.data.view(torch.float16)
            t.data.copy_(torch.full_like(t, 0.25))


def exchanged(groups):
    groups[0].down.reverse()


def strided(groups):
    wide = torch.full((24, 40), float("nan"), device=groups[0].weight0[0].device)
    groups[0].weight0[0].data = wide[:, :24].copy_(groups[0].weight0[0])


def other_strides(groups):
    """In the same memory."""
    strided(groups)
    stepped(groups, "triton")
    weight0 = groups[0].weight0[0]
    values = weight0.clone()
    weight0.data = weight0.data.as_strided((24, 24), (32, 1))
    weight0.copy_(values)


def frozen(groups):
    for t in (groups[0].up[1], groups[1].transform.up_bias, groups[2].down[0]):
        t.requires_grad_(False).grad = None


def without_bias(groups):
    groups[1].live_bias = groups[1].teacher_bias = groups[1].bias0 = None


def without_pairs(groups):
    groups[0].down = groups[0].up = None


def other_placement(groups):
    """A square transform fits on either side."""
    groups[0].live, groups[0].teacher, groups[0].weight0 = ([each[0]] for each in (groups[0].live, groups[0].teacher,
                                                                                  groups[0].weight0))  # fmt: skip
    for name in ("live_bias", "teacher_bias", "bias0", "down", "up"):
        setattr(groups[0], name, getattr(groups[0], name)[:1])
    groups[0].placement = "output"


def no_gradients(groups):
    for t in adapters(groups):
        t.grad = None


def some_gradients(groups):
    for t in groups[0].down:
        t.grad = None


def own_gradients(groups):
    for t in adapters(groups):
        t.grad = torch.ones_like(t)


def moved_gradients(groups):
    for t in adapters(groups):
        t.grad.data = t.grad.data.clone()


def moved_and_dropped(groups):
    """Own gradients, which the next step takes again, are not where the last one left them."""
    no_gradients(groups)
    stepped(groups, groups[0].plan.plans[0].backend)
    moved_gradients(groups)
    no_gradients(groups)


def turned_and_dropped(groups):
    no_gradients(groups)
    stepped(groups, groups[0].plan.plans[0].backend)
    for t in adapters(groups):
        t.grad.t_()
    no_gradients(groups)


def gradients_by_columns(groups):
    """After gradients in place were added to, whose rows are neighbours."""
    stepped(groups, groups[0].plan.plans[0].backend)
    for t in groups[0].down:
        wide = torch.zeros(t.shape[0], t.shape[1] + 3, device=t.device)
        t.grad = wide[:, : t.shape[1]].copy_(t.grad)


def nothing_trains(groups):
    for t in adapters(groups):
        t.requires_grad_(False).grad = None


def numbers(groups):
    for group in groups:
        for t in group.tensors():
            t.data.mul_(1.25)


CHANGES = {
    "nothing": lambda groups: None,
    "tensors": replaced,
    "a parameter in the same memory": same_memory,
    "addresses": elsewhere,
    "dtype of what is followed": another_dtype,
    "dtype in the same memory": another_half,
    "order": exchanged,
    "strides": strided,
    "other strides": other_strides,
    "what trains": frozen,
    "nothing trains": nothing_trains,
    "a bias less": without_bias,
    "pairs less": without_pairs,
    "placement": other_placement,
    "a group less": lambda groups: groups.pop(1),
    "order of groups": lambda groups: groups.reverse(),
    "gradients dropped": no_gradients,
    "some gradients dropped": some_gradients,
    "gradients of one's own": own_gradients,
    "gradients elsewhere": moved_gradients,
    "gradients in a wider matrix": gradients_by_columns,
    "gradients elsewhere and dropped": moved_and_dropped,
    "gradients turned and dropped": turned_and_dropped,
    "numbers": numbers,
}


def as_new(groups):
    """Copies leave plans behind; a copied parameter's gradient is a copy, too."""
    new = copy.deepcopy(groups)
    for t, other in zip(adapters(groups), adapters(new)):
        other.grad = None if t.grad is None else t.grad.clone()
    assert all(group.plan is None for group in new)
    return new


@pytest.mark.parametrize("change", CHANGES)
def test_changed_groups_are_as_new_ones(change, backend, device):
    groups = made(device)
    stepped(groups, backend)
    CHANGES[change](groups)
    new = as_new(groups)
    for _ in range(2):
        assert all(map(torch.equal, stepped(groups, backend), stepped(new, backend)))


@pytest.mark.kernels
def test_arguments_are_no_part_of_what_is_kept(device):
    groups = made(device)
    scale = torch.tensor(8.0, device=device)
    for options in (
        {}, {"reduction": "sum"}, {"reduction": "relative"}, {"decay": 0.5}, {"update_teacher": False},
        {"loss_scale": 4.0}, {"loss_scale": scale}, {"loss_scale": scale.half()}, {},
    ):  # fmt: skip
        for backend in ("triton", "torch"):
            new = as_new(groups)
            with use_backend(backend):
                found = stepped(groups, "auto", **options)
            assert all(map(torch.equal, found, stepped(new, backend, **options)))


WRONG = {  # of groups that were right in the step before
    "teacher": lambda group: group.teacher[0].requires_grad_(),
    "row": lambda group: setattr(group.teacher[0], "data", group.teacher[0].data.t()),
    "memory": lambda group: setattr(group.live[0], "data", group.teacher[0].data),
    "dtype": lambda group: setattr(group.teacher[0], "data", group.teacher[0].data.view(torch.int32)),
    "shape": lambda group: setattr(group.live[0], "data", group.live[0].data.view(12, 48)),
    "tensors": lambda group: group.up.__setitem__(0, "up"),
    "expected 2 tensors": lambda group: group.up.pop(),
    "bias": lambda group: setattr(group, "bias0", None),
    "sparse": lambda group: setattr(group.up[0], "grad", group.up[0].grad.to_sparse()),
    "grad": lambda group: setattr(group.down[0], "grad", torch.zeros(1, 24, device=group.down[0].device).expand(5, 24)),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_was_right_once_is_refused_when_it_is_wrong(name, backend, device):
    groups = made(device)
    stepped(groups, backend)
    WRONG[name](groups[0])
    before = [t.clone() for t in groups[1].teacher]
    with pytest.raises((ValueError, TypeError), match=rf"^groups.*{name}"):
        stepped(groups, backend)
    assert all(map(torch.equal, before, groups[1].teacher))


MUTANTS = {  # what is left out of the comparison, and a test that shows it
    "places": (test_changed_groups_are_as_new_ones, "addresses"),
    "sizes": (test_what_was_right_once_is_refused_when_it_is_wrong, "shape"),
    "dtypes": (test_changed_groups_are_as_new_ones, "dtype in the same memory"),
    "strides": (test_changed_groups_are_as_new_ones, "other strides"),
    "needs": (test_what_was_right_once_is_refused_when_it_is_wrong, "teacher"),
}


@pytest.mark.kernels
@pytest.mark.parametrize("fact", MUTANTS)
def test_a_fact_is_missed(fact, monkeypatch, device):
    facts, (test, change) = step._Prepared._facts, MUTANTS[fact]
    if fact == "needs":
        monkeypatch.setattr(step._Prepared, "_facts", lambda kept: (facts(kept)[0], None))
    else:
        missed = {fact: None}
        monkeypatch.setattr(step, "looks", lambda those, addresses: in_python(those, addresses)._replace(**missed))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(change, "triton", device)


def test_a_warm_step_makes_nothing_anew(backend, monkeypatch, device):
    groups = made(device)
    stepped(groups, backend)
    for name in ("check_group", "check_changed", "resolve", "Plan"):
        monkeypatch.setattr(step, name, None)
    stepped(groups, backend)
    no_gradients(groups)
    stepped(groups, backend)


@pytest.mark.kernels
def test_tables_follow_gradients_that_move(monkeypatch, device):
    """In every step, as where a backward put them there: nothing is made anew, and no gradient of before is kept."""
    groups = made(device)
    for _ in range(2):  # where there are none, they are written first
        stepped(groups, "triton")
    (plan,) = groups[0].plan.plans
    monkeypatch.setattr(plan, "kernels", SimpleNamespace(weight_distance_fwd=plan.kernels.weight_distance_fwd))
    for _ in range(3):
        before = [weakref.ref(t.grad) for t in adapters(groups)]
        for t in adapters(groups):
            t.grad = t.grad.clone()
        new = as_new(groups)
        assert all(map(torch.equal, stepped(groups, "triton"), stepped(new, "triton")))
        own = {id(t) for t in plan.gradients.own}
        assert all(ref() is None or id(ref()) in own for ref in before)


@pytest.mark.kernels
@pytest.mark.parametrize("when", ["placing", "launching"])
def test_a_step_that_fails_leaves_no_gradients_that_nobody_wrote(when, monkeypatch, device):
    groups = made(device)
    no_gradients(groups)
    stepped(groups, "triton")
    (plan,) = groups[0].plan.plans
    if when == "launching":
        monkeypatch.setattr(plan, "kernels", SimpleNamespace())
    else:
        plan.placed.clear()
        monkeypatch.setattr(plan, "_place", None)
    no_gradients(groups)
    with pytest.raises((AttributeError, TypeError)):
        stepped(groups, "triton")
    assert all(t.grad is None for t in adapters(groups))


@pytest.mark.kernels
def test_a_step_that_refuses_leaves_gradients_as_they_are(device):
    groups = made(device)
    no_gradients(groups)
    stepped(groups, "triton")
    before = [t.grad for t in adapters(groups)]
    groups[0].up[0].grad = groups[0].up[0].grad.to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        stepped(groups, "triton")
    assert sum(t.grad is grad for t, grad in zip(adapters(groups), before)) == len(before) - 1
