"""Shared by all commands: signal handling, result output, messages and errors on stderr."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from bncli.errors import CHECK_FAILED, BncliError, FileError, out_of_memory_is, printable

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


def rank() -> int | None:
    """This process's number among those that torchrun has started for one run; None where it has started none."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


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


def print_error(error: BncliError) -> None:
    """A user's mistakes, to stderr; an argument is shown as the option that it came from."""

    def option(argument: str | None) -> str | None:
        return argument and OPTIONS.get(argument, "--" + argument.replace("_", "-"))

    lines = [line for each in error.errors for line in each.lines(option(each.field), option(each.permission))]
    log(f"bncli: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"bncli: {len(lines)} mistakes", *lines]))


CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EBADF)


@contextlib.contextmanager
def system_errors(kept: str = "what was written before is kept") -> Iterator[None]:
    """Turn what the system refuses (a file, memory, a character) into an error that names it, and what is kept."""
    try:
        with out_of_memory_is(BncliError(f"out of memory; free some, raise its limit, or ask for less; {kept}")):
            yield
    except BrokenPipeError:  # the reader has left, as `head` does
        sys.exit(CHECK_FAILED)
    except OSError as error:
        reason, file = error.strerror or str(error), error.filename
        if error.errno in CANNOT_WRITE:
            raise BncliError(f"{file or 'standard output'}: cannot be written: {reason}; {kept}") from error
        kind = FileError if file and error.errno != errno.EMFILE else BncliError
        advice = "check that path, and the limits that ulimit -a shows"
        raise kind(f"{file or 'the system'}: {reason}; {advice}; {kept}") from error
    except UnicodeEncodeError as error:
        raise FileError(f"{error.object!a}: {error.reason} in {error.encoding}; set LC_ALL=C.UTF-8") from error


class Messages(io.FileIO):
    """Standard error, whose full disk or closed terminal ends no work. Its reader, when it leaves, does."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            return len(data)


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Escape the characters that a stream lacks, replace closed ones, and write all of the output before the end.

    The number of a closed one must not become that of a file which the run writes.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115
    for name in ("COLUMNS", "LINES"):  # of which 0 would make rich print nothing
        if not re.fullmatch("[1-9][0-9]{0,8}", os.environ.get(name, "1")):
            del os.environ[name]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.__stderr__ and sys.stderr is sys.__stderr__:
        raw = io.BufferedWriter(Messages(2, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, sys.__stderr__.encoding, "backslashreplace", line_buffering=True)
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # Python would try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise


def log(text: str, quiet: bool = False) -> None:
    """A message, to stderr. Where it cannot be written it is lost, and nothing else."""
    if not quiet:
        # RuntimeError: in a signal's handler, while the same stream is being written to.
        with contextlib.suppress(OSError, RuntimeError):
            print(printable(text), file=sys.stderr)


class StopAtOnce(KeyboardInterrupt):
    """The second signal. A KeyboardInterrupt, so that nothing takes it for an error of the user's code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


class StopSignal:
    """Ctrl-C, SIGTERM or SIGHUP: the first asks the work to end at the next step, the second ends it at once.

    With `at_once` the first ends it at once, for work that yields what it has finished. A SIGHUP that is ignored,
    as under nohup, stays ignored.
    """

    number: int = 0

    def __init__(self, at_once: bool = False) -> None:
        self.at_once = at_once

    def __enter__(self) -> StopSignal:
        signals = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not on Windows
            signals.append(signal.SIGHUP)
        self._before = {each: signal.signal(each, self._take) for each in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if rank() is not None and self.number:
            return  # torchrun repeats a signal, and kills after 30 s
        second, self.number = self.number != 0, number
        try:
            os.write(1, b"")
        except OSError:  # a terminal that is gone, with all that would be printed there
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if second or self.at_once:
            log("\nStopped at once" + "; what was finished before, if anything, is shown" * self.at_once)
            raise StopAtOnce(128 + number)
        log("\nStopping after this step" + "; a second signal stops at once" * (rank() is None))

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
