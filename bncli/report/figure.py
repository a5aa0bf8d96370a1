"""Style and saving of figures: colours, fonts, captions, files. matplotlib is loaded only when a figure is drawn.

The same result gives the same bytes: no date, fixed identifiers, a font that comes with matplotlib.
"""

from __future__ import annotations

import importlib.util
import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bncli.errors import FileError
from bncli.report.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable with any colour vision; then black, and further curves get line styles.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#1b1b1b")
LINES = ("-", "--", "-.", ":")
INK = "#1b1b1b"  # text and axes; a web page can replace it by its own colour
PALE = "#8a8a8a"  # what is not data: readable on white and on black
NARROW = 6.0  # inches: below that, panels stand below each other
MISSING = 'plots need matplotlib, which is not installed; install it with: pip install "bncli[plot]"'
STYLE: Any = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "pdf.fonttype": 42,  # TrueType: text stays text, as publishers want it
    "svg.hashsalt": "bncli",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
METADATA: dict[str, dict[str, Any]] = {
    "svg": {"Date": None},
    "png": {"Software": None},
    "pdf": {"CreationDate": None},
}


@dataclass(frozen=True)
class FigureStyle:
    """How a figure is laid out.

    width_inches: None for the figure's own width. caption: whether it has its title and caption, which a paper sets
    itself.
    """

    width_inches: float | None = None
    caption: bool = True


DEFAULT_STYLE = FigureStyle()


def check_path(path: Path) -> str:
    """The kind of figure that a file's name asks for: "svg", "png" or "pdf".

    Raises FileError for another suffix or without matplotlib, so it also serves as a check before any work.
    """
    if path.suffix.lower().lstrip(".") not in METADATA:
        raise FileError(f"{path}: a plot's file name must end in .svg, .png or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise FileError(MISSING)
    return path.suffix.lower().lstrip(".")


def rendered(draw: Callable[[Figure], None], kind: str, dpi: int, transparent: bool = False) -> bytes:
    """The bytes of a file of that kind with what `draw` puts on an empty figure. Raises FileError."""
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
        figure.savefig(file, format=kind, dpi=dpi, metadata=METADATA[kind], transparent=transparent)
    return file.getvalue()


def line_style(index: int) -> dict[str, Any]:
    """The line of an arm or another series, by its place."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": LINES[index // len(COLOURS) % len(LINES)]}


def write_caption(figure: Figure, style: FigureStyle, title: str, *notes: str) -> None:
    """Title above and notes below, wrapped to the figure's width, which is set before. Each note begins a line."""
    if not style.caption:
        return
    width = figure.get_figwidth()
    words: dict[str, Any] = {"ha": "left", "x": 0.008, "parse_math": False}
    size = 12 if width > NARROW else 10
    figure.suptitle(textwrap.fill(title, int(102 * width / size)), fontsize=size, fontweight="bold", **words)
    lines = [line for note in notes for line in textwrap.wrap(note, int(15.5 * width))]
    figure.supxlabel("\n".join(lines), fontsize=8, **words)


Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # a line's name -> its x and y


def two_panels(figure: Figure, style: FigureStyle, words: tuple[str, str], below: str, *panels: Lines) -> list[Axes]:
    """Lines in two panels, below each other where it is narrow. words: title and note. below: the x axis's label."""
    width = style.width_inches or 10.0
    figure.set_size_inches(width, 4.2 if width > NARROW else 6.4)
    write_caption(figure, style, *words)
    found = list(figure.subplots(*((1, 2) if width > NARROW else (2, 1))))
    for axes, lines in zip(found, panels, strict=True):
        axes.set_xlabel(below)
        for place, (name, line) in enumerate(lines.items()):
            axes.plot(*line, label=name, color=COLOURS[place], linestyle=LINES[place])
    return found


def save(path: Path, draw: Callable[[Figure], None]) -> list[Path]:
    """Write a figure to `path`, and return where it is. Raises FileError."""
    write_atomically(path, rendered(draw, check_path(path), 160))
    return [path]


def plain_ticks(axes: Axes, finest: int = 3) -> None:
    """Round numbers of steps on a logarithmic axis; see `plain_numbers`."""
    plain_numbers(axes.xaxis, *axes.get_xlim(), finest)


def plain_numbers(axis: Axis, low: float, high: float, finest: int = 3) -> None:
    """Round numbers on a logarithmic axis, not powers: at most `finest` in a decade, or as many as give two numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = math.log10(high / low)
    least = min(finest, 3 if decades < 2.2 else 2 if decades < 4.5 else 1)
    finer = [(1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), tuple(map(float, range(1, 10)))][least - 1 :]
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    two = (each for each in finer if sum(low <= k * power <= high for k in each for power in powers) > 1)
    factors = next(two, finer[-1])
    axis.set_major_locator(LogLocator(subs=factors))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
