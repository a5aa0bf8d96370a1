"""Report of a training step at the widths of terminals: its time, where it goes, and the norm layers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bncli.report.profile.steps import StepReport
from tests.report.made_up_costs import step_profile


def row(text: str, *words: str) -> str:
    """The only line that begins a row with those words."""
    (found,) = [line for line in text.splitlines() if line.split()[: len(words)] == [*words]]
    return found


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_step_has_its_time_its_speed_and_its_ratio_to_native(width, show):
    lines = show(StepReport(step_profile()), width).splitlines()
    at = lines.index("batch norm")
    assert lines[at + 1].split()[:6] == ["training", "native", "102", "±1%", "1,250", "1"]
    assert lines[at + 2].split()[:5] == ["fused", "83.1", "±1%", "1,540", "1.23x"]
    assert "(1.20–1.27)" in lines[at + 2]


def test_the_bars_are_as_long_as_their_steps_and_have_the_shares_letters(show):
    lines = show(StepReport(step_profile()), 100).splitlines()
    at = lines.index("batch norm")
    bars = [lines[at + 1 + k].split()[-1] for k in range(2)]
    assert len(bars[0]) == 39
    assert len(bars[1]) == round(39 * 83.1 / 102.4)
    assert bars[0].count("N") == round(39 * 0.31)
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
    assert "31% (31.7 ms)" in text


def test_remarks_have_their_layer_finding_and_advice_and_are_absent_without_any(show):
    text = show(StepReport(step_profile()), 100)
    at = text.splitlines().index("Norm layers: what to change")
    assert text.splitlines()[at + 1] == "stem.norm: momentum 0.9: the running average has a half-life of 0.3 steps"
    assert text.splitlines()[at + 2].startswith("  evaluation uses little more than the last batch; momentum is the")
    assert "blocks.0.norm1 and 3 more: the bias of blocks.0.conv1 has no effect, since the norm subtracts it" in text
    assert "what to change" not in show(StepReport(replace(step_profile(), remarks=())), 100)


def test_what_the_norm_layers_are_is_said_once_an_arm_and_kernel(show):
    text = show(StepReport(step_profile()), 100)
    assert text.count("- batch norm, fused: 19 batch norms (9 with relu, 9 with residual add + relu, 1 alone)") == 1


def test_an_error_of_a_step_stands_in_place_of_its_time(show):
    assert "evaluation  –       ran out of memory" in show(StepReport(step_profile()), 100)
