"""One run's result on the terminal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bncli.report.train import evaluation_table, probes_table, run_table
from bncli.results.train import Evaluation, ProbePoint, RunningStatistics, Target, TargetReached

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
        (812.4, "reached", {"ranks": 3}, ("ranks 3 time",)),
        (812.4, "reached", {"ranks": 3, "synchronized": True}, ("ranks 3, batch statistics of all together time",)),
        (
            812.4,
            "reached",
            {"ranks": 2, "synchronized": False},
            ("of each by itself, evaluated with the running ones",),
        ),
        (812.4, "reached", {"running_statistics": ()}, ("none in this net, so precise ones changed nothing",)),
        (812.4, "reached", UNKNOWN, ("– samples/s, – ms/step", "peak memory – parameters")),
        (
            812.4,
            "reached",
            {"cores_lacked": 0.734},
            (
                "throughput 45,000 samples/s!, 1.33 ms/step! (training only)",
                "!: measured while other programs used the cores: up to 0.73 threads",
            ),
        ),
        (812.4, "reached", {"target": Target("loss", 0.1), "final": 0.0987654}, ("final loss 0.09877",)),
    ],
)
def test_a_run_is_shown_with_its_status_and_every_figure(make_result, show, steps, status, changes, words):
    result = replace(make_result(steps, status=status), **changes)
    text = " ".join(show(run_table(result, "digits")).split())
    for each in words:
        assert each in text


def point(measure: str, layer: str | None, step: int = 500, **values: float) -> ProbePoint:
    return ProbePoint(measure, layer, step, values)


PROBED = (
    point("gradients", "hidden1.linear", step=0, norm=77.0),
    point("loss", None, training=0.046),
    point("inputs", "hidden1.activation", drift=0.0307, drift_from_start=0.0725),
    point("inputs", "hidden2.activation", drift=0.0327, drift_from_start=1.25),
    point("saturation", "hidden1.activation", share=0.0),
    point("saturation", "hidden2.activation", share=float("nan")),
    point("gradients", "hidden1.linear", norm=0.0947, noise=0.9),
    point("gradients", "hidden2.linear", norm=0.068, noise=0.9),
    point("gradients", "output", norm=0.0488, noise=0.9),
    point("gradients", None, first_over_last=1.94),
    point("whitening", "hidden1.norm", off_diagonal=2.91),
    point("whitening", "hidden2.norm", off_diagonal=3.36),
)


def test_what_probing_cost_is_shown_beside_the_times_of_the_run(make_result, show):
    result = replace(make_result(None), training_s=1.0, evaluation_s=0.5, probes=PROBED, probes_s=0.5)
    text = " ".join(show(run_table(result, "digits")).split())
    assert "probes 0.500 s at 2 steps, 25% of the run, not in its throughput" in text
    assert "Inside the network at step 500" in text
    assert "probes" not in show(run_table(make_result(None), "digits"))


def test_what_saving_cost_and_what_was_saved_is_shown(make_result, show):
    result = replace(
        make_result(None), training_s=6.0, evaluation_s=2.0, checkpoint_s=0.12, initial_weights="w sha256 0"
    )
    text = " ".join(show(run_table(result, "digits", ["model.safetensors", "checkpoint.pt"])).split())
    assert "checkpoints 0.120 s, 1.5% of the run, not in its throughput" in text
    assert "initial weights w sha256 0 saved model.safetensors, checkpoint.pt" in text
    plain = show(run_table(make_result(None), "digits"))
    assert not any(word in plain for word in ("checkpoints", "saved", "initial"))


def test_an_evaluation_is_shown_with_its_step(show):
    text = show(evaluation_table(Evaluation(1200, 0.98765, 0.0456789, None), "runs/digits/1"))
    assert " ".join(text.split()) == "runs/digits/1 steps trained 1,200 accuracy 0.9877 loss 0.04568"


def test_the_last_values_of_the_probes_have_a_row_for_each_unit_in_the_order_of_execution(show):
    text = show(probes_table(PROBED))
    rows = [line.split() for line in text.splitlines() if line.startswith(("hidden", "output"))]
    assert rows == [
        ["hidden1", "0.0725", "0", "0.0947", "2.91"],
        ["hidden2", "1.25", "nan", "0.0680", "3.36"],
        ["output", "–", "–", "0.0488", "–"],
    ]
    assert "loss of the sample: 0.0460" in text
    assert "gradient norm of the first layer over the last: 1.94" in text
    assert "77" not in text


def test_layers_of_one_unit_have_rows_of_their_own_where_their_values_would_share_a_cell(show):
    text = show(probes_table([point("gradients", f"block.{name}", norm=1.5) for name in ("first", "second")]))
    assert [line.split() for line in text.splitlines() if line.startswith("block")] == [
        ["block.first", "1.50"],
        ["block.second", "1.50"],
    ]


def test_values_of_the_network_alone_are_shown_without_an_empty_table(show):
    text = show(probes_table([point("loss", None, training=0.5), point("landscape", None, smoothness=2.0)]))
    assert "layer" not in text
    assert "loss of the sample: 0.500" in text
    assert "effective beta-smoothness: 2.00" in text


def test_of_many_layers_some_are_shown_and_it_is_said(show):
    text = show(probes_table([point("scale", f"stage{k}.conv", norm=1.0) for k in range(1, 51)]))
    assert sum(line.startswith("stage") for line in text.splitlines()) == 17
    assert "17 of 50 layers; all are in result.json" in text
