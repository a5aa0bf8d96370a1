"""What reading an input must not do: seen by an audit hook, a finder of modules, a timer and the process's peak memory.

An audit hook stays until its process ends, so only the process that reads the inputs may make a guard.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from bncli.cli.console import print_error
from bncli.errors import BncliError

MOST_MIB = 1024  # more than the process has when it begins
ROOM = 4 << 30  # bytes of address space beyond what is there at the start, so that the machine's memory is safe
PACKAGE = f"{Path(__file__).parents[2] / 'bncli'}{os.sep}"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PROCESSES = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen"}
CONNECTIONS = {"socket.connect", "socket.bind", "socket.sendto", "urllib.Request", "ftplib.connect"}
CHANGES = {"os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "shutil.rmtree", "os.utime"}
CHANGES_OF_TWO = {"os.rename", "os.link", "os.symlink"}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
HARMLESS = {os.devnull, "/proc/self/clear_refs"}  # the latter begins another peak of memory
# Packages that parts of bncli look for and do without.
OPTIONAL = {"triton", "mlxtend", "tensorboard", "datasets", "matplotlib"}


@dataclass(frozen=True)
class Finding:
    """What one input did. where: the innermost line of bncli's, which tells findings apart."""

    what: str
    where: str
    details: str

    @property
    def signature(self) -> str:
        return f"{self.what} in {self.where}"


class TooSlow(BaseException):
    """Not an Exception, which the code that reads an input may take for a damaged file's."""


class Guard:
    """Watches what is done while an input is read.

    folder: where files may be written. seconds: of CPU time, for one input.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = os.path.realpath(folder) + os.sep, seconds
        self._libraries: set[str] = set()  # digests of those that may be loaded
        self.may_compile = False
        self._seen: list[str] = []
        self._watching = False
        self._known = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions(), *OPTIONAL, "bncli"}
        self._start_kib = _peak_kib()
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + ROOM, resource.RLIM_INFINITY))
        signal.signal(signal.SIGPROF, _too_slow)
        sys.dont_write_bytecode = True
        sys.addaudithook(self._audit)
        sys.meta_path.insert(0, self)

    def allow(self, libraries: Iterable[bytes]) -> None:
        """Let these libraries be loaded."""
        self._libraries |= {hashlib.sha256(content).hexdigest() for content in libraries}

    def result_of(self, attempt: Callable[[bytes], None], data: bytes) -> bool | Finding:
        """Whether an input is accepted, or what it did that it must not."""
        self._seen.clear()
        try:
            with self._limits():
                attempt(data)
            accepted: bool | Finding = True
        except BncliError as error:
            accepted = _message_of(error)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            what = f"more than {self.seconds:g} CPU seconds" if isinstance(error, TooSlow) else type(error).__name__
            accepted = Finding(what, _innermost(error), "".join(traceback.format_exception(error)))
        if self._seen:
            what, _, place = self._seen[0].rpartition(" in ")
            return Finding(what, place, "\n".join(self._seen))
        if (grown_mib := (_peak_kib() - self._start_kib) >> 10) > MOST_MIB:
            return Finding(f"more than {MOST_MIB} MiB", "the process", f"{grown_mib} MiB more than at the start")
        return accepted

    @contextlib.contextmanager
    def _limits(self) -> Iterator[None]:
        self._watching = True
        signal.setitimer(signal.ITIMER_PROF, self.seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._watching = False

    # --- what Python tells ----------------------------------------------------------------------------------------

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """A finder of modules that finds none, and notes each that an input alone can have named."""
        if self._watching and name.partition(".")[0] not in self._known:
            frame = sys._getframe(1)
            while frame.f_back and "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            if "site-packages" not in frame.f_code.co_filename:  # a package looks for one that it can do without
                self._note(f"import of {name!r}")

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes | os.PathLike) and flags & WRITING:
                self._writes(event, path)
        elif event in CHANGES:
            self._writes(event, arguments[0])
        elif event in CHANGES_OF_TWO:
            self._writes(event, arguments[0] if event == "os.rename" else arguments[1])
            self._writes(event, arguments[1])
        elif event in CONNECTIONS or (event in PROCESSES and not self.may_compile):
            self._note(f"{event} {arguments[0]!r}")
        elif event == "pickle.find_class":
            self._note(f"unpickling of {'.'.join(map(str, arguments[:2]))}")
        elif event == "ctypes.dlopen" and str(arguments[0]).startswith(self.folder):
            library = Path(arguments[0])
            digest = hashlib.sha256(library.read_bytes()).hexdigest()
            if digest not in self._libraries:
                self._note(f"loading of a changed library, {library.name}")

    def _writes(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        name = os.fsdecode(path)
        parent, last = os.path.split(os.path.abspath(name))
        if not os.path.join(os.path.realpath(parent), last, "").startswith(self.folder) and name not in HARMLESS:
            self._note(f"{event} outside the folder, of {name}")

    def _note(self, seen: str) -> None:
        stack = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
        place = _line(stack[-1]) if stack else "no code of bncli"
        self._seen.append(f"{seen} in {place}")
        raise PermissionError(f"not allowed: {seen}")


def _message_of(error: BncliError) -> bool | Finding:
    """False, for refused, if the message that the command line prints has no control character."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        print_error(error)
    found = CONTROL.search(printed.getvalue())
    return Finding("a control character in a message", _innermost(error), printed.getvalue()) if found else False


def _peak_kib() -> int:
    """Of this process alone; getrusage begins with the peak of the process that started it."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow


def _innermost(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
    return _line((inside or frames)[-1])


def _line(frame: traceback.FrameSummary) -> str:
    return f"{frame.filename.removeprefix(PACKAGE)}:{frame.lineno}"
