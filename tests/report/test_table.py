"""Tables and lists that fit the width and the encoding of the output."""

from __future__ import annotations

import pytest
from rich.console import Group
from rich.text import Text

from bncli.report.table import AlignedTable, BulletList, KeyValueList, ResponsiveTable, Row
from bncli.report.text import Cell, Column

ARMS = Column("arm", ["plain", Cell("batch norm", "x5")], words=True)
STEPS = Column("steps to\ntarget", [Cell("815", "733–896"), Cell("67.25", "±2%")])
COLUMNS = [ARMS, STEPS]


def lines(text: str) -> list[str]:
    found = text.splitlines()
    assert found == [line.rstrip() for line in found]
    return found


def test_points_and_asides_stand_in_line_below_headers(show):
    assert lines(show(AlignedTable(COLUMNS))) == [
        "                 steps to",
        "arm              target",
        "─────────────────────────────────",
        "plain            815    (733–896)",
        "batch norm (x5)   67.25 ±2%",
    ]


def test_asides_stand_below_their_figures_where_asked_for(show):
    assert lines(show(AlignedTable(COLUMNS, asides_below=True))) == [
        "            steps to",
        "arm           target",
        "────────────────────",
        "plain         815",
        "             733–896",
        "",
        "batch norm     67.25",
        "x5               ±2%",
    ]


@pytest.mark.parametrize(
    ("figures", "shown"),
    [
        (["1", "12.1x", "0.425x", "< 0.3x"], ["  1", " 12.1x", "  0.425x", "< 0.3x"]),
        (["0.31", "1.2e+06", "inf", "–"], ["0.31", "1.2e+06", "    inf", "–"]),
        (["10/10", "2/6"], ["10/10", "  2/6"]),
        (["median 1,911", "67.2"], ["median 1,911", "        67.2"]),
    ],
)
def test_numbers_are_aligned_and_longer_words_are_flush_right(show, figures, shown):
    assert lines(show(AlignedTable([Column("", figures)])))[2:] == shown


def test_words_wrap_and_figures_do_not(show):
    table = AlignedTable([Column("arm", ["a rectified linear unit"], words=True), Column("ms", ["1,234"])], wrap=True)
    assert lines(show(table, 22))[2:] == ["a rectified      1,234", "linear unit"]


def test_headings_and_repeated_words_are_shown_once(show):
    names = Column("mode", ["training", "training", "training"], words=True, once=True)
    rows = (Row("plain"), Row(), Row("normed"))
    table = AlignedTable([names, Column("ms", ["1", "2", "3"])], rows)
    assert lines(show(table))[2:] == ["plain", "training   1", "           2", "", "normed", "training   3"]
    assert show(KeyValueList(table.columns, rows)).count("training") == 3


@pytest.mark.parametrize("width", [20, 60])
def test_a_message_takes_the_place_of_a_rows_figures(show, width):
    rows = (Row(), Row(message="it did not run"))
    shown = lines(show(AlignedTable(COLUMNS, rows), 60))
    assert shown[-1] == "batch norm (x5)  it did not run"
    listed = show(KeyValueList(COLUMNS, rows), width)
    assert "it did not run" in listed
    assert "67.25" not in listed


def test_a_message_without_room_stands_below_its_row(show):
    rows = (Row(), Row(message="the kernel did not run here"))
    shown = lines(show(AlignedTable(COLUMNS, rows), 34))
    assert shown[-2:] == ["batch norm (x5)", "    the kernel did not run here"]


def test_bars_stand_behind_rows_with_their_key_where_there_is_room(show):
    table = AlignedTable(COLUMNS, bar=lambda row, room: Text("#" * (room // (row + 1))), key=Text("# a step"))
    shown = lines(show(table, 60))
    assert [line.count("#") for line in shown[3:5]] == [25, 12]
    assert shown[-1] == "# a step"
    assert "#" not in show(table, 40)


def test_the_first_fitting_table_names_its_hidden_columns(show):
    memory = Column("memory\nMiB", ["1", "2"], optional=True)
    table = ResponsiveTable("title", AlignedTable([*COLUMNS, memory]), [AlignedTable(COLUMNS)], notes=["a note"])
    wide, narrow = lines(show(table, 60)), lines(show(table, 38))
    assert wide[0] == narrow[0] == "title"
    assert wide[-1] == narrow[-1] == "a note"
    assert "memory" in wide[2]
    assert "Hidden columns (terminal too narrow):" not in "".join(wide)
    assert " ".join(narrow[-4:-2]) == "Hidden columns (terminal too narrow): memory MiB"


def test_where_no_table_fits_there_is_a_list_of_all_columns(show):
    memory = Column("memory\nMiB", ["1", "2"], optional=True)
    table = ResponsiveTable("title", AlignedTable([*COLUMNS, memory]), [AlignedTable(COLUMNS)])
    assert lines(show(table, 32))[2:] == [
        "arm              plain",
        "steps to target  815 (733–896)",
        "memory MiB       1",
        "",
        "arm              batch norm (x5)",
        "steps to target  67.25 ±2%",
        "memory MiB       2",
        "",
    ]
    assert "steps to target\n    815 (733–896)\n" in show(table, 20)


def test_a_list_aligns_and_wraps_names_of_any_width(show):
    columns = [Column("批量 steps", ["815"]), Column("ms", ["1.3"])]
    assert lines(show(KeyValueList(columns))) == ["批量 steps  815", "ms          1.3"]
    assert lines(show(KeyValueList(columns), 8)) == ["批量", "steps", "    815", "ms", "    1.3"]


def test_a_group_of_tables_may_be_a_narrower_layout(show):
    halves = Group(*(AlignedTable([each]) for each in COLUMNS))
    assert "plain\nbatch norm (x5)\nsteps to\n" in show(ResponsiveTable("", AlignedTable(COLUMNS), [halves]), 24)


def test_entries_have_a_dash_and_nothing_is_shown_of_none(show):
    assert lines(show(BulletList("notes", ["one two three"]), 9)) == ["notes", "- one two", "  three"]
    assert show(BulletList("notes", [])) == ""


def test_an_ascii_output_gets_ascii(show):
    assert lines(show(AlignedTable(COLUMNS), encoding="ascii"))[2:] == [
        "---------------------------------",
        "plain            815    (733-896)",
        "batch norm (x5)   67.25 +-2%",
    ]
