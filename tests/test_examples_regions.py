"""Files of region features: every format says the same, and what is wrong is told before there is a model."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
pytest.importorskip("transformers")
pytest.importorskip("PIL")

import example_data  # noqa: E402
import region_data  # noqa: E402
import two_stage  # noqa: E402
from common import data, regions  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """VQA v2 without pictures, and regions.tsv of 15 images: three that test, eight that train, four to evaluate."""
    root = example_data.vqa2_test(example_data.vqa2(tmp_path_factory.mktemp("vqa2")))
    region_data.write_tsv(root / "regions.tsv", region_data.images(root))
    return root


def test_every_format_says_the_same(tmp_path):
    names = ["COCO_val2014_000000000042", "dev-850-0-img0"]
    region_data.write_tsv(tmp_path / "six.tsv", ["42", names[1]])
    region_data.write_tsv(tmp_path / "ten.tsv", names, columns=10)
    (folder := tmp_path / "npz").mkdir()
    other = {"features": "x", "boxes": "bbox"}
    for name in names:
        each = {other.get(key, key): value for key, value in region_data.regions(name).items()}
        region_data.np.savez(folder / f"{name}.jpg.npz", **each)
    read = [regions.RegionFiles([path]) for path in (tmp_path / "six.tsv", tmp_path / "ten.tsv", folder)]
    for name in names:
        wanted = region_data.regions("42" if name == names[0] else name)
        for files_ in read[: 1 if name == names[0] else 3]:
            features, boxes = files_.load(Path(f"images/{name}.jpg"))
            assert features.numpy().tolist() == wanted["features"].tolist()
            assert boxes.numpy() == pytest.approx(wanted["boxes"] / [40, 30, 40, 30])
        ten, npz = (files_.load(Path(f"{name}.png")) for files_ in read[1:])
        assert all(torch.equal(a, b) for a, b in zip(ten, npz, strict=True))
    assert [files_.width for files_ in read] == [8, 8, 0]
    read[2].check([data.Example("", (Path(f"{names[0]}.jpg"),))])
    assert read[2].width == 8


def test_no_more_regions_than_asked_for(folder):
    files_ = regions.RegionFiles([folder / "regions.tsv"])
    example = data.read_vqa(folder, "train2014")[0]
    _, ((features, boxes),) = regions.RegionExamples([example], files_, 2)[0]
    whole, _ = files_.load(example.images[0])
    assert len(whole) > 2 and torch.equal(features, whole[:2]) and boxes.shape == (2, 4)


def test_a_file_that_changes_under_way_is_told(folder, tmp_path):
    (path := tmp_path / "regions.tsv").write_text((folder / "regions.tsv").read_text())
    files_ = regions.RegionFiles([path])
    images = [example.images[0] for example in data.read_vqa(folder, "train2014")]
    for image in images:
        assert files_.load(image)[0].tolist() == region_data.regions(image.stem)["features"].tolist()
    path.write_text(path.read_text().replace("val2014", "val2015").replace("train2014", "train2015"))
    with pytest.raises(ValueError, match=r"regions.tsv: COCO_train2014_0+9: the file has changed since"):
        files_.load(images[0])


def spoiled(text: str, place: int, value: str, row: int = 1) -> str:
    lines = text.splitlines()
    fields = lines[row].split("\t")
    lines[row] = "\t".join([*fields[:place], value, *fields[place + 1 :]])
    return "\n".join(lines) + "\n"


FIRST = "COCO_train2014_000000000009"  # that trains, in the file's fourth row
NAN = region_data.row(FIRST, features=region_data.regions(FIRST)["features"] * float("nan"))
# What is done to the text of the .tsv, and the message
WRONG_ROWS = {
    "columns": (lambda t: t.replace("\t", " ", 1), r"row 1: expected 6 or 10 columns, got 5"),
    "no size": (lambda t: spoiled(t, 1, "wide"), r"row 2: width, height and number of boxes are not numbers"),
    "no boxes": (
        lambda t: spoiled(t, 3, "0"),
        r"row 2: expected sizes and a number of boxes of at least 1, got 40, 30, 0",
    ),
    "other count": (
        lambda t: spoiled(t, 3, "7"),
        r"row 2: expected float32 boxes \(4\) and features of 7 regions, got",
    ),
    "half a row": (lambda t: t[:-60], r"row 15: expected float32 boxes"),
    "other width": (
        lambda t: t + region_data.row("77", **{"features": region_data.regions("77", 9)["features"]}),
        r"row 16: expected 8 numbers a region, as before, got 9",
    ),
    "twice": (lambda t: t + t.splitlines()[0], r"row 16: regions of COCO_test2015_000000000500 were in .*tsv already"),
    "lost image": (
        lambda t: "".join(t.splitlines(True)[:-3]),
        r"--features: no regions of COCO_val2014_0+\d+.jpg, and of 2",
    ),
    "nothing": (lambda t: "", r"--features: no regions of COCO_train2014_0+9.jpg, and of 11 others of 12 images"),
    "not base64": (lambda t: t.replace("A", "*"), r"tsv: COCO_train2014_0+9: not base64"),
    "not finite": (
        lambda t: spoiled(t, 5, NAN.split("\t")[5].strip(), row=3),
        r"tsv: COCO_train2014_0+9: features are not finite",
    ),
    "boxes outside": (lambda t: t.replace("\t40\t30\t", "\t4\t3\t"), r"or boxes are not inside the image"),
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_wrong_rows_are_told_before_there_is_a_model(folder, case, tmp_path, monkeypatch):
    spoil, message = WRONG_ROWS[case]
    (path := tmp_path / "regions.tsv").write_text(spoil((folder / "regions.tsv").read_text()))
    monkeypatch.setattr(two_stage, "load", lambda *args: pytest.fail("a model was loaded first"))
    monkeypatch.setattr(two_stage.BertTokenizer, "from_pretrained", lambda *args: pytest.fail("so was a tokenizer"))
    argv = ["--kind", "lxmert", "--task", "vqa", "--data", folder, "--features", path, "--held-out", "2"]
    with pytest.raises(SystemExit, match=message) as stopped:
        two_stage.main([str(part) for part in (*argv, "--device", "cpu", "--out", tmp_path)])
    assert str(stopped.value).startswith("error: ") and "\n" not in str(stopped.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": None}, "expected an array features or x, got boxes, image_w, image_h"),
        ({"boxes": None}, "expected an array boxes or bbox or box, got features, image_w, image_h"),
        ({"image_w": None}, "boxes are in pixels, without image_w and image_h"),
        ({"boxes": region_data.np.ones((1, 4))}, r"expected \(n, d\) features and \(n, 4\) boxes, got"),
    ],
)
def test_wrong_arrays_are_told(arrays, message, tmp_path):
    each = {key: value for key, value in {**region_data.regions("42"), **arrays}.items() if value is not None}
    region_data.np.savez(tmp_path / "42.npz", **each)
    files_ = regions.RegionFiles([tmp_path])
    with pytest.raises(SystemExit, match=rf"^error: .*42\.npz: {message}"):
        files_.check([data.Example("", (Path("COCO_val2014_000000000042.jpg"),))])
    (tmp_path / "42.npz").write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match=r"42\.npz: "):
        files_.load(Path("42.jpg"))
