"""Pictures of runs: that what is drawn is what the files hold. The command is in test_plots_command.py."""

import numpy as np
import pytest
import torch
from matplotlib.colors import same_color
from PIL import Image
from torch import nn

from peft_kernels import Aurora, AuroraConfig, LoRA, MoIL
from peft_kernels.adapters import FullTuning, FullTuningConfig
from peft_kernels.demo import plots as demo_plots
from peft_kernels.plots import cases, curves, factors
from peft_kernels.plots.style import RIGHT, UNKNOWN, WRONG


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value, self.fc1 = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 12)


TARGETS = {"targets": ["query", "value", "fc1"], "rank": 2}


def adapter(folder, kind, **options):
    """Saved with values of some size; its state."""
    torch.manual_seed(0)
    made = kind.wrap(Tiny(), kind.config_class(**options))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "live_" not in name:  # or MoIL warns that nothing was trained
                p.normal_()
    made.save_pretrained(folder)
    return made.state_dict()


def joined(state, *names):
    return torch.cat([state[name].flatten() for name in names])


# ---- factors --------------------------------------------------------------------------------------------------------


def test_factors_of_aurora_cp(tmp_path):
    state = adapter(tmp_path, Aurora, **TARGETS)
    found = factors.factors(tmp_path)
    assert list(found) == ["U, 8 → 12", "U, 8 → 8", "V, 8 → 12", "V, 8 → 8", "λ ∘ P"]
    assert torch.equal(found["U, 8 → 12"], state["aurora.shared.down.8x12"].flatten())
    assert torch.equal(found["V, 8 → 8"], state["aurora.shared.up.8x8"].flatten())
    assert torch.equal(found["λ ∘ P"], (state["aurora.shared.slots"] * state["aurora.shared.lam"]).flatten())


def test_factors_of_aurora_tucker_are_drawn_by_the_demo_too(tmp_path):
    state = adapter(tmp_path, Aurora, targets=["query", "value"], rank=2, core="tucker")
    found = factors.factors(tmp_path)
    assert list(found) == ["U", "V", "P", "C"]
    for factor, name in zip(found, ("down.8x8", "up.8x8", "slots", "modes")):
        assert torch.equal(found[factor], state[f"aurora.shared.{name}"].flatten())
    demo_plots.plot_factors(tmp_path / "factors.png", tmp_path)
    assert (tmp_path / "factors.png").read_bytes()[:4] == b"\x89PNG"


def test_decompositions_of_every_layer_are_drawn_together(tmp_path):
    state = adapter(tmp_path, Aurora, **TARGETS, sharing="none")
    found = factors.factors(tmp_path)
    assert torch.equal(found["U, 8 → 8"], joined(state, "aurora.query.down.8x8", "aurora.value.down.8x8"))
    products = [state[f"aurora.{layer}.slots"] * state[f"aurora.{layer}.lam"] for layer in ("fc1", "query", "value")]
    assert torch.equal(found["λ ∘ P"], torch.cat(products).flatten())


def test_modalities_are_drawn_apart(tmp_path):
    from adapter_models import blip_retrieval

    made = Aurora.wrap(blip_retrieval()[0], AuroraConfig(preset="blip-retrieval", rank=2, sharing="modality"))
    made.save_pretrained(tmp_path)
    state, found = made.state_dict(), factors.factors(tmp_path)
    assert {title.rpartition(", ")[2] for title in found} >= {"text", "vision"}
    products = [title for title in found if title.startswith("λ ∘ P")]
    assert torch.equal(
        found["λ ∘ P, vision"], (state["aurora.vision.slots"] * state["aurora.vision.lam"]).flatten()
    ) and len(products) == len([name for name in state if name.endswith(".lam")])


def test_factors_of_lora_are_pefts_too(tmp_path):
    state = adapter(tmp_path / "ours", LoRA, **TARGETS, alpha=2)
    layers = ("fc1", "query", "value")
    expected = {
        factor: joined(state, *(f"{n}.{kind}" for n in layers)) for factor, kind in (("A", "down"), ("B", "up"))
    }
    LoRA.from_pretrained(Tiny(), tmp_path / "ours", check_base=False).export_lora(tmp_path / "pefts")
    for folder in ("ours", "pefts"):
        found = factors.factors(tmp_path / folder)
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[n].sort().values, expected[n].sort().values) for n in expected)


