"""Which images the examples read, and what Aurora's release does to them."""

import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
hf = pytest.importorskip("transformers")
pytest.importorskip("PIL")

import example_data  # noqa: E402
from common import augment, blip, data, videos  # noqa: E402
from PIL import Image  # noqa: E402


def test_frames_are_drawn_evenly_at_random_or_as_a_clip():
    for frames, wanted in ((2, [2, 7]), (5, [1, 3, 5, 7, 9]), (20, [n // 2 for n in range(20)])):
        assert videos.draw_frames(range(10), frames, "even") == wanted
    torch.manual_seed(0)
    drawn = [videos.draw_frames(range(10), 4, "random") for _ in range(200)]
    assert all(each == sorted(set(each)) and len(each) == 4 for each in drawn)
    assert {n for each in drawn for n in each} == set(range(10)) and len(set(map(tuple, drawn))) > 50
    clips = {tuple(videos.draw_frames(range(10), 4, "clip")) for _ in range(200)}
    assert clips == {tuple(range(first, first + 4)) for first in range(7)}
    for way in videos.DRAWN:  # fewer than asked for: all of them, some twice
        assert videos.draw_frames(range(3), 4, way) == [0, 1, 1, 2]


def test_frames_are_read_as_they_are_drawn(tmp_path):
    for number in range(3):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    example = data.Example("", tuple(tmp_path / f"{number}.png" for number in range(3)))
    _, images = data.Examples([example], draw=lambda files: [files[2], files[0]])[0]
    assert [image.getpixel((0, 0))[0] for image in images] == [2, 0]
    _, images = data.Examples([example], augment=lambda image: image.resize((2, 3)))[0]
    assert [image.size for image in images] == [(2, 3)] * 3


def test_frames_are_squeezed_or_cropped_and_normalised_or_not(tmp_path):
    example_data.save_blip(tmp_path, hf.BlipForImageTextRetrieval)
    processor = hf.AutoProcessor.from_pretrained(tmp_path)
    image = Image.new("RGB", (80, 40))
    image.paste((255, 0, 0), (20, 0, 60, 40))  # a red square between black ones
    for crop, normalize, corner, middle in ((False, True, -2, 2), (True, False, 1, 1), (False, False, 0, 1)):
        batches = blip.Batches(processor, size=16, crop=crop, normalize=normalize)
        red = batches([(data.Example("", ()), [image])])["pixels"][0, 0, 0]
        assert red.shape == (16, 16)
        assert (red[1, 1].item(), red[8, 8].item()) == (
            pytest.approx(corner, abs=0.05),
            pytest.approx(middle, abs=0.05),
        )


# ---- what the release does to training images ------------------------------------------------------------------------


def test_crops_have_half_of_the_area_and_sides_three_to_four():
    torch.manual_seed(0)
    places = Image.merge("RGB", [Image.linear_gradient("L").rotate(90 * n).resize((100, 80)) for n in range(3)])
    sizes = [augment.crop(places).size for _ in range(300)]
    areas, ratios = [w * h / 8000 for w, h in sizes], [w / h for w, h in sizes]
    assert min(areas) > 0.48 and max(areas) > 0.9
    assert min(ratios) == pytest.approx(3 / 4, abs=0.06) and max(ratios) == pytest.approx(4 / 3, abs=0.06)
    assert len({augment.crop(places).getpixel((0, 0)) for _ in range(50)}) > 20  # from anywhere
    assert {augment.crop(Image.new("RGB", (100, 10))).size for _ in range(9)} == {(13, 10)}  # a strip's middle
    assert {augment.crop(Image.new("RGB", (10, 100))).size for _ in range(9)} == {(10, 13)}


def test_operations_are_the_releases_at_its_level():
    """A white column and row on black: where they go, and grey from outside."""
    image = Image.new("RGB", (41, 41))
    image.paste((200, 200, 200), (20, 0, 21, 41))
    image.paste((200, 200, 200), (0, 20, 41, 21))
    change = {name: operation(image, 1) for name, operation in augment.OPERATIONS.items()}
    assert len(change) == 10
    for name in ("identity", "brightness", "sharpness"):
        assert change[name].tobytes() == image.tobytes(), name
    assert change["autocontrast"].getpixel((20, 3))[0] >= 254
    assert change["shift x"].getpixel((15, 3)) == (200, 200, 200) and change["shift x"].getpixel((38, 3)) == (128,) * 3
    assert change["shift y"].getpixel((3, 15)) == (200, 200, 200) and change["shift y"].getpixel((3, 38)) == (128,) * 3
    row = [change["shear x"].getpixel((x, 40))[0] for x in range(41)]  # 40 rows down by 0.15 each
    assert row[14] > 100 and row[20] == 0 and row[40] == 128
    assert change["shear y"].getpixel((40, 14))[0] > 100 and change["shear y"].getpixel((40, 40)) == (128,) * 3
    turned = round(20 + 15 * math.sin(math.radians(15))), round(20 + 15 * math.cos(math.radians(15)))
    assert change["rotate"].getpixel(turned)[0] > 50 and change["rotate"].getpixel((0, 0)) == (128,) * 3
    for name in ("shift x", "shear y", "rotate"):  # and to the other side
        assert augment.OPERATIONS[name](image, -1).tobytes() != change[name].tobytes()


def test_training_images_are_cropped_flipped_and_changed_twice(monkeypatch):
    done = []

    def watched(name, operation):
        return lambda image, sign: done.append((name, sign)) or operation(image, sign)

    for name, operation in augment.OPERATIONS.items():
        monkeypatch.setitem(augment.OPERATIONS, name, watched(name, operation))
    image, left = Image.new("RGB", (60, 60)), 0
    image.paste((255, 0, 0), (0, 0, 30, 60))
    torch.manual_seed(0)
    for _ in range(400):
        seen = augment.Augment(24)(image)
        assert seen.size == (24, 24)
        left += seen.getpixel((2, 12))[0] > seen.getpixel((21, 12))[0]
    assert 300 < len(done) < 500  # two, each in every second case
    assert {name for name, _ in done} == set(augment.OPERATIONS) and {sign for _, sign in done} == {1, -1}
    assert 120 < left < 280
