"""Some kills at seeded moments: nothing is lost, and what is left is what an uninterrupted call leaves."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("command", "times"), [("train", 6), ("compare-fake", 4), ("compare-shared", 3), ("write", 20)]
)
def test_a_killed_command_loses_nothing(command: str, times: int) -> None:
    asked = ["--command", command, "--times", str(times)]
    done = subprocess.run([sys.executable, "-m", "tests.kill", *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(rf"{command}: .*\b{times} kills.*; 0 problems", done.stdout)
