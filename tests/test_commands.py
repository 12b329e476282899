"""`python -m peft_kernels verify`, `explain` and `--version`, and what is said where a package is missing."""

import json
import os
import subprocess
import sys

import pytest
import transformers

from peft_kernels import __main__, __version__
from peft_kernels.benchmarks import verify

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
RIGHT = {"op": "gated_query", "case": "1 × 2", "dtype": "float32", "backend": "torch", "error": 1e-7, "ratio": 0.5}


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        __main__.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"peft_kernels {__version__}\n"


# ---- verify ---------------------------------------------------------------------------------------------------------


def test_verify_compares_in_processes_of_their_own(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(verify, "OPS", ("gated_query",))
    records, ends = verify.compared(["torch"])
    assert ends == ""
    assert {record["dtype"] for record in records} == {"float32", "bfloat16", "float16"}
    assert len({record["case"].partition(",")[0] for record in records}) == 3
    assert all(0 < record["error"] < 1e-2 for record in records)


@pytest.mark.parametrize(
    ("change", "status"), [({}, 0), ({"wrong": "y is off by 1"}, 1), ({"op": "reconstruct"}, 1)], ids=str
)
def test_verify_tells_what_is_wrong_and_what_is_missing(monkeypatch, capsys, change, status):
    every = [RIGHT | {"op": op} for op in verify.OPS]
    found = [record | change if record["op"] == "gated_query" else record for record in every]
    monkeypatch.setattr(verify, "compared", lambda backends: (found, ""))
    monkeypatch.setattr(verify.environment, "report", lambda: {"backends": {"torch": "works here", "cuda": "no"}})
    assert __main__.main(["verify"]) == status
    told = capsys.readouterr().out
    assert "| gated_query" in told or "op" in change
    assert "cuda: no" in told
    assert change.get("wrong", "") in told


def test_verify_notices_a_process_that_broke(monkeypatch, capsys):
    every = [RIGHT | {"op": op} for op in verify.OPS]
    monkeypatch.setattr(verify, "compared", lambda backends: (every, "; torch, reconstruct; exit status 1"))
    monkeypatch.setattr(verify.environment, "report", lambda: {"backends": {"torch": "works here"}})
    assert __main__.main(["verify"]) == 1
    assert "torch, reconstruct; exit status 1" in capsys.readouterr().out


# ---- explain --------------------------------------------------------------------------------------------------------


def test_explain_tells_presets_layers_and_backends(tmp_path, capsys):
    transformers.ViltConfig(**TINY, architectures=["ViltForQuestionAnswering"]).save_pretrained(tmp_path)
    assert __main__.main(["explain", str(tmp_path), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ViltForQuestionAnswering: 15 linear layers"
    assert "  preset vilt: 6 of them" in lines
    (query,) = [line for line in lines if ".query " in line]
    assert query.split()[:7] == ["2", "×", "vilt.encoder.layer.*.attention.attention.query", "64", "→", "64", "torch"]
    assert "vilt" in query.split()[7]
    assert lines[-1] == "torch: the tensors are on cpu, where only torch is fast"


@pytest.mark.parametrize(
    "config", [None, "not JSON", "{}", json.dumps({"architectures": ["NoSuchModel"]}), "[1]"], ids=str
)
def test_explain_names_a_file_that_is_no_model(tmp_path, capsys, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert __main__.main(["explain", str(tmp_path)]) == 1
    assert str(tmp_path / "config.json") in capsys.readouterr().err


# ---- missing packages -----------------------------------------------------------------------------------------------


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "peft_kernels.integrations.model_report", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match=r"transformers.*pip install 'peft_kernels\[trainer\]'"):
        __main__.main(["explain", "."])


def test_benchmarks_need_no_numpy(tmp_path):
    """Only the pictures of --plot do."""
    code = (
        "import sys; sys.modules['numpy'] = None; from peft_kernels.__main__ import main; "
        "sys.exit(main('bench lowrank_linear --shapes 24,16,40 --dropout 0.1 --against eager --rounds 1'.split()))"
    )

    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "ours, torch" in ran.stdout
