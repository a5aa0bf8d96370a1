"""A Dask scheduler with two workers, in processes of their own: the command that starts it, and a context that does."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil


@contextlib.contextmanager
def two_workers() -> Iterator[tuple[str, psutil.Process]]:
    """The scheduler's address, and its process; a task whose Dask worker died is begun once again."""
    environment = os.environ | {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}
    command, pipe = [sys.executable, "-m", "tests.measure.compare.dask_cluster"], subprocess.PIPE
    root = Path(__file__).parents[3]  # where the fake workers are found
    with subprocess.Popen(command, cwd=root, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), psutil.Process(process.pid)
        finally:
            process.communicate()


def main() -> None:
    from distributed import LocalCluster

    options = {"threads_per_worker": 1, "silence_logs": logging.CRITICAL, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(n_workers=2, **options) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
