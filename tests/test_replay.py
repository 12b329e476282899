"""What is kept of a call for the next one of its kind cannot go stale: plans, and launches that are made again.

Launches of calls that find something kept are compared with those of the same calls that find nothing. They reach
Triton's launcher in a process without TRITON_INTERPRET alone: there the other tests of this file run.
"""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import types
import weakref
from contextlib import suppress
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")
import triton
import triton.language as tl
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from replay_cases import (
    SETTINGS,
    USUAL,
    Address,
    check,
    forward_and_backward,
    laid,
    multiplying,
    scale_of,
    seen_in,
    tensors,
    watched,
)
from triton import knobs
from triton.runtime.jit import JITFunction

from peft_kernels import lowrank_hidden, lowrank_linear
from peft_kernels.layers import LowRankLinear
from peft_kernels.ops import lowrank_linear as op
from peft_kernels.triton_kernels import common, replay
from peft_kernels.triton_kernels.config import Tile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LORA = ["_shrink_kernel", "_expand_kernel", "_up_bwd_kernel", "_down_bwd_kernel", "_sum_kernel"]
QUIET = settings(
    derandomize=True, deadline=None, database=None, max_examples=15, stateful_step_count=30,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def test_in_a_process_of_its_own():
    if not INTERPRETED:
        pytest.skip("this is the process")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module", autouse=not INTERPRETED)
def launcher():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with watched():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=not INTERPRETED)
def nothing_kept():
    op._plans.clear()
    replay.forget()


# ---- whole calls -----------------------------------------------------------------------------------------------------

NUMBERS = torch.zeros(4)  # a scale's memory


def checked(given: dict) -> tuple[list, bool]:
    t, scale = tensors(given), scale_of(given["scale"], NUMBERS)
    t["scale"] = scale if isinstance(scale, Tensor) else None
    return check(lambda: forward_and_backward(given, t, scale), t, given["thread"])


BASES = {
    "lora": {},
    "dropped": {"dtype": torch.bfloat16, "factor dtype": torch.float32, "p": 0.1},
    "aurora": {"core": "dense", "blocks": (3, 2), "dtype": torch.float16, "p": 0.1, "place": "core"},
    "one kernel": {"design": "fused", "weight": "offset"},
    "hidden": {"hidden": "plain", "core": "diagonal", "blocks": (2, 1), "scale": "0-d"},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("base", BASES)
def test_one_change_after_the_other(base, name):
    """Every setting's values, there and back again."""
    values = SETTINGS[name]
    for value in (*values, values[0]):
        checked(USUAL | BASES[base] | {name: value})


class Calls(RuleBasedStateMachine):
    """Any setting may change before the next call."""

    def __init__(self):
        super().__init__()
        self.given, self.earlier = dict(USUAL), []

    @initialize(base=st.sampled_from(list(BASES)))
    def begin(self, base):
        op._plans.clear()
        replay.forget()
        self.given |= BASES[base]

    @rule(name=st.sampled_from(list(SETTINGS)), data=st.data())
    def change(self, name, data):
        self.earlier.append(dict(self.given))
        self.given[name] = data.draw(st.sampled_from(SETTINGS[name]), label=name)
        checked(self.given)

    @rule(steps=st.integers(1, 6))
    def go_back(self, steps):
        if self.earlier:
            self.given = dict(self.earlier[-min(steps, len(self.earlier))])
        checked(self.given)


def test_no_history_of_calls_goes_stale():
    run_state_machine_as_test(Calls, settings=QUIET)


def test_most_calls_are_made_again():
    """Or the comparisons compare little: whatever is contiguous and aligned, and nothing cast."""
    slow = {"x": ("transposed", "sliced", "every second row", "offset", "broadcast"), "hidden": ("sliced", "offset")}
    slow |= {"bias": ("offset",), "factors": ("offset",), "scale": ("0-d offset",), "dy": ("transposed",)}
    for name, values in SETTINGS.items():
        for value in values:
            lines, again = checked(USUAL | {name: value})
            launched = len(lines) > 1 and value not in ("torch", "auto")
            if launched and name != "dy" and value not in slow.get(name, ()):
                assert again, (name, value)


@pytest.mark.parametrize(("name", "value"), [("rows", 37), ("scale", 0.5), ("tf32", "tf32"), ("grads", "x")])
def test_a_change_that_no_key_tells_is_noticed(name, value, monkeypatch):
    """The comparison can fail: here the keys tell forward from backward alone."""

    def forgetful(memo, key, function, tensors):
        return replay.replayed(memo, key[0] == "fwd", function, tensors)

    monkeypatch.setattr("peft_kernels.triton_kernels.lowrank_linear.replayed", forgetful)
    checked(USUAL)
    checked(USUAL)
    with pytest.raises(AssertionError):
        checked(USUAL | {name: value})


class Layers(RuleBasedStateMachine):
    """A LowRankLinear that is trained, merged, copied, cast and changed from outside between its calls."""

    @initialize(core=st.sampled_from((None, "diagonal", "dense")), p=st.sampled_from((0.0, 0.1)))
    def begin(self, core, p):
        op._plans.clear()
        replay.forget()
        blocks = {"out_blocks": 2, "in_blocks": 1} if core else {}
        linear = nn.Linear(32, 48)
        self.layer = LowRankLinear(linear, 4, core=core, dropout_p=p, backend="triton", freeze=False, **blocks)
        self.rows = 5

    @rule()
    def call(self):
        layer, x = self.layer, torch.zeros(self.rows, 32, dtype=self.layer.weight.dtype, requires_grad=True)
        given = {"x": x, "dy": torch.zeros(self.rows, 48, dtype=x.dtype), "scale": layer.scale}
        given |= dict(layer.named_parameters())

        def step():
            y = layer(x)
            leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
            return y, *torch.autograd.grad(y, leaves, given["dy"], allow_unused=True)

        lines, again = check(step, given)
        assert layer.merged or again or not all(p.data_ptr() % 16 == 0 for p in layer.parameters())
        assert not layer.merged or len(lines) == 1

    @rule(rows=st.sampled_from((1, 5, 8)))
    def take_rows(self, rows):
        self.rows = rows
        self.call()

    @rule(how=st.sampled_from((copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)))))
    def replace(self, how):
        self.layer = how(self.layer)
        assert not kept_by(self.layer)
        self.call()

    @rule()
    def merge_or_unmerge(self):
        self.layer.unmerge() if self.layer.merged else self.layer.merge()
        self.call()

    @rule(scale=st.sampled_from((0.5, 2.0)))
    def set_scale(self, scale):
        if not self.layer.merged:
            self.layer.set_scale(scale)
        self.call()

    @rule(training=st.booleans())
    def train(self, training):
        self.layer.train(training)
        self.call()

    @rule(dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    def cast(self, dtype):
        if not self.layer.merged:
            self.layer.to(dtype)
        self.call()

    @rule(name=st.sampled_from(("weight", "bias", "down", "up")), layout=st.sampled_from(("plain", "offset", "sliced")))
    def replace_data(self, name, layout):
        if not self.layer.merged:
            parameter = getattr(self.layer, name)
            parameter.data = laid(parameter.shape, parameter.dtype, layout)
        self.call()

    @rule(name=st.sampled_from(("weight", "bias", "down", "up")), needed=st.booleans())
    def need(self, name, needed):
        getattr(self.layer, name).requires_grad_(needed)
        self.call()

    @rule(backend=st.sampled_from(("triton", "torch", "auto")))
    def take_backend(self, backend):
        self.layer.backend = backend
        seen, _ = seen_in(lambda: self.layer(torch.zeros(2, 32, dtype=self.layer.weight.dtype)))
        assert bool(seen.launches) == (backend == "triton" and not self.layer.merged)
        self.layer.backend = "triton"
        self.call()


def test_no_history_of_a_layer_goes_stale():
    run_state_machine_as_test(Layers, settings=QUIET)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, LORA), (torch.float16, LORA), (torch.float32, 6)])
