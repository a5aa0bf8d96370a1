"""The result of one training run for the terminal, one figure per line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group

from bncli.report.table import AlignedTable, KeyValueList, Paragraph, ResponsiveTable
from bncli.report.text import Column, busy_words, count, environment_words, figure, metric_figure, setting, target_words
from bncli.results.train import Evaluation, ProbePoint, RunningStatistics, RunResult, most_steps_to_target

# Values of probes that the summary shows; the others are in result.json.
OF_A_LAYER = {
    "inputs.drift_from_start": "drift\nfrom start",
    "saturation.share": "saturated\noutputs",
    "saturation.dead": "dead\nunits",
    "gradients.norm": "gradient\nnorm",
    "shift.distance": "covariate\nshift",
    "whitening.off_diagonal": "off-diagonal\ncovariance",
    "scale.norm": "weight\nnorm",
}
OF_THE_NETWORK = {
    "loss.training": "loss of the sample",
    "gradients.first_over_last": "gradient norm of the first layer over the last",
    "landscape.smoothness": "effective beta-smoothness",
    "regularization.logit_variance": "variance of an example's logits over random batches",
    "regularization.gap": "held-out less training loss",
}
MOST_LAYERS = 20


def run_table(result: RunResult, name: str, saved: Sequence[str] = ()) -> Group:
    """The result with units, for the end of `bncli train`. saved: names of files beside it that it can be used with."""
    metric = result.target.metric if result.target else "accuracy"
    hit = f"{figure(result.first_hit)} (the first evaluation at or past the target)"
    most = figure(most_steps_to_target(result.budget))

    def steps(found: float | None) -> str:
        missed = found is None and result.status == "budget"
        return f"> {most}, the most that the budget can show" if missed else figure(found)

    busy = busy_words([result.cores_lacked])
    speed = f"{figure(result.samples_per_s)} samples/s{busy[:1]}, {figure(result.ms_per_step)} ms/step{busy[:1]}"
    of_target = [
        ("steps to target", steps(result.steps_to_target)),
        ("first hit", hit if result.first_hit is not None else figure(None)),
    ]
    words = {True: "all together", False: "each by itself, evaluated with the running ones of rank 0", None: ""}
    statistics = ", batch statistics of " * (result.synchronized is not None) + words[result.synchronized]
    probed = count(len({point.step for point in result.probes}), "step")
    rows = [
        ("status", status_words(result)),
        ("steps run", f"{figure(result.steps_run)} of {figure(result.budget)}"),
        *(of_target if result.target else ()),
        *((f"steps to {setting(each.target.value)}", steps(each.steps)) for each in result.also),
        (f"final {metric}", metric_figure(result.final, metric)),
        (f"best {metric}", metric_figure(result.best, metric)),
        ("throughput", f"{speed} (training only)"),
        *([("ranks", f"{result.ranks}{statistics}")] if result.ranks > 1 else ()),
        ("time", f"{figure(result.training_s)} s training, {figure(result.evaluation_s)} s evaluating"),
        *([("probes", _cost(result, result.probes_s, f" at {probed}"))] if result.probes else ()),
        *([("checkpoints", _cost(result, result.checkpoint_s))] if result.checkpoint_s else ()),
        ("peak memory", _memory(result)),
        ("parameters", figure(result.parameters)),
        *_running_statistics(result.running_statistics),
        *([("initial weights", _short(result.initial_weights))] if result.initial_weights else ()),
        *([("saved", ", ".join(saved))] if saved else ()),
    ]
    columns = [Column(name, [words], style="bold") for name, words in rows]
    made = Paragraph(f"Made on {environment_words(result.environment)}.", "dim")
    inside: list[Any] = [probes_table(result.probes), ""] if result.probes else []
    inside += [Paragraph(busy, "yellow")] * bool(busy)
    return Group(Paragraph(name, "bold"), "", KeyValueList(columns), "", *inside, made)


def evaluation_table(found: Evaluation, name: str) -> Group:
    """A trained model on its held-out data."""
    values = {metric: metric_figure(found.value(metric), metric) for metric in ("accuracy", "loss")}
    rows = {"steps trained": figure(found.step), **values}
    columns = [Column(row, [words], style="bold") for row, words in rows.items()]
    return Group(Paragraph(name, "bold"), "", KeyValueList(columns))


def probes_table(probes: Sequence[ProbePoint]) -> ResponsiveTable | Group:
    """The last values of the probes: a row for each layer, a column for each value that was measured.

    Without a value of a layer, those of the network alone.
    """
    step = probes[-1].step
    last = [point for point in probes if point.step == step]
    row_of = rows_of(last)
    values: dict[tuple[str | None, str], float] = {}
    for point in last:
        row = row_of[point.layer] if point.layer else None
        values |= {(row, f"{point.measure}.{name}"): value for name, value in point.values.items()}
    layers = list(dict.fromkeys(row_of.values()))
    shown = layers[:: -(-len(layers) // MOST_LAYERS) or 1]
    columns = [Column("layer", shown, words=True)] + [
        Column(header, [figure(values.get((layer, name))) for layer in shown], optional=True)
        for name, header in OF_A_LAYER.items()
        if any((layer, name) in values for layer in layers)
    ]
    notes = [
        f"{words}: {figure(values[None, name])}" for name, words in OF_THE_NETWORK.items() if (None, name) in values
    ]
    if len(shown) < len(layers):
        notes.append(f"{len(shown)} of {len(layers)} layers; all are in result.json")
    title = f"Inside the network at step {figure(step)}"
    if len(columns) == 1:
        return Group(Paragraph(title, "bold"), "", *map(Paragraph, notes))
    return ResponsiveTable(title, AlignedTable(columns), notes=notes)


def rows_of(points: Sequence[ProbePoint]) -> dict[str, str]:
    """layer -> its row. The modules of one unit share a row, in the order in which they run, if no measure has values
    for two of them: hidden1.linear, hidden1.norm and hidden1.activation are hidden1.
    """
    measured = {(point.measure, point.layer) for point in points if point.layer}
    unit = {layer: layer.rpartition(".")[0] or layer for _, layer in measured}
    merged = len({(measure, unit[layer]) for measure, layer in measured}) == len(measured)
    # A weight's gradient and norm are listed in the order of execution, and each unit has a weight.
    first = sorted(points, key=lambda point: point.measure not in ("gradients", "scale"))
    return {point.layer: unit[point.layer] if merged else point.layer for point in first if point.layer}


def _cost(result: RunResult, seconds: float, when: str = "") -> str:
    share = seconds / (result.training_s + result.evaluation_s + result.probes_s + result.checkpoint_s)
    return f"{figure(seconds)} s{when}, {share:.{int(share < 0.1)}%} of the run, not in its throughput"


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
    return ", ".join(f"{figure(peak)} MiB {phase}" for peak, phase in found if peak is not None) or figure(None)


def status_words(result: RunResult) -> str:
    """How the run ended."""
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


def _short(initial_weights: str) -> str:
    """A file and the first digits of its SHA-256."""
    file, _, digest = initial_weights.rpartition(" ")
    return f"{file} {digest[:12]}"
