"""Leases of runs, so that any number of calls share a folder and no run is done twice.

A lease is a file KEY.N.lease in `runs`, which is created exclusively and names its call. A call is a file in `calls`,
which it renews. Once a call has ended, or has not renewed its file for LIMIT_S, its leases are free: whoever creates
KEY.(N+1).lease has the run. A lease is deleted only after the run's own file is there, or by a call that is alone.

So the file system has to create a file exclusively, to rename one atomically, to show a file that is opened as it was
when last closed, and to set times of change by one clock, as NFS does. This machine's clock and locks are not used.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import threading
from collections.abc import Collection
from pathlib import Path

from bncli.errors import FileError
from bncli.storage import read_plain

LIMIT_S, RENEW_S = 60.0, 5.0
CALL = re.compile(r"[0-9a-f]{12}")  # the name of a call's file
# Its content: boot of the machine, namespace and user, number and start of the process.
PROCESS = re.compile(r"(\S+ \S+ \d+) (\d+) \d+")


class Leases:
    """The leases that this call has taken, while it is entered, and those of other calls."""

    def __init__(self, runs: Path, calls: Path) -> None:
        self._runs, self._calls, self._call = runs, calls, calls / os.urandom(6).hex()
        self._taken: dict[str, int] = {}  # key -> N
        self._others: dict[str, Path] = {}  # key -> the file that shows whether another call still does the run
        self._ended = threading.Event()

    def __enter__(self) -> Leases:
        with self._call.open("x") as file:
            file.write(_process(os.getpid()))
        self._renewing = threading.Thread(target=self._renew, daemon=True)
        self._renewing.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._renewing.join()
        with contextlib.suppress(OSError):  # the folder was removed
            for key in list(self._taken) if self.alone() else ():
                self.release(key)
            self._call.unlink()

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            with contextlib.suppress(OSError):  # a server that does not answer now may do so later
                self._call.touch()

    def take(self, key: str) -> bool:
        """Take the lease of a run; False where another call has it."""
        for number in itertools.count() if key not in self._taken else ():
            lease = self._lease(key, number)
            try:
                with lease.open("x") as file:
                    file.write(self._call.name)
                self._taken[key] = number
                break
            except FileExistsError:
                call = _text(lease)
                # One that names no call has just been created, or its call was killed then: it is not renewed.
                self._others[key] = self._calls / call if CALL.fullmatch(call) else lease
                if self._is_alive(self._others[key]):
                    return False
        return True

    def release(self, key: str) -> None:
        """Delete the lease of a run that has ended, and the earlier ones that this call took over."""
        for number in range(self._taken.pop(key, -1) + 1):
            self._lease(key, number).unlink(missing_ok=True)

    def free(self, keys: Collection[str], leased: Collection[str]) -> set[str]:
        """Those of the keys which other calls had and have no more. leased: those of which there is a lease."""
        others = {key: self._others[key] for key in keys if key in leased and key in self._others}
        alive = {file: self._is_alive(file) for file in set(others.values())}
        return {key for key in keys if key not in others or not alive[others[key]]}

    def alone(self) -> bool:
        """Whether no other call is there. What killed ones left in `calls` is deleted."""
        names = [name for name in os.listdir(self._calls) if CALL.fullmatch(name) and name != self._call.name]
        ended = [file for name in names if not self._is_alive(file := self._calls / name)]
        for file in ended:
            file.unlink(missing_ok=True)
        return len(ended) == len(names)

    def _lease(self, key: str, number: int) -> Path:
        return self._runs / f"{key}.{number}.lease"

    def _is_alive(self, file: Path) -> bool:
        """Whether a file is there and was renewed lately, and its process is not known to be gone."""
        written = PROCESS.fullmatch(_text(file))  # to open it makes an NFS client ask the server for its time
        mine = PROCESS.fullmatch(_process(os.getpid()))
        if written and mine and written[1] == mine[1] and _process(int(written[2])) != written[0]:
            return False
        self._call.touch()
        with contextlib.suppress(FileNotFoundError):
            return abs(self._call.stat().st_mtime - file.lstat().st_mtime) < LIMIT_S
        return False


def _text(file: Path) -> str:
    with contextlib.suppress(OSError, FileError, UnicodeDecodeError):
        return read_plain(file).decode()
    return ""


def _process(number: int) -> str:
    """A text that no other process has; empty where it is gone, or where there is no /proc."""
    with contextlib.suppress(OSError):
        state, *fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place = f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"
        return "" if state in "ZX" else f"{place} {number} {fields[18]}"
    return ""
