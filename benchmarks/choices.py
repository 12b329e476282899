"""What "auto" takes on a GPU, as peft_kernels/fastest.py has it: the fastest of ours by operation, kind and dtype.

By the time in a CUDA graph, which is the device's: eager calls wait for the host, whoever computes. Where an operation
cannot be captured, by the eager one. A kind's cases count if Triton and whoever is compared with it are in them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import peft_kernels
from peft_kernels import kinds

FILE = Path(peft_kernels.__file__).parent / "fastest.py"
GAIN = 1.02  # times as fast as Triton: less is no reason to leave it
CORES = {"none": None, "diagonal": 1, "dense": 2}
KINDS: dict[str, Callable[[dict], tuple[str, str]]] = {  # of a case: the operation as `resolve` knows it, and its kind
    "lowrank_linear": lambda case: ("lowrank_linear", kinds.linear(case["K"], case["N"], case["dropout"] > 0)),
    "lowrank_projections": lambda case: (
        "lowrank_projections",
        kinds.linear(case["K"], max(case["N"], case["others"]), case["dropout"] > 0),
    ),
    "batched_lowrank_linear": lambda case: ("batched_lowrank_linear", kinds.linear(case["K"], case["N"], False)),
    "reconstruct": lambda case: ("reconstruct", kinds.core(CORES[case["core"]])),
    "weight_distance": lambda case: ("imitation_step" if "step" in case["kind"] else "weight_distance", ""),
    "gated_query": lambda case: ("gated_query", case["mode"]),
}


def fastest(device: dict) -> dict[tuple[str, str, str, int], str]:
    """{(operation, kind, "float32" or "half", architecture): backend} of one device's results."""
    found: dict[tuple[str, str, str, int], list[dict[str, float]]] = {}
    for case in device["cases"]:
        times = dict(_times(case["results"]))
        if "triton" in times:
            op, kind = KINDS[case["op"]](case)
            dtype = "float32" if case["dtype"] == "float32" else "half"
            found.setdefault((op, kind, dtype, device["architecture"]), []).append(times)
    return {key: _fastest(cases) for key, cases in sorted(found.items())}


def _times(rows: Sequence[dict]) -> Iterator[tuple[str, float]]:
    """Of each backend's default: the first of its providers."""
    seen = set()
    for row in rows:
        if row["backend"] and row["backend"] not in seen:
            seen.add(row["backend"])
            yield row["backend"], row["graph_ms"] or row["ms"]


def _fastest(cases: Sequence[dict[str, float]]) -> str:
    """By the geometric mean of how many times as fast as Triton."""
    speeds = {"triton": math.log(GAIN)}
    for name in ("cuda", "torch"):
        ratios = [math.log(times["triton"] / times[name]) for times in cases if name in times]
        if ratios:
            speeds[name] = sum(ratios) / len(ratios)
    return max(speeds, key=speeds.get)


def text(devices: Sequence[dict]) -> str:
    """fastest.py, by the first GPU."""
    device = next((each for each in devices if each["kind"] == "gpu"), None)
    rows = fastest(device) if device else {}
    lines = "".join(
        f'    ("{op}", "{kind}", "{dtype}", {arch}): "{name}",\n' for (op, kind, dtype, arch), name in rows.items()
    )
    return (
        '"""What "auto" takes on a GPU, by operation, kind, dtype and architecture: `make tables` makes it of '
        'results/."""\n\n'
        f'SOURCE = "{device["device"] + ", " + device["date"] if device else ""}"\n'
        f"FASTEST: dict[tuple[str, str, str, int], str] = {{{chr(10) + lines if lines else ''}}}\n"
    )
