"""Figures, settings and intervals as text."""

from __future__ import annotations

import pytest

from bncli.report.text import UNKNOWN, encodable, figure, interval_figure, metric_figure, setting, short_names
from bncli.results.environment import Interval


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12.13, "12.1"),
        (9.806, "9.81"),
        (1.0, "1.00"),
        (99.96, "100"),
        (999.6, "1,000"),
        (45231.4, "45,231"),
        (0.31, "0.310"),
        (0.00042, "0.000420"),
        (3e-7, "3.00e-07"),
        (-2.5, "-2.50"),
        (0.0, "0"),
        (1234567, "1,234,567"),
        (float("inf"), "inf"),
        (None, "–"),
    ],
)
def test_a_figure_has_three_digits_or_its_whole_part_and_an_unknown_one_is_a_dash(value, text):
    assert figure(value) == text


def test_an_accuracy_has_four_decimals_and_a_loss_four_digits():
    assert metric_figure(0.95, "accuracy") == "0.9500"
    assert metric_figure(12.3456, "loss") == "12.35"
    assert metric_figure(None, "accuracy") == UNKNOWN
    assert metric_figure(float("nan"), "accuracy") == "nan"


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [(9.81, 14.94, "9.81–14.9"), (3.1, None, "> 3.10"), (None, 0.61, "< 0.610"), (None, None, "")],
)
def test_an_interval_with_an_open_side_is_a_bound(low, high, text):
    assert interval_figure(Interval(low, high)) == text


def test_a_setting_is_spelled_as_in_a_recipe():
    values = [0.3, 3e-05, 10, True, None, "he", [100, 100]]
    assert [setting(value) for value in values] == ["0.3", "3e-05", "10", "true", "null", "he", "[100, 100]"]


def test_fields_that_end_alike_keep_their_whole_names():
    names = short_names(("optimizer.momentum", "norm.momentum", "optimizer.lr"))
    assert list(names.values()) == ["optimizer.momentum", "norm.momentum", "lr"]


def test_text_without_place_in_an_encoding_loses_its_dashes_and_marks_the_rest():
    assert encodable("9.81–14.9 naïve", "utf-8") == "9.81–14.9 naïve"
    assert encodable("9.81–14.9 naïve", "ascii") == "9.81-14.9 na?ve"
