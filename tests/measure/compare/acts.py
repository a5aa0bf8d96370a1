"""Runs of the fake worker."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from bncli.measure.compare.plan import Job
from bncli.measure.compare.work import Work

FAKE = (sys.executable, "-m", "tests.measure.compare.fake_worker")


class Act:
    """A recipe of the fake worker: what it is to do. Counts how often it is made ready to be sent."""

    data = None

    def __init__(self, act: str) -> None:
        self.act, self.dumps, self.train = act, 0, SimpleNamespace(checkpoint={"every": 5} if "save" in act else None)

    def model_dump(self, **_: Any) -> dict[str, str]:
        self.dumps += 1
        return {"act": self.act}


def jobs_of(acts: dict[str, str], company: str = "") -> Work:
    return Work(Job(key, "plain", {}, 0, "tune", Act(act), company=company) for key, act in acts.items())  # type: ignore[arg-type]
