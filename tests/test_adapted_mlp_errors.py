"""`adapted_mlp` names what is wrong, layer and argument, before anything runs."""

import pytest
import torch
from mlp_cases import Mlp, ours

from peft_kernels import BackendUnavailableError, adapted_mlp

GATED = {"ranks": (4, 4, 3)}


def changed(**fields):
    """layer_field=value, a layer's own value where it is a function"""

    def change(layers):
        for name, value in fields.items():
            layer, _, field = name.partition("_")
            own = layers[layer]
            value = value(getattr(own, field)) if callable(value) else value
            layers[layer] = own._replace(**{field: value})
        return layers

    return change


def cut(t):
    return t.detach()[:, 1:]


WRONG = {
    "no record": ({}, lambda layers: {**layers, "fc1": (1, 2)}, TypeError, "^fc1: expected an MlpLinear, got tuple"),
    "weight": ({}, changed(fc1_weight=None), TypeError, "^fc1: weight: expected a Tensor"),
    "columns": ({}, changed(fc1_weight=cut), ValueError, r"^fc1: weight: expected \(out_features, 24\)"),
    "fc2's columns": ({}, changed(fc2_weight=cut), ValueError, r"^fc2: weight: expected \(out_features, 40\)"),
    "bias": ({}, changed(fc2_bias=lambda t: t.detach()[1:]), ValueError, "^fc2: bias: expected shape"),
    "down": ({}, changed(fc1_down=cut), ValueError, "^fc1: down: expected shape"),
    "up": ({}, changed(fc2_up=lambda t: t.detach()[1:]), ValueError, "^fc2: up: expected shape"),
    "rank": ({}, changed(fc2_up=cut), ValueError, "^fc2: up: expected shape"),
    "down alone": ({}, changed(fc2_up=None), ValueError, "^fc2: down, up: expected both or neither"),
    "up alone": ({}, changed(fc1_down=None), ValueError, "^fc1: down, up: expected both or neither"),
    "weight's dtype": ({}, changed(fc2_weight=lambda t: t.detach().half()), TypeError, "^fc2: weight: expected dtype"),
    "factor's dtype": ({}, changed(fc1_down=lambda t: t.detach().half()), TypeError, "^fc1: down: expected dtype"),
    "gate's down": (GATED, changed(gate_down=cut), ValueError, "^gate: down: expected shape"),
    "gate's width": (
        GATED, changed(gate_weight=lambda t: t.detach()[1:], gate_bias=None, gate_up=lambda t: t.detach()[1:]),
        ValueError, r"^gate: weight: expected \(40, 24\), as fc1, got \(39, 24\)",
    ),
    "scale": ({}, changed(fc2_scale="1"), TypeError, "^fc2: scale: expected a number"),
    "scale, infinite": ({}, changed(fc1_scale=float("inf")), ValueError, "^fc1: scale: expected a finite number"),
    "scale, trained": (GATED, changed(gate_scale=torch.ones((), requires_grad=True)), ValueError, "^gate: scale: take"),
    "scale, vector": ({}, changed(fc1_scale=torch.ones(2)), ValueError, "^fc1: scale: expected a 0-d Tensor"),
}  # fmt: skip
OPTIONS = {
    "activation": ({"activation": "tanh"}, ValueError, "^activation: expected one of"),
    "dropout_p": ({"dropout_p": 1.0}, ValueError, "^dropout_p: expected a probability"),
    "training": ({"training": 1}, TypeError, "^training: expected True or False"),
    "backend": ({"backend": "gpu"}, ValueError, "^backend: expected"),
    "x": ({"x": None}, TypeError, "^x: expected a Tensor"),
    "x, 0-d": ({"x": torch.ones(())}, ValueError, "^fc1: x: expected at least one dimension"),
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name, warm):
    options, change, kind, message = WRONG[name]
    case = Mlp(**options)
    tensors = case.tensors()
    if warm:
        ours(case)(tensors["x"], **case.layers(tensors))
    with pytest.raises(kind, match=message):
        ours(case)(tensors["x"], **change(case.layers(tensors)))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_are_wrong_are_named(name):
    options, kind, message = OPTIONS[name]
    case = Mlp()
    tensors = case.tensors()
    with pytest.raises(kind, match=message):
        adapted_mlp(**{"x": tensors["x"], **case.layers(tensors), **options})


def test_a_backend_by_name_that_cannot_run_raises():
    case = Mlp(dtype=torch.float64)
    tensors = case.tensors()
    with pytest.raises(BackendUnavailableError):
        ours(case, "triton")(tensors["x"], **case.layers(tensors))
