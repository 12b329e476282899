"""`python -m peft_kernels env`: complete, cheap, and never in the way of a bug report."""

import json
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from peft_kernels import __main__, backend, environment

PARTS = ["versions", "imported_from", "machine", "gpu", "backends", "cuda_kernels", "settings"]


def python(*arguments, cwd):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)


def test_report_from_an_empty_directory(tmp_path):
    ran = python("-m", "peft_kernels", "env", "--json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert list(found) == PARTS
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["backends"].keys() == {"torch", "triton", "cuda"}
    assert found["backends"]["torch"] == "works here"


def test_text_says_what_json_says(capsys, monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "torch")
    assert __main__.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.replace(" ", "_") for line in lines if not line.startswith(" ")] == PARTS
    assert f"  torch         {environment.report()['versions']['torch']}" in lines
    assert "  PEFT_KERNELS_BACKEND  torch" in lines


def test_versions_are_read_without_importing(tmp_path):
    code = (
        "import sys; from peft_kernels import environment; environment.report(); "
        "print(sorted({'peft', 'transformers', 'triton'} & sys.modules.keys()))"
    )
    ran = python("-c", code, cwd=tmp_path)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_a_broken_part_is_reported_not_raised(monkeypatch):
    def broken(*_):
        raise OSError("driver too old")

    monkeypatch.setattr(backend, "status", broken)
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    monkeypatch.setattr(environment.importlib.util, "find_spec", broken)
    monkeypatch.setattr(environment, "PACKAGES", ("peft_kernels", "no_such_package"))
    found = environment.report()
    assert found["backends"] == found["gpu"] == found["cuda_kernels"] == "failed: OSError: driver too old"
    assert found["versions"]["no_such_package"] is None
    assert "  no_such_package  not found" in environment.as_text(found).splitlines()


def test_a_gpu_is_described(monkeypatch):
    device = SimpleNamespace(name="H200", major=9, minor=0, total_memory=140 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    answer = SimpleNamespace(stdout="580.1, 345 MHz, 1980 MHz, 3201 MHz, 700.00 W\n")
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: answer)
    found = environment._gpu()
    assert found["0"] == "H200, compute capability 9.0, 140 GiB"
    assert (found["driver"], found["highest clock"], found["power limit"]) == ("580.1", "1980 MHz", "700.00 W")
    answer.stdout = "no devices were found\n"
    assert environment._gpu()["driver"] is None


def test_lists_print_as_words():
    text = environment.as_text({"cuda_kernels": {"architectures": ["sm_80", "sm_90a"], "kernels": []}})
    assert text.splitlines() == ["cuda kernels", "  architectures  sm_80, sm_90a", "  kernels        none"]


@pytest.mark.parametrize("arguments", [[], ["no-such-command"]])
def test_a_wrong_command_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        __main__.main(arguments)
    assert refused.value.code == 2
    assert "usage: python -m peft_kernels" in capsys.readouterr().err
