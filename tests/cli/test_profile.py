"""`bncli profile` as a user meets it: tables, files, the gate in CI, and what is said when it cannot be done."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bncli.cli import profile
from bncli.measure.profile import memory
from bncli.measure.profile.steps import StepRun
from bncli.measure.timing import ceilings, clock
from bncli.measure.timing.fresh_process import CallFailed, FreshProcesses
from bncli.report.profile import export
from bncli.results.profile import Ceilings, KernelProfile, StepMemory, StepProfile
from tests.cli.conftest import RECIPE, bncli
from tests.test_architecture import modules_after

TINY = (
    "--shape",
    "8x4x5x5",
    "--operation",
    "bn+relu",
    "--layout",
    "contiguous",
    "--device",
    "cpu",
    "--warm",
    "--quick",
)
STEP = ("small.yaml", "--device", "cpu", "--quick", "--quiet")

# Batch norms of the user's own, with torch's signature: right, wrong, and interrupted at the second of two shapes.
OWN = """
import os, signal
from torch import nn
from torch.nn import functional as F

def right(input, running_mean, running_var, weight, bias, training, momentum, eps):
    print("hello")
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)

def wrong(input, running_mean, running_var, weight, bias, training, momentum, eps):
    return 1.01 * right(input, running_mean, running_var, weight, bias, training, momentum, eps)

def interrupted(input, running_mean, running_var, weight, bias, training, momentum, eps):
    if input.shape[-1] == 9:  # which none of the cases that a kernel is judged on first has
        os.kill(os.getpid(), signal.SIGINT)
    return right(input, running_mean, running_var, weight, bias, training, momentum, eps)

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 2))

def broken():
    raise RuntimeError("no weights here")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a recipe, code of the user's own as `mine`, and shapes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "bad.csv").write_text("shape,calls\n3x3,1\n0x4x4,1\n8x4x5x5,no\n")
    (tmp_path / "columns.csv").write_text("a,b\n1,2\n")
    (tmp_path / "other.json").write_text("{}")
    return tmp_path


