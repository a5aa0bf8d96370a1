"""Figure of one run: held-out accuracy, training and held-out loss over the steps, and where it reached its targets."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bncli.report import figure as figures
from bncli.report.figure import INK, FigureStyle
from bncli.report.layers import Arm
from bncli.report.text import figure, setting
from bncli.report.train import status_words
from bncli.results.train import TargetReached

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEY = "Diamond: steps spent below a target. Training loss: of the last batch before each evaluation."


def draw(picture: Figure, run: Arm, style: FigureStyle) -> None:
    """Put a panel of the accuracy and one of the losses on an empty figure."""
    result = run.runs[0]
    later = [each for each in result.evaluations if each.step > 0]
    curves = [(each.step, each.accuracy, each.loss, each.train_loss or math.nan) for each in later]
    steps, accuracy, loss, training = zip(*figures.thinned(curves), strict=True) if later else [()] * 4
    words = f"{run.name}: {status_words(result)}", f"{KEY} {figures.THINNED * (len(later) > figures.MOST_PLACES)}"
    lines = {"accuracy": {"held out": accuracy}, "loss": {"held out": loss, "training": training}}
    panels = dict(zip(lines, figures.two_panels(picture, style, words, ("optimizer steps", steps), lines), strict=True))
    reached = TargetReached(result.target, result.steps_to_target, result.first_hit) if result.target else None
    for each in filter(None, (reached, *result.also)):
        panel, value = panels[each.target.metric], each.target.value
        panel.axhline(value, **figures.DASHED)
        label = f"{setting(value)} {'not reached' if each.steps is None else f'in {figure(each.steps)} steps'}"
        at = ([each.steps], [value]) if each.steps else ([], [])
        panel.plot(*at, "D", color=INK, markerfacecolor=INK if each is reached else "white", markersize=5, label=label)
        figures.panel_legend(panel)
    for panel in panels.values() if later else ():
        panel.set_xscale("log")
        figures.plain_ticks(panel)
