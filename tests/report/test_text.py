"""Figures and cells: what every rendering of a comparison says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bncli.report.text import (
    UNKNOWN,
    comparison_columns,
    encodable,
    figure,
    finding_text,
    footnotes,
    header_words,
    interval_figure,
    metric_figure,
    metric_range,
    ratio_cell,
    setting,
    short_names,
    steps_cell,
    subtitle,
    title,
)
from bncli.results.compare import Ratio, Steps
from bncli.results.environment import Interval
from bncli.results.finding import Finding
from bncli.results.serialize import from_plain, to_plain


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


def test_steps_of_a_censored_arm_are_above_the_budget(examples):
    plain = examples["censored reference"].arms[0]
    assert steps_cell(plain, 3000) == ("> 3,000", "")


def test_a_lower_bound_below_the_budget_is_shown_beside_it(examples):
    arm = replace(examples["censored reference"].arms[0], steps=Steps(None, Interval(2104.0, None), "bound"))
    assert steps_cell(arm, 3000) == ("> 3,000", "> 2,104")


def test_steps_of_an_arm_without_runs_are_unknown_and_never_above_the_budget(examples):
    assert steps_cell(examples["no runs yet"].arms[0], 3000) == (UNKNOWN, "")


def test_an_arm_of_which_every_run_diverged_says_so(examples):
    assert steps_cell(examples["six arms"].arms[5], 3000) == ("diverged", "")


def test_a_median_is_marked_as_one(examples):
    assert steps_cell(examples["six arms"].arms[3], 3000) == ("median 1,911", "> 1,750")


@pytest.mark.parametrize(
    ("ratio", "cell"),
    [
        (None, ("1", "reference")),
        (Ratio(12.13, Interval(9.81, 14.94), "means", 0.0), ("12.1x", "9.81–14.9")),
        (Ratio(4.0, Interval(3.1, None), "rank", 0.01), ("4.00x", "> 3.10")),
        (Ratio(None, Interval(4.1, None), "bound", 0.01), ("> 4.10x", "")),
        (Ratio(None, Interval(None, 0.29), "bound", 0.01), ("< 0.290x", "")),
        (Ratio(None, Interval(None, None), "bound", None), (UNKNOWN, "")),
        (Ratio(None, Interval(None, None), "none", None), (UNKNOWN, "")),
    ],
)
def test_a_ratio_is_a_figure_with_its_interval_or_a_bound_or_unknown(ratio, cell):
    assert ratio_cell(ratio) == cell


def test_the_columns_are_those_of_the_question(examples):
    headers = [header_words(column) for column in comparison_columns(examples["two fields"]) if not column.extra]
    assert headers == [
        "arm", "lr", "momentum", "hits", "steps to target", "times fewer", "best accuracy", "samples/s", "memory MiB",
    ]  # fmt: skip


def test_every_arm_has_a_cell_in_every_column(example):
    assert {len(column.cells) for column in comparison_columns(example)} == {len(example.arms)}


def test_fixed_and_edge_values_are_marked_and_the_marks_are_explained(examples):
    columns = {column.header[0]: column.cells for column in comparison_columns(examples["two fields"])}
    assert columns["lr"] == (("1*", ""), ("1*", ""))
    assert columns["momentum"] == (("0.9*", ""), ("0", "fixed"))
    notes = footnotes(examples["two fields"])
    assert any(note.startswith("*:") for note in notes)
    assert any(note.startswith("fixed:") for note in notes)


def test_marks_that_do_not_occur_are_not_explained(examples):
    notes = footnotes(examples["censored reference"])
    assert not any(note.startswith(("*:", "fixed:")) for note in notes)


def test_the_methods_in_use_are_named_and_no_other(examples):
    two, six = (" ".join(footnotes(examples[name])) for name in ("two arms", "six arms"))
    assert "repeats the choice of each arm's best point" in two
    assert "median:" not in two
    assert "order statistics" not in two
    assert "> 2,308: at least half of the runs missed; a budget of 3,000 steps shows up to 2,308" in six
    assert "ratio of medians (order statistics of both)" in six
    assert "as > or <: a bound" in six


def test_the_notes_of_the_comparison_come_first(examples):
    assert footnotes(examples["six arms"])[:3] == list(examples["six arms"].notes)


def test_the_machine_and_the_versions_are_named_once(examples):
    made = [note for note in footnotes(examples["two arms"]) if note.startswith("Made on")]
    assert made == [
        "Made on cpu (Example CPU <4 GHz>, Linux x86_64), 1 thread a run, torch 2.13.0, Python 3.12.1, bncli 0.1.0."
    ]


def test_a_second_machine_is_named_too(examples):
    found = examples["two arms"]
    first = found.runs[0]
    elsewhere = replace(
        first.result, environment=replace(first.result.environment, device="cuda", driver="580.1", tf32=True)
    )
    notes = footnotes(replace(found, runs=(replace(first, result=elsewhere), *found.runs[1:])))
    assert sum(note.startswith("Made on") for note in notes) == 2
    assert any("driver 580.1, TF32, torch" in note for note in notes)


def test_the_title_names_data_target_budget_and_seeds(examples):
    found = examples["falling loss"]
    assert title(found) == "digits: optimizer steps to held-out loss 0.1"
    assert subtitle(found.plan).endswith(
        "; 3 seeds at every point of the grid, 10 more where it may be the best; budget 3,000 steps"
    )
    assert subtitle(replace(found.plan, tune_seeds=())).endswith("; 10 seeds an arm; budget 3,000 steps")
    assert subtitle(found.plan).startswith("digits, 1,297 training")


def test_a_loss_far_above_where_the_arms_began_does_not_stretch_the_axis(examples):
    found = examples["falling loss"]
    wild = replace(found.arms[0], curve=(*found.arms[0].curve, (2000.0, 1e9, 1e9, 1e9)))
    low, high = metric_range(replace(found, arms=(wild, found.arms[1])))
    assert low < found.plan.target.value
    assert high < 5


def test_a_curve_point_that_is_not_finite_is_left_out(examples):
    found = examples["falling loss"]
    broken = replace(found.arms[0], curve=(*found.arms[0].curve, (2000.0, float("nan"), 0.0, float("inf"))))
    assert metric_range(replace(found, arms=(broken, found.arms[1]))) == metric_range(found)


# --- findings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("finding", "text"),
    [
        (Finding("right", "dx", 0.3), ""),
        (
            Finding("off", "dx", 7.0, at=(0, 1, 2, 3), found=1.5, expected=2.0, relative=0.1),
            "dx[0, 1, 2, 3] is 1.5; expected 2; relative error 0.1",
        ),
        (Finding("nan_missing", "forward", at=(1,), found=1.5, expected=math.nan), "forward[1] is 1.5; expected nan"),
        (
            Finding("nan_unexpected", "dx", at=(1, 0), found=-math.inf, expected=2.0, relative=None),
            "dx[1, 0] is -inf; expected 2",
        ),
        (
            Finding("off", "the sum of dx", 3.0, found=0.5, expected=0.0, allowed=0.012),
            "the sum of dx is 0.5; expected 0 within 0.012",
        ),
        (Finding("nan_unexpected", "dx"), "dx is not finite everywhere"),
        (Finding("not_zero", "dx"), "dx is not 0"),
        (Finding("wrong_type", given="list", wanted="a tensor"), "returned a list; expected a tensor"),
        (
            Finding("wrong_type", given="Tensor", wanted="the three tensors (y, mean, var)", exception="WrongResult"),
            "raised WrongResult: returned a Tensor; expected the three tensors (y, mean, var)",
        ),
        (
            Finding("wrong_shape", given="(3, 1) and (3,)", wanted="(3,)", exception="WrongResult"),
            "raised WrongResult: returned mean and var of shapes (3, 1) and (3,); expected (3,)",
        ),
        (
            Finding("wrong_shape", given="(4, 2)", wanted="(4, 3)"),
            "y has shape (4, 2); expected the input's, (4, 3)",
        ),
        (
            Finding("wrong_dtype", given="torch.float32", wanted="torch.float16"),
            "y has dtype torch.float32; expected the input's, torch.float16",
        ),
        (Finding("wrong_device", given="cpu", wanted="cuda:0"), "y has device cpu; expected the input's, cuda:0"),
        (Finding("not_computed", "double backward in x"), "double backward in x was not computed"),
        (Finding("no_gradient", "dweight"), "dweight is missing where x needs no gradient"),
        (Finding("raised", exception="ValueError", text="no"), "raised ValueError: no"),
        (Finding("saved_written", exception="RuntimeError", text="modified"), "raised RuntimeError: modified"),
        (
            Finding("no_second_derivative", exception="NoSecondDerivative"),
            "raised NoSecondDerivative: the gradients came back without a graph: nothing to differentiate again",
        ),
        (Finding("not_derivative", exception="GradcheckError", text="Jacobian"), "GradcheckError: Jacobian"),
        (
            Finding("not_derivative", "dx", relative=0.27),
            "dx misses central differences of the loss by 0.27 (relative)",
        ),
        (
            Finding("wrong_exception", exception="TypeError", text="no"),
            "raised TypeError: no; expected a ValueError",
        ),
        (
            Finding("accepted", given="(1, 3)"),
            "an input (1, 3) has a variance of 0 over one value; expected a ValueError",
        ),
        (Finding("input_written", names=("x", "weight")), "x, weight changed during the call"),
        (
            Finding("running_moved", names=("running_mean",)),
            "running_mean changed during the call, in evaluation",
        ),
        (Finding("running_moved_by_nothing", names=("running_var",)), "running_var moved"),
        (
            Finding("not_deterministic", names=("dx", "dweight")),
            "dx, dweight differ between two runs on the same inputs",
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, Finding) else "",
)
def test_a_finding_in_words(finding: Finding, text: str) -> None:
    assert finding_text(finding) == text


def test_a_finding_passes_up_to_its_tolerance() -> None:
    assert not Finding("right", "dx", 1.0).failed
    assert Finding("off", "dx", 1.01).failed
    assert Finding("nan_unexpected", "dx", math.nan).failed
    assert from_plain(Finding, to_plain(Finding("off", "dx", 3.0, at=(0, 1)))) == Finding("off", "dx", 3.0, at=(0, 1))
