"""CSV and Markdown tables."""

from __future__ import annotations

import csv
import io

import pytest

from bncli.report.export import csv_text, markdown, markdown_table
from bncli.report.text import Cell, Column


def test_csv_has_a_header_and_an_unknown_value_is_an_empty_cell():
    text = csv_text([{"arm": "a, b", "steps": 1.5}, {"arm": "c", "steps": None}], "arm")
    assert text == 'arm,steps\n"a, b",1.5\nc,\n'
    assert list(csv.reader(io.StringIO(csv_text([], "arm")))) == [["arm"]]


def test_a_markdown_table_puts_words_left_and_figures_right():
    columns = [Column("arm", ["a|b"], words=True), Column("samples\n/s", [Cell("45", "40–50")])]
    assert markdown_table(columns) == ["| arm | samples/s |", "| :-- | --: |", "| a\\|b | 45 (40–50) |"]


@pytest.mark.parametrize(
    ("text", "shown"), [("a*b_c", "a\\*b\\_c"), ("> quoted", "\\> quoted"), ("two\nlines", "two lines")]
)
def test_markdown_is_escaped(text, shown):
    assert markdown(text) == shown
