"""How a run starts processes, ends them in time, and keeps what they find.

A process prints each of its records on a line of its own as soon as it has it, and the run's result file is written
anew for every one: a fault, a hang or a kill loses what was running, and nothing else.
"""

import importlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import results

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = (sys.executable, "-m")
OPS = ("lowrank_linear", "lowrank_projections", "weight_distance")  # first the most
OPS += ("batched_lowrank_linear", "reconstruct", "gated_query")
RECORD = "record "
JOINED = ("cases", "foreign")  # records that are printed again whenever there is more of them
KEPT = 100_000  # characters of a process's output in the log: a run's files stay small
MOST_RESTARTS = 8
GRACE = 1.0  # seconds to look at what a process wrote before it was ended


class NotHere(Exception):
    """A step cannot run on this machine; the message says why."""


def line_of(record: dict) -> str:
    """What a process prints, and `Run.call` finds."""
    return RECORD + json.dumps(record)


@dataclass
class Run:
    """What every step is given: where to write, what to add to, and until when."""

    out: Path
    part: str
    dry: bool
    content: dict[str, Any] = field(default_factory=dict)  # what the result file holds
    deadline: float = 0.0  # when the step ends, by time.monotonic()
    worker: str = "peft_kernels.benchmarks.gpu.work"  # the module whose kinds of work the steps run
    lock: Any = field(default_factory=threading.RLock)
    running: set = field(default_factory=set)
    cut_short: list[str] = field(default_factory=list)  # commands that time ran out for

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def inside(self) -> bool:
        """Dry, only the first run starts processes for its work: each takes seconds to import torch."""
        return self.dry and self.part != "truth"

    @property
    def file(self) -> Path:
        """One file for each device, day and part: all can lie in one folder of results."""
        words = "dry" if self.dry else re.sub(r"[^a-z0-9]+", "-", self.content["device"].lower()).strip("-")
        return self.out / f"{words}-{self.content['date']}-{self.part}.json"

    @property
    def left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def within(self, share: float) -> "Run":
        """The same with a share of the time that is left."""
        return self.lasting(share * self.left)

    def lasting(self, seconds: float) -> "Run":
        """The same with so much time from now on."""
        return replace(self, deadline=time.monotonic() + seconds)

    def save(self) -> None:
        with self.lock:
            results.save(self.content, self.file)

    def keep(self, key: str, record: dict) -> None:
        """One more record, or what is new in a case of which others are there."""
        with self.lock:
            records = self.content.setdefault(key, [])
            if key in JOINED:
                results.join(records, record)
            else:
                records.append(record)
            self.save()

    # ---- processes --------------------------------------------------------------------------------------------------

    def call(
        self, command: Sequence[object], found: Callable[[dict], None] = lambda record: None, **environment: str
    ) -> tuple[int | None, str]:
        """(exit status or None where time was up, output); everything it started ends with it. found: takes records"""
        settings = {**os.environ, **({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if self.dry else {})}
        settings |= {"PYTHONUNBUFFERED": "1", **environment}
        command = list(map(str, command))
        began, lines = time.monotonic(), []
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
        with subprocess.Popen(command, cwd=REPOSITORY, env=settings, **options) as process:
            self.running.add(process)
            try:
                for line in _lines(process, self.deadline):
                    lines.append(line)
                    if (begin := line.find(RECORD + "{")) >= 0:
                        with suppress(json.JSONDecodeError):  # half a line, of a process that was ended
                            found(json.loads(line[begin + len(RECORD) :]))
                status = process.wait(self.left)
                status = None if status == -signal.SIGKILL and not self.left else status
            except subprocess.TimeoutExpired:
                status = None
            finally:  # also of Ctrl-C
                end(process)
                self.running.discard(process)
        if status is None:
            self.cut_short.append(" ".join(command))
        text = "\n".join(lines)
        shown = text if len(text) <= KEPT else f"{text[: KEPT // 4]}\n[…]\n{text[-KEPT * 3 // 4 :]}"
        told = f"$ {' '.join(command)}\n{shown}\n[exit status {status}, {time.monotonic() - began:.1f} s]\n\n"
        with self.lock, (self.out / f"{self.part}.log").open("a", encoding="utf-8") as log:
            log.write(told)
        return status, text

    def work(
        self, kind: str, key: str | None, *options: object, under: Sequence[object] = (), **environment: str
    ) -> tuple[int | None, list[dict], str]:
        """One kind of work.py, its records kept as `key`: (exit status, records, output). under: the tool that runs it

        What ends a process takes one case with it: another process goes on behind that.
        """
        records: list[dict] = []
        begun = {"begun": -1, "of": 0}

        def found(record: dict) -> None:
            if "begun" in record:
                begun.update(record)
            else:
                records.append(record)
                if key:
                    self.keep(key, record)

        small = ("--small",) if self.dry else ()
        arguments = (kind, "--device", self.device, *small, *options)
        statuses, texts = [], []
        while len(statuses) <= MOST_RESTARTS:
            first = begun["begun"] + 1
            if self.inside:
                status, text = inside(self.worker, [*arguments, "--from", first], found)
            else:
                command = (*under, *PYTHON, self.worker, *arguments, "--from", first)
                status, text = self.call(command, found, **environment)
            statuses.append(status)
            texts.append(text)
            if status in (0, None) or not first <= begun["begun"] < begun["of"] - 1:
                break
        return next((status for status in statuses if status != 0), 0), records, "\n".join(texts)

    def together(self, calls: Sequence[Callable[[], Any]], most: int | None = None) -> list[Any]:
        """All at once, or as many as `most` says: what is not timed may share a GPU."""
        with ThreadPoolExecutor(most or max(1, len(calls))) as pool:
            waiting = [pool.submit(call) for call in calls]
            try:
                return [each.result() for each in waiting]
            except BaseException:
                for process in list(self.running):
                    end(process)
                raise

    def groups(self) -> list[tuple[str, ...]]:
        """The operations, each in a process of its own; dry in one, and of the later runs the first operation alone."""
        if self.dry:
            return [OPS if self.part == "truth" else OPS[:1]]
        return [(op,) for op in OPS]

    def in_turn(self, groups: Sequence[tuple[str, ...]]) -> Iterator[tuple["Run", tuple[str, ...]]]:
        """One after the other, for what is timed: each may take twice its share of the time that is then left."""
        for index, group in enumerate(groups):
            left = len(groups) - index
            yield self.within(min(1.0, 2 / (left + 1))), group


def _lines(process: subprocess.Popen, deadline: float) -> Iterator[str]:
    """A process's output as it comes, until all of it is there, the process has ended, or time is up.

    Neither the end of the output nor the process's is enough: what it started may keep its output open.
    """
    stream, rest, overtime = process.stdout.fileno(), b"", False
    while True:
        now = time.monotonic()
        if not overtime and now >= deadline:
            end(process)
            overtime = True
        ready, _, _ = select.select([stream], [], [], 0.0 if overtime else min(0.5, deadline - now))
        data = os.read(stream, 1 << 16) if ready and now < deadline + GRACE else b""
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
        if not data and (ready or overtime or process.poll() is not None):
            break
    if rest:
        yield rest.decode(errors="replace")


def inside(worker: str, arguments: Sequence[object], found: Callable[[dict], None]) -> tuple[int, str]:
    """`Run.call` without a process."""
    try:
        return importlib.import_module(worker).main(list(map(str, arguments)), found), ""
    except Exception:
        return 1, traceback.format_exc()


def end(process: subprocess.Popen) -> None:
    """The process and all that it started, but for what has begun a session of its own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def cut(status: int | None) -> str:
    """What there is to say of an exit status: nothing of 0."""
    return "; time was up" if status is None else f"; exit status {status}" if status else ""
