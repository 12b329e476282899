"""Published data sets, read from local folders in the formats that their authors give them. Nothing is downloaded.

Every reader checks what it reads and that the images are there; what is wrong ends the program with one line, before
there is a model.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image
from torch.utils.data import DataLoader, Dataset

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
KARPATHY = {"flickr30k": "dataset_flickr30k.json", "coco": "dataset_coco.json"}
PUNCTUATION = re.compile(r'[.!"()*#:;~]')


@dataclass(frozen=True)
class Example:
    """text: a caption, a question or a statement;  images: files: one, NLVR2's two, or all frames of a video
    owner: number of the image or video in its split, the same for all its captions
    answers: one for each annotator;  key: the data set's own name or number of it
    """

    text: str
    images: tuple[Path, ...]
    owner: int = 0
    answers: tuple[str, ...] = ()
    key: Any = None


def fail(message: str) -> NoReturn:
    raise SystemExit(f"error: {message}")


# ---- files ----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """A JSON file; of .jsonl, and of files with one object a line, the list of all lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    try:
        return json.loads(text) if path.suffix != ".jsonl" else [json.loads(line) for line in text.splitlines() if line]
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return read_lines(path, text)
        fail(f"{path}: not JSON: {error}")


def read_lines(path: Path, text: str) -> list:
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        fail(f"{path}: neither JSON nor one JSON object a line: {error}")


def field(record: Any, key: str, where: object) -> Any:
    if not isinstance(record, dict):
        fail(f"{where}: expected an object with {key!r}, got {type(record).__name__}")
    if key not in record:
        fail(f"{where}: expected the key {key!r}, got {', '.join(map(repr, record)) or 'none'}")
    return record[key]


def records(value: Any, where: object) -> list:
    if not isinstance(value, list) or not value:
        fail(f"{where}: expected a list with something in it, got {type(value).__name__}")
    return value


def checked(examples: list[Example]) -> list[Example]:
    """The same, if there are any and all of their images are files."""
    if not examples:
        fail("the split to read has no examples")
    files = {file for example in examples for file in example.images}
    missing = sorted(file for file in files if not file.is_file())
    if missing:
        fail(f"{missing[0]}: no such image, as {len(missing) - 1} others of {len(files)}")
    return examples


# ---- readers --------------------------------------------------------------------------------------------------------


def karpathy_dataset(folder: Path) -> str:
    """The one whose file the folder holds."""
    found = [name for name, file in KARPATHY.items() if (folder / file).is_file()]
    if len(found) != 1:
        fail(f"--data: {folder}: expected one of {' and '.join(KARPATHY.values())}, found {len(found)}")
    return found[0]


def read_karpathy(folder: Path, images: Path | None = None) -> dict[str, list[Example]]:
    """Captions by split, "train" (with COCO's "restval"), "val" and "test".

    images: where they are; None: in folder/images, if there is one, else in the folder
    """
    path = folder / KARPATHY[karpathy_dataset(folder)]
    if images is None:
        images = folder / "images" if (folder / "images").is_dir() else folder
    splits: dict[str, list[Example]] = {"train": [], "val": [], "test": []}
    owners = dict.fromkeys(splits, 0)
    for number, image in enumerate(records(field(read_json(path), "images", path), f"{path}: images")):
        where = f"{path}: image {number}"
        split = field(image, "split", where)
        split = "train" if split == "restval" else split
        if split not in splits:
            fail(f"{where}: expected one of the splits {', '.join(splits)}, restval, got {split!r}")
        file = images / image.get("filepath", "") / field(image, "filename", where)
        for sentence in records(field(image, "sentences", where), f"{where}: sentences"):
            splits[split].append(Example(field(sentence, "raw", where), (file,), owners[split], key=file.name))
        owners[split] += 1
    return splits


def read_vqa(folder: Path, split: str) -> list[Example]:
    """Questions of VQA v2's `split`, as "train2014"; with answers, but for test splits."""
    path = folder / f"v2_OpenEnded_mscoco_{split}_questions.json"
    answers, tested = {}, split.startswith("test")
    if not tested:
        given = folder / f"v2_mscoco_{split}_annotations.json"
        for number, one in enumerate(records(field(read_json(given), "annotations", given), f"{given}: annotations")):
            where = f"{given}: annotation {number}"
            people = records(field(one, "answers", where), f"{where}: answers")
            answers[field(one, "question_id", where)] = tuple(field(person, "answer", where) for person in people)
    pictures = "test2015" if tested else split
    examples = []
    for number, one in enumerate(records(field(read_json(path), "questions", path), f"{path}: questions")):
        where = f"{path}: question {number}"
        key = field(one, "question_id", where)
        if not tested and key not in answers:
            fail(f"{where}: question_id {key} has no annotation")
        file = folder / pictures / f"COCO_{pictures}_{field(one, 'image_id', where):012d}.jpg"
        examples.append(Example(field(one, "question", where), (file,), number, answers.get(key, ()), key))
    return examples


def read_nlvr2(folder: Path, split: str) -> list[Example]:
    """Statements about two images, of "train", "dev" or "test1"; the answer is "True" or "False"."""
    path, examples = folder / f"{split}.json", []
    for number, one in enumerate(records(read_json(path), path)):
        where = f"{path}: line {number + 1}"
        key, label = field(one, "identifier", where), str(field(one, "label", where))
        if label not in ("True", "False"):
            fail(f"{where}: expected the label True or False, got {label!r}")
        inside = folder / "images" / split / (str(field(one, "directory", where)) if split == "train" else "")
        images = tuple(inside / f"{key.rpartition('-')[0]}-img{side}.png" for side in (0, 1))
        examples.append(Example(field(one, "sentence", where), images, number, (label,), key))
    return examples


# ---- loading --------------------------------------------------------------------------------------------------------


def clean_caption(text: str, words: int) -> str:
    """As BLIP and the release read captions: in lower case, spaces for punctuation, so many words at most."""
    return " ".join(PUNCTUATION.sub(" ", text.lower()).split()[:words])


def clean_question(text: str, words: int = 50) -> str:
    """As they read questions: punctuation leaves no space, so that "t.v." becomes "tv"."""
    return " ".join(PUNCTUATION.sub("", text.lower()).split()[:words])


def load_image(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError as error:
        raise ValueError(f"{file}: not a whole image: {error}") from None


class Examples(Dataset):
    """(example, its images).

    augment: what is done to every image; None: nothing
    draw: which of the example's images are read; None: all
    """

    def __init__(
        self,
        examples: Sequence[Example],
        augment: Callable[[Image.Image], Image.Image] | None = None,
        draw: Callable[[Sequence[Path]], Sequence[Path]] | None = None,
    ):
        self.examples, self.augment, self.draw = examples, augment, draw

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Example, list[Image.Image]]:
        files = self.examples[index].images
        images = [load_image(file) for file in (files if self.draw is None else self.draw(files))]
        return self.examples[index], [self.augment(image) for image in images] if self.augment else images


def loader(args: Any, examples: Examples, collate: Callable, train: bool = False) -> DataLoader:
    """Shuffled whole batches of args.batch_size for training, else everything in order."""
    if train and len(examples) < args.batch_size:
        fail(f"--batch-size: {args.batch_size} is more than the {len(examples)} examples that there are")
    return DataLoader(
        examples, args.batch_size, shuffle=train, drop_last=train, num_workers=args.workers, collate_fn=collate
    )
