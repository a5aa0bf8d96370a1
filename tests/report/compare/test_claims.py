"""The verdicts' table: every claim in full, its figures, and what they rest on, in each form of the report."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from typing import get_args

import pytest

from bncli.report.compare.claims import NO_INTERVAL, claim_notes
from bncli.report.compare.export import to_csv, to_markdown
from bncli.report.compare.table import ComparisonReport, claims_table
from bncli.report.files import from_json, to_json
from bncli.results.compare import Comparison, JudgedClaim, NoInterval
from bncli.results.environment import Interval

RATE = JudgedClaim(
    "batch norm allows higher learning rates, and nobody has to be careful with them any more",
    "largest_learning_rate", "batch norm", "plain", 3.0, "at least", True, "mean", None,
    compared="ratio", value=6.912, interval=Interval(4.051, 11.79), level=0.9875, p_value=0.00132, verdict="shown",
    seeds=5, of_seeds=5, of_arm=4.7968, of_over=0.694,
)  # fmt: skip
SHIFT = replace(
    RATE, say="it reduces the shift", measure="shift.cosine", bound=0.0, bounded=False, when="equal loss",
    layer="hidden2", compared="difference", value=-0.0016, interval=Interval(-0.0161, 0.0129), p_value=0.37,
    verdict="cannot tell", seeds=4, seeds_needed=58,
)  # fmt: skip
STEPS = replace(
    RATE, say="fewer | steps", measure="steps_to_target", bound=0.5, side="at most", value=None,
    interval=Interval(None, 0.31), p_value=None, verdict="refuted", of_arm=None,
)  # fmt: skip
UNKNOWN = replace(
    RATE, value=None, interval=Interval(None, None), p_value=None, verdict="cannot tell", seeds=0,
    no_interval="no rate fails", of_arm=None, of_over=None,
)  # fmt: skip
SECTION = {"steps": 300, "accuracy": 0.8, "factor": 1.2}


@pytest.fixture
def judged(examples: dict[str, Comparison]) -> Comparison:
    found = examples["two arms"]
    plan = replace(found.plan, largest_learning_rate=SECTION)
    return replace(found, plan=plan, claims=(RATE, SHIFT, STEPS, UNKNOWN))


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_every_claim_is_shown_in_full_at_any_width(judged, show, width):
    text = show(claims_table(judged), width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(re.sub(r"[^\w ]+", " ", text).split())
    for word in (*RATE.say.replace(",", "").split(), "refuted", "shown", "58"):
        assert word in words
    for figure in ("6.91x", "4.05–11.8", "-0.00160", "-0.0161..0.0129", "p 0.0013", "at most 0.5", "< 0.31", "–"):
        assert figure in text


def test_verdicts_close_the_terminals_report(judged, show):
    text = show(ComparisonReport(judged), 120)
    assert text.index(": tuning runs") < text.index(": claims")
    assert ": claims" not in show(ComparisonReport(replace(judged, claims=())), 120)


def test_a_row_has_the_arms_values_the_bound_and_the_seeds_that_would_decide(judged, show):
    text = show(claims_table(judged), 120)
    said, measure, arms, *_ = text[text.index("1. batch norm") :].splitlines()
    assert said == f"1. {RATE.say}"
    assert measure.split() == ["largest_learning_rate", "6.91x", "at", "least", "3", "shown"]
    assert arms.startswith("batch norm 4.80 / plain* 0.694 ")
    wide = show(claims_table(judged), 200)
    assert "shift.cosine, layer hidden2, equal loss (batch norm 4.80 less plain* 0.694)" in wide
    assert "batch norm – / plain* 0.694" in text
    assert "above 0" in text
    assert "about 58 seeds" in text


def test_no_name_of_a_measure_is_broken_on_a_terminal_of_80_columns(judged, show):
    """The longest names of measures and arms, as they stand in recipes/claims.yaml."""
    longest = replace(
        SHIFT, measure="regularization.held_out_loss", layer=None, arm="large weights + batch norm", over="batch norm"
    )
    text = show(claims_table(replace(judged, claims=(longest,) * 27)), 80)
    assert text.count("regularization.held_out_loss,") == 27
    assert text.count("27. it reduces the shift\n") == 1


def test_notes_say_what_the_figures_rest_on(judged):
    notes = "\n".join(claim_notes(judged))
    assert "level 0.9875: 1 - 0.05/4, for 4 claims" in notes
    assert "largest_learning_rate: a held-out accuracy of 0.8 after 300 steps" in notes
    assert "equal loss: the mean (geometric for a ratio) at training losses that both runs pass" in notes
    assert "mean over the log of the step" not in notes  # no claim on a probe takes it
    assert notes.startswith("1 shown, 1 refuted, 2 cannot tell.")
    assert "Claim 2 rests on 4 of 5 pairs of runs" in notes
    assert f"Claim 4 has no interval: {NO_INTERVAL['no rate fails']}." in notes


def test_every_reason_for_no_interval_has_its_words():
    assert NO_INTERVAL.keys() == set(get_args(NoInterval))


def test_the_bar_without_an_accuracy_is_a_constant_guess(judged):
    plan = replace(judged.plan, largest_learning_rate={**SECTION, "accuracy": None})
    assert "above the best constant guess's after 300 steps" in "\n".join(claim_notes(replace(judged, plan=plan)))


def test_a_probes_layers_and_the_end_of_runs_are_explained_where_claims_need_it(judged):
    whole = replace(judged, claims=(replace(SHIFT, layer=None),))
    assert "Where a probe has a value for each layer" in "\n".join(claim_notes(whole))
    assert "Where a probe has a value for each layer" not in "\n".join(claim_notes(judged))
    for arm in ("batch norm", "plain"):
        stopping = {arm: {"train": {"stop_at_target": True}}}
        stopped = replace(whole, plan=replace(judged.plan, recipes=stopping))
        assert "train.stop_at_target: false" in "\n".join(claim_notes(stopped))
    assert "train.stop_at_target: false" not in "\n".join(claim_notes(whole))


def test_csv_has_a_second_table_after_an_empty_line(judged):
    arms, claims = to_csv(judged).split("\n\n")
    assert len(list(csv.DictReader(io.StringIO(arms)))) == 2
    rows = list(csv.DictReader(io.StringIO(claims)))
    assert [row["verdict"] for row in rows] == ["shown", "cannot tell", "refuted", "cannot tell"]
    assert float(rows[0]["low"]) == 4.051
    assert (rows[1]["when"], rows[1]["seeds_needed"], rows[2]["value"]) == ("equal loss", "58", "")
    assert "\n\n" not in to_csv(replace(judged, claims=()))


def test_markdown_has_the_table_and_its_notes(judged):
    text = to_markdown(judged).split("#### Claims")[1]
    (table,) = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(table.splitlines()) == 2 + 4
    assert "| 3. fewer \\| steps | steps\\_to\\_target (batch norm – / plain\\* 0.694) |" in table
    assert "- Claim 4 has no interval" in text


def test_json_has_a_flat_object_for_each_claim_and_comes_back(judged):
    text = to_json(judged)
    found = json.loads(text)["claims"][0]
    assert {"say", "measure", "arm", "over", "value", "interval", "p_value", "verdict"} <= found.keys()
    assert from_json(Comparison, text) == judged


def test_a_comparison_of_before_there_were_claims_can_be_read(judged):
    plain = json.loads(to_json(replace(judged, claims=())))
    del plain["claims"], plain["plan"]["claims"], plain["plan"]["largest_learning_rate"]
    old = from_json(Comparison, json.dumps(plain))
    assert (old.claims, old.plan.claims, old.plan.largest_learning_rate) == ((), (), None)
