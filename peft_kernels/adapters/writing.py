"""Files that are written whole or not at all, whoever is killed or writes at the same time."""

import filecmp
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where a folder cannot be opened either
    fcntl = None

_UNFINISHED = ".peft_kernels."  # begins the names of folders in which new files wait until they are whole
_DAY = 24 * 3600.0


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a new file, which then takes the place of `path`: a crash leaves the old one whole."""
    write_together(path.parent, {path.name: write})


def write_together(folder: Path, writers: dict[str, Callable[[Path], object]]) -> None:
    """Each of `writers` fills a new file; when all are whole they take their places in `folder`, in this order.

    Whoever is killed between two renames must not leave files of two saves beside each other. Therefore a later file
    that changes goes before the first one is replaced: what is left is old, or new, or new without the later ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _only_writer(folder), tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=folder) as waiting:
        for name, write in writers.items():
            new = Path(waiting, name)
            new.touch()
            mode = new.stat().st_mode  # what the umask allows, whatever `write` does
            write(new)
            with new.open("rb+") as file:
                os.fsync(file.fileno())
            new.chmod(mode)
        _, *later = writers
        for name in later:
            with suppress(FileNotFoundError):
                if not filecmp.cmp(Path(waiting, name), folder / name, shallow=False):
                    (folder / name).unlink()
        for name in writers:
            Path(waiting, name).replace(folder / name)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Waits until nobody else writes into `folder`, and removes what writers that were killed have left there.

    The lock is the folder's own: it leaves no file, and the kernel takes it from a process however that ends, so that
    whatever is unfinished under it is nobody's. (A process id in a name means nothing in another container, and a lock
    on an unfinished file is lost when safetensors, which writes a temporary file of its own, renames that to it.)
    Where folders cannot be locked, as over NFS, writers do not wait, and what is older than a day is removed.
    """
    with ExitStack() as stack:
        age = _DAY
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
            stack.callback(fcntl.flock, handle, fcntl.LOCK_UN)  # closing is not enough after a fork
            age = -math.inf
        for left in folder.glob(f"{_UNFINISHED}*"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > age:
                    shutil.rmtree(left)
        yield
