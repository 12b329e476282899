"""What all pictures share: colours, and how a picture becomes a file."""

from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

RIGHT, WRONG, UNKNOWN = "#1a9641", "#d7191c", "#8a8a8a"
BEFORE, AFTER = "#8a8a8a", "tab:blue"
_DPI = 110


def colour(index: int) -> tuple[float, ...]:
    """The colour of the run of that number, the same in all pictures; the dark half of twenty comes first."""
    index %= 20
    return colormaps["tab20"](2 * index if index < 10 else 2 * index - 19)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
