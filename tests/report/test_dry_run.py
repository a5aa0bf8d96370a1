"""A dry run on the terminal."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bncli.report.dry_run import render, to_json
from bncli.results.compare import Claim, MemoryNeeded, Planned, PlannedArm

PLANNED = Planned(
    "small",
    (("optimizer.lr", 0.5, "small.yaml:4"), ("optimizer.momentum", 0.0, "default")),
    (
        PlannedArm("plain", (), (), 1234, 2.5, 9, 5),
        PlannedArm("[own]", (("norm.kind", "batch"),), ("optimizer.lr",), None, None, 0, 5),
    ),
    {"optimizer.lr": (0.1, 1.0)},
    28,
    28_000,
    open_choices=True,
)


def test_fields_arms_and_runs_are_shown(show):
    text = " ".join(show(render(PLANNED), 120).split())
    for words in (
        "optimizer.lr 0.5 small.yaml:4",
        "plain nothing 1,234 2.5 MiB 9 + 5",
        "[own] norm.kind: batch – – 5",
        "(optimizer.lr is fixed: not tuned)",
        "grid: optimizer.lr in 0.1, 1",
        "28 runs, 28,000 optimizer steps at most, more where an arm keeps several points of the grid.",
    ):
        assert words in text


def test_what_is_done_already_and_what_was_checked_is_said(show):
    partly = replace(PLANNED, done=20, steps_at_most=8_000, open_choices=False, checked=True)
    text = " ".join(show(render(partly), 120).split())
    assert "28 runs, 20 of them done already; 8 to do, 8,000 optimizer steps at most. Nothing was trained." in text
    assert "Checked: the data were read, and each model made its first step." in text
    text = " ".join(show(render(replace(partly, done=28, steps_at_most=0, checked=False)), 120).split())
    assert "28 runs, all of them done already: nothing would be trained." in text
    assert "Checked" not in text
    hub = replace(PLANNED, fields=(("data.source", "hub", "small.yaml:1"), ("data.shape", [3, 8, 8], "small.yaml:1")))
    assert "The data were not read; a comparison reads them" in " ".join(show(render(hub), 120).split())


def test_points_that_may_be_given_up_and_which_runs_train_together_are_said(show):
    plain, own = PLANNED.arms
    planned = replace(PLANNED, raced=True, arms=(plain, replace(own, alone="train.compile")))
    text = " ".join(show(render(planned), 120).split())
    assert "Points of the grid that can no longer be the best are given up, which leaves fewer steps." in text
    assert "Runs of an arm that differ in seed, learning rate and initial weights train together: plain." in text
    assert "Runs train one by one, for the field in brackets, in arm [own] (train.compile)." in text
    single = " ".join(show(render(replace(PLANNED, arms=(plain,))), 120).split())
    assert "together" not in single
    assert "given up" not in single


@pytest.mark.parametrize("measure", ["largest_learning_rate", "regularization.logit_variance"])
def test_no_name_of_a_measure_is_broken_on_a_terminal_of_80_columns(show, measure):
    claim = Claim(
        "as it is said", measure, "large weights + batch norm", "batch norm", 3.0, "at least", True, "end", None
    )
    text = show(render(replace(PLANNED, claims=(claim,) * 2)), 80)
    assert text.count(measure) == 2


def test_claims_and_the_searches_that_they_ask_for_are_listed(show):
    claim = Claim("higher rates", "largest_learning_rate", "own", "plain", 3.0, "at least", True, "mean", None)
    planned = replace(PLANNED, claims=(claim,), search_runs=90, search_steps=300)
    text = " ".join(show(render(planned), 120).split())
    assert "1. higher rates largest_learning_rate own over plain at least 3" in text
    assert "the searches for the largest learning rate take about 90 runs of 300 steps." in text
    assert "What would be judged" not in show(render(PLANNED), 120)


def test_an_ascii_output_gets_ascii(show):
    assert "plain  nothing" in show(render(PLANNED), 80, "ascii")


@pytest.mark.parametrize("field", ["name", "fields", "arms", "grid", "runs", "steps_at_most"])
def test_json_has_every_field(field):
    assert field in json.loads(to_json(PLANNED))


def test_the_memory_of_all_processes_is_said_with_what_is_unknown(show):
    for needed, words in (
        (
            MemoryNeeded(954.2, True, 170.0, 2.5, 2, 8000.0),
            "2 processes need about 1,300 of 8,000 MiB available (data",
        ),
        (
            MemoryNeeded(10.0, False, 170.0, 2.0, 3, 8000.0),
            "3 processes need about 546 of 8,000 MiB available (data in",
        ),
        (
            MemoryNeeded(None, True, 170.0, None, 1, 99.0),
            "(data unknown, each with torch 170 MiB, its training unknown)",
        ),
    ):
        assert words in " ".join(show(render(replace(PLANNED, memory=needed)), 120).split())
