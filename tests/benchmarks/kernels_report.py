"""What a run of the kernel benchmark found: printed as it comes, kept for the summary and for a JSON file."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bncli.measure.timing import clock as timing
from bncli.measure.timing.clock import Spread
from bncli.report.profile.text import samples_cell
from bncli.results.environment import Interval
from bncli.results.profile import Speedup
from tests.benchmarks.kernels_check import Check
from tests.benchmarks.kernels_speed import Target, Timed

SHOWN_FAILURES = 8


class Report:
    """`wrong` names the cases that failed a check; no speed may be printed for those."""

    def __init__(self, json_file: Path | None) -> None:
        self._json_file = json_file
        self._began_s = time.monotonic()
        self.checks: list[Check] = []
        self.targets: list[tuple[str, Target]] = []  # with the case
        self.records: list[dict[str, Any]] = []
        self.notes: list[str] = []  # what was not run, and why

    def line(self, text: str = "") -> None:
        print(text, flush=True)

    def heading(self, text: str) -> None:
        self.line(f"\n## {text}  ({time.monotonic() - self._began_s:.0f} s in)")

    def note(self, text: str) -> None:
        """What was not run, and why: said now and again at the end."""
        self.notes.append(text)
        self.line(f"not run: {text}")

    def record(self, kind: str, **what: Any) -> None:
        """Raw samples and what belongs to them, for the JSON file, which is written anew at every section's end."""
        self.records.append({"kind": kind, **what})

    def check(self, checks: list[Check]) -> None:
        for one in checks:
            self.checks.append(one)
            if not one.passed and sum(not check.passed for check in self.checks) <= SHOWN_FAILURES:
                self.line(f"WRONG  {one.claim}: {one.case}: {one.detail}")

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    def target(self, case: str, found: list[Target]) -> None:
        self.targets += [(case, target) for target in found]

    def timed(self, timed: Timed) -> None:
        self.record(
            "times",
            case=str(timed.case),
            shape=timed.case.shape,
            direction=timed.direction,
            what=timed.what,
            cold=timed.cold,
            samples_ms=timed.samples_ms,
        )

    def write(self, environment: dict[str, str]) -> None:
        if self._json_file is None:
            return
        whole = {
            "environment": environment,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "targets": [
                {"case": case, **dataclasses.asdict(target), "met": target.met} for case, target in self.targets
            ],
            "not_run": self.notes,
            "records": self.records,
        }
        self._json_file.write_text(json.dumps(whole, indent=1, default=str))

    # --- tables ---------------------------------------------------------------------------------------------------

    def check_table(self, first: int = 0) -> None:
        """A row a claim, over the checks from number `first` on."""
        groups = Counter(check.claim for check in self.checks[first:])
        for claim, count in groups.items():
            bad = [check for check in self.checks[first:] if check.claim == claim and not check.passed]
            self.line(
                f"{claim:44} {count - len(bad):4} of {count:4} right{'   WRONG: ' + str(len(bad)) if bad else ''}"
            )

    def summary(self) -> None:
        self.heading("Summary")
        self.line(f"checks: {len(self.checks) - len(self.failed)} right, {len(self.failed)} wrong")
        for check in self.failed[:SHOWN_FAILURES]:
            self.line(f"  WRONG  {check.claim}: {check.case}: {check.detail}")
        if len(self.failed) > SHOWN_FAILURES:
            self.line(f"  and {len(self.failed) - SHOWN_FAILURES} more")
        if self.targets:
            self.line(
                f"{'target':52} {'at least':>8} {'median':>7} {'worst':>7}   met on; of one figure [its interval]"
            )
        for name in dict.fromkeys(target.name for _, target in self.targets):
            group = [(target.value, case) for case, target in self.targets if target.name == name]
            at_least = next(target.at_least for _, target in self.targets if target.name == name)
            known = [(value, case) for value, case in group if value is not None]
            if not known:
                self.line(f"{name:52} {at_least:8.2f}   not measured")
                continue
            if len(group) == 1:
                self.line(single_line(next(target for _, target in self.targets if target.name == name), known[0][1]))
                continue
            worst, where = min(known)
            met = sum(value >= at_least for value, _ in known)
            verdict = "met" if met == len(group) else "NOT MET"
            middle = statistics.median(value for value, _ in known)
            row = f"{name:52} {at_least:8.2f} {middle:7.2f} {worst:7.2f}   {met} of {len(group)}  {verdict}"
            self.line(f"{row} (worst: {where})")
        met = sum(target.met for _, target in self.targets)
        if self.targets:
            self.line(f"targets: {met} met, {len(self.targets) - met} missed or not measured")
        for note in self.notes:
            self.line(f"not run: {note}")


def single_line(target: Target, case: str) -> str:
    """A target that was measured once, with its interval and whether that leaves a doubt."""
    assert target.value is not None
    interval = "" if target.interval is None else f" {between(target.interval)}"
    verdict = ("met" if target.met else "NOT MET") + (", in doubt" if target.in_doubt else "")
    where = f"  ({case})" if case else ""
    return f"{target.name:52} {target.at_least:8.2f} {target.value:7.2f}{interval}  {verdict}{where}"


def between(interval: Interval) -> str:
    """[2.25, 2.36]; `unknown` for a side that too few rounds leave open."""
    low, high = ("unknown" if side is None else f"{side:.2f}" for side in (interval.low, interval.high))
    return f"[{low}, {high}]"


def faster(found: Speedup, unit: str = "x") -> str:
    """The median and its 95 % interval."""
    return f"{found.value:.2f}{unit} {between(found.interval)}"


def ms(samples_ms: tuple[float, ...]) -> str:
    """1.23 ms ±2%: the median, and half the distance of the quartiles as a share of it."""
    value, spread, _ = samples_cell(samples_ms)
    return f"{value} ms {spread}".strip()


def ratio(found: Spread) -> str:
    return f"{found.median:.2f}x [{found.low:.2f}, {found.high:.2f}]"


def milliseconds(samples_ms: tuple[float, ...]) -> str:
    found = timing.spread(samples_ms)
    return f"{found.median:.4f} ms [{found.low:.4f}, {found.high:.4f}]"


def layer_line(timed: Timed, candidate: str, copy_gb_per_s: float) -> str:
    """One row: the candidate's time, its share of the copy bandwidth, and the ratios to the other arms."""
    share = timed.floor_gb_per_s(candidate) / copy_gb_per_s
    ratios = [f"{arm} {ratio(timed.over(arm, candidate))}" for arm in timed.samples_ms if arm != candidate]
    heat = "cold" if timed.cold else "warm"
    mine = f"{candidate} {milliseconds(timed.samples_ms[candidate])}"
    return f"  {timed.direction:8} {heat}  {mine} {share:5.0%} of copy | against " + ", ".join(ratios)


def small_line(timed: Timed, candidate: str) -> str:
    ratios = [f"{arm} {ratio(timed.over(arm, candidate))}" for arm in timed.samples_ms if arm != candidate]
    us = 1e3 * timed.median_ms(candidate)
    return f"  {timed.what:6} {us:8.1f} us a step of {candidate} | against " + ", ".join(ratios)
