"""The imitation step against its definition: everything materialised, by autograd, in float64."""

import copy
import pickle

import pytest
import torch
from imitation_cases import Layer, adapters, expected, followed, loss, relative, student
from lowrank_cases import INTERPRETED
from torch.utils._python_dispatch import TorchDispatchMode

from peft_kernels.imitation import hybrid_factors, imitation_step
from peft_kernels.records import Product

LAYERS = {
    "hybrid": Layer(),
    "lora": Layer(depth=None),
    "transform": Layer(rank=None),
    "no bias": Layer(bias=False),
    "fc2": Layer(outs=(40,), columns=96, placement="output"),
    "fc2, transform": Layer(outs=(40,), columns=63, rank=None, placement="output"),
    "fc2, no bias": Layer(outs=(40,), columns=96, placement="output", bias=False),
    "cross-attention keys": Layer(outs=(63, 96), columns=50, rank=8, depth=1),
    "bf16": Layer(live=torch.bfloat16),
    "fp16": Layer(live=torch.float16, bias=False),
}


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


def check(groups, backend, *, decay=0.9, reduction="mean", loss_scale=1.0):
    """Teachers are the hand formula's; the loss within 1e-6, gradients within 1e-5 of float64's; live rests."""
    teachers = [followed(group, decay, torch.float32) for group in groups]
    lives = [[t.clone() for t in (*group.live, *(group.live_bias or ()))] for group in groups]
    got, errors = imitation_step(
        groups, decay=decay, reduction=reduction, loss_scale=loss_scale, backend=backend, return_errors=True
    )
    value, grads = expected(groups, 1.0, reduction)  # from the teachers as they are now, roundings included
    assert abs(got.item() / value.item() - 1) <= 1e-6
    for adapter, grad in zip(adapters(groups), grads):
        assert relative(adapter.grad, loss_scale * grad) <= 1e-5
    for group, teacher, live in zip(groups, teachers, lives):
        for name in ("teacher", "teacher_bias"):
            for ours, hand in zip(getattr(group, name) or (), getattr(teacher, name) or ()):
                torch.testing.assert_close(ours, hand, rtol=3e-7, atol=1e-9)
        assert all(map(torch.equal, (*group.live, *(group.live_bias or ())), live))
    by_hand = [relative(student(g, m)[0], t) for g in groups for m, t in enumerate(g.teacher)]
    moved = [(t - w).norm() / t.norm() for g in groups for t, w in zip(g.teacher, g.weight0)]
    torch.testing.assert_close(
        errors.cpu(), torch.tensor(by_hand).square() / torch.stack(moved).cpu() ** 2, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "relative"])
@pytest.mark.parametrize("layer", LAYERS)
def test_step(backend, layer, reduction, device):
    check([LAYERS[layer].group(device)], backend, reduction=reduction)


@pytest.mark.parametrize("rank", [1, 8, 96])
@pytest.mark.parametrize("width", [63, 96])
@pytest.mark.parametrize("depth", [1, 9])
def test_ranks_and_widths(backend, rank, depth, width, device):
    check([Layer((width, width + 1), width, rank, depth).group(device)], backend)


def test_layers_of_all_kinds_in_one_step(backend, device):
    kinds = [name for name in LAYERS if name not in ("bf16", "fp16")]
    groups = [LAYERS[name].group(device, seed=index) for index, name in enumerate(kinds)]
    check(groups, backend, reduction="relative", loss_scale=1024.0)


@pytest.mark.parametrize("layer", ["hybrid", "fc2", "lora"])
def test_float64_is_exact(layer, device):
    groups = [LAYERS[layer].group(device, torch.float64)]
    value, grads = expected(groups, 0.9, "mean")
    assert abs(imitation_step(groups, decay=0.9).item() / value.item() - 1) < 1e-12
    assert all(relative(t.grad, grad) < 1e-12 for t, grad in zip(adapters(groups), grads))


def test_vilts_width_at_one_layer(backend, device):
    width = 384 if INTERPRETED and backend == "triton" else 768
    check([Layer((width,), width, 96, 96).group(device)], backend)


@pytest.mark.kernels
def test_a_whole_vilt(device):
    """36 projections of 768², ranks 96 and 96, on the torch backend (on a GPU: Triton)."""
    backend = "triton" if torch.cuda.is_available() else "torch"
    groups = [Layer((768,) * 3, 768, 96, 96).group(device, seed=index) for index in range(12)]
    value, grads = expected(groups[:2], 0.9996, "mean")
    others = sum(loss([followed(group, 0.9996)], "mean").item() for group in groups[2:])
    got = imitation_step(groups, decay=0.9996, backend=backend)
    assert abs(got.item() / (value.item() + others) - 1) <= 1e-6
    assert all(relative(t.grad, grad) <= 1e-5 for t, grad in zip(adapters(groups[:2]), grads))


