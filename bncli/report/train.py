"""The result of one training run for the terminal, one figure per line."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group

from bncli.report.table import KeyValueList, Paragraph
from bncli.report.text import UNKNOWN, Column, count, environment_words, figure, metric_figure, setting, target_words
from bncli.results.train import RunningStatistics, RunResult, most_steps_to_target


def run_table(result: RunResult, name: str) -> Group:
    """The result with units, for the end of `bncli train`."""
    metric = result.target.metric if result.target else "accuracy"
    hit = f"{figure(result.first_hit)} (the first evaluation at or past the target)"
    most = figure(most_steps_to_target(result.budget))

    def steps(found: float | None) -> str:
        missed = found is None and result.status == "budget"
        return f"> {most}, the most that the budget can show" if missed else figure(found)

    speed = f"{figure(result.samples_per_s)} samples/s, {figure(result.ms_per_step)} ms/step"
    of_target = [
        ("steps to target", steps(result.steps_to_target)),
        ("first hit", hit if result.first_hit is not None else UNKNOWN),
    ]
    rows = [
        ("status", _status(result)),
        ("steps run", f"{figure(result.steps_run)} of {figure(result.budget)}"),
        *(of_target if result.target else ()),
        *((f"steps to {setting(each.target.value)}", steps(each.steps)) for each in result.also),
        (f"final {metric}", metric_figure(result.final, metric)),
        (f"best {metric}", metric_figure(result.best, metric)),
        ("throughput", f"{speed} (training only)"),
        ("time", f"{figure(result.training_s)} s training, {figure(result.evaluation_s)} s evaluating"),
        ("peak memory", _memory(result)),
        ("parameters", figure(result.parameters)),
        *_running_statistics(result.running_statistics),
    ]
    columns = [Column(name, [words], style="bold") for name, words in rows]
    made = Paragraph(f"Made on {environment_words(result.environment)}.", "dim")
    return Group(Paragraph(name, "bold"), "", KeyValueList(columns), "", made)


def _running_statistics(layers: Sequence[RunningStatistics] | None) -> list[tuple[str, str]]:
    """The layers in which the running statistics are furthest from the population's."""
    if layers is None:
        return []
    if not layers:
        return [("running statistics", "none in this net, so precise ones changed nothing")]
    mean = max(layers, key=lambda layer: layer.mean_deviations)
    variance = max(layers, key=lambda layer: max(layer.variance_ratio, 1 / max(layer.variance_ratio, 1e-300)))
    off = f"mean off by {figure(mean.mean_deviations)} deviations ({mean.layer})"
    ratio = f"variance {figure(variance.variance_ratio)}x ({variance.layer})"
    of = f"at most, over {count(len(layers), 'layer')}, against the precise ones that were evaluated with"
    return [("running statistics", f"{off}, {ratio} {of}")]


def _memory(result: RunResult) -> str:
    found = ((result.peak_memory_mib, "training"), (result.evaluation_peak_memory_mib, "evaluating"))
    return ", ".join(f"{figure(peak)} MiB {phase}" for peak, phase in found if peak is not None) or UNKNOWN


def _status(result: RunResult) -> str:
    if result.status == "diverged":
        return f"diverged: {result.reason or 'the loss stopped being finite'}"
    if result.status == "interrupted":
        return "interrupted before it was finished"
    target = f"its target {target_words(result.target)}" if result.target else "no target set"
    if result.status == "reached":
        return f"reached {target}"
    if result.target is None:
        return "used up its budget, no target set"
    if result.steps_to_target is not None:
        return f"used up its budget after it reached {target}"
    if result.first_hit is not None:
        return f"used up its budget before the steps to {target} were settled"
    return f"used up its budget without reaching {target}"
