"""The CUDA kernels of the weight distance against float64 definitions: compiled for the CPU on csrc/host_emulation.h
everywhere, and as built for the GPU where there is one. First by records, then through the public functions."""

import random

import cuda_emulation
import pytest
import test_imitation as imitation
import test_weight_distance as public
import torch
from cuda_cases import BF16, FLOAT, HALF
from weight_distance_cuda_cases import (
    CASES,
    EXTRA,
    Case,
    Placer,
    distances,
    multiply,
    new_results,
    products,
    run,
    verify,
    verify_products,
)

from peft_kernels.backend import BackendUnavailableError
from peft_kernels.cuda_kernels import common, support
from peft_kernels.cuda_kernels import weight_distance as kernels
from peft_kernels.records import Case as Asked
from peft_kernels.records import Distance


@pytest.fixture(params=cuda_emulation.DEVICES)
def device(request):
    support.missing.cache_clear()
    with cuda_emulation.kernels_on(request.param):
        yield request.param
    support.missing.cache_clear()


# ---- by records ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_definition(case, device):
    verify(case, device)


def test_bits_repeat(device):
    case = Case(bias="shift", live=BF16, reduction="relative")
    first, again = (run(case, Placer("dense", device)) for _ in range(2))
    assert all(map(torch.equal, first[2], again[2]))
    assert all(torch.equal(a.error, b.error) and torch.equal(a.target, b.target) for a, b in zip(first[0], again[0]))


def test_tables_run_again(device):
    """With other numbers, and with what the matrices hold by then; and the same bits for a matrix on its own."""
    place = Placer("dense", device)
    records = distances(Case(bias="shift"), place)
    results = new_results(len(records), device)
    tables = kernels.weight_distance_tables([records]).at(results)
    kernels.weight_distance_fwd(tables, 0.5, "sum", torch.tensor(3.0, device=device))
    kernels.weight_distance_fwd(tables, None, "mean", 1.0)
    alone = [Distance(*d)._replace(error=torch.empty_like(d.error)) for d in records]
    for index, d in enumerate(alone):
        own = new_results(1, device)
        kernels.weight_distance_fwd(kernels.weight_distance_tables([[d]]).at(own), None, "mean", 1.0)
        assert torch.equal(d.error, records[index].error)
        assert all(torch.equal(a[0], b[index]) for a, b in zip(own, results))


@pytest.mark.parametrize("layout", EXTRA)
@pytest.mark.parametrize("seed", range(6))
def test_products(seed, layout, device):
    verify_products(seed, layout, device)


def test_every_kind_of_product_was_sampled():
    place, seen = Placer("dense", "cpu"), set()
    for seed in range(6):
        for p in products(place, random.Random(seed).choice, 6):
            seen |= {p.form, ("accumulate", p.form, p.accumulate), ("result_last", p.result_last is not None)}
            seen |= {("factor", t.factor is None) for t in p.terms} | {("last", t.right_last is None) for t in p.terms}
            seen |= {("terms", len(p.terms))}
    assert len(seen) == 3 + 6 + 2 + 2 + 2 + 3


def test_product_bits_repeat(device):
    results = []
    for _ in range(2):
        place = Placer("dense", device)
        records = products(place, random.Random(2).choice, 6)
        multiply(records)
        results.append([p.result for p in records])
    assert all(map(torch.equal, *results))


# ---- through the public functions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", public.REDUCTIONS)
@pytest.mark.parametrize("layer", imitation.LAYERS)
def test_imitation_step(layer, reduction, device):
    imitation.check([imitation.LAYERS[layer].group(device)], "cuda", reduction=reduction)


def test_imitation_step_of_many_layers(device):
    imitation.test_layers_of_all_kinds_in_one_step("cuda", device)
    imitation.test_gradients_accumulate_and_teachers_may_rest("cuda", device)
    imitation.test_loss_scale_in_memory("cuda", device)
    imitation.test_bits_repeat("cuda", device)
    imitation.test_accuracy_near_the_target("cuda", device)


def test_imitation_step_at_vilts_ranks(device):
    imitation.check([imitation.Layer((130,), 200, 96, 96).group(device)], "cuda")


@pytest.mark.parametrize("reduction", public.REDUCTIONS)
@pytest.mark.parametrize("shapes", public.SHAPES)
def test_weight_distance(shapes, reduction, device):
    public.test_loss_and_gradients("cuda", shapes, reduction, device)


