"""What `make mutation` is told: which tests belong to a module, and why a mutant may survive."""

import json
from pathlib import Path

import pytest
from mutation import choices

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("pattern", choices.CHOICES)
def test_a_pattern_is_of_modules_and_their_tests_are_there(pattern):
    found = [str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)]
    assert found
    assert [test for test in choices.tests_of(found[0]) if not (ROOT / test).is_file()] == []


def test_whole_folders_are_mutated():
    mutated = choices.modules(ROOT)
    for folder in ("ops", "torch_kernels", "cuda_kernels", "adapters", "imitation"):
        for path in (ROOT / "peft_kernels" / folder).glob("*.py"):
            assert str(path.relative_to(ROOT)) in mutated or path.name == "__init__.py"


def test_every_explanation_says_which_mutant_it_means_and_why():
    for line in (ROOT / "tests" / "mutation" / "explained.jsonl").read_text(encoding="utf-8").splitlines():
        explained = json.loads(line)
        assert set(explained) == {"module", "line", "mutant", "why"} and all(explained.values())
        assert explained["module"] in choices.modules(ROOT) and explained["line"] != explained["mutant"]
