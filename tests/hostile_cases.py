"""How broken files are refused: soon, by an error that names the file, with the model as it was."""

import time

import pytest
from adapter_cases import METHODS, assert_unchanged, snapshot

SLOW = 2.0  # seconds of CPU time; each of these takes milliseconds
NAME = "vilt.encoder.layer.1.attention.attention.key"


def refused(folder, model, error, match, load=None):
    """load: instead of from_pretrained of the method that the folder is named after"""
    load = load or METHODS[folder.name][0].from_pretrained
    before, start = snapshot(model), time.process_time()
    with pytest.raises(error, match=match):
        load(model, folder)
    assert time.process_time() - start < SLOW
    assert_unchanged(model, before)
