"""What is shown while work goes on, on a terminal and off it."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from bncli.report import progress as module
from bncli.report.progress import CompareProgress, TrainProgress
from bncli.results.compare import ComparisonStarted, RunBegan, RunEnded, RunProgressed, RunRecord
from bncli.results.train import Evaluated, Evaluation, RunResult, RunStarted, StepDone, Target
from tests.report.conftest import run_result

TRAIN = [
    RunStarted("digits", "cpu", 27_710, 3000, 60, Target("accuracy", 0.95)),
    Evaluated(Evaluation(0, 0.1, 2.3, None), 0.1),
    StepDone(20, 2.25, 0.1, 91_234.0, 812.0),
    Evaluated(Evaluation(20, 0.5, 1.9, 2.25), 0.1),
]
COMPARE = [
    ComparisonStarted("digits", 50, 3, "accuracy"),
    RunBegan(0, "plain, lr 1, seed 0", 3000),
    RunProgressed(0, 120, 0.43),
    RunEnded(0, "plain, lr 1, seed 0", 4, 50, RunRecord("a", "plain", {}, 0, "tune", run_result(962.0))),
    RunEnded(1, "plain, lr 3, seed 0", 5, 56, RunRecord("b", "plain", {}, 0, "tune", None, "it died")),
]


def shown(kind: type, events: list, terminal: bool, quiet: bool = False) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    with kind(quiet, console) as sink:
        for event in events:
            sink(event)
        sink.bar.refresh()
        return str(console.file.getvalue())


def test_the_bar_of_a_run_shows_step_loss_metric_speed_and_memory() -> None:
    screen = shown(TrainProgress, TRAIN, terminal=True)
    for word in ("digits", "20/3000", "2.250", "accuracy", "0.500", "91,234/s", "812 MiB"):
        assert word in screen


def test_the_bars_of_a_comparison_show_all_runs_and_what_each_worker_does() -> None:
    screen = shown(CompareProgress, COMPARE, terminal=True)
    for word in ("5/56", "plain, lr 1, seed 0", "120/3000", "accuracy 0.430", "failed: it died"):
        assert word in screen


@pytest.mark.parametrize(("kind", "events"), [(TrainProgress, TRAIN), (CompareProgress, COMPARE)])
def test_nothing_is_shown_when_quiet(kind: type, events: list) -> None:
    assert shown(kind, events, terminal=True, quiet=True) == ""
    assert shown(kind, events, terminal=False, quiet=True) == ""


def test_off_a_terminal_there_are_plain_lines_now_and_then_and_no_control_characters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = shown(TrainProgress, TRAIN, terminal=False)
    assert log == "digits: 27,710 parameters on cpu, 3,000 steps at most\n"  # the rest within the first ten seconds
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    log = shown(TrainProgress, TRAIN, terminal=False)
    assert "step 20: held-out accuracy 0.500, loss 1.900" in log
    assert "\x1b" not in log


def test_a_failure_is_said_at_once_off_a_terminal() -> None:
    log = shown(CompareProgress, COMPARE, terminal=False)
    assert log.splitlines() == ["digits: 50 runs, 3 of them done already", "5/56 plain, lr 3, seed 0: failed: it died"]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (run_result(961.8), "target after 962 steps"),
        (replace(run_result(None, status="budget"), first_hit=2900), "at the target at step 2,900, not settled in"),
        (run_result(None, status="budget"), "target not reached in 3,000 steps"),
        (replace(run_result(None, status="diverged"), reason="the loss is nan at step 7"), "the loss is nan at step 7"),
    ],
)
def test_how_a_run_ended_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch, result: RunResult, words: str) -> None:
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    ended = RunEnded(0, "plain, lr 1, seed 0", 1, 2, RunRecord("a", "plain", {}, 0, "tune", result))
    log = shown(CompareProgress, [ComparisonStarted("digits", 2, 0, "accuracy"), ended], terminal=False)
    assert log.splitlines()[1].startswith(f"1/2 plain, lr 1, seed 0: {words}")
