"""CSV and Markdown tables."""

from __future__ import annotations

import csv
import io
from xml.etree import ElementTree

import pytest

from bncli.report.export import (
    JunitCase,
    csv_text,
    junit_text,
    latex,
    latex_table,
    latex_text,
    markdown,
    markdown_table,
)
from bncli.report.text import Cell, Column
from tests.report.conftest import check_latex


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
        ("tool.a", 'two "<&>"', "0.500", "failure", "first\nsecond, \u241b[31mred"),
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


# --- LaTeX --------------------------------------------------------------------------------------------------------

ODD = "50% of $x_1$ & {a}\\b #2 ~3^4 < 5 > |y| ± –"


def test_a_latex_table_has_the_rules_of_booktabs_and_each_interval_in_its_cell():
    columns = [Column("arm", ["batch norm"], words=True), Column("steps to\ntarget", [Cell("12.1x", "9.81–14.9")])]
    assert latex_table(columns) == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"arm & \shortstack[r]{steps to\\target} \\",
        r"\midrule",
        r"batch norm & 12.1$\times$ (9.81--14.9) \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_every_character_that_latex_would_interpret_is_escaped():
    assert latex(ODD) == (
        r"50\% of \$x\_1\$ \& \{a\}\textbackslash{}b \#2 \textasciitilde{}3\textasciicircum{}4 $<$ 5 $>$ $|$y$|$"
        r" $\pm$ --"
    )
    assert latex("learning rate x5, 8x32x16, 0x1f") == r"learning rate x5, 8$\times$32$\times$16, 0$\times$1f"
    check_latex(latex_text([(ODD, [Column(ODD, [ODD, ODD], words=True)])], [ODD]))


def test_optional_columns_are_left_out_of_a_paper_and_named():
    text = latex_text([("runs", [Column("arm", ["a"], words=True), Column("p\n(Holm)", ["0.02"], optional=True)])], [])
    assert "% Left out; the CSV has them: p (Holm)." in text
    assert r"\begin{tabular}{l}" in text
    assert "0.02" not in text
