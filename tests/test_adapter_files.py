"""Adapters on disk: the same output comes back, in another process and dtype; the right base; nothing half-written."""

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from adapter_cases import MERGING, METHODS, adapted, assert_unchanged, snapshot, stir, wrap
from adapter_models import MODELS, build, output
from safetensors import safe_open
from torch import nn

from peft_kernels.adapters import LoRA, checkpoint
from peft_kernels.adapters.checkpoint import CONFIG_FILE, WEIGHTS_FILE

HERE = Path(__file__).parent
ALL = [(method, kind) for method in MERGING for kind in MODELS]
ALL += [("uniadapter", kind) for kind in ("blip_vqa", "blip_retrieval", "vilt_vqa")] + [("full", "blip_vqa")]


def load(method: str, kind: str, folder, dtype=torch.float32, **options):
    return METHODS[method][0].from_pretrained(build(kind, dtype)[0], folder, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("method", "kind"), ALL)
def test_what_is_saved_comes_back(method, kind, tmp_path):
    adapter, batch = adapted(method, kind)
    adapter.model.eval()
    adapter.save_pretrained(str(tmp_path / "new" / "folder"))
    other = load(method, kind, tmp_path / "new" / "folder")
    assert torch.equal(output(other.model, batch), output(adapter.model, batch))
    assert other.config == adapter.config and other.heads == adapter.heads
    assert [n for n, p in other.model.named_parameters() if p.requires_grad] == [n for n, _ in other.named_parameters()]
    with safe_open(tmp_path / "new" / "folder" / WEIGHTS_FILE, "pt") as file:
        names = set(file.keys())
    assert names <= set(adapter.state_dict())
    assert names >= {name for name, _ in (*adapter.named_parameters("adapter"), *adapter.named_parameters("head"))}
    assert not any(word in name for name in names for word in ("live_", "teacher_", "moil.steps"))
    written = files(tmp_path / "new" / "folder")
    assert set(written) == {CONFIG_FILE, WEIGHTS_FILE}
    text = written[CONFIG_FILE].decode()  # for people, too
    assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"


WIDTHS = {"vilt_vqa": {}, "blip_retrieval": {"vision": 24}}  # that of pictures is another than that of text


def test_in_a_new_process(tmp_path):
    gated = {"preset": "blip-retrieval", "core": "tucker", "layout": "released", "gates": "additive"}
    cases = [*((method, "vilt_vqa", {}) for method in METHODS), ("aurora", "blip_retrieval", gated)]
    for method, kind, options in cases:
        model, batch = build(kind, **WIDTHS[kind])
        adapter = wrap(method, model, kind, **options)
        stir(adapter)
        adapter.save_pretrained(tmp_path / kind / method)
        torch.save(output(model.eval(), batch).detach(), tmp_path / kind / method / "output.pt")
    code = """
import sys, torch
from pathlib import Path
from adapter_cases import METHODS
from adapter_models import build, output
from test_adapter_files import WIDTHS
for saved in Path(sys.argv[1]).glob("*/*/output.pt"):
    *_, kind, method, _ = saved.parts
    model, batch = build(kind, **WIDTHS[kind])
    METHODS[method][0].from_pretrained(model, saved.parent)
    assert torch.equal(output(model, batch), torch.load(saved)), (kind, method)
    print("same")
"""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    ran = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
    assert ran.stdout == "same\n" * len(cases), ran.stderr


def test_heads_buffers_and_their_integers_come_back(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False))

    adapter = wrap("lora", make(), targets=["0"], modules_to_save=["1", "2", "3"])
    for _ in range(3):
        adapter.model.train()(torch.randn(5, 4))
    adapter.save_pretrained(tmp_path)
    other = LoRA.from_pretrained(make(), tmp_path)
    assert other.model[2].num_batches_tracked == other.model[3].num_batches_tracked == 3
    x = torch.randn(5, 4)
    assert torch.equal(other.model.eval()(x), adapter.model.eval()(x))


def test_saved_while_merged_it_is_the_same(tmp_path):
    for method in MERGING:
        adapter, _ = adapted(method, "vilt_vqa")
        adapter.save_pretrained(tmp_path)
        before = files(tmp_path)
        adapter.merge()
        adapter.save_pretrained(tmp_path)
        assert files(tmp_path) == before


def test_the_backend_is_not_saved(tmp_path):
    adapter, _ = adapted("lora", "vilt_vqa", backend="torch")
    adapter.save_pretrained(tmp_path)
    assert "backend" not in json.loads((tmp_path / CONFIG_FILE).read_text())
    assert load("lora", "vilt_vqa", tmp_path).config.backend == "auto"
    assert load("lora", "vilt_vqa", tmp_path, backend="torch").config == adapter.config


# ---- the base -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", MERGING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("adapter_dtype", [None, "float32"])
def test_another_dtype_of_the_base(method, dtype, adapter_dtype, tmp_path):
    """A float32 base comes back in another dtype, and one of half precision in float32; both are the same base."""
    adapter, batch = adapted(method, "vilt_vqa", adapter_dtype=adapter_dtype)
    adapter.save_pretrained(tmp_path / "from32")
    if dtype == torch.float64 and adapter_dtype and method != "moil":
        with pytest.raises(TypeError, match=r"adapter_config.json: adapter_dtype: expected float32, under half"):
            load(method, "vilt_vqa", tmp_path / "from32", dtype)
        return
    other = load(method, "vilt_vqa", tmp_path / "from32", dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in other.parameters("adapter")} == {wide}
    same = output(other.model, build("vilt_vqa", dtype)[1]).float()
    torch.testing.assert_close(same, output(adapter.model, batch), rtol=0.1, atol=0.1)
    other.save_pretrained(tmp_path / "back")
    load(method, "vilt_vqa", tmp_path / "back", torch.float32 if dtype != torch.float64 else dtype)


