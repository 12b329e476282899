"""Every block of Python in docs/ runs. A block that is marked as continued goes on after the page's last one."""

import re
import socket
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


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
    without = ("demo.md", "gpu.md", "measured.md")  # figures; commands for a machine that is not this one
    assert all(programs(path) for path in DOCS.glob("*.md") if path.name not in without)


def test_links_between_pages():
    for path in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([\w./-]+\.md)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).is_file(), f"{path.name} links to {target}"
