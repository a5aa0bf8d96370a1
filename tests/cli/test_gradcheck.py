"""`bncli gradcheck` as a user meets it: what is refused, the demonstration, kernels of the user's own, signals."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bncli.cli.gradcheck import rerun_command
from tests.cli.conftest import bncli, process
from tests.report.gradcheck.made_up_checks import FIRST, GOOD
from tests.test_architecture import modules_after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--full"], "--quick and --full: choose one"),
        (["--kernel", "natve"], "--kernel natve: there is no such kernel; did you mean native?"),
        (
            ["--kernel", "cuda"],
            "--kernel cuda: there is no such kernel; expected native, fused, fused-interpreted or pa",
        ),
        (
            ["--kernel", "mine:norm"],
            "--kernel mine:norm: it is code of yours that would run; allow it with --allow-code",
        ),
        (["--kernel", ""], "--kernel : one kernel is checked at a time"),
        (["--kernel", "fused", "--kernel", "native"], "--kernel fused, native: one kernel is checked at a time; run"),
        (["--demo", "--quick", "--kernel", "fused"], "--kernel, --quick: nothing is checked with --demo"),
        (["--norm", "bach"], "'bach' is not one of 'batch', 'layer', 'group', 'instance'"),
        (["--device", "gpu"], "--device gpu: expected one of auto, cpu, cuda, cuda:N, mps"),
    ],
)
def test_gradcheck_refuses_what_it_could_not_obey(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert bncli(monkeypatch, "gradcheck", *arguments) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_a_kernel_that_does_not_exist_is_refused_before_torch_is_loaded() -> None:
    refuse = "import sys; sys.argv = ['bncli', 'gradcheck', '--kernel', 'nonsense']; import bncli.cli; bncli.cli.main()"
    assert "torch" not in modules_after(refuse)


def test_the_demonstration_is_a_table_or_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bncli(monkeypatch, "gradcheck", "--demo") == 0
    out, err = capsys.readouterr()
    assert "loss stands still" in " ".join(out.split())
    assert err == ""
    assert bncli(monkeypatch, "gradcheck", "--demo", "--json") == 0
    demo = json.loads(capsys.readouterr().out)
    last = demo["steps"][-1]
    assert last["step"] == 1000
    assert last["bias_ignoring"] == pytest.approx(1000 * demo["steps"][1]["bias_ignoring"])
    assert last["loss_ignoring"] == pytest.approx(last["loss_full"])


CASE = "*/float32/contiguous/4x3x5x7"  # as a glob: in training and in evaluation mode

# Batch norms of the user's own: right but talkative, blind to its statistics, and one that is interrupted.
OWN_KERNELS = """
import os, signal, torch
from torch.nn import functional as F

def right(input, running_mean, running_var, weight, bias, training, momentum, eps):
    print("hello")
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)

def blind(x, weight, bias, eps, residual, activation):
    var, mean = torch.var_mean(x.detach(), dim=[0, *range(2, x.dim())], correction=0)
    y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
    y = y if residual is None else y + residual
    return y if activation is None else getattr(F, activation)(y), mean, var

def interrupted(input, running_mean, running_var, weight, bias, training, momentum, eps):
    if not training and input.dim() == 4:  # after the groups of training mode
        os.kill(os.getpid(), getattr(signal, os.environ["OWN_SIGNAL"]))
    return right(input, running_mean, running_var, weight, bias, training, momentum, eps)
"""


@pytest.fixture
def own_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder, another one in each test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"own_kernels_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN_KERNELS)
    return name


def test_an_own_kernel_that_is_right_passes_and_what_it_prints_stays_out_of_the_result(
    own_kernels: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--kernel", f"{own_kernels}:right", "--allow-code", "--only", f"{CASE}/*")
    assert bncli(monkeypatch, "gradcheck", *asked, "--quick", "--quiet", "--json") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["passed"] is True
    assert sum(group["cases"] for group in result["groups"]) > 10
    assert set(err.split()) == {"hello"}


def test_a_kernel_that_takes_its_statistics_for_constants_fails_with_a_command_that_fails_again(
    own_kernels: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--kernel", f"{own_kernels}:blind", "--allow-code")
    assert bncli(monkeypatch, "gradcheck", *asked, "--only", f"{CASE}/*") == 1
    out = capsys.readouterr().out
    assert " FAILED" in out
    assert "Traceback" not in out
    lines = [line.rstrip() for line in out.splitlines()]
    start = lines.index("Run it again:") + 1
    again = shlex.split("\n".join(lines[start : lines.index("", start)]).replace("\\\n", ""))
    assert again[0] == "bncli"
    assert bncli(monkeypatch, *again[1:], "--json") == 1
    assert [group["failed"] for group in json.loads(capsys.readouterr().out)["groups"]] == [1]
    assert bncli(monkeypatch, "gradcheck", *asked, "--only", f"{CASE}/plain/forward") == 0


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_check_prints_the_groups_that_were_finished(own_kernels: str, number: str, code: int) -> None:
    asked = ("gradcheck", "--kernel", f"{own_kernels}:interrupted", "--allow-code", "--only", f"{CASE}/plain/*")
    environment = {**os.environ, "OWN_SIGNAL": number}
    ran = process(*asked, "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    out, err = ran.communicate(timeout=60)
    assert ran.returncode == code
    assert "Traceback" not in err
    part = json.loads(out)
    assert part["interrupted"] is True
    assert part["groups"]
    assert all(group["name"].startswith("train ") and group["cases"] for group in part["groups"])


def test_a_device_that_is_not_here_is_no_failed_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bncli(monkeypatch, "gradcheck", "--device", "cuda:99") == 3
    out, err = capsys.readouterr()
    assert "--device cuda:99" in err
    assert out == ""


def test_a_case_that_does_not_exist_is_answered_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bncli(monkeypatch, "gradcheck", "--only", "train/float23/contiguous/4x3x5x7/plain/dx") == 2
    assert "train/float32/contiguous/4x3x5x7/plain/dx" in capsys.readouterr().err


def test_the_command_that_runs_a_case_again_asks_for_what_was_asked() -> None:
    command = ["bncli", "gradcheck", "--kernel", "native"]
    assert rerun_command(GOOD, replace(FIRST, case="train/* x")) == [*command, "--only", "train/* x"]
    result = replace(GOOD, norm="layer", device="cpu")
    assert rerun_command(result, replace(FIRST, check="paths")) == [*command, "--norm", "layer", "--device", "cpu"]
