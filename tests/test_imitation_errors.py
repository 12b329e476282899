"""Bad groups and arguments: an error that names what is wrong, before anything has moved."""

import pytest
import torch
from imitation_cases import Layer

from peft_kernels.imitation import ImitationGroup, Transform, imitation_step


def broken(change):
    group = Layer().group("cpu")
    change(group)
    return group


def setting(name, index=None, value=None):
    def change(group):
        if index is None:
            setattr(group, name, value)
        else:
            getattr(group, name)[index] = value(getattr(group, name)[index])

    return change


BAD = [
    ("bias", setting("bias0")),
    ("down and up", setting("down")),
    ("live", setting("live", value=[torch.ones(40, 40)])),
    ("teacher", setting("teacher", 1, torch.Tensor.bfloat16)),
    ("teacher", setting("teacher", 1, lambda t: t[:20])),
    ("teacher", setting("teacher", 0, lambda t: t.requires_grad_())),
    ("live", setting("live", 2, lambda t: t.int())),
    ("live_bias", setting("live_bias", 2, lambda t: t[:3])),
    ("weight0", setting("weight0", 0, torch.Tensor.half)),
    ("lora A", setting("down", 0, lambda t: t.detach()[:, :39])),
    ("lora B", setting("up", 0, lambda t: t.detach()[:, :4])),
    ("lora B", setting("up", 0, lambda t: t.detach().to("meta"))),
    ("leaves", setting("up", 0, lambda t: t * 2)),
    (
        "transform",
        setting("transform", value=Transform(*(torch.ones(2, 40), torch.ones(2), torch.ones(40, 2), torch.ones(39)))),
    ),
    ("transform", setting("transform", value=(torch.ones(2, 40),))),
    ("placement", setting("placement", value="middle")),
    ("row", setting("teacher", 0, lambda t: t.t().contiguous().t())),
    ("row", setting("teacher", 2, lambda t: t[:1].expand(40, 40))),
    ("weight0", setting("weight0", 0, lambda t: t.double())),
    ("weight0", setting("weight0", 0, lambda t: t[:0])),
    ("lora A", setting("down", 0, lambda t: t.detach()[:0])),
    ("live", setting("live", 0, lambda t: 1)),
    ("row", setting("teacher", 0, lambda t: t.new_zeros(1).expand(40, 40))),
]


@pytest.mark.parametrize(("name", "change"), BAD, ids=[f"{i}-{row[0]}" for i, row in enumerate(BAD)])
def test_bad_groups_are_named(name, change):
    with pytest.raises((ValueError, TypeError), match=rf"groups\[1\].*{name}"):
        imitation_step([Layer().group("cpu"), broken(change)], decay=0.9)


@pytest.mark.parametrize(
    "share",
    [
        lambda group: group.weight0,
        lambda group: group.live,
        lambda group: [group.teacher[0]] * 3,
        lambda group: [w.detach() for w in group.live],
    ],
)
def test_teachers_that_share_memory_are_refused(share):
    group = Layer().group("cpu")
    group.teacher = share(group)
    with pytest.raises(ValueError, match=r"^groups\[0\]\.teacher.*clone"):
        imitation_step([group], decay=0.9)


def test_overlapping_gradients_are_refused_before_anything_moves():
    group = Layer().group("cpu")
    group.down[0].grad = torch.zeros(1, 40).expand(5, 40)
    before = [t.clone() for t in group.teacher]
    with pytest.raises(ValueError, match=r"\.grad"):
        imitation_step([group], decay=0.9)
    assert all(map(torch.equal, before, group.teacher))


def test_lists_are_lists():
    with pytest.raises(TypeError, match=r"^live"):
        ImitationGroup(torch.ones(3, 4, 4), [torch.ones(4, 4)], [torch.ones(4, 4)])


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("decay", {"decay": 1.5}),
        ("decay", {"decay": True}),
        ("reduction", {"reduction": "max"}),
        ("loss_scale", {"loss_scale": float("nan")}),
        ("loss_scale", {"loss_scale": "1"}),
        ("backend", {"backend": "cublas"}),
        ("groups", {"groups": []}),
        ("groups", {"groups": None}),
        ("groups", {"groups": [torch.ones(2)]}),
    ],
)
def test_bad_arguments_are_named(argument, change):
    with pytest.raises((ValueError, TypeError), match=rf"^({argument})\b"):
        imitation_step(**{"groups": [Layer().group("cpu")], "decay": 0.9} | change)
