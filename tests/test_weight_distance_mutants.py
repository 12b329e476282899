"""The comparison with the oracle must notice a broken kernel: one piece of Triton replaced, the module reloaded."""

from contextlib import nullcontext

import pytest
import torch
from imitation_cases import Layer, adapters, expected, followed

pytest.importorskip("triton")
from triton_mutants import load

from peft_kernels.imitation import imitation_step
from peft_kernels.triton_kernels import weight_distance as kernels
from peft_kernels.triton_kernels import weight_distance_product as products

INPUT = Layer((40, 24), 65, 5, 3)  # 65 columns: one beyond two tiles
OUTPUT = Layer((40,), 65, 5, 3, placement="output")
WIDE = Layer((40,), 24, 33, 3)  # a rank of two chunks
MUTANTS = {
    "teacher rests": ("tl.store(target_pointers, target, mask=mask & follows)", "pass", INPUT),
    "teacher's bias rests": ("tl.store(pointers, target, mask=mask & follows)", "pass", INPUT),
    "base and target swapped": ("error = base - target", "error = target - base", INPUT),
    "bias and target swapped": ("difference = base - target", "difference = target - base", INPUT),
    "second pair missing": ("tl.load(record_ptr + PAIRS)):", "1):", INPUT),
    "first chunk of the rank only": ("range(0, R, BLOCK_R):", "range(0, BLOCK_R, BLOCK_R):", WIDE),
    "a tile's sum lost": ("3, offsets < count", "3, offsets < count - 1", INPUT),
    "shift without its last part": ("mask & has_last", "mask & (M < 0)", INPUT),
    "shift without its matrix": ("range(0, K, BLOCK_K):", "range(0, 0, BLOCK_K):", INPUT),
    "loss scale missing for weights": ("index, 2 * coefficient * scale", "index, 2 * coefficient", INPUT),
    "loss scale missing for biases": ("(2 * coefficient * scale)", "(2 * coefficient)", INPUT),
    "bias missing in the loss": ("loss += bias_loss", "pass", INPUT),
}
PRODUCT_MUTANTS = {
    "factor missing": ("total += _load_factor(term_ptr) * acc", "total += acc", INPUT),
    "terms after the first missing": ("range(first, first + terms,", "range(first, first + 1,", INPUT),
    "last column's terms after the first missing": ("range(first, first + terms)", "range(first, first + 1)", INPUT),
    "outer products missing": ("acc = left[:, None] *", "acc = 0 * left[:, None] *", INPUT),
    "outer product's last missing": ("offs_m, mask_m) * last", "offs_m, mask_m) * 0", OUTPUT),
    "gradients overwritten": ("_ACCUMULATE) != 0", "_ACCUMULATE) > 1", INPUT),
    "last column's gradient overwritten": ("mask=mask_m & accumulate", "mask=mask_m & (offs_m < 0)", INPUT),
    "last column missing": ("total += _load_factor(term_ptr) * last", "pass", INPUT),
    "right_last ignored": (
        "place(term.right_last)",
        "(0, 0) if term.right_last is None else _column(term.right, term.right.shape[1] - 1)",
        INPUT,
    ),
    "tail of the inner dimension lost": ("range(0, K, BLOCK_K)", "range(0, K - BLOCK_K + 1, BLOCK_K)", OUTPUT),
    "tn taken for nn": ('"tn": 2', '"tn": 0', Layer((40,), 40, 40, 40)),  # all square: it does not crash
    "column tiles all the same": ("tile_n * BLOCK_N", "0", INPUT),
}


def assert_right(layer: Layer, device: str) -> None:
    """Loss, every gradient where one was before, and teachers."""
    group, before = layer.group(device), 0.25
    teachers = followed(group, 0.9, torch.float32)
    value, grads = expected([group], 0.9, "mean")
    for t in adapters([group]):
        t.grad = torch.full_like(t, before)
    loss = imitation_step([group], decay=0.9, loss_scale=8.0, backend="triton")
    assert abs(loss.item() / value.item() - 1) <= 1e-5
    for t, grad in zip(adapters([group]), grads):
        torch.testing.assert_close(t.grad, (before + 8 * grad).float(), rtol=1e-5, atol=1e-6)
    for name in ("teacher", "teacher_bias"):
        torch.testing.assert_close(getattr(group, name), getattr(teachers, name), rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("mutated", [False, True], ids=["control", "mutant"])
@pytest.mark.parametrize("name", MUTANTS)
def test_triton_mutant_is_noticed(name, mutated, monkeypatch, device, tmp_path):
    """The control loads the same source afresh without the change, and passes."""
    good, bad, layer = MUTANTS[name]
    mutant = load(kernels, good, bad if mutated else None, tmp_path)
    monkeypatch.setattr(kernels, "weight_distance_fwd", mutant["weight_distance_fwd"])
    with pytest.raises(AssertionError) if mutated else nullcontext():
        assert_right(layer, device)


@pytest.mark.parametrize("mutated", [False, True], ids=["control", "mutant"])
@pytest.mark.parametrize("name", PRODUCT_MUTANTS)
def test_mutant_of_the_products_is_noticed(name, mutated, monkeypatch, device, tmp_path):
    good, bad, layer = PRODUCT_MUTANTS[name]
    mutant = load(products, good, bad if mutated else None, tmp_path)
    for function in ("make_products", "multiply"):
        monkeypatch.setattr(kernels, function, mutant[function])
    with pytest.raises(AssertionError) if mutated else nullcontext():
        assert_right(layer, device)
