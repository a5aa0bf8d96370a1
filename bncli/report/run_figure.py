"""Figure of one run: held-out accuracy, training and held-out loss over the steps, and where it reached its targets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bncli.report import figure as figures
from bncli.report import layers
from bncli.report.figure import DEFAULT_STYLE, INK, NARROW, PALE, FigureStyle, line_style
from bncli.report.files import write_atomically
from bncli.report.text import figure, setting
from bncli.report.train import status_words
from bncli.results.train import TargetReached

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEY = "Diamond: steps spent below a target. Training loss: of the last batch before each evaluation."


def plot(run: layers.Arm, path: Path, style: FigureStyle = DEFAULT_STYLE) -> list[Path]:
    """Write the curves to `path` and what the probes measured beside it; where they are. Raises FileError."""
    content = figures.rendered(lambda picture: draw(picture, run, style), figures.check_path(path), 160)
    write_atomically(path, content)
    return [path, *([layers.plot(run, path, style)] if layers.has_layers(run) else [])]


def draw(picture: Figure, run: layers.Arm, style: FigureStyle = DEFAULT_STYLE) -> None:
    """Put a panel of the accuracy and one of the losses on an empty figure."""
    result, width = run.runs[0], style.width_inches or 10.0
    picture.set_size_inches(width, 4.2 if width > NARROW else 6.0)
    figures.write_caption(picture, style, f"{run.name}: {status_words(result)}", KEY)
    panels = dict(zip(("accuracy", "loss"), picture.subplots(*((1, 2) if width > NARROW else (2, 1))), strict=True))
    later = [each for each in result.evaluations if each.step > 0]
    for place, name in enumerate(("accuracy", "loss", "train_loss")):
        points = [(each.step, getattr(each, name)) for each in later]
        words = "training" if name == "train_loss" else "held out"
        panels["loss" if place else name].plot(*zip(*points, strict=True), label=words, **line_style(place))
    reached = TargetReached(result.target, result.steps_to_target, result.first_hit) if result.target else None
    for each in filter(None, (reached, *result.also)):
        axes, value = panels[each.target.metric], each.target.value
        axes.axhline(value, color=PALE, linestyle=(0, (5, 4)), linewidth=1, zorder=1)
        words = f"{setting(value)} {'not reached' if each.steps is None else f'in {figure(each.steps)} steps'}"
        at = ([each.steps], [value]) if each.steps else ([], [])
        axes.plot(*at, "D", color=INK, markerfacecolor=INK if each is reached else "white", markersize=5, label=words)
    for name, axes in panels.items():
        axes.set_title(name)
        axes.set_xlabel("optimizer steps")
        if later:
            axes.legend(frameon=False)
            axes.set_xscale("log")
            figures.plain_ticks(axes)
