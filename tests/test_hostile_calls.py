"""Hostile calls of every public function: a ValueError or TypeError that names the argument, before anything runs."""

import inspect
import re

import numpy
import pytest
import torch

import peft_kernels
from peft_kernels import ImitationGroup, MlpLinear, Transform
from peft_kernels.distance_plan import DistancePlan
from peft_kernels.imitation.plan import Plan
from peft_kernels.operator import Operator

ONES = torch.ones


class Packed(torch.Tensor):
    """A weight as torchao and quanto keep it: the shape of a tensor, and no memory behind it."""

    __module__ = "torchao.dtypes"

    @staticmethod
    def __new__(cls, t):
        return torch.Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype, device=t.device)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} ran")

    def __repr__(self):
        return "Packed"


class Bytes(torch.nn.Parameter):
    """As bitsandbytes keeps it."""

    __module__ = "bitsandbytes.nn.modules"


# ---- right calls, one for each public function ----------------------------------------------------------------------


def linear():
    return {"x": ONES(5, 12), "weight": ONES(8, 12), "bias": ONES(8), "down": ONES(2, 12), "up": ONES(8, 2)}


def mlp():
    layers = [MlpLinear(ONES(n, k), ONES(n), ONES(2, k), ONES(n, 2)) for n, k in ((8, 12), (8, 12), (6, 8))]
    return {"x": ONES(5, 12), **dict(zip(("gate", "fc1", "fc2"), layers))}


def batched():
    index = torch.zeros(5, dtype=torch.int64)
    return linear() | {"down": ONES(3, 2, 12), "up": ONES(3, 8, 2), "adapter_index": index, "scale": ONES(3)}


def projections():
    lists = {"weights": [ONES(8, 12)] * 2, "biases": [None, ONES(8)], "downs": [ONES(2, 12)] * 2}
    return {"x": ONES(5, 12), **lists, "ups": [ONES(8, 2)] * 2, "cores": [ONES(2)] * 2, "scales": [1.0, ONES(())]}


def query():
    wide, vectors = ("hidden", "text", "cross"), ("gamma", "beta", "cross_gamma", "cross_beta")
    return {"mode": "additive"} | {name: ONES(4, 12) for name in wide} | {name: ONES(12) for name in vectors}


def distance():
    return {"target": ONES(8, 12), "base": ONES(8, 12), "left": ONES(8, 2), "right": ONES(2, 12)}


def momentum():
    matrices = distance()
    return {"live": ONES(8, 12), "teacher": matrices.pop("target"), **matrices, "decay": 0.5}


def student():
    transform = Transform(ONES(2, 12), ONES(2), ONES(12, 2), ONES(12))
    return {"weight0": ONES(8, 12), "bias0": ONES(8), "lora": (ONES(2, 12), ONES(8, 2)), "transform": transform}


def group(**change):
    lists = {name: [ONES(8, 12)] for name in ("live", "teacher", "weight0")}
    lists |= {"down": [ONES(2, 12)], "up": [ONES(8, 2)], "transform": student()["transform"]}
    return ImitationGroup(**lists | change)


GOOD = {
    "lowrank_linear": lambda: linear() | {"core": ONES(1, 1, 2), "hidden": ONES(5, 2)},
    "adapted_mlp": mlp,
    "lowrank_hidden": lambda: {"x": ONES(5, 12), "down": ONES(2, 12)},
    "lowrank_projections": projections,
    "batched_lowrank_linear": batched,
    "adapter_segments": lambda: {"adapter_index": torch.zeros(5, dtype=torch.int64), "adapters": 3},
    "stack_adapters": lambda: {"factors": [(ONES(2, 12), ONES(8, 2))]},
    "gated_query": query,
    "reconstruct": lambda: {"down": ONES(2, 12), "up": ONES(8, 2), "core": ONES(1, 1, 2), "base": ONES(8, 12)},
    "reconstruct_stack": lambda: {"down": ONES(2, 12), "up": ONES(8, 2), "core": ONES(3, 2), "base": ONES(8, 12)},
    "weight_distance": distance,
    "momentum_weight_distance": momentum,
    "imitation_step": lambda: {"groups": [group()], "decay": 0.5},
    "hybrid_factors": student,
    "cp_core": lambda: {"lam": ONES(2), "p": ONES(3, 2)},
    "tucker_core": lambda: {"C": ONES(2, 2, 2), "p": ONES(3, 2)},
    "resolve": lambda: {"op": "lowrank_linear", "tensors": [ONES(2)]},
    "explain": lambda: {"model": torch.nn.Linear(2, 2)},
    "use_backend": lambda: {"name": "torch"},
}