# ---- where it ends --------------------------------------------------------------------------------------------------


def test_accuracy_near_the_target(backend, device):
    """Student within 1e-3 of the teacher: no worse than 1.25 × the direct form in float32; expanding ‖·‖² fails."""
    group = Layer((96,) * 2, 96, 8, None, bias=False).group(device)
    for m, weight0 in enumerate(group.weight0):
        near = group.up[m].detach() @ group.down[m].detach()
        group.teacher[m] = weight0 + near * (1 + 1e-3 * torch.randn_like(near))
        group.live[m] = group.teacher[m].clone()
    value, grads = expected([group], 1.0, "mean")
    got = imitation_step([group], decay=1.0, backend=backend)
    leaves = adapters([group])
    worst = max(relative(t.grad, grad) for t, grad in zip(leaves, grads))

    def by_torch(direct):
        total = 0
        for m, weight0 in enumerate(group.weight0):
            low, moved = group.up[m] @ group.down[m], group.teacher[m] - weight0
            if direct:
                total = total + (low - moved).square().mean()
            else:
                gram = (group.up[m].t() @ group.up[m] * (group.down[m] @ group.down[m].t())).sum()
                cross = (group.up[m].t() @ moved * group.down[m]).sum()
                total = total + (gram - 2 * cross + moved.square().sum()) / moved.numel()
        grads = torch.autograd.grad(total, leaves)
        return total, grads

    direct, direct_grads = by_torch(True)
    error = max(relative(ours, grad) for ours, grad in zip(direct_grads, grads))
    assert worst <= 1.25 * error + 1e-7
    # What rounding does to the mean: each element is what is left of products of rank 8 that are 1e3 times as large.
    elements = sum(weight0.numel() for weight0 in group.weight0)
    rounding = 2 * 1e3 * torch.finfo(torch.float32).eps * 8**0.5 / elements**0.5
    assert abs(got.item() / value.item() - 1) <= 1.25 * abs(direct.item() / value.item() - 1) + rounding
    expanded, _ = by_torch(False)
    assert abs(expanded.item() / value.item() - 1) > 1e-3


def svd_tail(matrix, rank):
    return torch.linalg.svdvals(matrix.double())[rank:].square().sum().item()


