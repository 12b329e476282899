"""What the examples read, tiny: data sets in their published formats, and checkpoints as the hub has them.

Every picture has one colour, which its caption names and its question asks for.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import adapter_models
import pytest
import torch
import transformers as hf
from PIL import Image
from torch import nn

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}
NAMES = list(COLOURS)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (*SPECIAL, *NAMES, "a", "the", "is", "what", "colour", "picture", "dog", "cat", "of", "two", "both", "are", "?")
SIZE = adapter_models.SIZE


@contextmanager
def stopped_in_the_second_evaluation(training: ModuleType) -> Iterator[None]:
    """training: examples/common/training.py, whose loop is stopped by a KeyboardInterrupt"""
    measure, calls = training.measure, []

    def stops(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "measure", stops)
        yield


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, model: nn.Module, kind: str) -> Path:
    """The model, and its processor in the files that the hub has. kind: "Blip" | "Vilt" """
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):  # the usual 0.02 gives the same score to everything
                module.weight.mul_(5)
    model.save_pretrained(folder)
    size = {"size": {"height": SIZE, "width": SIZE}}
    if kind == "Vilt":
        size = {"size": {"shortest_edge": SIZE}, "size_divisor": adapter_models.PATCH, "do_pad": True}
    processor = {"image_processor_type": f"{kind}ImageProcessor", "processor_class": f"{kind}Processor", **size}
    processor |= {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}
    processor |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "rescale_factor": 1 / 255}
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    tokenizer |= {f"{name[1:-1].lower()}_token": name for name in SPECIAL} | {"processor_class": f"{kind}Processor"}
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    write_json(folder / "preprocessor_config.json", processor)
    write_json(folder / "tokenizer_config.json", tokenizer)
    return folder


def save_blip(folder: Path, model_class: type, dropout: float = 0.0) -> Path:
    """With [DEC] and [ENC] after the tokenizer's last word, as the hub's."""
    torch.manual_seed(0)
    config = adapter_models.blip_config(dropout=dropout)
    text = config.text_config
    text.vocab_size, text.bos_token_id, text.sep_token_id, text.eos_token_id = len(WORDS) + 2, len(WORDS), 3, 3
    return save_checkpoint(folder, model_class(config), "Blip")


def save_vilt(folder: Path) -> Path:
    """Pre-trained for masked words alone, as dandelin/vilt-b32-mlm: every task's head is new."""
    torch.manual_seed(0)
    config = adapter_models.vilt_vqa()[0].config
    config.vocab_size = len(WORDS)
    model = hf.ViltForMaskedLM(config)
    torch.nn.init.normal_(model.vilt.embeddings.position_embeddings)  # zeros would hide the order of patches
    return save_checkpoint(folder, model, "Vilt")


# ---- data sets ------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def paint(path: Path, colour: str, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[colour]).save(path)


def flickr30k(folder: Path, train: int = 6, test: int = 4) -> Path:
    images = []
    for number in range(train + test + 1):
        colour, file = NAMES[number % 4], f"{1000092795 + number}.jpg"
        split = "train" if number < train else "test" if number < train + test else "val"
        paint(folder / "images" / file, colour)
        raw = [f"A {colour} picture.", f"The picture is {colour}"]
        sentences = [
            {"tokens": text.lower().strip(".").split(), "raw": text, "imgid": number, "sentid": 2 * number + n}
            for n, text in enumerate(raw)
        ]
        ids = [sentence["sentid"] for sentence in sentences]
        images.append({"sentids": ids, "imgid": number, "sentences": sentences, "split": split, "filename": file})
    write_json(folder / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    return folder


def coco(folder: Path) -> Path:
    images = []
    for number, split in enumerate(("train", "restval", "val", "test", "test")):
        part = "train2014" if split == "train" else "val2014"
        file = f"COCO_{part}_{391895 + number:012d}.jpg"
        paint(folder / part / file, NAMES[number % 4])
        sentences = [{"tokens": [], "raw": f"a {NAMES[number % 4]} dog", "imgid": number, "sentid": number}]
        images.append({"filepath": part, "sentids": [number], "filename": file, "imgid": number, "split": split})
        images[-1] |= {"sentences": sentences, "cocoid": 391895 + number}
    write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})
    return folder


