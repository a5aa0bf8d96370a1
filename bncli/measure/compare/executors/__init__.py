"""Executor: carries out a comparison's runs, wherever that may be, and tells what happens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from bncli.measure.compare.plan import Job


@dataclass(frozen=True)
class Started:
    worker: int
    key: str


@dataclass(frozen=True)
class Progressed:
    worker: int
    key: str
    step: int
    value: float  # of the target's metric


@dataclass(frozen=True)
class Ended:
    """A run's result as plain data, or why there is none."""

    worker: int
    key: str
    result: dict[str, Any] | None
    failure: str | None
    code: dict[str, str] = field(default_factory=dict)  # of the user's own that was loaded: file -> SHA-256
    at_a_time: int = 1  # runs that may have been in progress at once


class Executor(Protocol):
    """The folder of run files is the truth: an executor only moves work, and what it forgets is done again."""

    def run(self, wanted: deque[Job], stop: Callable[[], bool]) -> Iterator[Started | Progressed | Ended | None]:
        """Do the wanted runs until none is left or `stop()` is true.

        A run is taken from the left of `wanted` when it starts; the caller may change what waits there after every
        event. Yields what happens, and None now and then so that a progress bar can move.
        """
        ...
