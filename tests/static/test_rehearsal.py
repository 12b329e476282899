"""The pretended GPU and the driver that checks launches: every operation passes, what no GPU takes fails."""

import os
from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels decorated under the interpreter cannot be compiled", allow_module_level=True)

import triton
import triton.language as tl
from torch.autograd import Function
from triton.runtime import driver

from peft_kernels import backend, lowrank_linear
from peft_kernels.benchmarks import runner
from peft_kernels.benchmarks.__main__ import BENCHES
from peft_kernels.benchmarks.gpu.driver import BadLaunch, resources
from peft_kernels.benchmarks.gpu.launches import counted
from peft_kernels.benchmarks.gpu.pretend import H100, pretended_gpu
from peft_kernels.benchmarks.gpu.rehearsal import stage
from peft_kernels.benchmarks.gpu.work import SMALL
from peft_kernels.ops import lowrank_linear as lowrank

BF16, GPU = torch.bfloat16, torch.device("cuda", 0)
KERNELS = {  # what each operation's first small case launches
    "lowrank_linear": {"_shrink_kernel", "_expand_kernel", "_up_bwd_kernel", "_down_bwd_kernel", "_sum_kernel"},
    "weight_distance": {"_distance_kernel", "_finish_kernel"},
    "batched_lowrank_linear": {"_batched_shrink_kernel", "_batched_expand_kernel"},
    "reconstruct": {"_reconstruct_kernel"},
    "gated_query": {"additive_fwd_kernel", "additive_bwd_kernel"},
}


@pytest.fixture
def rehearsed():
    with stage() as done:
        yield done


# ---- what is launched ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", KERNELS)
def test_every_operation_compiles_and_launches(op, rehearsed):
    (bench,) = (each for each in BENCHES if each.op == op)
    case = bench.shaped(SMALL[op], "bfloat16")[-1 if op == "weight_distance" else 0]  # the fewest kernels
    problem = runner.pose(bench, case, GPU)
    name = next(name for name, each in bench.providers.items() if each.backend == "triton")
    found = runner.results(bench.providers[name].build(case, problem.tensors), problem.tensors.input, case.backward)
    assert rehearsed.launches.keys() >= KERNELS[op]
    assert all(each.device == GPU for each in found.values())


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_launches_that_are_made_again_are_checked_by_their_addresses(dropout_p, rehearsed):
    """The second call of a kind goes its short way; counted() counts there, too."""
    x, weight, down, up = (torch.empty(*shape, device="cuda", requires_grad=True)
                           for shape in ((64, 48), (32, 48), (4, 48), (32, 4)))  # fmt: skip

    def step(x):
        return lowrank_linear(x, weight, None, down, up, dropout_p=dropout_p, backend="triton").sum().backward()

    seen = []
    for _ in range(3):
        before = rehearsed.launches.copy()
        with counted() as counts:
            step(x)
        seen.append(rehearsed.launches - before)
        assert dict(counts) == {"triton on cuda": seen[-1].total()}
    assert seen[0] == seen[1] == seen[2] and seen[0].total() == 6
    (plan,) = lowrank._plans.values()
    assert len(plan.memo) == 2  # forward and backward
    (one, *_), *_ = (again.launches for again in plan.memo.values())
    with pytest.raises(BadLaunch, match="_shrink_kernel: x_ptr: compiled for addresses that 16 divides, got 8 more"):
        launch_on(one, [x.data_ptr() + 8] * 64)
    with pytest.raises(BadLaunch, match="_shrink_kernel: x_ptr: its address is no multiple of 4 bytes"):
        launch_on(one, [x.data_ptr() + 2] * 64)
    with pytest.raises(BadLaunch, match="_shrink_kernel: x_ptr: expected an address on the GPU, got 0x10"):
        launch_on(one, [16] * 64)


def launch_on(step, addresses):
    launch, grid, how, pick, rest = step
    launch(*grid, 0, *how, (*pick(addresses), *rest))


@triton.jit
def _copy(x_ptr, y_ptr, count, stride, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets * stride, mask=offsets < count), mask=offsets < count)


@dataclass
class Copy:
    """The arguments of a launch."""

    x: object
    y: object
    count: object = 64
    stride: object = 1
    block: object = 64
    grid: tuple[int, int, int] = (1, 1, 1)

    def launch(self, kernel) -> None:
        kernel[self.grid](self.x, self.y, self.count, self.stride, self.block)


@pytest.fixture
def copy(rehearsed):
    """A kernel as it was compiled for its first launch, and that launch."""
    x, y = (torch.empty(64, dtype=BF16, device="cuda") for _ in range(2))
    return _copy[(1,)](x, y, 64, 1, BLOCK=64), Copy(x, y)


