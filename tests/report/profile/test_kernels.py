"""The tables of a profile at the widths and encodings that they meet."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from bncli.report.profile.baseline import GateReport, closing
from bncli.report.profile.kernels import KernelReport
from bncli.report.profile.steps import StepReport
from bncli.report.profile.text import memory_column, percent, quartiles, samples_cell
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


def row(text: str, *words: str) -> str:
    """The only line that begins a row with those words."""
    (found,) = [line for line in text.splitlines() if line.split()[: len(words)] == [*words]]
    return found


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
    header = next(line for line in text.splitlines() if line.startswith("shape"))
    assert " ".join(header.split()) == "shape kernel fwd bwd both GB/s of times native peak saved"
    assert "Ran: native: ATen | fused: in cache | compiled: Inductor" in text
    assert "Left out" not in text


def test_in_80_columns_memory_is_left_out_and_that_is_said(show):
    text = show(KernelReport(kernel_profile()), 80)
    assert "Left out for want of room: peak, saved" in text
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


def test_memory_below_a_mib_is_in_kib():
    assert memory_column("peak", [0.5, None, 0.00618]).header == ("peak", "KiB")
    assert [cell for cell, _ in memory_column("peak", [0.5, None, 0.00618]).cells] == ["512", "–", "6.33"]
    assert memory_column("peak", [0.5, 2.0]).header == ("peak", "MiB")
    assert [cell for cell, _ in memory_column("peak", [0.5, 2.0]).cells] == ["0.500", "2.00"]
    assert memory_column("peak", [None]).header == ("peak", "MiB")


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
    below = text[text.index("Over all shapes") :]
    assert row(below, "bn", "fused").split() == ["bn", "fused", "2", "2.31", "(2.24–2.38)", "2.08", "256x64x56x56"]


def test_a_plain_ascii_output_gets_no_question_marks(show):
    for report in (KernelReport(one_case()), StepReport(step_profile()), GateReport(made_gate())):
        text = show(report, 100, "ascii")
        assert "?" not in text
    assert "+-1%" in show(KernelReport(one_case()), 100, "ascii")


def test_a_hundred_rows_keep_one_line_a_row(show):
    text = show(KernelReport(hundred_rows()), 100)
    assert sum(" native " in line or " fused " in line for line in text.splitlines() if "%" in line) == 96


# --- steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_step_has_its_time_its_speed_and_its_ratio_to_native(width, show):
    lines = show(StepReport(step_profile()), width).splitlines()
    at = lines.index("batch norm")
    assert lines[at + 1].split()[:6] == ["training", "native", "102", "±1%", "1,250", "1"]
    assert lines[at + 2].split()[:5] == ["fused", "83.1", "±1%", "1,540", "1.23"]
    assert "(1.20–1.27)" in lines[at + 2]


def test_the_bars_are_as_long_as_their_steps_and_have_the_shares_letters(show):
    lines = show(StepReport(step_profile()), 100).splitlines()
    at = lines.index("batch norm")
    bars = [lines[at + 1 + k].split()[-1] for k in range(2)]
    assert len(bars[0]) == 40
    assert len(bars[1]) == round(40 * 83.1 / 102.4)
    assert bars[0].count("N") == round(40 * 0.31)
    assert "Bars: N normalization; C convolution, linear" in "\n".join(lines)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_shares_and_memory_are_tables_at_every_usual_width(width, show):
    text = show(StepReport(step_profile()), width)
    shares = text[text.index("Share of a step") : text.index("Memory of a training step")]
    assert " ".join(row(shares, "training", "native").split()).replace("ms", "").count("%") == 7
    memory = text[text.index("Memory of a training step") :]
    assert row(memory, "training", "native").split()[2:] == ["1.03", "1.03", "2.06", "84.5", "412"]
    assert row(memory, "training", "–").split()[-1] == "–"
    assert "evaluation" not in memory[: memory.index("Norm layers")]


def test_a_wide_output_has_the_milliseconds_of_each_class(show):
    text = show(StepReport(step_profile()), 160)
    assert "31% 31.7 ms" in text


def test_remarks_have_their_layer_finding_and_advice_and_are_absent_without_any(show):
    text = show(StepReport(step_profile()), 100)
    at = text.splitlines().index("What the norm layers suffer from")
    assert text.splitlines()[at + 1] == "stem.norm: momentum 0.9: the running average's half-life is 0.3 steps"
    assert text.splitlines()[at + 2].startswith("  evaluation uses hardly more than the last batch; momentum is the")
    assert "blocks.0.norm1 and 3 more: the bias of blocks.0.conv1 right in front is subtracted again" in text
    assert "suffer" not in show(StepReport(replace(step_profile(), remarks=())), 100)


def test_what_the_norm_layers_are_is_said_once_an_arm_and_kernel(show):
    text = show(StepReport(step_profile()), 100)
    assert text.count("- batch norm, fused: 19 batch norms (9 with relu, 9 with residual add + relu, 1 alone)") == 1


def test_an_error_of_a_step_stands_in_place_of_its_time(show):
    assert "evaluation  –       ran out of memory" in show(StepReport(step_profile()), 100)


# --- gates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 100, 160])
def test_each_change_has_its_verdict_in_words(width, show):
    text = show(GateReport(made_gate()), width)
    rows = [line for line in text.splitlines() if line.startswith("256x64x56x56, ")]
    assert [re.search(r"(ok|regressed|cannot tell)$", line).group() for line in rows] == [
        "ok",
        "regressed",
        "cannot tell",
        "ok",
    ]
    assert all("2.31" in line for line in rows)


def test_the_last_lines_count_the_verdicts_and_tell_the_exit_code(show):
    text = " ".join(show(GateReport(made_gate()), 80).split())
    assert text.endswith(
        "2 ok, 1 regressed, 1 cannot tell: FAILED, more than 1.1 times slower by the whole interval (exit 1)."
    )
    calm = replace(made_gate(), changes=tuple(each for each in made_gate().changes if each.verdict != "regressed"))
    assert closing(calm).startswith("2 ok, 1 cannot tell: passed (exit 0). What it cannot tell fails a strict")
    strict = closing(replace(calm, strict=True))
    assert strict.startswith("2 ok, 1 cannot tell: FAILED, 2 of the baseline's rows are undecided (strict, exit 1).")


def test_what_only_one_side_has_is_listed(show):
    lines = show(GateReport(made_gate()), 100).splitlines()
    assert lines[lines.index("Not in the baseline:") + 1] == "- bn fp32 contiguous, 60x100, fused"
    assert lines[lines.index("In the baseline, but without a ratio now:") + 1] == "- bn fp32 contiguous, 8x8, fused"


def test_another_device_and_another_cache_are_noted(show):
    there = replace(one_case(), cold=False, environment=replace(one_case().environment, device="cuda:0 NVIDIA X"))
    text = show(GateReport(made_gate(), one_case(), there), 160)
    assert "Another device than the baseline's: cpu now, cuda:0 NVIDIA X then" in text
    assert "cold now, warm then" in text
    assert "Another" not in show(GateReport(made_gate(), one_case(), one_case()), 160)


# --- figures ------------------------------------------------------------------------------------------------------


def test_quartiles_are_of_the_samples_and_one_sample_has_no_spread():
    found = quartiles((1.0, 2.0, 3.0, 4.0, 5.0))
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)
    assert samples_cell((1.0, 2.0, 3.0, 4.0, 5.0)) == ("3.00", "±33%")
    assert samples_cell((7.0,)) == ("7.00", "")
    assert samples_cell(()) == ("–", "")


def test_a_share_that_rounds_to_nothing_is_not_nothing():
    assert percent(0.001) == "< 1%"
    assert percent(0.0) == "0%"
    assert percent(None) == "–"


def test_a_row_may_have_no_times_and_no_error(show):
    bare = KernelCost(one_case().rows[0].case, "fused", 1, None)
    assert "fused" in show(KernelReport(replace(one_case(), rows=(bare,), means=())), 100)
