"""What Aurora's release does to a training image (data/__init__.py, transform/randaugment.py), with PIL.

    crop     0.5 to 1 of the area, sides 3:4 to 4:3, scaled to the model's size with bicubic interpolation
    flip     every second one
    change   twice one of ten operations, in every second case: none, autocontrast, equalize, brightness, sharpness,
             shear x or y by 0.15, shift x or y by 5 pixels, rotate by 15 degrees, to either side

What comes from outside is grey. At the release's level, 5 of 10, brightness and sharpness change nothing: their factor
is 1.0. A shift is of 5 pixels whatever the image's size.
"""

import math
from collections.abc import Callable

import torch
from PIL import Image, ImageOps

GREY = (128, 128, 128)
SHEAR, SHIFT, ANGLE = 0.15, 5, 15
Operation = Callable[[Image.Image, int], Image.Image]


def chance() -> float:
    """In [0, 1), of torch's numbers, which a resumed run goes on with."""
    return torch.rand(()).item()


def crop(image: Image.Image) -> Image.Image:
    width, height = image.size
    for _ in range(10):
        area, ratio = width * height * (0.5 + chance() / 2), (4 / 3) ** (2 * chance() - 1)
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(chance() * (width - wide + 1)), int(chance() * (height - high + 1))
            return image.crop((left, top, left + wide, top + high))
    wide, high = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))  # of a very long image the middle
    left, top = (width - wide) // 2, (height - high) // 2
    return image.crop((left, top, left + wide, top + high))


def moved(image: Image.Image, *matrix: float) -> Image.Image:
    """matrix: from places in the result to places in the image"""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)


# Operation(image, sign)
OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, sign: image,
    "autocontrast": lambda image, sign: ImageOps.autocontrast(image),
    "brightness": lambda image, sign: image,
    "sharpness": lambda image, sign: image,
    "equalize": lambda image, sign: ImageOps.equalize(image),
    "shear x": lambda image, sign: moved(image, 1, sign * SHEAR, 0, 0, 1, 0),
    "shear y": lambda image, sign: moved(image, 1, 0, 0, sign * SHEAR, 1, 0),
    "shift x": lambda image, sign: moved(image, 1, 0, sign * SHIFT, 0, 1, 0),
    "shift y": lambda image, sign: moved(image, 1, 0, 0, 0, 1, sign * SHIFT),
    "rotate": lambda image, sign: image.rotate(sign * ANGLE, Image.Resampling.BILINEAR, fillcolor=GREY),
}


class Augment:
    """side: of the square that the model reads"""

    def __init__(self, side: int):
        self.side = side

    def __call__(self, image: Image.Image) -> Image.Image:
        image = crop(image).resize((self.side, self.side), Image.Resampling.BICUBIC)
        if chance() < 0.5:
            image = ImageOps.mirror(image)
        for _ in range(2):
            operation = list(OPERATIONS.values())[int(chance() * len(OPERATIONS))]
            if chance() < 0.5:
                image = operation(image, 1 if chance() < 0.5 else -1)
        return image
