"""`lowrank_linear`, forward and backward, against what else one would use: verified first, then timed.

    python -m peft_kernels.benchmarks.bench_lowrank_linear [--quick] [--dtype float32] [--threads 2] [--save FILE.json]
    pytest benchmarks/bench_lowrank_linear.py --benchmark-only

Every provider computes y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ and the gradients of x, A and B; the frozen linear alone, y and
dx. What differs from float64 by more than plain torch does raises and is not timed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_kernels import BackendUnavailableError, lowrank_linear
from peft_kernels.ops.lowrank_linear import lowrank_linear_reference

from . import cases, floor, tables, timing
from .cases import SCALE, Case, Tensors

OP = "lowrank_linear"
Forward = Callable[[Tensor], Tensor]
Built = tuple[Forward, tuple[Tensor, ...]]  # the forward, and the factors that it takes gradients for


# ---- providers ------------------------------------------------------------------------------------------------------


def _linear(case: Case, t: Tensors) -> Built:
    return lambda x: F.linear(x, t.weight, t.bias), ()


def _eager(case: Case, t: Tensors) -> Built:
    def forward(x: Tensor) -> Tensor:
        update = F.linear(F.linear(F.dropout(x, case.dropout), t.down), t.up)
        return F.linear(x, t.weight, t.bias) + update * SCALE

    return forward, (t.down, t.up)


def _peft(case: Case, t: Tensors) -> Built:
    import peft

    base = nn.Linear(1, 1, device=t.x.device, dtype=t.x.dtype)
    base.in_features, base.out_features = case.K, case.N
    base.weight, base.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (t.weight, t.bias))
    alpha = int(SCALE * case.R)
    config = peft.LoraConfig(r=case.R, lora_alpha=alpha, lora_dropout=case.dropout, target_modules=["linear"])
    layer = peft.inject_adapter_in_model(config, nn.ModuleDict({"linear": base}))["linear"].train()
    factors = nn.Parameter(t.down.detach()), nn.Parameter(t.up.detach())  # the same memory
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = factors
    return layer, factors


def _compiled(build: Callable[[Case, Tensors], Built]) -> Callable[[Case, Tensors], Built]:
    def build_compiled(case: Case, t: Tensors) -> Built:
        forward, factors = build(case, t)
        torch._dynamo.reset()  # each case a graph of its own, with constant sizes
        return torch.compile(forward, fullgraph=True, dynamic=False), factors

    return build_compiled


def _ours(backend: str, design: str | None) -> Callable[[Case, Tensors], Built]:
    def build(case: Case, t: Tensors) -> Built:
        def forward(x: Tensor) -> Tensor:
            return lowrank_linear(
                x, t.weight, t.bias, t.down, t.up, scale=SCALE, dropout_p=case.dropout, backend=backend, design=design
            )

        return forward, (t.down, t.up)

    return build


@dataclass(frozen=True)
class Provider:
    build: Callable[[Case, Tensors], Built]
    design: str | None  # as in floor.DESIGNS; None where a compiler decides what is launched
    backend: str | None = None  # of ours
    devices: tuple[str, ...] = ("cpu", "cuda")


PROVIDERS = {
    "frozen linear": Provider(_linear, "linear"),
    "PEFT": Provider(_peft, "eager"),
    "torch eager": Provider(_eager, "eager"),
    "ours, torch": Provider(_ours("torch", None), "torch", "torch"),
    "ours, triton D1": Provider(_ours("triton", "D1"), "D1", "triton", ("cuda",)),
    "ours, triton D3": Provider(_ours("triton", "D3"), "D3", "triton", ("cuda",)),
    "ours, cuda": Provider(_ours("cuda", None), "D1", "cuda", ("cuda",)),
    "torch compiled": Provider(_compiled(_eager), None),
    "PEFT compiled": Provider(_compiled(_peft), None),
}


# ---- verification ---------------------------------------------------------------------------------------------------


def results(forward: Forward, x: Tensor, factors: Sequence[Tensor], dy: Tensor) -> dict[str, Tensor]:
    y = forward(x)
    grads = torch.autograd.grad(y, (x, *factors), dy)
    return dict(zip(("y", "dx", "d_down", "d_up"), (y.detach(), *grads)))


def recover_mask(forward: Forward, factors: Sequence[Tensor], t: Tensors, seed: int) -> Tensor:
    """The mask that this seed leads to: with W = 0 and constant factors, dx is a constant where x was kept, else 0."""
    kept_values = [tensor.detach().clone() for tensor in t]
    with torch.no_grad():
        for tensor, value in zip(t, (1.0, 0.0, 0.0, 1.0, 1.0 / t.up.shape[0], 1.0)):
            tensor.fill_(value)
    torch.manual_seed(seed)
    mask = results(forward, t.x, factors, t.dy)["dx"] != 0
    with torch.no_grad():
        for tensor, value in zip(t, kept_values):
            tensor.copy_(value)
    return mask


def verify(name: str, provider: Provider, case: Case, built: Built, t: Tensors, seed: int = 1) -> None:
    """Raises cases.WrongResult unless y and every gradient are as good as plain torch's, under the recovered mask."""
    forward, factors = built
    dropout = case.dropout if factors else 0.0
    mask = recover_mask(forward, factors, t, seed) if dropout else None
    if provider.backend in ("triton", "cuda"):  # kernels round the probability to 16 bits
        dropout = round(dropout * 65536) / 65536

    def reference(dtype: torch.dtype) -> dict[str, Tensor]:
        x, weight, bias, down, up, dy = (tensor.detach().to(dtype).requires_grad_() for tensor in t)
        if not factors:
            return results(lambda x: F.linear(x, weight, bias), x, (), dy)

        def forward(x: Tensor) -> Tensor:
            return lowrank_linear_reference(x, weight, bias, down, up, scale=SCALE, mask=mask, dropout_p=dropout)

        return results(forward, x, (down, up), dy)

    torch.manual_seed(seed)
    got = results(forward, t.x, factors, t.dy)
    cases.check(name, got, reference(torch.float64), reference(case.torch_dtype))


