"""replay.py itself: what it records, makes again, and leaves to Triton's own launch."""

import threading
from functools import partial
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from replay_cases import (
    Address,
    check,
    laid,
    launcher,  # noqa: F401
    multiplying,
    nothing_kept,  # noqa: F401
    seen_in,
)
from torch import Tensor
from triton import knobs

from peft_kernels import lowrank_hidden
from peft_kernels.triton_kernels import common, replay
from peft_kernels.triton_kernels.config import Tile


@triton.jit
def _move_kernel(from_ptr, to_ptr, other_ptr, count, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(to_ptr + offsets, tl.load(from_ptr + offsets, mask=offsets < count))


def move(source: Tensor, target: Tensor, other: Tensor | None = None) -> None:
    common.launch(_move_kernel, (3, 2), (source, target, other, source.numel()), {"BLOCK": 64}, Tile(1, 64, warps=2))


class Function:
    """Makes two workspaces and two results, and launches on parts of them and of what it is given."""

    def __init__(self, launches=True):
        self.calls, self.launches = 0, launches

    def __call__(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, None, Tensor]:
        self.calls += 1
        small, large = torch.empty(3, 4), torch.empty(2, 100, dtype=torch.float64)
        first, second = torch.empty(8, 8), torch.empty(3, dtype=torch.int64)
        if self.launches:
            move(x[8:], small)
            move(small, large, y)
            move(large[1], first)
            move(first[4], second, large[1, 10:])
            move(large, small, x)
        return first, None, second


def again(memo, function, x, y=None, key="one"):
    return seen_in(lambda: replay.replayed(memo, key, lambda: function(x, y), (x, 7, y, None)))


@pytest.fixture
def floats():
    return [torch.zeros(64) for _ in range(4)]


def test_parts_of_tensors_and_of_the_workspace_lie_where_they_lay(floats):
    memo, function = {}, Function()
    for x, y in (floats[:2], floats[2:], floats[1:3]):
        seen, _ = again(memo, function, x, y)
        places = [[arg.address for arg in each.args if isinstance(arg, Address)] for each in seen.launches]
        (x8, small), (small2, large, other), (large1, first), (first4, second, large110), (large2, small3, x0) = places
        assert (x8, x0, other) == (x.data_ptr() + 8 * 4, x.data_ptr(), y.data_ptr())
        assert small == small2 == small3 and large == large2
        assert large1 == large + 100 * 8 and large110 == large1 + 10 * 8 and first4 == first + 4 * 8 * 4
        ranges = sorted([(small, 48), (large, 1600), (first, 256), (second, 24)])
        assert all(begin + size <= after for (begin, size), (after, _) in zip(ranges, ranges[1:]))  # noqa: RUF007
        assert all(begin % replay.ALIGNED == 0 for begin, _ in ranges)
        assert [each.grid for each in seen.launches] == [(3, 2, 1)] * 5
        assert [each.args[3] for each in seen.launches] == [56, 12, 100, 8, 200]
    assert function.calls == 1 and len(memo) == 1


def test_results_are_those_of_the_function(floats):
    memo, function = {}, Function()
    for x, y in (floats[:2], floats[2:]):
        seen, (first, none, second) = again(memo, function, x, y)
        assert none is None and isinstance(first, Tensor) and isinstance(second, Tensor)
        assert (first.shape, first.dtype, first.stride()) == ((8, 8), torch.float32, (8, 1))
        assert (second.shape, second.dtype) == ((3,), torch.int64)
        addresses = [arg.address for each in seen.launches for arg in each.args if isinstance(arg, Address)]
        assert first.data_ptr() in addresses and second.data_ptr() in addresses
        assert first.untyped_storage().nbytes() == 256  # its own, not the workspace's
    assert function.calls == 1


@pytest.mark.parametrize("second", ["the same", "a part"])
def test_what_was_one_tensor_may_be_two_the_next_time(floats, second):
    """As with several layers' scales, which one tensor may hold."""
    memo, function, (first, other) = {}, Function(), (torch.zeros(64) for _ in range(2))
    calls = [(x, x if second == "the same" else x[32:]) for x in (first, other)]
    calls += [(first, calls[1][1]), (first, torch.zeros(len(calls[0][1]))), calls[0]]
    for (x, y), made in zip(calls, (1, 1, 2, 2, 2)):
        seen, _ = again(memo, function, x, y)
        assert seen.launches[0].args[0].address == x.data_ptr() + 8 * 4
        assert seen.launches[1].args[2].address == y.data_ptr()
        assert function.calls == made


def test_another_key_is_another_call(floats):
    memo, function = {}, Function()
    for number in range(3):
        again(memo, function, *floats[:2], key=number)
    assert function.calls == len(memo) == 3
    again(None, function, *floats[:2])
    assert function.calls == 4


@pytest.mark.parametrize("first", ["aligned", "unaligned"])
def test_an_unaligned_tensor_takes_the_long_way(floats, first):
    """16 bytes decide which kernel was compiled."""
    memo, function, aligned, unaligned = {}, Function(), floats[0], torch.zeros(65)[1:]
    for x in (aligned, unaligned, aligned, unaligned) if first == "aligned" else (unaligned, aligned, aligned):
        seen, _ = again(memo, function, x, floats[1])
        assert seen.launches[0].args[0].address == x.data_ptr() + 32
        assert seen.launches[1].args[2].address == floats[1].data_ptr()
    assert function.calls == (3 if first == "aligned" else 2)


def test_strides_and_what_is_not_made_afresh_are_not_kept(floats):
    memo, function = {}, Function()
    again(memo, function, torch.zeros(64, 2)[:, 0], floats[0])
    assert not memo

    def whole(x: Tensor) -> tuple:
        move(x, x)
        return (x,)

    def view(x: Tensor) -> tuple:
        move(x, x)
        return (x[8:],)

    def strided(x: Tensor) -> tuple:
        made = torch.empty(4, 4).t()
        move(x, made)
        return (made,)

    def outside(x: Tensor) -> tuple:
        move(x, floats[3].view(8, 8)[:, 0])
        return (torch.empty(2),)

    for function in (whole, view, strided, outside, lambda x: (torch.empty(3),)):
        replay.replayed(memo, "key", partial(function, floats[0]), (floats[0],))
        assert not memo


def test_recordings_of_two_threads_do_not_mix(floats):
    meeting, memos = threading.Barrier(2), [{}, {}]
    seen = [[], []]

    def slow(number: int, x: Tensor) -> tuple:
        meeting.wait()
        made = torch.empty(16)
        for _ in range(number + 1):
            meeting.wait()
            move(x, made)
        meeting.wait()
        if number == 0:
            meeting.wait()
        return (made,)

    def run(number: int) -> None:
        seen[number] = replay.replayed(memos[number], "key", partial(slow, number, floats[number]), (floats[number],))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [len(memo["key"].launches) for memo in memos] == [1, 2]
    assert getattr(common._recording, "launches", None) is None  # this thread's


def test_a_recording_ends_with_an_error(floats):
    def broken(x: Tensor) -> tuple:
        move(x, x)
        raise KeyError("broken")

    memo = {}
    with pytest.raises(KeyError, match="broken"):
        replay.replayed(memo, "key", partial(broken, floats[0]), (floats[0],))
    assert not memo and getattr(common._recording, "launches", None) is None


def test_a_memo_is_bounded(floats, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 3)
    memo, function = {}, Function()
    for number in range(8):
        again(memo, function, *floats[:2], key=number)
        assert 0 < len(memo) <= 3
    assert function.calls == 8


@pytest.mark.parametrize("watch", ["enter", "exit", "other hooks", "record"])
def test_a_watched_launch_takes_the_long_way(floats, watch):
    memo, function, watched_launches = {}, Function(), []
    again(memo, function, *floats[:2])
    again(memo, function, *floats[:2])
    assert function.calls == 1
    if watch == "record":
        with common.record_launches() as recorded:
            seen, _ = again(memo, function, *floats[:2])
        watched_launches = recorded
    elif watch in ("enter", "exit"):
        hook, hooks = watched_launches.append, getattr(knobs.runtime, f"launch_{watch}_hook")
        hooks.add(hook)
        try:
            seen, _ = again(memo, function, *floats[:2])
        finally:
            hooks.remove(hook)
    else:
        with mock.patch.object(knobs.runtime, "launch_enter_hook", watched_launches.append):
            seen, _ = again(memo, function, *floats[:2])
    assert function.calls == 2 and len(watched_launches) == len(seen.launches) == 5
    again(memo, function, *floats[:2])
    assert function.calls == 2


@pytest.mark.parametrize("current", [0, 1])
def test_a_launch_on_a_gpu_takes_the_stream_of_the_current_device(current, monkeypatch):
    """Another device is Triton's business."""
    monkeypatch.setattr(replay, "_current_device", lambda: current, raising=False)
    monkeypatch.setattr(replay, "_raw_stream", lambda index: 70 + index, raising=False)
    x, ran = torch.zeros(64), []
    launch = (lambda *args: ran.append(args), (3, 2, 1), ("compiled",), tuple, ("rest",))
    kept = replay.Replay(torch.device("cuda", 1), lambda tensors: (x,), [], [], [], [launch], lambda made: "replayed")
    result = replay.replayed({"one": kept}, "one", lambda: "the long way", (x,))
    assert result == ("replayed" if current == 1 else "the long way")
    assert ran == ([(3, 2, 1, 71, "compiled", (x.data_ptr(), "rest"))] if current == 1 else [])


def test_launchers_with_a_memo_by_how_their_arguments_look():
    """lowrank_hidden's, which nobody keeps a memo for."""
    calls = []
    for rows, width, dtype in ((4, 32, torch.float32), (4, 32, torch.float32), (5, 32, torch.float32)):
        for layout in ("plain", "sliced", "offset", "plain"):
            x, down = laid((rows, width), dtype, layout), torch.zeros(4, width, dtype=dtype)
            leaves = {"x": x.requires_grad_(), "down": down.requires_grad_(), "dy": torch.zeros(rows, 4, dtype=dtype)}

            def step(leaves=leaves):
                z = lowrank_hidden(leaves["x"], leaves["down"], backend="triton")
                return z, *torch.autograd.grad(z, [leaves["x"], leaves["down"]], leaves["dy"])

            _, is_again = check(step, leaves)
            assert is_again == (layout == "plain")
            calls.append(is_again)
    with multiplying("tf32"):
        check(step, leaves)  # what was kept of the same call multiplies otherwise
    replay.forget()
    assert not any(replay._memos.values()) and any(calls)
