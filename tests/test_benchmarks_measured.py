"""What docs/measured.md says of losing shapes, of predictions, and of kernels and their tiles."""

import pytest
from measured_cases import BACKENDS, RATES, WIDE, case_of, device_of, section_of

from peft_kernels.benchmarks import __main__ as every
from peft_kernels.benchmarks import measured, predictions, tables
from peft_kernels.benchmarks.gpu import tuning
from peft_kernels.triton_kernels import common, lowrank_linear_bwd, lowrank_linear_fwd

# ---- losses ---------------------------------------------------------------------------------------------------------


def _lost(device):
    return [(clock, ours, faster) for _, (_, _, clock, ours, _, faster) in measured.losses(device)]


def test_losing_cases_are_listed_and_the_worst_first():
    slow = {"ours, torch": (2.0, 2.0), "ours, triton passes": (1.0, 0.8), "ours, cuda": (1.5, 0.4)}
    bounds = {"frozen linear": (0.1, 0.1), "frozen linears": (0.1, 0.1)}
    device = device_of(cases=[case_of({**slow, "PEFT": (0.8, 0.5), **bounds})])
    assert _lost(device) == [("eager", "ours, triton passes", "PEFT 1.25×")]  # in a graph CUDA's are faster than PEFT
    device["foreign"] = [case_of({"ours, triton passes": (1.0, 0.8), "unsloth": (3.0, 0.4)})]
    assert _lost(device) == [
        ("graph", "ours, triton passes", "unsloth 2.00×"),
        ("eager", "ours, triton passes", "PEFT 1.25×"),
    ]
    assert "unsloth 2.00×" in section_of(device, "Where we lose")
    assert "somebody is faster" in tables.status([device])


def test_plain_torch_of_ours_counts_as_another_beside_kernels():
    case = case_of({"ours, torch": (0.5, 2.0), "ours, triton passes": (1.0, 1.0)})
    assert _lost(device_of(cases=[case])) == [("eager", "ours, triton passes", "ours, torch 2.00×")]
    cpu = case_of({"ours, torch": (2.0, None), "ours, torch, order given": (1.0, None), "PEFT": (1.5, None)})
    assert _lost(device_of("cpu", cases=[cpu])) == []  # the faster of torch's is ours there


def test_case_without_a_kernel_of_ours_is_the_worst():
    without = case_of({"PEFT": (1.0, None)})
    cases = [case_of({"ours, triton passes": (9.0, None), "PEFT": (1.0, None)}), without]
    assert [ours for _, ours, _ in _lost(device_of(cases=cases))] == ["ours, triton passes"]  # time was up before ours
    without["absent"]["ours, triton passes"] = "absent: rank"
    assert [ours for _, ours, _ in _lost(device_of(cases=cases))] == ["none", "ours, triton passes"]


def test_losing_steps_are_listed_too():
    step = {"model": "vilt", "size": "base", "title": "ViLT-B", "batch": 32, "dtype": "bfloat16", "ms": 12.3}
    step |= {"spread_ms": 0.1, "peak_bytes": 5e9, "launches": 70, "trained": 7e6, "mode": "graph", "dropout": 0.1}
    lost = {**step, "method": "our LoRA", "speed_vs": {"PEFT LoRA": 0.5, "full tuning": 0.4}}
    won = {**step, "method": "MoIL", "speed_vs": {"PEFT LoRA": 0.5, "MoIL, authors' formula": 1.5}}
    device = device_of(steps=[lost, won])
    assert _lost(device) == [("graph", "our LoRA", "PEFT LoRA 2.00×")]
    table = section_of(device, "Training steps")
    assert "| ViLT-B" in table and "12.3" in table and "1.50×" in table


def test_nothing_lost_is_said():
    device = device_of(cases=[case_of({"ours, triton passes": (1.0, 1.0), "PEFT": (2.0, 2.0)})])
    assert section_of(device, "Where we lose").strip().startswith("Nowhere")


# ---- predictions ----------------------------------------------------------------------------------------------------


