"""Every launch of a call as a driver would see it, without code for a GPU: for tests of what is kept from call to call.

Kernels are specialised, looked up and handed to a launcher by Triton itself, but not compiled, so that many kinds of
calls take little time. Importing it skips the importing tests in a process with TRITON_INTERPRET=1.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels never reach Triton's launcher", allow_module_level=True)

import triton.compiler
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.compiler import CompiledKernel

from peft_kernels import lowrank_linear, use_backend
from peft_kernels.benchmarks.kept import afresh
from peft_kernels.benchmarks.nothing import launching_nothing
from peft_kernels.ops import lowrank_linear as op
from peft_kernels.ops import lowrank_projections
from peft_kernels.triton_kernels import replay

# ---- launches --------------------------------------------------------------------------------------------------------


class Launched(NamedTuple):
    """One launch as it reached the driver."""

    kernel: tuple  # its name, and all that decides what would have been compiled
    grid: tuple[int, int, int]
    args: list[Any]  # numbers; addresses as Address; None for what is compiled in


class Address(NamedTuple):
    address: int
    size: int | None  # bytes, where the launcher was handed a tensor


class Uncompiled(CompiledKernel):
    def __init__(self, src: Any, launcher: "Launcher"):
        self.src, self.name, self.launcher = src, src.fn.__name__, launcher
        self.module, self.function, self.packed_metadata, self._run = 1, 1, (), launcher


class Launcher:
    """In the place of the compiled kernel's own."""

    seen: "Seen"  # by the call that is being watched

    def __init__(self, src: Any, options: dict[str, Any]):
        names = src.fn.arg_names
        index = {(name,): (place,) for place, name in enumerate(names)}
        constants = {index.get(key if isinstance(key, tuple) else (key,), key): v for key, v in src.constants.items()}
        self.constants, self.kinds = {key[0]: value for key, value in constants.items()}, list(src.signature.values())
        named = {names[place]: value for place, value in self.constants.items()}
        if "DOT" in named and str(named["DOT"]) != "fp32":
            named.pop("PRECISION")  # only float32 is multiplied in another one
        aligned = tuple(sorted((path, tuple(map(tuple, facts))) for path, facts in src.attrs.items()))
        self.kernel = (
            src.fn.__name__, tuple(self.kinds), tuple(sorted((name, str(value)) for name, value in named.items())),
            aligned, options["num_warps"], options["num_stages"],
        )  # fmt: skip

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args) -> None:
        for hook in (enter, leave):
            if hook is not None:
                hook(launch_metadata)
        assert len(args) == len(self.kinds)
        found = []
        for place, (kind, arg) in enumerate(zip(self.kinds, args)):
            if kind == "constexpr":
                compiled = self.constants[place]
                assert compiled is None or compiled == arg, f"{self.kernel[0]}: compiled for {compiled}, got {arg}"
                found.append(None)
            elif kind[0] == "*" and isinstance(arg, Tensor):
                found.append(Address(arg.data_ptr(), span(arg)))
                Launcher.seen.anew = True
            else:
                found.append(Address(arg, None) if kind[0] == "*" else arg)
        Launcher.seen.launches.append(Launched(self.kernel, (x, y, z), found))


@dataclass
class Seen:
    launches: list[Launched] = field(default_factory=list)
    anew: bool = False  # the launcher was handed tensors, as it is the long way
    made: list[Tensor] = field(default_factory=list)  # kept: nothing else lies where they lay


