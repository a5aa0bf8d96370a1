"""`bncli gradcheck` as a user meets it: what is refused, the demonstration, kernels of the user's own, signals."""

from __future__ import annotations

import html
import json
import shlex
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from bncli.cli.gradcheck import rerun_command
from tests.cli.conftest import bncli
from tests.report.gradcheck.made_up_checks import FIRST, GOOD
from tests.test_architecture import modules_after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--full"], "--quick and --full: choose one"),
        (["--kernel", "natve"], "--kernel natve: there is no such kernel; did you mean native?"),
        (["--kernel", "cuda"],
         "--kernel cuda: there is no such kernel; expected native, fused, fused-interpreted, compiled or pa"),
        (["--kernel", "mine:norm"],
         "--kernel mine:norm: it is your own code, which would be executed; allow it with --allow-code"),
        (["--kernel", ""], "--kernel : one kernel is checked at a time"),
        (["--kernel", "fused", "--kernel", "native"], "--kernel fused, native: one kernel is checked at a time; run"),
        (["--demo", "--csv", "--junit", "x.xml"], "--csv, --junit: nothing is checked with --demo"),
        (["--json", "--markdown"], "--json, --csv, --markdown and --latex: choose one"),
        (["--junit", "missing/x.xml"], "missing"),
        (["--dtype", "fp32,fp8"], "--dtype fp8: expected some of bf16, fp16, fp32, fp64"),
        (["--only", "eval/float64"], "--only eval/float64: no case of that name."),
        (["--demo", "--quick", "--kernel", "fused"], "--kernel, --quick: nothing is checked with --demo"),
        (["--norm", "bach"], "'bach' is not one of 'batch', 'layer', 'group', 'instance'"),
        (["--device", "gpu"], "--device gpu: expected one of auto, cpu, cuda, cuda:N, mps"),
        # A case that does not exist is answered with the nearest.
        (["--only", "train/float23/contiguous/4x3x5x7/plain/dx"], "train/float32/contiguous/4x3x5x7/plain/dx"),
    ],
)  # fmt: skip
def test_gradcheck_refuses_what_it_could_not_obey(arguments: list[str], message: str) -> None:
    ran = bncli("gradcheck", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err


def test_a_kernel_that_does_not_exist_is_refused_before_torch_is_loaded() -> None:
    refuse = "import sys; sys.argv = ['bncli', 'gradcheck', '--kernel', 'nonsense']; import bncli.cli; bncli.cli.main()"
    assert "torch" not in modules_after(refuse)


def test_a_device_that_is_not_here_is_no_failed_check() -> None:
    ran = bncli("gradcheck", "--device", "cuda:99")
    assert (ran.code, ran.out) == (3, "")
    assert "--device cuda:99" in ran.err


def test_the_demonstration_is_a_table_or_json() -> None:
    ran = bncli("gradcheck", "--demo")
    assert (ran.code, ran.err) == (0, "")
    assert "the loss stays at" in ran.words
    ran = bncli("gradcheck", "--demo", "--json")
    assert ran.code == 0
    demo = json.loads(ran.out)
    last = demo["steps"][-1]
    assert last["step"] == 1000
    assert last["bias_ignoring"] == pytest.approx(1000 * demo["steps"][1]["bias_ignoring"])
    assert last["loss_ignoring"] == pytest.approx(last["loss_full"])


# --- the user's own kernels ---------------------------------------------------------------------------------------

CASE = "*/float32/contiguous/4x3x5x7"  # as a glob: in training and in evaluation mode

# Right but talkative, blind to its statistics, and one that is interrupted.
OWN_KERNELS = """
import os, signal, torch
from torch.nn import functional as F

def right(input, running_mean, running_var, weight, bias, training, momentum, eps):
    print("hello")
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)

def any_name(values, /, running_mean, running_var, weight, bias, training, momentum, eps):
    return F.batch_norm(values, running_mean, running_var, weight, bias, training, momentum, eps)

def blind(x, weight, bias, eps, residual, activation):
    var, mean = torch.var_mean(x.detach(), dim=[0, *range(2, x.dim())], correction=0)
    y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
    y = y if residual is None else y + residual
    return y if activation is None else getattr(F, activation)(y), mean, var

def interrupted(input, running_mean, running_var, weight, bias, training, momentum, eps):
    if not training and input.dim() == 4:  # after the groups of training mode
        os.kill(os.getpid(), getattr(signal, os.environ["OWN_SIGNAL"]))
    return right(input, running_mean, running_var, weight, bias, training, momentum, eps)

def catches_all(input, running_mean, running_var, weight, bias, training, momentum, eps):
    try:
        return interrupted(input, running_mean, running_var, weight, bias, training, momentum, eps)
    except:
        return right(input, running_mean, running_var, weight, bias, training, momentum, eps)
"""


@pytest.fixture
def own_kernels(folder: Path) -> None:
    (folder / "own.py").write_text(OWN_KERNELS)


@pytest.mark.usefixtures("own_kernels")
def test_what_an_own_kernel_prints_stays_out_of_the_result() -> None:
    asked = ("--kernel", "own:right", "--allow-code", "--only", f"{CASE}/*")
    ran = bncli("gradcheck", *asked, "--quick", "--quiet", "--json")
    result = json.loads(ran.out)
    assert (ran.code, result["passed"]) == (0, True)
    assert sum(group["cases"] for group in result["groups"]) > 10
    assert set(ran.err.split()) == {"hello"}


@pytest.mark.usefixtures("own_kernels")
def test_an_own_kernel_is_checked_in_some_dtypes_with_so_many_threads_and_reported_for_ci(folder: Path) -> None:
    asked = ("--kernel", "own:any_name", "--allow-code", "--only", f"{CASE}/*,*/float64/*/4x3x5x7/plain/dx")
    before = torch.get_num_threads()
    try:
        ran = bncli("gradcheck", *asked, "--dtype", "fp32", "--threads", "1", "--junit", "r.xml", "--json", "--quick")
        assert (ran.code, "float64" in ran.err) == (2, True)  # what is left out has no cases
        ran = bncli(
            "gradcheck", *asked[:-1], f"{CASE}/*", *("--dtype", "fp32", "--threads", "1", "--junit", "r.xml"), "--json"
        )
    finally:
        torch.set_num_threads(before)
    result = json.loads(ran.out)
    assert (ran.code, result["environment"]["threads"], result["dtypes"]) == (0, 1, ["fp32"])
    assert result["cases"] == sum(group["cases"] for group in result["groups"]) > 0
    assert (result["failed"], result["skipped_groups"]) == (0, 0)
    (suite,) = ElementTree.fromstring((folder / "r.xml").read_text())
    assert {case.get("name") for case in suite} == {group["name"] for group in result["groups"]}
    for form, first in (("--csv", "section,name,"), ("--markdown", "### Gradients of batch norm, kernel own:any")):
        ran = bncli("gradcheck", *asked[:-1], f"{CASE}/plain/dx", form)
        assert (ran.code, ran.out.startswith(first)) == (0, True)


@pytest.mark.usefixtures("own_kernels")
def test_a_blind_kernel_fails_with_a_command_that_fails_again() -> None:
    asked = ("--kernel", "own:blind", "--allow-code")
    ran = bncli("gradcheck", *asked, "--only", f"{CASE}/*", "--html", "blind.html")
    assert ran.code == 1
    assert " FAILED" in ran.out
    lines = [line.rstrip() for line in ran.out.splitlines()]
    start = lines.index("Run it again:") + 1
    command, *arguments = shlex.split("\n".join(lines[start : lines.index("", start)]).replace("\\\n", ""))
    again = bncli(*arguments, "--json")
    assert (command, again.code) == ("bncli", 1)
    page = Path("blind.html").read_text()
    assert "FAILED." in page
    assert shlex.join([command, *arguments]) in html.unescape(page)
    assert [group["failed"] for group in json.loads(again.out)["groups"]] == [1]
    assert bncli("gradcheck", *asked, "--only", f"{CASE}/plain/forward").code == 0


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_check_prints_the_groups_that_were_finished(
    monkeypatch: pytest.MonkeyPatch, number: str, code: int
) -> None:
    monkeypatch.setenv("OWN_SIGNAL", number)
    asked = ("gradcheck", "--kernel", "own:interrupted", "--allow-code", "--only", f"{CASE}/plain/*")
    ran = bncli(*asked, "--json")
    part = json.loads(ran.out)
    assert (ran.code, part["interrupted"]) == (code, True)
    assert part["groups"]
    assert all(group["name"].startswith("train ") and group["cases"] for group in part["groups"])
    ran = bncli(*asked)
    assert (ran.code, "interrupted" in ran.out.lower()) == (code, True)


@pytest.mark.usefixtures("own_kernels")
def test_ctrl_c_ends_it_after_the_group_when_code_drops_the_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN_SIGNAL", "SIGINT")
    ran = bncli("gradcheck", "--kernel", "own:catches_all", "--allow-code", "--only", f"{CASE}/plain/*", "--json")
    assert (ran.code, json.loads(ran.out)["interrupted"]) == (130, True)


def test_the_command_that_runs_a_case_again_asks_for_what_was_asked() -> None:
    command = ["bncli", "gradcheck", "--kernel", "native"]
    assert rerun_command(GOOD, replace(FIRST, case="train/* x")) == [*command, "--only", "train/* x"]
    result = replace(GOOD, norm="layer", device="cpu", effort="quick", dtypes=("fp32", "bf16"), threads=2)
    options = ["--norm", "layer", "--device", "cpu", "--quick", "--dtype", "fp32,bf16", "--threads", "2"]
    assert rerun_command(result, replace(FIRST, check="paths")) == [*command, *options]


def test_the_demo_and_the_check_draw_their_pictures() -> None:
    pytest.importorskip("matplotlib")
    ran = bncli("gradcheck", "--demo", "--plot", "demo.svg")
    assert (ran.code, ran.err) == (0, "Plot written to demo.svg\n")
    assert "the loss stands still" in Path("demo.svg").read_text()
    refused = bncli("gradcheck", "--only", "x", "--plot", "parts.svg")
    assert (refused.code, refused.out) == (2, "")
    assert "--plot with --only" in refused.err
