"""`gated_query` on every backend that runs here, against the definition in float64."""

from dataclasses import replace

import pytest
import torch
from gated_query_cases import MODES, Problem, assert_as_accurate_as_torch, expected, run, terms
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_cases import INTERPRETED, ULP, error
from torch.nn import functional as F

from peft_kernels import gated_query

HALVES = (torch.bfloat16, torch.float16)
USES = {
    "additive": Problem("additive"),
    "gated": Problem("gated"),
    "gated-padded": Problem("gated", padding="some"),
    "gated-saturated": Problem("gated", padding="some", spread=30.0),  # as after a layer norm: g is 0 or 1
}


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("use", USES)
def test_result_and_gradients(backend, use, dtype, device):
    assert_as_accurate_as_torch(replace(USES[use], dtype=dtype), device, backend)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("use", USES)
def test_float32_vectors_under_half_precision(backend, use, dtype, device):
    """Masters stay float32, and so do their gradients."""
    assert_as_accurate_as_torch(replace(USES[use], dtype=dtype, vector_dtype=torch.float32), device, backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("batch", "positions", "width"),
    [
        (1, 1, 1),
        (3, 1, 768),  # one position: g = 1, and its score takes no gradient
        (3, 35, 63),  # a row no vector width divides
        (2, 40, 768),  # BLIP's text
        (1, 63, 760),
        (1, 3, 1128),  # more than one tile of columns
        (1, 600, 16),
        (3, 63, 1),
    ],
)
def test_shapes(backend, mode, batch, positions, width, device):
    padding = "some" if mode == "gated" and batch > 1 else "none"
    assert_as_accurate_as_torch(Problem(mode, batch, positions, width, padding), device, backend)


@pytest.mark.kernels
def test_strips_of_several_tiles(device, monkeypatch):
    kernels = pytest.importorskip("peft_kernels.triton_kernels.gated_query")
    monkeypatch.setattr(kernels, "strip_tiles", lambda *sizes: 2)
    assert_as_accurate_as_torch(Problem("additive", positions=35), device, "triton")


@settings(max_examples=20, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    batch=st.integers(0, 4),
    positions=st.integers(1, 70),
    width=st.integers(1, 140),
    padding=st.sampled_from(["none", "some"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    backend=st.sampled_from(["torch", "triton"]),
)
@pytest.mark.kernels
def test_any_shape(mode, batch, positions, width, padding, dtype, backend):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert_as_accurate_as_torch(Problem(mode, batch, positions, width, padding, dtype), device, backend)


@pytest.mark.parametrize("use", [use for use in USES if use != "gated-saturated"])
def test_float64_is_exact_and_matches_finite_differences(use, device):
    problem = replace(USES[use], batch=2, positions=3, width=4, dtype=torch.float64)
    tensors = problem.tensors(device)

    def function(*values):
        return gated_query(problem.mode, **dict(zip(tensors, values)), **problem.options(device))

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))
    oracle = expected(problem, device)
    assert all(error(value, oracle[name]) < 1e-13 for name, value in run(problem, device, "torch").items())


# ---- what the modes mean --------------------------------------------------------------------------------------------


def test_gated_by_hand(backend, device):
    """Three positions of one column, the last one padding: τ = 3 − 2 = 1, scores 3 ln 2, 0 and 9: g = 8/9, 1/9 and 0.

    Whether the softmax or τ took the padding in, it would be other numbers.
    """
    hidden = torch.tensor([[3 * torch.log(torch.tensor(2.0))], [0.0], [9.0]], device=device)
    text, mask = torch.tensor([[1.0], [-1.5], [4.0]], device=device), torch.tensor([True, True, False], device=device)
    vectors = (torch.tensor([2.0], device=device), torch.tensor([1.0], device=device))
    out = gated_query("gated", hidden, text, *vectors, padding_mask=mask, backend=backend)
    exact = torch.stack([8 / 9 * hidden[0] + 1 / 9 * 3, 8 / 9 * hidden[1] - 8 / 9 * 2, hidden[2] * 0 + 9])
    torch.testing.assert_close(out, exact)


def test_a_sequence_of_padding_is_the_moved_text(backend, device):
    problem = USES["gated-padded"]
    t = {name: value.detach() for name, value in problem.tensors(device).items()}
    torch.testing.assert_close(run(problem, device, backend)["y"][0], (t["text"] * t["gamma"] + t["beta"])[0])


