"""Report of a training step at the widths of terminals: its time, where it goes, and the norm layers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bncli.report.profile.steps import StepReport
from bncli.results.profile import NormLayers
from tests.report.conftest import Show
from tests.report.made_up_costs import step_profile

SHARES, MEMORY, NORMS, REMARKS = (
    "Share of a step", "Memory of a training step", "Norm layers:", "Norm layers: what to change",
)  # fmt: skip


def row(text: str, *words: str) -> list[str]:
    """The words of the only line that begins with those."""
    (found,) = [line.split() for line in text.splitlines() if line.split()[: len(words)] == [*words]]
    return found


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_time_shares_and_memory_are_tables_at_every_usual_width(width: int, show: Show) -> None:
    text = show(StepReport(step_profile()), width)
    lines = text.splitlines()
    at = lines.index("batch norm")
    assert lines[at + 1].split()[:6] == ["training", "native", "102", "±1%", "1,250", "1x"]
    assert lines[at + 2].split()[:6] == ["fused", "83.1", "±1%", "1,540", "1.23x", "(1.20–1.27)"]
    shares = text[text.index(SHARES) : text.index(MEMORY)]
    assert sum("%" in word for word in row(shares, "training", "native")) == (5 if width == 60 else 8)
    assert ("Hidden columns (terminal too narrow): loss, data, other" in shares) == (width == 60)
    assert ("31% (31.7 ms)" in shares) == (width == 160)
    memory = text[text.index(MEMORY) : text.index(NORMS)]
    assert row(memory, "training", "native")[2:] == ["1.03", "1.03", "2.06", "84.5", "412"]
    assert row(memory, "training", "–")[-1] == "–"
    assert "evaluation" not in memory


def test_the_bars_are_as_long_as_their_steps_and_have_the_shares_letters(show: Show) -> None:
    lines = show(StepReport(step_profile()), 100).splitlines()
    at = lines.index("batch norm")
    bars = [lines[at + 1 + k].split()[-1] for k in range(2)]
    assert [len(bar) for bar in bars] == [39, round(39 * 83.1 / 102.4)]
    assert bars[0].count("N") == round(39 * 0.31)
    assert "Bars: N normalization; C convolution, linear" in "\n".join(lines)
    first, *others = (replace(each, shares_ms={}) for each in step_profile().rows)
    one_bare = replace(step_profile(), rows=(first, *step_profile().rows[1:]))
    assert show(StepReport(one_bare), 100).splitlines()[at + 1].endswith("1,250  1x")
    assert "Bars:" not in show(StepReport(replace(step_profile(), rows=(first, *others))), 100)


def test_remarks_have_their_layer_finding_and_advice_and_are_absent_without_any(show: Show) -> None:
    text = show(StepReport(step_profile()), 100)
    at = text.splitlines().index(REMARKS)
    assert text.splitlines()[at + 1] == "stem.norm: momentum 0.9: the running average has a half-life of 0.3 steps"
    assert text.splitlines()[at + 2].startswith("- evaluation uses little more than the last batch; momentum is the")
    assert "blocks.0.norm1 and 3 more: the bias of blocks.0.conv1 has no effect, since the norm subtracts it" in text
    assert REMARKS not in show(StepReport(replace(step_profile(), remarks=())), 100)


def test_what_the_norm_layers_are_is_said_once_an_arm_and_kernel(show: Show) -> None:
    text = show(StepReport(step_profile()), 120)
    words = "19 batch norms (9 fused with relu, 9 fused with residual add + relu, 1 not fused)"
    assert text.count(f"- batch norm, fused: {words}") == 1


def test_the_legend_says_where_the_time_of_whitening_is(show: Show) -> None:
    rows = [replace(row, norms=(NormLayers("Whitening", 2),)) for row in step_profile().rows]
    words = "Of a norm that whitens, matrix products count as linear and its other operators as other."
    assert words in show(StepReport(replace(step_profile(), rows=tuple(rows))), 100)
    assert "whitens" not in show(StepReport(step_profile()), 100)


def test_an_error_of_a_step_stands_in_place_of_its_time(show: Show) -> None:
    assert "evaluation  –       ran out of memory" in show(StepReport(step_profile()), 100)


def test_a_step_of_which_nothing_was_measured_says_so(show: Show) -> None:
    text = show(StepReport(replace(step_profile(), rows=(), remarks=(), notes=())), 100)
    assert "interrupted: 0 of 6 rows measured" in text
    assert SHARES not in text