def fit(groups, steps):
    optimizer = torch.optim.Adam(adapters(groups), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        value = imitation_step(groups, decay=1.0, reduction="sum", backend="torch")
        optimizer.step()
        schedule.step()
    return value.item()


def decaying(group, size=1.0):
    """A teacher away from the frozen weight by a matrix whose singular values halve every fourth one."""
    for m, weight0 in enumerate(group.weight0):
        u, _, v = torch.linalg.svd(torch.randn_like(weight0))
        group.teacher[m] = weight0 + size * (u * 0.5 ** (torch.arange(len(u)) / 4)) @ v
    return group


def test_lora_fits_the_best_low_rank_approximation(device):
    rank = 8
    group = decaying(Layer((48,) * 2, 48, rank, None, bias=False).group("cpu"))
    floor = sum(svd_tail(t - w, rank) for t, w in zip(group.teacher, group.weight0))
    reached = fit([group], 800)
    assert floor * (1 - 1e-6) <= reached <= 1.05 * floor


def test_a_hybrid_stays_above_the_tail_of_its_total_rank(device):
    rank, depth = 4, 4
    group = decaying(Layer((48,), 48, rank, depth, bias=False).group("cpu"))
    (teacher,), (weight0,) = group.teacher, group.weight0
    reached = fit([group], 400)
    assert svd_tail(teacher - weight0, rank + depth) * (1 - 1e-6) <= reached <= svd_tail(teacher - weight0, rank)


# ---- what users lean on ---------------------------------------------------------------------------------------------


def test_gradients_accumulate_and_teachers_may_rest(backend, device):
    group = LAYERS["hybrid"].group(device)
    imitation_step([group], decay=0.9, backend=backend)
    once, teacher = [t.grad.clone() for t in adapters([group])], [t.clone() for t in group.teacher]
    imitation_step([group], decay=0.9, backend=backend, update_teacher=False)
    assert all(map(torch.equal, teacher, group.teacher))
    assert all(relative(t.grad, 2 * grad) < 1e-6 for t, grad in zip(adapters([group]), once))


def test_bits_repeat(backend, device):
    results = []
    for _ in range(2):
        groups = [LAYERS[name].group(device) for name in ("hybrid", "fc2")]
        results.append([imitation_step(groups, decay=0.9, backend=backend), *(t.grad for t in adapters(groups))])
    assert all(map(torch.equal, *results))


def test_gradients_of_ones_own_and_dropped_ones(backend, device):
    """`.grad` tensors that exist are added to; after zero_grad(set_to_none=True) the step starts from zero again."""
    group, same = LAYERS["hybrid"].group(device), LAYERS["hybrid"].group(device)
    for t in adapters([same]):
        t.grad = torch.ones_like(t)
    for g in (group, same):
        imitation_step([g], decay=1.0, backend=backend)
    for ours, other in zip(adapters([group]), adapters([same])):
        torch.testing.assert_close(other.grad - 1, ours.grad, rtol=0, atol=5e-6)
    first = [t.grad.clone() for t in adapters([group])]
    torch.optim.SGD(adapters([group]), lr=0.1).zero_grad(set_to_none=True)
    imitation_step([group], decay=1.0, backend=backend)
    assert all(torch.equal(t.grad, grad) for t, grad in zip(adapters([group]), first))


def test_moved_and_frozen_tensors(backend, device):
    """The plan follows tensors that are replaced; frozen adapters get no gradient."""
    group = LAYERS["hybrid"].group(device)
    imitation_step([group], decay=1.0, backend=backend)
    group.teacher = [t.clone() * 1.5 for t in group.teacher]
    group.down[1].requires_grad_(False).grad = None
    for t in adapters([group]):
        t.grad = None
    value, grads = expected([group], 1.0, "mean")
    assert abs(imitation_step([group], decay=1.0, backend=backend).item() / value.item() - 1) <= 1e-6
    assert all(relative(t.grad, grad) <= 1e-5 for t, grad in zip(adapters([group]), grads))
    assert group.down[1].grad is None


def test_tied_adapters(backend, device):
    """One product of a stage for each gradient: products of a stage run side by side on a GPU."""
    groups = [Layer(rank=4, bias=False).group(device, seed=seed) for seed in (0, 1)]
    groups[0].down = [groups[0].down[0]] * 3
    groups[1].transform = groups[0].transform
    check(groups, backend)
    for plan in groups[0].plan.plans:
        for stage in plan.stages():
            written = [record.result if isinstance(record, Product) else record.error for record in stage]
            assert len({t.data_ptr() for t in written}) == len(stage)


def test_a_transform_tied_across_placements(backend, device):
    groups = [Layer((40,), 40, placement=placement).group(device) for placement in ("input", "output")]
    groups[1].transform = groups[0].transform
    check(groups, backend)


def test_transforms_that_share_a_bias_alone_are_refused(device):
    groups = [Layer().group(device, seed=seed) for seed in (0, 1)]
    groups[1].transform = groups[1].transform._replace(up_bias=groups[0].transform.up_bias)
    with pytest.raises(ValueError, match=r"^groups: transforms share a bias"):
        imitation_step(groups, decay=0.9, backend="triton")


def test_a_new_parameter_in_the_same_memory(backend, device):
    group = LAYERS["hybrid"].group(device)
    imitation_step([group], decay=0.9, backend=backend)
    group.down[0] = torch.nn.Parameter(group.down[0].data)
    imitation_step([group], decay=0.9, backend=backend)
    assert group.down[0].grad.any()


def test_part_of_the_transform_may_be_frozen(backend, device):
    for frozen in range(4):
        group = LAYERS["hybrid"].group(device)
        group.transform[frozen].requires_grad_(False)
        check([group], backend)
        assert group.transform[frozen].grad is None


def test_what_never_left_zeros_counts_nothing(backend, device):
    """A relative distance of a bias that starts as zeros, with a student that starts as the frozen weight."""
    group = LAYERS["hybrid"].group(device)
    for tensor in (*group.bias0, *group.teacher_bias, *group.live_bias):
        tensor.zero_()
    with torch.no_grad():
        for t in (*group.up, group.transform.up, group.transform.up_bias):
            t.zero_()
    value = imitation_step([group], decay=1.0, reduction="relative", backend=backend)
    assert abs(value.item() - 3) < 1e-5  # three weights, each as far as the teacher has moved; biases nothing
    assert all(t.grad.isfinite().all() for t in adapters([group]))
    for tensor in (*group.weight0, *group.teacher):
        tensor.zero_()
    arguments = {"decay": 1.0, "reduction": "relative", "backend": backend, "return_errors": True}
    assert not any(each.any() for each in imitation_step([group], **arguments))


def test_in_inference_mode(backend, device):
    """Logging in validation, then training on."""
    group = LAYERS["fc2"].group(device)
    with torch.inference_mode():
        imitation_step([group], decay=0.9, update_teacher=False, backend=backend)
    first = [t.grad.clone() for t in adapters([group])]
    imitation_step([group], decay=0.9, update_teacher=False, backend=backend)
    assert all(relative(t.grad, 2 * grad) < 1e-6 for t, grad in zip(adapters([group]), first))


def test_copies_leave_the_plan_behind(backend, device):
    group = LAYERS["hybrid"].group(device)
    imitation_step([group], decay=1.0, backend=backend)
    for other in (copy.deepcopy(group), pickle.loads(pickle.dumps(group))):
        assert other.plan is None
        for t in adapters([other]):
            t.grad = None
        imitation_step([other], decay=1.0, backend=backend)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(adapters([other]), adapters([group])))


