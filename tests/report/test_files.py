"""Results as JSON and back, and files that are whole or not there."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bncli.errors import USAGE, BncliError
from bncli.report.compare.export import to_csv, to_markdown
from bncli.report.compare.notes import sentences
from bncli.report.compare.table import ComparisonReport
from bncli.report.files import event_line, from_json, to_json
from bncli.results.compare import Comparison, RunRecord
from bncli.results.environment import COMPARISON_VERSION, RUNS_VERSION
from bncli.results.train import Evaluated, Evaluation, RunFinished, RunResult, RunStarted, StepDone, Target

FLOATS = st.floats() | st.none()
SHARES = st.floats(0, 1)


# --- there and back -----------------------------------------------------------------------------------------------


def test_a_comparison_comes_back_equal_from_its_json(example):
    assert from_json(Comparison, to_json(example)) == example


def test_every_rendering_of_what_came_back_is_the_same_text(example, show):
    back = from_json(Comparison, to_json(example))
    assert show(ComparisonReport(back)) == show(ComparisonReport(example))
    assert to_csv(back) == to_csv(example)
    assert to_markdown(back) == to_markdown(example)
    assert to_json(back) == to_json(example)


def test_a_run_and_a_result_come_back_equal(examples, make_result):
    failed = RunRecord("key", "plain", {"optimizer.lr": 0.3}, 1, "tune", None, "killed by signal 9")
    for record in (examples["six arms"].runs[0], failed):
        assert from_json(RunRecord, to_json(record)) == record
    for result in (make_result(812.4), replace(make_result(None, status="diverged"), target=None)):
        assert from_json(RunResult, to_json(result)) == result


@given(
    steps=st.floats(0, 3000) | st.none(), best=SHARES | st.none(), accuracy=SHARES, final=FLOATS, text=st.text(),
    value=st.integers() | st.booleans() | st.text(),
)  # fmt: skip
def test_any_number_and_any_text_survive(make_result, steps, best, accuracy, final, text, value):
    seen = (Evaluation(0, accuracy, math.inf, None), Evaluation(10, 0.5, -math.inf, -0.0))
    result = replace(make_result(50.0), steps_to_target=steps, best=best, final=final, evaluations=seen, reason=text)
    record = RunRecord("key", text, {"model.name": value}, 7, "report", result)
    back = from_json(RunRecord, to_json(record))
    assert repr(back) == repr(record)  # nan is not equal to itself, and -0.0 is to 0.0


def test_json_is_strict_about_infinite_numbers(make_result):
    seen = (Evaluation(0, math.nan, math.inf, -math.inf),)
    text = to_json(replace(make_result(50.0), evaluations=seen))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    plain = json.loads(text, parse_constant=refuse)
    assert plain["evaluations"] == [{"step": 0, "accuracy": "NaN", "loss": "Infinity", "train_loss": "-Infinity"}]


def test_the_version_stands_first_in_every_file(examples, make_result):
    texts = {
        to_json(examples["two arms"]): COMPARISON_VERSION,
        to_json(examples["two arms"].runs[0]): RUNS_VERSION,
        to_json(make_result(5.0)): RUNS_VERSION,
    }
    for text, version in texts.items():
        assert next(iter(json.loads(text).items())) == ("format_version", version)


def test_a_comparison_of_format_2_is_read(examples):
    """As format 2 has them; they and all else are shown as they stand."""
    found = examples["six arms"]
    plain = json.loads(to_json(found)) | {"format_version": 2, "remarks": ["1 earlier run is not reused"]}
    plain["notes"] = sentences(found.notes)
    back = from_json(Comparison, json.dumps(plain))
    assert sentences((*back.notes, *back.remarks)) == [*plain["notes"], *plain["remarks"]]
    lost = set(to_markdown(found).splitlines()) - set(to_markdown(back).splitlines())
    assert {line.partition(",")[0].partition(" (")[0] for line in lost} == {
        "#### Warnings", "So far", "- 52 of 56 runs are done", "- Diverged", "- Failed: careful xavier initialization",
    }  # fmt: skip
    assert replace(back, notes=found.notes, remarks=()) == found


# --- refused ------------------------------------------------------------------------------------------------------


def changed(text: str, *path: object, to: object) -> str:
    """The JSON with one value replaced."""
    plain = at = json.loads(text)
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    return json.dumps(plain)


def refusal(text: str) -> str:
    with pytest.raises(BncliError) as refused:
        from_json(Comparison, text)
    assert refused.value.exit_code == USAGE
    return str(refused.value)


@pytest.mark.parametrize("text", ["", "not json", "[1, 2", '{"a": 1}', "[]", "3", "null", "[" * 100_000, "\x00\x01"])
def test_text_that_is_no_result_is_refused(text):
    assert "bncli wrote" in refusal(text)


@pytest.mark.parametrize(
    ("version", "advice"),
    [
        (COMPARISON_VERSION + 1, "update bncli"),
        (1, "create it again"),
        (0, "create it again"),
        ("1", "create it again"),
    ],
)
def test_another_format_version_is_refused_with_what_to_do(examples, version, advice):
    message = refusal(changed(to_json(examples["two arms"]), "format_version", to=version))
    assert advice in message
    assert json.dumps(version) in message


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("runs", 3, "result", "steps_run"), "many", "runs[3].result.steps_run: expected a whole number"),
        (("runs", 3, "result", "steps_run"), 1.5, "expected a whole number"),
        (("runs", 3, "result", "steps_run"), True, "expected a whole number"),
        (("arms", 0, "best"), "high", "arms[0].best: expected a number"),
        (("arms", 0, "curve", 2), [1.0, 2.0], "arms[0].curve[2]: expected a list"),
        (("arms", 0, "arm"), None, "arms[0].arm: expected text"),
        (("arms", 1, "ratio", "method"), "guess", '"medians"'),
        (("arms", 1, "ratio"), [], "arms[1].ratio: expected an object"),
        (("plan", "grid"), 3, "plan.grid: expected an object"),
        (("plan", "grid", "optimizer.lr"), 0.3, "plan.grid.optimizer.lr: expected a list"),
        (("plan", "colour"), "red", "plan.colour is not a known field"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_its_place(examples, path, value, words):
    assert words in refusal(changed(to_json(examples["two arms"]), *path, to=value))


def test_a_missing_field_is_named(examples):
    plain = json.loads(to_json(examples["two arms"]))
    del plain["plan"]["budget"]
    assert "plan.budget is missing" in refusal(json.dumps(plain))


@pytest.mark.parametrize("point", [{}, {"optimizer.lr": None}, {"optimizer.lr": "0.3"}])
def test_a_run_of_a_search_has_a_number_as_its_rate(examples, point):
    example = examples["two arms"]
    run = example.runs[0]
    steps = {"steps": run.result.budget}
    searched = [replace(run, phase="rate", point={**run.point, "optimizer.lr": rate}) for rate in (0.3, 0.6)]
    found = replace(example, plan=replace(example.plan, largest_learning_rate=steps), runs=(*example.runs, *searched))
    assert from_json(Comparison, to_json(found)) == found
    wrong = replace(found, runs=(*example.runs, searched[0], replace(run, phase="rate", point=point)))
    assert f"run {run.key}: is not of the plan" in refusal(to_json(wrong))


def test_a_run_is_no_comparison(examples):
    assert "comparison" in refusal(to_json(examples["two arms"].runs[0]))


# --- events -------------------------------------------------------------------------------------------------------


def test_an_event_is_one_line_of_json(make_result):
    target = Target("accuracy", 0.95)
    evaluated = Evaluated(Evaluation(10, 0.5, math.inf, None), 0.3)
    finished = RunFinished(make_result(812.4))
    events = [RunStarted("a\nb", "cpu", 9, 100, 60, target), StepDone(5, math.nan, 0.3, 1e4, None), evaluated, finished]
    lines = [event_line(event) for event in events]
    assert not any("\n" in line for line in lines)
    started, step, seen, last = map(json.loads, lines)
    assert started["event"] == "run_started"
    assert started["target"] == {"metric": "accuracy", "value": 0.95}
    assert step == {
        "event": "step_done", "step": 5, "loss": "NaN", "learning_rate": 0.3, "samples_per_s": 1e4, "memory_mib": None,
    }  # fmt: skip
    assert (seen["event"], seen["step"], seen["accuracy"], seen["learning_rate"]) == ("evaluated", 10, 0.5, 0.3)
    assert (last["event"], last["status"], last["steps_to_target"]) == ("run_finished", "reached", 812.4)
    assert "evaluations" not in last
