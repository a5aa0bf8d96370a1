"""Style and saving of figures: colours, fonts, captions, files. matplotlib is loaded only when a figure is drawn.

The same result gives the same bytes: no date, fixed identifiers, a font that comes with matplotlib.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bncli.errors import FileError
from bncli.storage import write_atomically

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure, SubFigure

# Okabe and Ito's palette, distinguishable with any colour vision, its pale colours darker, and a grey that is visible
# on black too. With 4 line styles for 7 colours neighbours differ in grey print, and 28 curves differ.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#C4649B", "#D08A00", "#3A9FDB", "#757575")
LINES: Any = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (1.5, 1.2)))
INK = "#1b1b1b"  # text and axes; a web page can replace it by its own colour
PALE = "#8a8a8a"  # what is not data: readable on white and on black
DASHED: Any = {"color": PALE, "linestyle": (0, (5, 4)), "linewidth": 1, "zorder": 1}  # a target, a ratio of 1
MOST_PLACES = 150  # of a curve; it needs no more at any size
THINNED = f"Where there are more than {MOST_PLACES} evaluations: medians of these in intervals of steps."
# Inches: of a figure whose panels stand below each other; of an axis with few numbers.
NARROW, SHORT_AXIS = 6.0, 3.2
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
    "pdf.fonttype": 42,  # TrueType: text stays text, as publishers want it
    "svg.hashsalt": "bncli",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
OMITTED = {"svg": "Date", "png": "Software", "pdf": "CreationDate"}  # of each kind's metadata, so that bytes agree


@dataclass(frozen=True)
class FigureStyle:
    """How a figure is laid out: its width, None for its own, and whether it has its title and caption."""

    width_inches: float | None = None
    caption: bool = True


DEFAULT_STYLE = FigureStyle()


def check_path(path: Path) -> str:
    """The kind of figure that a file's name asks for: "svg", "png" or "pdf".

    Raises FileError for another suffix or without matplotlib, so it also serves as a check before any work.
    """
    if path.suffix.lower().lstrip(".") not in OMITTED:
        raise FileError(f"{path}: a plot's file name must end in .svg, .png or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise FileError(MISSING)
    return path.suffix.lower().lstrip(".")


def rendered(draw: Callable[..., None], kind: str, dpi: int = 160, for_page: bool = False) -> bytes:
    """A file of that kind with what `draw` puts on an empty figure; on a page words are text. Raises FileError."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except (ImportError, ValueError) as error:  # ValueError: of MPLBACKEND
        raise FileError(f"{MISSING} ({error})") from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"svg.fonttype": "none" if for_page else "path"})
        figure = Figure(layout="constrained")
        draw(figure)
        file = io.BytesIO()
        warnings.filterwarnings("ignore", "Glyph")  # its message would have the character, for which a box is drawn
        figure.savefig(file, format=kind, dpi=dpi, metadata={OMITTED[kind]: None}, transparent=for_page)
    return file.getvalue()


def line_style(index: int) -> dict[str, Any]:
    """The line of an arm or another series, by its place."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": LINES[index % len(LINES)], "linewidth": 1.8}


def write_caption(figure: Figure, style: FigureStyle, title: str, *notes: str) -> None:
    """Title above and notes below, wrapped to the figure's width, and the height that they need added to its own."""
    if not style.caption:
        return
    width = figure.get_figwidth()
    words: dict[str, Any] = {"ha": "left", "x": 0.008, "parse_math": False}
    size = 12 if width > NARROW else 10
    above = textwrap.wrap(title, int(102 * width / size), break_on_hyphens=False)
    below = [line for note in notes for line in textwrap.wrap(note, int(15.7 * width))]
    figure.suptitle("\n".join(above), fontsize=size, fontweight="bold", **words)
    figure.supxlabel("\n".join(below), fontsize=8, **words)
    figure.set_figheight(figure.get_figheight() + (1.3 * size * len(above) + 10 * len(below) + 8) / 72)


