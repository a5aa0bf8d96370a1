"""Style and saving of figures: colours, fonts, SVG and PNG files. matplotlib is loaded only when a figure is drawn.

The same result gives the same bytes: no date, fixed identifiers, a font that comes with matplotlib.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bncli.errors import FileError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable with any colour vision; then black, and further curves get line styles.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#1b1b1b")
INK = "#1b1b1b"  # text and axes; a web page can replace it by its own colour
PALE = "#8a8a8a"  # what is not data: readable on white and on black
MISSING = "plots need matplotlib, which is not installed; install it with: pip install matplotlib"
STYLE: Any = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "svg.hashsalt": "bncli",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def check_path(path: Path) -> str:
    """The kind of figure that a file's name asks for: "svg" or "png".

    Raises FileError for another suffix or without matplotlib, so it also serves as a check before any work.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise FileError(f"{path}: a plot's file name must end in .svg or .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise FileError(MISSING)
    return path.suffix.lower().lstrip(".")


def rendered(draw: Callable[[Figure], None], kind: str, dpi: int, transparent: bool = False) -> bytes:
    """The bytes of an "svg" or "png" file with what `draw` puts on an empty figure. Raises FileError."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FileError(MISSING) from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(layout="constrained")
        draw(figure)
        file = io.BytesIO()
        metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(file, format=kind, dpi=dpi, metadata=metadata, transparent=transparent)
    return file.getvalue()
