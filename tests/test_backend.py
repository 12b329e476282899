"""resolve, use_backend and the environment variable: precedence, reasons, and errors instead of silent fallbacks."""

import threading

import pytest
import torch
from able_machine import OnGpu, constant, everything_runs
from imitation_cases import Layer

import peft_kernels
from peft_kernels import BackendUnavailableError, Choice, backend, lowrank_linear, resolve, use_backend
from peft_kernels.triton_kernels import support as triton_support
from peft_kernels.triton_kernels.config import MAX_RANK, LowRankShape, batched_config, lowrank_linear_config

X = torch.ones(2, 4)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def on_gpu(monkeypatch):
    everything_runs(monkeypatch)


def test_auto_takes_torch_on_a_cpu():
    choice = resolve("lowrank_linear", [X])
    assert choice.name == "torch" and "cpu" in choice.reason


def test_auto_takes_triton_on_a_gpu(on_gpu):
    choice = resolve("lowrank_linear", [OnGpu()])
    assert choice.name == "triton" and "GPU" in choice.reason


@pytest.mark.parametrize(("dtype", "rank", "reason"), [(torch.float64, 4, "float64"), (torch.float32, 65, "64")])
def test_auto_falls_back_to_torch_and_says_why(on_gpu, dtype, rank, reason):
    choice = resolve("lowrank_linear", [OnGpu(dtype)], rank=rank)
    assert choice.name == "torch" and reason in choice.reason


def test_kernels_that_were_left_out_are_missed_once(on_gpu, monkeypatch, caplog):
    """pip hides what a build says, and Triton takes over in silence."""
    monkeypatch.setitem(backend.FASTEST, ("op", "", "float32", 90), "cuda")
    monkeypatch.setattr(backend.SUPPORT["cuda"], "missing", lambda device_type: "left out, no nvcc.")
    backend._tell_once.cache_clear()
    for _ in range(2):
        choice = resolve("op", [OnGpu()])
        assert choice.name == "triton" and "left out, no nvcc" in choice.reason
    assert [record.getMessage().partition(".")[0] for record in caplog.records] == ["left out, no nvcc"]


def test_precedence_is_call_then_context_then_environment(on_gpu, monkeypatch):
    tensors = [OnGpu()]
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "torch")
    assert resolve("op", tensors) == Choice("torch", f"asked for by {backend.ENVIRONMENT_VARIABLE}")
    with use_backend("cuda"):
        assert resolve("op", tensors).name == "cuda"
        assert resolve("op", tensors, "triton").name == "triton"
        with use_backend("auto"):
            assert resolve("op", tensors).name == "torch"
        assert resolve("op", tensors).name == "cuda"
    assert resolve("op", tensors).name == "torch"


def test_context_ends_after_an_exception_and_stays_in_its_thread():
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert backend._requested.names == ("auto",)
    seen = []
    with use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(backend._requested.names[-1]))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_one_context_object_may_be_entered_twice(on_gpu):
    context = use_backend("torch")
    with context, context:
        assert resolve("op", [OnGpu()]).name == "torch"
    assert resolve("op", [OnGpu()]).name == "triton"


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_named_backend_that_cannot_run_raises_with_the_reason(name, monkeypatch):
    monkeypatch.setattr(backend.SUPPORT[name], "missing", lambda device_type: "no such device here")
    message = rf"backend '{name}' \(asked for by backend=\) cannot run: no such device here"
    with pytest.raises(BackendUnavailableError, match=message):
        resolve("op", [X], name)
    with use_backend(name), pytest.raises(ValueError, match="asked for by use_backend"):
        resolve("op", [X])
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, name)
    with pytest.raises(ValueError, match=backend.ENVIRONMENT_VARIABLE):
        lowrank_linear(X, torch.ones(3, 4), None, torch.ones(1, 4), torch.ones(3, 1))


@pytest.mark.parametrize("there", [True, False])
def test_triton_needs_triton(there, monkeypatch):
    monkeypatch.setattr(triton_support, "no_gpu_for_kernels", lambda device_type: "")
    monkeypatch.setattr(triton_support, "importable", lambda name: there)
    triton_support.missing.cache_clear()
    try:
        assert triton_support.missing("cuda") == ("" if there else "triton is not installed (pip install triton)")
    finally:
        triton_support.missing.cache_clear()


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend: expected 'auto'"):
        resolve("op", [X], "trition")
    with pytest.raises(ValueError, match="name: expected"):
        use_backend("numpy")
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "gpu")
    with pytest.raises(ValueError, match=f"{backend.ENVIRONMENT_VARIABLE}: expected"):
        resolve("op", [X])


@pytest.mark.parametrize(("name", "most"), [("triton", MAX_RANK), ("cuda", constant("kLowRankLinearMaxRank"))])
def test_kernels_refuse_float64_and_large_ranks(name, most, on_gpu):
    with pytest.raises(BackendUnavailableError, match="float64"):
        resolve("lowrank_linear", [X.double()], name)
    assert resolve("lowrank_linear", [OnGpu()], name, rank=most).name == name
    with pytest.raises(BackendUnavailableError, match=f"ranks up to {most}, not {most + 1}"):
        resolve("lowrank_linear", [OnGpu()], name, rank=most + 1)


