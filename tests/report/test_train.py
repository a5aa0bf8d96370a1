"""One run's result on the terminal."""

from __future__ import annotations

from dataclasses import replace

from bncli.report.train import run_table
from bncli.results.train import Target, TargetReached


def test_a_run_that_reached_its_target_shows_both_counts_and_every_unit(make_result, show):
    text = show(run_table(make_result(812.4), "digits"))
    for words in (
        "reached its target held-out accuracy 0.95",
        "832 of 3,000",
        "812",
        "820 (the first evaluation at or past the",
        "45,000 samples/s, 1.33 ms/step",
        "1.11 s training, 0.310 s evaluating",
        "412 MiB training, 398 MiB evaluating",
        "27,910",
    ):
        assert words in text


def test_a_run_out_of_budget_shows_a_bound(make_result, show):
    text = show(run_table(make_result(None, status="budget"), "digits"))
    assert "used up its budget without reaching its target" in text
    assert "> 2,308, as many as the budget can show" in text


def test_a_run_with_several_targets_shows_the_steps_to_each(make_result, show):
    also = (TargetReached(Target("accuracy", 0.9), 640.25, 650), TargetReached(Target("accuracy", 0.97), None, None))
    lines = show(run_table(replace(make_result(812.4), also=also), "digits")).splitlines()
    assert [line.split() for line in lines if line.startswith("steps to 0.9")] == [
        ["steps", "to", "0.9", "640"],
        ["steps", "to", "0.97", "–"],
    ]


def test_a_run_that_reached_its_target_too_late_or_only_its_easier_one_says_so(make_result, show):
    late = replace(make_result(None, status="budget"), first_hit=2800)
    words = " ".join(show(run_table(late, "digits")).split())
    assert "used up its budget before the steps to its target held-out accuracy 0.95 were settled" in words
    words = " ".join(show(run_table(replace(make_result(812.4), status="budget"), "digits")).split())
    assert "used up its budget after it reached its target held-out accuracy 0.95" in words


def test_a_diverged_run_shows_its_reason_and_no_bound(make_result, show):
    text = show(run_table(make_result(None, status="diverged"), "digits"))
    assert "diverged: loss is nan at step 12" in text
    assert ">" not in text.split("Made on")[0]


def test_an_interrupted_run_says_so(make_result, show):
    assert "interrupted" in show(run_table(make_result(None, status="interrupted"), "digits"))


def test_a_run_without_a_target_has_no_steps_to_it(make_result, show):
    result = replace(make_result(None, status="budget"), target=None)
    text = show(run_table(result, "digits"))
    assert "no target set" in text
    assert "steps to target" not in text


def test_unknown_memory_and_speed_of_a_run_are_dashes(make_result, show):
    unknown = replace(make_result(812.4), peak_memory_mib=None, samples_per_s=None, ms_per_step=None, final=None)
    unknown = replace(unknown, evaluation_peak_memory_mib=None)
    text = show(run_table(unknown, "digits"))
    assert "– samples/s, – ms/step" in text
    assert next(line for line in text.splitlines() if "peak memory" in line).split() == ["peak", "memory", "–"]


def test_a_run_by_loss_names_the_loss(make_result, show):
    text = show(run_table(replace(make_result(812.4), target=Target("loss", 0.1), final=0.0987654), "digits"))
    assert next(line for line in text.splitlines() if "final loss" in line).split() == ["final", "loss", "0.09877"]