@pytest.mark.parametrize("method", MERGING)
def test_another_base_is_refused(method, tmp_path):
    adapter, batch = adapted(method, "vilt_vqa", modules_to_save=[])
    adapter.save_pretrained(tmp_path)
    cls = METHODS[method][0]
    for change in (lambda w: torch.randn_like(w), lambda w: w * 1.001, lambda w: w + 1e-3):
        model, _ = build("vilt_vqa")
        with torch.no_grad():
            weight = model.vilt.encoder.layer[1].attention.attention.key.weight
            weight.copy_(change(weight))
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"^model: is not the base that .* 1 of 6 weights differ, vilt.*1.*key"):
            cls.from_pretrained(model, tmp_path)
        assert_unchanged(model, before)
        cls.from_pretrained(model, tmp_path, check_base=False)
        assert not torch.equal(output(model, batch), output(adapter.model, batch))
    with pytest.raises(ValueError, match=r"^model: is not the base"):
        cls.from_pretrained(build("vilt_vqa", seed=7)[0], tmp_path)


# ---- written whole --------------------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path):
    """An adapter's folder, its bytes, and the adapter with new values."""
    adapter, _ = adapted("lora", "vilt_vqa")
    adapter.save_pretrained(tmp_path)
    before = files(tmp_path)
    stir(adapter, seed=5)
    return adapter, tmp_path, before


@pytest.mark.parametrize("crash", [OSError("disk full"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("place", ["safetensors", "fsync", "rename"])
def test_a_crash_while_writing_leaves_the_old_files(old, place, crash, monkeypatch):
    adapter, folder, before = old

    def fail(*args, **kwargs):
        if place == "safetensors":
            Path(args[1]).write_bytes(b"half of it")
        raise crash

    target = {"safetensors": (checkpoint, "save_file"), "fsync": (os, "fsync"), "rename": (Path, "replace")}[place]
    monkeypatch.setattr(*target, fail)
    with pytest.raises(type(crash)):
        adapter.save_pretrained(folder)
    monkeypatch.undo()
    assert files(folder) == before  # no temporary file either
    load("lora", "vilt_vqa", folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("action", ["save_pretrained", "export_lora"])
def test_broken_values_do_not_replace_good_ones(old, value, action):
    adapter, folder, _ = old
    folder = folder / action
    getattr(adapter, action)(folder)
    before = files(folder)
    with torch.no_grad():
        next(adapter.parameters("adapter"))[0, 0] = value
    with pytest.raises(ValueError, match=rf"{WEIGHTS_FILE}: not written, since .*query.* not finite"):
        getattr(adapter, action)(folder)
    assert files(folder) == before


def test_an_export_does_not_replace_what_was_saved(old):
    adapter, folder, before = old
    with pytest.raises(ValueError, match=r"^export_lora: .* holds an adapter that save_pretrained wrote; take another"):
        adapter.export_lora(folder)
    assert files(folder) == before
    adapter.export_lora(folder / "stock")
    adapter.export_lora(folder / "stock")  # an earlier export may go


def test_permissions_follow_the_umask(tmp_path):
    adapter, _ = adapted("lora", "vilt_vqa")
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        earlier = os.umask(mask)
        try:
            adapter.save_pretrained(tmp_path / str(mask))
        finally:
            os.umask(earlier)
        for path in (tmp_path / str(mask)).iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == mode


def test_many_writers_at_once(tmp_path):
    adapters = [adapted("lora", "vilt_vqa")[0] for _ in range(4)]
    for seed, adapter in enumerate(adapters):
        stir(adapter, seed)
    threads = [threading.Thread(target=adapter.save_pretrained, args=(tmp_path,)) for adapter in adapters * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(files(tmp_path)) == {CONFIG_FILE, WEIGHTS_FILE}
    loaded = load("lora", "vilt_vqa", tmp_path).state_dict()
    assert any(all(torch.equal(loaded[n], t) for n, t in adapter.state_dict().items()) for adapter in adapters)


def test_views_and_tied_tensors_are_written_whole(tmp_path):
    rows = torch.randn(6, 4)
    tensors = {"whole": rows, "same": rows, "part": rows[2:4], "turned": rows.t(), "empty": rows[:0]}
    checkpoint.save_tensors(tmp_path / "x.safetensors", tensors, {})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    assert (tmp_path / "x.safetensors").stat().st_size < 4 * (24 * 3 + 8) + 1000


def test_a_readable_copy_of_the_configuration(tmp_path):
    adapter, _ = adapted("lora", "vilt_vqa")
    adapter.save_pretrained(tmp_path)
    written = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert written["method"] == "lora" and written["preset"] == "vilt" and written["rank"] == 3
    assert set(written["fingerprint"]) == set(adapter.layers)
    (tmp_path / CONFIG_FILE).unlink()  # the weights' header has it too
    assert load("lora", "vilt_vqa", tmp_path).config == adapter.config


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("made", ["wrapped", "loaded"])
def test_made_in_inference_mode_every_method_can_train(method, made, tmp_path):
    """Inference tensors stay what they are: a parameter among them fails at the first training step."""
    adapted(method, "vilt_vqa")[0].save_pretrained(tmp_path)
    model, _ = build("vilt_vqa")
    with torch.inference_mode():
        if made == "wrapped":
            adapter = wrap(method, model, "vilt_vqa")
        else:
            adapter = METHODS[method][0].from_pretrained(model, tmp_path)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert [name for name, tensor in tensors.items() if tensor.is_inference()] == []
    assert all(parameter.requires_grad for parameter in adapter.parameters())