@pytest.fixture
def small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Less time, small ceilings, and no processes for the memory, which have tests of their own."""
    monkeypatch.setattr(profile, "QUICK_SECONDS", 0.5)
    monkeypatch.setattr(ceilings, "SIZES", (4096,))
    monkeypatch.setattr(ceilings, "BEYOND_CACHE", {"cpu": 2**20})
    monkeypatch.setattr(ceilings, "MATRIX_SIDE", {"cpu": 16})
    monkeypatch.setattr(memory, "kernel_processes", NoProcesses)
    monkeypatch.setitem(StepRun.__init__.__kwdefaults__, "step_memory", lambda *_: StepMemory(1.0, 1.0, 0.0, 2.0, 30.0))
    with clock.threads(1):  # two wait for each other where other tests run beside these
        yield folder


class NoProcesses(FreshProcesses):
    def __init__(self) -> None:
        super().__init__(lambda: None)

    def start(self) -> None:
        pass

    def call(self, *_: Any, **__: Any) -> Any:
        raise CallFailed("not in this test")


Capture = pytest.CaptureFixture[str]


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_the_kernel_view_is_a_table_on_stdout_with_talk_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert bncli(monkeypatch, "profile", *TINY) == 0
    out, err = capsys.readouterr()
    for word in ("native", "fused", "8x4x5x5", "vs native", "GB/s", "Measured ceilings", "warm cache", "bn+relu"):
        assert word in out
    assert "2 rows measured in" in out
    assert "2 rows to measure" in err
    assert "\x1b" not in out + err


@pytest.mark.usefixtures("small")
def test_json_is_read_back_and_csv_and_markdown_have_the_same_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert bncli(monkeypatch, "profile", *TINY, "--json", "--quiet") == 0
    out, err = capsys.readouterr()
    assert err == ""
    Path("saved.json").write_text(out)
    found = export.load(Path("saved.json"))
    assert isinstance(found, KernelProfile)
    assert [(row.kernel, row.error) for row in found.rows] == [("native", None), ("fused", None)]
    assert str(found.rows[1].ran).startswith("C")
    assert found.rows[1].faster is not None
    assert json.loads(export.to_json(found, None)) == json.loads(out)

    assert bncli(monkeypatch, "profile", *TINY, "--csv", "--quiet") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["kernel"] for row in rows] == ["native", "fused"]
    assert bncli(monkeypatch, "profile", *TINY, "--markdown", "--quiet") == 0
    assert "| fused" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_the_picture_is_drawn(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    assert bncli(monkeypatch, "profile", *TINY, "--plot", "costs.svg") == 0
    assert "Drawn in costs.svg" in capsys.readouterr().err
    assert Path("costs.svg").read_text().startswith("<?xml")


@pytest.mark.usefixtures("small")
def test_shapes_of_a_file_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    Path("mine.csv").write_text("shape,calls\n4x3x2x2,5\n6x7,1\n")
    asked = ("--shapes", "mine.csv", "--operation", "bn", "--warm", "--quick", "--json", "-q", "--device", "cpu")
    assert bncli(monkeypatch, "profile", *asked) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {(tuple(row["case"]["shape"]), row["calls"]) for row in rows} == {((4, 3, 2, 2), 5), ((6, 7), 1)}


# --- the user's own kernels -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_an_own_kernel_that_is_wrong_gets_its_error_no_time_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    kernels = ("--kernel", "native,mine:wrong,mine:right", "--allow-code")
    assert bncli(monkeypatch, "profile", *TINY, *kernels, "--json") == 1
    out, err = capsys.readouterr()
    native, wrong, right = json.loads(out)["rows"]
    assert wrong["wrong"] is True
    assert wrong["error"]
    assert (wrong["forward"], wrong["backward"], wrong["both"], wrong["faster"]) == (None, None, None, None)
    assert native["both"]["samples_ms"]
    assert right["both"]["samples_ms"]
    assert "hello" in err  # what it prints is no part of the result
    assert bncli(monkeypatch, "profile", *TINY, *kernels) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_ctrl_c_prints_what_is_measured_so_far(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    shapes = ("--shape", "4x3x5x5", "--shape", "4x3x9x9", "--operation", "bn", "--layout", "contiguous")
    asked = (*shapes, "--kernel", "native,mine:interrupted", "--allow-code", "--warm", "--quick", "--device", "cpu")
    assert bncli(monkeypatch, "profile", *asked) == 130
    out, err = capsys.readouterr()
    assert "interrupted: 2 of 4 rows measured" in out
    assert "4x3x5x5" in out
    assert "4x3x9x9" not in out
    assert "Stopped at once" in err
    assert "Traceback" not in err


# --- the gate ---------------------------------------------------------------------------------------------------------


def saved_baseline(monkeypatch: pytest.MonkeyPatch, capsys: Capture, better: float) -> dict[str, Any]:
    """A profile saved as baseline.json, its ratios to native `better` times those that were measured."""
    assert bncli(monkeypatch, "profile", *TINY, "--json", "--quiet") == 0
    saved: dict[str, Any] = json.loads(capsys.readouterr().out)
    for row in saved["rows"]:
        if row["faster"]:
            row["faster"]["value"] *= better
            at = row["faster"]["value"]  # with a narrow interval, that a busy machine cannot widen
            row["faster"]["interval"] = {"low": 0.99 * at, "high": 1.01 * at}
    Path("baseline.json").write_text(json.dumps(saved))
    return saved


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("better", "code", "verdict"), [(1e4, 1, "regressed"), (1e-4, 0, "ok")])
def test_a_regression_against_the_baseline_is_exit_code_1_and_nothing_else_is(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, better: float, code: int, verdict: str
) -> None:
    monkeypatch.setattr(Ceilings, "cores_shared", False)  # whatever else runs here meanwhile
    saved_baseline(monkeypatch, capsys, better)
    gate = ("--baseline", "baseline.json", "--fail-above", "1.5")
    assert bncli(monkeypatch, "profile", *TINY, *gate, "--json") == code
    (change,) = json.loads(capsys.readouterr().out)["gate"]["changes"]
    assert change["verdict"] == verdict
    assert bncli(monkeypatch, "profile", *TINY, *gate) == code
    assert verdict in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_a_baseline_of_other_shapes_is_a_mistake_and_the_measurements_are_shown_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    saved = saved_baseline(monkeypatch, capsys, 1.0)
    for row in saved["rows"]:
        row["case"]["shape"] = [3, 3]
    Path("baseline.json").write_text(json.dumps(saved))
    assert bncli(monkeypatch, "profile", *TINY, "--baseline", "baseline.json") == 2
    out, err = capsys.readouterr()
    assert "2 rows measured" in out
    assert "no row is in both" in err


@pytest.mark.usefixtures("small")
def test_what_the_gate_cannot_tell_is_exit_code_1_with_strict_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    saved = saved_baseline(monkeypatch, capsys, 1.0)
    (faster,) = (row["faster"] for row in saved["rows"] if row["faster"])
    faster["interval"] = {"low": faster["value"] / 100, "high": faster["value"] * 100}
    Path("baseline.json").write_text(json.dumps(saved))
    for strict, code in (((), 0), (("--strict",), 1)):
        assert bncli(monkeypatch, "profile", *TINY, "--baseline", "baseline.json", *strict, "--json") == code
        gate = json.loads(capsys.readouterr().out)["gate"]
        assert [change["verdict"] for change in gate["changes"]] == ["cannot tell"]
        assert (gate["regressed"], gate["failed"]) == (False, bool(strict))


@pytest.mark.usefixtures("small")
def test_a_baseline_without_intervals_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    saved = saved_baseline(monkeypatch, capsys, 1.0)
    for row in saved["rows"]:
        if row["faster"]:
            row["faster"]["interval"] = {"low": None, "high": None}
    Path("baseline.json").write_text(json.dumps(saved))
    assert bncli(monkeypatch, "profile", *TINY, "--baseline", "baseline.json") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "baseline.json: 1 of its 1 ratios to native come from too few rounds for an interval" in err
    assert "measure it anew, with 6 rounds or more" in err


# --- how long, and how much -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("view", ["kernels", "step"])
def test_every_ratio_has_six_rounds_or_those_asked_for_however_little_time_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, view: str
) -> None:
    shapes = ("--shape", "8x4x5x5", "--shape", "8x4x6x6", "--operation", "bn", "--warm")
    asked = ("profile", *(shapes if view == "kernels" else ("small.yaml",)), "--device", "cpu", "--time", "0.001", "-q")
    for least, options in ((6, ()), (9, ("--min-rounds", "9")), (2, ("--min-rounds", "2"))):
        assert bncli(monkeypatch, *asked, *options, "--json") == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        samples = [row["samples_ms"] if view == "step" else row["both"]["samples_ms"] for row in rows]
        assert [row["error"] for row in rows] == [None] * len(rows)
        assert {len(each) for each in samples} == {least}
        intervals = [row["faster"]["interval"]["low"] for row in rows if row["faster"]]
        assert len(intervals) >= 2
        assert {low is None for low in intervals} == {least < 6}


@pytest.mark.usefixtures("small")
def test_options_that_take_several_names_take_them_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    kernels = ("--kernel", "native", "--kernel", "mine:right,native", "--allow-code", "--operation", "bn")
    assert bncli(monkeypatch, "profile", *TINY, *kernels, "--dtype", "fp32", "--dtype", "fp64", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["case"]["operation"], row["case"]["dtype"], row["kernel"]) for row in rows] == [
        (operation, dtype, kernel)
        for operation in ("bn+relu", "bn")
        for dtype in ("fp32", "fp64")
        for kernel in ("native", "mine:right")
    ]


# --- a step -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_the_step_view_of_a_recipe_shows_every_arm_and_writes_a_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert bncli(monkeypatch, "profile", *STEP, "--arm", "normed", "--trace", "step.json") == 0
    out = capsys.readouterr().out
    for word in ("normed", "training", "evaluation", "native", "fused", "Share of a step", "Memory of a training step"):
        assert word in out
    assert "normed, fused: 1 batch norm (1 with relu)" in out
    assert json.loads(Path("step.json").read_text())["traceEvents"]

    assert bncli(monkeypatch, "profile", *STEP, "--json") == 0
    Path("saved.json").write_text(capsys.readouterr().out)
    found = export.load(Path("saved.json"))
    assert isinstance(found, StepProfile)
    assert [(row.arm, row.mode, row.kernel) for row in found.rows] == [
        ("plain", "training", None), ("plain", "evaluation", None),
        ("normed", "training", "native"), ("normed", "training", "fused"),
        ("normed", "evaluation", "native"), ("normed", "evaluation", "fused"),
    ]  # fmt: skip
    assert bncli(monkeypatch, "profile", *TINY, "--baseline", "saved.json") == 2
    assert "saved.json: it holds the profile of a step, and this is one of kernels" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_a_model_of_the_users_own_is_measured_when_that_is_allowed(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    asked = ("profile", "--input", "4x3x8x8", "--device", "cpu", "--quick", "--quiet", "--json")
    assert bncli(monkeypatch, *asked, "--model", "mine:make", "--allow-code") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["kernel"], row["mode"], row["error"]) for row in rows] == [
        (kernel, mode, None) for mode in ("training", "evaluation") for kernel in ("native", "fused")
    ]
    assert bncli(monkeypatch, *asked, "--model", "mine:make") == 2
    assert (
        "--model mine:make: it is code of yours that would run; allow it with --allow-code" in capsys.readouterr().err
    )
    assert bncli(monkeypatch, *asked, "--model", "mine:broken", "--allow-code") == 1
    assert "bncli: mine:broken raised RuntimeError: no weights here" in capsys.readouterr().err
    assert bncli(monkeypatch, *asked, "--model", "mine:maek", "--allow-code") == 2
    assert "has no attribute 'maek'" in capsys.readouterr().err


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "natve"], "--kernel natve: there is no such kernel; did you mean native?"),
        (
            ["--kernel", "mine:right"],
            "--kernel mine:right: it is code of yours that would run; allow it with --allow-code",
        ),
        (["--kernel", ",", "--shape", "8x4"], "--kernel: name at least one"),
        (["small.yaml", "--kernel", "native,compiled"], "--kernel compiled: models are trained with native and fused"),
        (["--shape", "8"], "--shape 8: expected the batch, the channels and up to three sides"),
        (["--shape", "1x3"], "--shape 1x3: training needs more than one value a channel, and it has one"),
        (["--shape", "8x4", "--batch", "3"], "--batch: a shape holds its own batch, its first number"),
        (["--batch", "0"], "'--batch': 0 is not in the range"),
        (["--shapes", "resnet"], "--shapes resnet: expected one of resnet20, resnet50, inception, mlp, or a CSV file"),
        (["--shapes", "none.csv"], "--shapes none.csv: there is no such file"),
        (["--shapes", "bad.csv"], "--shapes bad.csv, line 3: 0x4x4, 1; expected: shape is sizes like 32x64x56x56"),
        (["--shapes", "bad.csv"], "line 4: 8x4x5x5, no"),
        (["--shapes", "columns.csv"], "--shapes columns.csv, line 1: it lacks the columns n, c, spatial"),
        (["--shapes", "bad.csv", "--batch", "3"], "--batch: bad.csv holds its own"),
        (["--operation", "relu"], "--operation relu: expected some of bn, bn+relu, bn+add+relu"),
        (["--dtype", "fp8"], "--dtype fp8: expected some of bf16, fp16, fp32, fp64"),
        (["--layout", "nchw"], "--layout nchw: expected some of contiguous, channels_last"),
        (["--fail-above", "1.1"], "--fail-above: without --baseline FILE.json nothing is compared; give one"),
        (["small.yaml", "--strict"], "--strict: without --baseline FILE.json nothing is compared; give one"),
        (["--time", "0"], "--time 0: expected seconds, more than 0"),
        (["--time", "nan"], "--time nan: expected seconds, more than 0"),
        (["--time", "20", "--quick"], "--time and --quick: choose one"),
        (["--min-rounds", "0"], "'--min-rounds': 0 is not in the range"),
        (
            ["--min-rounds", "5", "--baseline", "other.json"],
            "--min-rounds 5 with --baseline: a verdict needs intervals",
        ),
        (["--fail-above", "0.5"], "--fail-above 0.5: expected more than 1, as in 1.10 for a tenth slower"),
        (["--json", "--csv"], "--json, --csv and --markdown: choose one"),
        (["--csv", "--baseline", "other.json"], "--csv with --baseline: the verdicts have no place in the CSV"),
        (["--baseline", "other.json"], "--baseline other.json: is JSON, but no profile"),
        (["--baseline", "small.yaml"], "--baseline small.yaml: is not JSON"),
        (["--baseline", "none.json"], "--baseline none.json: cannot be read"),
        (["--baseline", "other.json", "--kernel", "fused"], "--baseline: ratios to native are compared; name native"),
        (["--plot", "x.pdf"], "x.pdf: a plot is written as .svg or .png"),
        (["--plot", "nowhere/x.svg"], "nowhere/x.svg: its folder nowhere does not exist"),
        (["small.yaml", "--trace", "nowhere/t.json"], "nowhere/t.json: its folder nowhere does not exist"),
        (["--trace", "t.json"], "--trace belongs to the step view: give a recipe"),
        (["small.yaml", "--warm", "--shape", "8x4"], "--shape, --warm belong to the kernel view: leave the recipe"),
        (["nothing.yaml"], "nothing.yaml: there is no such file"),
        (["resnet50"], "resnet50 is no recipe; for its shapes give --shapes resnet50"),
        (["bad.csv"], "bad.csv is no recipe; for its shapes give --shapes bad.csv"),
        (["8x4x5x5"], "8x4x5x5 is no recipe; for that shape give --shape 8x4x5x5"),
        (["small.yaml", "--arm", "norm"], "--arm norm: did you mean normed?"),
        (["small.yaml", "--set", "nrom=batch"], "--set nrom=batch: nrom: unknown key; did you mean norm?"),
        (["small.yaml", "--model", "mine:make"], "small.yaml and --model mine:make: give one of them"),
        (["--model", "mine:make", "--arm", "a"], "--set and --arm change a recipe; with --model there is none"),
        (["--model", "mine:make"], "--model mine:make: give its input's shape too, as in --input 32x3x224x224"),
        (["--model", "mine", "--input", "2x3"], "--model mine: expected package.module:function"),
        (["--model", "mine:make", "--input", "2x", "--allow-code"], "--input 2x: expected the batch, the channels"),
        (["--device", "gpu"], "--device gpu: expected one of auto, cpu, cuda"),
        (["--threads", "0"], "'--threads': 0 is not in the range"),
    ],
)
def test_mistakes_leave_with_2_a_message_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(memory, "kernel_processes", NoProcesses)
    assert bncli(monkeypatch, "profile", *arguments) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_a_kernel_that_cannot_be_measured_is_refused_before_torch_is_loaded() -> None:
    for arguments in (["--kernel", "nonsense"], ["small.yaml", "--kernel", "apex"]):
        refuse = f"import sys; sys.argv = {['bncli', 'profile', *arguments]!r}; import bncli.cli; bncli.cli.main()"
        assert "torch" not in modules_after(refuse)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("view", [[], ["small.yaml"]])
def test_a_gpu_that_is_not_here_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, view: list[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert bncli(monkeypatch, "profile", *view, "--device", "cuda") == 3
    out, err = capsys.readouterr()
    assert "bncli: --device cuda: this torch" in err
    assert out == ""


@pytest.mark.skipif(sys.platform == "win32", reason="other compilers")
def test_without_a_c_compiler_native_is_measured_and_the_reason_is_in_the_fused_row(folder: Path) -> None:
    quick = "import bncli.cli, bncli.cli.profile; bncli.cli.profile.QUICK_SECONDS = 1.0; bncli.cli.main()"
    environment = {**os.environ, "PATH": str(folder / "empty"), "BNCLI_CACHE": str(folder / "cache")}
    environment["OMP_NUM_THREADS"] = "1"
    environment.pop("CC", None)
    command = [sys.executable, "-c", quick, "profile", *TINY, "--json", "-q"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ran.returncode == 3, ran.stderr
    native, fused = json.loads(ran.stdout)["rows"]
    assert native["both"]["samples_ms"]
    assert native["peak_memory_mib"] is not None or sys.platform != "linux"  # in a process of its own
    assert "there is no C compiler (cc, gcc or clang)" in fused["error"]
    assert "Install one" in fused["error"]
    assert fused["wrong"] is False
    assert fused["both"] is None
