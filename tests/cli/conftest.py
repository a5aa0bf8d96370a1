"""A small recipe in the current folder, and calls of the command line in this process and in one of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bncli.cli import main

RECIPE = """
data: {source: synthetic, shape: [8], classes: 3, examples: 120, held_out: 60, noise: 0.5}
model: {kind: mlp, hidden: [16], activation: relu}
optimizer: {kind: sgd, lr: 0.5}
train: {steps: 60, batch_size: 20, evaluate_every: 5, target: {value: 0.9}}
arms:
  plain: {}
  normed: {norm: batch}
grid: {optimizer.lr: [0.1, 0.5]}
seeds: {tune: 3, report: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "small.yaml").write_text(RECIPE)
    return "small.yaml"


def bncli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of a call in this process."""
    monkeypatch.setattr(sys, "argv", ["bncli", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def process(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "bncli", *arguments], text=True, **options)