@pytest.mark.parametrize("op", ["lowrank_linear", "lowrank_hidden"])
@pytest.mark.parametrize("blocks", [(16, 1), (1, 16), (16, 16)])
def test_cuda_refuses_wide_hidden_activations(op, blocks, on_gpu):
    """As soon as the backend is chosen, by name or not."""
    with pytest.raises(BackendUnavailableError, match=r"'cuda' .* cannot run: .* rank × blocks up to 1024, not 1600"):
        resolve(op, [OnGpu()], "cuda", rank=100, blocks=blocks)
    assert resolve(op, [OnGpu()], "cuda", rank=64, blocks=blocks).name == "cuda"


def test_cuda_refuses_wide_hidden_activations_of_a_call(on_gpu):
    x, weight, core = torch.ones(2, 4), torch.ones(32, 4), torch.ones(16, 1, 100)
    with pytest.raises(BackendUnavailableError, match="rank × blocks up to 1024, not 1600"):
        lowrank_linear(x, weight, None, torch.ones(100, 4), torch.ones(2, 100), core, backend="cuda")


def test_status_names_every_backend():
    status = backend.status()
    assert set(status) == set(backend.BACKENDS)
    assert status["torch"] is None
    assert all(reason is None or reason for reason in status.values())


def test_explain_names_each_adapter_layer():
    from peft_kernels.layers import LowRankLinear

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), LowRankLinear(torch.nn.Linear(4, 4), 2))
    explanation = peft_kernels.explain(model)
    assert list(explanation) == ["1"]
    assert explanation["1"].name in backend.BACKENDS and explanation["1"].reason
    model[1].backend = "cuda"
    model[1].rank = 1000
    assert peft_kernels.explain(model)["1"].name == "none"


def test_triton_has_one_rank_limit(on_gpu):
    """What the backend says before a call, and what its tiles say in one."""
    assert triton_support.MAX_RANK is MAX_RANK
    for function in (lambda rank: lowrank_linear_config(LowRankShape(8, 8, rank), torch.float32, 90),
                     lambda rank: batched_config(rank, torch.float32, 90)):  # fmt: skip
        function(MAX_RANK)
        with pytest.raises(ValueError, match=f"ranks up to {MAX_RANK}, not {MAX_RANK + 1}"):
            function(MAX_RANK + 1)


def test_the_built_extension_has_the_limits_of_its_source():
    pytest.importorskip("peft_kernels._C")
    limit = backend.SUPPORT["cuda"]._limit
    assert limit("LOWRANK_LINEAR_MAX_RANK") == constant("kLowRankLinearMaxRank")
    assert limit("LOWRANK_LINEAR_MAX_HIDDEN") == constant("kLowRankLinearMaxHidden")


ONES = torch.ones
WIDE = {"down": ONES(2, 6), "up": ONES(4, 2), "core": ONES(3, 2, 2)}  # 3 × 2 blocks
LIVE = [ONES(5, 7, dtype=torch.bfloat16), ONES(6, 4)]
SIZES = {
    "lowrank_linear": (
        lambda: lowrank_linear(ONES(2, 3, 12), ONES(12, 12), None, **WIDE, backend="cuda"),
        {"rank": 2, "blocks": (3, 2), "shape": (6, 12)},
    ),
    "lowrank_hidden": (
        lambda: peft_kernels.lowrank_hidden(ONES(2, 3, 12), ONES(2, 6), 2, backend="cuda"),
        {"rank": 2, "blocks": (1, 2), "shape": (6, 12)},
    ),
    "batched_lowrank_linear": (
        lambda: peft_kernels.batched_lowrank_linear(
            *(ONES(2, 3, 12), ONES(8, 12), None, ONES(4, 5, 12), ONES(4, 8, 5), torch.zeros(2, dtype=torch.int64)),
            backend="cuda",
        ),
        {"rank": 5, "blocks": (1, 1), "shape": (6, 12)},
    ),
    "gated_query": (
        lambda: peft_kernels.gated_query("gated", *2 * [ONES(2, 3, 12)], ONES(12), ONES(12), backend="cuda"),
        {"shape": (6, 12)},
    ),
    "reconstruct": (
        lambda: peft_kernels.reconstruct(**WIDE, backend="cuda"),
        {"blocks": (3, 2), "shape": (4, 6)},
    ),
    "momentum_weight_distance": (
        lambda: peft_kernels.momentum_weight_distance(
            *(LIVE, [t.float() for t in LIVE], [t.float() for t in LIVE], [ONES(5, 2), ONES(6, 2)]),
            *([ONES(2, 7), ONES(2, 4)],),
            decay=0.5,
            backend="cuda",
        ),
        {"shape": (6, 7), "live": torch.float32},
    ),
    "imitation_step": (
        lambda: peft_kernels.imitation_step(
            [Layer((24, 40), 8).group("cpu"), Layer((16,), 32, live=torch.bfloat16).group("cpu")],
            decay=0.5,
            backend="cuda",
        ),
        {"shape": (40, 32), "live": torch.float32},
    ),
}


@pytest.mark.parametrize("op", SIZES)
def test_a_backend_is_asked_about_the_size_of_a_call(op, monkeypatch):
    call, size = SIZES[op]
    asked = []
    monkeypatch.setattr(backend.SUPPORT["cuda"], "unsupported", lambda case: asked.append(case) or "never")
    with pytest.raises(BackendUnavailableError, match="never"):
        call()
    assert [{"op": case.op, **{name: getattr(case, name) for name in size}} for case in asked] == [{"op": op, **size}]