# ---- what is hostile: made of a right tensor, or by the argument's name ---------------------------------------------

NO_TENSORS = {
    "string": lambda t: "ones",
    "number": lambda t: 2.0,
    "numpy": lambda t: t.numpy(),
    "numpy scalar": lambda t: numpy.float32(1),
    "object": lambda t: object(),
}
TENSORS = NO_TENSORS | {
    "complex": lambda t: t.to(torch.complex64),
    "bytes": lambda t: t.to(torch.int8),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "coo": torch.Tensor.to_sparse,
    "csr": lambda t: t.reshape(t.shape[0], -1).to_sparse_csr(),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "torchao": Packed,
    "bitsandbytes": lambda t: Bytes(t.to(torch.uint8), requires_grad=False),
    "one number": torch.Tensor.sum,
    "meta": lambda t: t.to("meta"),
    "five dimensions": lambda t: t.reshape(1, 1, 1, 1, -1),
    "empty": lambda t: t[:0],
}
# Where these are right, or another argument is named: the others do not go with this one
RIGHT = {
    "x": ("meta", "five dimensions", "empty", "one number"),
    "weight": ("five dimensions",),
    "hidden": ("empty", "five dimensions"),
    "adapter_index": ("bytes", "meta", "empty"),
    "scale": ("number", "one number"),
    "lam": ("meta",),
    "C": ("meta",),
    "left": ("meta",),
    "weight0": ("meta",),
    "p": ("meta", "empty"),
    "factors.0": ("meta",),
    "weights.1": ("five dimensions",),
}
MEMBERS = [f"{name}.1" for name in ("weights", "biases", "downs", "ups", "cores")]
LAYERS = [f"{layer}.{field}" for layer in ("gate", "fc1", "fc2") for field in ("weight", "bias", "down", "up")]
LISTS = [f"groups.{name}" for name in ("live", "teacher", "weight0", "down", "up")]
RIGHT_CALLS = {
    ("imitation_step", "groups.weight0", "meta"),
    ("imitation_step", "groups.weight0", "empty"),
    ("gated_query", "hidden", "meta"),
    ("reconstruct", "base", "meta"),
    ("reconstruct_stack", "base", "meta"),
    ("reconstruct_stack", "core", "empty"),
}
SCALES = [float("nan"), float("inf"), -float("inf"), 1e308, -(10**400), 10**5000, 1j, "1", None, [1.0], True]
SCALES += [numpy.float32(1), numpy.ones(2), ONES(2), torch.tensor(1.0, requires_grad=True), torch.tensor(1)]
SCALES += [torch.tensor(1.0, device="meta"), torch.tensor(1.0).to_sparse(), torch.nn.Identity()]
WORDS = ["", "no such", None, 3, b"triton", numpy.array(["auto", "torch"]), ONES(2), ["auto"]]
COUNTS = [0, -1, 1.5, "2", None, True, numpy.int64(2), ONES(1)]
DECAYS = [float("nan"), -0.1, 1.5, True, "0.9", None, 1j, numpy.float32(0.9), ONES(1)]
FLAGS = ["no", None, 0.0, ONES(1), numpy.ones(2), []]
WRONG = {
    "scale": SCALES,
    "loss_scale": SCALES,
    "dropout_p": [1.0, -0.1, float("nan"), float("inf"), "0.1", None, True, 1j, numpy.float32(0.1), numpy.ones(2)],
    **dict.fromkeys(("backend", "mode", "dropout_on", "reduction", "placement", "layout", "name", "requested"), WORDS),
    "design": [word for word in WORDS if word is not None],
    "input_blocks": COUNTS,
    "adapters": [*COUNTS, 10**30, 2**31],
    "decay": DECAYS,
    **dict.fromkeys(("training", "validate", "update_teacher", "return_errors"), FLAGS),
    "activation": WORDS,
    **{layer: [None, 3, "fc1", (ONES(8, 12),), ONES(8, 12), {}] for layer in ("fc1", "fc2")},
    "gate": [3, "gate", (ONES(8, 12),), ONES(8, 12), {}],
    "model": [None, "model", {}, torch.nn.Linear, ONES(2)],
    "op": [None, 3, ONES(2)],
    "tensors": [None, [], [None], ["x"], "x", 3, ONES(2)],
    "factors": [None, 3, (), "ab", [3], [(ONES(2, 12),)], {0: 1}, ONES(2, 2), numpy.ones((2, 2)), iter([])],
    **{name: [None, 3, "ab", {}, [], [ONES(2)], iter([]), ONES(2, 2)] for name in ("weights", "biases", "ups")},
    "downs": [None, 3, "ab", {}, [], [None] * 2, [ONES(2, 12)] * 3, ONES(2, 2)],
    "cores": [3, "ab", {}, [], [ONES(2), ONES(2, 2, 2)], [ONES(1, 1, 2)] * 2, ONES(2, 2)],
    "scales": [*SCALES, *([1.0, scale] for scale in SCALES), [], [1.0], "ab"],
    "groups": [None, [], {}, 3, "groups", [None], [ONES(2)], ONES(2, 2), torch.tensor(1.0), numpy.ones(2)],
    "lora": [3, "ab", (), (None, None), ONES(2), (ONES(2, 12), "up")],
    "transform": [3, "abcd", (ONES(2, 12),), (None,) * 4, ONES(4)],
}
GATED_SCALE = [1.0, "0.1", None, ONES(2), numpy.ones(2)]


