"""The floor and the model of `gated_query`'s benchmark, and that it refuses what is wrong."""

import dataclasses

import pytest
import torch
from benchmark_cases import reason

from peft_kernels.benchmarks import bench_gated_query as bench
from peft_kernels.benchmarks import floor, runner
from peft_kernels.benchmarks.floor import gated_query as costs

CPU = torch.device("cpu")
CASES = [bench.Case(3, 7, 24, mode, backward=backward) for mode in bench.MODES for backward in (False, True)]
EAGER = [name for name in runner.providers_on(bench.BENCH, "cpu") if name != "formula, compiled"]


def _title(case):
    return f"{case.mode}-{'both' if case.backward else 'forward'}"


# ---- the floor and the model ----------------------------------------------------------------------------------------


def test_floor_by_hand():
    """8 · 40 rows of 768 in bfloat16 are 492 KB: four of them forward, which 4.3 TB/s moves in 0.46 µs."""
    rows = 8 * 40 * 768 * 2
    forward, backward = costs.compulsory("additive", 8, 40, 768, 2)
    assert forward == (7 * rows // 2, 4 * rows + 4 * 1536) and backward == (8 * rows // 2, 5 * rows + 6 * 1536)
    assert forward.seconds(floor.H200, "bfloat16") == pytest.approx(0.46e-6, rel=1e-2)
    forward, backward = costs.compulsory("gated", 8, 40, 768, 2)
    assert forward.bytes == 3 * rows + 2 * 1536 + 320 and backward.bytes == 5 * rows + 4 * 1536 + 320


@pytest.mark.parametrize("mode", bench.MODES)
def test_bytes_of_the_floor_are_those_of_its_tensors(mode):
    """What a call takes and returns, and the gradients that its backward takes and returns."""
    case = bench.Case(3, 7, 24, mode)
    t = bench.make_tensors(case, CPU)
    taken = [each for each in t[:-1] if each is not None]
    vectors = sum(each.nbytes for each in taken if each.dim() == 1)
    wide = sum(each.nbytes for each in taken if each.dim() == 3)
    forward, backward = bench.least(case, None)
    assert forward.bytes == sum(each.nbytes for each in taken) + t.dy.nbytes
    # Backward h is not read and its gradient not written where it is dy itself; "additive" reads no beta.
    own = t.hidden.nbytes if mode == "additive" else 0
    unread = 2 * t.beta.nbytes if mode == "additive" else 0
    mask = 0 if t.padding_mask is None else t.padding_mask.nbytes
    assert backward.bytes == t.dy.nbytes + 2 * (wide - own) + 2 * vectors - unread + mask


@pytest.mark.parametrize("mode", bench.MODES)
def test_kernels_launch_as_often_as_the_model_says(mode):
    from peft_kernels.records import Gate, Modulated
    from peft_kernels.triton_kernels import gated_query as kernels
    from peft_kernels.triton_kernels.common import record_launches

    case = bench.Case(8, 40, 768, mode)
    t = [each if each is None else each.detach() for each in bench.make_tensors(case, CPU)]
    hidden, text, gamma, beta, cross, cross_gamma, cross_beta, mask, dy = (
        each if each is None or each.dim() < 3 else each.flatten(0, 1) for each in t
    )
    moved = Modulated(text, gamma, beta)
    with record_launches(run=False) as launches:
        if mode == "additive":
            args = (moved, Modulated(cross, cross_gamma, cross_beta), 0.1)
            kernels.additive_query_fwd(hidden, *args)
            kernels.additive_query_bwd(dy, *args, (True,) * 6)
        else:
            _, *gate = kernels.gated_query_fwd(hidden, moved, mask, 40)
            kernels.gated_query_bwd(dy, hidden, moved, mask, Gate(*gate), (True,) * 4)
    assert len(launches) == sum(map(len, bench.passes(case, "fused", "cuda")))
    finish = launches[-1]
    count = next(t.shape[0] for t in finish.args if isinstance(t, torch.Tensor))
    sums = bench.passes(case, "fused", "cuda")[1][-1].flops
    assert sums == (3 if mode == "additive" else 2) * count * 768


def test_an_unknown_design_is_refused():
    with pytest.raises(ValueError, match="design"):
        costs.passes("loop", "gated", 3, 7, 24, 2, 3)


# ---- verify, then time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=_title)
def test_right_providers_pass(case, dtype):
    record = runner.measure(bench.BENCH, dataclasses.replace(case, dtype=dtype), CPU, EAGER, rounds=1)
    assert {row["provider"] for row in record["results"]} == set(EAGER) and not record["absent"]


def test_some_padding_and_some_sequence_of_it():
    mask = bench.make_tensors(bench.Case(8, 5, 24, "gated"), CPU).padding_mask
    assert mask.any() and not mask.all() and not mask.any(dim=1).all()


def _wrong(change):
    def build(case, t):
        built = bench.PROVIDERS["formula, eager"].build(case, t._replace(padding_mask=None) if change == "mask" else t)
        factors = dict(built.factors) if change != "gradient" else built.factors | {"d_beta": t.gamma}
        return built._replace(forward=lambda x: built.forward(x) * (1.01 if change == "size" else 1), factors=factors)

    return runner.Provider(build, None)


@pytest.mark.parametrize("change", ["mask", "size", "gradient"])
def test_wrong_provider_is_refused(change):
    assert reason(bench.BENCH, _wrong(change), bench.Case(3, 7, 24, "gated")).startswith("wrong: ")
