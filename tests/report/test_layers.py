"""The figure of the layers: what is drawn for which probes, and the same bytes for the same comparison."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from bncli.report.figure import THINNED, FigureStyle, plain_numbers, rendered
from bncli.report.layers import draw, has_layers
from bncli.results.compare import Comparison
from bncli.results.train import ProbePoint
from tests.report.conftest import check_everything_is_inside, laid_out

pytest.importorskip("matplotlib")


def render(comparison: Comparison, kind: str) -> bytes:
    return rendered(lambda figure: draw(figure, comparison), kind)


STEPS = (0, 1, 10, 100, 1000)
LAYERS = ("hidden1", "hidden2", "hidden3")


def points(measures: Sequence[str], layers: Sequence[str] = LAYERS, value: float = 0.5) -> tuple[ProbePoint, ...]:
    values = {
        "inputs": {"unit_p15": -value, "unit_p50": 0.0, "unit_p85": value},
        "saturation": {"share": value},
        "gradients": {"norm": value},
        "shift": {"distance": value},
    }
    modules = {"inputs": "activation", "saturation": "activation", "gradients": "linear", "shift": "linear"}
    return tuple(
        ProbePoint(measure, f"{layer}.{modules[measure]}", step, values[measure])
        for step in STEPS
        for measure in measures
        for layer in layers
    )


def probed(comparison: Comparison, found: tuple[ProbePoint, ...]) -> Comparison:
    """The comparison with those points in every run, at each arm's best point."""
    best = {arm.arm: arm.point for arm in comparison.arms}
    runs = tuple(
        replace(run, point=best[run.arm], result=replace(run.result, probes=found)) if run.result else run
        for run in comparison.runs
    )
    return replace(comparison, runs=runs)


def panels(comparison: Comparison) -> list[list[str]]:
    """For each panel with curves: its title, its layer and its label below."""
    from matplotlib.figure import Figure

    figure = Figure()
    draw(figure, comparison)
    return [
        [axes.get_title().replace("\n", " ").replace("  ", " "), axes.get_ylabel(), axes.get_xlabel()]
        for axes in figure.axes
        if axes.lines
    ]


ALL = ("inputs", "saturation", "gradients", "shift")


def test_each_layer_has_a_row_and_each_measure_a_column_with_one_of_percentiles_for_each_arm(examples):
    found = panels(probed(examples["two arms"], points(ALL)))
    assert len(found) == 3 * 5
    assert [title for title, *_ in found[:5]] == [
        "inputs of one unit: plain",
        "inputs of one unit: batch norm",
        "saturated outputs (share)",
        "norm of the weight gradient",
        "covariate shift |G−G′|/|G|",
    ]
    assert [row for _, row, _ in found[::5]] == list(LAYERS)
    assert [below for *_, below in found[-5:]] == ["optimizer steps"] * 5


def test_a_measure_that_did_not_run_has_no_column(examples):
    found = panels(probed(examples["two arms"], points(["gradients"])))
    assert [title for title, *_ in found] == ["norm of the weight gradient", "", ""]


def test_the_steps_stand_below_the_last_panel_of_a_column_whose_layers_end_early(examples):
    some = points(["inputs"]) + points(["gradients"], [*LAYERS, "output"])
    found = panels(probed(examples["two arms"], some))
    assert [below for title, row, below in found if below] == ["optimizer steps"] * 3
    assert found[-1][2] == "optimizer steps"


def test_at_most_six_layers_and_three_arms_percentiles_are_drawn(examples):
    names = [f"block{k}" for k in range(20)]
    found = panels(probed(examples["six arms"], points(["inputs"], names)))
    rows = [row for _, row, _ in found if row]
    assert len(rows) == 6
    assert (rows[0], rows[-1]) == ("block0", "block19")
    assert len(found) == 6 * 3


def test_the_caption_says_whose_percentiles_are_drawn(examples):
    from matplotlib.figure import Figure

    shown = {}
    for name in ("two arms", "six arms"):
        draw(figure := Figure(), probed(examples[name], points(["inputs"])))
        shown[name] = " ".join(figure._supxlabel.get_text().split())
    assert "the first 3 of 6 arms" in shown["six arms"]
    assert " arms." not in shown["two arms"]


