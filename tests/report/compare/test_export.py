"""CSV for programs, Markdown for pages, and one HTML page that needs nothing else."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from bncli.errors import FileError
from bncli.report.compare import figure
from bncli.report.compare.export import to_csv, to_html, to_latex, to_markdown
from bncli.report.figure import INK, MISSING
from bncli.results.compare import Note
from tests.report.conftest import check_latex


@pytest.mark.parametrize(
    ("name", "row", "cells"),
    [
        ("six arms", 0, {"arm": "plain", "times_fewer": "1", "times_fewer_method": "reference"}),
        (
            "six arms",
            4,
            {"steps_to_target": "", "times_fewer": "", "times_fewer_high_95": "0.29", "times_fewer_method": "bound"},
        ),
        ("six arms", 4, {"failed_runs": "1"}),
        ("six arms", 5, {"diverged_runs": "5", "best_accuracy": ""}),
        ("two fields", 0, {"optimizer.lr": "1", "optimizer.momentum": "0.9"}),
        ("two fields", 1, {"fixed": "optimizer.momentum"}),
        ("no runs yet", 0, {"hits": "0", "runs": "0", "steps_to_target": ""}),
        ("no runs yet", 1, {"hits": "0", "runs": "0", "steps_to_target": ""}),
        ("two arms", 0, {"times_fewer_seconds": "1"}),
        ("two arms", 1, {"times_fewer_seconds": "9.1", "times_fewer_examples": "12.1", "examples_to_target": "4020.0"}),
        ("two arms", 1, {"hits_at_0.9": "10", "steps_to_target_at_0.9": "31.2", "times_fewer_at_0.9": "20.4"}),
        ("two arms", 1, {"grid_points": "5", "grid_points_kept": "2", "choice_doubt": "0.12"}),
    ],
)
def test_csv_has_a_row_for_each_arm_and_unknown_cells_are_empty(examples, name, row, cells):
    rows = list(csv.DictReader(io.StringIO(to_csv(examples[name]))))
    assert [each["arm"] for each in rows] == [arm.arm for arm in examples[name].arms]
    assert cells.items() <= rows[row].items()


def test_csv_has_every_digit_and_units_in_its_header(examples):
    rows = list(csv.DictReader(io.StringIO(to_csv(examples["six arms"]))))
    assert float(rows[0]["steps_to_target"]) == examples["six arms"].arms[0].steps.value
    assert {"steps_to_target", "samples_per_s", "ms_per_step", "cores_lacked", "best_accuracy"} <= rows[0].keys()
    assert "optimizer.lr" not in to_csv(examples["no grid"])


def test_markdown_has_a_table_with_as_many_cells_in_every_row(example):
    tables = re.findall(r"(?:^\|.*\n)+", to_markdown(example), re.M)
    assert [len(table.splitlines()) for table in tables[:2]] == [2 + len(example.arms)] * 2  # steps, and costs
    also = example.plan.also
    assert [len(table.splitlines()) for table in tables[2:]] == [2 + 1 + len(also)] * bool(also)
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


def test_markdown_begins_with_the_answer_and_has_warnings_apart_from_footnotes(examples):
    lines = to_markdown(examples["six arms"]).splitlines()
    assert lines[2].startswith("So far, with 52 of 56 runs done, to held-out accuracy 0.95, batch norm needed 12.1 ")
    warned = lines.index("#### Warnings")
    assert lines[warned + 2 : warned + 5] == [
        "- 52 of 56 runs are done, 1 failed; the figures are based on those",
        "- Failed: careful xavier initialization (lr 0.3, seed 106): worker killed by signal 9",
        "- Diverged, which counts as a miss: small learning rate (5 of 5 runs)",
    ]
    assert lines[warned + 5 : warned + 7] == ["", "#### What it costs to reach the target"]
    assert any(line.startswith("- fixed:") for line in lines[warned + 7 :])
    assert "Warnings" not in to_markdown(examples["two arms"])


def test_markdown_says_what_the_terminal_says(examples):
    text = to_markdown(examples["two arms"])
    for words in (
        "| batch norm | 0.3 |",
        "12.1x fewer (9.81–14.9)",
        "| 1 (reference) |",
        "3\\*",
        "a jackknife over seeds",
    ):
        assert words in text
    assert "| 0.9 | 636 (572–700) | 31.2 (28.1–34.3) | 20.4x fewer (18.4–22.4) |" in text
    assert "| batch norm | 0.0890 (0.0801–0.0979) | 9.10x less (8.19–10.0) | 4,020 (3,618–4,422) | 12.1x fewer" in text


def test_markdown_escapes_what_would_be_markup(examples):
    found = examples["two arms"]
    hostile = replace(found.arms[1], arm="a|b <script> *x* `y` [z](w)\n# h")
    text = to_markdown(replace(found, arms=(found.arms[0], hostile)))
    assert "a\\|b \\<script> \\*x\\* \\`y\\` \\[z\\](w) \\# h" in text


# --- HTML ---------------------------------------------------------------------------------------------------------

VOID = {"meta", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """Notes text and what would be loaded, and sees to it that every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_args: Any, **_options: Any) -> bytes:
        raise FileError(MISSING)

    monkeypatch.setattr(figure, "render", missing)


def check_page(html: str) -> Page:
    """That every tag is closed and nothing is loaded."""
    page = Page(html)
    assert page.open == []
    assert page.loaded == []
    assert "script" not in page.tags
    return page


def test_the_page_is_well_formed_and_loads_nothing(example, no_figure):
    check_page(to_html(example))


def test_the_page_has_tables_notes_machine_and_figure(examples):
    html = to_html(examples["six arms"])
    words = " ".join(check_page(html).words)
    for text in (
        "rectified linear units",
        "12.1x",
        "> 2,308",
        "Tuning runs",
        "worker killed by signal 9",
        "torch 2.13.0",
    ):
        assert text in words
    assert html.count("<svg") == 1
    assert "prefers-color-scheme: dark" in html
    assert INK not in html  # the figure takes the colour of the page's text
    assert "currentColor" in html


def test_without_matplotlib_the_page_says_what_is_missing(examples, no_figure):
    html = to_html(examples["two arms"])
    assert "<svg" not in html
    assert "pip install matplotlib" in html
    assert "12.1x" in html


def test_without_a_grid_the_page_has_no_tuning_runs(examples, no_figure):
    assert "Tuning" not in to_html(examples["no grid"])


def test_the_page_escapes_names_and_notes(examples, no_figure):
    found = examples["two arms"]
    hostile = replace(found.arms[1], arm="<script>alert(1)</script>")
    plan = replace(found.plan, name="<b>", data="&amp; <i>")
    notes = (Note.of("words", words="<img src=x>"),)
    page = Page(to_html(replace(found, plan=plan, arms=(found.arms[0], hostile), notes=notes)))
    assert {"script", "img", "b", "i"}.isdisjoint(page.tags)
    assert "<script>alert(1)</script>" in page.words
    assert "<img src=x>." in page.words


def test_the_latex_tables_are_those_of_the_report_for_a_paper(example):
    text = to_latex(example)
    check_latex(text)
    assert text.startswith(r"% Needs \usepackage{booktabs}")
    assert text.count(r"\begin{tabular}") == 2 + bool(example.plan.also)
    assert "% Made on cpu" in text or not any(run.result for run in example.runs)


def test_a_ratio_and_its_interval_share_a_cell_of_the_latex_table(examples):
    text = to_latex(examples["two arms"])
    assert r"12.1$\times$ fewer (9.81--14.9)" in text
    assert r"\shortstack[r]{memory\\MiB}" in text
