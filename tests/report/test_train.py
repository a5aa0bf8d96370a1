"""One run's result on the terminal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bncli.report.train import run_table
from bncli.results.train import RunningStatistics, Target, TargetReached

NO_TARGET = {"target": None}
LAYERS = (RunningStatistics("first.norm", 0.25, 1.0), RunningStatistics("second.norm", 0.1, 0.5))
UNKNOWN = dict.fromkeys(("peak_memory_mib", "evaluation_peak_memory_mib", "samples_per_s", "ms_per_step", "final"))
ALSO = (TargetReached(Target("accuracy", 0.9), 640.25, 650), TargetReached(Target("accuracy", 0.97), None, None))
TARGET = "its target held-out accuracy 0.95"


@pytest.mark.parametrize(
    ("steps", "status", "changes", "words"),
    [
        (
            812.4,
            "reached",
            {},
            (
                f"status reached {TARGET} steps run 832 of 3,000 steps to target 812",
                "first hit 820 (the first evaluation at or past the target)",
                "throughput 45,000 samples/s, 1.33 ms/step (training only) time 1.11 s training, 0.310 s evaluating",
                "peak memory 412 MiB training, 398 MiB evaluating parameters 27,910",
            ),
        ),
        (
            None,
            "budget",
            {},
            (f"used up its budget without reaching {TARGET}", "> 2,308, the most that the budget can show"),
        ),
        (812.4, "reached", {"also": ALSO}, ("steps to 0.9 640 steps to 0.97 – final",)),
        (None, "budget", {"first_hit": 2800}, (f"used up its budget before the steps to {TARGET} were settled",)),
        (812.4, "budget", {}, (f"used up its budget after it reached {TARGET}",)),
        (None, "diverged", {}, ("diverged: loss is nan at step 12", "steps to target – first hit –")),
        (None, "interrupted", {}, ("interrupted before it was finished",)),
        (None, "budget", NO_TARGET, ("used up its budget, no target set steps run 3,000 of 3,000 final accuracy",)),
        (
            812.4,
            "reached",
            {"running_statistics": LAYERS},
            ("mean off by 0.250 deviations (first.norm), variance 0.500x (second.norm) at most, over 2 layers",),
        ),
        (812.4, "reached", {"running_statistics": ()}, ("none in this net, so precise ones changed nothing",)),
        (812.4, "reached", UNKNOWN, ("– samples/s, – ms/step", "peak memory – parameters")),
        (812.4, "reached", {"target": Target("loss", 0.1), "final": 0.0987654}, ("final loss 0.09877",)),
    ],
)
def test_a_run_is_shown_with_its_status_and_every_figure(make_result, show, steps, status, changes, words):
    result = replace(make_result(steps, status=status), **changes)
    text = " ".join(show(run_table(result, "digits")).split())
    for each in words:
        assert each in text