def test_layers_that_are_numbered_in_one_sequential_have_rows_of_their_own(examples):
    names = ("features.0", "features.2", "features.4")
    found = tuple(
        ProbePoint("gradients", name, step, {"norm": k + 1.0}) for step in STEPS for k, name in enumerate(names)
    )
    assert [row for _, row, _ in panels(probed(examples["two arms"], found))] == list(names)


def test_a_step_with_a_percentile_that_is_not_finite_is_left_out_as_a_whole(examples):
    last = points(["inputs"])[-1]
    wrong = replace(last, values={**last.values, "unit_p85": math.inf})
    assert render(probed(examples["two arms"], (*points(["inputs"])[:-1], wrong)), "svg")


def test_values_that_are_not_finite_are_left_out(examples):
    wrong = replace(points(["gradients"])[-1], values={"norm": math.nan})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render(probed(examples["two arms"], (*points(["gradients"])[:-1], wrong)), "svg")


def test_the_percentiles_of_a_layer_have_one_range_for_all_arms(examples):
    from matplotlib.figure import Figure

    both = examples["two arms"]
    wide = probed(both, points(["inputs"], value=4.0))
    mixed = replace(
        both,
        runs=tuple(
            large if large.arm == "plain" else small
            for large, small in zip(wide.runs, probed(both, points(["inputs"])).runs, strict=True)
        ),
    )
    figure = Figure()
    draw(figure, mixed)
    limits = [axes.get_ylim() for axes in figure.axes]
    assert limits[0] == limits[1]
    assert limits[0][1] >= 4


@pytest.mark.parametrize("name", ["six arms", "no grid"])
def test_a_probed_comparison_is_drawn_without_a_warning_and_always_alike(examples, name):
    comparison = probed(examples[name], points(ALL, LAYERS[:1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = render(comparison, "svg")
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert render(comparison, "svg") == svg


@pytest.mark.parametrize(("low", "high"), [(20, 60), (1, 60), (1, 4000), (0.3, 0.7), (1e-6, 1)])
@pytest.mark.parametrize("finest", [1, 3])
def test_a_logarithmic_axis_has_two_numbers_or_more(low, high, finest):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    plain_numbers(axes.xaxis, low, high, finest)
    assert len([tick for tick in axes.xaxis.get_majorticklocs() if low <= tick <= high]) >= 2


def test_a_comparison_without_probes_has_no_such_figure(example):
    assert not has_layers(example)


def test_measures_of_the_whole_network_alone_make_no_figure(examples):
    whole = (ProbePoint("landscape", None, 1, {"loss_range": 1.0}), ProbePoint("loss", None, 1, {"training": 1.0}))
    assert not has_layers(probed(examples["two arms"], whole))


@pytest.mark.parametrize(("width", "columns", "layers"), [(3.3, 2, 3), (6.8, 3, 4), (11.0, 5, 4)])
def test_a_narrow_figure_has_fewer_columns_beside_each_other_and_fewer_layers(examples, width, columns, layers):
    shown = probed(examples["two arms"], points(ALL, [*LAYERS, "hidden4"]))
    figure = laid_out(lambda figure: draw(figure, shown, FigureStyle(width)))
    check_everything_is_inside(figure, width)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 5 * layers
    assert len({round(axes.get_window_extent().x0) for axes in panels[: columns * layers]}) == columns
    assert (f"{layers} of 4 layers are drawn." in figure._supxlabel.get_text()) == (layers < 4)


def test_hundreds_of_probes_are_thinned_as_the_curves_are(examples):
    from matplotlib.figure import Figure

    many = tuple(replace(point, step=step) for step in range(1, 400) for point in points(["gradients", "inputs"])[:6])
    figure = Figure()
    draw(figure, probed(examples["two arms"], many))
    assert {len(line.get_xdata()) <= 150 for axes in figure.axes for line in axes.lines} == {True}
    assert THINNED in figure._supxlabel.get_text().replace("\n", " ")
