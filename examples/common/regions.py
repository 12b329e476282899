"""Region features that a detector has computed before: what two-stage models see instead of images.

    *.tsv   a row an image, arrays in base64, of bottom-up-attention (github.com/peteranderson80/bottom-up-attention):
                image_id  image_w  image_h  num_boxes  boxes  features
            or of LXMERT (github.com/airsplay/lxmert), which has classes beside:
                img_id  img_h  img_w  objects_id  objects_conf  attrs_id  attrs_conf  num_boxes  boxes  features
    *.npz   an image a file, named as the image: features (or x), boxes (bbox, box), and image_w, image_h where boxes
            are in pixels

Boxes are left, top, right, bottom; features and boxes of a .tsv float32. A .tsv is never loaded whole: one pass over it
finds where each row begins, and checks its columns and sizes.
"""

import base64
import binascii
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.data import PICTURES, Example, fail

# By the number of columns, where these are: width, height, number of boxes, boxes, features
COLUMNS = {6: (1, 2, 3, 4, 5), 10: (2, 1, 7, 8, 9)}
NAMES = {"features": ("features", "x"), "boxes": ("boxes", "bbox", "box")}


def identity(name: str) -> str:
    """An image's name without folders, endings and a number's zeros: "000042.jpg.npz" is "42"."""
    stem = Path(name).name.removesuffix(".npz")
    stem = stem.rpartition(".")[0] if Path(stem).suffix.lower() in PICTURES else stem
    return str(int(stem)) if stem.isdecimal() else stem


class RegionFiles:
    """Regions by image, of .tsv files and folders of .npz files. width: numbers in a region's feature"""

    def __init__(self, paths: Sequence[Path]):
        self.places: dict[str, tuple[Path, int, str]] = {}
        self.width = 0
        for path in paths:
            if path.is_dir():
                files = sorted(path.glob("*.npz"))
                if not files:
                    fail(f"--features: {path}: no .npz files in this folder")
                for file in files:
                    self._add(file.name, file, 0, file)
            elif path.suffix == ".tsv":
                self._index(path)
            else:
                fail(f"--features: {path}: expected a .tsv file, or a folder of .npz files")

    def _add(self, name: str, path: Path, offset: int, where: object) -> None:
        key = identity(name)
        if key in self.places:
            fail(f"{where}: regions of {key} were in {self.places[key][0]} already")
        self.places[key] = path, offset, name

    def _index(self, path: Path) -> None:
        """Where each row begins. Sizes are read from the length of base64, without decoding it."""
        offset = 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file):
                    where = f"{path}: row {number + 1}"
                    try:
                        name, _, count, boxes, features = row_of(line)
                    except ValueError as error:
                        fail(f"{where}: {error}")
                    width, rest = divmod(decoded_length(features), 4 * count)
                    if decoded_length(boxes) != 16 * count or rest or not width:
                        fail(f"{where}: expected float32 boxes (4) and features of {count} regions, got "
                             f"{decoded_length(boxes)} and {decoded_length(features)} bytes")  # fmt: skip
                    if width != (self.width or width):
                        fail(f"{where}: expected {self.width} numbers a region, as before, got {width}")
                    self.width = width
                    self._add(name, path, offset, where)
                    offset += len(line)
        except OSError as error:
            fail(f"--features: {path}: {error.strerror}")

    def find(self, image: Path) -> tuple[Path, int, str] | None:
        """(file, where in it, its name there) by the image's name, or by the number that ends a name of COCO's."""
        number = re.fullmatch(r"COCO_\w+?_(\d+)", image.stem)
        return self.places.get(identity(image.name)) or (self.places.get(identity(number[1])) if number else None)

    def check(self, examples: Sequence[Example]) -> None:
        """Every image has regions, and the first of them can be read, which tells their width."""
        if not examples:
            fail("the split to read has no examples")
        images = dict.fromkeys(image for example in examples for image in example.images)
        missing = [image.name for image in images if self.find(image) is None]
        if missing:
            fail(f"--features: no regions of {missing[0]}, and of {len(missing) - 1} others of {len(images)} images")
        try:
            self.width = self.load(next(iter(images)))[0].shape[1]
        except ValueError as error:
            fail(str(error))

    def load(self, image: Path) -> tuple[Tensor, Tensor]:
        """(features (n, width), boxes (n, 4) in parts of the image's width and height)

        Raises ValueError, naming the file, where they are not that."""
        path, offset, name = self.find(image)
        where = path if path.suffix == ".npz" else f"{path}: {image.stem}"
        try:
            features, boxes = read_npz(path) if path.suffix == ".npz" else read_row(path, offset, name)
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{where}: {error}") from None
        if features.ndim != 2 or not len(features) or boxes.shape != (len(features), 4):
            raise ValueError(f"{where}: expected (n, d) features and (n, 4) boxes, got {features.shape}, {boxes.shape}")
        if self.width and features.shape[1] != self.width:
            raise ValueError(f"{where}: expected {self.width} numbers a region, got {features.shape[1]}")
        if not np.isfinite(features).all() or not ((boxes >= -0.01) & (boxes <= 1.01)).all():
            raise ValueError(f"{where}: features are not finite, or boxes are not inside the image")
        return torch.from_numpy(features.copy()), torch.from_numpy(boxes.clip(0, 1))


