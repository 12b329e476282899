"""RandAugment as MoIL's release has it (vilt/transforms/randaug.py): two of fourteen operations, at strength 9 of 30.

The list, its ranges and its quirks are the release's: a strength of 9 makes colours, contrasts, brightness and
sharpness always weaker (a factor of 0.64), posterising keeps a single bit, and "solarize_add" brightens every pixel by
33 before what is brighter than 127 is inverted. Images are changed before they are resized.
"""

from collections.abc import Callable

import torch
from PIL import Image, ImageEnhance, ImageOps

STRENGTH, MOST, COUNT = 9, 30, 2
Operation = Callable[[Image.Image, float], Image.Image]


def _either_way(value: float) -> float:
    return -value if torch.rand(()) < 0.5 else value


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients)


def _solarize_add(image: Image.Image, value: float) -> Image.Image:
    return ImageOps.solarize(image.point(lambda pixel: min(255, pixel + int(value))), 128)


def _enhance(enhancer: Callable) -> Operation:
    return lambda image, value: enhancer(image).enhance(value)


# Each operation with its value at strength 0 and at strength 30
OPERATIONS: dict[str, tuple[Operation, float, float]] = {
    "autocontrast": (lambda image, value: ImageOps.autocontrast(image), 0, 1),
    "equalize": (lambda image, value: ImageOps.equalize(image), 0, 1),
    "rotate": (lambda image, value: image.rotate(_either_way(value)), 0, 30),  # degrees
    "posterize": (lambda image, value: ImageOps.posterize(image, max(1, int(value))), 0, 4),  # bits
    "solarize": (ImageOps.solarize, 0, 256),
    "solarize_add": (_solarize_add, 0, 110),
    "color": (_enhance(ImageEnhance.Color), 0.1, 1.9),
    "contrast": (_enhance(ImageEnhance.Contrast), 0.1, 1.9),
    "brightness": (_enhance(ImageEnhance.Brightness), 0.1, 1.9),
    "sharpness": (_enhance(ImageEnhance.Sharpness), 0.1, 1.9),
    "shear_x": (lambda image, value: _affine(image, 1, _either_way(value), 0, 0, 1, 0), 0, 0.3),
    "shear_y": (lambda image, value: _affine(image, 1, 0, 0, _either_way(value), 1, 0), 0, 0.3),
    "translate_x": (lambda image, value: _affine(image, 1, 0, _either_way(value), 0, 1, 0), 0, 100),  # pixels
    "translate_y": (lambda image, value: _affine(image, 1, 0, 0, 0, 1, _either_way(value)), 0, 100),
}


def strength(name: str) -> float:
    _, least, most = OPERATIONS[name]
    return STRENGTH / MOST * (most - least) + least


def rand_augment(image: Image.Image) -> Image.Image:
    """Two operations, drawn with replacement from torch's random numbers, so that a resumed run draws the same."""
    names = list(OPERATIONS)
    for number in torch.randint(len(names), (COUNT,)).tolist():
        image = OPERATIONS[names[number]][0](image, strength(names[number]))
    return image