# ---- one case -------------------------------------------------------------------------------------------------------


def build(name: str, provider: Provider, case: Case, t: Tensors) -> Built | str:
    """A verified provider, or the reason why this machine has none."""
    try:
        built = provider.build(case, t)
        verify(name, provider, case, built, t)
    except (ImportError, BackendUnavailableError, torch._dynamo.exc.BackendCompilerFailed) as error:
        return f"absent: {str(error).splitlines()[0]}"
    except ValueError as error:
        if not str(error).startswith("design:"):
            raise
        return f"absent: {error}"  # the design does not take this shape
    return built


def measure(case: Case, device: torch.device, providers: Sequence[str], rounds: int) -> dict:
    """One case: every provider verified, then timed. A JSON-ready record."""
    t = cases.make_tensors(case, device)
    built, absent = {}, {}
    for name in providers:
        found = build(name, PROVIDERS[name], case, t)
        (absent if isinstance(found, str) else built)[name] = found
    steps = {name: lambda index, pair=pair: _step(pair, inputs[index]) for name, pair in built.items()}
    inputs = [(t.x, t.dy)]
    graphs, launches = {}, {}
    if device.type == "cpu":
        probes = floor.cpu_probes(case.dtype)
        times = timing.time_on_cpu({name: lambda step=step: step(0) for name, step in steps.items()} | probes, rounds)
        record = floor.cpu_record(times["copy"].median, times["matmul"].median, case.dtype)
    else:
        copies = timing.copies_beyond_cache(t.x.nbytes + t.dy.nbytes, device)
        inputs += [(torch.randn_like(t.x).requires_grad_(), torch.randn_like(t.dy)) for _ in range(copies - 1)]
        times = {name: timing.time_on_gpu(step, copies) for name, step in steps.items()}
        for name, step in steps.items():
            try:
                graphs[name] = timing.time_in_graph(step, copies)
            except RuntimeError as error:
                absent[f"{name}, in a CUDA graph"] = str(error).splitlines()[0]
        launches = {name: timing.count_launches(lambda step=step: step(0)) for name, step in steps.items()}
        record = floor.gpu_record(torch.cuda.get_device_name(device))

    sizes = (case.M, case.K, case.N, case.R, t.x.element_size())
    rows = []
    for name, (forward, factors) in built.items():
        provider, time = PROVIDERS[name], times[name]
        work = provider.design and list(chain(*floor.passes(provider.design, *sizes, case.dropout > 0)))
        frozen = provider.design == "linear"
        least = floor.total(floor.compulsory(*sizes[:3], 0 if frozen else case.R, sizes[4]))
        least = record and least.seconds(record, case.dtype)
        graph = graphs.get(name)
        best = min(time.median, graph.median if graph else time.median)
        rows.append(
            {
                "provider": name,
                "backend": provider.backend,
                "design": provider.design,
                "verified": True,
                "ms": time.median * 1e3,
                "spread_ms": time.spread * 1e3,
                "graph_ms": graph and graph.median * 1e3,
                "speed_vs_peft": timing.speed_against(time, times["PEFT"]) if "PEFT" in times else None,
                "graph_speed_vs_peft": graphs["PEFT"].median / graph.median if graph and "PEFT" in graphs else None,
                "floor_ms": least and least * 1e3,
                "percent_of_floor": least and 100 * least / best,
                "flops": work and floor.total(work).flops,
                "bytes": work and floor.total(work).bytes,
                "launches": launches.get(name, work and len(work)),
                "saved_bytes": timing.saved_bytes(forward, t.x, (t.weight, t.bias, *factors)),
            }
        )
    rates = record and asdict(record)
    return {"op": OP, **asdict(case), "title": str(case), "rates": rates, "results": rows, "absent": absent}