@pytest.mark.parametrize("live", [FLOAT, BF16, HALF], ids=str)
def test_momentum_weight_distance(live, device):
    public.test_teacher_follows_in_the_same_pass("cuda", live, "relative", device)


def test_what_users_lean_on(device):
    public.test_strides("cuda", device)
    public.test_stacks_lists_and_one_base("cuda", device)
    if device == "cuda":  # with multiply-adds that round once, as torch has; the emulation rounds twice
        public.test_close_to_the_target("cuda", device)
    public.test_not_a_number_stays_one("cuda", device)


@pytest.mark.kernels(run=False)
def test_limits(device):
    for op in ("weight_distance", "momentum_weight_distance", "imitation_step"):
        small = Asked(op, torch.device(device), FLOAT, shape=(4, 8))
        assert support.unsupported(small) is None and support.unsupported(small._replace(live=HALF)) is None
        assert "float64" in support.unsupported(small._replace(live=torch.float64))
        assert "in float32" in support.unsupported(small._replace(dtype=HALF))
        assert "rows and columns" in support.unsupported(small._replace(shape=(2**31, 8)))
        assert "device" in support.unsupported(small._replace(device=torch.device("meta"))).lower()


@pytest.mark.kernels(run=False)
def test_what_cannot_run_is_refused_by_name(device):
    """Before anything runs: a live weight, or a bias alone, of a dtype that these kernels do not read."""
    ones = torch.ones(8, 8, device=device)
    wide = {"teacher": ones.clone(), "base": ones, "left": ones, "right": ones, "decay": 0.9, "backend": "cuda"}
    with pytest.raises(BackendUnavailableError, match=r"^momentum_weight_distance: .*'cuda'.* not torch.float64"):
        public.momentum_weight_distance([ones.double()], **wide | {"teacher": [wide["teacher"]]})
    group = imitation.LAYERS["hybrid"].group(device)
    group.live_bias[1] = group.live_bias[1].double()
    with pytest.raises(BackendUnavailableError, match=r"^imitation_step: .*'cuda'.* not torch.float64"):
        imitation.imitation_step([group], decay=0.9, backend="cuda")
    assert torch.equal(wide["teacher"], ones)


def test_launches(device, monkeypatch):
    """However many matrices: two launches, and one for all products."""
    calls = []
    monkeypatch.setattr(kernels, "launch", lambda run, *rest: calls.append(run) or common.launch(run, *rest))
    public.test_loss_and_gradients("cuda", "36 of them", "mean", device)
    module = kernels.extension()
    assert calls == [module.weight_distance_fwd, module.product_fwd]


# ---- the tests' own teeth --------------------------------------------------------------------------------------------

FWD, SHARED, PRODUCT = "weight_distance_fwd.cu", "weight_distance.cuh", "weight_distance_product.cu"
MUTANTS = {
    "difference formed last": (FWD, "e.v[j] += difference;", "e.v[j] = (e.v[j] + frozen.v[j]) - now.v[j];"),
    "the first matrix's sums": (FWD, "p.partial[(record.first_tile + tile)", "p.partial[(tile)"),
    "only the target followed": (FWD, "*element(record.target_bias, row) = target;", ""),
    "last column's old value lost": (PRODUCT, "(record.accumulate ? *last : 0.f)", "0.f"),
    "column kept elsewhere left out": (SHARED, "if (j == last) r.octs", "if (j == last && false) r.octs"),
    "factor left out": (SHARED, "l.octs[i].v[j] *= factor;", ";"),
}
SENSITIVE = [Case(bias="shift"), Case(((130, 96, (33, 8)),), live=HALF)]


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(name):
    module = cuda_emulation.load(cuda_emulation.build([MUTANTS[name]]))
    with cuda_emulation.installed(module), pytest.raises(AssertionError, match="times its bound"):
        for case in SENSITIVE:
            verify(case, "cpu")
        for seed in range(2):
            verify_products(seed, "dense", "cpu")


def test_accesses_stay_in_bounds():
    def check(at_end):
        fence = "end" if at_end else "begin"
        for case in CASES[::2]:
            run(case, Placer(case.layout, "cpu", fence))
        for seed, layout in enumerate(EXTRA):
            records = products(Placer(layout, "cpu", fence), random.Random(seed).choice, 6)
            multiply(records)

    cuda_emulation.assert_inside_bounds(check)
