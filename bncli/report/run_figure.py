"""Figure of one run: held-out accuracy, training and held-out loss over the steps, and where it reached its targets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bncli.report import figure as figures
from bncli.report import layers
from bncli.report.figure import DEFAULT_STYLE, INK, PALE, FigureStyle
from bncli.report.text import figure, setting
from bncli.report.train import status_words
from bncli.results.train import TargetReached

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEY = "Diamond: steps spent below a target. Training loss: of the last batch before each evaluation."


def plot(run: layers.Arm, path: Path, style: FigureStyle = DEFAULT_STYLE) -> list[Path]:
    """Write the curves to `path` and what the probes measured beside it; where they are. Raises FileError."""
    written = figures.save(path, lambda picture: draw(picture, run, style))
    return [*written, *([layers.plot(run, path, style)] if layers.has_layers(run) else [])]


def draw(picture: Figure, run: layers.Arm, style: FigureStyle = DEFAULT_STYLE) -> None:
    """Put a panel of the accuracy and one of the losses on an empty figure."""
    result = run.runs[0]
    later: Any = [each for each in result.evaluations if each.step > 0]
    steps = [each.step for each in later]
    losses = {
        "held out": (steps, [each.loss for each in later]),
        "training": (steps, [each.train_loss for each in later]),
    }
    accuracy = {"held out": (steps, [each.accuracy for each in later])}
    words = f"{run.name}: {status_words(result)}", KEY
    panels = figures.two_panels(picture, style, words, "optimizer steps", accuracy, losses)
    reached = TargetReached(result.target, result.steps_to_target, result.first_hit) if result.target else None
    for each in filter(None, (reached, *result.also)):
        panel, value = panels[each.target.metric == "loss"], each.target.value
        panel.axhline(value, color=PALE, linestyle=(0, (5, 4)), linewidth=1, zorder=1)
        label = f"{setting(value)} {'not reached' if each.steps is None else f'in {figure(each.steps)} steps'}"
        at = ([each.steps], [value]) if each.steps else ([], [])
        panel.plot(*at, "D", color=INK, markerfacecolor=INK if each is reached else "white", markersize=5, label=label)
    for panel, name in zip(panels, ("accuracy", "loss"), strict=True):
        panel.set_title(name)
        panel.legend(frameon=False)
        if later:
            panel.set_xscale("log")
            figures.plain_ticks(panel)
