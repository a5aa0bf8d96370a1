"""Sentences for the notes of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bncli.report.text import count
from bncli.results.compare import Note, NoteKind

# Part of a run's identity, as in RunRecord -> why a run in which it differs is not reused.
CHANGED = {
    "bncli": "bncli's own code has changed since",
    "torch": "torch has another version",
    "device": "they ran on another device",
    "data": "the data have changed",
    "code": "the model's code has changed",
}


def sentence(note: Note) -> str:
    """The note in words, after the name of its arm."""
    return f"{note.arm}: " * (note.arm is not None) + SENTENCES[note.kind](**note.facts)


def _few_evaluations(fewest: int, evaluate_every: int | None) -> str:
    if evaluate_every is None:
        advice = "raise train.evaluate_every.points_per_doubling"
    else:
        advice = f"set train.evaluate_every to {evaluate_every}{' or less' * (evaluate_every > 1)}"
    return f"fewer than {fewest} evaluations before its target; {advice}"


def _every_second_evaluation(thinned: float, ratio: float) -> str:
    return (
        f"computed from every second evaluation, the ratio is {thinned:.3g}, {abs(thinned / ratio - 1):.0%} "
        f"{'more' if thinned > ratio else 'less'}: evaluate more often, hold more examples out, or choose an easier "
        "target"
    )


def _few_seeds(seeds: int, ratio: float, needed: int | None) -> str:
    more = "" if needed is None else f": with the spread seen here, telling a ratio of {ratio:g} from 1 needs {needed}"
    return f"{count(seeds, 'seed')} per arm {'are' if seeds > 1 else 'is'} few{more}"


def _not_told_apart(arms: list[str], reference: str, comparisons: int) -> str:
    several = f" (not corrected for {comparisons} comparisons)" if comparisons > 1 else ""
    return f"not distinguishable from {reference} by the 95 % interval{several}: {', '.join(arms)}"


def _hits(hits: int, reference_hits: int, runs: int, reference: str, p_value: float) -> str:
    return (
        f"{hits} of {runs} runs hit the target, {reference_hits} of {runs} for {reference}; if both hit it equally "
        f"often, a difference this large has probability {p_value:.2g} (Fisher's exact test)"
    )


DIFFERENCE = {  # what follows from different values of a field
    "train.batch_size": ": a step processes a different number of examples",
    "train.accumulate": ": batch norm averages over micro-batches of different sizes",
    "train.stop_at_target": ": runs that end at the target have lower final and best values than those that go on",
}


def _arms_differ(field: str, values: Mapping[str, Any]) -> str:
    found = ", ".join(f"{arm} {_setting(value)}" for arm, value in values.items())
    return f"the arms differ in {field}: {found}{DIFFERENCE.get(field, '')}"


def _setting(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    return " ".join([str(value.get("kind")), *(f"{k} {v}" for k, v in value.items() if k != "kind" and v)])


def _not_reused(runs: int, changed: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{CHANGED[part]} ({number})" for part, number in changed.items())
    return f"{runs} earlier run{'s are' if runs != 1 else ' is'} not reused: {reasons}"


def _other_threads(runs: int, of: int, had: list[int], asked: int) -> str:
    return (
        f"{runs} of {of} runs were made with {' or '.join(map(str, had))} and not {count(asked, 'thread')}: "
        "their steps are used, their seconds, samples/s and memory are not"
    )


# Kind of note -> the function that makes its sentence from its facts.
SENTENCES: dict[NoteKind, Callable[..., str]] = {
    "unfinished": lambda done, planned, failed: (
        f"{done} of {planned} runs are done{f', {failed} failed' * bool(failed)}; the figures are based on those"
    ),
    "no hit": lambda most_steps: (
        f"no point of the grid reached the target within the {most_steps:,.0f} steps the budget can show"
    ),
    "at edge": lambda field, value, smallest: (
        f"the best {field}, {value:g}, is at the edge of the grid; add {'smaller' if smallest else 'larger'} values"
    ),
    "held before training": lambda at_once, runs: (
        f"{at_once} of {runs} runs were at the target before the first step; choose a harder one"
    ),
    "few steps": lambda fewest: f"fewer than {fewest} steps to its target; choose a harder one",
    "few evaluations": _few_evaluations,
    "failed": lambda failure, runs, arms, run: f"{', '.join(arms)}: {run or f'{runs} runs'} failed: {failure}",
    "diverged": lambda diverged, runs: f"{diverged} of {runs} runs diverged and count as misses",
    "every second evaluation": _every_second_evaluation,
    "few seeds": _few_seeds,
    "same recipe": lambda arms, reference: (
        f"{', '.join(arms)}: the same recipe as {reference} under another name, so the ratio is 1 by construction"
    ),
    "not told apart": _not_told_apart,
    "common seeds": lambda seeds, reference: f"its ratio uses only the {seeds} seeds that {reference} has too",
    "no interval": lambda seeds, needed, missed: (
        f"no interval from {seeds} seeds{' and a miss' * missed}; it needs {needed}"
    ),
    "hits": _hits,
    "arms differ": _arms_differ,
    "machines": lambda: "the runs come from different machines: compare their steps, not their seconds",
    "runs at a time": lambda most: (
        f"seconds and samples/s were measured with up to {most} runs at once; make one at a time for clean times"
    ),
    "paper": lambda: (
        "these are this task's figures; the paper's 14x is BN-x5 on ImageNet with seven changes, "
        "batch norm alone gave 2.33x there"
    ),
    "not reused": _not_reused,
    "earlier code": lambda runs: (
        f"the model's code was changed meanwhile: {count(runs, 'run')} with the earlier code left out; "
        "run the same command again to repeat them"
    ),
    "earlier answer": lambda file: f"the folder's earlier result, of another plan, is kept as {file}",
    "other threads": _other_threads,
    "words": lambda words: str(words),
}
