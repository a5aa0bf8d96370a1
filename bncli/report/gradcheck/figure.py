"""Figures to teach with: dL/dx in its three parts, and the bias that grows while the loss stands still."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bncli.names import NORMS
from bncli.report.figure import FigureStyle, two_panels
from bncli.report.text import count, figure
from bncli.results.gradcheck import BiasStep, Gradcheck

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_parts(picture: Figure, found: Gradcheck, style: FigureStyle) -> None:
    """Put the parts of the first case's gradient, at each value that shares a mean, on an empty figure."""
    case, spread = found.paths[0], "covariance" if NORMS[found.norm].whitens else "variance"
    x, direct, mean, other = zip(*case.values, strict=True)
    title = f"A gradient that ignores mean and {spread} is off by {case.lost:.0%}"
    note = (
        f"{found.norm} norm, {case.case}: the {count(len(x), 'value')} that share a mean. The part through the mean is "
    )
    note += f"the same for all{'' if spread == 'covariance' else ', that through the variance a straight line in x'}."
    parts = {"direct": direct, "through the mean": mean, f"through the {spread}": other}
    whole = {"direct part alone": direct, "all three: dL/dx": [sum(each[1:]) for each in case.values]}
    two_panels(picture, style, (title, note), ("x", x), {"parts of dL/dx": parts, "dL/dx": whole}, examples=True)


def draw_demo(picture: Figure, steps: Sequence[BiasStep], style: FigureStyle) -> None:
    """Put the two descents of section 2 on an empty figure."""
    title = f"Ignoring that E[x] contains b drives b to {figure(steps[-1].bias_ignoring)}, and the loss stands still"
    note = "xhat = u + b - E[u + b]: subtracting the mean removes b (Ioffe & Szegedy 2015, section 2)."
    panels = {
        name: {
            "E[x] held constant": [getattr(each, f"{field}_ignoring") for each in steps],
            "full gradient": [getattr(each, f"{field}_full") for each in steps],
        }
        for name, field in (("bias b", "bias"), ("loss", "loss"))
    }
    for axes in two_panels(picture, style, (title, note), ("step", [each.step for each in steps]), panels):
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