def _step(built: Built, inputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    (forward, factors), (x, dy) = built, inputs
    return results(forward, x, factors, dy)


# ---- the command ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m peft_kernels.benchmarks.bench_{OP}", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="the first two shapes, few rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", help="float32 bfloat16 float16; bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--shape", nargs="+", type=_shape, metavar="M,K,N[,R]", help="instead of the usual shapes")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help=", ".join(PROVIDERS))
    parser.add_argument("--rounds", type=int, help="on a CPU: how often every provider has its turn")
    parser.add_argument("--threads", type=int, help="on a CPU")
    parser.add_argument("--save", metavar="FILE.json")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    on_cpu = device.type == "cpu"
    shapes = arguments.shape or (cases.CPU_SHAPES if on_cpu else cases.GPU_SHAPES)[: 2 if arguments.quick else None]
    dtypes = arguments.dtype or ["float32" if on_cpu else "bfloat16"]
    providers = arguments.providers or [name for name, each in PROVIDERS.items() if device.type in each.devices]
    rounds = arguments.rounds or (5 if arguments.quick else 25)

    run = tables.provenance(device)
    print(tables.describe(run), end="\n\n")
    for case in cases.cases(shapes, dtypes):
        record = measure(case, device, providers, rounds)
        print(tables.case_table(record), end="\n\n", flush=True)
        run["cases"].append(record)
    if arguments.save:
        tables.save(run, arguments.save)


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(map(int, text.split(",")))
    if len(sizes) not in (3, 4) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected M,K,N or M,K,N,R, got {text}")
    return sizes


# ---- pytest-benchmark, which needs no import: it calls these ---------------------------------------------------------


def pytest_generate_tests(metafunc) -> None:
    on_gpu = torch.cuda.is_available()
    found = cases.cases(cases.GPU_SHAPES, ["bfloat16"]) if on_gpu else cases.cases(cases.CPU_SHAPES, ["float32"])
    metafunc.parametrize("case", found, ids=[f"{c.M}x{c.K}x{c.N}-{c.dtype}-p{c.dropout:g}" for c in found])
    device = "cuda" if on_gpu else "cpu"
    metafunc.parametrize("provider", [name for name, each in PROVIDERS.items() if device in each.devices])


def test_lowrank_linear(benchmark, case: Case, provider: str) -> None:
    import pytest

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    t = cases.make_tensors(case, device)
    built = build(provider, PROVIDERS[provider], case, t)
    if isinstance(built, str):
        pytest.skip(built)

    def step() -> None:
        _step(built, (t.x, t.dy))
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = str(case)
    benchmark(step)


if __name__ == "__main__":
    sys.exit(main())
