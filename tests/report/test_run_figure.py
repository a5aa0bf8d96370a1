"""The figure of one run: curves, targets, and what the probes measured beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bncli.report.figure import DEFAULT_STYLE, FigureStyle, save
from bncli.report.layers import Arm, has_layers
from bncli.report.layers import draw as draw_layers
from bncli.report.run_figure import draw
from bncli.results.train import Evaluation, ProbePoint, Target, TargetReached
from tests.report.conftest import check_everything_is_inside, laid_out

pytest.importorskip("matplotlib")

EVALUATIONS = tuple(Evaluation(step, 1 - 0.9 / (1 + step), 2 / (1 + step), 1.0) for step in (0, 1, 10, 100))
PROBES = tuple(ProbePoint("gradients", "hidden1.linear", step, {"norm": 1.0 + step}) for step in (0, 1, 10))


def panels(run: Arm, style: FigureStyle = DEFAULT_STYLE) -> Any:
    from matplotlib.figure import Figure

    figure = Figure()
    draw(figure, run, style)
    return figure, figure.axes


@pytest.fixture
def run(make_result: Any) -> Arm:
    also = (TargetReached(Target("accuracy", 0.99), None, None), TargetReached(Target("loss", 0.5), 5.0, 10))
    return Arm(0, "digits", [3], [replace(make_result(81.2), evaluations=EVALUATIONS, also=also)])


def test_the_curves_have_their_targets_and_where_they_were_reached(run: Arm) -> None:
    figure, (accuracy, loss) = panels(run)
    assert list(accuracy.lines[0].get_xdata()) == [1, 10, 100]
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == [
        "held out",
        "0.95 in 81.2 steps",
        "0.99 not reached",
    ]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["held out", "training", "0.5 in 5.00 steps"]
    assert ([81.2], [0.95]) in [(list(line.get_xdata()), list(line.get_ydata())) for line in accuracy.lines]
    assert figure.get_suptitle() == "digits: reached its target held-out accuracy 0.95"


def test_a_narrow_figure_has_its_panels_below_each_other_and_a_paper_has_no_caption(run: Arm) -> None:
    figure, (above, below) = panels(run, FigureStyle(3.5, caption=False))
    assert figure.get_figwidth() == 3.5
    assert above.get_position().y0 > below.get_position().y1
    assert figure.get_suptitle() == ""


@pytest.mark.parametrize("changes", [{"evaluations": EVALUATIONS[:1]}, {"target": None, "also": ()}])
def test_a_run_without_curves_or_targets_can_be_drawn(run: Arm, changes: dict[str, Any], tmp_path: Path) -> None:
    bare = run._replace(runs=[replace(run.runs[0], **changes)])
    assert not has_layers(bare)
    save(draw, bare, tmp_path / "run.svg")


def test_what_the_probes_measured_is_drawn_beside_it(run: Arm, tmp_path: Path) -> None:
    probed = run._replace(runs=[replace(run.runs[0], probes=PROBES)])
    assert has_layers(probed)
    save(draw_layers, probed, tmp_path / "run-layers.svg")
    text = (tmp_path / "run-layers.svg").read_text()
    assert "<!-- digits: inside the layers -->" in text
    assert "<!-- norm of the weight gradient -->" in text
    assert "median over" not in text


@pytest.mark.parametrize("width", [3.3, 10.0])
def test_the_legend_stands_above_its_panel_and_inside_the_figure(run: Arm, width: float) -> None:
    figure = laid_out(lambda picture: draw(picture, run, FigureStyle(width)))
    check_everything_is_inside(figure, width)
    for panel in figure.axes:
        assert panel.get_legend().get_window_extent().y0 >= panel.get_window_extent().y1
