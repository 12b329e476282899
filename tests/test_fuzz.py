"""Random cases by Hypothesis: every operation against float64, adapters through training, files, merging and export.

CI takes a few, the same ones each time; `make fuzz` takes 10,000 new ones.
"""

import tempfile
from pathlib import Path

import batched_cases
import gated_query_cases
import lowrank_cases
import projections_cases
import pytest
import reconstruct_cases
import torch
from adapter_cases import METHODS
from hypothesis import given, settings
from hypothesis import strategies as st
from moil_cases import experts, output, task_loss
from test_weight_distance import REDUCTIONS, check_shapes

from peft_kernels import lowrank_linear

peft = pytest.importorskip("peft")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
backends = st.integers(0, 49).map(lambda i: "triton" if i == 49 else "torch")  # interpreted, a hundred times as slow
sizes, ranks, dtypes = st.integers(1, 40), st.integers(1, 12), st.sampled_from(DTYPES)
blocks, cores = st.integers(1, 3), st.sampled_from([None, "flat diagonal", "flat dense", "diagonal", "dense"])


@st.composite
def mixed(draw):
    """(dtype, that of the factors)"""
    dtype = draw(dtypes)
    return dtype, draw(st.sampled_from([None, torch.float32])) if dtype != torch.float32 else None


@st.composite
def lowrank(draw):
    core, (dtype, factor_dtype) = draw(cores), draw(mixed())
    grid = {"out_blocks": draw(blocks), "in_blocks": draw(blocks)} if core in ("diagonal", "dense") else {}
    place = draw(st.sampled_from([None, "input", "rank", "core"]))
    dropout = {} if place is None else {"dropout_p": draw(st.sampled_from([0.1, 0.5])), "dropout_on": place}
    return lowrank_cases.Problem(
        draw(sizes), draw(sizes), draw(sizes), draw(ranks), **grid, **dropout, core=core, dtype=dtype,
        factor_dtype=factor_dtype, bias=draw(st.booleans()), scale=draw(st.sampled_from([-2.0, 0.1, 1.0])),
    )  # fmt: skip


@st.composite
def projections(draw):
    (dtype, factor_dtype), place = draw(mixed()), draw(st.sampled_from([None, "input", "rank"]))
    dropout = {} if place is None else {"dropout_p": draw(st.sampled_from([0.1, 0.5])), "dropout_on": place}
    shared = draw(st.booleans())
    return projections_cases.Problem(
        draw(sizes), draw(sizes), tuple(draw(st.lists(sizes, min_size=1, max_size=4))), draw(ranks), dtype=dtype,
        factor_dtype=factor_dtype, shared=shared, stacked=draw(st.booleans()), **dropout,
        core=draw(st.sampled_from([None, "diagonal", "dense"])),
        precomputed_hidden=shared and place != "input" and draw(st.booleans()),
    )  # fmt: skip


def check_strides(case, backend):
    """Arguments that are transposed in memory give what contiguous ones give, under autocast too."""
    tensors = {name: t.detach() for name, t in case.tensors(DEVICE).items()}
    turned = {name: t.mT.contiguous().mT if t.dim() > 1 else t for name, t in tensors.items()}
    half, results = torch.bfloat16 if case.rows % 2 else None, []
    for each in (tensors, turned):
        leaves = [t.requires_grad_() for t in each.values()]
        torch.manual_seed(7)
        with torch.autocast(DEVICE, half, enabled=half is not None and case.dtype == torch.float32):
            dropout = {"dropout_p": case.dropout_p, "dropout_on": case.dropout_on}
            y = lowrank_linear(**{"bias": None, **each}, scale=case.scale, **dropout, backend=backend)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, case.gradient(DEVICE).to(y.dtype))])
    ulp = lowrank_cases.ULP[results[0][0].dtype]
    for ours, same in zip(*results):
        assert (ours - same).abs().max() <= 8 * ulp * same.abs().max().clamp_min(1), case


@st.composite
def reconstruction(draw):
    core, (dtype, factor_dtype) = draw(cores), draw(mixed())
    stack = core in ("diagonal", "dense") and draw(st.booleans())
    grid = {"out_blocks": draw(blocks), "in_blocks": 1 if stack else draw(blocks)}
    grid = grid if core in ("diagonal", "dense") else {}
    base = draw(st.sampled_from(["full", None, *(["shared"] if stack else [])]))
    return reconstruct_cases.Problem(
        draw(sizes), draw(sizes), draw(ranks), **grid, core=core, base=base, stack=stack, dtype=dtype,
        factor_dtype=factor_dtype if base else None, scale=draw(st.sampled_from([-2.0, 0.1, 1.0])),
    )  # fmt: skip


