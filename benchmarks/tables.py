"""docs/measured.md and its pictures, and what README.md has between its markers: made from the result files.

    python -m peft_kernels.benchmarks.tables [--check]

Nothing says about a GPU what no result file of a GPU says. Pictures are drawn when the page changes. --check changes
nothing and exits 1 if a text differs from what the result files say, or a picture is missing.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from . import choices, measured, verified
from .measured import on_gpu
from .predictions import GRAPHED, KERNELS, WIDE, title
from .results import HERE, RESULTS, by_device, load

README, PAGE = HERE.parent / "README.md", HERE.parent / "docs" / "measured.md"
FIGURE = "speed.png"  # README's, beside the page
PICTURE = re.compile(r"\]\((?:docs/)?((?:measured-[\w-]+|speed)\.png)\)")
SHOWN_CASES = [title(shape, dropout) for shape in (GRAPHED, WIDE) for dropout in (0.0, 0.1)]
SHOWN_PEERS = ("PEFT", "torch eager", "PEFT compiled", "torch compiled", "frozen linear")


def status(devices: Sequence[dict]) -> str:
    """What ran on which GPU, and how it went."""
    told = [f"Ran on {each['device']}, {each['date']}: {'; '.join(_outcomes(each))}." for each in on_gpu(devices)]
    return " ".join([*(told or [measured.NEVER]), "All that was measured: [docs/measured.md](docs/measured.md)."])


def _outcomes(device: dict) -> list[str]:
    told, counts = [], (device["tests"] or {}).get("counts")
    if device["numerics"]:
        ratios: dict[str, float] = {}
        for record in (record for record in device["numerics"] if "ratio" in record):
            ratios[record["backend"]] = max(record["ratio"], ratios.get(record["backend"], 0))
        errors = ", ".join(f"{backend} {ratio:.2f} ×" for backend, ratio in ratios.items())
        wrong = sum("wrong" in record for record in device["numerics"])
        compared = wrong + sum("ratio" in record for record in device["numerics"])
        told.append(f"{compared} results against float64, {wrong} wrong, the largest error beside torch's: {errors}")
    if counts:
        whole = "tests" if device["tests"].get("complete") else "tests, as far as they came"
        told.append(f"{whole}: {', '.join(f'{number} {outcome}' for outcome, number in sorted(counts.items()))}")
    for turn, each in (device["sanitizer"] or {}).items():
        clean = all(why.startswith("0 ") for why in each.values())
        told.append(f"{turn} {'clean' if clean else 'not clean, or not whole'}")
    if cases := {(case["op"], case["title"]) for case in device["cases"]}:
        lost = {cells[:2] for _, cells in measured.losses(device)} & cases
        told.append(f"{len(cases)} cases timed, in {len(lost)} of which somebody is faster")
    look = [name for name, each in device["ran"].items() if not each["ok"]]
    told += [f"to be looked at: {', '.join(look)}"] if look else []
    return told


def speed(devices: Sequence[dict]) -> str:
    """README's figure, if there is anything to show in it."""
    device = shown(devices)
    if device is None:
        return ""
    cases = "`lowrank_linear`, forward and backward, in a CUDA graph and eager"
    return f"![{cases}, beside its peers](docs/{FIGURE})\n\n{cases}, on {device['device']}, {device['date']}."


def shown(devices: Sequence[dict]) -> dict | None:
    """The first GPU that has the figure's cases, with those and whoever is shown in them, or None."""
    for device in on_gpu(devices):
        cases = []
        for case in device["cases"]:
            if case["op"] == "lowrank_linear" and case["title"] in SHOWN_CASES:
                rows = [r for r in case["results"] if r["backend"] in KERNELS or r["provider"] in SHOWN_PEERS]
                cases += [{**case, "results": rows}] if rows else []
        if cases:
            return {**device, "cases": cases}
    return None


def updated(text: str, devices: Sequence[dict], tests: Sequence[dict] = ()) -> str:
    """README's text with its generated parts made anew. Raises ValueError if a pair of markers is missing."""
    parts = {"status": status(devices), "verified": verified.table(tests, devices), "speed": speed(devices)}
    for name, part in parts.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"README: expected {begin} and, after it, {end}, each once")
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n{part}\n{end}{after}"
    return text


def draw(devices: Sequence[dict], folder: Path) -> None:
    """Every picture anew; those that nobody names any more go."""
    for old in [*folder.glob("measured-*.png"), folder / FIGURE]:
        old.unlink(missing_ok=True)
    if not (gpus := on_gpu(devices)):
        return
    from . import plots

    for device in gpus:
        plots.plot(device, folder, measured.pictures(gpus, device))
    if device := shown(devices):
        plots.bars(folder / FIGURE, device["cases"], f"lowrank_linear, {device['device']}")


def main(argv: Sequence[str] | None = None) -> int:
    made = {"prog": "python -m peft_kernels.benchmarks.tables", "description": __doc__.split("\n")[0]}
    parser = argparse.ArgumentParser(**made)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if anything differs")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--page", type=Path, default=PAGE, help="its folder has the pictures")
    parser.add_argument("--choices", type=Path, default=choices.FILE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    devices = by_device(load(given.results))
    readme = updated(given.readme.read_text(), devices, verified.load(given.results / verified.TESTS.name))
    texts = {given.readme: readme, given.page: measured.page(devices)}
    texts[given.choices] = choices.text(devices)
    differ = [path for path, text in texts.items() if not path.is_file() or path.read_text() != text]
    names = {name for text in texts.values() for name in PICTURE.findall(text)}
    missing = [given.page.parent / name for name in sorted(names) if not (given.page.parent / name).is_file()]
    if given.check and (differ or missing):
        told = ", ".join(path.name for path in [*differ, *missing])
        print(f"not what the result files say: {told}: run `python -m peft_kernels.benchmarks.tables`")
        return 1
    for path in differ:
        path.write_text(texts[path])
    if given.page in differ or missing:
        draw(devices, given.page.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
