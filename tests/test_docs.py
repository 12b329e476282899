"""Every block of Python in docs/ runs. A block that is marked as continued goes on after the page's last one.

And what docstrings and comments cite of docs/method.md is there.
"""

import re
import socket
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CITING = ("peft_kernels", "csrc", "triton_kernels", "benchmarks", "tests", "examples")
# A citation may go on after a line break, in a comment too: "docs/method.md, sections 3\n# and 4"
CITED = re.compile(r"docs/method\.md,[\s#/*]+sections?[\s#/*]+(\d+(?:(?:,|[\s#/*]+and)[\s#/*]+\d+)*)")


def programs(path: Path) -> list[str]:
    """What a reader would copy: blocks, each with those that continue it."""
    found = []
    for continued, block in re.findall(r"```python( continued)?\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
        if continued:
            found[-1] += block
        else:
            found.append(block)
    return found


PROGRAMS = [(path.name, i) for path in sorted(DOCS.glob("*.md")) for i in range(len(programs(path)))]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize(("page", "index"), PROGRAMS)
def test_block(page, index, tmp_path, monkeypatch):
    if page == "lightning.md":
        pytest.importorskip("lightning.pytorch")
    monkeypatch.chdir(tmp_path)  # blocks may write files
    if page == "ddp.md":  # as torchrun starts one process
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        started = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in started.items():
            monkeypatch.setenv(name, value)
    exec(compile(programs(DOCS / page)[index], f"docs/{page}, block {index}", "exec"), {})


def test_the_pages_are_there():
    pages = {page for page, _ in PROGRAMS}
    assert {"trainer.md", "accelerate.md", "raw_loop.md", "ddp.md"} <= pages
    # figures; commands for a machine that is not this one; formulas
    without = ("demo.md", "gpu.md", "measured.md", "method.md", "mutation.md")
    assert all(programs(path) for path in DOCS.glob("*.md") if path.name not in without)


def test_links_between_pages():
    for path in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([\w./-]+\.md)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).is_file(), f"{path.name} links to {target}"


# ---- the formulas that code cites -----------------------------------------------------------------------------------


def citations(root: Path) -> set[tuple[str, str]]:
    """(file, number) of every section of docs/method.md that a source cites."""
    paths = [path for folder in CITING for path in sorted((root / folder).rglob("*"))]
    sources = [path for path in paths if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp", ".md")]
    return {
        (path.relative_to(root).as_posix(), number)
        for path in sources
        for numbers in CITED.findall(path.read_text(encoding="utf-8"))
        for number in re.findall(r"\d+", numbers)
    }


def uncovered(root: Path) -> set[tuple[str, str]]:
    """Citations of a section that the page does not have."""
    page = (root / "docs/method.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\d+)\. ", page, re.M)
    return {(file, number) for file, number in citations(root) if number not in sections}


def test_cited_sections_of_the_method_are_there():
    assert {("peft_kernels/ops/lowrank_linear.py", "1"), ("peft_kernels/presets.py", "4")} <= citations(ROOT)
    assert not uncovered(ROOT)


def test_a_cited_section_that_is_missing_is_found(tmp_path):
    for folder in ("docs", "peft_kernels", "csrc"):
        (tmp_path / folder).mkdir()
    page, cited = tmp_path / "docs/method.md", "docs/method.md"
    (tmp_path / "peft_kernels/a.py").write_text(f"# Source: {cited}, sections 1,\n# 2 and 3.")
    (tmp_path / "csrc/b.cu").write_text(f"// {cited},\n// section 12")
    page.write_text("## 1. One\n\n## 2. Two\n\n## 3. Three\n\n## 12. Twelve\n")
    assert len(citations(tmp_path)) == 4 and not uncovered(tmp_path)
    page.write_text("## 1. One\n\n### 2. Two\n\nIn section 3. and ## 12. there is nothing.\n")
    assert uncovered(tmp_path) == {("peft_kernels/a.py", "2"), ("peft_kernels/a.py", "3"), ("csrc/b.cu", "12")}