class Noting(TorchDispatchMode):
    """Notes, and keeps, whatever torch makes."""

    def __init__(self, seen: Seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen.made += [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        return result


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Kernels take CPU tensors inside the block, and launches are seen by `seen_in`."""

    def uncompiled(src: Any, target: Any = None, options: dict | None = None, **_: Any) -> Uncompiled:
        return Uncompiled(src, Launcher(src, options))

    with launching_nothing(), mock.patch.object(triton.compiler, "compile", uncompiled):
        yield


@pytest.fixture(scope="module", autouse=True)
def launcher() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with watched():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    op._plans.clear()
    lowrank_projections._plans.clear()
    replay.forget()


def seen_in(call: Callable[[], Any], thread: bool = False) -> tuple[Seen, Any]:
    """What a call launched, and what it returned."""

    def run() -> Any:
        with Noting(seen):
            return call()

    Launcher.seen = seen = Seen()
    return seen, in_a_thread(run) if thread else run()


def launches_of(
    call: Callable[[], tuple[Tensor | None, ...]], given: dict[str, Tensor | None], thread: bool = False
) -> tuple[Seen, list]:
    """The same, told, or the error that the call raised."""
    try:
        seen, results = seen_in(call, thread)
    except (ValueError, TypeError, RuntimeError) as error:
        return Launcher.seen, [type(error), str(error)]
    return seen, told(seen, given, results)


def in_a_thread(function: Callable[[], Any]) -> Any:
    found: list = []

    def run() -> None:
        try:
            found.append((function(), None))
        except Exception as error:
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    ((result, error),) = found
    if error is not None:
        raise error
    return result


def told(seen: Seen, given: dict[str, Tensor | None], results: tuple[Tensor | None, ...]) -> list[tuple]:
    """The launches, with every address as a given tensor's name and an offset, or as the number of what was made."""
    numbers: dict[int, int] = {}
    spans = [(name, t.data_ptr(), span(t)) for name, t in given.items() if t is not None and t.numel()]

    def place(address: int) -> tuple:
        for name, first, length in spans:
            if first <= address < first + length:
                return name, address - first
        assert any(t.data_ptr() <= address < t.data_ptr() + span(t) for t in seen.made), "nothing lies there"
        return "made", numbers.setdefault(address, len(numbers))

    lines = [
        (each.kernel, each.grid, [place(arg.address) if isinstance(arg, Address) else arg for arg in each.args])
        for each in seen.launches
    ]
    ends = [None if t is None else numbers.get(t.data_ptr(), "elsewhere") for t in results]
    kinds = [None if t is None else (t.dtype, t.shape) for t in results]
    return [*lines, ("results", ends, kinds)]


def span(t: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    return (1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride()))) * t.element_size()


def check_apart(short: Seen, short_told: list[tuple], long: Seen, long_told: list[tuple]) -> None:
    """What lies apart the long way lies apart, and whole, when launched again. Only the former tells sizes."""
    addresses, places = {}, {}
    for seen, lines, found in ((short, short_told, addresses), (long, long_told, places)):
        for each, (_, _, args) in zip(seen.launches, lines):
            for arg, where in zip(each.args, args):
                if isinstance(arg, Address) and where[0] == "made":
                    found[where[1]] = arg.address, max(arg.size or 0, found.get(where[1], (0, 0))[1])
    ranges = sorted((address, address + places[number][1]) for number, (address, _) in addresses.items())
    whole = sorted((address, address + size) for address, size in places.values())
    if all(end <= first for (_, end), (first, _) in pairwise(whole)):
        assert all(end <= first for (_, end), (first, _) in pairwise(ranges)), "two share their memory"
    for first, end in ranges:
        assert any(t.data_ptr() <= first and end <= t.data_ptr() + span(t) for t in short.made), "beyond what was made"


# ---- calls of the low-rank linear ------------------------------------------------------------------------------------

HALF = torch.float16
SETTINGS: dict[str, tuple] = {  # each with its usual value first
    "rows": (5, 16, 1, 37),
    "x": ("plain", "3d", "1d", "transposed", "sliced", "every second row", "offset", "broadcast"),
    "dtype": (torch.float32, torch.bfloat16, HALF),
    "factor dtype": (None, torch.float32),
    "widths": ((32, 48), (48, 32), (24, 36)),  # I · KB, O · NB
    "rank": (4, 16, 20),
    "core": (None, "flat diagonal", "flat dense", "diagonal", "dense"),
    "blocks": ((1, 1), (2, 1), (1, 2), (3, 2)),
    "bias": ("plain", None, "offset", "strided"),
    "weight": ("plain", "transposed", "offset", "sliced"),
    "factors": ("plain", "transposed", "offset", "parameters"),
    "hidden": (None, "plain", "3d", "sliced", "offset"),
    "scale": (1.5, 0.5, 2, 0.0, "0-d", "0-d doubled", "0-d offset", "0-d float64", "0-d parameter"),
    "p": (0.0, 0.1, 0.5),
    "place": ("input", "rank", "core"),
    "training": (True, False),
    "grads": ("all", "factors", "x", "weight", "up", "down", "core", "hidden", "bias", "none"),
    "dy": ("plain", "expanded", "transposed", "offset", "sliced"),
    "autocast": (None, torch.bfloat16, HALF, "on CUDA"),
    "autocast, backward": (False, True),
    "tf32": ("ieee", "tf32"),
    "backend": ("argument", "block", "environment", "torch", "auto", "block in a block"),
    "design": (None, "passes", "fused"),
    "thread": (False, True),
    "inference": (False, True),
}
USUAL = {name: values[0] for name, values in SETTINGS.items()}
_DIMS = {"flat diagonal": (), "flat dense": (), "diagonal": (2,), "dense": (2,)}


def laid(shape: tuple[int, ...], dtype: torch.dtype, layout: str | None) -> Tensor:
    """A tensor of these sizes, whose memory is laid out so."""
    if layout == "transposed" and len(shape) > 1:
        return torch.zeros(*shape[:-2], shape[-1], shape[-2], dtype=dtype).transpose(-1, -2)
    if layout == "sliced" and len(shape) > 1:
        return torch.zeros(*shape[:-1], shape[-1] + 16, dtype=dtype)[..., : shape[-1]]
    if layout == "every second row" and len(shape) > 1:
        return torch.zeros(2 * shape[0], *shape[1:], dtype=dtype)[::2]
    if layout == "offset":
        return torch.zeros(torch.Size(shape).numel() + 1, dtype=dtype)[1:].view(shape)
    if layout == "strided":
        return torch.zeros(*shape, 2, dtype=dtype)[..., 0]
    if layout == "broadcast" and len(shape) > 1:
        return torch.zeros(shape[-1], dtype=dtype).expand(shape)
    return torch.zeros(shape, dtype=dtype)


def tensors(given: dict[str, Any]) -> dict[str, Tensor | None]:
    dtype, rank, (width, outputs) = given["dtype"], given["rank"], given["widths"]
    factor_dtype, rows = given["factor dtype"] or dtype, given["rows"]
    blocks = given["blocks"] if given["core"] in ("diagonal", "dense") else (1, 1)
    shape = {"3d": (rows, 2, width), "1d": (width,)}.get(given["x"], (rows, width))
    core = None
    if given["core"] is not None:
        square = (rank, rank) if "dense" in given["core"] else (rank,)
        core = laid((*(blocks if "flat" not in given["core"] else ()), *square), factor_dtype, given["factors"])
    hidden = None
    if given["hidden"] is not None:
        hidden = laid((*shape[:-1], blocks[1] * rank), dtype, given["hidden"])
    found = {
        "x": laid(shape, dtype, given["x"]),
        "weight": laid((outputs, width), dtype, given["weight"]),
        "bias": None if given["bias"] is None else laid((outputs,), dtype, given["bias"]),
        "down": laid((rank, width // blocks[1]), factor_dtype, given["factors"]),
        "up": laid((outputs // blocks[0], rank), factor_dtype, given["factors"]),
        "core": core,
        "hidden": hidden,
    }
    for name, t in found.items():
        wanted = given["grads"] in ("all", name) or (given["grads"] == "factors" and name in ("down", "up", "core"))
        if t is not None and given["factors"] == "parameters" and name in ("weight", "bias", "down", "up", "core"):
            found[name] = nn.Parameter(t, requires_grad=wanted)
        elif t is not None:
            t.requires_grad_(wanted)
    return found


def scale_of(kind: Any, numbers: Tensor) -> Any:
    """A number, or a 0-d tensor, most of them in memory that stays: only what it holds changes."""
    numbers.fill_(3.0 if kind == "0-d doubled" else 1.5)
    return {
        "0-d": numbers[0],
        "0-d doubled": numbers[0],
        "0-d offset": numbers[1],
        "0-d float64": torch.tensor(1.5, dtype=torch.float64),
        "0-d parameter": nn.Parameter(numbers[0].clone(), requires_grad=False),
    }.get(kind, kind)


@contextlib.contextmanager
def around(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What is in force while a call is made; yields its options."""
    options = {
        "dropout_p": given["p"], "dropout_on": given["place"], "training": given["training"], "design": given["design"],
        "backend": {"argument": "triton", "torch": "torch"}.get(given["backend"], "auto"),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        if given["backend"] == "environment":
            patch.setenv("PEFT_KERNELS_BACKEND", "triton")
        if given["backend"] == "block in a block":
            stack.enter_context(use_backend("torch"))
        if given["backend"].startswith("block"):
            stack.enter_context(use_backend("triton"))
        stack.enter_context(multiplying(given["tf32"]))
        if given["inference"]:
            stack.enter_context(torch.no_grad())
        yield options


@contextlib.contextmanager
def multiplying(precision: str) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@contextlib.contextmanager
def autocasting(kind: torch.dtype | str | None) -> Iterator[None]:
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", kind == "on CUDA")
    try:
        with torch.autocast("cpu", dtype=kind) if isinstance(kind, torch.dtype) else contextlib.nullcontext():
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def forward_and_backward(given: dict[str, Any], t: dict[str, Tensor | None], scale: Any) -> tuple[Tensor | None, ...]:
    """y and every gradient; the first call of such tensors puts y's among them."""
    with around(given) as options:
        with autocasting(given["autocast"]):
            y = lowrank_linear(
                t["x"], t["weight"], t["bias"], t["down"], t["up"], t["core"], scale=scale, hidden=t["hidden"],
                **options,
            )  # fmt: skip
        leaves = [leaf for leaf in t.values() if leaf is not None and leaf.requires_grad]
        if not y.requires_grad:
            return (y,)
        if "dy" not in t:
            one = given["dy"] == "expanded"
            t["dy"] = torch.zeros((), dtype=y.dtype).expand(y.shape) if one else laid(y.shape, y.dtype, given["dy"])
        with autocasting(given["autocast"] if given["autocast, backward"] else None):
            return y, *torch.autograd.grad(y, leaves, t["dy"], allow_unused=True)


def check(
    call: Callable[[], tuple[Tensor | None, ...]], given: dict[str, Tensor | None], thread: bool = False
) -> tuple[list, bool]:
    """The call two times with what was kept, and once without: the launches are the same.

    -> them, and whether the second was made again from what was kept
    """
    kept = [launches_of(call, given, thread) for _ in range(2)]
    memos = {launcher: dict(memo) for launcher, memo in replay._memos.items()}
    with afresh():
        long = launches_of(call, given, thread)
    for launcher, memo in memos.items():
        replay._memos[launcher].update(memo)
    for seen, lines in kept:
        assert lines == long[1]
        if seen.launches and isinstance(lines[0], tuple):
            check_apart(seen, lines, *long)
    assert long[0].anew or not long[0].launches
    return long[1], bool(kept[1][0].launches) and not kept[1][0].anew
