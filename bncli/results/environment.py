"""Environment of a result, confidence intervals, and the versions of the JSON formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FORMAT_VERSION = 1  # of JSON files that hold gradient checks; raised when a field changes its meaning
RUNS_VERSION = 3  # of those of runs and plans; 2: steps to target are the steps below it; 3: with a digest
COMPARISON_VERSION = 3  # of those of comparisons; 3: notes are fields and no longer sentences
PROFILE_VERSION = 2  # of those of profiles; 2: notes, remarks and norm layers are fields and no longer sentences

# By the allocator: kept for later tensors; its own rules ("default"); those of the user's environment variables; or of
# an allocator that bncli does not set ("not glibc").
FreedMemory = Literal["kept", "default", "set by the user", "not glibc"]


@dataclass(frozen=True)
class Environment:
    """Where a run was made, so that two figures can be distinguished later."""

    bncli: str
    python: str
    torch: str
    platform: str
    processor: str
    device: str
    driver: str | None
    threads: int
    date: str  # ISO 8601, UTC
    tf32: bool | None = None  # float32 convolutions or matrix products may be in TF32; None: not recorded
    freed_memory: FreedMemory | None = None  # of the CPU; None: not recorded


def disturbed(cores_lacked: float | None) -> bool:
    """Whether a measurement lacked so many cores (engine.load) that its times are not to be trusted."""
    # 0.1 of the time lost makes times 1 / 0.9 = 1.11 times too long: a comparison with a baseline fails at 1.10.
    return cores_lacked is not None and cores_lacked > 0.1


FEWEST_ROUNDS = 6  # of an interval: five samples all lie above their median once in 32 times, more often than in 2.5 %


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval. A missing side is open: nothing in the data bounds it."""

    low: float | None
    high: float | None
