"""Sentences for the notes of a comparison: warnings, a line for each kind that lists its arms, and footnotes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bncli.report.text import busy_words, count, times
from bncli.results.compare import Comparison, Note, NoteKind

# Part of a run's identity, as in RunRecord -> why a run in which it differs is not reused.
CHANGED = {
    "bncli": "bncli's own code has changed since",
    "torch": "torch has another version",
    "device": "they ran on another device",
    "data": "the data have changed",
    "code": "the model's code has changed",
}
# What a reader must know before quoting a figure, most of which a change of the recipe or further runs would mend.
WARNINGS: frozenset[NoteKind] = frozenset({
    "unfinished", "failed", "no hit", "at edge", "held before training", "few steps", "few evaluations", "diverged",
    "every second evaluation", "few seeds", "no interval", "arms differ", "machines", "earlier code", "disturbed",
})  # fmt: skip


def warnings(comparison: Comparison) -> list[str]:
    """What may mislead in a comparison or is missing from it, the most important first."""
    return sentences(note for note in comparison.notes if note.kind in WARNINGS)


def sentences(notes: Iterable[Note]) -> list[str]:
    """The notes in words: those of one kind that are about single arms in one line together."""
    groups: dict[object, list[Note]] = {}
    for place, note in enumerate(notes):
        groups.setdefault(place if note.arm is None else note.kind, []).append(note)
    return [_line(group) for group in groups.values()]


def _line(notes: Sequence[Note]) -> str:
    kind, facts = notes[0].kind, notes[0].facts
    if kind in SENTENCES:
        return SENTENCES[kind](**facts)
    line, part = OF_ARMS[kind]
    parts: dict[str | None, list[str]] = {}
    for note in notes:
        parts.setdefault(note.arm, []).append(part(**note.facts) if callable(part) else part.format(**note.facts))
    arms = ", ".join(f"{arm} ({'; '.join(each)})" if any(each) else str(arm) for arm, each in parts.items())
    return line.format(arms=arms, **facts)


def _evaluate_every(fewest: int, evaluate_every: int | None) -> str:
    spaced = "raise train.evaluate_every.points_per_doubling"
    return (
        f"set train.evaluate_every to {evaluate_every}{' or less' * (evaluate_every > 1)}" if evaluate_every else spaced
    )


DIFFERENCE = {  # what follows from different values of a field
    "train.batch_size": ": a step processes a different number of examples",
    "train.accumulate": ": batch norm averages over micro-batches of different sizes",
    "train.stop_at_target": ": runs that end at the target have lower final and best values than those that go on",
}


def _arms_differ(field: str, values: Mapping[str, Any]) -> str:
    found = ", ".join(f"{arm} {_setting(value)}" for arm, value in values.items())
    return f"The arms differ in {field}: {found}{DIFFERENCE.get(field, '')}"


def _setting(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    return " ".join([str(value.get("kind")), *(f"{k} {v}" for k, v in value.items() if k != "kind" and v)])


# Kind of note about a single arm -> the line for all arms, and what stands in brackets behind each, from its facts.
OF_ARMS: dict[NoteKind, tuple[str, str | Callable[..., str]]] = {
    "no hit": ("No setting reached the target within the {most_steps:,.0f} steps that the budget shows: {arms}", ""),
    "at edge": ("At the edge of the grid: {arms}; add values beyond", "{field} {value:g}"),
    "held before training": ("At the target before training: {arms}; choose a harder one", "{at_once} of {runs} runs"),
    "few steps": ("Fewer than {fewest} steps to the target: {arms}; choose a harder one", ""),
    "few evaluations": ("Fewer than {fewest} evaluations before the target: {arms}", _evaluate_every),
    "diverged": ("Diverged, which counts as a miss: {arms}", "{diverged} of {runs} runs"),
    "every second evaluation": (
        "Every second evaluation alone gives another ratio: {arms}; evaluate more often or hold more examples out",
        lambda thinned, ratio: f"{times(thinned)}, not {times(ratio)}",
    ),
    "no interval": ("Fewer seeds than an interval needs: {arms}", "{seeds} of {needed}"),
    "common seeds": ("The ratio rests on the seeds that {reference} has too: {arms}", "{seeds}"),
    "hits": (
        "Hits and {reference}'s, by Fisher's exact test: {arms}",
        "{hits}, {reference_hits} of {runs}, p {p_value:.2g}",
    ),
}
# Kind of any other note -> the function that makes its sentence from its facts.
SENTENCES: dict[NoteKind, Callable[..., str]] = {
    "unfinished": lambda done, planned, failed: (
        f"{done} of {planned} runs are done{f', {failed} failed' * bool(failed)}; the figures are based on those"
    ),
    "failed": lambda failure, runs, arms, run: f"Failed: {', '.join(arms)} ({run or f'{runs} runs'}): {failure}",
    "few seeds": lambda seeds, ratio, needed: (
        f"Few seeds per arm: {seeds}"
        + f"; with this spread, telling a ratio of {ratio:g} from 1 needs {needed}" * bool(needed)
    ),
    "same recipe": lambda arms, reference: f"{', '.join(arms)}: the same recipe as {reference}, so the ratio is 1",
    "not told apart": lambda arms, reference, comparisons: (
        f"Not distinguishable from {reference} by the 95 % interval"
        f"{f' (not corrected for {comparisons} comparisons)' * (comparisons > 1)}: {', '.join(arms)}"
    ),
    "arms differ": _arms_differ,
    "machines": lambda: "Runs of different machines: compare their steps, not their seconds",
    "runs at a time": lambda most: (
        f"Seconds and samples/s were measured with up to {most} runs at once; one at a time disturbs them least"
    ),
    "paper": lambda: "The paper's 14x is BN-x5 on ImageNet with seven changes; batch norm alone gave 2.33x there",
    "not reused": lambda runs, changed: (
        f"{runs} earlier run{'s are' if runs != 1 else ' is'} not reused: "
        + ", ".join(f"{CHANGED[part]} ({number})" for part, number in changed.items())
    ),
    "earlier code": lambda runs: (
        f"the model's code was changed meanwhile: {count(runs, 'run')} with the earlier code left out; "
        "run the same command again to repeat them"
    ),
    "earlier answer": lambda file: f"the folder's earlier result, of another plan, is kept as {file}",
    "other threads": lambda runs, of, had, asked: (
        f"{runs} of {of} runs were made with {' or '.join(map(str, had))} and not {count(asked, 'thread')}: "
        "their steps are used, their seconds, samples/s and memory are not"
    ),
    "disturbed": lambda cores_lacked: f"{busy_words(cores_lacked.values())} ({', '.join(cores_lacked)})",
    "words": lambda words: str(words),
}
