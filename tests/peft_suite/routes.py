"""A pytest plugin: PEFT's tests with its LoRA linears fused by one of two routes; those of LoRA, without downloads.

PEFT_SUITE_ROUTE: "stock" (nothing changed) | "accelerate" (each model after each adapter that PEFT adds) | "fast" (each
LoraConfig when it is made);  PEFT_SUITE_COUNTS: a folder, where each process leaves what its layers and tests did
"""

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftType
from peft.tuners.lora.layer import Linear as StockLinear
from peft.tuners.tuners_utils import BaseTuner

from peft_kernels.integrations.peft import FusedLinear, accelerate, fast, fused_linear, lora

ROUTE = os.environ["PEFT_SUITE_ROUTE"]
COUNTS = Path(os.environ["PEFT_SUITE_COUNTS"])
calls: Counter[str] = Counter()
tests: Counter[str] = Counter()


def _count_calls() -> None:
    """A route that fuses nothing would pass every test."""
    for name in ("lowrank_linear", "batched_lowrank_linear"):
        setattr(fused_linear, name, _counted(getattr(fused_linear, name), name))
    forward = StockLinear.forward

    def counted_forward(self, x, *args, **kwargs):
        if not torch.compiler.is_compiling() and ROUTE != "stock":
            reason = self.why_stock(x) if isinstance(self, FusedLinear) else lora._why_left(self)
            reason = "the batch is mixed" if "adapter_names" in kwargs else reason
            calls[re.sub(r"adapter '[^']*'", "adapter", f"own: {reason}")] += 1
        return forward(self, x, *args, **kwargs)

    StockLinear.forward = counted_forward


def _counted(function, name: str):
    def call(*args, **kwargs):
        if not torch.compiler.is_compiling():
            calls[name] += 1
        return function(*args, **kwargs)

    return call


def _accelerate_what_is_built() -> None:
    inject = BaseTuner.inject_adapter

    def inject_adapter(self, model, *args, **kwargs):
        inject(self, model, *args, **kwargs)
        accelerate(self)  # whose model it is

    BaseTuner.inject_adapter = inject_adapter


def _make_configurations_fast() -> None:
    post_init = LoraConfig.__post_init__

    def __post_init__(self):
        post_init(self)
        if self.peft_type == PeftType.LORA:
            self._custom_modules = fast(self)._custom_modules

    LoraConfig.__post_init__ = __post_init__


def _about_lora(item) -> bool:
    """Whatever is not parametrised by another method's configuration."""
    given = getattr(item, "callspec", None)
    classes = [each for each in (given.params.values() if given else ()) if isinstance(each, type)]
    configs = [each for each in classes if issubclass(each, PeftConfig)]
    return not configs or LoraConfig in configs


class _Everything(Counter):
    def __contains__(self, key) -> bool:
        return True


def _needs_hub(error: BaseException | None) -> bool:
    """Downloads are no part of this: did an error come of being offline?"""
    while error is not None:
        if type(error).__name__ in ("OfflineModeIsEnabled", "LocalEntryNotFoundError"):
            return True
        if isinstance(error, OSError | ValueError) and "huggingface.co" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def pytest_configure(config) -> None:
    for name in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes", "skipf"):
        config.addinivalue_line("markers", f"{name}: PEFT's")
    _count_calls()
    if ROUTE != "stock":
        {"accelerate": _accelerate_what_is_built, "fast": _make_configurations_fast}[ROUTE]()


def pytest_collection_modifyitems(items) -> None:
    kept = [item for item in items if _about_lora(item)]
    tests["collected"], tests["kept"] = len(items), len(kept)
    items[:] = kept
    # PEFT's hub_online_once goes online for every model that it has not seen
    sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES = _Everything()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and call.excinfo is not None and _needs_hub(call.excinfo.value):
        path, line, _ = item.location
        report.outcome, report.longrepr = "skipped", (path, line or 0, "Skipped: needs a download from the hub")
    return report


def pytest_sessionfinish() -> None:
    """Of one process; with xdist each worker leaves its own, and has collected everything."""
    (COUNTS / f"{ROUTE}-{os.getpid()}.json").write_text(json.dumps({"calls": calls, "tests": tests}))