# ---- single images --------------------------------------------------------------------------------------------------


def row_of(line: bytes) -> tuple[str, np.ndarray, int, bytes, bytes]:
    """(name, (width, height, width, height), number of regions, boxes, features), the last two in base64"""
    fields = line.rstrip(b"\r\n").split(b"\t")
    if len(fields) not in COLUMNS:
        raise ValueError(f"expected {' or '.join(map(str, COLUMNS))} columns, got {len(fields)}")
    width, height, count, boxes, features = (fields[place] for place in COLUMNS[len(fields)])
    try:
        size, regions = np.array([int(width), int(height)] * 2, np.float32), int(count)
    except ValueError:
        raise ValueError(
            "width, height and number of boxes are not numbers; is the order of columns another?"
        ) from None
    if size.min() < 1 or regions < 1:
        raise ValueError(
            f"expected sizes and a number of boxes of at least 1, got {int(width)}, {int(height)}, {regions}"
        )
    return fields[0].decode(errors="replace"), size, regions, boxes, features


def decoded_length(text: bytes) -> int:
    return len(text) // 4 * 3 - text[-2:].count(b"=")


def read_row(path: Path, offset: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        file.seek(offset)
        found, size, count, *texts = row_of(file.readline())
    if found != name:
        raise ValueError(f"the file has changed since it was looked through: here is {found}")
    try:
        boxes, features = (np.frombuffer(base64.b64decode(text, validate=True), np.float32) for text in texts)
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from None
    return features.reshape(count, -1), boxes.reshape(count, 4) / size


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        found: dict[str, Any] = {}
        for wanted, names in NAMES.items():
            name = next((name for name in names if name in arrays), None)
            if name is None:
                raise ValueError(f"expected an array {' or '.join(names)}, got {', '.join(arrays.files) or 'none'}")
            found[wanted] = arrays[name].astype(np.float32)
        boxes = found["boxes"]
        if "image_w" in arrays and "image_h" in arrays:
            boxes = boxes / np.array([arrays["image_w"], arrays["image_h"]] * 2, np.float32)
        elif boxes.size and boxes.max() > 1.01:
            raise ValueError("boxes are in pixels, without image_w and image_h")
    return found["features"], boxes


class RegionExamples(Dataset):
    """(example, the regions of each of its images). most: of one image, in the file's order, the best first"""

    def __init__(self, examples: Sequence[Example], files: RegionFiles, most: int):
        self.examples, self.files, self.most = examples, files, most

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Example, list[tuple[Tensor, Tensor]]]:
        example = self.examples[index]
        loaded = (self.files.load(image) for image in example.images)
        return example, [(features[: self.most], boxes[: self.most]) for features, boxes in loaded]
