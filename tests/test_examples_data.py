"""The examples' readers: what the published formats hold, and one clear line for what does not hold it."""

import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
pytest.importorskip("transformers")
pytest.importorskip("PIL")

import blip_retrieval  # noqa: E402
import blip_video  # noqa: E402
import blip_vqa  # noqa: E402
import example_data  # noqa: E402
import vilt_moil  # noqa: E402
from common import answering, blip, data, predictions, training, videos  # noqa: E402


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return example_data.write_all(tmp_path_factory.mktemp("files"))


# ---- what the formats hold ------------------------------------------------------------------------------------------


def test_karpathy(tmp_path):
    splits = data.read_karpathy(example_data.flickr30k(tmp_path / "flickr30k", train=2, test=2))
    assert [(e.text, e.owner, e.key) for e in splits["test"]] == [
        ("A blue picture.", 0, "1000092797.jpg"),
        ("The picture is blue", 0, "1000092797.jpg"),
        ("A white picture.", 1, "1000092798.jpg"),
        ("The picture is white", 1, "1000092798.jpg"),
    ]
    assert splits["test"][0].images == (tmp_path / "flickr30k/images/1000092797.jpg",)
    splits = data.read_karpathy(example_data.coco(tmp_path / "coco"))
    assert {name: [e.text for e in split] for name, split in splits.items()} == {
        "train": ["a red dog", "a green dog"],  # train, then restval
        "val": ["a blue dog"],
        "test": ["a white dog", "a red dog"],
    }
    assert splits["train"][1].images == (tmp_path / "coco/val2014/COCO_val2014_000000391896.jpg",)
    assert data.checked(splits["train"]) == splits["train"]


