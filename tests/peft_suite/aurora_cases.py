"""A pytest plugin: PEFT's tests of a method on its custom models, with Aurora instead of the methods that PEFT has.

PEFT_SUITE_COUNTS: a folder, where each process leaves what its layers and tests did
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from peft_kernels.integrations.peft import AuroraConfig, aurora_linear, register

register()

COUNTS = Path(os.environ["PEFT_SUITE_COUNTS"])
calls: Counter[str] = Counter()
tests: Counter[str] = Counter()
_BOTH = {"target_modules": ["lin0", "lin1"], "scale": 0.1}  # PEFT trains with a rate of 0.5 on inputs of up to 90
# (name, PEFT's model, configuration class, its arguments), as PEFT's own rows
CASES = [
    (f"{model} {name} Aurora {core}", model, AuroraConfig, {"rank": 8, "core": core, "dropout": 0.0, **options})
    for model, name, options in (
        ("MLP", "text", {"target_modules": "lin0"}),
        ("MLP", "first", {"target_modules": ["lin0"]}),
        ("MLP", "second", {"target_modules": ["lin1"]}),
        ("MLP", "both", _BOTH),
        ("MLP", "dropout", {**_BOTH, "dropout": 0.1}),
        ("MLP", "head", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        ("MLP", "all but one", {"target_modules": "all-linear", "exclude_modules": ["lin1"]}),
        ("MLP_LayerNorm", "both", {**_BOTH, "scale": 1.0}),
        ("EmbConv1D", "Conv1D", {"target_modules": ["conv1d"]}),
    )
    for core in ("cp", "tucker")
]
_LIN0, _LIN1 = ({"target_modules": [name], "rank": 8, "init_weights": False} for name in ("lin0", "lin1"))
_OTHER = {"rank": 5, "core": "tucker"}
# (name, method, configuration class, arguments of the first adapter, of the second)
SEVERAL = [
    ("Aurora same", "aurora", AuroraConfig, _LIN0, _LIN0),
    ("Aurora more", "aurora", AuroraConfig, _LIN0, {**_LIN0, **_BOTH, **_OTHER}),
    ("Aurora other", "aurora", AuroraConfig, _LIN0, {**_LIN1, **_OTHER}),
]
_REPLACED = {
    "TEST_CASES": CASES,
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": SEVERAL,
    "ALL_PEFT_CONFIG_CLASSES": [AuroraConfig],
}


def _counted(function, name: str):
    def call(*args, **kwargs):
        if not torch.compiler.is_compiling():
            calls[name] += 1
        return function(*args, **kwargs)

    return call


def pytest_configure(config) -> None:
    for name in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes", "skipf"):
        config.addinivalue_line("markers", f"{name}: PEFT's")
    aurora_linear.lowrank_linear = _counted(aurora_linear.lowrank_linear, "lowrank_linear")
    aurora_linear.AuroraLinear.forward = _counted(aurora_linear.AuroraLinear.forward, "forward")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc) -> None:
    """The marks on PEFT's tests hold these lists themselves; they are read after this."""
    for name, rows in _REPLACED.items():
        if hasattr(metafunc.module, name):
            getattr(metafunc.module, name)[:] = rows


def pytest_collection_modifyitems(items) -> None:
    given = [(item, getattr(item, "callspec", None)) for item in items]
    kept = [item for item, spec in given if spec and any(each is AuroraConfig for each in spec.params.values())]
    tests["collected"], tests["kept"] = len(items), len(kept)
    items[:] = kept


def pytest_sessionfinish() -> None:
    calls["own: plain torch"] = calls["forward"] - calls["lowrank_linear"]
    (COUNTS / f"aurora-{os.getpid()}.json").write_text(json.dumps({"calls": calls, "tests": tests}))
