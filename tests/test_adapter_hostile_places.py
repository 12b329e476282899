"""Whatever may stand in a file's place, for our own adapters and for stock ones: an error that names the file."""

import os
import pickle
import shutil

import pytest
from adapter_cases import adapted
from adapter_models import build
from hostile_cases import NAME, refused
from safetensors.torch import load_file, save_file

from peft_kernels.adapters import LoRA
from peft_kernels.adapters.checkpoint import CONFIG_FILE, WEIGHTS_FILE


@pytest.fixture(scope="module")
def model():
    return build("vilt_vqa")[0]


def header_of(change):
    """The weights' file with another header before the same bytes."""

    def damage(path):
        whole = path.read_bytes()
        size = int.from_bytes(whole[:8], "little")
        header = change(whole[8 : 8 + size].decode()).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + size :])

    return damage


def cut_at(place):
    def damage(path):
        whole = path.read_bytes()
        path.write_bytes(whole[: place(8 + int.from_bytes(whole[:8], "little"))])

    return damage


def length(change):
    def damage(path):
        whole = path.read_bytes()
        path.write_bytes(change(int.from_bytes(whole[:8], "little")).to_bytes(8, "little") + whole[8:])

    return damage


def instead(make):
    def damage(path):
        path.unlink()
        make(path)

    return damage


def text(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


NO_FILE, NOT_WHOLE = "expected a file, got a folder, a broken link", "not a whole safetensors file"
PLACES = {
    "a folder": (instead(lambda path: path.mkdir()), NO_FILE),
    "a link to a folder": (instead(lambda path: path.symlink_to(path.parent)), NO_FILE),
    "a link to nothing": (instead(lambda path: path.symlink_to("nowhere")), NO_FILE),
    "a link to itself": (instead(lambda path: path.symlink_to(path.name)), NO_FILE),
    "a FIFO": (instead(os.mkfifo), NO_FILE),
    "a device": (instead(lambda path: path.symlink_to("/dev/zero")), NO_FILE),
}
WEIGHTS = {
    "nothing": (cut_at(lambda data: 0), NOT_WHOLE),
    "7 bytes": (cut_at(lambda data: 7), NOT_WHOLE),
    "a length alone": (cut_at(lambda data: 8), NOT_WHOLE),
    "half a header": (cut_at(lambda data: data // 2), NOT_WHOLE),
    "a header alone": (cut_at(lambda data: data), NOT_WHOLE),
    "a byte of data": (cut_at(lambda data: data + 1), NOT_WHOLE),
    "a byte short": (cut_at(lambda data: -1), NOT_WHOLE),
    "no length": (length(lambda size: 0), NOT_WHOLE),
    "a length of one less": (length(lambda size: size - 1), NOT_WHOLE),
    "a length of one more": (length(lambda size: size + 1), NOT_WHOLE),
    "a length of 4 GB": (length(lambda size: 2**32), NOT_WHOLE),
    "the largest length": (length(lambda size: 2**64 - 1), NOT_WHOLE),
    "a header that is a list": (header_of(lambda header: "[]"), NOT_WHOLE),
    "a header of nothing": (header_of(lambda header: "{}"), NOT_WHOLE),
    "a deep header": (header_of(lambda header: '{"a":' * 100_000), NOT_WHOLE),
    "negative shapes": (header_of(lambda header: header.replace('"shape":[', '"shape":[-')), NOT_WHOLE),
    "shapes that overflow": (header_of(lambda h: h.replace('"shape":[', f'"shape":[{2**62},{2**62},')), NOT_WHOLE),
    "an unknown dtype": (header_of(lambda header: header.replace('"F32"', '"F31"')), NOT_WHOLE),
    "wider than its bytes": (header_of(lambda header: header.replace('"F32"', '"F64"')), NOT_WHOLE),
    "numbers as metadata": (header_of(lambda header: '{"__metadata__":{"a":1},' + header[1:]), NOT_WHOLE),
}
CONFIGS = {
    "nothing": (text(lambda own: b""), "not JSON"),
    "half of it": (text(lambda own: own[: len(own) // 2]), "not JSON"),
    "zeros": (text(lambda own: b"\0" * len(own)), "not JSON"),
    "a byte order mark": (text(lambda own: b"\xef\xbb\xbf" + own), "not JSON"),
    "UTF-16": (text(lambda own: own.decode().encode("utf-16")), "cannot be read"),
    "Latin-1": (text(lambda own: b'{"name": "\xe9"}'), "cannot be read"),
    "a key twice": (
        text(lambda own: b'{"peft_type": "IA3",' + own.lstrip()[1:-2] + b', "rank": 1, "rank": 2}'),
        "twice",
    ),
    "17 levels": (text(lambda own: b'{"a": ' + b"[" * 17 + b"]" * 17 + b"}"), "expected at most 16 lists"),
    "900 levels": (text(lambda own: b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}"), "expected at most 16 lists|not JSON"),
    "a string": (text(lambda own: b'"rank"'), "expected a JSON object, got str"),
    "a pickle": (text(lambda own: pickle.dumps({"rank": 3})), "cannot be read|not JSON"),
    "two objects": (text(lambda own: own + own), "not JSON"),
    "unreadable": (instead(lambda path: path.symlink_to("/proc/self/mem")), "cannot be read"),
}
HOSTILE = [(WEIGHTS_FILE, name, *row) for name, row in (PLACES | WEIGHTS).items()]
HOSTILE += [(CONFIG_FILE, name, *row) for name, row in (PLACES | CONFIGS).items()]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A good folder of each kind."""
    folder = tmp_path_factory.mktemp("both")
    adapter = adapted("lora", "vilt_vqa")[0]
    adapter.save_pretrained(folder / "own")
    adapter.export_lora(folder / "stock")
    return folder


@pytest.mark.parametrize(("file", "name", "damage", "match"), HOSTILE, ids=[f"{row[1]}-{row[0]}" for row in HOSTILE])
@pytest.mark.parametrize("kind", ["own", "stock"])
def test_hostile_files(kind, file, name, damage, match, both, model, tmp_path):
    if name == "unreadable" and not os.path.exists("/proc/self/mem"):
        pytest.skip("no file here that even root cannot read")
    folder = shutil.copytree(both / kind, tmp_path / kind)
    damage(folder / file)
    load = {"own": LoRA.from_pretrained, "stock": LoRA.from_peft}[kind]
    refused(folder, model, ValueError, rf"{file}: .*({match})", load)


@pytest.mark.parametrize("name", ["x" * 300, "nul\0", "../nowhere", "ünicode", "line\nbreak", "lone\udc80surrogate"])
@pytest.mark.parametrize("load", [LoRA.from_pretrained, LoRA.from_peft])
def test_names_of_folders(load, name, model, tmp_path):
    refused(tmp_path / name, model, (FileNotFoundError, ValueError), WEIGHTS_FILE, load)


def test_one_tensor_under_two_names(both, model, tmp_path):
    folder = shutil.copytree(both / "stock", tmp_path / "stock")
    tensors = load_file(folder / WEIGHTS_FILE)
    name = f"base_model.model.{NAME}.lora_A.weight"
    save_file({**tensors, f"{NAME}.lora_A.weight": tensors[name].clone()}, folder / WEIGHTS_FILE)
    refused(
        folder, model, ValueError, rf"{CONFIG_FILE}: {WEIGHTS_FILE} holds .*{NAME}.lora_A.weight twice", LoRA.from_peft
    )
