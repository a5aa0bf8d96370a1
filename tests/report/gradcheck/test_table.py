"""What `bncli gradcheck` prints at the widths of terminals."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace

import pytest

from bncli.cli.gradcheck import rerun_command
from bncli.report.gradcheck import table
from bncli.report.gradcheck.table import GradcheckReport
from bncli.report.gradcheck.text import TOLERANCES, in_tolerances
from bncli.results.gradcheck import CheckGroup, Gradcheck, NotChecked
from tests.report.conftest import Show
from tests.report.gradcheck.made_up_checks import BAD, GOOD, GROUPS, OTHER_RULE, PATHS, RULE, STEPS

COMMAND_ON_A_DEVICE = "bncli gradcheck --kernel mine.kernels:batch_norm --device 'a b' --allow-code"


def report(result: Gradcheck) -> GradcheckReport:
    return GradcheckReport(result, [rerun_command(result, failure) for failure in result.failures])


def words(text: str) -> str:
    return " ".join(text.split())


def row(text: str, start: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if start in line)
    return line[line.index(start) + len(start) :].split()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("result", [GOOD, BAD], ids=["good", "bad"])
def test_no_line_is_wider_than_the_output_and_no_figure_is_cut(result: Gradcheck, width: int, show: Show) -> None:
    text = show(report(result), width)
    assert max(map(len, text.splitlines())) <= width
    for group in result.groups:
        assert group.worst is None or in_tolerances(group.worst) in text
    for figure in ("4.6e-09", "275%", "35.2", "6.84", "34.0"):
        assert figure in text


def test_the_header_says_what_was_checked_and_what_really_ran(show: Show) -> None:
    lines = show(report(GOOD)).splitlines()
    assert lines[:3] == [
        "Gradients of batch norm, kernel native",
        "Ran: torch's own operator; on cpu",
        "Checked: 174 cases in 5 groups, effort default, in 21.3 s",
    ]


def test_a_group_has_a_row_with_cases_worst_error_and_verdict(show: Show) -> None:
    text = show(report(GOOD))
    assert row(text, "forward, training") == ["96", "0.31", "ok"]
    assert row(text, "forward, evaluation") == ["48", "0.52", "ok"]
    assert text.splitlines().count("values") == 1  # a section is named once, though its groups stand apart


def test_sections_are_headings_and_long_names_wrap(show: Show) -> None:
    named = replace(GROUPS[0], name="running statistics move by momentum, variance by m/(m-1)")
    lines = show(table.groups_table((*GROUPS[2:3], named, *GROUPS[3:]), "title"), 70).splitlines()
    heading = lines.index("values")
    assert lines[heading + 1].split()[-3:] == ["96", "0.31", "ok"]
    assert lines[heading + 1].startswith("running statistics move by")
    assert lines[heading + 2] == "momentum, variance by m/(m-1)"
    assert lines.index("derivatives") < heading < lines.index("hard inputs")


def test_a_group_in_which_no_case_could_run_says_why(show: Show) -> None:
    group = CheckGroup("values", "anything at all", 1, 1, None, None, skipped=NotChecked("nothing ran"))
    assert "Not checked:\n- anything at all: no case could run" in show(report(replace(GOOD, groups=(group,))))


def test_a_group_that_could_not_run_has_its_reason_below(show: Show) -> None:
    text = show(report(GOOD))
    assert row(text, "channels_last_3d in half precision  ") == ["–", "–", "not", "checked"]
    assert "Not checked:\n- channels_last_3d in half precision: Metal has no float64" in text
    assert text.splitlines()[-1] == "All 174 cases passed; 1 group not checked."


def test_a_wide_output_names_each_groups_worst_case(show: Show) -> None:
    assert "train-float64-4x3-double" not in show(report(GOOD), 80)
    assert row(show(report(GOOD), 120), "double backward")[-1] == "train-float64-4x3-double"


def test_the_paths_table_has_parts_error_bound_and_loss(show: Show) -> None:
    text = show(report(GOOD))
    assert row(text, "small batch 3x8") == ["16.9", "11.2", "11.3", "5.79", "9.1e-10", "2.4e-09", "275%"]
    assert "differs from the true one by 28% to 275% of its norm" in words(text)
    assert "It is within its bound in every case." in words(text)
    assert "differs from the true one by 28% of its norm" in words(show(table.paths_table(PATHS[:1])))


def test_the_paths_of_a_whitening_norm_go_through_the_covariance(show: Show) -> None:
    text = words(show(report(replace(GOOD, norm="iternorm"))))
    assert "through through its error if case direct mean covariance full error bound ignored" in text
    assert "affects the others that share its mean and covariance" in text
    assert "variance" not in text.replace("covariance", "").partition("dL/dx in its three parts")[2]


def test_a_gradient_beyond_its_bound_fails_though_every_group_passed(show: Show) -> None:
    result = replace(GOOD, paths=(PATHS[0], replace(PATHS[1], error=math.inf)))
    assert not result.passed
    assert GOOD.passed
    text = words(show(report(result)))
    assert "It is NOT the true gradient in small batch 3x8." in text
    assert text.endswith("174 cases passed, but dL/dx is beyond its bound in small batch 3x8; 1 group not checked.")


def test_a_failed_check_shows_its_first_case_command_and_diagnosis(show: Show) -> None:
    text = show(report(BAD))
    assert row(text, "dx  ") == ["48", "1.2e+06", "40", "FAILED"]
    assert row(text, "double backward  ") == ["24", "inf", "24", "FAILED"]
    off = "dx[0, 1, 2, 2] is 0.75; expected 0.25; relative error 0.5"
    assert f"First failing case: train-float32-4x3x5x5-relu-dx\n  {off}\n" in text
    assert "nan" not in text
    looks = (
        "Looks like: statistics treated as constants, because dx of train-float32-4x3x5x5-relu equals the direct path "
        "alone to 1e-09 and differs from the true one by 0.27 (relative); the bug explains 18 of 20 failing results "
        "that were examined"
    )
    assert looks in words(text)
    assert text.splitlines()[-1] == "64 of 168 cases FAILED."


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_command_that_runs_a_case_again_still_pastes_into_a_shell(width: int, show: Show) -> None:
    result = replace(BAD, device="a b")
    command = f"{COMMAND_ON_A_DEVICE} --only train-float32-4x3x5x5-relu-dx"
    lines = show(report(result), width).splitlines()
    start = lines.index("Run it again:") + 1
    assert shlex.split("\n".join(lines[start : lines.index("", start)]).replace("\\\n", "")) == shlex.split(command)


def test_tolerances_are_explained_for_failed_groups_or_full_effort(show: Show) -> None:
    default, failed, full = (words(show(report(r))) for r in (GOOD, BAD, replace(GOOD, effort="full")))
    rule, other = TOLERANCES[RULE], TOLERANCES[OTHER_RULE]
    unit = "Errors are in units of each case's tolerance: 1 or less passes"
    assert f"{unit} (a check with effort full explains how it is derived)." in default
    assert rule not in default
    assert f"{unit}. How tolerances are derived: - dx: {rule} - double backward: {other} Made on" in failed
    assert f"- forward, training, forward, evaluation, mean far from zero: {rule} - double" in full
    alike = words(show(report(replace(GOOD, effort="full", groups=GROUPS[:3]))))
    assert f"- all values: {rule} - double backward: {other}" in alike


def test_an_error_equal_to_the_ignored_paths_is_named(show: Show) -> None:
    ignoring = [replace(each, error=each.lost) for each in PATHS]
    assert (
        "It is NOT the true gradient in any case, and its error is exactly that of ignoring those two paths."
        in words(show(table.paths_table(ignoring)))
    )
    otherwise = [PATHS[0], replace(PATHS[1], error=0.1)]
    text = words(show(table.paths_table(otherwise)))
    assert text.endswith("It is NOT the true gradient in small batch 3x8.")


def test_an_interrupted_check_shows_the_groups_that_were_finished(show: Show) -> None:
    text = show(table.interrupted_table(BAD.groups[:2], "mine:norm"))
    assert text.startswith("Gradients of kernel mine:norm: interrupted\nThe groups that were finished\n")
    assert row(text, "forward, training") == ["96", "0.31", "ok"]
    assert "Worst cases:\n- dx: train-float32-4x3x5x5-relu-dx" in text
    text = show(table.interrupted_table([], "native"))
    assert text == "Gradients of kernel native: interrupted before a group of cases was finished\n"


def test_an_output_without_unicode_gets_ascii(show: Show) -> None:
    assert "--kernel 'mine:?'" in show(report(replace(BAD, kernel="mine:ü")), encoding="ascii")
    assert "kernel mine:?: interrupted" in show(table.interrupted_table([], "mine:ü"), encoding="ascii")
    assert show(table.demo_table(STEPS), encoding="ascii").isascii()


def test_markup_in_the_name_of_a_case_is_text(show: Show) -> None:
    group = replace(GROUPS[0], name="dx [bold]x[/]")
    assert "dx [bold]x[/]" in show(table.groups_table([group], "interrupted"))


def test_the_demonstration_shows_a_growing_bias_and_a_constant_loss(show: Show) -> None:
    text = show(table.demo_table(STEPS))
    assert row(text, "1,000  ") == ["116.8", "1.55624", "-4.8e-17", "1.55624"]
    assert "1,000 steps drive b from 0 to 116.8 while the loss stays at 1.55624" in words(text)
    falling = (STEPS[0], replace(STEPS[1], loss_ignoring=1.2))
    assert "while the loss goes from 1.55624 to 1.20000" in words(show(table.demo_table(falling)))
