"""Progress on stderr: live bars on a terminal, otherwise a line now and then."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from time import monotonic
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import Progress, Task, TaskID
from rich.text import Text

from bncli.report.profile.text import error_words
from bncli.report.text import count, encodable
from bncli.results.compare import ComparisonEvent, ComparisonStarted, RunBegan, RunEnded, RunProgressed, RunRecord
from bncli.results.gradcheck import CheckGroup, CheckProgress
from bncli.results.profile import KernelCost, Measuring, ProfileEvent, ProfileStarted, RowDone
from bncli.results.train import Evaluated, Event, RunStarted, StepDone

LINE_EVERY_S = 10.0  # where stderr is no terminal
LONGER = 1.1  # an estimate above this multiple of the requested time is reported
LEAST_NAME, LEAST_BAR, LONGEST_BAR = 22, 8, 40  # columns


class _Bars(Progress):
    """A line for each task: its name, a bar, how much is done, notes, and the time left.

    On a narrow terminal the bar is left out first, then the notes from the last to the first; a long name is cut.
    """

    def get_renderables(self) -> Iterator[Text]:
        if not self.tasks:
            return
        width, encoding = self.console.width - 1, self.console.encoding
        names = [encodable(task.description, encoding) for task in self.tasks]
        longest = max(map(cell_len, names))
        figures = [encodable(_figures(task, width - 2 - min(longest, LEAST_NAME)), encoding) for task in self.tasks]
        right = max(map(len, figures))
        left = min(longest, max(3, width - right - 2))
        bar_width = min(LONGEST_BAR, width - left - right - 4)
        for task, name, words in zip(self.tasks, names, figures, strict=True):
            name = set_cell_size(name if cell_len(name) <= left else f"{set_cell_size(name, left - 3)}...", left)
            bar = Text("  ")
            if bar_width >= LEAST_BAR and task.total:
                done = round(bar_width * min(1.0, task.completed / task.total))
                bar.append(encodable("━" * done, encoding), "cyan")
                bar.append(encodable("─" * (bar_width - done), encoding) + "  ", "dim")
            yield Text.assemble(name, bar, words, no_wrap=True, overflow="crop")


def _figures(task: Task, most: int) -> str:
    """How much is done (a share where the total is 1.0), as many of the task's notes as fit, and the time left."""
    if task.total is None:
        return str(timedelta(seconds=round(task.elapsed or 0)))
    done = f"{task.percentage:.0f}%" if isinstance(task.total, float) else f"{task.completed:.0f}/{task.total}"
    left = "" if task.time_remaining is None else str(timedelta(seconds=round(task.time_remaining)))
    notes = list(task.fields["notes"])
    while len(words := "  ".join(filter(None, (done, *notes, left)))) > most and notes:
        notes.pop()
    return words


class _ProgressSink:
    """A sink for events. Bars are shown on a terminal only, where stdout stays free (rich issue 2151)."""

    def __init__(
        self, quiet: bool = False, console: Console | None = None, clock: Callable[[], float] = monotonic
    ) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.quiet, self.clock = quiet, clock
        # FORCE_COLOR makes rich take any stream for a terminal (briefcase PR 1267), so the stream itself is asked.
        terminal = self.console.file.isatty() if console is None else console.is_terminal
        self.live = not quiet and terminal and not self.console.is_dumb_terminal
        self.bars = _Bars(
            console=self.console,
            disable=not self.live,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            refresh_per_second=5,
        )
        self._said = clock()

    def __enter__(self) -> Any:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of a terminal that is gone
            self.bars.stop()

    def add(self, name: str, total: float | None, notes: Sequence[str] = (), completed: int = 0) -> TaskID:
        return self.bars.add_task(name, total=total, completed=completed, notes=notes)

    def line(self, text: str, at_once: bool = False) -> None:
        """A plain line where there is no terminal, at most one every ten seconds unless it has to be said at once."""
        if self.quiet or self.live or not (at_once or self.clock() - self._said > LINE_EVERY_S):
            return
        self._said = self.clock()
        self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(Text(encodable(text, self.console.encoding)), soft_wrap=True)