def test_factors_of_moil_are_without_its_biases(tmp_path):
    state = adapter(tmp_path, MoIL, targets=["query", "value"], rank=2, transform_rank=3)
    found = factors.factors(tmp_path)
    assert list(found) == ["A", "B", "A_d", "B_d"]
    assert torch.equal(found["A"], joined(state, "query.down.0", "value.down.0"))
    assert torch.equal(found["B"], joined(state, "query.up.0", "value.up.0"))
    assert torch.equal(found["A_d"], joined(state, "moil.transforms.0.down"))
    assert torch.equal(found["B_d"], joined(state, "moil.transforms.0.up"))


def test_a_method_without_factors_has_none(tmp_path):
    FullTuning.wrap(Tiny(), FullTuningConfig()).save_pretrained(tmp_path)
    assert factors.factors(tmp_path) == {}


def test_histograms_count_the_values_of_both_epochs():
    torch.manual_seed(0)
    before, after = {"A": torch.randn(400), "B": torch.zeros(5)}, {"A": 3 * torch.randn(400), "B": torch.randn(5)}
    figure = factors.histograms(after, before, title="run $5", names=("epoch 1", "epoch 4"))
    assert figure.get_suptitle() == "run $5"
    assert [axes.get_title() for axes in figure.axes] == ["A", "B"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["epoch 1", "epoch 4"]
    for axes, name in zip(figure.axes, after):
        *bars, outline = axes.patches
        reach = (min(before[name].min(), after[name].min()).item(), max(before[name].max(), after[name].max()).item())
        counts, _ = np.histogram(after[name].numpy(), len(bars), reach)
        assert [bar.get_height() for bar in bars] == counts.tolist()
        counts, _ = np.histogram(before[name].numpy(), len(bars), reach)
        assert outline.get_xy()[1:-1:2, 1].tolist() == counts.tolist()
    alone = factors.histograms({"B": torch.zeros(5)})  # as V starts
    assert sum(bar.get_height() for bar in alone.axes[0].patches) == 5 and not alone.legends


# ---- cases ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """Eight pictures, each 6 × 4 of one grey."""
    names = [str(tmp_path / f"{index}.png") for index in range(8)]
    for index, name in enumerate(names):
        Image.new("RGB", (6, 4), (index, index, index)).save(name)
    return names


def frame(axes):
    (colour,) = {axes.spines[side].get_edgecolor() for side in axes.spines}
    return next(name for name in (RIGHT, WRONG, UNKNOWN) if same_color(name, colour))


def grey(axes):
    return axes.images[0].get_array()[0, 0, 0]


def panels(figure):
    """Its images, row by row; those of subfigures, too."""
    return [axes for axes in figure.axes if axes.images]


def caption(files, rank, found=range(6), right=0):
    found = [[files[i]] for i in found]
    return {"kind": "text_to_image", "text": f"rank {rank} $5", "found": found, "right": [files[right]], "rank": rank}


def test_images_of_texts(files):
    rows = [caption(files, 1), caption(files, 3, (2, 1, 0, 3, 4)), caption(files, 70, (1, 2, 3, 4, 5, 6))]
    figure = cases.draw(rows, cases.Pictures(), "run")
    assert figure.get_suptitle() == "run, text to image: 1 of 3 found right at the first place"
    assert [part.get_suptitle() for part in figure.subfigs] == ["rank 1 $5", "rank 3 $5", "rank 70 $5"]
    shown = [[(grey(axes), frame(axes)) for axes in panels(part)] for part in figure.subfigs]
    assert shown[0] == [(0, RIGHT), (1, WRONG), (2, WRONG), (3, WRONG), (4, WRONG)]
    assert shown[1] == [(2, WRONG), (1, WRONG), (0, RIGHT), (3, WRONG), (4, WRONG)]
    assert shown[2] == [(i, WRONG) for i in range(1, 6)] + [(0, RIGHT)]
    assert panels(figure.subfigs[2])[-1].get_xlabel() == "right: number 70"


def test_videos_are_strips_of_frames_evenly_spread(files):
    row = caption(files, 1) | {"found": [files, files[:2], files[2:4]], "right": files}
    first, second, _ = panels(cases.draw([row], cases.Pictures()).subfigs[0])
    strip = first.images[0].get_array()[0, :, 0].tolist()
    assert [value for value in dict.fromkeys(strip) if value != 255] == [0, 2, 5, 7]
    assert (frame(first), frame(second)) == (RIGHT, WRONG)
    assert second.images[0].get_array().shape[1] == 2 * 240 + 6


def test_texts_of_images(files):
    found = [f"text {i}" for i in range(10)]
    base = {"kind": "image_to_text", "images": files[:1], "found": found}
    rows = [{**base, "right": ["text 0", "text 2"], "rank": 1}, {**base, "right": ["another"], "rank": 12}]
    figure = cases.draw(rows, cases.Pictures())
    assert [frame(axes) for axes in panels(figure)] == [RIGHT, WRONG]
    told = [[(t.get_text(), t.get_color()) for t in axes.texts] for axes in figure.axes if axes.texts]
    assert told[0] == [(f"{i + 1}. text {i}", RIGHT if i in (0, 2) else WRONG) for i in range(5)]
    assert told[1][:5] == [(f"{i + 1}. text {i}", WRONG) for i in range(5)]
    assert told[1][5:] == [("right: number 12, another", RIGHT)]


def test_answers(files):
    answers = ["red"] * 3 + ["blue"] * 5 + ["green", "white"]
    base = {"kind": "answer", "images": files[:1], "text": "which?", "answer": "red", "answers": answers}
    rows = [{**base, "score": score} for score in (1.0, 0.9, 0.3)] + [{**base, "answers": [], "score": None}]
    figure = cases.draw(rows, cases.Pictures(), "run")
    assert figure.get_suptitle() == "run, answer: 2 of 3 right"
    assert [frame(axes) for axes in figure.axes] == [RIGHT, RIGHT, UNKNOWN, WRONG]
    assert {axes.get_title() for axes in figure.axes} == {"which?"}
    right = "said: red\nright: blue, red, green"
    assert [axes.get_xlabel() for axes in figure.axes] == [
        *(right, f"{right}\nscore: 0.9", "said: red", f"{right}\nscore: 0.3")
    ]


def test_a_missing_image_is_an_empty_frame_with_its_name(files, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    row = caption([str(tmp_path / "gone.png"), str(tmp_path / "broken.png"), *files], 1, range(3))
    pictures = cases.Pictures()
    first, second, third = panels(cases.draw([row, row], pictures).subfigs[1])
    assert [[text.get_text() for text in axes.texts] for axes in (first, second, third)] == [
        ["gone.png"],
        ["broken.png"],
        [],
    ]
    assert frame(first) == RIGHT and frame(second) == WRONG
    assert list(pictures.missing) == [str(tmp_path / "gone.png"), str(tmp_path / "broken.png")]


@pytest.mark.parametrize(
    ("ranks", "count", "expected"),
    [
        ([1, 2, 1, 2, 1, 2, 1, 2], 4, [0, 6, 1, 7]),  # the first and the last of both
        ([2, 2, 2, 2, 1], 4, [4, 0, 2, 3]),
        ([1, 1, 1, 1, 1], 3, [0, 2, 4]),
        ([2, 1], 6, [1, 0]),
    ],
)
def test_half_of_the_cases_are_wrong(ranks, count, expected):
    rows = [{"kind": "text_to_image", "rank": rank, "at": at} for at, rank in enumerate(ranks)]
    assert [row["at"] for row in cases.chosen(rows, count)] == expected


# ---- several runs ---------------------------------------------------------------------------------------------------


def test_bubbles():
    points = [
        curves.Point("one", 1000, 40.0, 8_000),
        curves.Point("two", 100_000, 50.0, 2_000_000),
        curves.Point("live", 100_000, 60.0, None),
        curves.Point("as it came", 0, 10.0, 0),
    ]
    figure = curves.bubbles(points, "recall, %", order=["zero", *(point.name for point in points)])
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_ylabel()) == ("log", "recall, %")
    bubbles = [each for each in axes.collections if each.get_alpha()]
    assert [tuple(each.get_offsets()[0]) for each in bubbles] == [(1000, 40), (100_000, 50)]
    areas = [each.get_sizes()[0] for each in bubbles]
    assert areas[1] / areas[0] == pytest.approx(2_000_000 / 8_000)
    assert axes.lines[0].get_ydata() == [10, 10] and axes.lines[0].get_linestyle() == ":"
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(told) == [
        "as it came",
        "live\n100,000 trained",
        "one\n1,000 trained, 8.0 kB stored",
        "two\n100,000 trained, 2.0 MB stored",
    ]
    other = curves.lines({"two": [(1, 2.0)]}, "loss", order=["zero", *(point.name for point in points)])
    assert same_color(other.axes[0].lines[0].get_color(), bubbles[1].get_facecolor()[0, :3])


def test_lines_are_means_of_the_last_points():
    figure = curves.lines({"run": [(10, 4.0), (20, 2.0), (30, 6.0)]}, "loss", by="epoch", log=True, window=2)
    (axes,) = figure.axes
    assert axes.lines[0].get_xydata().tolist() == [[10, 4], [20, 3], [30, 4]]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("epoch", "loss", "log")
