"""Columns, cells and footnotes of a comparison."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bncli.report.compare.text import (
    amount_cell,
    common_ratio,
    comparison_columns,
    cost_columns,
    footnotes,
    headline,
    metric_range,
    ratio_cell,
    subtitle,
    title,
    tuning_columns,
    tuning_notes,
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
    changed = replace(examples[name].arms[arm], **changes)
    assert amount_cell(changed, changed.steps, 3000) == cell


@pytest.mark.parametrize(
    ("ratio", "cell"),
    [
        (None, Cell("1", "reference")),
        (Ratio(12.13, Interval(9.81, 14.94), "means", 0.0), Cell("12.1x fewer", "9.81–14.9")),
        (Ratio(0.075, Interval(0.029, 0.1), "means", 0.01), Cell("13.3x more", "10.0–34.5")),
        (Ratio(1.1, Interval(0.9, 1.3), "means", 0.2), Cell("1.10x fewer", "0.900–1.30")),
        (Ratio(0.95, Interval(0.8, 1.25), "means", 0.2), Cell("1.05x more", "0.800–1.25")),
        (Ratio(1.0, Interval(1.0, 1.0), "same recipe", None), Cell("1", "same recipe")),
        (Ratio(4.0, Interval(3.1, None), "medians", None), Cell("4.00x fewer", "> 3.10")),
        (Ratio(0.25, Interval(None, 0.5), "medians", None), Cell("4.00x more", "> 2.00")),
        (Ratio(None, Interval(4.1, None), "bound", 0.01), Cell("> 4.10x fewer")),
        (Ratio(None, Interval(None, 0.29), "bound", 0.01), Cell("> 3.45x more")),
        (Ratio(None, Interval(0.8, None), "bound", None), Cell("< 1.25x more")),
        (Ratio(None, Interval(None, None), "bound", None), Cell(UNKNOWN)),
        (Ratio(None, Interval(None, None), "none", None), Cell(UNKNOWN)),
    ],
)
def test_a_ratio_is_a_figure_with_its_direction_and_interval_or_a_bound_or_unknown(ratio, cell):
    assert ratio_cell(ratio) == cell


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"ratio": Ratio(6.1, Interval(5.2, 7.12), "means", 0.01)},
            "batch norm needed 6.10 times fewer steps than plain (95 %: 5.20 to 7.12){tuned}",
        ),
        (
            {"ratio": Ratio(0.075, Interval(0.029, 0.1), "means", 0.01)},
            "batch norm needed 13.3 times more steps than plain (95 %: 10.0 to 34.5){tuned}",
        ),
        (
            {"ratio": Ratio(1.1, Interval(0.9, 1.2), "means", 0.2)},
            "batch norm cannot be told from plain: 1.11 times more to 1.20 times fewer steps (95 %){tuned}",
        ),
        (
            {"ratio": Ratio(None, Interval(3.1, None), "bound", None)},
            "batch norm needed at least 3.10 times fewer steps than plain (95 %){tuned}",
        ),
        (
            {"ratio": Ratio(None, Interval(None, 0.29), "bound", None), "hits": 2},
            "batch norm needed at least 3.45 times more steps than plain (95 %){tuned}; 2 of 10 runs reached it "
            "in time, 10 of 10 of plain",
        ),
        (
            {"ratio": Ratio(0.9, Interval(None, 1.25), "medians", None)},
            "batch norm cannot be told from plain: at most 1.25 times fewer steps (95 %){tuned}",
        ),
        (
            {"ratio": Ratio(2.0, Interval(None, None), "means", None)},
            "batch norm needed 2.00 times fewer steps than plain (no interval){tuned}",
        ),
        (
            {"ratio": Ratio(None, Interval(None, None), "hits", 0.4), "hits": 1},
            "batch norm and plain give no ratio: 1 of 10 runs reached it in time, 10 of 10 of plain",
        ),
        (
            {"ratio": Ratio(None, Interval(None, None), "bound", None), "hits": 4, "runs": 4},
            "batch norm and plain give no ratio: 4 and 10 runs are too few",
        ),
        (
            {"ratio": Ratio(None, Interval(None, None), "bound", None), "hits": 4, "runs": 4, "failures": ("a", "b")},
            "batch norm and plain give no ratio: 4 and 10 runs are too few, since 2 runs of batch norm failed",
        ),
        ({"ratio": Ratio(1.0, Interval(1.0, 1.0), "same recipe", None)}, "batch norm is plain under another name"),
        ({"runs": 0, "hits": 0}, "batch norm cannot be compared with plain: no result yet"),
        ({"runs": 0, "failures": ("it died",)}, "batch norm cannot be compared with plain: runs failed"),
    ],
)
def test_the_headline_says_what_is_known_of_an_arm_and_no_more(examples, changes, words):
    found = examples["no grid"]
    plain, batch = (replace(arm, choice=None) for arm in found.arms)
    assert headline(replace(found, arms=(plain, replace(batch, **changes)))) == [
        f"To held-out accuracy 0.95, {words.format(tuned=', without tuning')}."
    ]


def test_the_headline_names_the_tuning_what_is_missing_and_at_most_four_arms(examples):
    found = examples["two arms"]
    assert headline(found) == [
        "To held-out accuracy 0.95, batch norm needed 12.1 times fewer steps than plain (95 %: 9.81 to 14.9), each at "
        "its best of 5 settings."
    ]
    six = headline(examples["six arms"])
    assert six[0].startswith("So far, with 52 of 56 runs done, to held-out accuracy 0.95, batch norm needed ")
    assert len(six) == 5
    assert six[-1] == "1 more arm in the table."
    assert headline(replace(found, arms=found.arms[:1])) == ["To held-out accuracy 0.95, only plain was trained."]


def test_arms_without_a_result_share_a_sentence(examples):
    found = examples["no grid"]
    plain, batch = found.arms
    none = [replace(batch, arm=name, runs=0, hits=0, choice=None) for name in ("a", "b", "c")]
    failed = replace(none[2], failures=("it died",))
    assert headline(replace(found, arms=(plain, *none[:2], batch, failed)))[1:] == [
        "a, b cannot be compared with plain: no result yet.",
        "c cannot be compared with plain: runs failed.",
    ]
    assert headline(replace(found, arms=(replace(plain, runs=0), *none))) == [
        "To held-out accuracy 0.95, a, b, c cannot be compared with plain: no result of plain yet."
    ]


def test_failed_runs_stand_beside_the_hits(examples):
    found = examples["no grid"]
    arms = (found.arms[0], replace(found.arms[1], failures=("it died", "it died")))
    hits = next(column for column in comparison_columns(replace(found, arms=arms)) if column.name == "hits")
    assert [cell.line for cell in hits.cells] == ["10/10", "10/10 (2 failed)"]


def test_the_columns_are_those_of_the_question(examples):
    headers = [column.name for column in comparison_columns(examples["two fields"]) if not column.optional]
    assert headers == [
        "arm", "lr", "momentum", "hits", "steps to target", "steps vs reference",
        "best accuracy", "samples/s", "memory MiB",
    ]  # fmt: skip


def test_every_arm_has_a_cell_in_every_column(example):
    assert {len(column.cells) for column in comparison_columns(example)} == {len(example.arms)}


def test_only_marks_in_use_are_explained(examples):
    columns = {column.header: column.cells for column in comparison_columns(examples["two fields"])}
    assert columns["lr"] == (Cell("1*"), Cell("1*"))
    assert columns["momentum"] == (Cell("0.9*"), Cell("0", "fixed"))
    notes = footnotes(examples["two fields"])
    assert any(note.startswith("*:") for note in notes)
    assert any("fixed: set by the arm itself" in note for note in notes)
    assert not any("*:" in note or "fixed:" in note for note in footnotes(examples["censored reference"]))


def test_the_methods_in_use_are_named_and_no_other(examples):
    two, six = (" ".join(footnotes(examples[name])) for name in ("two arms", "six arms"))
    assert "a jackknife over seeds that repeats the choice of each arm's best point" in two
    assert "order statistics" not in two
    assert "> 2,308, > and <: half of the runs or more missed; 3,000 steps show up to 2,308" in six
    assert "half of the runs" not in two
    assert "where runs missed, medians and order statistics" in six


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


def test_the_times_of_an_arm_that_other_programs_disturbed_are_marked(examples):
    found = examples["six arms"]
    first, second, *others = found.arms
    found = replace(found, arms=(replace(first, cores_lacked=0.3), replace(second, cores_lacked=0.05), *others))
    marked = [column for column in comparison_columns(found) if "!" in column.cells[0].main]
    assert [column.name for column in marked] == ["samples/s", "ms/step"]
    seconds = next(column for column in cost_columns(found) if column.name == "seconds to target")
    assert seconds.cells[0].main.endswith("!")
    assert not any("!" in cell.main for column in (*marked, seconds) for cell in column.cells[1:])


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
        (cell(0, None), cell(3, 300.0), "> 10.0x more"),
        (cell(3, 300.0, 3), cell(1, 300.0, 2), "> 3.16x"),  # sqrt(300 * 3000) / 300
        (cell(0, None, diverged=3), cell(3, 1500.0), "> 2.00x more"),
        (cell(3, 2000.0), cell(2, 500.0), "< 2.20x more"),
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
    assert columns["lr 3"][1] == Cell("diverged", "> 2.86x more")


def test_a_point_that_was_given_up_shows_the_step_and_is_no_bound(examples):
    found = examples["two arms"]
    arms = [
        replace(arm, tuning=tuple(replace(cell, runs=1, hits=1, stopped_at=1240) for cell in arm.tuning[:1]))
        for arm in found.arms
    ]
    stopped = replace(found, arms=(arms[0], found.arms[1]))
    assert tuning_columns(stopped)[1].cells == (Cell("stopped", "at 1,240"), Cell("175 3/3", UNKNOWN))
    assert any(line.startswith("stopped: from that step on") for line in tuning_notes(stopped))


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