class TrainProgress(_ProgressSink):
    """Step, loss, metric, samples/s, memory and the time left of one run."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.metric = event.target.metric if event.target else "accuracy"
            self.loss, self.value, self.speed = "loss –", f"{self.metric} –", [""]
            self.task = self.add(event.name, event.budget)
            size = f"{event.parameters:,} parameters on {event.device}, {event.budget:,} steps at most"
            self.line(f"{event.name}: {size}", True)
        elif isinstance(event, StepDone):
            self.loss = f"loss {event.loss:.3f}"
            self.speed = [f"{event.samples_per_s:,.0f}/s", f"{event.memory_mib:,.0f} MiB" if event.memory_mib else ""]
            self.bars.update(self.task, completed=event.step)
        elif isinstance(event, Evaluated):
            found = event.evaluation
            self.value = f"{self.metric} {found.value(self.metric):.3f}"
            self.bars.update(self.task, completed=found.step)
            self.line(f"step {found.step:,}: held-out {self.value}, loss {found.loss:.3f}")
        self.bars.update(self.task, notes=[self.value, self.loss, *self.speed])


class CompareProgress(_ProgressSink):
    """One bar for all runs, and one for the current run of each worker. Equal failures are told once, then counted."""

    def check(self) -> None:
        """Data and models are checked, until a ComparisonStarted."""
        self.add("checking data and models", None)
        self.line("checking data and models", at_once=True)

    def __call__(self, event: ComparisonEvent) -> None:
        if isinstance(event, ComparisonStarted):
            for task in self.bars.task_ids:  # of the check
                self.bars.remove_task(task)
            self.failed: dict[str, list[str]] = {}  # how runs failed -> their labels
            self.metric, self.planned, self.workers = event.metric, event.planned, dict[int, TaskID]()
            notes = [f"{event.done} already done"] if event.done else []
            self.all = self.add(event.name, event.planned, notes, event.done)
            found = f", {event.done} of them already done" if event.done else ""
            self.line(f"{event.name}: {count(event.planned, 'run')}{found}", True)
        elif isinstance(event, RunBegan):
            if event.worker not in self.workers:
                self.workers[event.worker] = self.add("", event.budget)
            task, notes = self.workers[event.worker], [f"{self.metric} –"]
            self.bars.reset(task, description=f"  {event.label}", total=event.budget, notes=notes)
        elif isinstance(event, RunProgressed) and event.worker in self.workers:
            notes = [f"{self.metric} {'–' if event.value is None else f'{event.value:.3f}'}"]
            self.bars.update(self.workers[event.worker], completed=event.step, notes=notes)
        elif isinstance(event, RunEnded):
            self.planned = event.planned
            notes = [f"{count(event.elsewhere, 'run')} in other calls"] * bool(event.elsewhere)
            self.bars.update(self.all, completed=event.done, total=event.planned, notes=notes)
            failed, outcome = event.record.result is None, _outcome(event.record)
            alike = self.failed.setdefault(outcome, []) if failed else []
            alike.append(event.label)
            if len(alike) == 1:
                self.line("; ".join([f"{event.done}/{self.planned} {event.label}: {outcome}", *notes]), failed)
                if failed and self.live:
                    self._print(f"{event.label}: {outcome}")
            for first, *others in self.failed.values() if event.done == event.planned else ():
                if others and not self.quiet:
                    self._print(f"{1 + len(others)} runs failed as {first} did")


def _outcome(record: RunRecord) -> str:
    """How a run of a comparison ended."""
    result = record.result
    if result is None:
        return f"failed: {record.failure}"
    if record.phase == "cost":
        return "times measured" if result.ms_per_step is None else f"{result.ms_per_step:.3g} ms a step"
    if record.given_up:
        return f"stopped at step {result.steps_run:,}: could no longer win"
    if result.steps_to_target is not None:
        return f"target after {result.steps_to_target:,.0f} steps"
    if result.first_hit is not None and result.reason is None:
        return f"first at the target at step {result.first_hit:,}, not settled after {result.steps_run:,} steps"
    return result.reason or f"target not reached in {result.steps_run:,} steps"


PHASES = {
    "ceilings": "the machine's ceilings, by copies and multiply-adds",
    "case": "{subject}",
    "check": "{subject}: checking the step of each kernel",
    "round": "{subject}: {mode}, round {round}",
    "parts": "{subject}: {mode}, breakdown of time and memory",
    "norms": "{subject}: norm-layer diagnostics",
}


class ProfileProgress(_ProgressSink):
    """How much of a profile is done, what is measured now, and the time left."""

    def __call__(self, event: ProfileEvent) -> None:
        if isinstance(event, ProfileStarted):
            self.what, self.planned, self.done = event.what, event.planned, 0
            self.fraction, self._began = 0.0, self.clock()
            self.wished_s, self.longer = event.seconds or math.inf, ""
            self.task = self.add(event.what, 1.0)
            self.line(f"{event.what}: {count(event.planned, 'row')} to measure", True)
        elif isinstance(event, Measuring):
            # The plan may grow, but the bar never moves backwards, and is full only once every row is done.
            most = 1.0 if self.done >= self.planned else 0.99
            self.fraction = min(max(event.fraction, self.fraction), most)
            before, self.longer = self.longer, self._longer(event.least_s)
            label = PHASES[event.phase].format(**vars(event))
            name = f"{self.what}: {label}"
            self.bars.update(self.task, completed=self.fraction, description=name, notes=[self.longer])
            if self.longer and not before:
                self.line(f"{self.longer} s", True)
            self.line(f"{self.done}/{self.planned} rows, {self.fraction:.0%}{self._left()}: {label}")
        elif isinstance(event, RowDone):
            self.done += 1
            self.planned = max(self.planned, self.done)  # a model's folded batch norms are found while it is measured
            if event.row.wrong:
                row = event.row
                wrong = "wrong: " * isinstance(row, KernelCost)
                self.line(f"{self.done}/{self.planned} {row.kernel}: {wrong}{error_words(row)}", True)

    def _longer(self, least_s: float) -> str:
        """The estimated duration where it is clearly longer than what was asked for, else nothing."""
        return f"about {least_s:,.0f} s; asked for {self.wished_s:g}" if least_s > LONGER * self.wished_s else ""

    def _left(self) -> str:
        """The time left, at the speed so far."""
        if not 0 < self.fraction < 1:
            return ""
        seconds = (self.clock() - self._began) * (1 - self.fraction) / self.fraction
        return f", about {seconds:,.0f} s left"


class GradcheckProgress(_ProgressSink):
    """How many of the cases are done, how many failed, the last group, and the time left."""

    def __enter__(self) -> GradcheckProgress:
        super().__enter__()
        self.failed, self.words = 0, ""
        self.task = self.add("checking", None)
        return self

    def __call__(self, event: CheckProgress | CheckGroup) -> None:
        if isinstance(event, CheckProgress):
            self.bars.update(self.task, advance=event.cases, total=event.planned)
        elif event.cases:
            self.failed += event.failed
            self.words = f"{f', {self.failed:,} failed' if self.failed else ''}; last: {event.name}"
            self.bars.update(self.task, description=f"checking{self.words}")
        done = self.bars.tasks[self.task]
        words = f"gradcheck: {done.completed:,}/{count(int(done.total or 0), 'case')}{self.words}"
        self.line(words, at_once=isinstance(event, CheckGroup) and event.failed > 0)
