"""Files that are broken, or meant to break something: soon a clear error that names the file, the model untouched."""

import json
import pickle
import shutil

import pytest
import torch
from adapter_cases import METHODS, adapted
from adapter_models import build
from hostile_cases import NAME, refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_kernels.adapters import LoRA
from peft_kernels.adapters.checkpoint import CONFIG_FILE, WEIGHTS_FILE


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A good folder of each method."""
    folder = tmp_path_factory.mktemp("saved")
    for method in METHODS:
        adapted(method, "vilt_vqa")[0].save_pretrained(folder / method)
    return folder


@pytest.fixture(scope="module")
def model():
    return build("vilt_vqa")[0]


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(folder, change_tensors=None, change_config=None):
    """The folder's files with other tensors or entries, and a header that agrees with the configuration."""
    tensors, config = load_file(folder / WEIGHTS_FILE), json.loads((folder / CONFIG_FILE).read_text())
    tensors = change_tensors(tensors) if change_tensors else tensors
    config = change_config(config) if change_config else config
    text = json.dumps(config)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"adapter_config": text})
    (folder / CONFIG_FILE).write_text(text)


# ---- the weights' file ----------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def pickled(path):
    path.write_bytes(pickle.dumps({"a": torch.zeros(3)}))


def zip_of_torch(path):
    torch.save({"a": torch.zeros(3)}, path)


def empty(path):
    path.write_bytes(b"")


def endless_header(path):
    path.write_bytes((2**63 - 1).to_bytes(8, "little") + b"{}")


def overlapping(path):
    header = json.dumps({n: {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]} for n in "ab"}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)


def appended(path):
    path.write_bytes(path.read_bytes() + b"\0" * 64)


BROKEN = [cut, pickled, zip_of_torch, empty, endless_header, overlapping, appended]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("damage", BROKEN)
def test_not_a_whole_safetensors_file(method, damage, folder, model):
    damage(folder / method / WEIGHTS_FILE)
    match = rf"{WEIGHTS_FILE}: not a whole safetensors file"
    refused(folder / method, model, ValueError, match)
    if method == "lora":
        refused(folder / method, model, ValueError, match, LoRA.from_peft)


def with_value(name, value):
    def change(tensors):
        tensors[name].view(-1)[-1] = value
        return tensors

    return change


def of_dtype(dtype):
    return lambda tensors: {**tensors, f"{NAME}.up": tensors[f"{NAME}.up"].to(dtype)}


WRONG_TENSORS = [
    (lambda t: {n: v for n, v in t.items() if n != f"{NAME}.up"}, rf"{NAME}.up is missing$"),
    (lambda t: {**t, "other.up": torch.zeros(2)}, r"other.up is not expected$"),
    (lambda t: {"x": torch.zeros(2)}, r"is missing; .* and 14 more$"),
    (lambda t: {}, r"is missing; .* and 13 more$"),
    (lambda t: {**t, f"{NAME}.up": torch.zeros(16, 4)}, rf"{NAME}.up has shape \(16, 4\), expected \(16, 3\)$"),
    (lambda t: {**t, f"{NAME}.up": torch.zeros(48)}, rf"{NAME}.up has shape \(48,\), expected \(16, 3\)$"),
    (lambda t: {**t, f"{NAME}.up": torch.zeros(0, 3)}, rf"{NAME}.up has shape \(0, 3\)"),
    (of_dtype(torch.int32), rf"{NAME}.up has dtype torch.int32, expected torch.float32$"),
    (of_dtype(torch.bool), rf"{NAME}.up has dtype torch.bool, expected torch.float32$"),
    (of_dtype(torch.float8_e4m3fn), rf"{NAME}.up has dtype F8_E4M3, expected torch.float32$"),
    (lambda t: {**t, "classifier.0.bias": torch.zeros(33)}, r"classifier.0.bias has shape \(33,\), expected \(32,\)$"),
    (with_value(f"{NAME}.up", float("nan")), rf"{NAME}.up holds values that are not finite$"),
    (with_value(f"{NAME}.down", float("-inf")), rf"{NAME}.down holds values that are not finite$"),
    (with_value("classifier.0.bias", float("nan")), r"classifier.0.bias holds values that are not finite$"),
]


@pytest.mark.parametrize(("change", "match"), WRONG_TENSORS)
def test_wrong_tensors(change, match, folder, model):
    rewrite(folder / "lora", change_tensors=change)
    refused(folder / "lora", model, ValueError, rf"{WEIGHTS_FILE}: .*{match}")


@pytest.mark.parametrize("method", METHODS)
def test_one_tensor_missing_or_broken_in_every_method(method, folder, model):
    with safe_open(folder / method / WEIGHTS_FILE, "pt") as file:
        name = sorted(file.keys())[-1]
    rewrite(folder / method, change_tensors=with_value(name, float("nan")))
    refused(folder / method, model, ValueError, rf"{WEIGHTS_FILE}: {name} holds values that are not finite")
    rewrite(folder / method, change_tensors=lambda t: {n: v for n, v in t.items() if n != name})
    refused(folder / method, model, ValueError, rf"{WEIGHTS_FILE}: {name} is missing")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_widths_of_floats_are_fine(dtype, folder):
    rewrite(folder / "lora", change_tensors=lambda t: {n: v.to(dtype) for n, v in t.items()})
    adapter = LoRA.from_pretrained(build("vilt_vqa")[0], folder / "lora")
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


