"""A process that trains MoIL and writes all that a training writes, for as long as it lives, and what it must leave.

Every number in the LoRAs that it saves and exports is the count of its steps, and odd counts have another configuration
than even ones: files of two saves cannot be taken for one.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from moil_cases import interrupt, resumed, train, training
from torch import nn

from peft_kernels.adapters import LoRA, LoRAConfig

SAVED, STOCK, STATE = "saved", "stock", "state.pt"
EVENTS = ("open", "os.mkdir", "os.chmod", "os.remove", "os.rename", "os.rmdir", "os.scandir")
KINDS = ({"targets": ["query"], "rank": 2, "alpha": 2}, {"targets": ["query", "value"], "rank": 3, "alpha": 3})


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # the training's own draws go on
            torch.manual_seed(0)
            self.query, self.value = nn.Linear(4, 4), nn.Linear(4, 4)


def lora(count: int) -> LoRA:
    with torch.random.fork_rng(devices=[]):
        adapter = LoRA.wrap(Model(), LoRAConfig(**KINDS[count % 2]))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(count)
    return adapter


def write(folder: Path, count: int) -> None:
    lora(count).save_pretrained(folder / SAVED)
    lora(count).export_lora(folder / STOCK)


def work(folder: Path, began) -> None:
    """Goes on from what is there. began: an event, set when it is to be killed from now on"""
    torch.use_deterministic_algorithms(True)
    moil, optimizer, batch = resumed(folder / STATE) if (folder / STATE).exists() else training()
    while True:
        train(moil, optimizer, batch, 1)
        began.set()
        interrupt(folder / STATE, moil, optimizer)
        write(folder, int(moil.steps))


def save_often(folder: Path, began, first: int) -> None:
    """Saves of one configuration."""
    began.wait()
    for count in range(first, first + 40, 2):
        write(folder, count)


def die_at(moment: int, folder: Path, began) -> None:
    """Writes the second step's files, killed before one thing that it does to the file system, if there are so many."""
    left = [moment]

    def watch(event: str, arguments: tuple) -> None:
        if event in EVENTS and str(folder) in str(arguments[0]):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    write(folder, 2)
