"""`bncli train` as a user meets it: the run's folder, what is printed where, exit codes, signals and terminals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bncli.kernels import fused
from bncli.names import RECIPE_KERNELS
from bncli.recipe.load import load
from bncli.report.files import from_json
from bncli.results.train import RunResult
from tests.cli.conftest import RECIPE, bncli, process
from tests.conftest import OWN


def test_train_ends_with_a_table_on_stdout_and_talk_on_stderr(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bncli(monkeypatch, "train", recipe) == 0
    out, err = capsys.readouterr()
    for word in ("steps to target", "samples/s", "ms/step", "memory", "accuracy"):
        assert word in out.lower()
    assert "Saved in runs/small/" in err
    assert "\x1b" not in out + err


def test_a_run_folder_holds_the_resolved_recipe_the_metrics_and_the_result(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bncli(monkeypatch, "train", recipe, "--out", "run", "--set", "optimizer.lr=0.3", "--json", "--quiet") == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = from_json(RunResult, out)
    assert json.loads(Path("run/result.json").read_text()) == json.loads(out)
    events = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "evaluated" for event in events) == len(result.evaluations)
    resolved = load("run/recipe.yaml")
    assert resolved.base.optimizer.lr == 0.3
    assert bncli(monkeypatch, "train", "run/recipe.yaml", "--out", "again", "--json", "-q") == 0
    again = from_json(RunResult, capsys.readouterr().out)
    assert again.evaluations == result.evaluations


def test_a_folder_with_a_run_is_not_written_over_unless_forced(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bncli(monkeypatch, "train", recipe, "-o", "run", "-q") == 0
    assert bncli(monkeypatch, "train", recipe, "-o", "run", "-q") == 2
    assert (
        "--out run: holds a run already; choose another folder or write over it with --force" in capsys.readouterr().err
    )
    assert bncli(monkeypatch, "train", recipe, "-o", "run", "-q", "--force") == 0


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("folder", ["mine", "."])
def test_the_users_own_recipe_is_never_written_over(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str, force: tuple[str]
) -> None:
    own = Path(folder, "recipe.yaml")
    own.parent.mkdir(exist_ok=True)
    own.write_text("# my notes\n" + RECIPE)
    assert bncli(monkeypatch, "train", str(own), "-o", folder, "-q", *force) == 2
    assert f"--out {folder}: {own} was not written by bncli" in capsys.readouterr().err
    assert own.read_text() == "# my notes\n" + RECIPE
    assert sorted(file.name for file in own.parent.iterdir() if file.name != recipe) == ["recipe.yaml"]


def test_train_takes_an_arm_by_name(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bncli(monkeypatch, "train", recipe, "--arm", "normed", "-o", "run") == 0
    assert load("run/recipe.yaml").base.norm.kind == "batch"
    assert bncli(monkeypatch, "train", recipe, "--arm", "normd") == 2
    assert "--arm normd: did you mean normed?" in capsys.readouterr().err


def test_a_run_that_diverges_leaves_with_4_and_keeps_its_result(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bncli(monkeypatch, "train", recipe, "--set", "optimizer.lr=1e30", "-o", "run") == 4
    assert "diverged" in capsys.readouterr().out
    assert json.loads(Path("run/result.json").read_text())["status"] == "diverged"


def test_a_missed_target_is_an_error_only_when_it_is_required(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missed = ("train", recipe, "--set", "train.steps=5")
    assert bncli(monkeypatch, *missed) == 0
    assert "> 3.85, as many as the" in capsys.readouterr().out
    assert bncli(monkeypatch, *missed, "--require-target") == 1


def test_the_fused_kernel_trains_on_the_cpu_as_the_native_one_does(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for kernel in RECIPE_KERNELS:
        norm = f"norm={{kind: batch, kernel: {kernel}}}"
        assert bncli(monkeypatch, "train", recipe, "--set", norm, "--device", "cpu", "-o", kernel, "--json", "-q") == 0
        found[kernel] = from_json(RunResult, capsys.readouterr().out)
    assert len(found["fused"].evaluations) == len(found["native"].evaluations)
    for one, other in zip(found["fused"].evaluations, found["native"].evaluations, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)  # float32 sums in another order, over some tens of steps


def test_a_kernel_that_cannot_run_here_is_refused_with_its_reason_and_nothing_runs_in_its_place(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fused, "unavailable_reason", lambda device: f"there is no compiler for {device}")
    asked = ("train", recipe, "--set", "norm={kind: batch, kernel: fused}", "--device", "cpu")
    assert bncli(monkeypatch, *asked) == 3
    out, err = capsys.readouterr()
    assert "bncli: the fused kernel cannot run: there is no compiler for cpu. Nothing else is run in its place" in err
    assert out == ""
    assert not Path("runs").exists()


def test_a_run_that_gives_up_before_its_first_step_leaves_no_folder(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bncli(monkeypatch, "train", recipe, "--set", "data={source: npz, path: none.npz}") == 2
    assert not Path("runs").exists()


def own(act: str, *arguments: str) -> tuple[int, str, str]:
    """A process that trains a model of the user's own: exit code, stdout, stderr."""
    Path("mine.py").write_text(OWN.format(act=act))
    model = "model={kind: module, module: 'mine:make'}"
    ran = process("train", "small.yaml", "--set", model, "--allow-code", *arguments,
                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    out, err = ran.communicate()
    return ran.returncode, out, err


@pytest.mark.parametrize("act", ["import sys; sys.exit(0)", "raise RuntimeError('no')"])
def test_an_own_model_that_ends_the_run_is_named_with_its_line_and_no_traceback(recipe: str, act: str) -> None:
    code, out, err = own(act)
    assert code == 1
    assert "model.module: mine:make raised" in err
    assert "mine.py:5" in err
    assert "Traceback" not in err
    assert out == ""


def test_what_an_own_model_prints_stays_out_of_the_result(recipe: str) -> None:
    code, out, err = own("print('hello')", "--json", "--quiet")
    assert code == 0
    assert json.loads(out)["steps_run"] > 0
    assert "hello" in err


def test_a_dry_run_of_train_gives_the_parameters_that_the_run_has(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bncli(monkeypatch, "train", recipe, "--arm", "normed", "--dry-run", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert bncli(monkeypatch, "train", recipe, "--arm", "normed", "--json", "-q") == 0
    assert planned["arms"][0]["parameters"] == json.loads(capsys.readouterr().out)["parameters"]
    assert 0 < planned["arms"][0]["memory_mib"] < planned["available_memory_mib"]


ENDLESS = ("--set", "train.steps=10000000", "--set", "train.target=null", "--set", "train.evaluate_every=1000")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_a_run_after_its_step_and_keeps_what_is_computed(
    recipe: str, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    started = process("train", recipe, "-o", "run", *ENDLESS, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("evaluated") > 1):
        assert started.poll() is None
        time.sleep(0.02)
    started.send_signal(number)
    out, err = started.communicate(timeout=30)
    assert started.returncode == code
    assert "interrupted" in out
    assert "Traceback" not in err
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["status"] == "interrupted"
    assert result["steps_run"] >= 1000


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_the_bar_on_a_terminal_leaves_stdout_to_the_result(recipe: str) -> None:
    """rich's Progress takes stdout over when stderr is a terminal (rich issue 2151); no pipe shows that."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    started = process("train", recipe, "--json", stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    screen = b""
    while True:
        try:
            read = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not read:
            break
        screen += read
    os.close(ours)
    out, _ = started.communicate()
    assert json.loads(out)["status"] == "reached"
    assert b"\x1b[" in screen  # a bar was drawn
    assert b"steps_to_target" not in screen


def test_no_bar_and_no_colour_off_a_terminal_whatever_the_environment_forces(recipe: str) -> None:
    environment = {**os.environ, "FORCE_COLOR": "1", "NO_COLOR": "1"}
    started = process("train", recipe, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    out, err = started.communicate()
    assert "\r" not in out + err
    assert "\x1b[3" not in out + err
    assert "━" not in err
