"""The tables of kernels at the widths and encodings of terminals; no report of a profile is wider than the output."""

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
from bncli.results.profile import KernelCost, KernelProfile, Speedup
from tests.report.conftest import Show
from tests.report.made_up_costs import (
    ERROR,
    KERNELS,
    failed,
    hundred_rows,
    in_new_memory_too,
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
    **{name: KernelReport(make()) for name, make in KERNELS.items()},
    "step": StepReport(step_profile()),
    "gate": GateReport(made_gate(), one_case(), with_errors()),
}


def words(line: str) -> str:
    return " ".join(line.split())


@pytest.mark.parametrize("name", REPORTS)
def test_no_line_is_wider_than_the_output_and_nothing_is_cut(name: str, show: Show) -> None:
    for width in (20, 40, 60, 80, 100, 160):
        text = show(REPORTS[name], width)
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text


def test_a_plain_ascii_output_gets_no_question_marks(show: Show) -> None:
    shown = {name: show(REPORTS[name], 100, "ascii") for name in ("one case", "step", "gate")}
    assert not [name for name, text in shown.items() if "?" in text]
    assert "+-1%" in shown["one case"]


# --- columns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_the_speedup_and_the_time_of_both_are_there_at_every_width(width: int, show: Show) -> None:
    text = show(KernelReport(one_case()), width)
    (fused,) = (each for each in one_case().rows if each.kernel == "fused")
    assert fused.both
    for figure in ("2.31x", "(2.24–2.38)", samples_cell(fused.both.samples_ms).main):
        assert figure in text


def test_a_speedup_in_new_memory_has_a_column_and_a_line_that_says_what_that_is(show: Show) -> None:
    text = words(show(KernelReport(in_new_memory_too()), 160))
    assert text.count("3.75x") == 2
    assert "new memory: where tensors of 32 MiB or more take new pages" in text
    assert "new memory" not in show(KernelReport(one_case()), 160)


HIDDEN = "Hidden columns (terminal too narrow): "
RAN = "Implementations: native: ATen | fused: in cache | compiled: Inductor"


@pytest.mark.parametrize(
    ("width", "header", "spreads", "below"),
    [
        (60, "shape kernel ms copy", 0, f"{RAN} {HIDDEN}forward ms, backward ms, GB/s, peak MiB, saved MiB"),
        (80, "shape kernel ms ms ms GB/s copy", 0, f"{RAN} {HIDDEN}peak MiB, saved MiB"),
        (100, "shape kernel ms ms ms GB/s copy vs native MiB MiB", 1, RAN),
        (160, "shape kernel ms ms ms GB/s copy vs native MiB MiB implementation", 3, ""),
    ],
)
def test_a_narrow_output_has_fewer_columns_and_says_which(
    width: int, header: str, spreads: int, below: str, show: Show
) -> None:
    text = show(KernelReport(kernel_profile()), width)
    lines = text[: text.index("Geometric mean")].splitlines()
    (at,) = (at for at, line in enumerate(lines) if line.startswith("shape"))
    assert words(lines[at]).removesuffix(" vs native") == header
    assert ("fwd" in lines[at - 1], "forward" in lines[at - 1]) == (width in (80, 100), width == 160)
    (*_, last) = (line for line in lines if "compiled " in line and "%" in line)
    assert last.count("±") == spreads
    assert words("\n".join(lines).rpartition(last)[2]) == below


def test_another_implementation_at_some_shapes_is_named_with_them(show: Show) -> None:
    profile = kernel_profile(1, ("bn",))
    rows = [replace(each, case=replace(each.case, shape=(2, 4))) for each in profile.rows]
    rows = [replace(each, ran="two passes") if each.kernel == "fused" else each for each in rows]
    text = show(KernelReport(replace(profile, rows=(*profile.rows, *profile.rows, *rows))), 100)
    assert "fused: in cache (two passes at 2x4)" in text


def test_speed_and_share_of_copy_are_of_the_floor_and_the_largest_copy(show: Show) -> None:
    made = kernel_cost(one_case().rows[0].case, "native")
    assert made.both
    times = replace(made.both, samples_ms=(100.0, 100.0, 100.0), floor_bytes=5e8)
    text = words(show(KernelReport(replace(one_case(), rows=(replace(made, both=times),))), 100))
    assert "100 ±0% 5.00 42%" in text  # 0.5 GB in 0.1 s, of 11.87 GB/s


def test_unknown_memory_is_a_dash_and_never_0(show: Show) -> None:
    lines = show(KernelReport(with_errors()), 160).splitlines()
    assert next(line for line in lines if line.startswith("256x512x7x7")).split()[-3:] == ["–", "–", "–"]


def test_decimal_points_stand_below_each_other(show: Show) -> None:
    text = show(KernelReport(kernel_profile(2, ("bn",))), 160)
    lines = [line for line in text.splitlines() if re.search(r"\b(fused|compiled) .*%", line)]
    assert len(lines) == 4
    assert len({line[: line.index("(")].rindex(".") for line in lines}) == 1


