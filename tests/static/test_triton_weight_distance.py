"""The Triton kernels of `weight_distance` and of the imitation step as machine code for three architectures.

No spill, shared memory within the limit, 16-byte accesses to the large matrices, tensor cores whose sums start afresh.
"""

import re
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from aot import ARCHITECTURES, binaries, check_resources, compile_launch
from imitation_cases import Layer

from peft_kernels.backend import Choice
from peft_kernels.distance_plan import new_results
from peft_kernels.imitation import step
from peft_kernels.records import Distance, Product, Term
from peft_kernels.triton_kernels import common
from peft_kernels.triton_kernels import weight_distance as kernels

DISTANCE, FINISH, PRODUCT = "_distance_kernel", "_finish_kernel", "_product_kernel"


@dataclass(frozen=True)
class Step:
    """One imitation step; sizes and types are read from tables, so only divisibility decides what is compiled."""

    layer: Layer = Layer((96,) * 3, 96, 96, 96, live=torch.bfloat16)  # noqa: RUF009
    layers: int = 1
    update: bool = True
    reduction: str = "mean"
    tensor_scale: bool = True

    def launches(self) -> list[common.Launch]:
        groups = [self.layer.group("cpu", seed=seed) for seed in range(self.layers)]
        scale = torch.ones(()) if self.tensor_scale else 2.0
        options = {"reduction": self.reduction, "loss_scale": scale, "update_teacher": self.update}
        chosen = mock.patch.object(step, "resolve", return_value=Choice("triton", "it does not run"))
        with chosen, common.record_launches(run=False) as launches:
            step.imitation_step(groups, decay=0.9, **options)
        return launches


@dataclass(frozen=True)
class Call:
    """What the operation launches for some matrices: no teacher to follow, no bias."""

    width: int = 96
    rank: int = 8
    reduction: str = "mean"

    def launches(self) -> list[common.Launch]:
        def empty(*shape):
            return torch.empty(shape)

        pair = (empty(self.width, self.rank), empty(self.rank, self.width))
        target, base, error = (empty(self.width, self.width) for _ in range(3))
        results = new_results(1, error)
        gradients = [torch.empty_like(t) for t in pair]
        with common.record_launches(run=False) as launches:
            both = [
                Product("nt", gradients[0], (Term(error, pair[1], results.factors[0]),)),
                Product("tn", gradients[1], (Term(pair[0], error, results.factors[0]),)),
            ]
            distance = Distance(target, base, (pair,), error)
            tables = kernels.weight_distance_tables([[distance], both]).at(results)
            kernels.weight_distance_fwd(tables, None, self.reduction, 1.0)
        return launches


VILT, UGLY = Step(), Step(Layer((63,), 63, 5, 3))
CALLS = {  # (call, its kernels)
    "vilt": (VILT, (DISTANCE, FINISH, PRODUCT)),
    "operation-unaligned": (Call(width=63), (DISTANCE,)),
}
SWEEP = {
    **{f"step-{update}-{r}-{t}": (replace(VILT, update=update, reduction=r, tensor_scale=t), (DISTANCE, FINISH))
       for update in (True, False) for r in ("mean", "sum", "relative") for t in (True, False)},
    "step-unaligned": (UGLY, (DISTANCE, PRODUCT)),
    "step-thin-unaligned": (Step(Layer((96,), 96, 5, 3)), (DISTANCE,)),
    "operation": (Call(), (DISTANCE,)),
    "operation-thin-unaligned": (Call(rank=5), (DISTANCE,)),
}  # fmt: skip


def asynchronous(size: int, ptx: str) -> int:
    """Copies of `size` bytes a thread into shared memory."""
    return len(re.findall(rf"cp\.async\.c[ag]\.shared\.global [^;]*, {size:#x}", ptx))


def chosen(call: Step | Call, name: str, arch: int, monkeypatch) -> common.Launch:
    monkeypatch.setattr(kernels, "architecture", lambda device: arch)
    return next(launch for launch in call.launches() if launch.kernel.__name__ == name)


