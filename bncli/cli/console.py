"""Shared by all commands: signal handling, result output, messages and errors on stderr."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from bncli.errors import BncliError, printable

if TYPE_CHECKING:
    import typer

    from bncli.results.compare import Planned

T = TypeVar("T")


def listed(values: Sequence[str] | None) -> tuple[str, ...]:
    """The names of an option that takes several, separated by commas or one after the other, each once."""
    return tuple(dict.fromkeys(part.strip() for text in values or () for part in text.split(",") if part.strip()))


def given_options(context: typer.Context, *parameters: str) -> str:
    """Those of a command's parameters that stand on the command line, as options: "--jobs, --out"."""
    sources = {name: context.get_parameter_source(name) for name in parameters}
    options = {each.name: max(each.opts, key=len) for each in context.command.params}
    return ", ".join(options[name] for name, source in sources.items() if source and source.name == "COMMANDLINE")


def show_plan(planned: Planned, as_json: bool) -> None:
    from bncli.report import dry_run

    print_result(dry_run.to_json(planned) if as_json else dry_run.render(planned))


def enable_gc() -> None:
    """Collect garbage again, which `main` put off; the objects of the modules loaded so far stay and are left out."""
    gc.freeze()
    gc.enable()


def print_result(result: Any) -> None:
    """A result, to stdout: text as it is, but for control characters, anything else through rich."""
    if isinstance(result, str):
        from bncli.report.text import encodable

        sys.stdout.write(encodable(result.removesuffix("\n") + "\n", sys.stdout.encoding or "utf-8"))
        return
    from rich.console import Console

    from bncli.report.table import Visible

    Console(highlight=False).print(Visible(result))


# Arguments whose options have another name; every other one is --its-name.
OPTIONS = {
    "inputs": "--input",
    "sets": "--set",
    "saved": "--from",
    "seconds": "--time",
    "kernels": "--kernel",
    "operations": "--operation",
    "dtypes": "--dtype",
    "layouts": "--layout",
    "overwrite": "--force",
}


def _option(argument: str | None) -> str | None:
    return argument and OPTIONS.get(argument, "--" + argument.replace("_", "-"))


def print_error(error: BncliError) -> None:
    """A user's mistakes, to stderr; an argument is shown as the option that it came from."""
    lines = [line for each in error.errors for line in each.lines(_option(each.field), _option(each.permission))]
    if len(lines) > 1:
        log(f"bncli: {len(lines)} mistakes")
    for line in lines:
        log(f"  {line}" if len(lines) > 1 else f"bncli: {line}")


@contextlib.contextmanager
def full_disk(kept: str = "what was written before is kept") -> Iterator[None]:
    """Turn a full or broken disk into an error that names the file, and what is kept."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            raise
        file = error.filename or "standard output"
        raise BncliError(f"{file}: cannot be written: {error.strerror}; {kept}") from error


def log(text: str, quiet: bool = False) -> None:
    """A message, to stderr. It is lost where the terminal is gone, as is all that is printed later; work goes on."""
    if quiet:
        return
    try:
        print(printable(text), file=sys.stderr)
    except (OSError, RuntimeError):  # RuntimeError: in a signal's handler, while the same stream is being written to
        for number in (1, 2):
            try:
                os.write(number, b"")
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)


class StopAtOnce(KeyboardInterrupt):
    """The second signal. A KeyboardInterrupt, so that nothing takes it for an error of the user's code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


class StopSignal:
    """Ctrl-C, SIGTERM or SIGHUP: the first asks the work to end at the next step, the second ends it at once.

    With `at_once` the first ends it at once, for work that yields what it has finished. A SIGHUP that is ignored, as
    under nohup, stays ignored.
    """

    number: int = 0

    def __init__(self, at_once: bool = False) -> None:
        self.at_once = at_once

    def __enter__(self) -> StopSignal:
        names = ("SIGINT", "SIGTERM", "SIGHUP")  # there is no SIGHUP on Windows
        signals: list[signal.Signals] = [getattr(signal, name) for name in names if hasattr(signal, name)]
        if signal.getsignal(signals[-1]) == signal.SIG_IGN:
            signals.pop()
        self._before = {each: signal.signal(each, self._take) for each in signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        second, self.number = self.number != 0, number
        if second or self.at_once:
            log("\nStopped at once" + "; what was finished before, if anything, is shown" * self.at_once)
            raise StopAtOnce(128 + number)
        log("\nStopping after this step; a second signal stops at once")

    def __call__(self) -> bool:
        return self.number != 0

    def until(self, events: Iterable[T]) -> Iterator[T]:
        """The events up to a signal, for `at_once`.

        Code that a signal interrupts can drop its exception, as torch does while it loads: hence it is raised again.
        """
        for event in events:
            yield event
            if self.number:
                raise StopAtOnce(self.exit_code)

    @property
    def exit_code(self) -> int:
        return 128 + self.number