def coloured(profile: KernelProfile) -> str:
    file = io.StringIO()
    console = Console(file=file, width=100, force_terminal=True, color_system="standard", legacy_windows=False)
    console.print(KernelReport(profile))
    return file.getvalue()


def test_native_is_dim_and_surely_faster_is_green_and_surely_slower_red() -> None:
    lines = coloured(kernel_profile(1, ("bn",))).splitlines()
    for kernel, style in (("native", "^\x1b[2m"), ("fused", "\x1b[1;32m2.31"), ("compiled", "\x1b[1;31m0.260")):
        line = next(line for line in lines if kernel in line and "%" in line)
        assert style in f"^{line}"


def test_a_speedup_that_may_be_either_side_of_1_has_no_colour() -> None:
    profile = one_case()
    unsure = replace(profile.rows[1], faster=Speedup(1.2, Interval(0.9, 1.5)))
    text = coloured(replace(profile, rows=(profile.rows[0], unsure), means=()))
    assert "\x1b[1m1.20" in text
    assert "\x1b[1;32m" not in text


# --- rows ---------------------------------------------------------------------------------------------------------


def test_rows_stand_below_the_heading_of_their_operation_dtype_and_layout(show: Show) -> None:
    profile = resnet()
    text = show(KernelReport(profile), 100)
    lines = text.splitlines()
    for layout in ("contiguous", "channels_last"):
        for operation in ("bn", "bn+relu", "bn+add+relu"):
            assert lines.count(f"{operation}, bf16, {layout}") == 1
    first = lines.index("bn, bf16, contiguous")
    assert lines[first + 1].startswith("256x64x56x56   native")
    assert lines[first + 2].startswith(" " * 14 + " fused")  # the shape is not repeated
    mixed = replace(profile, rows=profile.rows[::2] + profile.rows[1::2])
    assert show(KernelReport(mixed), 100) == text


def test_a_hundred_rows_keep_one_line_a_row(show: Show) -> None:
    text = show(KernelReport(hundred_rows()), 100)
    assert len(re.findall(r"^.* (native|fused) +[\d.,]+ .*%", text, re.MULTILINE)) == 96


@pytest.mark.parametrize("width", [80, 100, 160])
def test_an_error_stands_in_place_of_the_times(width: int, show: Show) -> None:
    lines = show(KernelReport(with_errors()), width).splitlines()
    at = next(index for index, line in enumerate(lines) if "mine:norm" in line and "WRONG" in line)
    assert ERROR in words(" ".join(lines[at : at + 3]))
    (missing,) = [line for line in lines if "is not installed; pip" in line]
    assert words(missing) == "apex is not installed; pip install apex"
    bad = replace(with_errors().rows[3], error="cc: cannot\r\n\n  compile")
    assert "WRONG: cc: cannot compile" in show(KernelReport(replace(with_errors(), rows=(bad,))), width)


def test_a_row_may_have_no_times_and_no_error(show: Show) -> None:
    bare = KernelCost(one_case().rows[0].case, "fused", 1, None)
    assert "fused" in show(KernelReport(replace(one_case(), rows=(bare,), means=())), 100)


def test_cases_without_figures_are_counted_and_wrong_results_are_always_shown(show: Show) -> None:
    def shown(*rows: KernelCost) -> str:
        return show(KernelReport(replace(one_case(), rows=rows, planned=len(rows))), 160)

    first, *_ = one_case().rows
    late, two_lines = "not measured: the time is up", "not measured:\n  the time is up"
    wide, tall = (replace(first.case, shape=shape) for shape in ((7, 64, 9, 9), (7, 64, 8, 8)))
    unmeasured = [failed(wide, kernel, two_lines) for kernel in ("native", "fused")]
    rows = [*one_case().rows, *unmeasured]
    text = shown(*rows)
    assert f"{len(rows) - 2} of {len(rows)} rows measured" in text
    assert f"1 of 2 cases not shown ({late})" in text
    assert "7x64x9x9" not in text
    text = shown(*rows, failed(tall, "native", ERROR, wrong=True))
    assert "7x64x8x8" in text
    assert "WRONG" in text
    assert "7x64x9x9" in shown(*unmeasured)  # there would be nothing else


# --- around the table ---------------------------------------------------------------------------------------------


def test_the_lines_around_the_table_say_how_far_it_came_where_and_with_which_cache(show: Show) -> None:
    for profile, parts in (
        (with_errors(), ("interrupted: 7 of 12 rows measured", "warm cache (not flushed)", "; what fits in a cache")),
        (nothing_measured(), ("interrupted: 0 of 4 rows measured", "Measured ceilings: copy 11.9", "Example CPU")),
        (one_case(), ("\n2 rows measured in 41.3 s\n", "cold cache (flushed", "relative to a copy of 256 MiB.\n")),
    ):
        text = show(KernelReport(profile), 160)
        assert [part for part in parts if part not in text] == []


def test_the_means_name_the_worst_shape(show: Show) -> None:
    text = show(KernelReport(kernel_profile()), 100)
    below = text[text.index("Geometric mean over all shapes") :]
    assert "bn fused 2 2.31x (2.24–2.38) 2.08x 256x64x56x56" in map(words, below.splitlines())
