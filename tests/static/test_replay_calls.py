"""What is kept of a call for the next one of its kind cannot go stale: plans, and launches that are made again.

Launches of calls that find something kept are compared with those of the same calls that find nothing.
"""

import copy
import gc
import pickle
import types
import weakref
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from replay_cases import (
    SETTINGS,
    USUAL,
    check,
    forward_and_backward,
    laid,
    launcher,  # noqa: F401
    nothing_kept,  # noqa: F401
    scale_of,
    seen_in,
    tensors,
)
from torch import Tensor, nn
from triton.runtime.jit import JITFunction

from peft_kernels import lowrank_linear
from peft_kernels.layers import LowRankLinear
from peft_kernels.ops import lowrank_linear as op
from peft_kernels.triton_kernels import common, replay

LORA = ["_shrink_kernel", "_expand_kernel", "_up_bwd_kernel", "_down_bwd_kernel", "_sum_kernel"]
QUIET = settings(
    derandomize=True, deadline=None, database=None, max_examples=15, stateful_step_count=30,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


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


def test_copies_and_pickles_of_layers_keep_nothing():
    layer = LowRankLinear(nn.Linear(32, 48), 4, backend="triton")
    x = torch.zeros(5, 32)
    for _ in range(2):
        layer(x).sum().backward()
    for each in (layer, copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert not kept_by(each)
        seen, _ = seen_in(lambda each=each: each(x))
        assert seen.launches and not seen.anew  # the same kind of call
