"""Layouts of a table, chosen by the width of the output."""

from __future__ import annotations

from rich.text import Text

from bncli.report.table import Dashed, Fitted, Line, Listing, Ruled, listing, stacked, table
from bncli.report.text import Column

COLUMNS = [
    Column(("arm", ""), (("plain", ""), ("batch norm", "x5")), words=True),
    Column(("steps to", "target"), (("815", "733–896"), ("67.25", ""))),
]
LINES = (Line(), Line())


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


def test_the_first_layout_that_fits_is_taken_and_else_the_last(show):
    layouts = [lambda encoding, width=width: Text("x" * width, no_wrap=True) for width in (60, 40, 20)]
    found = {width: lines(show(Fitted("title", "", layouts, ["a note"]), width)) for width in (70, 50, 30, 10)}
    assert {width: len(shown[2]) for width, shown in found.items()} == {70: 60, 50: 40, 30: 20, 10: 10}
    assert found[70][0] == "title"
    assert found[70][-1] == "a note"


def test_a_cells_second_part_stands_beside_or_below_its_first(show):
    beside, below = (show(table(COLUMNS, apart, "utf-8", wrap=False), 60) for apart in (False, True))
    assert "815 (733–896)" in beside
    assert [line.split() for line in lines(below) if "733" in line] == [["733–896"]]


def test_a_listing_has_a_line_a_figure(show):
    shown = [line.split() for line in lines(show(listing(COLUMNS, "utf-8"), 40))]
    assert ["steps", "to", "target", "67.25"] in shown


def test_stacked_tables_stand_below_each_other(show):
    shown = lines(show(stacked([table([column], False, "utf-8") for column in COLUMNS]), 40))
    assert shown.index("plain") < next(index for index, line in enumerate(shown) if "815" in line)


def test_decimal_points_stand_below_each_other(show):
    columns = [COLUMNS[0], Column(("ms", ""), (("1.5", ""), ("12.25", "")))]
    first, second = lines(show(Ruled(columns, LINES, "utf-8")))[2:]
    assert first.index(".") == second.index(".")


def test_a_message_takes_the_place_of_a_rows_figures_at_any_width(show):
    failed = (Line(), Line(message="it did not run"))
    ruled = lines(show(Ruled(COLUMNS, failed, "utf-8"), 60))[-1]
    assert ruled.startswith("batch norm")
    assert ruled.endswith("  it did not run")
    listed = show(Listing(COLUMNS, failed, "utf-8"), 20)
    assert "it did not run" in listed
    assert "67.25" not in listed


def test_entries_have_a_dash_and_nothing_is_shown_of_none(show):
    assert lines(show(Dashed("notes", ["one two three"]), 9)) == ["notes", "- one two", "  three"]
    assert show(Dashed("notes", [])) == ""
