"""The report of `python -m peft_kernels env`: what a bug report needs to say about a machine, as data and as text."""

import importlib.util
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("peft_kernels", "torch", "triton", "numpy", "peft", "transformers")
ASKED = {
    "driver": "driver_version",
    "clock": "clocks.sm",
    "highest clock": "clocks.max.sm",
    "memory clock": "clocks.mem",
    "power limit": "power.limit",
}
WORKS = "works here"  # what is said of a backend that can run
SETTINGS = ("PEFT_KERNELS_", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")


def report() -> dict:
    """Everything about this machine and installation that decides what runs here. Never raises: a part that cannot be
    found out is None, or says why."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "imported_from": _guarded(_place),
        "machine": _machine(),
        "gpu": _guarded(_gpu),
        "backends": _guarded(_backends),
        "cuda_kernels": _guarded(_cuda_kernels),
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)},
    }


def as_text(entries: dict) -> str:
    """`report()` as aligned lines, one heading for each part."""
    lines = []
    for heading, part in entries.items():
        lines.append(heading.replace("_", " "))
        pairs = part.items() if isinstance(part, dict) else [("", part)]
        width = max((len(str(key)) for key, _ in pairs), default=0)
        lines += [f"  {key!s:<{width}}  {_value(value)}".rstrip() for key, value in pairs] or ["  none"]
    return "\n".join(lines)


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "not found" if value is None else str(value)


def _guarded(part):
    """The part, or why it failed: a report about a broken installation is what it is for."""
    try:
        return part()
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


def _version(package: str) -> str | None:
    """From the metadata: importing transformers to learn its version takes seconds."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _place() -> str:
    """The package's folder, and whether another one is installed: Python takes the folder that it was started in."""
    here = Path(__file__).parent
    installed = Path(metadata.distribution("peft_kernels").locate_file("peft_kernels"))
    if not installed.is_dir() or installed.samefile(here):
        return str(here)
    return f"{here}, and not {installed}, which is installed: Python was started in a checkout, or finds one first"


def _machine() -> dict:
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _processor() -> str | None:
    try:
        with open("/proc/cpuinfo") as file:
            models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        models = []
    return next(iter(models), None) or platform.processor() or platform.machine() or None


def _gpu() -> dict | str:
    import torch

    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        return f"none usable (torch was built with {built})"
    devices = {}
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        devices[f"{index}"] = f"{found.name}, compute capability {found.major}.{found.minor}, {memory}"
    return {**devices, **_asked(), "torch built with": f"CUDA {torch.version.cuda}"}


def _asked() -> dict[str, str | None]:
    """What the driver's own tool says of the first GPU; None for what it does not."""
    query = ["nvidia-smi", f"--query-gpu={','.join(ASKED.values())}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(ASKED)
    found = [value.strip() for value in answer.partition("\n")[0].split(",")]
    return dict(zip(ASKED, found)) if len(found) == len(ASKED) else dict.fromkeys(ASKED)


def _backends() -> dict:
    from peft_kernels.backend import status

    return {name: WORKS if why is None else f"cannot run: {why}" for name, why in status().items()}


def _cuda_kernels() -> dict | str:
    from peft_kernels.cuda_kernels import extension, why_left_out

    if importlib.util.find_spec("peft_kernels._C") is None:
        return f"{why_left_out() or 'not built'} (reinstall with nvcc on the PATH)"
    return dict(extension().build_info())