def _line(device, name):
    (line,) = (line for line in section_of(device, "Against predictions").splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_miss_is_marked_and_explained_or_called_unexplained(monkeypatch):
    name = "whole operation, ours, 8192 × 4096²"
    device = device_of(
        cases=[case_of({"ours, triton passes": (9.0, 1.8), "ours, cuda": (9.0, 1.9), "PEFT": (9.0, 1.15)})]
    )
    assert _line(device, name) == ["900 µs", "1800 µs", "2.00", "**missed by 2.0 ×**: unexplained"]
    monkeypatch.setitem(predictions.EXPLAINED, name, "Registers.")
    assert _line(device, name)[-1] == "**missed by 2.0 ×**: Registers."
    assert _line(device, "whole operation, PEFT, 8192 × 4096²") == ["1150 µs", "1150 µs", "1.00", ""]
    slower = _line(device, "speed against PEFT, dropout 0, 8192 × 4096²")
    assert slower[1:] == ["0.64 ×", "0.53", "**missed by 1.9 ×**: unexplained"]
    assert _line(device, "speed against PEFT, dropout 0.1, 8192 × 4096²")[1:] == ["not measured", "–", ""]


@pytest.mark.parametrize(
    ("low", "high", "value", "ratio", "verdict"),
    [
        (10, 10, 15, 1.5, ""),
        (10, 10, 15.1, 1.51, "missed by 1.5 ×"),
        (10, 10, 6, 0.6, "missed by 1.7 ×"),
        (31, 45, 40, 1.0, ""),
        (31, 45, 90, 2.0, "missed by 2.0 ×"),
        (2.0, None, 9.0, 4.5, "met"),
        (2.0, None, 1.9, 0.95, "missed"),
        (2.0, None, 1.0, 0.5, "missed by 2.0 ×"),
        (None, 1.5, 0.5, 1 / 3, "met"),
        (None, 1.5, 3.0, 2.0, "missed by 2.0 ×"),
    ],
)
def test_what_a_miss_is(low, high, value, ratio, verdict):
    prediction = predictions.Prediction("x", low, high, "", lambda device: None)
    told = f"**{verdict}**: unexplained" if "by" in verdict else verdict
    assert prediction.ratio(value) == pytest.approx(ratio) and prediction.verdict(value) == told


def test_every_prediction_finds_what_a_run_measures():
    """Its case goes by a title of the bench's, its kernel by a name in triton_kernels/."""
    times = dict.fromkeys(("PEFT", "frozen linear", "authors' formula", *tuning.FOREIGN, *BACKENDS), (1.0, 1.0))
    names = [name for module in (common, lowrank_linear_fwd, lowrank_linear_bwd) for name in vars(module)]
    kernels = [{"kernel": name, "us": 6.0, "calls": 2.0} for name in names if name.endswith("_kernel")]
    device, benches = device_of(), {bench.op: bench for bench in every.BENCHES}
    for op in ("lowrank_linear", "reconstruct", "weight_distance"):
        for title in (case.title for case in benches[op].cases(False, ["bfloat16"])):
            device["cases"].append(case_of(times, title, op))
            device["profile"].append({"op": op, "case": title, "provider": predictions.PASSES, "kernels": kernels})
    found = {each.name: each.find(device) for each in predictions.PREDICTIONS}
    assert len(found) == len(predictions.PREDICTIONS) and predictions.EXPLAINED.keys() <= found.keys()
    assert None not in found.values() and found["sum, 8192 × 4096²"] == 3.0


# ---- kernels, tiles, variants ---------------------------------------------------------------------------------------


def test_kernels_show_their_share_of_the_floor():
    bytes_read = 2 * (8192 * 4096 + 16 * 4096 + 8192 * 16)  # x, A and z
    us = 2 * bytes_read / RATES["bytes_per_s"] * 1e6
    rows = [{"kernel": "_shrink_kernel", "us": us, "calls": 1.0}, {"kernel": "void a::b_kernel<int>(c)", "us": 3.0}]
    record = {"op": "lowrank_linear", "case": WIDE, "dtype": "bfloat16", "provider": "ours, triton passes"}
    record |= {"backend": "triton", "kernels": rows, "us": us + 3}
    absent = {"op": "lowrank_linear", "case": WIDE, "provider": "ours, cuda", "backend": "cuda", "absent": "no library"}
    device = device_of(profile=[record, absent], cases=[case_of({})])
    text = section_of(device, "Kernels")
    assert f"| {us + 3:.1f} | shrink {us:.1f} (50 %), b 3.0 |" in text
    assert "- ours, cuda, 1 ×: no library" in text
    assert "(50 %)" not in section_of(device_of(profile=[record]), "Kernels")  # without a case nothing tells the rates


def test_tiles_and_variants_are_shown():
    tile = {"op": "gated_query", "case": "c", "kernel": "k", "from": "Tile(rows=1)", "to": "Tile(rows=2)"}
    tile |= {"us_from": 5.0, "us_to": 4.0, "spread_us": 0.1, "tried": 3, "left_out": {"x": "spills"}}
    variant = {"case": "c", "variant": "more strips", "whole": False}
    timed = {"base_us": 5.0, "base_spread_us": 0.1, "variant_us": 4.0, "variant_spread_us": 0.1, "ratio": 1.25}
    device = device_of(search=[tile], variants=[{**variant, "absent": "changes nothing here"}, {**variant, **timed}])
    text = section_of(device, "Tiles and variants")
    assert "| (rows=1) | (rows=2) | 5.00 | 4.00 | 0.10 | 3 | 1 |" in text
    assert "| more strips | 5.00 | 0.10 | 4.00 | 0.10 | 1.250× |" in text
    assert "- more strips, 1 ×: changes nothing here" in text
