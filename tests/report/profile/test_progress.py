"""What is shown while a profile is measured, on a terminal and off it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bncli.report import progress as module
from bncli.report.progress import ProfileProgress
from bncli.results.profile import Measuring, ProfileStarted, RowDone
from tests.report.made_up_costs import ERROR, failed, one_case

ROWS = one_case().rows
EVENTS = [
    ProfileStarted("kernels", 3),
    Measuring("native bn [fp32] 256x64x56x56", 0.0),
    RowDone(ROWS[0]),
    Measuring("fused bn fp32 256x64x56x56", 0.5),
    RowDone(ROWS[1]),
]


def shown(events: list, terminal: bool, quiet: bool = False) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    with ProfileProgress(quiet, console) as sink:
        for event in events:
            sink(event)
        sink.bar.refresh()
        return str(console.file.getvalue())


def test_the_bar_shows_the_share_that_is_done_and_what_is_measured() -> None:
    screen = shown(EVENTS, terminal=True)
    for word in ("kernels", "50%", "fused bn fp32 256x64x56x56"):
        assert word in screen


def test_a_label_with_brackets_is_shown_as_it_is() -> None:
    assert "native bn [fp32] 256x64x56x56" in shown(EVENTS[:2], terminal=True)


def test_the_bar_never_turns_back_and_never_passes_its_end() -> None:
    screen = shown([*EVENTS, Measuring("again", 0.25)], terminal=True)
    assert "again" in screen
    assert "25%" not in screen
    assert "100%" in shown([*EVENTS, Measuring("end", 1.7)], terminal=True)


def test_off_a_terminal_there_are_few_plain_lines_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(EVENTS, terminal=False) == "kernels: 3 rows to measure\n"
    now = iter(range(0, 10_000, 20))  # each look at the clock is 20 s later
    monkeypatch.setattr(module, "monotonic", lambda: float(next(now)))
    log = shown(EVENTS, terminal=False)
    assert "0/3 rows, 0%: native bn [fp32] 256x64x56x56" in log
    (line,) = [line for line in log.splitlines() if line.startswith("1/3 rows, 50%")]
    assert "s left: fused bn fp32 256x64x56x56" in line
    assert "\x1b" not in log


def test_the_time_left_is_what_the_rest_takes_at_the_speed_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), force_terminal=False, width=120)
    with ProfileProgress(False, console) as sink:
        sink(ProfileStarted("kernels", 4))
        clock[0] += 30.0
        sink(Measuring("fused", 0.25))
    assert "25%, about 90 s left: fused" in console.file.getvalue()  # type: ignore[attr-defined]


def test_that_it_takes_longer_than_was_asked_for_is_in_the_bar_and_said_once_off_a_terminal() -> None:
    late = [ProfileStarted("kernels", 3, 45.0), Measuring("one", 0.2, 46.0), Measuring("two", 0.5, 70.4)]
    assert "about 70 s; asked for 45" in shown(late, terminal=True)
    log = shown([*late, Measuring("three", 0.7, 72.0)], terminal=False)
    assert log.splitlines() == ["kernels: 3 rows to measure", "about 70 s; asked for 45 s"]
    assert "asked for" not in shown(late[:2], terminal=True)
    assert "asked for" not in shown([ProfileStarted("kernels", 3), *late[1:]], terminal=True)


def test_a_wrong_kernel_is_said_at_once_off_a_terminal() -> None:
    wrong = failed(ROWS[0].case, "mine:norm", ERROR, wrong=True)
    log = shown([EVENTS[0], RowDone(wrong), RowDone(failed(ROWS[0].case, "apex", "is not installed"))], terminal=False)
    assert log.splitlines() == ["kernels: 3 rows to measure", f"1/3 mine:norm: wrong: {ERROR}"]


def test_nothing_is_shown_when_quiet() -> None:
    assert shown(EVENTS, terminal=True, quiet=True) == ""
    assert shown(EVENTS, terminal=False, quiet=True) == ""
