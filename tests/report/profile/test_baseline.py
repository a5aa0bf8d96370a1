"""Report of a comparison with a baseline: verdicts, rows of one side, and the last line."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from bncli.report.profile.baseline import GateReport, closing
from tests.report.made_up_costs import made_gate, one_case


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
