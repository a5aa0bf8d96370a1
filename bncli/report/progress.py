"""What is shown while work goes on: a live bar on a terminal, now and then a line elsewhere. All of it on stderr."""

from __future__ import annotations

import math
from time import monotonic
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from bncli.report.profile.text import error_words
from bncli.results.compare import ComparisonEvent, ComparisonStarted, RunBegan, RunEnded, RunProgressed, RunRecord
from bncli.results.profile import KernelCost, Measuring, ProfileEvent, ProfileStarted, RowDone
from bncli.results.train import Evaluated, Event, RunStarted, StepDone

LINE_EVERY_S = 10.0  # off a terminal
LONGER = 1.1  # times the time that was asked for, from which on it is said


class _Sink:
    """A bar that lives only where somebody can see it. rich would take stdout over with it (rich issue 2151)."""

    columns: tuple[Any, ...] = ()

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.quiet = quiet
        # FORCE_COLOR makes rich take any stream for a terminal (briefcase PR 1267), so the stream itself is asked.
        terminal = self.console.file.isatty() if console is None else console.is_terminal
        self.live = not quiet and terminal and not self.console.is_dumb_terminal
        self.bar = Progress(
            *self.columns,
            console=self.console,
            disable=not self.live,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            refresh_per_second=5,
        )
        self._said = monotonic()

    def __enter__(self) -> Any:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def line(self, text: str, at_once: bool = False) -> None:
        """A plain line off a terminal, and no more than one every ten seconds unless it matters."""
        if self.quiet or self.live or not (at_once or monotonic() - self._said > LINE_EVERY_S):
            return
        self._said = monotonic()
        self.console.print(text, soft_wrap=True, markup=False)


class TrainProgress(_Sink):
    """Step, loss, metric, samples/s, memory and the time left of one run."""

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("[dim]loss[/] {task.fields[loss]} [dim]{task.fields[metric]}[/] {task.fields[value]}"),
        TextColumn("{task.fields[speed]}[dim]{task.fields[memory]}[/]"),
        TimeRemainingColumn(compact=True),
    )

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.metric = event.target.metric if event.target else "accuracy"
            self.task = self.bar.add_task(
                event.name, total=event.budget, loss="–", value="–", speed="", memory="", metric=self.metric
            )
            self.line(
                f"{event.name}: {event.parameters:,} parameters on {event.device}, {event.budget:,} steps at most", True
            )
        elif isinstance(event, StepDone):
            memory = f" {event.memory_mib:,.0f} MiB" if event.memory_mib else ""
            speed = f"{event.samples_per_s:,.0f}/s"
            self.bar.update(self.task, completed=event.step, loss=f"{event.loss:.3f}", speed=speed, memory=memory)
        elif isinstance(event, Evaluated):
            found = event.evaluation
            value = f"{found.value(self.metric):.3f}"
            self.bar.update(self.task, completed=found.step, value=value)
            self.line(f"step {found.step:,}: held-out {self.metric} {value}, loss {found.loss:.3f}")


class CompareProgress(_Sink):
    """All runs together, and a line for what each worker is doing."""

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(compact=True),
    )

    def __call__(self, event: ComparisonEvent) -> None:
        if isinstance(event, ComparisonStarted):
            self.metric, self.planned, self.workers = event.metric, event.planned, dict[int, TaskID]()
            note = f"{event.done} found" if event.done else ""
            self.all = self.bar.add_task(f"[bold]{event.name}[/]", total=event.planned, completed=event.done, note=note)
            found = f", {event.done} of them done already" if event.done else ""
            self.line(f"{event.name}: {event.planned} runs{found}", True)
        elif isinstance(event, RunBegan):
            if event.worker not in self.workers:
                self.workers[event.worker] = self.bar.add_task("", note="")
            task = self.workers[event.worker]
            self.bar.reset(task, description=f"  {event.label}", total=event.budget, note=f"{self.metric} –")
        elif isinstance(event, RunProgressed) and event.worker in self.workers:
            note = f"{self.metric} {event.value:.3f}"
            self.bar.update(self.workers[event.worker], completed=event.step, note=note)
        elif isinstance(event, RunEnded):
            self.planned = event.planned
            self.bar.update(self.all, completed=event.done, total=event.planned, note="")
            failed, outcome = event.record.result is None, _outcome(event.record)
            self.line(f"{event.done}/{self.planned} {event.label}: {outcome}", failed)
            if failed and self.live:
                self.console.print(f"{event.label}: {outcome}", markup=False, soft_wrap=True)


def _outcome(record: RunRecord) -> str:
    """How a run of a comparison ended."""
    result = record.result
    if result is None:
        return f"failed: {record.failure}"
    if result.steps_to_target is not None:
        return f"target after {result.steps_to_target:,.0f} steps"
    if result.first_hit is not None and result.reason is None:
        return f"at the target at step {result.first_hit:,}, not settled in {result.steps_run:,} steps"
    return result.reason or f"target not reached in {result.steps_run:,} steps"


class ProfileProgress(_Sink):
    """How much of a profile is done, what is measured now, and the time left; off a terminal a row now and then."""

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[label]}", markup=False, style="dim"),
        TextColumn("{task.fields[longer]}", style="yellow"),
        TimeRemainingColumn(compact=True),
    )

    def __call__(self, event: ProfileEvent) -> None:
        if isinstance(event, ProfileStarted):
            self.planned, self.done, self.fraction, self._began = event.planned, 0, 0.0, monotonic()
            self.wished_s, self.longer = event.seconds or math.inf, ""
            self.task = self.bar.add_task(event.what, total=1.0, label="", longer="")
            self.line(f"{event.what}: {event.planned} row{'s' * (event.planned != 1)} to measure", True)
        elif isinstance(event, Measuring):
            self.fraction = min(max(event.fraction, self.fraction), 1.0)  # a plan that grows does not turn a bar back
            before, self.longer = self.longer, self._longer(event.least_s)
            self.bar.update(self.task, completed=self.fraction, label=event.label, longer=self.longer)
            if self.longer and not before:
                self.line(f"{self.longer} s", True)
            self.line(f"{self.done}/{self.planned} rows, {self.fraction:.0%}{self._left()}: {event.label}")
        elif isinstance(event, RowDone):
            self.done += 1
            if event.row.wrong:
                row = event.row
                wrong = "wrong: " * isinstance(row, KernelCost)
                self.line(f"{self.done}/{self.planned} {row.kernel}: {wrong}{error_words(row)}", True)

    def _longer(self, least_s: float) -> str:
        """How long it takes where that is more than was asked for, beyond what such an estimate is off by."""
        return f"about {least_s:,.0f} s; asked for {self.wished_s:g}" if least_s > LONGER * self.wished_s else ""

    def _left(self) -> str:
        """In words, as long as what is left takes as long as what was done, share by share."""
        if not 0 < self.fraction < 1:
            return ""
        seconds = (monotonic() - self._began) * (1 - self.fraction) / self.fraction
        return f", about {seconds:,.0f} s left"