def hostile(function):
    """(argument, what is wrong, the argument made of the right one)"""
    tensors = [name for name, value in GOOD[function]().items() if isinstance(value, torch.Tensor)]
    listed = {"adapted_mlp": LAYERS, "imitation_step": LISTS, "stack_adapters": ["factors.0"]}
    tensors += (listed | {"lowrank_projections": MEMBERS}).get(function, [])
    for name in tensors:
        for what, made in TENSORS.items():
            if what not in RIGHT.get(name, ()) and (function, name, what) not in RIGHT_CALLS:
                yield name, what, made
    for name in inspect.signature(getattr(peft_kernels, function)).parameters:
        for value in WRONG.get(name, ()):
            yield name, type(value).__name__, lambda _, value=value: value
    if function == "adapted_mlp":
        for value in SCALES:
            yield "fc2.scale", type(value).__name__, lambda _, value=value: value


def changed(function, argument, made):
    """The right call's arguments, but one."""
    arguments = GOOD[function]()
    name, _, inner = argument.partition(".")
    if name == "groups" and inner:
        arguments["groups"] = [group(**{inner: [made(getattr(group(), inner)[0])]})]
    elif function == "lowrank_projections" and inner:
        arguments[name] = [arguments[name][0], made(arguments[name][1])]
    elif name in ("gate", "fc1", "fc2") and inner:
        arguments[name] = arguments[name]._replace(**{inner: made(getattr(arguments[name], inner))})
    elif inner:
        arguments["factors"] = [(made(ONES(2, 12)), ONES(8, 2))]
    else:
        arguments[name] = made(arguments.get(name))
    return arguments


@pytest.fixture
def nothing_runs(monkeypatch):
    def ran(*args, **kwargs):
        raise AssertionError("something ran")

    names = {Operator: ("__call__", "direct"), DistancePlan: ("run",), Plan: ("run", "find_gradients")}
    for owner, methods in names.items():
        for method in methods:
            monkeypatch.setattr(owner, method, ran)


def problem(function, argument, made):
    """What is wrong with the error, or None."""
    arguments = changed(function, argument, made)
    versions = [t._version for t in arguments.values() if type(t) is torch.Tensor]
    try:
        getattr(peft_kernels, function)(**arguments)
    except (ValueError, TypeError) as error:
        message = str(error)
    except BaseException as error:
        return repr(error)
    else:
        return "ran"
    if versions != [t._version for t in arguments.values() if type(t) is torch.Tensor]:
        return "a tensor was changed"
    aliases = {"requested": "backend", "groups.down": "groups.(down|lora A)", "groups.up": "groups.(up|lora B)"}
    name = aliases.get(argument, argument)
    names = message.partition("expected")[0]
    named = all(re.search(rf"\b{part}\b", names) for part in name.split("."))
    return None if named and len(message) < 300 else f"says {message}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", GOOD)
