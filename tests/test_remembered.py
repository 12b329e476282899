"""Checks that are made once: for calls that look alike, and for no others."""

import pytest
import torch
from torch import nn

from peft_kernels.backend import requested_by, use_backend
from peft_kernels.records import Modulated
from peft_kernels.remembered import remembered


@pytest.fixture
def checked():
    made = []

    @remembered
    def check(x, other=None, word=""):
        made.append(x)
        if word == "wrong":
            raise ValueError("word")
        return len(made)

    check.made = made
    return check


X, Y = torch.zeros(2, 3), torch.zeros(2)
HOSTILE = torch.zeros(2, 3).as_subclass(type("Hostile", (torch.Tensor,), {}))


@pytest.mark.parametrize(
    "other",
    [
        (X.half(),),
        (X[:1],),
        (X.to("meta"),),
        (torch.zeros(2, 3, requires_grad=True),),
        (X, Y),
        (X, None, "cuda"),
        (X, Modulated(X, Y, Y)),
        (X, 1.0),
        (X, 1),
    ],
    ids=str,
)
def test_another_look_is_checked(checked, other):
    assert checked(X) == 1 and checked(*other) == 2 and checked(*other) == 2 and checked(X) == 1


def test_what_looks_alike_is_not(checked):
    assert checked(X, 1.0) == checked(X.clone(), 2.0) == checked(nn.Parameter(X, requires_grad=False), 3.0) == 1
    assert checked(X, Modulated(X, Y, Y)) == checked(X, Modulated(X + 1, Y, Y)) == 2
    assert checked(X, 1) == 3 and checked(X, True) == 4 and checked(X, 2) == 5


def test_what_is_around_a_call_counts(checked, monkeypatch):
    assert checked(X) == 1
    for count, dtype in ((2, torch.bfloat16), (3, torch.float16)):
        with torch.autocast("cpu", dtype):
            assert checked(X) == count
    with use_backend("torch"):
        assert checked(X) == 4
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "torch")
    assert requested_by("auto")[0] == "torch" and checked(X) == 5
    monkeypatch.undo()
    assert checked(X) == 1


def test_errors_and_tensors_of_other_types_are_not_kept(checked):
    assert checked(X) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="word"):
            checked(X, None, "wrong")
    assert [checked(HOSTILE) for _ in range(2)] == [4, 5] and [checked([X]) for _ in range(2)] == [6, 7]


def test_transforms_are_not_kept(checked):
    assert checked(X) == 1
    torch.func.vmap(lambda x: (checked(x), x)[1])(torch.zeros(4, 2, 3))
    with torch.autograd.forward_ad.dual_level():
        checked(X)
    assert len(checked.made) == 3 and checked(X) == 1


def test_it_does_not_grow_without_end(checked, monkeypatch):
    monkeypatch.setattr("peft_kernels.remembered.MOST", 2)
    assert [checked(X[:, :n]) for n in (1, 2, 3, 1)] == [1, 2, 3, 4]
