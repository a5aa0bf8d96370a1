"""The tables of a profile at the widths and encodings that they meet."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from bncli.report.profile.baseline import GateReport
from bncli.report.profile.kernels import KernelReport
from bncli.report.profile.steps import StepReport
from bncli.report.profile.text import samples_cell
from bncli.results.environment import Interval
from bncli.results.profile import KernelCost, Speedup
from tests.report.made_up_costs import (
    ERROR,
    KERNELS,
    failed,
    hundred_rows,
    kernel_cost,
    kernel_profile,
    made_gate,
    nothing_measured,
    one_case,
    resnet,
    step_profile,
    with_errors,
)

REPORTS = {
    **{name: (lambda make=make: KernelReport(make())) for name, make in KERNELS.items()},
    "step": lambda: StepReport(step_profile()),
    "gate": lambda: GateReport(made_gate(), one_case(), with_errors()),
}


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 160])
@pytest.mark.parametrize("name", REPORTS)
def test_no_line_is_wider_than_the_output_and_nothing_is_cut(name, width, show):
    text = show(REPORTS[name](), width)
    assert max(map(len, text.splitlines())) <= max(width, 0)
    assert "…" not in text


# --- kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_the_ratio_and_the_time_of_both_are_there_at_every_width(width, show):
    text = show(KernelReport(one_case()), width)
    (fused,) = (each for each in one_case().rows if each.kernel == "fused")
    for figure in ("2.31", "(2.24–2.38)", samples_cell(fused.both.samples_ms)[0]):
        assert figure in text


def test_in_100_columns_memory_is_there_and_what_ran_is_said_below(show):
    text = show(KernelReport(kernel_profile()), 100)
    at = next(at for at, line in enumerate(text.splitlines()) if line.startswith("shape"))
    upper, lower = (" ".join(line.split()) for line in text.splitlines()[at - 1 : at + 1])
    assert upper == "fwd bwd both of peak saved"
    assert lower == "shape kernel ms ms ms GB/s copy vs native MiB MiB"
    assert "Ran: native: ATen | fused: in cache | compiled: Inductor" in text
    assert "Hidden columns" not in text


def test_in_80_columns_memory_is_left_out_and_that_is_said(show):
    text = show(KernelReport(kernel_profile()), 80)
    assert "Hidden columns (terminal too narrow): peak MiB, saved MiB" in text
    assert "forward" not in next(line for line in text.splitlines() if line.startswith("shape"))


def test_a_wide_output_has_every_column_and_the_spread_of_each_direction(show):
    text = show(KernelReport(kernel_profile()), 160)
    line = next(line for line in text.splitlines() if "in cache" in line)
    assert line.count("±") == 3
    assert line.endswith("in cache")


def test_another_implementation_at_some_shapes_is_said_with_them(show):
    profile = kernel_profile(1, ("bn",))
    rows = [replace(each, case=replace(each.case, shape=(2, 4))) for each in profile.rows]
    rows = [replace(each, ran="two passes") if each.kernel == "fused" else each for each in rows]
    text = show(KernelReport(replace(profile, rows=(*profile.rows, *profile.rows, *rows))), 100)
    assert "fused: in cache; two passes at 2x4" in text


def test_rows_stand_below_the_heading_of_their_operation_dtype_and_layout(show):
    lines = show(KernelReport(resnet()), 100).splitlines()
    for layout in ("contiguous", "channels_last"):
        for operation in ("bn", "bn+relu", "bn+add+relu"):
            assert lines.count(f"{operation}, bf16, {layout}") == 1
    first = lines.index("bn, bf16, contiguous")
    assert lines[first + 1].startswith("256x64x56x56   native")
    assert lines[first + 2].startswith(" " * 14 + " fused")  # the shape is not repeated


def test_rows_of_a_group_that_come_apart_are_brought_together(show):
    profile = resnet()
    mixed = replace(profile, rows=profile.rows[::2] + profile.rows[1::2])
    assert show(KernelReport(mixed), 100) == show(KernelReport(profile), 100)


def test_decimal_points_stand_below_each_other(show):
    text = show(KernelReport(kernel_profile(2, ("bn",))), 160)
    lines = [line for line in text.splitlines() if re.search(r"\b(fused|compiled) .*%", line)]
    places = {line.index(each) for line in lines for each in re.findall(r"\d+\.\d+ +\(", line)}
    points = {line[: line.index("(")].rstrip().rindex(".") for line in lines}
    assert len(lines) == 4
    assert len(points) == 1, places


def test_native_is_dim_and_surely_faster_is_green_and_surely_slower_red():
    file = io.StringIO()
    Console(file=file, width=100, force_terminal=True, color_system="standard", legacy_windows=False).print(
        KernelReport(kernel_profile(1, ("bn",)))
    )
    text = file.getvalue()
    line = {
        name: next(each for each in text.splitlines() if name in each and "%" in each)
        for name in ("native", "fused", "compiled")
    }
    assert line["native"].startswith("\x1b[2m")
    assert re.search(r"\x1b\[1;32m2\.31", line["fused"])
    assert re.search(r"\x1b\[1;31m0\.260", line["compiled"])


def test_a_ratio_that_may_be_either_side_of_1_has_no_colour():
    file = io.StringIO()
    profile = one_case()
    unsure = replace(profile.rows[1], faster=Speedup(1.2, Interval(0.9, 1.5)))
    Console(file=file, width=100, force_terminal=True, color_system="standard", legacy_windows=False).print(
        KernelReport(replace(profile, rows=(profile.rows[0], unsure), means=()))
    )
    assert "\x1b[1m1.20" in file.getvalue()
    assert "\x1b[1;32m" not in file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_an_error_stands_in_place_of_the_times(width, show):
    text = show(KernelReport(with_errors()), width)
    lines = text.splitlines()
    at = next(index for index, line in enumerate(lines) if "mine:norm" in line and "WRONG" in line)
    assert ERROR in " ".join(" ".join(lines[at : at + 3]).split())
    (missing,) = [line for line in lines if "is not installed; pip" in line]
    assert missing.split() == ["apex", "is", "not", "installed;", "pip", "install", "apex"]


def test_an_error_of_many_lines_stays_one_message(show):
    bad = replace(with_errors().rows[3], error="cc: cannot compile\r\n\n  line 3: error")
    text = show(KernelReport(replace(with_errors(), rows=(bad,))), 160)
    assert "WRONG: cc: cannot compile line 3: error" in text


def test_an_interrupted_profile_says_how_far_it_came(show):
    assert "interrupted: 7 of 12 rows were measured" in show(KernelReport(with_errors()), 100)
    assert "interrupted" not in show(KernelReport(one_case()), 100)


def test_cases_that_nothing_was_measured_of_are_counted_in_a_line_and_wrong_results_are_always_shown(show):
    def of(rows):
        return KernelReport(replace(one_case(), rows=tuple(rows), planned=len(rows)))

    first, *_ = one_case().rows
    late = "not measured: the time is up"
    wide, tall = (replace(first.case, shape=shape) for shape in ((7, 64, 9, 9), (7, 64, 8, 8)))
    rows = [*one_case().rows, *(failed(wide, kernel, late) for kernel in ("native", "fused"))]
    text = show(of(rows), 160)
    assert f"{len(rows) - 2} of {len(rows)} rows measured" in text
    assert f"1 of 2 cases are left out, {late}" in text
    assert "7x64x9x9" not in text
    text = show(of([*rows, failed(tall, "native", ERROR, wrong=True)]), 160)
    assert "7x64x8x8" in text
    assert "WRONG" in text
    assert "7x64x9x9" in show(of(rows[-2:]), 160)  # there would be nothing else


def test_a_profile_without_rows_still_says_where_and_why(show):
    text = show(KernelReport(nothing_measured()), 100)
    assert "interrupted: 0 of 4 rows were measured" in text
    assert "Measured ceilings" in text
    assert "Example CPU" in text


def test_unknown_memory_is_a_dash_and_never_0(show):
    line = next(each for each in show(KernelReport(with_errors()), 160).splitlines() if each.startswith("256x512x7x7"))
    assert line.split()[-3:] == ["–", "–", "–"]


def test_speed_and_share_of_copy_are_of_the_floor_and_the_largest_copy(show):
    case = one_case().rows[0].case
    made = kernel_cost(case, "native")
    times = replace(made.both, samples_ms=(100.0, 100.0, 100.0), floor_bytes=5e8)
    text = show(KernelReport(replace(one_case(), rows=(replace(made, both=times),))), 100)
    assert "100 ±0%" in " ".join(text.split())
    assert "5.00" in text  # 0.5 GB in 0.1 s
    assert "42%" in text  # of 11.87 GB/s


def test_a_warm_and_a_cold_cache_are_told_apart(show):
    assert "warm cache" in show(KernelReport(with_errors()), 160)
    assert "cold cache" in show(KernelReport(one_case()), 160)


def test_the_means_name_the_worst_shape(show):
    text = show(KernelReport(kernel_profile()), 100)
    assert "Over all shapes: geometric mean" in text
    below = text[text.index("Over all shapes") :].splitlines()
    (line,) = [line for line in below if line.split()[:2] == ["bn", "fused"]]
    assert line.split() == ["bn", "fused", "2", "2.31x", "(2.24–2.38)", "2.08x", "256x64x56x56"]


def test_a_plain_ascii_output_gets_no_question_marks(show):
    for report in (KernelReport(one_case()), StepReport(step_profile()), GateReport(made_gate())):
        text = show(report, 100, "ascii")
        assert "?" not in text
    assert "+-1%" in show(KernelReport(one_case()), 100, "ascii")


def test_a_hundred_rows_keep_one_line_a_row(show):
    text = show(KernelReport(hundred_rows()), 100)
    assert sum(" native " in line or " fused " in line for line in text.splitlines() if "%" in line) == 96


def test_a_row_may_have_no_times_and_no_error(show):
    bare = KernelCost(one_case().rows[0].case, "fused", 1, None)
    assert "fused" in show(KernelReport(replace(one_case(), rows=(bare,), means=())), 100)