def legend_above(figure: Figure, handles: Sequence[Artist]) -> SubFigure:
    """Put a legend on a strip above the figure, whose height grows, and return the part below, as high as it was."""
    height = figure.get_figheight()
    columns = legend_columns([str(handle.get_label()) for handle in handles], figure.get_figwidth())
    strip = 0.08 + 0.19 * math.ceil(len(handles) / columns)
    figure.set_figheight(height + strip)
    parts: list[SubFigure] = list(figure.subfigures(2, 1, squeeze=False, height_ratios=(strip, height)).flat)
    shown = parts[0].legend(handles=handles, loc="upper left", ncols=columns, frameon=False, borderpad=0)
    for text in shown.get_texts():
        text.set_parse_math(False)
    return parts[1]


def panel_legend(axes: Axes) -> None:
    """A legend above a panel, where it covers no line; the layout will make the panel about 1.15 times as wide."""
    columns = legend_columns(axes.get_legend_handles_labels()[1], 1.15 * axes.bbox.width / axes.figure.dpi)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, borderpad=0)


def legend_columns(labels: Sequence[str], width: float) -> int:
    """The most columns of a legend that fit a width in inches, each as wide as its longest label."""
    ends = ([k * (len(labels) // n) + min(k, len(labels) % n) for k in range(n + 1)] for n in range(1, len(labels) + 1))
    longest = ([max(map(len, labels[i:j])) for i, j in itertools.pairwise(each)] for each in ends)
    return max((len(each) for each in longest if 0.6 * len(each) + 0.078 * sum(each) <= width), default=1)


def thinned(points: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """At most MOST_PLACES points whose first value is a step: of more, the medians in intervals of a log axis."""
    if len(points) <= MOST_PLACES:
        return list(points)
    width = math.log(points[-1][0] / points[0][0]) / MOST_PLACES
    bins: dict[int, list[tuple[float, ...]]] = {}
    for point in points:
        place = min(int(math.log(point[0] / points[0][0]) / width), MOST_PLACES - 1)
        bins.setdefault(place, []).append(point)
    return [tuple(map(median, zip(*members, strict=True))) for members in bins.values()]


def two_panels(
    figure: Figure,
    style: FigureStyle,
    words: tuple[str, str],
    x: tuple[str, Sequence[float]],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    examples: bool = False,  # mark each value, and give both panels one range of y
) -> list[Axes]:
    """Lines in two panels. words: title and note. x: label and values. panels: a y label -> a line's name -> its y."""
    width = style.width_inches or 10.0
    figure.set_size_inches(width, 4.0 if width > NARROW else 6.4)
    write_caption(figure, style, *words)
    found = list(figure.subplots(*((1, 2) if width > NARROW else (2, 1)), sharey=examples))
    for axes, (name, lines) in zip(found, panels.items(), strict=True):
        axes.set(xlabel=x[0], ylabel=name)
        for place, (label, y) in enumerate(lines.items()):
            axes.plot(x[1], y, label=label, marker="o" * examples, markersize=4.5, **line_style(place))
        panel_legend(axes)
    return found


def save(draw: Callable[..., None], found: Any, path: Path, style: FigureStyle = DEFAULT_STYLE) -> None:
    """Write to `path` what `draw(figure, found, style)` draws. Raises FileError."""
    write_atomically(path, rendered(lambda figure: draw(figure, found, style), check_path(path)))


def name_rows(axes: Axes, heights: Sequence[float], names: Iterable[str], **style: Any) -> None:
    """Names at the heights of bars or dots in place of an axis, and a grid for their lengths."""
    axes.set_yticks(heights, list(names), parse_math=False, **style)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=PALE, alpha=0.25, linewidth=0.8)


def plain_ticks(axes: Axes, finest: int | None = None) -> None:
    """Round numbers of steps on a logarithmic axis, fewer where it is short; see `plain_numbers`."""
    short = axes.bbox.width < SHORT_AXIS * axes.figure.dpi
    plain_numbers(axes.xaxis, *axes.get_xlim(), finest or (2 if short else 3))


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
