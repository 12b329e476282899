"""Videos as folders of frames: readers of MSR-VTT, MSRVTT-QA and DiDeMo, and which frames of a video are read."""

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from common.data import PICTURES, Example, fail, field, read_json, records

VIDEOS = {".3gp", ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".webm", ".wmv"}
DRAWN = ("random", "clip", "even")
Frame = TypeVar("Frame")


def read_video_captions(path: Path, frames: Path, paragraphs: bool = False) -> list[Example]:
    """One example a caption, or with `paragraphs` one a video: its captions, in their order, are one text.

    path: lines with clip_name and caption (.jsonl, as the release reads both data sets), MSRVTT_data.json, the .csv of
        MSR-VTT's 1k-A split, or DiDeMo's own train_data.json (video and description)
    """
    if path.suffix == ".csv":
        if not path.is_file():
            fail(f"{path}: No such file or directory")
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    else:
        rows = read_json(path)
        rows = field(rows, "sentences", path) if isinstance(rows, dict) else rows
    texts: dict[str, list[str]] = {}
    captions = []
    for number, row in enumerate(records(rows, path)):
        where = f"{path}: row {number}"
        video = next((row[key] for key in ("clip_name", "video_id") if key in row), None)
        video = Path(field(row, "video", where) if video is None else video)
        video = video.stem if video.suffix.lower() in VIDEOS else video.name
        text = next((row[key] for key in ("sentence", "description") if key in row), None)
        text = field(row, "caption", where) if text is None else text
        texts.setdefault(video, []).append(text)
        captions.append((video, text))
    if paragraphs:
        captions = [(video, " ".join(each)) for video, each in texts.items()]
    found, owners = find_frames(frames, texts), {video: owner for owner, video in enumerate(texts)}
    return [Example(text, found[video], owners[video], key=video) for video, text in captions]


def read_video_questions(path: Path, frames: Path) -> list[Example]:
    """MSRVTT-QA: a list of {id, video_id, question, answer}."""
    rows = [(one, f"{path}: question {number}") for number, one in enumerate(records(read_json(path), path))]
    videos = [f"video{field(one, 'video_id', where)}" for one, where in rows]
    found = find_frames(frames, videos)
    return [
        Example(field(one, "question", where), found[video], number, (field(one, "answer", where),), one.get("id"))
        for number, ((one, where), video) in enumerate(zip(rows, videos))
    ]


def find_frames(folder: Path, videos: Iterable[str]) -> dict[str, tuple[Path, ...]]:
    """Each video's frames in their order: folder/VIDEO/….jpg, or else folder/VIDEO_….jpg."""
    if not folder.is_dir():
        fail(f"{folder}: no such folder of frames")
    flat: dict[str, list[Path]] = defaultdict(list)
    for file in folder.iterdir():
        flat[file.stem.rpartition("_")[0]].append(file)
    found = {}
    for video in dict.fromkeys(videos):
        inside = folder / video
        files = [f for f in (inside.iterdir() if inside.is_dir() else flat[video]) if f.suffix.lower() in PICTURES]
        if not files:
            fail(f"{inside}: no frames, neither in this folder nor as {inside}_….jpg")
        found[video] = tuple(sorted(files, key=_numbered))
    return found


def _numbered(file: Path) -> list:
    """Frame 10 comes after frame 9, with leading zeros and without."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", file.name)]


def draw_frames(files: Sequence[Frame], count: int, drawn: str) -> list[Frame]:
    """`count` frames in their order. drawn: at "random" | a "clip" of neighbours, begun at random | "even" ly spread

    Of a video that has fewer, all of them, evenly repeated.
    """
    if drawn == "even" or len(files) < count:
        return [files[int((n + 0.5) * len(files) / count)] for n in range(count)]
    if drawn == "clip":
        first = int(torch.randint(len(files) - count + 1, ()))
        return list(files[first : first + count])
    return [files[n] for n in sorted(torch.randperm(len(files))[:count].tolist())]