def test_a_lora_layer_takes_five_launches(dtype, expected, p):
    """Forward and backward, the first time and again; cuBLAS adds two products. In float32 hidden_bwd is one more."""
    layer = LowRankLinear(nn.Linear(768, 768, dtype=dtype), 16, dropout_p=p, backend="triton")
    x = torch.zeros(40, 768, dtype=dtype, requires_grad=True)
    for _ in range(3):
        seen, _ = seen_in(lambda: torch.autograd.grad(layer(x).sum(), [x, layer.down, layer.up]))
        names = [each.kernel[0] for each in seen.launches]
        assert len(names) == expected if isinstance(expected, int) else names == expected
    assert not seen.anew


# ---- what is kept ----------------------------------------------------------------------------------------------------


def reached(*roots: object) -> list[object]:
    """Whatever these hold, but for modules, types and what functions find by their globals."""
    found, queue = {}, list(roots)
    while queue:
        each = queue.pop()
        if id(each) in found or isinstance(each, type | types.ModuleType | JITFunction):
            continue
        found[id(each)] = each
        if isinstance(each, types.FunctionType):
            queue += [*(each.__closure__ or ()), *(each.__defaults__ or ())]
        else:
            queue += gc.get_referents(each)
    return list(found.values())


def kept_by(layer: nn.Module) -> list[object]:
    return [each for each in reached(vars(layer)) if isinstance(each, replay.Replay | op._Plan)]


def test_nothing_that_is_kept_holds_a_tensor():
    def call_twice(given: dict) -> list[weakref.ref]:
        t, scale = tensors(given), scale_of(given["scale"], torch.zeros(4))
        for _ in range(2):
            with suppress(ValueError):  # not all settings go together
                forward_and_backward(given, t, scale)
        return [weakref.ref(each) for each in (*t.values(), scale) if isinstance(each, Tensor)]

    gone = []
    for base in BASES.values():
        for name in ("scale", "hidden", "dy", "p", "x"):
            for value in SETTINGS[name]:
                gone += call_twice(USUAL | {"place": "rank"} | base | {name: value})
    gc.collect()
    assert op._plans and any(plan.memo for plan in op._plans.values()) and any(replay._memos.values())
    held = reached(op._plans, replay._memos)
    assert any(isinstance(each, replay.Replay) for each in held)
    assert not [each for each in held if isinstance(each, Tensor | common.Launch)]
    assert not [reference for reference in gone if reference() is not None]


def test_plans_are_bounded(monkeypatch):
    x, weight, down, up = (torch.zeros(shape) for shape in ((2, 8), (6, 8), (2, 8), (6, 2)))
    for number in range(4100):
        lowrank_linear(x, weight, None, down, up, dropout_p=number / 10_000, training=False, backend="torch")
        assert len(op._plans) <= 4096


# ---- replay.py itself ------------------------------------------------------------------------------------------------


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


def test_copies_and_pickles_of_layers_keep_nothing():
    layer = LowRankLinear(nn.Linear(32, 48), 4, backend="triton")
    x = torch.zeros(5, 32)
    for _ in range(2):
        layer(x).sum().backward()
    for each in (layer, copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert not kept_by(each)
        seen, _ = seen_in(lambda each=each: each(x))
        assert seen.launches and not seen.anew  # the same kind of call


if INTERPRETED:
    for _name in [name for name in globals() if name.startswith("test_") and name != "test_in_a_process_of_its_own"]:
        del globals()[_name]
