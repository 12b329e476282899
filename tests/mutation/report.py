"""What came of the mutants: lines to read while they run, and docs/mutation.md."""

import json
import subprocess
from collections import Counter, defaultdict
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path

TIMED_OUT = "timed out"
LATE = "survived at first\n"  # what the output of a mutant begins with that a test notices since it survived
VERDICTS = ("killed", "killed late", "at import", TIMED_OUT, "explained", "survived")
HEAD = """# Mutants

Whether a test fails when a line is wrong: cosmic-ray changes one place at a time, and the tests of that module run
(`make mutation`; [CONTRIBUTING.md](../CONTRIBUTING.md) says how). This page is generated.

{day}, commit {commit}, cosmic-ray {tool}, seed {seed}: {count} of {places} places, one mutant of each.
**{good} of {count} are noticed or explained: {share:.1f} %.** Before this sample was looked at it was {first:.1f} %,
which is what to expect of the places that no sample has met (at least {least:.0f} %, Wilson's bound at 95 %).

Killed: a test failed. Killed late: by a test that came because the mutant survived. At import: the package or the
tests could not even be loaded. Timed out: no end within four minutes of a processor. Explained: the mutant means the
same, or changes no result; its reason is in [explained.jsonl](../tests/mutation/explained.jsonl). Survived: a gap.
"""


@cache
def reasons() -> dict[tuple[str, str, str], str]:
    lines = Path(__file__).with_name("explained.jsonl").read_text(encoding="utf-8").splitlines()
    return {(line["module"], line["line"], line["mutant"]): line["why"] for line in map(json.loads, lines)}


def difference(result) -> tuple[str, str, str]:
    """The module, what stood there and the mutant: what a line of explained.jsonl names it by."""
    module, _, *lines = result.diff.splitlines()
    before, after = (" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
    return module.removeprefix("--- ").strip(), before, after


def verdict(result) -> str | None:
    """One of VERDICTS, or None: not tried, or no mutant."""
    if result is None or result.test_outcome is None:
        return None
    if result.output.removeprefix(LATE) == TIMED_OUT:
        return TIMED_OUT
    if result.test_outcome == "survived":
        return "explained" if difference(result) in reasons() else "survived"
    if result.test_outcome == "killed":
        return "killed late" if result.output.startswith(LATE) else "killed"
    return "at import"


def failed(result) -> list[str]:
    """Tests, or files that could not be loaded, by pytest's names."""
    lines = [line.partition(" ") for line in result.output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return [rest.partition(" - ")[0] for _, _, rest in lines]


def show(results) -> None:
    for module, result in results:
        if verdict(result) == "survived":
            print(*("\n", module, result.diff), sep="\n")
    print(Counter(verdict(result) for _, result in results))


def lower_bound(good: int, count: int, z: float = 1.96) -> float:
    """Wilson's, of a share."""
    share = good / count
    spread = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return (share + z * z / (2 * count) - spread) / (1 + z * z / count)


def write(page: Path, results, places: int, seed: int) -> None:
    table = defaultdict(Counter)
    for module, result in results:
        table[module][verdict(result)] += 1
    total = sum(table.values(), Counter())
    count = sum(total[name] for name in VERDICTS)
    good = count - total["survived"]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {"day": date.today(), "commit": commit, "tool": version("cosmic-ray"), "seed": seed, "places": places}
    first = good - total["killed late"]
    about |= {"count": count, "good": good, "share": 100 * good / count}
    about |= {"first": 100 * first / count, "least": 100 * lower_bound(first, count)}
    lines = [HEAD.format(**about)]
    lines += [f"| module | {' | '.join(VERDICTS)} |", f"| --- |{' ---: |' * len(VERDICTS)}"]
    for module, counts in [*sorted(table.items()), ("all", total)]:
        lines.append(f"| {module} | {' | '.join(str(counts[name] or '') for name in VERDICTS)} |")
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
