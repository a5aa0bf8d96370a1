"""A worker that speaks the protocol and trains nothing: a run's result follows from its recipe, after some time."""

from __future__ import annotations

import json
import os
import random
import sys
import time

from bncli.results.environment import Environment
from bncli.results.serialize import to_plain
from bncli.results.train import Evaluation, RunResult, Target

HERE = Environment("0", "3", "2", "Linux", "a processor", "cpu", None, 1, "2026-01-01T00:00:00+00:00")

RAN = "BNCLI_RAN"  # in the environment: a file for the keys of the runs that were done


def result(recipe: dict[str, object], seed: int) -> RunResult:
    steps = round(40 + 50 * random.Random(json.dumps(recipe, sort_keys=True)).random() + seed % 3, 3)
    evaluations = tuple(Evaluation(at, 0.2 if at < steps else 0.95, 1.0, None) for at in range(0, 200, 20))
    return RunResult(
        "reached", 180, 400, Target("accuracy", 0.85), steps, 20 * (int(steps) // 20 + 1), 0.95, 0.95, evaluations,
        1.0, 60_000.0, 1.0, 0.1, 300.0, 99, HERE,
    )  # fmt: skip


def main() -> None:
    print(json.dumps({"hello": "cpu", "gpus": 0}), flush=True)
    for line in sys.stdin:
        for job in json.loads(line).get("runs", ()):
            time.sleep(0.0 if "--at-once" in sys.argv else 0.02)
            if log := os.environ.get(RAN):
                with open(log, "a") as file:
                    file.write(f"{job['key']}\n")
            found = result(job["recipe"], job["recipe"]["train"]["seed"])
            print(json.dumps({"key": job["key"], "result": to_plain(found), "code": {}}), flush=True)


if __name__ == "__main__":
    main()
