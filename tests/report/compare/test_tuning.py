"""The tuning table's cells and the ratio at a value that two arms share."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bncli.report.compare.tuning import common_ratio, tuning_columns
from bncli.report.text import UNKNOWN
from bncli.results.compare import TuningCell

BUDGET = 3000


def cell(hits: int, steps: float | None, runs: int = 3, diverged: int = 0) -> TuningCell:
    return TuningCell({"optimizer.lr": 0.3}, hits, runs, steps, diverged)


def test_two_arms_that_always_hit_have_a_ratio():
    assert common_ratio(cell(3, 50.0), cell(3, 600.0), BUDGET) == "12.0x"


@pytest.mark.parametrize(
    ("arm", "reference", "text"),
    [
        (cell(3, 300.0), cell(0, None), "> 10.0x"),
        (cell(0, None), cell(3, 300.0), "< 0.100x"),
        (cell(3, 300.0, 3), cell(1, 300.0, 2), "> 3.16x"),  # sqrt(300 * 3000) / 300
        (cell(0, None, diverged=3), cell(3, 1500.0), "< 0.500x"),
    ],
)
def test_misses_on_one_side_count_as_the_budget_and_make_a_bound(arm, reference, text):
    assert common_ratio(arm, reference, BUDGET) == text


@pytest.mark.parametrize(
    ("arm", "reference"),
    [
        (cell(1, 300.0), cell(2, 300.0)),
        (cell(3, 300.0), cell(0, None, runs=0)),
        (cell(3, None), cell(3, 300.0)),  # at the target before training: no geometric mean
    ],
)
def test_misses_on_both_sides_or_no_mean_leave_the_ratio_unknown(arm, reference):
    assert common_ratio(arm, reference, BUDGET) == UNKNOWN


def test_never_and_diverged_are_words(examples):
    columns = {column.header[0]: column.cells for column in tuning_columns(examples["two arms"])}
    assert columns["lr 0.03"][0] == ("never 0/3", "")
    assert columns["lr 3"][1] == ("diverged", "< 0.349x")


def test_the_longest_field_goes_across_and_the_others_down(examples):
    columns = tuning_columns(examples["two fields"])
    assert [column.header[0] for column in columns] == ["arm", "lr 0.1", "lr 0.3", "lr 1"]
    assert columns[0].cells == (
        ("plain", "momentum 0"),
        ("plain", "momentum 0.9"),
        ("batch norm", "momentum 0 fixed"),
    )


def test_an_arm_is_compared_with_the_reference_at_the_same_values_of_all_fields(examples):
    columns = {column.header[0]: column.cells for column in tuning_columns(examples["two fields"])}
    assert columns["lr 0.1"][2] == ("98.0 3/3", "27.7x")  # plain took 2711 at momentum 0


def test_a_value_that_an_arm_fixes_is_named_beside_it(examples):
    columns = tuning_columns(examples["six arms"])
    assert columns[0].cells[2] == ("batch norm with a learning rate x5", "lr 1.5 fixed")
    assert all(column.cells[2] == (UNKNOWN, "") for column in columns[1:])


def test_a_reference_that_is_not_there_leaves_out_the_ratios(examples):
    found = examples["two arms"]
    without = replace(found, arms=found.arms[1:])
    assert all(aside == "" for column in tuning_columns(without)[1:] for _, aside in column.cells)
