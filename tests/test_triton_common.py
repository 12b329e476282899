"""What the Triton operations share: the dropout mask against Philox's definition, tf32, recorded launches."""

import itertools

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from peft_kernels.triton_kernels import common  # noqa: E402


def philox(key: tuple[int, int], counter: tuple[int, int, int, int], rounds: int = 7) -> list[int]:
    """Philox-4x32 as its authors define it (doi 10.1145/2063384.2063405)."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def test_the_definition_gives_its_authors_known_answers():
    ones = 0xFFFFFFFF
    assert philox((0, 0), (0, 0, 0, 0), 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox((ones, ones), (ones,) * 4, 10) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox((0, 0), (0, 0, 0, 0)) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert philox((ones, ones), (ones,) * 4) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


@triton.jit
def _mask_kernel(rng_ptr, out_ptr, first_row, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = first_row + tl.arange(0, ROWS)
    kept = common.keep_mask(common.load_rng(rng_ptr), rows, first_column, threshold, ROWS, COLUMNS)
    pointers = out_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(pointers, kept.to(tl.int32))


@pytest.mark.parametrize("seed", [0, 7, 2**62 - 1])
@pytest.mark.parametrize("offset", [0, 2**40 + 3])
def test_masks_are_philox_of_seed_offset_row_and_column(seed, offset, device):
    """Eight columns share one call: four words, low halves first."""
    rows, columns, first_row, first_column, threshold = 16, 32, 5, 24, 20000
    out = torch.empty(rows, columns, dtype=torch.int32, device=device)
    rng = torch.tensor([seed, offset], device=device)
    _mask_kernel[(1,)](rng, out, first_row, first_column, threshold, rows, columns)
    key, high = (seed & 0xFFFFFFFF, seed >> 32), (offset & 0xFFFFFFFF, offset >> 32)
    for row in range(rows):
        for group in range(columns // 8):
            words = philox(key, (first_row + row, first_column // 8 + group, *high))
            halves = sorted((half >= threshold) for word in words for half in (word & 0xFFFF, word >> 16))
            assert sorted(map(bool, out[row, 8 * group : 8 * group + 8].tolist())) == halves


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=3)))
@pytest.mark.kernels
def test_up_to_three_sums_in_one_launch(given, device):
    """Each in the type and shape of what it is a gradient of, whichever of them there are."""
    sizes = ((5, (70, 3), torch.float32), (33, (1,), torch.float16), (1, (2, 130), torch.bfloat16))
    sums = [(torch.randn(count, *shape, device=device), torch.empty(shape, dtype=dtype, device=device))
            for count, shape, dtype in sizes]  # fmt: skip
    asked = [pair if is_given else (None, pair[1]) for pair, is_given in zip(sums, given)]
    with common.record_launches() as launches:
        outs = common.sum_partials(asked)
    assert len(launches) == any(given)
    for (parts, like), out in zip(asked, outs, strict=True):
        assert (out is None) == (parts is None)
        if out is not None:
            assert out.shape == like.shape and out.dtype == like.dtype
            torch.testing.assert_close(out, parts.double().sum(0).to(out.dtype))
            (alone,) = common.sum_partials([(parts, like)])
            assert torch.equal(out, alone)  # the order is the number of parts' alone


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_float32_products_follow_torchs_own_setting(setting):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = setting
        assert common.dot_constants(torch.float32)["PRECISION"] == setting
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_recorded_launches_need_not_run(device):
    partials = torch.ones(3, 4, device=device)
    with common.record_launches(run=False) as launches:
        assert common.sum_partials([(partials, partials[0])])[0].isnan().all()
    with common.record_launches() as ran:
        assert (common.sum_partials([(partials, partials[0])])[0] == 3).all()
    assert [launch.kernel for launch in launches] == [launch.kernel for launch in ran]
    with common.record_launches() as none:
        pass
    assert none == []
