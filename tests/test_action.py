"""The steps of .github/actions/bncli, run as the runner of another repository would, but for the installation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tests.cli.conftest import bncli, forget_modules
from tests.cli.test_profile import measure_less

ROOT = Path(__file__).parent.parent
ACTION = yaml.safe_load((ROOT / ".github/actions/bncli/action.yml").read_text())
RIGHT = """
from torch.nn import functional

def batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    return functional.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
"""
WRONG = RIGHT.replace("functional.batch_norm(x", "1.01 * functional.batch_norm(x")


def run_step(name: str, folder: Path, **inputs: str) -> subprocess.CompletedProcess[str]:
    """The script of a step, as GitHub runs it: bash with -e and pipefail, its environment from the inputs."""
    (step,) = (each for each in ACTION["runs"]["steps"] if each["name"] == name)
    values = {key: str(each.get("default", "")) for key, each in ACTION["inputs"].items()} | inputs

    def filled(text: str) -> str:
        return re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: values[found[1]], text)

    environment = {
        **os.environ,
        **{key: filled(value) for key, value in step.get("env", {}).items()},
        "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command: Any = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_a_right_kernel_passes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RIGHT)
    options = {"kernel": "mine:batch_norm", "gradcheck": "--quick --dtype fp32 --only train/* --threads 1"}
    ran = run_step("Gradients", tmp_path, **options)
    assert ran.returncode == 0, ran.stderr
    assert r"mine:batch\_norm" in (tmp_path / "summary.md").read_text()
    assert ElementTree.parse(tmp_path / "bncli-gradcheck.xml").getroot().get("failures") == "0"


def test_a_wrong_kernel_fails_the_step(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(WRONG)
    ran = run_step(
        "Gradients", tmp_path, kernel="mine:batch_norm", gradcheck="--quick --dtype fp32 --only train/* --threads 1"
    )
    assert ran.returncode == 1
    assert ElementTree.parse(tmp_path / "bncli-gradcheck.xml").getroot().get("failures") != "0"


def test_a_kernel_is_timed_against_its_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(RIGHT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    measure_less(monkeypatch)  # for the baseline, which this process makes
    options = "--shape 4x8x6x6 --dtype fp32 --layout contiguous --operation bn --threads 1 --time 0.1"
    saved = bncli("profile", "--kernel", "native,mine:batch_norm", "--allow-code", *options.split(), "--json")
    forget_modules(tmp_path)
    (tmp_path / "baseline.json").write_text(saved.out)
    inputs = {"kernel": "mine:batch_norm", "profile": options, "baseline": "baseline.json", "fail-above": "1000"}
    ran = run_step("Time", tmp_path, **inputs)
    assert ran.returncode == 0, ran.stderr
    assert r"mine:batch\_norm" in (tmp_path / "summary.md").read_text()
    assert ElementTree.parse(tmp_path / "bncli-profile.xml").getroot().get("failures") == "0"
