"""The tables of a comparison at the widths and encodings that they meet."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from bncli.report.compare.table import ComparisonReport, comparison_table, tuning_table
from bncli.results.compare import Note


def lines_with(text: str, word: str) -> list[str]:
    return [line for line in text.splitlines() if word in line]


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_line_is_wider_than_the_output(example, show, width):
    assert max(map(len, show(ComparisonReport(example), width).splitlines())) <= width


@pytest.mark.parametrize("width", [30, 45, 60, 80, 120, 200])
def test_no_figure_is_cut_or_broken_at_any_width(examples, show, width):
    text = show(comparison_table(examples["two arms"]), width)
    for figure in ("815", "733–896", "12.1x", "9.81–14.9", "0.9612", "45,231", "10/10"):
        assert figure in text


def test_in_80_columns_intervals_stand_below_their_figures(examples, show):
    lines = show(comparison_table(examples["two arms"])).splitlines()
    row = next(index for index, line in enumerate(lines) if line.startswith("batch norm"))
    assert lines[row].split() == ["batch", "norm", "0.3", "10/10", "67.2", "12.1x", "fewer", "0.9612", "45,231", "412"]
    assert lines[row + 1].split() == ["60.5–74.0", "9.81–14.9"]


def test_a_wide_output_shows_an_arm_on_one_line_and_more_columns(examples, show):
    text = show(comparison_table(examples["two arms"]), 160)
    (row,) = lines_with(text, "batch norm ")
    assert "12.1x fewer (9.81–14.9)" in row
    assert "27,910" in row
    assert "< 0.0001" in row
    assert all(header in text for header in ("(Holm)", "first hit", "ms/step", "parameters"))


def test_the_reference_row_is_the_one_with_ratio_1(examples, show):
    (row,) = lines_with(show(comparison_table(examples["two arms"]), 160), "plain  ")
    assert row.split()[6:8] == ["1", "(reference)"]


def test_six_arms_with_long_names_keep_every_word_in_80_columns(examples, show):
    text = show(comparison_table(examples["six arms"]))
    column = " ".join(line[:18].strip() for line in text.splitlines())
    for arm in examples["six arms"].arms:
        assert " ".join(arm.arm.split()) in " ".join(column.split())


def test_an_unknown_value_is_a_dash(examples, show):
    text = show(comparison_table(examples["no runs yet"]))
    (row,) = lines_with(text, "batch norm")
    assert row.split() == ["batch", "norm", "–", "0/0", "–", "–", "–", "–", "–"]


def test_several_grid_fields_move_below_the_arm_on_narrow_terminals(examples, show):
    beside, under = (show(comparison_table(examples["two fields"]), width) for width in (84, 76))
    assert lines_with(beside, "hits")[0].split() == [
        "arm",
        "lr",
        "momentum",
        "hits",
        "target",
        "reference",
        "accuracy",
        "/s",
        "MiB",
    ]
    assert lines_with(under, "hits")[0].split() == ["arm", "hits", "target", "reference", "accuracy", "/s", "MiB"]
    assert lines_with(under, "lr 1*, momentum")


def test_an_ascii_output_gets_ascii(example, show):
    text = show(ComparisonReport(example), encoding="ascii")
    assert text.isascii()
    assert "?" not in text


def test_colour_changes_no_character(examples, show):
    file = io.StringIO()
    Console(file=file, width=80, force_terminal=True, color_system="truecolor").print(
        comparison_table(examples["six arms"])
    )
    assert re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()) == show(comparison_table(examples["six arms"]))


def test_square_brackets_in_names_and_notes_are_text_and_not_markup(examples, show):
    found = replace(examples["two arms"], notes=(Note.of("words", words="see [bold]this[/bold]"),))
    assert "see [bold]this[/bold]" in show(comparison_table(found))


def test_the_tuning_table_shows_steps_hits_best_and_ratio(examples, show):
    lines = show(tuning_table(examples["two arms"])).splitlines()
    assert any(
        line.split() == ["arm", *(word for value in ("0.03", "0.1", "0.3", "1", "3") for word in ("lr", value))]
        for line in lines
    )
    row = next(index for index, line in enumerate(lines) if line.startswith("batch norm"))
    assert lines[row].split()[2:] == ["175", "3/3", "98.0", "3/3", "[61.3]", "3/3", "(64.0)", "3/3", "diverged"]
    assert lines[row + 1].split() == [">", "13.2x", "27.7x", "27.9x", "14.1x", ">", "2.86x", "more"]


def test_a_long_grid_goes_on_in_a_second_table(examples, show):
    found = examples["two arms"]
    grid = {"optimizer.lr": tuple(round(0.01 * 1.5**k, 4) for k in range(12))}
    text = show(tuning_table(replace(found, plan=replace(found.plan, grid=grid))))
    assert sum(line.startswith("batch norm") for line in text.splitlines()) == 2
    assert "\n\n\n" not in text
    for value in grid["optimizer.lr"]:
        assert f"lr {value:g}" in text


def test_the_report_has_table_sketch_and_tuning_in_this_order(examples, show):
    text = show(ComparisonReport(examples["two arms"]))
    places = [
        text.index(words)
        for words in ("steps to", "what it costs", "steps to each target", "dashed: target", "tuning runs")
    ]
    assert places == sorted(places)


def test_the_report_of_an_untuned_comparison_does_not_mention_tuning(examples, show):
    assert "tuning" not in show(ComparisonReport(examples["no grid"]))