# ---- the configuration ----------------------------------------------------------------------------------------------

TEXTS = [
    ("", "not JSON"),
    ("{", "not JSON"),
    ("[1, 2]", "expected a JSON object, got list"),
    ("null", "expected a JSON object, got NoneType"),
    ('{"rank": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON"),
    ('{"rank": ' + "9" * 100_000 + "}", "not JSON"),
    ('{"method": "lora", "rank": 3}', "is not the configuration that .* was saved with"),
    (b"\xff\xfe\x00", "cannot be read"),
]


@pytest.mark.parametrize(("text", "match"), TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("place", ["file", "header"])
def test_broken_configurations(text, match, place, folder, model):
    path, name = folder / "lora" / CONFIG_FILE, CONFIG_FILE
    if place == "file":
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    elif not isinstance(text, bytes) and text and "saved with" not in match:
        save_file(load_file(path.parent / WEIGHTS_FILE), path.parent / WEIGHTS_FILE, {"adapter_config": text})
        path.unlink()
        name = WEIGHTS_FILE
    else:
        return
    refused(path.parent, model, ValueError, rf"{name}: {match}")


ENTRIES = [
    ("lora", "rank", 10**9, ValueError, "rank: expected 1 to 65,536, got 1,000,000,000"),
    ("lora", "rank", 10**400, ValueError, "rank: expected 1 to"),
    ("lora", "rank", 0, ValueError, "rank: expected 1 to"),
    ("lora", "rank", -3, ValueError, "rank: expected 1 to"),
    ("lora", "rank", 3.0, TypeError, "rank: expected an integer, got 3.0"),
    ("lora", "rank", True, TypeError, "rank: expected an integer"),
    ("lora", "rank", None, TypeError, "rank: expected an integer"),
    ("lora", "rank", float("nan"), TypeError, "rank: expected an integer"),
    ("lora", "alpha", float("nan"), ValueError, "alpha: expected a (finite )?number"),
    ("lora", "alpha", float("inf"), ValueError, "alpha: expected a (finite )?number"),
    ("lora", "alpha", 10**400, ValueError, "alpha: expected a (finite )?number"),
    ("lora", "alpha", 1e300, ValueError, "alpha: expected a (finite )?number"),
    ("lora", "alpha", "8", TypeError, "alpha: expected a number"),
    ("lora", "dropout", 1.0, ValueError, "dropout: expected a probability"),
    ("lora", "dropout", -0.1, ValueError, "dropout: expected a probability"),
    ("lora", "rslora", 1, TypeError, "rslora: expected True or False"),
    ("lora", "init", "zeros", ValueError, "init: expected one of"),
    ("lora", "init", ["kaiming"], ValueError, "init: expected one of"),
    ("lora", "rank_pattern", [4], TypeError, "rank_pattern: expected a dictionary"),
    ("lora", "rank_pattern", {NAME: 10**9}, ValueError, "rank_pattern.*: expected 1 to"),
    ("lora", "rank_pattern", {"keyy": 2}, ValueError, "'keyy' gets no adapter; nearest: vilt"),
    ("lora", "scale_pattern", {NAME: "big"}, TypeError, "scale_pattern.*: expected a number"),
    ("lora", "preset", "blip", ValueError, "preset: 'blip' matches no linear layer"),
    ("lora", "preset", {}, ValueError, "preset: expected one of"),
    ("lora", "targets", {"a": 1}, TypeError, "targets: expected names"),
    ("lora", "targets", ["nothing"], ValueError, "targets: 'nothing' matches no module"),
    ("lora", "targets", [{"pattern": "x", "evil": 1}], ValueError, "targets: expected some of pattern"),
    ("lora", "targets", "(", ValueError, "targets: .* is not a regular expression"),
    ("lora", "modules_to_save", "classifier", TypeError, "modules_to_save: expected names"),
    ("lora", "modules_to_save", ["nothing"], ValueError, "modules_to_save: 'nothing' holds no parameter"),
    ("lora", "adapter_dtype", "complex64", ValueError, "adapter_dtype: expected one of"),
    ("lora", "unknown", 1, ValueError, "LoRAConfig: expected some of .*, got 'unknown'"),
    ("lora", "method", "moil", ValueError, "expected an adapter of method 'lora', got of method 'moil'"),
    ("lora", "method", None, ValueError, "expected an adapter of method 'lora'"),
    ("lora", "fingerprint", [], ValueError, "expected a fingerprint of the base"),
    ("lora", "fingerprint", {NAME: [1.0]}, ValueError, "expected a fingerprint of the base"),
    ("lora", "fingerprint", {}, ValueError, "fingerprint knows no vilt"),
    ("moil", "rank", 10**9, ValueError, "rank: expected 1 to"),
    ("moil", "transform_rank", 10**9, ValueError, "transform_rank: expected 1 to"),
    ("moil", "interval", -1, ValueError, "interval: expected 1 to"),
    ("moil", "decay", float("nan"), ValueError, "decay: expected a (finite )?number"),
    ("moil", "decay", 1.5, ValueError, "decay: expected a (finite )?number"),
    ("moil", "teacher", "nobody", ValueError, "teacher: expected one of"),
    ("moil", "approximation", 7, ValueError, "approximation: expected one of"),
    ("aurora", "rank", 10**9, ValueError, "rank: expected 1 to"),
    ("aurora", "core", "svd", ValueError, "core: expected one of"),
    ("aurora", "sharing", "all", ValueError, "sharing: expected one of"),
    ("aurora", "scale", -(10**400), ValueError, "scale: expected a (finite )?number"),
    ("aurora", "gates", "additive", ValueError, "gates: expected a preset that knows the layers"),
    ("uniadapter", "rank", 10**9, ValueError, "rank: expected 1 to"),
    ("uniadapter", "scale", float("inf"), ValueError, "scale: expected a (finite )?number"),
    ("full", "preset", "vilt", ValueError, "preset: full tuning has no adapters"),
    ("full", "rank", 3, ValueError, "FullTuningConfig: expected some of"),
]


@pytest.mark.parametrize(("method", "key", "value", "error", "match"), ENTRIES, ids=range(len(ENTRIES)))
def test_wrong_entries(method, key, value, error, match, folder, model):
    if isinstance(value, int) and abs(value) > 10**300:
        monstrous, value = str(value), "MONSTROUS"
    rewrite(folder / method, change_config=lambda config: {**config, key: value})
    if value == "MONSTROUS":
        tensors, text = load_file(folder / method / WEIGHTS_FILE), (folder / method / CONFIG_FILE).read_text()
        text = text.replace('"MONSTROUS"', monstrous)
        save_file(tensors, folder / method / WEIGHTS_FILE, metadata={"adapter_config": text})
        (folder / method / CONFIG_FILE).write_text(text)
    refused(folder / method, model, error, rf"{CONFIG_FILE}: .*{match}")


@pytest.mark.parametrize("method", ["lora", "moil", "aurora", "uniadapter"])
def test_a_rank_that_only_the_configuration_has_is_never_allocated(method, folder, model):
    """65,536 is allowed. At this rank Aurora's tucker core would take 1 PB."""
    more = {"core": "tucker", "rank": 65_536} if method == "aurora" else {"rank": 65_536}
    rewrite(folder / method, change_config=lambda config: {**config, **more})
    refused(folder / method, model, ValueError, rf"{WEIGHTS_FILE}: .*(expected \([\d, ]*65536|is missing)")


@pytest.mark.parametrize("value", ["x", [1.0], {}, None, float("inf")])
def test_the_fingerprints_numbers(value, folder, model):
    changed = lambda config: {**config, "fingerprint": {**config["fingerprint"], NAME: [value] * 8}}  # noqa: E731
    rewrite(folder / "lora", change_config=changed)
    refused(folder / "lora", model, ValueError, rf"{CONFIG_FILE}( was trained on|: expected numbers .* of {NAME})")
    LoRA.from_pretrained(build("vilt_vqa")[0], folder / "lora", check_base=False)


def test_a_value_that_is_finite_only_in_the_file(folder, model):
    change = lambda t: {**t, f"{NAME}.up": torch.full((16, 3), 1e300, dtype=torch.float64)}  # noqa: E731
    rewrite(folder / "lora", change_tensors=change)
    refused(folder / "lora", model, ValueError, rf"{WEIGHTS_FILE}: {NAME}.up holds values that are not finite")


# ---- files and folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_missing_files(method, folder, model, tmp_path):
    load, path = METHODS[method][0].from_pretrained, folder / method
    refused(tmp_path / "nowhere", model, FileNotFoundError, rf"nowhere.{WEIGHTS_FILE}: no such file", load)
    refused(path / CONFIG_FILE, model, FileNotFoundError, "no such file", load)
    (path / WEIGHTS_FILE).unlink()
    refused(path, model, FileNotFoundError, rf"{WEIGHTS_FILE}: no such file")


def test_no_configuration_at_all(folder, model):
    save_file(load_file(folder / "lora" / WEIGHTS_FILE), folder / "lora" / WEIGHTS_FILE)
    (folder / "lora" / CONFIG_FILE).unlink()
    refused(folder / "lora", model, FileNotFoundError, rf"{CONFIG_FILE}: no such file")


def test_the_other_kind_of_checkpoint(folder, model, tmp_path):
    adapted("lora", "vilt_vqa")[0].export_lora(tmp_path / "lora")
    refused(tmp_path / "lora", model, ValueError, r"got a PEFT checkpoint \(LoRA.from_peft reads it\)")
    match = rf"{CONFIG_FILE}: expected peft_type 'LORA', got None"
    refused(folder / "lora", model, ValueError, match, LoRA.from_peft)
