"""Columns, cells and footnotes of a comparison."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bncli.report.compare.text import (
    common_ratio,
    comparison_columns,
    footnotes,
    metric_range,
    ratio_cell,
    steps_cell,
    subtitle,
    title,
    tuning_columns,
)
from bncli.report.text import UNKNOWN, Cell
from bncli.results.compare import Ratio, Steps, TuningCell
from bncli.results.environment import Interval


@pytest.mark.parametrize(
    ("name", "arm", "changes", "cell"),
    [
        ("censored reference", 0, {}, Cell("> 3,000")),
        ("censored reference", 0, {"steps": Steps(None, Interval(2104.0, None), "bound")}, Cell("> 3,000", "> 2,104")),
        ("no runs yet", 0, {}, Cell(UNKNOWN)),
        ("six arms", 5, {}, Cell("diverged")),
        ("six arms", 3, {}, Cell("median 1,911", "> 1,750")),
    ],
)
def test_steps_are_a_mean_a_median_a_bound_or_unknown(examples, name, arm, changes, cell):
    assert steps_cell(replace(examples[name].arms[arm], **changes), 3000) == cell


@pytest.mark.parametrize(
    ("ratio", "cell"),
    [
        (None, Cell("1", "reference")),
        (Ratio(12.13, Interval(9.81, 14.94), "means", 0.0), Cell("12.1x", "9.81–14.9")),
        (Ratio(4.0, Interval(3.1, None), "rank", 0.01), Cell("4.00x", "> 3.10")),
        (Ratio(None, Interval(4.1, None), "bound", 0.01), Cell("> 4.10x")),
        (Ratio(None, Interval(None, 0.29), "bound", 0.01), Cell("< 0.290x")),
        (Ratio(None, Interval(None, None), "bound", None), Cell(UNKNOWN)),
        (Ratio(None, Interval(None, None), "none", None), Cell(UNKNOWN)),
    ],
)
def test_a_ratio_is_a_figure_with_its_interval_or_a_bound_or_unknown(ratio, cell):
    assert ratio_cell(ratio) == cell


def test_the_columns_are_those_of_the_question(examples):
    headers = [column.name for column in comparison_columns(examples["two fields"]) if not column.optional]
    assert headers == [
        "arm", "lr", "momentum", "hits", "steps to target", "fewer steps", "best accuracy", "samples/s", "memory MiB",
    ]  # fmt: skip


def test_every_arm_has_a_cell_in_every_column(example):
    assert {len(column.cells) for column in comparison_columns(example)} == {len(example.arms)}


def test_only_marks_in_use_are_explained(examples):
    columns = {column.header: column.cells for column in comparison_columns(examples["two fields"])}
    assert columns["lr"] == (Cell("1*"), Cell("1*"))
    assert columns["momentum"] == (Cell("0.9*"), Cell("0", "fixed"))
    notes = footnotes(examples["two fields"])
    assert any(note.startswith("*:") for note in notes)
    assert any(note.startswith("fixed:") for note in notes)
    assert not any(note.startswith(("*:", "fixed:")) for note in footnotes(examples["censored reference"]))


def test_the_methods_in_use_are_named_and_no_other(examples):
    two, six = (" ".join(footnotes(examples[name])) for name in ("two arms", "six arms"))
    assert "repeating the choice of each arm's best point" in two
    assert "median:" not in two
    assert "order statistics" not in two
    assert "> 2,308: at least half of the runs missed the target; a budget of 3,000 steps shows up to 2,308" in six
    assert "ratio of medians (order statistics of both)" in six
    assert "as > or <: a bound" in six


def test_the_notes_of_the_comparison_come_first(examples):
    assert footnotes(examples["six arms"])[:3] == [
        "52 of 56 runs are done, 1 failed; the figures are based on those",
        "careful xavier initialization: lr 0.3, seed 106 failed: worker killed by signal 9",
        "small learning rate: 5 of 5 runs diverged and count as misses",
    ]


def test_each_machine_is_named_once_with_its_versions(examples):
    found = examples["two arms"]
    one = "Made on cpu (Example CPU <4 GHz>, Linux x86_64), 1 thread per run, torch 2.13.0, Python 3.12.1, bncli 0.1.0."
    assert [note for note in footnotes(found) if note.startswith("Made on")] == [one]
    first = found.runs[0]
    gpu = replace(first.result.environment, device="cuda", driver="580.1", tf32=True)
    runs = (replace(first, result=replace(first.result, environment=gpu)), *found.runs[1:])
    notes = [note for note in footnotes(replace(found, runs=runs)) if note.startswith("Made on")]
    assert len(notes) == 2
    assert "driver 580.1, TF32, torch" in notes[0]


def test_the_title_names_data_target_budget_and_seeds(examples):
    found = examples["falling loss"]
    assert title(found) == "digits: optimizer steps to held-out loss 0.1"
    assert subtitle(found.plan).endswith(
        "; 3 seeds at every point of the grid, 10 more at points that may be the best; budget 3,000 steps"
    )
    assert "; 1 seed at every point of the grid" in subtitle(replace(found.plan, tune_seeds=(0,)))
    assert subtitle(replace(found.plan, tune_seeds=())).endswith("; 10 seeds per arm; budget 3,000 steps")
    assert subtitle(found.plan).startswith("digits, 1,297 training")


@pytest.mark.parametrize("point", [(2000.0, 1e9, 1e9, 1e9), (2000.0, float("nan"), 0.0, float("inf"))])
def test_a_huge_or_infinite_loss_does_not_stretch_the_axis(examples, point):
    found = examples["falling loss"]
    wild = replace(found.arms[0], curve=(*found.arms[0].curve, point))
    low, high = metric_range(replace(found, arms=(wild, found.arms[1])))
    assert low < found.plan.target.value
    assert high < 5
    if math.isnan(point[1]):
        assert (low, high) == metric_range(found)


BUDGET = 3000


def cell(hits: int, steps: float | None, runs: int = 3, diverged: int = 0) -> TuningCell:
    return TuningCell({"optimizer.lr": 0.3}, hits, runs, steps, diverged)


@pytest.mark.parametrize(
    ("arm", "reference", "text"),
    [
        (cell(3, 50.0), cell(3, 600.0), "12.0x"),
        # Misses on one side count as the budget and make a bound.
        (cell(3, 300.0), cell(0, None), "> 10.0x"),
        (cell(0, None), cell(3, 300.0), "< 0.100x"),
        (cell(3, 300.0, 3), cell(1, 300.0, 2), "> 3.16x"),  # sqrt(300 * 3000) / 300
        (cell(0, None, diverged=3), cell(3, 1500.0), "< 0.500x"),
        # Misses on both sides, no runs, or no geometric mean (at the target before training).
        (cell(1, 300.0), cell(2, 300.0), UNKNOWN),
        (cell(3, 300.0), cell(0, None, runs=0), UNKNOWN),
        (cell(3, None), cell(3, 300.0), UNKNOWN),
    ],
)
def test_the_ratio_at_one_grid_value(arm, reference, text):
    assert common_ratio(arm, reference, BUDGET) == text


def test_never_and_diverged_are_words(examples):
    columns = {column.header: column.cells for column in tuning_columns(examples["two arms"])}
    assert columns["lr 0.03"][0] == Cell("never 0/3")
    assert columns["lr 3"][1] == Cell("diverged", "< 0.349x")


def test_the_longest_field_goes_across_and_the_others_down(examples):
    columns = tuning_columns(examples["two fields"])
    assert [column.header for column in columns] == ["arm", "lr 0.1", "lr 0.3", "lr 1"]
    assert columns[0].cells == (
        Cell("plain", "momentum 0"),
        Cell("plain", "momentum 0.9"),
        Cell("batch norm", "momentum 0 fixed"),
    )


def test_an_arm_is_compared_at_the_same_values_of_all_fields(examples):
    columns = {column.header: column.cells for column in tuning_columns(examples["two fields"])}
    assert columns["lr 0.1"][2] == Cell("98.0 3/3", "27.7x")  # plain took 2711 at momentum 0


def test_a_value_that_an_arm_fixes_is_named_beside_it(examples):
    columns = tuning_columns(examples["six arms"])
    assert columns[0].cells[2] == Cell("batch norm with a learning rate x5", "lr 1.5 fixed")
    assert all(column.cells[2] == Cell(UNKNOWN) for column in columns[1:])


def test_a_reference_that_is_not_there_leaves_out_the_ratios(examples):
    found = examples["two arms"]
    without = replace(found, arms=found.arms[1:])
    assert not any(cell.aside for column in tuning_columns(without)[1:] for cell in column.cells)


def test_what_probes_took_is_said_once_for_each_run(examples):
    found = examples["two arms"]
    run = next(run for run in found.runs if run.result is not None)
    result = replace(run.result, probes_s=3.0, training_s=1.5, evaluation_s=0.5)
    probed = replace(found, runs=(replace(run, result=result),) * 2)
    (note,) = [note for note in footnotes(probed) if "Probes" in note]
    assert note.startswith("Probes took 3.00 s beside 2.00 s of training and evaluations in 1 run; ")
    assert not any("Probes" in note for note in footnotes(found))
