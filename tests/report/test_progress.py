"""Progress bars on a terminal, and lines off it."""

from __future__ import annotations

import errno
import io
import itertools
import re
from dataclasses import replace

import pytest
from rich.console import Console

from bncli.report.progress import CompareProgress, GradcheckProgress, ProfileProgress, TrainProgress
from bncli.results.compare import ComparisonStarted, RunBegan, RunEnded, RunProgressed, RunRecord
from bncli.results.gradcheck import CheckProgress
from bncli.results.profile import Measuring, ProfileStarted, RowDone
from bncli.results.train import Evaluated, Evaluation, Probed, RunResult, RunStarted, StepDone, Target
from tests.report.conftest import run_result
from tests.report.gradcheck.made_up_checks import BAD, GROUPS
from tests.report.made_up_costs import ERROR, failed, one_case

TRAIN = [
    RunStarted("digits", "cpu", 27_710, 3000, 60, Target("accuracy", 0.95)),
    Evaluated(Evaluation(0, 0.1, 2.3, None), 0.1),
    Probed((), 0.04),
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
ROWS = one_case().rows
PROFILE = [
    ProfileStarted("kernels", 3),
    Measuring("native bn [fp32] 256x64x56x56", 0.0),
    RowDone(ROWS[0]),
    Measuring("fused bn fp32 256x64x56x56", 0.5),
    RowDone(ROWS[1]),
]


KINDS = [
    (TrainProgress, TRAIN),
    (CompareProgress, COMPARE),
    (ProfileProgress, PROFILE),
    (GradcheckProgress, [CheckProgress(0, 168), CheckProgress(144), *BAD.groups[:2]]),
]


def shown(
    kind: type,
    events: list,
    terminal: bool,
    quiet: bool = False,
    width: int = 120,
    encoding: str = "utf-8",
    step_s: float = 0.0,
) -> str:
    """What is written, where each look at the clock is `step_s` later than the one before."""
    clock = itertools.count(0.0, step_s)
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    console = Console(file=file, force_terminal=terminal, width=width, color_system=None, legacy_windows=False)
    with kind(quiet, console, lambda: next(clock)) as sink:
        for event in events:
            sink(event)
        sink.bars.refresh()
        file.seek(0)
        return file.read()


def test_the_bar_of_a_run_shows_step_loss_metric_speed_and_memory() -> None:
    screen = shown(TrainProgress, TRAIN, terminal=True)
    for word in ("digits", "20/3000", "2.250", "accuracy", "0.500", "91,234/s", "812 MiB"):
        assert word in screen


def test_the_bars_of_a_comparison_show_all_runs_and_each_worker() -> None:
    screen = shown(CompareProgress, COMPARE, terminal=True)
    for word in ("5/56", "plain, lr 1, seed 0", "120/3000", "accuracy 0.430", "failed: it died"):
        assert word in screen


@pytest.mark.parametrize("terminal", [True, False])
def test_failures_of_one_text_are_told_once_and_counted_at_the_end(terminal: bool) -> None:
    ends = [
        RunEnded(0, f"plain, seed {seed}", 1 + seed, 4, RunRecord(str(seed), "plain", {}, seed, "tune", None, why))
        for seed, why in enumerate(["it died", "it died", "no memory", "it died"])
    ]
    screen = shown(CompareProgress, [ComparisonStarted("digits", 4, 0, "accuracy"), *ends], terminal)
    assert screen.count("it died") == screen.count("no memory") == 1
    assert "3 runs failed as plain, seed 0 did" in screen
    assert "1 runs" not in screen


def test_a_check_is_said_until_the_runs_begin() -> None:
    progress = CompareProgress(console=Console(file=io.StringIO(), force_terminal=True))
    with progress:
        progress.check()
        assert [task.description for task in progress.bars.tasks] == ["checking data and models"]
        progress(COMPARE[0])
        assert [task.description for task in progress.bars.tasks] == ["digits"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [40, 60, 80])
@pytest.mark.parametrize(("kind", "events"), KINDS)
def test_a_narrow_or_ascii_terminal_shows_how_much_is_done(kind: type, events: list, width: int, encoding: str) -> None:
    screen = shown(kind, events, terminal=True, width=width, encoding=encoding)
    last = [line for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen).splitlines() if line.strip()][-1]
    assert len(last.strip("\r")) < width
    assert re.search(r"  20/3000|120/3000|144/168|50%|0:00:0\d", last)


