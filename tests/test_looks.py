"""`looks`: the same for tensors that kernels' tables cannot tell apart, another one for all others."""

import ctypes

import pytest
import torch
from cuda_emulation import emulated_module
from torch.nn import Parameter

from peft_kernels import looks as module


@pytest.fixture(params=["compiled", "in Python"])
def looks(request, monkeypatch):
    """A function of tensors; where DLPack can show them, without the other's help."""
    if request.param == "in Python":
        monkeypatch.setattr(module, "_compiled", lambda: None)
        return module.looks
    if module._EXCHANGE is None:
        pytest.skip("this torch offers no exchange in C")
    compiled = emulated_module().looks
    monkeypatch.setattr(module, "_compiled", lambda: compiled)
    monkeypatch.setattr(module, "in_python", None)
    return module.looks


def made():
    memory = torch.arange(128.0)
    return [memory[:24].view(4, 6), memory[64:], Parameter(torch.ones(2, 3, 4)), torch.ones((), dtype=torch.bfloat16)]


def shifted(tensors):
    tensors[1] = torch.arange(65.0)[1:]


CHANGES = {
    "sizes": lambda tensors: tensors.__setitem__(0, tensors[0].view(6, 4)),
    "dimensions": lambda tensors: tensors.__setitem__(0, tensors[0].flatten()),
    "strides": lambda tensors: tensors.__setitem__(0, tensors[0].view(6, 4).t()),
    "dtype": lambda tensors: tensors.__setitem__(3, tensors[3].half()),
    "dtype in place": lambda tensors: tensors.__setitem__(1, tensors[1].view(torch.int32)),
    "alignment": shifted,
    "order": lambda tensors: tensors.reverse(),
    "a tensor less": lambda tensors: tensors.pop(),
}


@pytest.mark.parametrize("addresses", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_looks_different(change, addresses, looks):
    tensors = made()
    before = looks(tensors, addresses=addresses)
    assert looks(tensors, addresses=addresses) == before and hash(before) == hash(looks(tensors, addresses=addresses))
    CHANGES[change](tensors)
    assert looks(tensors, addresses=addresses) != before


def test_other_tensors_of_the_same_kind_differ_by_their_addresses_alone(looks):
    one, other = made(), made()
    assert looks(one) == looks(other) and looks(one, addresses=True) != looks(other, addresses=True)
    other = [t.data for t in one]
    assert looks(one, addresses=True) == looks(other, addresses=True)


@pytest.mark.parametrize("wrong", [3, None, "a tensor", torch.Tensor])
def test_what_is_no_tensor_is_refused(wrong):
    with pytest.raises(TypeError):
        module.looks([torch.ones(2), wrong])


def test_what_has_no_words_in_dlpack_is_looked_at_in_python():
    meta = [torch.ones(2, 3, device="meta")]
    assert module.looks(meta) == module.in_python(meta, False)


def test_another_version_of_the_exchange_is_not_called(monkeypatch):
    compiled = emulated_module().looks
    exchange = (ctypes.c_uint32 * 16)(2, 0)
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    monkeypatch.setattr(module, "_EXCHANGE", capsule(ctypes.addressof(exchange), b"dlpack_exchange_api", None))
    monkeypatch.setattr(module, "_compiled", lambda: compiled)
    tensors = made()
    with pytest.raises(RuntimeError, match="another version of DLPack"):
        compiled(tensors, module._EXCHANGE, False)
    assert module.looks(tensors) == module.in_python(tensors, False)
