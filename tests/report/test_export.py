"""CSV and Markdown tables."""

from __future__ import annotations

import csv
import io
from xml.etree import ElementTree

import pytest

from bncli.report.export import JunitCase, csv_text, junit_text, markdown, markdown_table
from bncli.report.text import Cell, Column


def test_csv_has_a_header_and_an_unknown_value_is_an_empty_cell():
    text = csv_text([{"arm": "a, b", "steps": 1.5}, {"arm": "c", "steps": None}], "arm")
    assert text == 'arm,steps\n"a, b",1.5\nc,\n'
    assert list(csv.reader(io.StringIO(csv_text([], "arm")))) == [["arm"]]


def test_junit_counts_each_outcome_and_keeps_what_is_said():
    colour = "\x1b[31mred"
    cases = [
        JunitCase("a", "one", 0.25, text="said"),
        JunitCase("a", 'two "<&>"', 0.5, "failure", f"first\nsecond, {colour}"),
        JunitCase("b", "three", 0.0, "error", "no result"),
        JunitCase("b", "four", 0.0, "skipped", "why"),
    ]
    root = ElementTree.fromstring(junit_text("tool", cases, "2026-12-01T00:00:00+00:00"))
    (suite,) = root
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    for each in (root, suite):
        counts = [each.get(name) for name in ("tests", "failures", "errors", "skipped", "time")]
        assert counts == ["4", "1", "1", "1", "0.750"]
    found = [(case.get("classname"), case.get("name"), case.get("time"), case[0].tag, case[0].text) for case in suite]
    assert found == [
        ("tool.a", "one", "0.250", "system-out", "said"),
        ("tool.a", 'two "<&>"', "0.500", "failure", "first\nsecond, [31mred"),
        ("tool.b", "three", "0.000", "error", "no result"),
        ("tool.b", "four", "0.000", "skipped", "why"),
    ]
    assert suite[1][0].get("message") == "first"


def test_a_markdown_table_puts_words_left_and_figures_right():
    columns = [Column("arm", ["a|b"], words=True), Column("samples\n/s", [Cell("45", "40–50")])]
    assert markdown_table(columns) == ["| arm | samples/s |", "| :-- | --: |", "| a\\|b | 45 (40–50) |"]


@pytest.mark.parametrize(
    ("text", "shown"), [("a*b_c", "a\\*b\\_c"), ("> quoted", "\\> quoted"), ("two\nlines", "two lines")]
)
def test_markdown_is_escaped(text, shown):
    assert markdown(text) == shown
