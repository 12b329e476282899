"""What processes leave that are killed while they save, export and train, or that write at once: it is whole.

`make kills` does it at 200 random moments; CI at each thing that a save does to the file system, and at a few moments.
"""

import json
import multiprocessing
import os
import random
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from crash_cases import KINDS, SAVED, STATE, STOCK, Model, die_at, lora, save_often, work, write
from moil_cases import train, training
from safetensors import safe_open

from peft_kernels.adapters import LoRA, checkpoint, writing
from peft_kernels.adapters.checkpoint import CONFIG_FILE, WEIGHTS_FILE

peft = pytest.importorskip("peft")
FILES = (CONFIG_FILE, WEIGHTS_FILE)


@pytest.fixture(scope="module")
def processes():
    """Forks, which begin at once, with all that is slow the first time done; autograd cannot be forked with a GPU."""
    context = multiprocessing.get_context("forkserver" if torch.cuda.is_available() else "fork")
    train(*training(), 2)
    return context


def one_count(adapter: LoRA) -> int:
    """The number that every number in it is; its configuration is that number's, too."""
    (value,) = {number for p in adapter.parameters() for number in p.flatten().tolist()}
    kind = KINDS[int(value) % 2]
    assert {name.rpartition(".")[2] for name in adapter.layers} == set(kind["targets"])
    assert all(layer.rank == kind["rank"] for layer in adapter.layers.values())
    return int(value)


def saved(folder: Path) -> int:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*was written by another save")
        return one_count(LoRA.from_pretrained(Model(), folder / SAVED))


def exported(folder: Path) -> int | None:
    """None: between the two renames of another configuration, which nothing loads."""
    if not (folder / STOCK / CONFIG_FILE).exists():
        with pytest.raises(ValueError, match=CONFIG_FILE):
            peft.PeftModel.from_pretrained(Model(), folder / STOCK)
        return None
    count = one_count(LoRA.from_peft(Model(), folder / STOCK))
    model = peft.PeftModel.from_pretrained(Model(), folder / STOCK)
    factors = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    assert len(factors) == 2 * len(KINDS[count % 2]["targets"])
    assert all((p == count).all() for p in factors.values())
    return count


def unfinished(folder: Path) -> set[Path]:
    return {path for name in (SAVED, STOCK) for path in (folder / name).iterdir() if path.name not in FILES}


class Uninterrupted:
    """The states of the same training, in one process."""

    def __init__(self):
        self._training, self._random = training(), torch.get_rng_state()
        self.states = [self._training[0].state_dict()]

    def __getitem__(self, steps: int) -> dict:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random)
            while len(self.states) <= steps:
                train(*self._training, 1)
                self.states.append({name: t.clone() for name, t in self._training[0].state_dict().items()})
            self._random = torch.get_rng_state()
        return self.states[steps]


def check(folder: Path, uninterrupted: Uninterrupted, earlier: tuple[int, int]) -> tuple[int, int]:
    """What a process that died left is whole and no older than before: the counts of what is saved and exported."""
    steps = 0
    if (folder / STATE).exists():
        state = torch.load(folder / STATE)["moil"]
        steps = int(state["moil.steps"])
        whole = uninterrupted[steps]
        assert state.keys() == whole.keys() and all(torch.equal(state[name], whole[name]) for name in whole)
    counts = saved(folder), exported(folder)
    assert all(count is None or then <= count <= steps for then, count in zip(earlier, counts))
    return tuple(then if count is None else count for then, count in zip(earlier, counts))


def killed(processes, target, *arguments, after: float | None = None) -> bool:
    """Whether it was killed, and did not end by itself. after: seconds from when it has begun; None: by itself"""
    began = processes.Event()
    process = processes.Process(target=target, args=(*arguments, began))
    process.start()
    if after is not None:
        assert began.wait(60)
        time.sleep(after)
        process.kill()
    process.join(60)
    assert process.exitcode in (0, -9)
    return process.exitcode == -9


def test_killed_before_each_thing_that_it_does_to_the_file_system(processes, tmp_path):
    write(tmp_path / "old", 1)
    found = []
    for moment in range(100):
        folder = Path(shutil.copytree(tmp_path / "old", tmp_path / str(moment)))
        if not killed(processes, die_at, moment, folder):
            break
        found.append((saved(folder), exported(folder)))
        write(folder, 3)
        assert (saved(folder), exported(folder)) == (3, 3)
        assert not unfinished(folder)
    assert (saved(folder), exported(folder)) == (2, 2) and not unfinished(folder)
    assert list(dict.fromkeys(found)) == [(1, 1), (2, 1), (2, None), (2, 2)]