def test_the_argument_is_named(function, nothing_runs):
    rows = hostile(function)
    problems = [(argument, what, problem(function, argument, made)) for argument, what, made in rows]
    assert [row for row in problems if row[2] is not None] == []


def test_there_are_rows_enough():
    public = {name for name in peft_kernels.__all__ if inspect.isfunction(getattr(peft_kernels, name))}
    assert sum(len([*hostile(function)]) for function in GOOD) >= 1000 and public <= GOOD.keys()


@pytest.mark.parametrize("function", GOOD)
def test_what_the_rows_change_is_right(function):
    getattr(peft_kernels, function)(**GOOD[function]())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "function", ["lowrank_linear", "lowrank_hidden", "adapted_mlp", "gated_query", "reconstruct", "weight_distance"]
)
def test_what_is_remembered_of_right_calls_serves_no_other_layout(function):
    """The same shapes and dtypes, contiguous or not, have passed the checks just before."""
    for turned in (False, True):
        good = GOOD[function]()
        if turned:
            good = {n: t.t().contiguous().t() if getattr(t, "ndim", 0) == 2 else t for n, t in good.items()}
        for _ in range(2):
            getattr(peft_kernels, function)(**good)
        for name, t in good.items():
            for what in ("coo", "csr", "mkldnn", "nested"):
                if isinstance(t, torch.Tensor) and (what != "csr" or t.ndim == 2):
                    with pytest.raises((ValueError, TypeError), match=rf"^{name}: .*(dense|dimensions)"):
                        getattr(peft_kernels, function)(**good | {name: TENSORS[what](t.contiguous())})


class Harmless(torch.Tensor):
    """Somebody's subclass, which torch treats as any tensor."""


class Watched(torch.Tensor):
    """One that looks at what torch does with it, in memory of its own."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with torch._C._DisableTorchDispatch():
            return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    "kind", [torch.nn.Parameter, torch.nn.Buffer, lambda t: t.as_subclass(Harmless), lambda t: t.as_subclass(Watched)]
)
@pytest.mark.parametrize("argument", linear())
def test_tensors_of_other_types_with_memory_of_their_own_are_taken(kind, argument):
    good = linear()
    expected = peft_kernels.lowrank_linear(**good)
    assert peft_kernels.lowrank_linear(**good | {argument: kind(good[argument])}).equal(expected)


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        (
            "lowrank_linear",
            {"scale": 1e308},
            r"^scale: expected a number up to ±3\.403e\+38, where float32 overflows, got 1e\+308",
        ),
        ("lowrank_linear", {"scale": float("inf")}, r"^scale: expected a finite number, got inf$"),
        (
            "lowrank_linear",
            {"scale": numpy.float32(1)},
            r"^scale: expected a number or a 0-d Tensor, got numpy\.float32$",
        ),
        ("lowrank_linear", {"down": ONES(2, 12).int()}, r"^down: expected dtype torch\.float32, got torch\.int32$"),
        (
            "lowrank_linear",
            {"x": ONES(5, 12).to_sparse()},
            r"^x: expected a dense Tensor, got layout torch\.sparse_coo;",
        ),
        (
            "lowrank_linear",
            {"weight": Packed(ONES(8, 12))},
            r"^weight: .* a Packed of torchao; dequantize it first, or pass an object with \.dequantize\(dtype\) and",
        ),
        (
            "reconstruct",
            {"base": TENSORS["bitsandbytes"](ONES(8, 12))},
            "^base: .* a Bytes of bitsandbytes; dequantize it first$",
        ),
        ("explain", {"model": None}, r"^model: expected an nn\.Module, got NoneType$"),
    ],
)
def test_what_errors_say(function, change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(peft_kernels, function)(**GOOD[function]() | change)


def test_float64_takes_what_float32_does_not():
    double = {name: t.double() for name, t in linear().items()} | {"up": torch.zeros(8, 2).double()}
    assert peft_kernels.lowrank_linear(**double, scale=1e308).equal(peft_kernels.lowrank_linear(**double))


@pytest.mark.parametrize("kind", [float, numpy.float64, int])
def test_a_number_that_is_too_large_is_seen_after_others_of_its_kind(kind):
    for _ in range(2):
        peft_kernels.lowrank_linear(**linear(), scale=kind(2))
    with pytest.raises(ValueError, match=r"^scale\b"):
        peft_kernels.lowrank_linear(**linear(), scale=kind(10**40))
