"""Records of a GPU's run with invented figures, and what docs/measured.md says of them."""

from peft_kernels.benchmarks import measured, predictions, results

RATES = {"name": "x", "bytes_per_s": 3e12, "flops_per_s": {"bfloat16": 8e14}, "source": "invented"}
BACKENDS = {"ours, torch": "torch", "ours, triton passes": "triton", "ours, cuda": "cuda", "ours, triton": "triton"}
BACKENDS["ours, torch, order given"] = "torch"
WIDE = predictions.title(predictions.WIDE, 0.0)


def case_of(times, name=WIDE, op="lowrank_linear", **more):
    """A case of a GPU. times: eager and graphed milliseconds by provider"""
    rows = []
    for provider, (ms, graph_ms) in times.items():
        row = {"provider": provider, "backend": BACKENDS.get(provider), "ms": ms, "graph_ms": graph_ms}
        row |= {"spread_ms": 0.0, "graph_spread_ms": 0.0, "floor_ms": 0.5, "percent_of_floor": 60.0, "gb_per_s": 1.0}
        rows.append(row | {"percent_of_copy": 95.0, "tflop_per_s": 1.0, "bytes": 1, "flops": 1, "launches": 7} | more)
    return {"op": op, "title": name, "dtype": "bfloat16", "rates": RATES, "absent": {}, "results": rows}


def device_of(kind="gpu", **sections):
    run = {"kind": kind, "device": "NVIDIA Test", "date": "2026-03-04", "driver": "1.2", "threads": None, "commit": "c"}
    (device,) = results.by_device([{**run, "versions": {}, "cases": [], **sections}])
    return device


def section_of(device, title):
    text = measured.page([device])
    return text.partition(f"### {title}\n")[2].partition("\n### ")[0]
