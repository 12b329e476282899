"""Batches that mix adapters: PEFT's numbers, in one call for each layer, whatever adapters it has."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from peft_lora_cases import EXACT, both, count_calls, ids, pair, peft, stir
from torch import nn

from peft_kernels.integrations.peft import accelerate, mixed_batches


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


MIX = {
    "a": {"lora_alpha": 7},
    "b": {"r": 5, "use_rslora": True, "lora_dropout": 0.5},
    "elsewhere": {"target_modules": ["y"]},
}


def mixing(**more):
    torch.manual_seed(0)
    model = nn.ModuleDict({"x": nn.Linear(6, 5), "y": nn.Linear(6, 5)}).double()
    for name, options in {**MIX, **more}.items():
        config = peft.LoraConfig(**{"target_modules": ["x"], "r": 3, **options})
        model = peft.PeftModel(model, config, name) if not isinstance(model, peft.PeftModel) else model
        if name not in model.peft_config:
            model.add_adapter(name, config)
    stir(model).eval()
    ours = copy.deepcopy(model)
    accelerate(ours)
    return model.base_model.model["x"], ours.base_model.model["x"]


NAMES = {
    "all": ["a", "__base__", "b", "elsewhere", "a"],
    "one": ["b"] * 5,
    "the inactive": ["b", "b", "__base__", "b", "__base__"],
}


@pytest.mark.parametrize("shape", [(5, 6), (5, 3, 6), (5, 2, 2, 6)])
@pytest.mark.parametrize("case", NAMES)
def test_mixed_batch(case, shape, calls):
    theirs, ours = mixing()
    x = torch.randn(shape, dtype=torch.float64)
    for layer in (theirs, ours):
        for p in layer.parameters():
            p.requires_grad_(True)
    theirs.given = ours.given = {"adapter_names": NAMES[case]}
    both(Given(theirs), Given(ours), x, **EXACT)
    assert calls == [0, 1]


class Given(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, **self.layer.given)


def test_mixed_batches_share_their_order(calls, monkeypatch):
    _, ours = mixing()
    sorted_ = []
    segments = mixed_batches.adapter_segments
    monkeypatch.setattr(mixed_batches, "adapter_segments", lambda *args: sorted_.append(1) or segments(*args))
    mixed_batches._cached.cache_clear()
    x = torch.randn(4, 6, dtype=torch.float64)
    with torch.inference_mode():
        expected = ours(x, adapter_names=["a", "b", "a", "b"])
    for _ in range(3):  # not with inference mode's tensors, which autograd could not save
        assert torch.equal(ours(x, adapter_names=["a", "b", "a", "b"]), expected)
    assert len(sorted_) == 2 and calls == [0, 4]
    assert not torch.equal(ours(x, adapter_names=["a", "a", "b", "b"]), expected) and len(sorted_) == 3
    ours(torch.randn(4, 2, 6, dtype=torch.float64), adapter_names=["a", "b", "a", "b"])
    assert len(sorted_) == 4


def test_mixed_batches_that_are_left_to_peft(calls):
    theirs, ours = mixing(bias={"lora_bias": True})
    x = torch.randn(3, 6, dtype=torch.float64)
    for names in (["__base__"] * 3, ["elsewhere"] * 3, ["a", "bias", "a"]):
        assert torch.equal(ours(x, adapter_names=names), theirs(x, adapter_names=names))
    assert ours(x[:0], adapter_names=[]).shape == (0, 5)
    ours.train(), theirs.train()
    results = []
    for layer in (theirs, ours):  # with dropout: PEFT's own masks
        torch.manual_seed(0)
        results.append(layer(x, adapter_names=["a", "b", "a"]))
    assert torch.equal(*results) and calls == [0, 0]
    results = []
    for layer in (theirs, ours):  # which no stack of factors can hold
        layer.eval().bfloat16().lora_A["b"].float(), layer.lora_B["b"].float()
        results.append(layer(x.bfloat16(), adapter_names=["a", "b", "a"]))
    assert torch.equal(*results) and calls == [0, 0]


@pytest.mark.parametrize("why", ["length", "merged", "dora"])
def test_mixed_batches_raise_as_in_peft(why):
    messages = []
    for layer in mixing(dora={"use_dora": True}):
        names = ["a", "dora" if why == "dora" else "b"]
        if why == "merged":
            layer.merge(adapter_names=["a"])
        with pytest.raises(ValueError) as error:
            layer(torch.randn(3 if why == "length" else 2, 6, dtype=torch.float64), adapter_names=names)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_mixed_batch_through_the_model(calls):
    theirs, ours = pair()
    for model in (theirs, ours):
        torch.manual_seed(2)
        model.add_adapter("other", peft.LoraConfig(target_modules=["second", "head"], r=2))
        stir(model)
    names = ["default", "other", "__base__"]
    expected, got = (model(ids(), adapter_names=names) for model in (theirs, ours))
    torch.testing.assert_close(got, expected, **EXACT)
    assert calls == [0, 2]  # `head` came later, and is PEFT's own until accelerate is called again
    accelerate(ours)
    torch.testing.assert_close(ours(ids(), adapter_names=names), expected, **EXACT)
    assert calls == [0, 5]


# ---- on a GPU: streams and captures, tried on a CPU -----------------------------------------------------------------


class Stream:
    def __init__(self, name, did):
        self.name, self.did = name, did

    def record_event(self):
        self.did.append(("records", self.name))
        return f"event of {self.name}"

    def wait_event(self, event):
        self.did.append((self.name, f"waits for {event}"))


@pytest.fixture
def gpu(monkeypatch):
    """What the host does, in order: on the stream that is current, captured or not."""
    did = []
    found = SimpleNamespace(did=did, capturing=False, stream=Stream("usual", did))
    segments, tensor = mixed_batches.adapter_segments, torch.tensor
    monkeypatch.setattr(mixed_batches, "_on_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: found.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: did.append(("kept for", stream.name)))
    monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: did.append("table") or tensor(*args, **kwargs))
    monkeypatch.setattr(mixed_batches, "adapter_segments", lambda *args: did.append("sorts") or segments(*args))
    mixed_batches._cached.cache_clear()
    yield found
    mixed_batches._cached.cache_clear()
    mixed_batches._captured.clear()


NAMED = ["a", "b", "__base__", "a"]


def test_a_mixed_batch_is_captured_after_a_call_on_another_stream(gpu):
    """The host makes no table, sorts nothing and waits for nothing: all of that is forbidden there."""
    theirs, ours = mixing()
    x = torch.randn(4, 6, dtype=torch.float64)
    side, capture = Stream("side", gpu.did), Stream("capture", gpu.did)
    gpu.stream = side
    ours(x, adapter_names=NAMED)
    assert gpu.did == ["table", "sorts", ("records", "side")]
    gpu.did.clear()
    gpu.stream, gpu.capturing = capture, True
    torch.testing.assert_close(ours(x, adapter_names=NAMED), theirs(x, adapter_names=NAMED), **EXACT)
    assert gpu.did == []
    with pytest.raises(RuntimeError, match=r"^adapter_names: .* after one call before the capture"):
        ours(x, adapter_names=["b", "a", "b", "a"])
    assert gpu.did == []


def test_other_streams_wait_for_the_one_that_sorted_and_keep_its_memory(gpu):
    theirs, ours = mixing()
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = theirs(x, adapter_names=NAMED)
    one, other = Stream("one", gpu.did), Stream("other", gpu.did)
    for gpu.stream in (one, other, other, one):
        torch.testing.assert_close(ours(x, adapter_names=NAMED), expected, **EXACT)
    waits = [("other", "waits for event of one"), *[("kept for", "other")] * 4]  # of four tensors
    assert gpu.did == ["table", "sorts", ("records", "one"), *waits]


@pytest.mark.parametrize("captured", [True, False])
def test_what_a_graph_reads_stays(captured, gpu):
    """Whatever other batches come after it; what no graph reads goes."""
    _, ours = mixing()
    x = torch.randn(4, 6, dtype=torch.float64)
    ours(x, adapter_names=NAMED)
    gpu.capturing = captured
    ours(x, adapter_names=NAMED)
    (order,) = (weakref.ref(t) for t in gc.get_objects() if type(t) is mixed_batches._Shared)
    gpu.capturing = False
    for index in range(mixed_batches._cached.cache_parameters()["maxsize"]):
        ours(x[:, None].expand(4, index + 2, 6), adapter_names=NAMED)
    gc.collect()
    assert (order() is not None) == captured
