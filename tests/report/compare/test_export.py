"""CSV for programs, Markdown for pages."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace

import pytest

from bncli.report.compare.export import to_csv, to_latex, to_markdown
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