@pytest.mark.parametrize("more", [1, 40], ids=["a little", "tiles"])
def test_a_sequence_gives_the_same_whatever_it_is_padded_to(backend, device, more):
    """Results at real positions, and all gradients, whatever stands at the others."""
    problem = replace(USES["gated-padded"], padding="none")
    results = []
    for padded in (0, more):
        t = problem.tensors(device)
        wide = {name: F.pad(t[name], (0, 0, 0, padded), value=3.0) for name in ("hidden", "text")}
        mask = torch.arange(problem.positions + padded, device=device) < problem.positions
        mask = mask.expand(problem.batch, -1)
        y = gated_query("gated", **wide, gamma=t["gamma"], beta=t["beta"], padding_mask=mask, backend=backend)
        y = y[:, : problem.positions]
        y.backward(problem.gradient(y))
        results.append([y.detach(), *(tensor.grad for tensor in t.values())])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_padding_tells_nothing_to_others(backend, device):
    """Other values at padded positions change those positions' results only."""
    problem = USES["gated-padded"]
    t = {name: value.detach() for name, value in problem.tensors(device).items()}
    mask = problem.options(device)["padding_mask"]
    plain = gated_query("gated", **t, padding_mask=mask, backend=backend)
    t["text"] = torch.where(mask[..., None], t["text"], 7.0)
    t["hidden"] = torch.where(mask[..., None], t["hidden"], 9.0)
    other = gated_query("gated", **t, padding_mask=mask, backend=backend)
    assert torch.equal(plain[mask], other[mask]) and not torch.isclose(plain[~mask], other[~mask]).any()


def test_no_mask_is_a_mask_of_nothing(backend, device):
    problem = USES["gated"]
    tensors = problem.tensors(device)
    mask = torch.ones(problem.batch, problem.positions, dtype=torch.bool, device=device)
    assert torch.equal(
        gated_query("gated", **tensors, padding_mask=mask, backend=backend), run(problem, device, backend)["y"]
    )


def test_large_scores_overflow_nowhere(backend, device):
    problem = replace(USES["gated"], spread=1e5)
    assert all(value.isfinite().all() for value in run(problem, device, backend).values())


# ---- what users lean on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "needed"),
    [
        *(("additive", name) for name in ("hidden", "text", "gamma", "beta", "cross", "cross_gamma", "cross_beta")),
        *(("gated", name) for name in ("hidden", "text", "gamma", "beta")),
    ],
)
def test_one_gradient_at_a_time(backend, mode, needed, device):
    problem = USES["gated-padded" if mode == "gated" else mode]
    everything = run(problem, device, backend)
    tensors = {name: t.detach().requires_grad_(name == needed) for name, t in problem.tensors(device).items()}
    y = gated_query(mode, **tensors, **problem.options(device), backend=backend)
    y.backward(problem.gradient(y))
    assert torch.equal(tensors[needed].grad, everything[needed])
    assert all(t.grad is None for name, t in tensors.items() if name != needed)