def test_a_single_run_is_counted_and_wide_names_leave_the_figures_in_sight() -> None:
    screen = shown(CompareProgress, [ComparisonStarted("批量归一化" * 9, 1, 0, "accuracy")], terminal=True, width=60)
    assert "...  0/1" in screen
    log = shown(CompareProgress, [ComparisonStarted("digits", 1, 0, "accuracy")], terminal=False)
    assert log == "digits: 1 run\n"


@pytest.mark.parametrize(("kind", "events"), KINDS)
def test_nothing_is_shown_when_quiet(kind: type, events: list) -> None:
    assert shown(kind, events, terminal=True, quiet=True) == ""
    assert shown(kind, events, terminal=False, quiet=True) == ""


def test_without_a_terminal_there_are_plain_lines_now_and_then() -> None:
    log = shown(TrainProgress, TRAIN, terminal=False)
    assert log == "digits: 27,710 parameters on cpu, 3,000 steps at most\n"  # the rest within the first ten seconds
    log = shown(TrainProgress, TRAIN, terminal=False, step_s=20.0)
    assert "step 20: held-out accuracy 0.500, loss 1.900" in log
    assert "\x1b" not in log


def test_a_failure_is_logged_at_once() -> None:
    log = shown(CompareProgress, COMPARE, terminal=False)
    assert log.splitlines() == ["digits: 50 runs, 3 of them already done", "5/56 plain, lr 3, seed 0: failed: it died"]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (run_result(961.8), "target after 962 steps"),
        (
            replace(run_result(None, status="budget"), first_hit=2900),
            "first at the target at step 2,900, not settled after",
        ),
        (run_result(None, status="budget"), "target not reached in 3,000 steps"),
        (run_result(None, status="given up"), "stopped at step 3,000: could no longer win"),
        (replace(run_result(None, status="diverged"), reason="the loss is nan at step 7"), "the loss is nan at step 7"),
    ],
)
def test_how_a_run_ended_is_logged(result: RunResult, words: str) -> None:
    ended = RunEnded(0, "plain, lr 1, seed 0", 1, 2, RunRecord("a", "plain", {}, 0, "tune", result))
    log = shown(CompareProgress, [ComparisonStarted("digits", 2, 0, "accuracy"), ended], terminal=False, step_s=20.0)
    assert log.splitlines()[1].startswith(f"1/2 plain, lr 1, seed 0: {words}")


# --- profiles -----------------------------------------------------------------------------------------------------


def test_the_bar_of_a_profile_shows_percent_and_current_row() -> None:
    screen = shown(ProfileProgress, PROFILE, terminal=True)
    for word in ("kernels", "50%", "fused bn fp32 256x64x56x56"):
        assert word in screen


def test_a_label_with_brackets_is_shown_as_it_is() -> None:
    assert "native bn [fp32] 256x64x56x56" in shown(ProfileProgress, PROFILE[:2], terminal=True)


@pytest.mark.parametrize(
    ("event", "label"),
    [
        (Measuring("", phase="ceilings"), "the machine's ceilings, by copies and multiply-adds"),
        (Measuring("normed", phase="check"), "normed: checking the step of each kernel"),
        (Measuring("normed", phase="round", mode="training", round=3), "normed: training, round 3"),
        (Measuring("normed", phase="parts", mode="training"), "normed: training, breakdown of time and memory"),
        (Measuring("normed", phase="norms"), "normed: norm-layer diagnostics"),
    ],
)
def test_the_bar_of_a_profile_says_what_is_measured(event: Measuring, label: str) -> None:
    assert label in shown(ProfileProgress, [PROFILE[0], event], terminal=True)


def test_the_bar_of_a_profile_never_moves_backwards() -> None:
    screen = shown(ProfileProgress, [*PROFILE, Measuring("again", 0.25)], terminal=True)
    assert "again" in screen
    assert "25%" not in screen
    end = Measuring("end", 1.7)
    assert "99%" in shown(ProfileProgress, [*PROFILE, end], terminal=True)  # a row is still to be done
    assert "100%" in shown(ProfileProgress, [*PROFILE, RowDone(ROWS[0]), end], terminal=True)


