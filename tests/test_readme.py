"""What README and the examples tell a user to run does run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_readme_block(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # blocks may write files
    exec(compile(BLOCKS[index], f"README.md, block {index}", "exec"), {})


def test_readme_has_blocks():
    assert len(BLOCKS) >= 2


def test_demo_trains_and_writes_its_results(tmp_path):
    pytest.importorskip("sklearn")
    command = [sys.executable, ROOT / "examples" / "demo.py", "--epochs", "1", "--pretraining-epochs", "1"]
    done = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [row["method"] for row in results] == ["head only", "LoRA", "shared A and B", "full tuning"]
    for row in results:
        assert 0 <= row["test_accuracy"] <= 1
        assert row["merged_accuracy"] == pytest.approx(row["test_accuracy"], abs=0.01)
        assert row["method"] in done.stdout