def vqa2(folder: Path, train: int = 8, test: int = 4) -> Path:
    for split, count in (("train2014", train), ("val2014", test)):
        questions, annotations = [], []
        for number in range(count):
            colour, image, key = NAMES[number % 4], 9 + number, 9000 + number
            paint(folder / split / f"COCO_{split}_{image:012d}.jpg", colour, (30, 40))
            people = [colour] * 8 + ["dog", "the " + colour]
            answers = [
                {"answer": answer, "answer_confidence": "yes", "answer_id": n + 1} for n, answer in enumerate(people)
            ]
            about = {"image_id": image, "question_id": key}
            questions.append({**about, "question": "What colour is the picture?"})
            kind = {"question_type": "what colour is the", "answer_type": "other", "multiple_choice_answer": colour}
            annotations.append({**kind, "answers": answers, **about})
        about = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": split}
        write_json(
            folder / f"v2_OpenEnded_mscoco_{split}_questions.json",
            {**about, "task_type": "Open-Ended", "questions": questions},
        )
        write_json(folder / f"v2_mscoco_{split}_annotations.json", {**about, "annotations": annotations})
    return folder


def nlvr2(folder: Path, train: int = 8, test: int = 4) -> Path:
    for split, count in (("train", train), ("dev", test)):
        rows = []
        for number in range(count):
            stem, same = f"{split}-{100 + number}-0", number % 2 == 0
            inside = folder / "images" / split / ("42" if split == "train" else "")
            paint(inside / f"{stem}-img0.png", NAMES[number % 4], (50, 35))
            paint(inside / f"{stem}-img1.png", NAMES[number % 4 if same else (number + 1) % 4])
            rows.append({"sentence": f"Both are {NAMES[number % 4]}", "identifier": f"{stem}-0", "label": str(same)})
            rows[-1] |= {"left_url": "", "right_url": "", "synset": "dog", "query": "dogs0", "validation": {}}
            rows[-1] |= {"directory": 42} if split == "train" else {}
        write_lines(folder / f"{split}.json", rows)
    return folder


def msrvtt(folder: Path, train: int = 6, test: int = 4) -> Path:
    """Clip names and captions a line, and MSRVTT-QA; the training videos' frames are in folders of their own."""
    captions, questions = [], []
    for number in range(train + test):
        colour, video = NAMES[number % 4], f"video{number}"
        for frame in (1, 2, 10):
            paint(folder / "frames" / (f"{video}/{frame}.jpg" if number < train else f"{video}_{frame}.jpg"), colour)
        captions.append({"clip_name": video, "retrieval_key": f"ret{number}", "caption": f"a {colour} dog"})
        about = {"answer": colour, "category_id": 3, "id": number, "video_id": number}
        questions.append({**about, "question": "what colour is the dog?"})
    write_lines(folder / "train.jsonl", captions[:train])
    write_lines(folder / "test.jsonl", captions[train:])
    write_json(folder / "train_qa.json", questions[:train])
    write_json(folder / "test_qa.json", questions[train:])
    return folder


def didemo(folder: Path, train: int = 6, test: int = 4) -> Path:
    """The release's lines, of two captions a video here, and DiDeMo's own list."""
    for split, numbers in (("train", range(train)), ("test", range(train, train + test))):
        videos = [f"12090392@N02_{number}.avi" for number in numbers]
        for number, video in zip(numbers, videos):
            for frame in (1, 2, 10):
                paint(folder / "frames" / Path(video).stem / f"{frame}.jpg", NAMES[number % 4], (60, 40))
        texts = [[f"a {NAMES[number % 4]} dog.", "is of two"] for number in numbers]
        rows = [(video, text) for video, both in zip(videos, texts) for text in both]
        write_lines(folder / f"{split}.jsonl", [{"clip_name": video, "caption": text} for video, text in rows])
        own = [
            {"video": v, "description": text, "annotation_id": n, "times": [[0, 1]]} for n, (v, text) in enumerate(rows)
        ]
        write_json(folder / f"{split}_data.json", own)
    return folder


def write_all(root: Path) -> dict[str, Path]:
    """Every data set and checkpoint, by name."""
    made = {each.__name__: each(root / each.__name__) for each in (flickr30k, coco, vqa2, nlvr2, msrvtt, didemo)}
    made["blip"] = save_blip(root / "blip", hf.BlipForImageTextRetrieval)
    made["blip-qa"] = save_blip(root / "blip-qa", hf.BlipForQuestionAnswering)
    made["vilt"] = save_vilt(root / "vilt")
    return made


def vqa2_test(folder: Path, count: int = 3) -> Path:
    """Questions of test-dev2015 beside the others; their answers are not public."""
    questions = []
    for number in range(count):
        paint(folder / "test2015" / f"COCO_test2015_{500 + number:012d}.jpg", NAMES[number % 4])
        about = {"image_id": 500 + number, "question_id": 90_000 + number}
        questions.append({**about, "question": "What colour is the picture?"})
    write_json(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"info": {}, "questions": questions})
    return folder
