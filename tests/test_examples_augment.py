"""What MoIL's release does with images: RandAugment, where it is asked for, and ViLT's sizes."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
hf = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

from common import randaugment  # noqa: E402


def test_rand_augment_has_the_release_s_operations():
    values = {name: round(randaugment.strength(name), 9) for name in randaugment.OPERATIONS}
    weaker = dict.fromkeys(("color", "contrast", "brightness", "sharpness"), 0.64)
    shifted = {"shear_x": 0.09, "shear_y": 0.09, "translate_x": 30, "translate_y": 30, "rotate": 9}
    rest = {"autocontrast": 0.3, "equalize": 0.3, "posterize": 1.2, "solarize": 76.8, "solarize_add": 33}
    assert values == weaker | shifted | rest
    ramp = Image.linear_gradient("L").rotate(90).crop((0, 0, 256, 2)).convert("RGB")  # pixel x has the value x
    assert [ramp.getpixel((x, 0))[0] for x in (0, 76, 77, 255)] == [0, 76, 77, 255]

    def pixels(name, *places):
        changed = randaugment.OPERATIONS[name][0](ramp, randaugment.strength(name))
        assert changed.size == ramp.size and changed.mode == "RGB"
        return [changed.getpixel((x, 0))[0] for x in places]

    assert pixels("posterize", 0, 127, 128, 255) == [0, 0, 128, 128]
    assert pixels("solarize", 0, 76, 77, 255) == [0, 76, 178, 0]
    assert pixels("solarize_add", 0, 94, 95, 200, 255) == [33, 127, 127, 22, 0]
    assert pixels("brightness", 0, 100, 255) == [0, 64, 163]
    torch.manual_seed(0)
    assert {tuple(pixels("translate_x", 100)) for _ in range(20)} == {(70,), (130,)}
    for name in randaugment.OPERATIONS:
        pixels(name, 0)


def test_rand_augment_draws_two_of_fourteen(monkeypatch):
    drawn = []
    recorded = {
        name: (lambda image, value, name=name: drawn.append((name, value)) or image, *rest)
        for name, (_, *rest) in randaugment.OPERATIONS.items()
    }
    monkeypatch.setattr(randaugment, "OPERATIONS", recorded)
    image = Image.new("RGB", (4, 4))
    torch.manual_seed(0)
    for _ in range(200):
        randaugment.rand_augment(image)
    assert len(drawn) == 400 and {name for name, _ in drawn} == set(recorded)
    assert all(value == randaugment.strength(name) for name, value in drawn)
    assert any(first == second for first, second in zip(drawn[::2], drawn[1::2]))  # with replacement
    first, drawn[:] = drawn[:], []
    torch.manual_seed(0)
    for _ in range(200):
        randaugment.rand_augment(image)
    assert drawn == first


def test_images_are_resized_as_the_release_does():
    """The shorter edge 384, the longer at most int(384 · 1333 / 800), both down to multiples of 32."""
    processor = hf.ViltImageProcessor()
    for size, wanted in (
        ((640, 480), (512, 384)),
        ((500, 375), (512, 384)),
        ((1000, 300), (608, 192)),
        ((90, 90), None),
    ):
        pixels = processor(Image.new("RGB", size), return_tensors="pt")["pixel_values"]
        assert tuple(pixels.shape[:1:-1]) == (wanted or (384, 384))
        assert pixels.amin() == pixels.amax() == -1.0
