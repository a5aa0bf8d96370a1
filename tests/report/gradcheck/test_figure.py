"""The teaching figures: the parts add up to dL/dx, and the bias that grows while the loss stands still."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bncli.report.figure import DEFAULT_STYLE, FigureStyle
from bncli.report.gradcheck.figure import draw_demo, draw_parts
from bncli.results.gradcheck import BiasStep
from tests.report.gradcheck.made_up_checks import GOOD, PATHS

pytest.importorskip("matplotlib")

VALUES = ((-1.0, 2.0, -0.5, 0.5), (0.0, -1.0, -0.5, 0.0), (1.0, 0.5, -0.5, -0.5))
CHECKED = replace(GOOD, paths=(replace(PATHS[0], values=VALUES), *PATHS[1:]))
STEPS = (BiasStep(0, 0.0, 1.5, 0.0, 1.5), BiasStep(10, 1.17, 1.5, 0.0, 1.5), BiasStep(1000, 116.8, 1.5, -1e-17, 1.5))


def drawn(draw: Callable[..., None], found: Any, style: FigureStyle = DEFAULT_STYLE) -> Any:
    from matplotlib.figure import Figure

    figure = Figure()
    draw(figure, found, style)
    return figure


def lines(figure: Any) -> list[dict[str, list[float]]]:
    """For each panel its lines: name -> y."""
    return [{line.get_label(): list(line.get_ydata()) for line in axes.lines} for axes in figure.axes]


def test_the_three_parts_of_each_value_add_up_to_the_gradient() -> None:
    figure = drawn(draw_parts, CHECKED)
    parts, whole = lines(figure)
    assert parts == {"direct": [2, -1, 0.5], "through the mean": [-0.5] * 3, "through the variance": [0.5, 0, -0.5]}
    assert whole == {"direct part alone": [2, -1, 0.5], "all three: dL/dx": [2, -1.5, -0.5]}
    assert figure.get_suptitle() == "A gradient that ignores mean and variance is off by 28%"


def test_a_norm_that_whitens_has_a_part_through_the_covariance() -> None:
    figure = drawn(draw_parts, replace(CHECKED, norm="whiten"))
    assert "through the covariance" in lines(figure)[0]
    assert figure.get_suptitle() == "A gradient that ignores mean and covariance is off by 28%"


def test_the_bias_grows_and_the_loss_stays() -> None:
    figure = drawn(draw_demo, STEPS)
    bias, loss = lines(figure)
    assert bias == {"E[x] held constant": [0, 1.17, 116.8], "full gradient": [0, 0, -1e-17]}
    assert loss == {"E[x] held constant": [1.5] * 3, "full gradient": [1.5] * 3}
    assert figure.get_suptitle() == "Ignoring that E[x] contains b drives b to 117, and the loss stands still"


def test_a_narrow_figure_has_its_panels_below_each_other_and_a_paper_has_no_title() -> None:
    figure = drawn(draw_demo, STEPS, FigureStyle(4.0, caption=False))
    above, below = figure.axes
    assert above.get_position().y0 > below.get_position().y1
    assert (figure.get_figwidth(), figure.get_suptitle()) == (4.0, "")


def test_the_values_are_marked_and_the_parts_have_the_range_of_the_whole() -> None:
    left, right = drawn(draw_parts, CHECKED).axes
    assert {line.get_marker() for line in (*left.lines, *right.lines)} == {"o"}
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[0] < -1.5  # the least of the whole gradient, which is less than each part
