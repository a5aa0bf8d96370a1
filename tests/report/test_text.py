"""Figures, settings and intervals as text."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from bncli.report import text
from bncli.report.text import (
    UNKNOWN,
    Cell,
    Column,
    encodable,
    figure,
    finding_text,
    interval_figure,
    metric_figure,
    setting,
    short_names,
)
from bncli.results.environment import Interval
from bncli.results.finding import Finding, FindingKind
from bncli.results.serialize import from_plain, to_plain


@pytest.mark.parametrize(
    ("value", "shown"),
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
def test_a_figure_has_three_digits_and_an_unknown_one_is_a_dash(value, shown):
    assert figure(value) == shown


def test_an_accuracy_has_four_decimals_and_a_loss_four_digits():
    assert metric_figure(0.95, "accuracy") == "0.9500"
    assert metric_figure(12.3456, "loss") == "12.35"
    assert metric_figure(None, "accuracy") == UNKNOWN
    assert metric_figure(float("nan"), "accuracy") == "nan"


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (9.81, 14.94, "9.81–14.9"),
        (-0.35, -0.27, "-0.350..-0.270"),
        (-2.0, None, "> -2.00"),
        (3.1, None, "> 3.10"),
        (None, 0.61, "< 0.610"),
        (None, None, ""),
    ],
)
def test_an_interval_with_an_open_side_is_a_bound(low, high, shown):
    assert interval_figure(Interval(low, high)) == shown


def test_a_setting_is_spelled_as_in_a_recipe():
    values = [0.3, 3e-05, 10, True, None, "he", [100, 100]]
    assert [setting(value) for value in values] == ["0.3", "3e-05", "10", "true", "null", "he", "[100, 100]"]


def test_fields_that_end_alike_keep_their_whole_names():
    names = short_names(("optimizer.momentum", "norm.momentum", "optimizer.lr"))
    assert list(names.values()) == ["optimizer.momentum", "norm.momentum", "lr"]


def test_control_characters_are_replaced_before_a_table_is_laid_out():
    assert encodable("a\x1b\x9b\n", "utf-8") == "a\u241b\ufffd\n"


def test_characters_that_an_encoding_lacks_are_replaced():
    assert encodable("9.81–14.9 naïve", "utf-8") == "9.81–14.9 naïve"
    assert encodable("9.81–14.9 naïve ±2%", "ascii") == "9.81-14.9 na?ve +-2%"
    assert encodable("9.81–14.9 naïve ±2%", "latin-1") == "9.81-14.9 naïve ±2%"


def test_a_cell_and_a_header_on_one_line():
    assert [Cell("1", aside).line for aside in ("", "0.9–1.1", "±2%")] == ["1", "1 (0.9–1.1)", "1 ±2%"]
    assert [Column(header, []).name for header in ("steps to\ntarget", "samples\n/s")] == [
        "steps to target",
        "samples/s",
    ]


# --- findings -----------------------------------------------------------------------------------------------------


FINDINGS = {
    "": Finding("right", "dx", 0.3),
    "dx[0, 1, 2, 3] is 1.5; expected 2; relative error 0.1": Finding(
        "off", "dx", 7.0, at=(0, 1, 2, 3), found=1.5, expected=2.0, relative=0.1
    ),
    "forward[1] is 1.5; expected nan": Finding("nan_missing", "forward", at=(1,), found=1.5, expected=math.nan),
    "dx[1, 0] is -inf; expected 2": Finding(
        "nan_unexpected", "dx", at=(1, 0), found=-math.inf, expected=2.0, relative=None
    ),
    "the sum of dx is 0.5; expected 0 within 0.012": Finding(
        "off", "the sum of dx", 3.0, found=0.5, expected=0.0, allowed=0.012
    ),
    "dx is not finite everywhere": Finding("nan_unexpected", "dx"),
    "dx is not 0": Finding("not_zero", "dx"),
    "returned a list; expected a tensor": Finding("wrong_type", given="list", wanted="a tensor"),
    "raised WrongResult: returned a Tensor; expected the three tensors (y, mean, var)": Finding(
        "wrong_type", given="Tensor", wanted="the three tensors (y, mean, var)", exception="WrongResult"
    ),
    "raised WrongResult: returned mean and var of shapes (3, 1) and (3,); expected (3,)": Finding(
        "wrong_shape", given="(3, 1) and (3,)", wanted="(3,)", exception="WrongResult"
    ),
    "y has shape (4, 2); expected the input's, (4, 3)": Finding("wrong_shape", given="(4, 2)", wanted="(4, 3)"),
    "y has dtype torch.float32; expected the input's, torch.float16": Finding(
        "wrong_dtype", given="torch.float32", wanted="torch.float16"
    ),
    "y has device cpu; expected the input's, cuda:0": Finding("wrong_device", given="cpu", wanted="cuda:0"),
    "double backward in x was not computed": Finding("not_computed", "double backward in x"),
    "dweight is missing when x does not require a gradient": Finding("no_gradient", "dweight"),
    "raised ValueError: no": Finding("raised", exception="ValueError", text="no"),
    "raised RuntimeError: modified": Finding("saved_written", exception="RuntimeError", text="modified"),
    "raised NoSecondDerivative: the gradients were returned without a graph: no second derivative": Finding(
        "no_second_derivative", exception="NoSecondDerivative"
    ),
    "GradcheckError: Jacobian": Finding("not_derivative", exception="GradcheckError", text="Jacobian"),
    "dx differs from central differences of the loss by 0.27 (relative)": Finding(
        "not_derivative", "dx", relative=0.27
    ),
    "raised TypeError: no; expected a ValueError": Finding("wrong_exception", exception="TypeError", text="no"),
    "accepted an input (1, 3), whose variance is 0 over one value; expected a ValueError": Finding(
        "accepted", given="(1, 3)"
    ),
    "x, weight changed during the call": Finding("input_written", names=("x", "weight")),
    "running_mean changed during the call in evaluation mode": Finding("running_moved", names=("running_mean",)),
    "running_var changed on an empty batch": Finding("running_moved_by_nothing", names=("running_var",)),
    "dx, dweight differ between two runs on the same inputs": Finding("not_deterministic", names=("dx", "dweight")),
}


@pytest.mark.parametrize("words", FINDINGS)
def test_a_finding_in_words(words: str) -> None:
    assert finding_text(FINDINGS[words]) == words


def test_every_kind_of_finding_has_words() -> None:
    assert {*text.FINDINGS, "off", "nan_missing", "nan_unexpected"} == set(get_args(FindingKind))
    assert set(text.RAISED) <= set(text.FINDINGS)


def test_a_finding_passes_up_to_its_tolerance() -> None:
    assert not Finding("right", "dx", 1.0).failed
    assert Finding("off", "dx", 1.01).failed
    assert Finding("nan_unexpected", "dx", math.nan).failed
    assert from_plain(Finding, to_plain(Finding("off", "dx", 3.0, at=(0, 1)))) == Finding("off", "dx", 3.0, at=(0, 1))