@pytest.mark.parametrize("use", USES)
def test_bits_repeat(backend, use, device):
    problem = replace(USES[use], batch=8)  # several strips of rows
    first, again = (run(problem, device, backend) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_betas_have_gradients_of_their_own(backend, device):
    """They are equal; the optimizer changes one in place, and not both."""
    problem = USES["additive"]
    tensors = problem.tensors(device)
    y = gated_query("additive", **tensors, backend=backend)
    grads = torch.autograd.grad(y, (tensors["beta"], tensors["cross_beta"]), problem.gradient(y))
    assert torch.equal(*grads) and grads[0].data_ptr() != grads[1].data_ptr()


def test_the_gradient_of_hidden_is_the_incoming_one(backend, device):
    problem = USES["additive"]
    tensors = problem.tensors(device)
    y = gated_query("additive", **tensors, backend=backend)
    dy = problem.gradient(y)
    assert torch.autograd.grad(y, tensors["hidden"], dy)[0].data_ptr() == dy.data_ptr()


@pytest.mark.parametrize("use", ["additive", "gated-padded"])
def test_strides_and_tensor_scales(backend, use, device):
    """Sequences that lie transposed or in wider rows, a stride-2 vector and a scale in memory give the same bits.

    Sums on a GPU give the same up to float32's roundings: Triton compiles strides that 16 divides on their own, with
    other layouts, whose threads add in another order.
    """
    problem = USES[use]
    t = {name: value.detach() for name, value in problem.tensors(device).items()}
    options = problem.options(device)
    plain = gated_query(problem.mode, **t, **options, backend=backend)
    t["hidden"] = t["hidden"].transpose(0, 1).contiguous().transpose(0, 1)
    t["text"] = torch.cat([t["text"], t["text"]], dim=-1)[..., : problem.width]
    t["gamma"] = torch.stack([t["gamma"], t["beta"]], dim=1)[:, 0]
    if "padding_mask" in options:
        options["padding_mask"] = options["padding_mask"].t().contiguous().t()
    else:
        t["cross"] = t["cross"].repeat(1, 1, 2)[..., problem.width :]
        options["scale"] = torch.tensor(problem.scale, device=device)
    y = gated_query(problem.mode, **t, **options, backend=backend)
    if problem.mode == "additive" or INTERPRETED:
        assert torch.equal(plain, y)
    else:
        assert ((plain - y).abs() <= 4 * ULP[torch.float32] * terms(problem, device)["y"]).all()


@pytest.mark.parametrize("mode", MODES)
def test_an_expanded_gradient_and_an_expanded_text(backend, mode, device):
    problem = USES[mode]
    tensors = problem.tensors(device)
    tensors["text"] = tensors["text"].detach()[:1].clone().requires_grad_()
    whole = dict(tensors, text=tensors["text"].expand(problem.batch, -1, -1))
    gated_query(mode, **whole, backend=backend).sum().backward()
    ours = tensors["text"].grad
    tensors["text"].grad = None
    gated_query(mode, **whole, backend="torch").sum().backward()
    torch.testing.assert_close(ours, tensors["text"].grad)


@pytest.mark.parametrize("mode", MODES)
def test_leading_dimensions(backend, mode, device):
    problem = replace(USES[mode], batch=6)
    tensors = {name: t.detach() for name, t in problem.tensors(device).items()}
    plain = gated_query(mode, **tensors, backend=backend)
    wide = {name: t.unflatten(0, (2, 3)) if t.dim() == 3 else t for name, t in tensors.items()}
    assert torch.equal(gated_query(mode, **wide, backend=backend), plain.unflatten(0, (2, 3)))
    alone = {name: t[0] if t.dim() == 3 else t for name, t in tensors.items()}
    assert torch.equal(gated_query(mode, **alone, backend=backend), plain[0])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("use", ["additive", "gated", "gated-padded"])
@pytest.mark.kernels(run=False)
def test_empty_batches(backend, use, shape, device):
    problem = replace(USES[use], batch=shape[0], positions=shape[1])
    got = run(problem, device, backend)
    assert got["y"].shape == got["hidden"].shape == got["text"].shape == (*shape, problem.width)
    assert not any(got[name].any() for name in ("gamma", "beta"))


def test_second_derivatives_are_refused(device):
    for use in ("additive", "gated"):
        tensors = USES[use].tensors(device)
        y = gated_query(USES[use].mode, **tensors)
        with pytest.raises(RuntimeError, match="first derivatives"):
            torch.autograd.grad(y.sum(), tensors["text"], create_graph=True)


@pytest.mark.parametrize(("use", "extra"), [("additive", 0), ("gated", 3 * (7 + 24)), ("gated-padded", 3 * (7 + 24))])
def test_what_is_kept_for_the_backward(backend, use, extra, device):
    """The inputs themselves (h not, where nothing is gated), and for "gated" S + d numbers a sequence."""
    problem, kept = USES[use], {}
    tensors, options = problem.tensors(device), problem.options(device)

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gated_query(problem.mode, **tensors, **options, backend=backend)
    own = {t.data_ptr() for t in (*tensors.values(), *options.values()) if isinstance(t, torch.Tensor)}
    assert sum(size for pointer, size in kept.items() if pointer not in own) == extra
    assert (tensors["hidden"].data_ptr() in kept) == (problem.mode == "gated")


def test_frozen_gammas_keep_no_activation(backend, device):
    kept = set()
    tensors = {name: t.requires_grad_("gamma" not in name) for name, t in USES["additive"].tensors(device).items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):
        gated_query("additive", **tensors, backend=backend)
    assert not kept & {tensors[name].data_ptr() for name in ("hidden", "text", "cross")}


# ---- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_autocast_changes_nothing(backend, mode, device):
    problem = USES[mode]
    tensors = problem.tensors(device)
    with torch.autocast(device, torch.bfloat16):
        y = gated_query(mode, **tensors, **problem.options(device), backend=backend)
        y.backward(problem.gradient(y))
    plain = run(problem, device, backend)
    assert torch.equal(y, plain["y"]) and all(torch.equal(t.grad, plain[name]) for name, t in tensors.items())


@pytest.mark.parametrize("narrow", ["hidden", "text"])
@pytest.mark.parametrize("mode", MODES)
def test_autocast_takes_the_widest_dtype(backend, mode, narrow, device):
    """A layer norm's float32 meets a linear layer's bfloat16; each input gets its gradient in its own dtype."""
    problem = USES[mode]
    wide = problem.tensors(device)
    mixed = {name: t.detach().clone() for name, t in wide.items()}
    for name in (narrow, "beta"):
        mixed[name] = mixed[name].bfloat16()
    wide = {name: t.float().requires_grad_() for name, t in mixed.items()}
    mixed = {name: t.requires_grad_() for name, t in mixed.items()}
    with torch.autocast(device, torch.bfloat16):
        y = gated_query(mode, **mixed, backend=backend)
    exact = gated_query(mode, **wide, backend=backend)
    for result in (y, exact):
        result.backward(problem.gradient(result))
    assert y.dtype == torch.float32 and torch.equal(y, exact)
    for name, t in mixed.items():
        assert t.grad.dtype == t.dtype and torch.equal(t.grad, wide[name].grad.to(t.dtype)), name