def test_a_profile_never_has_more_rows_done_than_planned() -> None:
    rows = [ProfileStarted("kernels", 1), RowDone(ROWS[0]), RowDone(ROWS[1]), Measuring("end", 1.0)]
    assert "2/2 rows, 100%: end" in shown(ProfileProgress, rows, terminal=False, step_s=20.0)


def test_without_a_terminal_a_profile_has_few_lines_with_the_time_left() -> None:
    assert shown(ProfileProgress, PROFILE, terminal=False) == "kernels: 3 rows to measure\n"
    log = shown(ProfileProgress, PROFILE, terminal=False, step_s=20.0)
    assert "0/3 rows, 0%: native bn [fp32] 256x64x56x56" in log
    (line,) = [line for line in log.splitlines() if line.startswith("1/3 rows, 50%")]
    assert "s left: fused bn fp32 256x64x56x56" in line
    assert "\x1b" not in log


def test_the_time_left_is_what_the_rest_takes_at_the_speed_so_far() -> None:
    clock = [100.0]
    console = Console(file=io.StringIO(), force_terminal=False, width=120)
    with ProfileProgress(False, console, lambda: clock[0]) as sink:
        sink(ProfileStarted("kernels", 4))
        clock[0] += 30.0
        sink(Measuring("fused", 0.25))
    assert "25%, about 90 s left: fused" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_longer_than_asked_for_is_shown_and_logged_once() -> None:
    late = [ProfileStarted("kernels", 3, 45.0), Measuring("one", 0.2, 46.0), Measuring("two", 0.5, 70.4)]
    assert "about 70 s; asked for 45" in shown(ProfileProgress, late, terminal=True)
    log = shown(ProfileProgress, [*late, Measuring("three", 0.7, 72.0)], terminal=False)
    assert log.splitlines() == ["kernels: 3 rows to measure", "about 70 s; asked for 45 s"]
    assert "asked for" not in shown(ProfileProgress, late[:2], terminal=True)
    assert "asked for" not in shown(ProfileProgress, [ProfileStarted("kernels", 3), *late[1:]], terminal=True)


def test_a_wrong_kernel_is_logged_at_once() -> None:
    wrong = failed(ROWS[0].case, "mine:x", ERROR, wrong=True)  # rich has an emoji for :x:
    log = shown(
        ProfileProgress,
        [PROFILE[0], RowDone(wrong), RowDone(failed(ROWS[0].case, "apex", "is not installed"))],
        terminal=False,
    )
    assert log.splitlines() == ["kernels: 3 rows to measure", f"1/3 mine:x: wrong: {ERROR}"]


# --- gradient checks ----------------------------------------------------------------------------------------------


def test_the_bar_of_a_check_has_a_total_and_names_the_last_group() -> None:
    events = [CheckProgress(0, 200), CheckProgress(96), GROUPS[0], CheckProgress(4), replace(GROUPS[3], name="idle")]
    last = shown(GradcheckProgress, events, terminal=True).splitlines()[-1]
    assert "checking; last: forward, training" in last
    assert "100/200" in last
    assert last.count("━") == last.count("─") > 0


def test_a_failed_group_is_logged_at_once() -> None:
    assert shown(GradcheckProgress, GROUPS, terminal=False) == ""
    events = [CheckProgress(0, 200), CheckProgress(96), BAD.groups[0], CheckProgress(48), BAD.groups[1]]
    log = shown(GradcheckProgress, events, terminal=False)
    assert log == "gradcheck: 144/200 cases, 40 failed; last: dx\n"
    assert shown(GradcheckProgress, GROUPS, terminal=False, step_s=20.0).count("\n") == len(GROUPS)


def test_a_terminal_that_is_gone_does_not_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        gone = False

        def write(self, text: str) -> int:
            if self.gone:
                raise OSError(errno.EIO, "gone")
            return super().write(text)

    terminal = Terminal()
    with TrainProgress(console=Console(file=terminal, force_terminal=True)) as progress:
        progress(RunStarted("digits", "cpu", 1, 10, 1, None))
        progress(StepDone(5, 0.5, 0.1, 1e4, None))
        terminal.gone = True
    assert "digits" in terminal.getvalue()