def test_vqa(tmp_path):
    examples = data.checked(data.read_vqa(example_data.vqa2(tmp_path), "val2014"))
    assert examples[1].images == (tmp_path / "val2014/COCO_val2014_000000000010.jpg",)
    assert (examples[1].key, examples[1].answers) == (9001, ("green",) * 8 + ("dog", "the green"))
    # a test split has no annotations, and two sets of questions over one folder of images
    questions = {"questions": [{"image_id": 7, "question": "why?", "question_id": 70}]}
    example_data.write_json(tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json", questions)
    (example,) = data.read_vqa(tmp_path, "test-dev2015")
    assert (example.answers, example.images) == ((), (tmp_path / "test2015/COCO_test2015_000000000007.jpg",))


def test_frequent_answers():
    given = [("red",) * 6 + ("Green",) * 4, ("a red",) * 10, ("two",) * 9 + ("red",), ("blue",) * 10, ("Blue.",) * 10]
    examples = [data.Example("", (), answers=answers) for answers in given]
    assert answering.common_answers(examples) == ["blue", "red", "2"]
    assert answering.common_answers(examples, most=1) == ["blue"]


def test_ranks_of_cases_are_those_that_recall_counts():
    """A wrong candidate as similar as the right one comes before it."""
    examples = [data.Example(text, (Path(f"{text}.jpg"),), owner, key=text) for owner, text in enumerate("abc")]
    even = torch.tensor([[1.0, 1.0, 0.0], [0.5, 2.0, 0.0], [0.0, 0.0, 0.0]])
    rows = list(predictions.retrieval_rows(examples, {0: 0, 1: 1, 2: 2}, even, even))
    ranks = {(row["kind"], row["key"]): row["rank"] for row in rows}
    assert [ranks["image_to_text", key] for key in "abc"] == [2, 1, 3]
    assert [ranks["text_to_image", key] for key in "abc"] == [1, 1, 3]
    assert rows[1]["found"] == ["b", "a", "c"] and rows[4]["found"][0] == [Path("b.jpg")]


def test_a_single_answer_counts_letter_by_letter():
    """As MSRVTT-QA is judged: "two" is not "2", neither as a candidate nor as a prediction."""
    examples = [data.Example("", (), answers=(answer,), key=n) for n, answer in enumerate(("two", "the dog", "two"))]
    assert answering.common_answers(examples) == ["two", "the dog"]
    assert answering.accuracy(examples, {0: "two", 1: "dog", 2: "2"}) == pytest.approx(1 / 3)
    rows = list(predictions.answer_rows(examples, {0: "two", 1: "dog", 2: "2"}, answering.accuracy))
    assert [row["score"] for row in rows] == [1.0, 0.0, 0.0]


def test_candidates_from_a_list(tmp_path):
    args = Namespace(inference="rank", answers=1, answer_list=None)
    examples = [data.Example("", (), answers=("two",)), data.Example("", (), answers=("two",))]
    assert answering.candidates(args, examples) == ["two"]
    args.answer_list = tmp_path / "answer_list.json"
    args.answer_list.write_text('["red", "no"]')
    assert answering.candidates(args, examples) == ["red", "no"]
    args.inference = "generate"
    assert answering.candidates(args, examples) is None


def test_nlvr2(tmp_path):
    train = data.checked(data.read_nlvr2(example_data.nlvr2(tmp_path), "train"))
    assert train[0].images == tuple(tmp_path / f"images/train/42/train-100-0-img{n}.png" for n in (0, 1))
    assert [e.answers for e in train[:2]] == [("True",), ("False",)]
    dev = data.checked(data.read_nlvr2(tmp_path, "dev"))
    assert dev[3].images[1] == tmp_path / "images/dev/dev-103-0-img1.png"


def test_videos(tmp_path):
    example_data.msrvtt(tmp_path)
    frames = tmp_path / "frames"
    lines = videos.read_video_captions(tmp_path / "test.jsonl", frames)
    assert [(e.key, e.text, e.owner) for e in lines[:2]] == [("video6", "a blue dog", 0), ("video7", "a white dog", 1)]
    assert [file.name for file in lines[0].images] == ["video6_1.jpg", "video6_2.jpg", "video6_10.jpg"]
    rows = ["key,vid_key,video_id,sentence", "ret0,msr6,video6,a blue dog", "ret1,msr7,video7,a white dog"]
    (tmp_path / "MSRVTT_JSFUSION_test.csv").write_text("\n".join(rows) + "\n")
    assert videos.read_video_captions(tmp_path / "MSRVTT_JSFUSION_test.csv", frames) == lines[:2]
    sentences = [{"caption": "a red dog", "video_id": "video0", "sen_id": 0}]
    sentences += [{"caption": "a dog", "video_id": "video1", "sen_id": 1}]
    sentences += [{"caption": "the red dog", "video_id": "video0", "sen_id": 2}]
    example_data.write_json(tmp_path / "MSRVTT_data.json", {"info": {}, "videos": [], "sentences": sentences})
    whole = videos.read_video_captions(tmp_path / "MSRVTT_data.json", frames)
    assert [(e.text, e.owner) for e in whole] == [("a red dog", 0), ("a dog", 1), ("the red dog", 0)]
    assert [file.name for file in whole[0].images] == ["1.jpg", "2.jpg", "10.jpg"]
    questions = videos.read_video_questions(tmp_path / "test_qa.json", frames)
    assert (questions[0].answers, questions[0].key, questions[0].images) == (("blue",), 6, lines[0].images)


def test_captions_of_one_didemo_video_are_a_paragraph(tmp_path):
    example_data.didemo(tmp_path)
    frames = tmp_path / "frames"
    lines = videos.read_video_captions(tmp_path / "test.jsonl", frames, paragraphs=True)
    found = [(e.key, e.text, e.owner) for e in lines[:2]]
    assert found == [
        ("12090392@N02_6", "a blue dog. is of two", 0),
        ("12090392@N02_7", "a white dog. is of two", 1),
    ]
    assert lines[1].images == tuple(frames / f"12090392@N02_7/{n}.jpg" for n in (1, 2, 10))
    assert videos.read_video_captions(tmp_path / "test_data.json", frames, paragraphs=True) == lines
    assert len(lines) == 4 and len(videos.read_video_captions(tmp_path / "test_data.json", frames)) == 8


def test_captions_and_questions_are_cleaned_differently():
    """Punctuation is a space in a caption and nothing in a question."""
    text = 'A "dog", (two) cats; #1 on the t.v.?\n'
    assert data.clean_caption(text, 30) == "a dog , two cats 1 on the t v ?"
    assert data.clean_question(text) == "a dog, two cats 1 on the tv?"
    assert data.clean_caption("one two three", words=2) == data.clean_question("one two three", words=2) == "one two"


def test_schedules():
    by_epoch = [training.cosine_by_epoch(p, 4) for p in (0, 0.9, 1, 2.5, 3.9)]
    assert by_epoch == pytest.approx([1, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    warm = [training.linear_with_warmup(p, 10) for p in (0, 0.5, 1, 5.5, 10)]
    assert warm == pytest.approx([0, 0.5, 1, 0.5, 0])


# ---- what is wrong is told before there is a model ------------------------------------------------------------------


def change(path, edit):
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


VQA = ("--task", "vqa", "--held-out", "2")
KARPATHY, QUESTIONS = "dataset_flickr30k.json", "v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "v2_mscoco_train2014_annotations.json"
# (module, data set, further options, what is done to the folder, the message)
WRONG = {
    "no folder": (blip_retrieval, "flickr30k", (), lambda f: shutil.rmtree(f), "one of dataset_flickr30k.json and"),
    "two data sets": (blip_retrieval, "flickr30k", (), lambda f: example_data.coco(f), "found 2"),
    "not JSON": (blip_retrieval, "flickr30k", (), lambda f: (f / KARPATHY).write_text("{"), f"{KARPATHY}: not JSON"),
    "a list": (
        *(blip_retrieval, "flickr30k", ()),
        *(lambda f: (f / KARPATHY).write_text("[]"), "expected an object with 'images', got list"),
    ),
    "no images": (
        *(blip_retrieval, "flickr30k", (), lambda f: change(f / KARPATHY, lambda v: v.pop("images"))),
        "expected the key 'images', got 'dataset'",
    ),
    "empty images": (
        *(blip_retrieval, "flickr30k", (), lambda f: change(f / KARPATHY, lambda v: v.update(images=[]))),
        "images: expected a list with something in it",
    ),
    "no split": (
        *(blip_retrieval, "flickr30k", (), lambda f: change(f / KARPATHY, lambda v: v["images"][2].pop("split"))),
        "image 2: expected the key 'split', got 'sentids', 'imgid'",
    ),
    "a strange split": (
        *(blip_retrieval, "flickr30k", ()),
        *(lambda f: change(f / KARPATHY, lambda v: v["images"][1].update(split="dev")), "image 1: .* got 'dev'"),
    ),
    "missing images": (
        *(blip_retrieval, "flickr30k", (), lambda f: [x.unlink() for x in sorted((f / "images").iterdir())[:3]]),
        "1000092795.jpg: no such image, as 2 others of 10",
    ),
    "another folder of images": (blip_retrieval, "flickr30k", ("--images", "elsewhere"), lambda f: None, "elsewhere/"),
    "a large batch": (blip_retrieval, "flickr30k", ("--batch-size", "99"), lambda f: None, "99 is more than the 12"),
    "no questions": (blip_vqa, "vqa2", (), lambda f: (f / QUESTIONS).unlink(), f"{QUESTIONS}: No such file"),
    "no annotations": (blip_vqa, "vqa2", (), lambda f: (f / ANNOTATIONS).unlink(), f"{ANNOTATIONS}: No such file"),
    "a question without annotation": (
        *(blip_vqa, "vqa2", (), lambda f: change(f / ANNOTATIONS, lambda v: v["annotations"].pop())),
        "question 7: question_id 9007 has no annotation",
    ),
    "an annotation without answers": (
        *(blip_vqa, "vqa2", (), lambda f: change(f / ANNOTATIONS, lambda v: v["annotations"][3].pop("answers"))),
        "annotation 3: expected the key 'answers'",
    ),
    "a strange label": (
        *(vilt_moil, "nlvr2", ("--task", "nlvr2")),
        lambda f: (f / "dev.json").write_text((f / "dev.json").read_text().replace('"True"', '"Yes"')),
        "dev.json: line 1: expected the label True or False, got 'Yes'",
    ),
    "half a line": (
        *(vilt_moil, "nlvr2", ("--task", "nlvr2")),
        lambda f: (f / "dev.json").write_text((f / "dev.json").read_text()[:-20]),
        "dev.json: neither JSON nor one JSON object a line",
    ),
    "no frames": (
        *(blip_video, "msrvtt", ("--task", "retrieval"), lambda f: shutil.rmtree(f / "frames/video3")),
        "frames/video3: no frames, neither in this folder nor as",
    ),
    "no folder of frames": (
        *(blip_video, "msrvtt", ("--task", "qa"), lambda f: shutil.rmtree(f / "frames"), "no such folder of frames"),
    ),
    "no captions": (
        *(blip_video, "msrvtt", ("--task", "retrieval")),
        *(lambda f: (f / "test.jsonl").write_text('{"clip_name": "video6"}\n'), "row 0: expected the key 'caption'"),
    ),
    "rare answers": (vilt_moil, "vqa2", VQA, lambda f: None, "no answer is that of 9 questions"),
    "epochs": (vilt_moil, "vqa2", ("--task", "vqa", "--epochs", "0"), lambda f: None, "--epochs: expected at least 1"),
    "a layout of the other core": (
        *(blip_retrieval, "flickr30k", ("--core", "cp", "--layout", "released")),
        *(lambda f: None, "--method aurora: layout: 'released' is a layout of the tucker core"),
    ),
    "all dropped": (
        blip_vqa,
        "vqa2",
        ("--drop-path", "1"),
        lambda f: None,
        "--drop-path: expected .* less than 1, got 1",
    ),
    "frames": (
        blip_video,
        "msrvtt",
        ("--task", "qa", "--frames", "0"),
        lambda f: None,
        "--frames: expected at least 1",
    ),
    "no questions about DiDeMo": (
        *(blip_video, "didemo", ("--task", "qa", "--dataset", "didemo"), lambda f: None),
        "--task qa: DiDeMo has no questions",
    ),
    "no adapter": (blip_vqa, "vqa2", ("--evaluate", "nowhere"), lambda f: None, "nowhere/adapter_config.json: no such"),
    "nothing to resume": (blip_vqa, "vqa2", ("--resume",), lambda f: None, "--resume: .*/out/state.pt: no such file"),
}
NEED_MODELS = {"a large batch", "rare answers"}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_told_in_one_line(case, tmp_path, monkeypatch, checkpoints):
    module, dataset, options, spoil, message = WRONG[case]
    folder = getattr(example_data, dataset)(tmp_path / "data")
    spoil(folder)
    if case not in NEED_MODELS:
        monkeypatch.setattr(blip, "load", lambda *args: pytest.fail("a model was loaded first"))
        monkeypatch.setattr(vilt_moil, "load", lambda *args: pytest.fail("a model was loaded first"))
    model = checkpoints["vilt" if module is vilt_moil else "blip-qa" if module is blip_vqa else "blip"]
    argv = ["--data", str(folder), "--model", str(model), "--out", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(SystemExit, match=message) as stopped:
        module.main([*argv, *options])
    assert str(stopped.value).startswith("error: ") and "\n" not in str(stopped.value)


def test_a_broken_image_is_named(tmp_path):
    file = tmp_path / "broken.jpg"
    file.write_bytes(b"\xff\xd8\xff no image")
    with pytest.raises(ValueError, match=r"broken\.jpg: not a whole image"):
        data.load_image(file)
    example_data.paint(tmp_path / "half.png", "red", (300, 300))
    whole = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.png: not a whole image"):
        data.load_image(tmp_path / "half.png")


def test_a_model_of_another_kind(tmp_path, checkpoints):
    argv = ["--data", str(checkpoints["vqa2"]), "--model", str(checkpoints["vilt"]), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"^error: --model: .*vilt: expected a BLIP, got a model of the type 'vilt'$"):
        blip_vqa.main([*argv, "--device", "cpu"])


def test_a_model_that_is_not_there(tmp_path, checkpoints):
    for module, options in ((blip_vqa, ()), (vilt_moil, VQA)):
        argv = ["--data", str(checkpoints["vqa2"]), "--model", str(tmp_path / "nowhere"), "--out", str(tmp_path)]
        with pytest.raises(SystemExit, match=r"^error: --model: .*nowhere"):
            module.main([*argv, *options])
