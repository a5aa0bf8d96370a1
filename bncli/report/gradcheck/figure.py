"""Figures to teach with: dL/dx in its three parts, and the bias that grows while the loss stands still."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bncli.names import NORMS
from bncli.report.figure import FigureStyle, save, two_panels
from bncli.report.text import count, figure
from bncli.results.gradcheck import BiasStep, Gradcheck

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_parts(found: Gradcheck, path: Path, style: FigureStyle) -> list[Path]:
    """Write the parts of the first case at each of its values to `path`. Raises FileError."""
    return save(path, lambda picture: _parts(picture, found, style))


def plot_demo(steps: Sequence[BiasStep], path: Path, style: FigureStyle) -> list[Path]:
    """Write the two descents of section 2 to `path`. Raises FileError."""
    return save(path, lambda picture: _demo(picture, steps, style))


def _parts(picture: Figure, found: Gradcheck, style: FigureStyle) -> None:
    case = found.paths[0]
    spread = "covariance" if NORMS[found.norm].whitens else "variance"
    x, *parts = map(list, zip(*case.values, strict=True))
    names = ("direct", "through the mean", f"through the {spread}")
    whole = {"direct part alone": (x, parts[0]), "all three: dL/dx": (x, [sum(each[1:]) for each in case.values])}
    title = f"A gradient that ignores mean and {spread} is off by {case.lost:.0%}"
    note = f"{found.norm} norm, {case.case}: dL/dx of the {count(len(x), 'value')} that share a mean, float64."
    by_name = {name: (x, part) for name, part in zip(names, parts, strict=True)}
    for axes in two_panels(picture, style, (title, note), "x", by_name, whole):
        axes.set_ylabel("dL/dx")
        axes.legend(frameon=False)


def _demo(picture: Figure, steps: Sequence[BiasStep], style: FigureStyle) -> None:
    at, last = [each.step for each in steps], steps[-1]
    names = ("E[x] held constant", "full gradient")
    biases = [each.bias_ignoring for each in steps], [each.bias_full for each in steps]
    losses = [each.loss_ignoring for each in steps], [each.loss_full for each in steps]
    title = f"Ignoring that E[x] contains b drives b to {figure(last.bias_ignoring)}, and the loss stands still"
    note = "xhat = u + b - E[u + b]: subtracting the mean removes b (Ioffe & Szegedy 2015, section 2)."
    panels = ({name: (at, line) for name, line in zip(names, lines, strict=True)} for lines in (biases, losses))
    for axes, name in zip(two_panels(picture, style, (title, note), "step", *panels), ("bias b", "loss"), strict=True):
        axes.set_ylabel(name)
        axes.set_ylim(min(0, axes.get_ylim()[0]), 1.25 * axes.get_ylim()[1])
        axes.legend(frameon=False)
