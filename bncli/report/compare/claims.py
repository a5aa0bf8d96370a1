"""Table of the verdicts on a comparison's claims, for the terminal, Markdown, HTML and CSV."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from bncli.names import MEASURES
from bncli.report.compare.text import p_figure
from bncli.report.text import UNKNOWN, Cell, Column, bound_words, count, figure, interval_figure, measure_words, setting
from bncli.results.compare import Claim, Comparison, JudgedClaim, NoInterval, Verdict

HEADING = "claims"
STYLES: dict[Verdict, str] = {"shown": "green", "refuted": "red", "cannot tell": "yellow"}
WHEN = {
    "mean": "A probe's value is its mean over the log of the step, up to where the first of the two runs ends.",
    "end": "end: a probe's last value.",
    "equal loss": (
        "equal loss: the mean (geometric for a ratio) at training losses that both runs pass, evenly spaced in the "
        "log; for regularization these are losses in evaluation mode, as its own."
    ),
}
NO_INTERVAL: dict[NoInterval, str] = {
    "no pairs": "no pair of runs has a value in both arms",
    "one pair": "there is a single pair of runs",
    "too few hits": "too few runs reached the target for an interval",
    "not positive": "a value is 0 or below, and a ratio needs values above 0",
    "unknown layer": "no run has values of that layer",
    "no common steps": "the runs of no pair were measured at steps in common after step 0 (probes.at)",
    "no common loss": "no pair of runs passes a training loss in common",
    "no rate trains": "in a search for the largest learning rate no rate trained",
    "no rate fails": "in a search for the largest learning rate every higher rate trained too",
}


def claim_columns(comparison: Comparison) -> list[Column]:
    """One row per claim, in the recipe's order; the first column has the claims as they are said, by their number."""
    claims, starred = comparison.claims, {arm.arm: f"{arm.arm}*" for arm in comparison.arms if arm.at_edge}
    return [
        Column("claim", [f"{number}. {claim.say}" for number, claim in enumerate(claims, 1)], words=True),
        Column("measure", [Cell(measure_words(claim), _arms(claim, starred)) for claim in claims], words=True),
        Column("measured", [_measured(claim) for claim in claims]),
        Column("bound", [_bound(claim) for claim in claims]),
        Column("verdict", [_verdict(claim) for claim in claims], words=True),
    ]


def _arms(claim: JudgedClaim, starred: dict[str, str]) -> str:
    """`batch norm* 4.3 / plain 0.62`: with a star where the best point is at the edge of the grid."""
    arm, over = (starred.get(name, name) for name in (claim.arm, claim.over))
    return f"{arm} {figure(claim.of_arm)} {'/' if claim.compared == 'ratio' else 'less'} {over} {figure(claim.of_over)}"


def _measured(claim: JudgedClaim) -> Cell:
    unit = "x" if claim.compared == "ratio" else ""
    span = interval_figure(claim.interval)
    if claim.value is None:
        return Cell(f"{span}{unit}" if span else UNKNOWN)
    return Cell(f"{figure(claim.value)}{unit}", span)


def _bound(claim: JudgedClaim) -> Cell:
    return Cell(bound_words(claim), "" if claim.p_value is None else f"p {p_figure(claim.p_value)}")


def _verdict(claim: JudgedClaim) -> Cell:
    aside = f"about {claim.seeds_needed:,} seeds" if claim.seeds_needed else ""
    return Cell(claim.verdict, aside, style=STYLES[claim.verdict])


def claim_notes(comparison: Comparison) -> Iterator[str]:
    """How many claims have each verdict, and what the table's figures rest on."""
    claims = comparison.claims
    verdicts = Counter(claim.verdict for claim in claims)
    yield ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in STYLES if verdicts[verdict]) + "."
    further = f": costs to the target over all, the rest over the {len(comparison.plan.report_seeds)} further ones"
    corrected = f": 1 - 0.05/{len(claims)}, for {len(claims)} claims" if len(claims) > 1 else ""
    yield f"First arm over the second (x) or less it, paired by seed{further * bool(comparison.plan.tune_seeds)}."
    yield f"Interval and verdict: level {claims[0].level:.4g}{corrected}; p is of the bound, not corrected."
    yield (
        "shown: the whole interval lies beyond the bound; refuted: all of it falls short; cannot tell: neither, with "
        "the seeds that would decide it in 4 of 5 comparisons, if arms differ and scatter as seen."
    )
    probed = [claim for claim in claims if "." in claim.measure]
    yield from (WHEN[when] for when in WHEN if any(claim.when == when for claim in probed))
    if any(MEASURES[claim.measure].per_layer and claim.layer is None for claim in probed):
        yield "Where a probe has a value for each layer, it is the mean over layers."
    search, measures = comparison.plan.largest_learning_rate, {claim.measure for claim in claims}
    if search and "largest_learning_rate" in measures:
        bar = f"of {setting(search['accuracy'])}" if search["accuracy"] else "above the best constant guess's"
        yield (
            f"largest_learning_rate: a held-out accuracy {bar} after {search['steps']:,} steps, at that rate and at "
            f"rates down to half of it; found to a factor of {search['factor']:g}, by which the interval is wider."
        )
    if any(_stops(comparison, claim) for claim in claims):
        yield (
            "final, best and probes end where a run stops, once the steps to its target are settled; "
            "train.stop_at_target: false lets it go on."
        )
    for number, claim in enumerate(claims, 1):
        if claim.no_interval:
            yield f"Claim {number} has no interval: {NO_INTERVAL[claim.no_interval]}."
        elif claim.seeds < claim.of_seeds:
            left_out = "the other runs failed, are not done, or have no finite value"
            yield f"Claim {number} rests on {claim.seeds} of {count(claim.of_seeds, 'pair')} of runs: {left_out}."


def _stops(comparison: Comparison, claim: Claim) -> bool:
    """Whether a claim is about the whole of runs that stop at their target."""
    whole = "." in claim.measure or claim.measure in ("final", "best")
    sections = (comparison.plan.recipes.get(name, {}).get("train") for name in (claim.arm, claim.over))
    return whole and any(isinstance(train, dict) and train.get("stop_at_target") for train in sections)


def csv_row(claim: JudgedClaim) -> dict[str, Any]:
    """Every field of a claim, the limits of its interval as `low` and `high`."""
    row = {**vars(claim), "say": " ".join(claim.say.split())}
    interval = row.pop("interval")
    return row | {"low": interval.low, "high": interval.high}