def check(call: Step | Call, name: str, arch: int, monkeypatch) -> None:
    launch = chosen(call, name, arch, monkeypatch)
    kernel = compile_launch(launch, arch)
    where = check_resources(kernel, arch)
    assert kernel.uses_tensor_cores() == (name == PRODUCT), where
    if name == PRODUCT and arch == 90:  # three products of each step: the first begins with nothing
        steps, starts = (len(re.findall(r"wgmma\.mma_async[^;]*" + end, kernel.ptx)) for end in (";", ", 0, 1, 1;"))
        assert steps == starts * 3 * launch.tile.depth // 8 > 0, f"{where}: {starts} of {steps} begin afresh"
    if name == DISTANCE:
        wide_loads, stores = large_accesses(kernel.ptx)
        aligned = launch.constants["ALIGNED"]
        all_aligned = aligned and launch.constants["THIN_ALIGNED"]
        assert kernel.resident() >= 3 or not all_aligned, f"{where}: too few share a processor"
        assert (stores > 0) == aligned, f"{where}: {stores} 16-byte stores"
        assert (wide_loads > 0) == aligned, f"{where}: {wide_loads} 16-byte loads"
        assert (asynchronous(4, kernel.ptx) == 0) == all_aligned, f"{where}: its factors"
        if aligned:
            assert asynchronous(16, kernel.ptx) > 0, f"{where}: its right factors"
            assert single_stores(kernel.ptx) == 3, f"{where}: more than its three sums are written one by one"
    if name == PRODUCT:
        aligned = launch.constants["ALIGNED"]
        assert kernel.resident() >= 3 or not aligned, f"{where}: too few share a multiprocessor"
        assert (asynchronous(16, kernel.ptx) > 0) == aligned, where
        assert (asynchronous(4, kernel.ptx) == 0) == aligned, where


def large_accesses(ptx: str) -> tuple[int, int]:
    """Loads into registers, and stores, of 16 bytes."""
    return tuple(len(re.findall(rf"{kind}\.global\S*\.v4\.(?:b32|f32)", ptx)) for kind in ("ld", "st"))


def single_stores(ptx: str) -> int:
    return len(re.findall(r"st\.global\S*\.b32", ptx)) - large_accesses(ptx)[1]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("call", "name"), [(call, name) for call, names in CALLS.values() for name in names])
def test_machine_code(call, name, arch, monkeypatch):
    check(call, name, arch, monkeypatch)


SWEPT = [(call, name) for call, names in SWEEP.values() for name in names]
TF32 = [(VILT, PRODUCT), (UGLY, PRODUCT)]


@pytest.mark.sweep
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("call", "name"), SWEPT)
def test_machine_code_of_every_configuration(call, name, arch, monkeypatch):
    check(call, name, arch, monkeypatch)


@pytest.mark.sweep
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("call", "name"), TF32)
def test_machine_code_where_torch_allows_tf32(call, name, arch, monkeypatch):
    monkeypatch.setattr(kernels, "allows_tf32", lambda: True)
    kernel = compile_launch(chosen(call, name, arch, monkeypatch), arch)
    where = check_resources(kernel, arch)
    assert kernel.uses_tensor_cores(), where


def test_an_error_is_float32s_whatever_torch_allows(monkeypatch):
    """The difference that is left may be as small as what tf32 products lose, even three of them: it takes none."""
    precisions = lambda: {launch.kernel.__name__: launch.constants.get("PRECISION") for launch in VILT.launches()}  # noqa: E731
    assert precisions() == {DISTANCE: None, FINISH: None, PRODUCT: "tf32x3"}
    monkeypatch.setattr(kernels, "allows_tf32", lambda: True)
    assert precisions() == {DISTANCE: None, FINISH: None, PRODUCT: "tf32"}


def test_one_binary_for_all_shapes_types_and_numbers_of_matrices():
    """Sizes, addresses and types come from tables: only alignment, the reduction and a teacher's rest compile anew."""
    base = binaries(VILT.launches())
    for layer in (Layer((768,), 768, 8, 4), Layer((64, 32), 40, 4, 4, live=torch.float32), Layer((96,), 96, 96, None)):
        other = binaries(Step(layer).launches())
        assert all(binary in base for binary in other)
    assert base == binaries(replace(VILT, layers=2).launches())
    assert binaries(UGLY.launches())[2] not in base


def test_launches():
    """Two products before the pass over the weights, the pass and its sums, three products after it."""
    names = [launch.kernel.__name__ for launch in VILT.launches()]
    assert names == [PRODUCT, PRODUCT, DISTANCE, FINISH, PRODUCT, PRODUCT, PRODUCT]
    assert [launch.kernel.__name__ for launch in Call().launches()] == [DISTANCE, FINISH, PRODUCT]


@pytest.mark.parametrize("placement", ["input", "output"])
def test_columns_of_biases_leave_a_launch_aligned(placement):
    launches = Step(replace(VILT.layer, placement=placement)).launches()
    assert all(launch.constants["ALIGNED"] for launch in launches if launch.kernel.__name__ == PRODUCT)