@st.composite
def query(draw):
    mode, (dtype, vector_dtype) = draw(st.sampled_from(gated_query_cases.MODES)), draw(mixed())
    return gated_query_cases.Problem(
        mode, draw(st.integers(1, 4)), draw(st.integers(1, 20)), draw(sizes),
        draw(st.sampled_from(["none", "some"])), dtype, vector_dtype,
    )  # fmt: skip


@st.composite
def batched(draw):
    adapters, (dtype, factor_dtype) = draw(st.integers(1, 4)), draw(mixed())
    index = tuple(draw(st.lists(st.integers(-1, adapters - 1), min_size=1, max_size=80)))
    return batched_cases.Problem(
        index, adapters, draw(sizes), draw(sizes), draw(ranks), dtype, factor_dtype, draw(st.booleans()),
        draw(st.sampled_from([None, 1.7])),
    )  # fmt: skip


distances = st.tuples(st.lists(st.tuples(sizes, sizes, ranks), min_size=1, max_size=4), st.sampled_from(REDUCTIONS))
adapters = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["lora", "moil", "aurora"]),
        "targets": st.lists(st.sampled_from(["qkv", "fc1", "fc2"]), min_size=1, max_size=3, unique=True),
        "rank": st.integers(1, 6),
        "bias": st.booleans(),
        "seed": st.integers(0, 9),
        "modules_to_save": st.sampled_from([(), ("head",)]),
    }
)


def check_adapter(case, backend):
    """Wrap, train, save and load; merge and back; export and load that as stock LoRA."""
    cls, config_class, options = METHODS[case["method"]]
    options = {**options, **{name: case[name] for name in ("targets", "rank", "modules_to_save")}, "backend": backend}
    model, batch = experts(case["seed"], bias=case["bias"])
    adapter = cls.wrap(model, config_class(**options))
    optimizer = torch.optim.AdamW(adapter.param_groups(1e-2), foreach=False)
    for _ in range(2):
        task_loss(model.train(), batch).backward()
        if case["method"] == "moil":
            adapter.step()
        optimizer.step()
        optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        trained = output(model.eval(), batch)
        adapter.save_pretrained(Path(folder, "own"))
        adapter.export_lora(Path(folder, "stock"))
        loaded = cls.from_pretrained(experts(case["seed"], bias=case["bias"])[0].eval(), Path(folder, "own"))
        assert torch.equal(output(loaded.model, batch), trained)
        stock = peft.PeftModel.from_pretrained(experts(case["seed"], bias=case["bias"])[0], Path(folder, "stock"))
        torch.testing.assert_close(output(stock.eval(), batch), trained, rtol=1e-4, atol=1e-4)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    adapter.merge()
    torch.testing.assert_close(output(model, batch).detach(), trained, rtol=1e-4, atol=1e-4)
    adapter.unmerge()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def check(cases, **options):
    return lambda case, backend: cases.assert_as_accurate_as_torch(case, DEVICE, backend, **options)


CHECKS = {  # (cases, check, how many in CI, how many in all)
    "lowrank_linear": (lowrank(), check(lowrank_cases, conditioned=True), 10, 3000),
    "projections": (projections(), check(projections_cases, conditioned=True), 8, 1500),
    "strides": (lowrank(), check_strides, 6, 1500),
    "reconstruct": (reconstruction(), check(reconstruct_cases), 8, 1500),
    "gated_query": (query(), check(gated_query_cases), 8, 1500),
    "batched": (batched(), check(batched_cases, conditioned=True), 8, 1500),
    "weight_distance": (distances, lambda case, backend: check_shapes(*case, backend), 6, 700),
    "adapters": (adapters, check_adapter, 4, 300),
}


@pytest.mark.kernels(run=False)
@pytest.mark.timeout(0)
@pytest.mark.parametrize("in_ci", [True, pytest.param(False, marks=pytest.mark.sweep)], ids=["few", "all"])
@pytest.mark.parametrize("name", CHECKS)
def test_random_cases(name, in_ci):
    cases, holds, few, many = CHECKS[name]
    run = given(cases, backends)(lambda case, backend: holds(case, backend))
    settings(max_examples=few if in_ci else many, derandomize=in_ci, deadline=None)(run)()