def test_a_launch_as_it_was_compiled_for_passes(copy, rehearsed):
    kernel, call = copy
    before = rehearsed.launches["_copy"]
    call.launch(kernel)
    replace(call, x=torch.empty(80, dtype=BF16, device="cuda")[16:], count=32, grid=(0, 7, 65_535)).launch(kernel)
    assert rehearsed.launches["_copy"] == before + 2
    registers, spilled = resources(kernel.asm["cubin"])
    assert (kernel.n_regs, kernel.n_spills) == (registers, 0) and 8 <= registers <= 255 and spilled == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"x": lambda: torch.empty(65, dtype=BF16, device="cuda")[1:]}, "x_ptr: compiled for addresses that 16"),
        ({"x": lambda: torch.empty(64, device="cuda")}, "x_ptr: expected torch.bfloat16, got torch.float32"),
        ({"y": lambda: torch.empty(64, dtype=BF16)}, "y_ptr: expected a tensor on the GPU, got one on cpu"),
        ({"y": lambda: 1.5}, "y_ptr: expected a tensor of bf16, got float"),
        ({"y": lambda: True}, "y_ptr: expected a tensor of bf16, got bool"),
        ({"count": lambda: 65}, "count: compiled for multiples of 16, got 65"),
        ({"count": lambda: 2**31}, "count: 2147483648 does not fit i32"),
        ({"count": lambda: 64.0}, "count: expected a whole number, got float"),
        ({"stride": lambda: 2}, "stride: compiled for 1, got 2"),
        ({"block": lambda: 32}, "BLOCK: compiled for 64, got 32"),
        ({"grid": lambda: (2**31, 1, 1)}, "grid: 2147483648 blocks along x"),
        ({"grid": lambda: (1, 65_536, 1)}, "grid: 65536 blocks along y"),
        ({"grid": lambda: (1, 1, -1)}, "grid: -1 blocks along z"),
        ({"grid": lambda: (65_536, 65_535, 1)}, "overflow the launcher's int"),
    ],
)
def test_a_bad_launch_is_caught(change, why, copy):
    kernel, call = copy
    with pytest.raises(BadLaunch, match=f"_copy: .*{why}"):
        replace(call, **{name: make() for name, make in change.items()}).launch(kernel)


def test_a_missing_argument_is_caught(copy):
    kernel, call = copy
    with pytest.raises(BadLaunch, match="4 arguments for 5 parameters"):
        kernel[call.grid](call.x, call.y, call.count, call.stride)


@triton.jit
def _total(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))))


@pytest.mark.parametrize(("what", "limit"), [("shared memory", 15), ("threads", None)])
def test_a_kernel_that_no_multiprocessor_holds_is_refused(what, limit, rehearsed, monkeypatch):
    """Triton asks the driver; registers for 256 threads are not enough for sixteen warps."""
    if limit:
        monkeypatch.setattr(H100, "shared_memory_per_block_optin", limit)
    else:
        monkeypatch.setattr("peft_kernels.benchmarks.gpu.driver.resources", lambda binary: (255, 0))
    x = torch.empty(1024, device="cuda")
    with pytest.raises(triton.runtime.errors.OutOfResources, match=what):
        _total[(1,)](x, x, BLOCK=1024, num_warps=16)


# ---- the GPU that is not there ---------------------------------------------------------------------------------------


def test_nothing_is_left_behind():
    def scenery():
        return torch.Tensor.device, torch.Tensor.to, torch.compile, torch.Generator, torch.cuda.Event, driver._active

    before, on_gpu = scenery(), torch.cuda.is_available()
    with stage():
        assert torch.cuda.is_available() and torch.empty(3, device="cuda").device == GPU
    assert scenery() == before and torch.cuda.is_available() == on_gpu
    assert torch.empty(3).to("meta").device.type == "meta"


def test_a_kernel_that_was_only_checked_is_loaded_anew(monkeypatch):
    """Or a launch after the rehearsal would do nothing."""
    with stage() as done:
        x = torch.empty(64, device="cuda")
        _copy[(1,)](x, x, 64, 1, BLOCK=64)
    with stage() as again:
        _copy[(1,)](x, x, 64, 1, BLOCK=64)
    assert done.launches == again.launches == {"_copy": 1}
    assert 0 not in _copy.device_caches
    if not torch.cuda.is_available():
        monkeypatch.setattr(driver, "_active", None)
        with pytest.raises(RuntimeError, match="active drivers"):
            _copy[(1,)](x, x, 64, 1, BLOCK=64)


def test_tensors_follow_torch_s_rules():
    with pretended_gpu():
        x, w = torch.randn(4, 8, device="cuda", requires_grad=True), torch.randn(3, 8).to("cuda", BF16)
        assert x.is_cuda and w.device == GPU and w.dtype == BF16 and x.to("cuda") is x and not torch.ones(2).is_cuda
        (x @ w.float().T).sum().backward()
        assert x.grad.device == GPU and x.grad.shape == x.shape
        with pytest.raises(RuntimeError, match="device"):
            x + torch.ones(4, 8)
        assert x.data_ptr() % 512 == 0 and x[1:].data_ptr() == x.data_ptr() + 32 and w.data_ptr() != x.data_ptr()
        sent = torch.tensor([1.5], device=x.device)
        assert sent.item() == 1.5 and (sent + 1).item() == 0 and sent.isfinite().all()
        assert x.cpu().device.type == "cpu" and not x.cpu().any()
        rows, counts = torch.zeros(6, dtype=torch.int64, device="cuda").unique(return_counts=True)
        assert rows.device == GPU and counts.tolist() == [6]  # as of zeros: it decides shapes


def test_code_sees_a_gpu_wherever_it_runs_but_inside_of_torch():
    class Seen(Function):
        @staticmethod
        def forward(ctx, x):
            assert x.device == GPU
            return torch.empty_like(x)

        @staticmethod
        def backward(ctx, dy):
            assert dy.device == GPU
            return torch.empty(dy.shape, device=dy.device)

    with pretended_gpu():
        x = torch.ones(3, device="cuda", requires_grad=True)
        Seen.apply(x).sum().backward()
        assert x.grad.device == GPU and backend.resolve("x", [x]).name == "triton"


def test_waiting_for_the_gpu_in_a_capture_is_an_error():
    with pretended_gpu():
        x = torch.ones(3, device="cuda")
        for wait in (x.sum().item, x.cpu, torch.cuda.synchronize, x.unique, lambda: bool(x.any())):
            wait()
            with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="not permitted"):
                wait()