def test_inside_a_compiled_function(device):
    """It breaks the graph there, and does what it does elsewhere."""
    group, same = LAYERS["lora"].group(device), LAYERS["lora"].group(device)

    def step(x):
        return x.sin() + imitation_step([group], decay=0.9) + x.cos()

    compiled, x = torch.compile(step, backend="eager"), torch.zeros((), device=device)
    for _ in range(3):
        assert torch.equal(compiled(x), imitation_step([same], decay=0.9) + 1)


def test_a_changed_tensor_is_noticed_by_autograd(backend, device):
    group = LAYERS["lora"].group(device)
    kept = (group.teacher[0] * torch.ones(1, device=device, requires_grad=True)).sum()
    imitation_step([group], decay=0.5, backend=backend)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        kept.backward()


def test_loss_scale_in_memory(backend, device):
    group, same = LAYERS["fc2"].group(device), LAYERS["fc2"].group(device)
    scaled = imitation_step([group], decay=0.9, loss_scale=torch.tensor(64.0, device=device), backend=backend)
    plain = imitation_step([same], decay=0.9, backend=backend)
    assert torch.equal(scaled, plain)
    assert all(torch.equal(a.grad, 64 * b.grad) for a, b in zip(adapters([group]), adapters([same])))
    half = torch.tensor(64.0, device=device, dtype=torch.float16)  # 2/n is subnormal in it
    imitation_step([group], decay=1.0, loss_scale=half, backend=backend)
    imitation_step([same], decay=1.0, backend=backend)
    assert all(relative(a.grad, 64 * b.grad) < 1e-6 for a, b in zip(adapters([group]), adapters([same])))


class Counting(TorchDispatchMode):
    """Counts torch's own operations that would launch something."""

    def __init__(self):
        super().__init__()
        self.launched = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "empty" not in func.name() and func.namespace == "aten":
            self.launched.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropped", [False, True], ids=["in place", "dropped"])
@pytest.mark.parametrize("layers", [1, 12])
def test_eight_launches_for_a_whole_vilt(layers, dropped, device):
    """Kernels, and what torch itself would launch; gradients that were dropped are written, and not zeroed first."""
    common = pytest.importorskip("peft_kernels.triton_kernels.common")
    groups = [Layer((768,) * 3, 768, 96, 96).group(device, seed=index) for index in range(layers)]
    for _ in range(3):
        for t in adapters(groups) if dropped else ():
            t.grad = None
        with Counting() as torchs, common.record_launches(run=False) as launches:
            imitation_step(groups, decay=0.9996, backend="triton")
    assert len(launches) + len(torchs.launched) <= 8, (len(launches), torchs.launched)
    assert torchs.launched == ["aten::sum"]


# ---- factors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_hybrid_factors_are_the_student(layer, device):
    group = LAYERS[layer].group(device, torch.float64)
    lora = None if group.down is None else (group.down[0], group.up[0])
    bias0 = None if group.bias0 is None else group.bias0[0]
    left, right, bias = hybrid_factors(group.weight0[0], bias0, lora, group.transform, group.placement)
    weight, by_hand = student(group, 0)
    torch.testing.assert_close(group.weight0[0] + left @ right, weight, rtol=0, atol=1e-12)
    assert (bias is None) == (by_hand is None)
    if bias is not None:
        torch.testing.assert_close(bias, by_hand, rtol=0, atol=1e-12)
    leaves = [*(lora or ()), *(group.transform or ())]
    grads = torch.autograd.grad((left @ right).square().sum(), leaves, allow_unused=True)
    exact = torch.autograd.grad((weight - group.weight0[0]).square().sum(), leaves, allow_unused=True)
    assert all(a is b is None or torch.allclose(a, b, atol=1e-12) for a, b in zip(grads, exact))