@pytest.mark.timeout(0)
@pytest.mark.parametrize("moments", [3, pytest.param(200, marks=pytest.mark.sweep)])
def test_killed_at_random_moments(processes, moments, tmp_path):
    write(tmp_path, 0)
    uninterrupted, counts, left, between = Uninterrupted(), (0, 0), 0, 0
    for number in range(moments):
        killed(processes, work, tmp_path, after=random.Random(number).uniform(0, 0.5))
        counts = check(tmp_path, uninterrupted, counts)
        left += len(unfinished(tmp_path)) > 0
        between += not (tmp_path / STOCK / CONFIG_FILE).exists()
    write(tmp_path, 10**6)
    assert saved(tmp_path) == exported(tmp_path) == 10**6 and not unfinished(tmp_path)
    steps = len(uninterrupted.states) - 1
    print(f"{moments} kills in {steps} steps: {left} left unfinished files, {between} an export between its renames")


def test_writers_of_two_configurations_at_once(processes, tmp_path):
    """And somebody who loads meanwhile: each time one of the saves, whole."""
    write(tmp_path, 0)
    began = processes.Event()
    writers = [processes.Process(target=save_often, args=(tmp_path, began, first)) for first in (0, 1)]
    for writer in writers:
        writer.start()
    began.set()
    while any(writer.is_alive() for writer in writers):
        saved(tmp_path)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert saved(tmp_path) in (38, 39) and exported(tmp_path) in (38, 39)
    assert not unfinished(tmp_path)


# ---- one at a time --------------------------------------------------------------------------------------------------


def test_a_file_that_is_replaced_while_it_is_opened(tmp_path, monkeypatch):
    """safetensors opens a name twice, for the header and for the values; it is given what stays the same file."""
    write(tmp_path, 1)

    def replaced_first(path, *arguments):
        write(tmp_path, 2)
        return safe_open(path, *arguments)

    monkeypatch.setattr(checkpoint, "safe_open", replaced_first)
    assert saved(tmp_path) == 1


def test_a_copy_that_a_save_takes_away_while_it_is_read(tmp_path, monkeypatch):
    """The weights' header has all that is needed."""
    write(tmp_path, 1)
    check = checkpoint._check_file

    def taken_away(path):
        check(path)
        if path.name == CONFIG_FILE:
            path.unlink()

    monkeypatch.setattr(checkpoint, "_check_file", taken_away)
    assert saved(tmp_path) == 1


def test_a_copy_of_another_save_loses_and_an_edited_one_is_refused(tmp_path):
    """Where folders cannot be locked the copies of two saves may change places."""
    write(tmp_path, 1)
    copy = tmp_path / SAVED / CONFIG_FILE
    other = copy.read_bytes()
    write(tmp_path, 2)
    copy.write_bytes(other)
    with pytest.warns(UserWarning, match=rf"{CONFIG_FILE}: was written by another save than .* header, is taken"):
        assert one_count(LoRA.from_pretrained(Model(), tmp_path / SAVED)) == 2
    for change in ({"rank": 5}, {"rank": 2}, {"sha256": None}):
        copy.write_text(json.dumps({**json.loads(other), **change}))
        with pytest.raises(ValueError, match=rf"{CONFIG_FILE}: is not the configuration .* remove {CONFIG_FILE}"):
            LoRA.from_pretrained(Model(), tmp_path / SAVED)
    write(tmp_path, 2)
    copy.write_text(json.dumps(json.loads(copy.read_text()), indent=7).replace("\n", "\r\n"))  # says the same
    assert saved(tmp_path) == 2


def test_an_unfinished_file_of_a_living_writer_stays(tmp_path):
    """A second writer waits for it; neither removes what the other is writing."""
    seen = []

    def slow(path: Path) -> None:
        path.write_text("one")
        writing.write_atomically(tmp_path / "elsewhere" / "b", lambda new: new.write_text("another folder"))
        reader, writer = os.pipe()
        if not (child := os.fork()):
            os.write(writer, b"tries")
            writing.write_atomically(tmp_path / "a", lambda new: new.write_text("two"))
            os._exit(0)
        os.read(reader, 5)
        time.sleep(0.1)
        seen.append((child, path.read_text(), (tmp_path / "a").exists()))

    writing.write_atomically(tmp_path / "a", slow)
    ((child, text, there),) = seen
    assert (text, there) == ("one", False)
    assert os.waitpid(child, 0)[1] == 0 and (tmp_path / "a").read_text() == "two"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "elsewhere"}


def test_where_folders_cannot_be_locked_age_tells(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError("no locks here")

    monkeypatch.setattr(writing.fcntl, "flock", refuse)
    for name in ("young", "old"):
        (tmp_path / f".peft_kernels.{name}").mkdir()
        (tmp_path / f".peft_kernels.{name}" / "half").write_text("half")
    os.utime(tmp_path / ".peft_kernels.old", (0, time.time() - 2 * 24 * 3600))
    writing.write_atomically(tmp_path / "a", lambda new: new.write_text("whole"))
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".peft_kernels.young"}


def test_an_export_does_not_replace_a_save_without_its_copy(tmp_path):
    lora(1).save_pretrained(tmp_path)
    (tmp_path / CONFIG_FILE).unlink()  # as a kill between the two renames leaves it
    with pytest.raises(ValueError, match=r"^export_lora: .* holds an adapter that save_pretrained wrote; take another"):
        lora(1).export_lora(tmp_path)
