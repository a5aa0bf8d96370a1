"""The teaching figures: the parts add up to dL/dx, and the bias that grows while the loss stands still."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bncli.report.figure import DEFAULT_STYLE, FigureStyle
from bncli.report.gradcheck.figure import plot_demo, plot_parts
from bncli.results.gradcheck import BiasStep
from tests.report.gradcheck.made_up_checks import GOOD, PATHS

pytest.importorskip("matplotlib")

VALUES = ((-1.0, 2.0, -0.5, 0.5), (0.0, -1.0, -0.5, 0.0), (1.0, 0.5, -0.5, -0.5))
CHECKED = replace(GOOD, paths=(replace(PATHS[0], values=VALUES), *PATHS[1:]))
STEPS = (BiasStep(0, 0.0, 1.5, 0.0, 1.5), BiasStep(10, 1.17, 1.5, 0.0, 1.5), BiasStep(1000, 116.8, 1.5, -1e-17, 1.5))


def lines(plot: Callable[..., Any], found: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """For each panel the lines of its figure, which is written too: name -> y."""
    from matplotlib.figure import Figure

    seen = []
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (seen.append(figure), saved(figure, *a, **k))[1])
    assert plot(found, path, DEFAULT_STYLE) == [path]
    return [{line.get_label(): list(line.get_ydata()) for line in axes.lines} for axes in seen[0].axes]


def test_the_three_parts_of_each_value_add_up_to_the_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, whole = lines(plot_parts, CHECKED, tmp_path / "parts.svg", monkeypatch)
    assert parts == {"direct": [2, -1, 0.5], "through the mean": [-0.5] * 3, "through the variance": [0.5, 0, -0.5]}
    assert whole == {"direct part alone": [2, -1, 0.5], "all three: dL/dx": [2, -1.5, -0.5]}
    text = (tmp_path / "parts.svg").read_text()
    assert "A gradient that ignores mean and variance is off by 28%" in text


def test_a_norm_that_whitens_has_a_part_through_the_covariance(tmp_path: Path) -> None:
    plot_parts(replace(CHECKED, norm="whiten"), tmp_path / "parts.svg", DEFAULT_STYLE)
    text = (tmp_path / "parts.svg").read_text()
    assert "through the covariance" in text
    assert "variance is" not in text.replace("covariance is", "")


def test_the_bias_grows_and_the_loss_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bias, loss = lines(plot_demo, STEPS, tmp_path / "demo.svg", monkeypatch)
    assert bias == {"E[x] held constant": [0, 1.17, 116.8], "full gradient": [0, 0, -1e-17]}
    assert loss == {"E[x] held constant": [1.5] * 3, "full gradient": [1.5] * 3}
    assert (
        "Ignoring that E[x] contains b drives b to 117, and the loss stands still"
        in (tmp_path / "demo.svg").read_text()
    )


def test_a_paper_has_no_title(tmp_path: Path) -> None:
    plot_demo(STEPS, tmp_path / "demo.svg", FigureStyle(4.0, caption=False))
    assert "stands still" not in (tmp_path / "demo.svg").read_text()
