"""The result of one training run for the terminal, one figure per line."""

from __future__ import annotations

from rich.console import Group

from bncli.report.table import KeyValueList, Paragraph
from bncli.report.text import UNKNOWN, Column, environment_words, figure, metric_figure, setting, target_words
from bncli.results.train import RunResult, most_steps_to_target


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
    ]
    columns = [Column(name, [words], style="bold") for name, words in rows]
    made = Paragraph(f"Made on {environment_words(result.environment)}.", "dim")
    return Group(Paragraph(name, "bold"), "", KeyValueList(columns), "", made)


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
