"""The terminal sketch: axes, letters, the target, and outputs that have no braille."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bncli.report.compare.curves import Frame, sketch


def rows(comparison, **options) -> list[str]:
    return sketch(comparison, **options).plain.rstrip("\n").split("\n")


@pytest.mark.parametrize(("width", "height"), [(80, 18), (60, 12), (132, 30)])
def test_it_has_the_size_that_was_asked_for(examples, width, height):
    for name in ("two arms", "six arms", "falling loss"):
        lines = rows(examples[name], width=width, height=height)
        assert max(map(len, lines)) <= width
        assert len(lines) == height


def test_every_arm_has_a_letter_on_its_curve_and_in_the_legend(examples):
    lines = rows(examples["six arms"])
    legend = next(index for index, line in enumerate(lines) if line.startswith("optimizer steps"))
    for letter, arm in zip("abcdef", examples["six arms"].arms, strict=True):
        assert f"{letter} {arm.arm}" in " ".join(lines[legend:])
        assert any(letter in line[8:] for line in lines[1 : legend - 2])


def test_two_arms_with_the_same_curve_both_show_their_letters(examples):
    found = examples["two arms"]
    same = replace(found, arms=(found.arms[0], replace(found.arms[1], curve=found.arms[0].curve)))
    drawn = "".join(line[8:] for line in rows(same)[1:-3])
    assert "a" in drawn
    assert "b" in drawn


def test_the_target_is_a_dashed_row_with_its_value(examples):
    (line,) = [line for line in rows(examples["two arms"]) if line.strip().startswith("0.95")]
    assert line.count("╌") > 10


def test_steps_are_on_a_log_axis_with_round_numbers(examples):
    lines = rows(examples["two arms"])
    floor = next(line for line in lines if "└" in line)
    assert lines[lines.index(floor) + 1].split() == ["10", "20", "50", "100", "200", "500"]
    at = [place for place, sign in enumerate(floor) if sign == "┬"]
    assert at[3] - at[0] == pytest.approx((at[4] - at[1]), abs=1)  # 10 to 100 is as wide as 20 to 200


def test_a_faster_arm_is_drawn_further_to_the_left(examples):
    lines = rows(examples["two arms"], encoding="ascii")
    on_target = next(line for line in lines if line.strip().startswith("0.95"))
    assert on_target.index("b") < on_target.index("a")


def test_an_ascii_output_is_drawn_with_letters_alone(example):
    text = sketch(example, encoding="ascii").plain
    assert text.isascii()


def test_an_encoding_that_python_does_not_know_gets_ascii(examples):
    assert sketch(examples["two arms"], encoding="no such encoding").plain.isascii()


def test_without_an_evaluation_it_is_a_sentence(examples):
    assert sketch(examples["no runs yet"]).plain == "No curves yet: no run has been evaluated.\n"


def test_step_0_and_values_that_are_not_finite_are_left_out(examples):
    found = examples["falling loss"]
    points = ((0.0, 2.3, 2.3, 2.3), *found.arms[0].curve[1:], (2000.0, math.nan, math.nan, math.nan))
    assert sketch(replace(found, arms=(replace(found.arms[0], curve=points), found.arms[1]))) == sketch(found)


def test_one_point_is_enough(examples):
    found = examples["two arms"]
    arm = replace(found.arms[0], curve=((10.0, 0.5, 0.4, 0.6),))
    assert "a" in "".join(line[8:] for line in rows(replace(found, arms=(arm,)))[1:-3])


def test_steps_between_two_round_numbers_are_marked_at_the_ends(examples):
    found = examples["two arms"]
    arm = replace(found.arms[0], curve=tuple((float(step), 0.01 * step, 0.0, 1.0) for step in range(11, 20)))
    assert rows(replace(found, arms=(arm,)))[-2].split() == ["11", "19"]


def test_a_narrow_terminal_gets_a_narrow_sketch(examples):
    assert max(map(len, rows(examples["two arms"], width=20)[1:-3])) <= 20


def test_long_axis_values_widen_the_margin_and_not_the_sketch(examples):
    found = examples["falling loss"]
    small = replace(found, plan=replace(found.plan, target=replace(found.plan.target, value=0.000123456)))
    assert max(map(len, rows(small, width=80))) <= 80


def test_the_frame_puts_the_ends_at_its_borders():
    frame = Frame(steps=(10, 1000), values=(0.0, 1.0), columns=41, rows=11)
    assert [frame.column(step) for step in (10, 100, 1000)] == [0, 20, 40]
    assert [frame.row(value) for value in (1.0, 0.5, 0.0)] == [0, 5, 10]
    assert frame.column(1000, 2) == 81
