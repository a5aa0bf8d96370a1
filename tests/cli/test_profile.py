"""`bncli profile` as a user meets it: tables, files, the gate in CI, and what is said when it cannot be done."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bncli.cli import profile
from bncli.engine.device import cpu_threads
from bncli.engine.load import CoreWait
from bncli.kernels import fused
from bncli.measure.profile import memory
from bncli.measure.profile.steps import StepRun
from bncli.measure.timing import ceilings
from bncli.measure.timing.fresh_process import FreshProcesses
from bncli.report.profile import export
from bncli.results.profile import KernelProfile, StepMemory, StepProfile
from tests.cli.conftest import Ran, bncli
from tests.test_architecture import modules_after

CPU = ("--device", "cpu", "--quick", "--quiet")
TINY = ("--shape", "8x4x5x5", "--operation", "bn+relu", "--layout", "contiguous", "--warm", *CPU)
STEP = ("small.yaml", *CPU)

# Batch norms of the user's own, with torch's signature: right, wrong, and interrupted at the second of two shapes.
OWN = """
import os, signal
import torch
from torch import nn
from torch.nn import functional as F

def right(input, running_mean, running_var, weight, bias, training, momentum, eps):
    print("hello")
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)

def wrong(input, running_mean, running_var, weight, bias, training, momentum, eps):
    return 1.01 * right(input, running_mean, running_var, weight, bias, training, momentum, eps)

def catches_all(input, running_mean, running_var, weight, bias, training, momentum, eps):
    try:
        return interrupted(input, running_mean, running_var, weight, bias, training, momentum, eps)
    except:
        return right(input, running_mean, running_var, weight, bias, training, momentum, eps)

def interrupted(input, running_mean, running_var, weight, bias, training, momentum, eps):
    if input.shape[-1] == 9:  # which none of the cases that a kernel is judged on first has
        os.kill(os.getpid(), signal.SIGINT)
    return right(input, running_mean, running_var, weight, bias, training, momentum, eps)

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 2))

class OneWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no way back")

def one_way():
    class Model(nn.Sequential):
        def forward(self, x):
            return OneWay.apply(super().forward(x))
    return Model(*make())

def broken():
    raise RuntimeError("no weights here")
"""


class NoProcesses(FreshProcesses):
    """Peaks of memory without the processes that measure them, which have tests of their own."""

    def __init__(self) -> None:
        super().__init__(lambda: None)

    def start(self) -> None:
        pass

    def call(self, *_: Any, **__: Any) -> float:
        return 7.0


def measure_less(patch: pytest.MonkeyPatch) -> None:
    """Less time, small ceilings, and no processes for the memory."""
    patch.setattr(profile, "QUICK_SECONDS", 0.1)
    patch.setattr(ceilings, "SIZES", (4096,))
    patch.setattr(ceilings, "BEYOND_CACHE", {"cpu": 2**20})
    patch.setattr(ceilings, "MATRIX_SIDE", {"cpu": 16})
    patch.setattr(memory, "kernel_processes", NoProcesses)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        measure_less(patch)
        patch.setitem(StepRun.__init__.__kwdefaults__, "step_memory", lambda *_: StepMemory(1.0, 1.0, 0.0, 2.0, 30.0))
        with cpu_threads(1):  # two wait for each other where other tests run beside these
            yield


@pytest.fixture(autouse=True)
def mine(folder: Path) -> None:
    """The current folder: a recipe, code of the user's own as `mine`, and files that are not as they should be."""
    (folder / "mine.py").write_text(OWN)
    (folder / "bad.csv").write_text("shape,calls\n3x3,1\n0x4x4,1\n8x4x5x5,no\n")
    (folder / "columns.csv").write_text("a,b\n1,2\n")
    (folder / "other.json").write_text("{}")


@pytest.fixture(scope="module")
def measured(small: None) -> Ran:
    """A profile as JSON, which several tests read and take for a baseline."""
    return bncli("profile", *TINY, "--json")


# --- kernels ----------------------------------------------------------------------------------------------------------


def test_the_kernel_view_is_a_table_on_stdout_with_messages_on_stderr() -> None:
    ran = bncli("profile", *TINY[:-1])  # not --quiet
    assert ran.code == 0
    for word in ("native", "fused", "8x4x5x5", "vs native", "GB/s", "Measured ceilings", "warm cache", "bn+relu"):
        assert word in ran.out
    assert "2 rows measured in" in ran.out
    assert "2 rows to measure" in ran.err
    assert "\x1b" not in ran.out + ran.err


def test_json_is_read_back_and_csv_and_markdown_have_the_same_rows(
    measured: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (measured.code, measured.err) == (0, "")
    Path("saved.json").write_text(measured.out)
    found = export.load(Path("saved.json"))
    assert isinstance(found, KernelProfile)
    assert [(row.kernel, row.error, row.peak_memory_mib) for row in found.rows] == [
        ("native", None, 7.0), ("fused", None, 7.0),
    ]  # fmt: skip
    assert str(found.rows[1].ran).startswith("C")
    assert found.rows[1].faster is not None
    assert json.loads(export.to_json(found, None)) == json.loads(measured.out)

    monkeypatch.setattr(CoreWait, "cores", lambda self: 0.7)  # as where other programs run
    ran = bncli("profile", *TINY[:-1], "--csv")  # not --quiet
    assert [row["kernel"] for row in csv.DictReader(io.StringIO(ran.out))] == ["native", "fused"]
    assert "!: measured while other programs used the cores: up to 0.70 threads" in ran.err
    assert "do not use this as a baseline" in ran.err
    assert "| fused" in bncli("profile", *TINY, "--markdown").out


def test_the_plot_is_written() -> None:
    pytest.importorskip("matplotlib")
    ran = bncli("profile", *TINY[:-1], "--plot", "costs.svg")
    assert ran.code == 0
    assert "Plot written to costs.svg" in ran.err
    assert Path("costs.svg").read_text().startswith("<?xml")


def test_shapes_of_a_file_are_measured() -> None:
    Path("mine.csv").write_text("shape,calls\n4x3x2x2,5\n6x7,1\n")
    ran = bncli("profile", "--shapes", "mine.csv", "--operation", "bn", "--warm", *CPU, "--json")
    assert ran.code == 0
    rows = json.loads(ran.out)["rows"]
    assert {(tuple(row["case"]["shape"]), row["calls"]) for row in rows} == {((4, 3, 2, 2), 5), ((6, 7), 1)}


def test_a_kernel_that_cannot_run_is_a_row_with_the_reason_and_exit_code_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "unavailable_reason", lambda device: "there is no C compiler. Install one")
    ran = bncli("profile", *TINY, "--json")
    assert ran.code == 3
    native, ours = json.loads(ran.out)["rows"]
    assert native["both"]["samples_ms"]
    assert "there is no C compiler" in ours["error"]
    assert "Install one" in ours["error"]
    assert ours["wrong"] is False
    assert ours["both"] is None


# --- the user's own kernels -------------------------------------------------------------------------------------------


def test_a_wrong_own_kernel_has_an_error_no_time_and_exit_code_1() -> None:
    kernels = ("--kernel", "native,mine:wrong,mine:right", "--allow-code")
    ran = bncli("profile", *TINY, *kernels, "--json")
    assert ran.code == 1
    native, wrong, right = json.loads(ran.out)["rows"]
    assert wrong["wrong"] is True
    assert wrong["error"]
    assert (wrong["forward"], wrong["backward"], wrong["both"], wrong["faster"]) == (None, None, None, None)
    assert native["both"]["samples_ms"]
    assert right["both"]["samples_ms"]
    assert "hello" in ran.err  # what it prints is no part of the result
    ran = bncli("profile", *TINY, *kernels)
    assert ran.code == 1
    assert "WRONG" in ran.out


def test_ctrl_c_prints_what_is_measured_so_far() -> None:
    shapes = ("--shape", "4x3x5x5", "--shape", "4x3x9x9", "--operation", "bn", "--layout", "contiguous")
    ran = bncli("profile", *shapes, "--kernel", "native,mine:interrupted", "--allow-code", "--warm", *CPU)
    assert ran.code == 130
    assert "interrupted: 2 of 4 rows measured" in ran.out
    assert "4x3x5x5" in ran.out
    assert "4x3x9x9" not in ran.out
    assert "Stopped at once" in ran.err


def test_ctrl_c_ends_it_after_the_case_when_code_drops_the_exception() -> None:
    shapes = ("--shape", "4x3x9x9", "--shape", "4x3x5x5", "--operation", "bn", "--layout", "contiguous")
    ran = bncli("profile", *shapes, "--kernel", "native,mine:catches_all", "--allow-code", "--warm", *CPU)
    assert ran.code == 130
    assert "4x3x5x5" not in ran.out


# --- the gate ---------------------------------------------------------------------------------------------------------


def save_baseline(measured: Ran, **changes: Any) -> None:
    """Save the profile as baseline.json, its one ratio to native changed, as if measured on idle cores."""
    saved = json.loads(measured.out)
    for row in saved["rows"]:
        row["cores_lacked"] = 0.0
    (faster,) = (row["faster"] for row in saved["rows"] if row["faster"])
    faster |= changes
    Path("baseline.json").write_text(json.dumps(saved))


BASELINE = ("--baseline", "baseline.json")


@pytest.mark.parametrize(("ratio", "code", "verdict"), [(1e4, 1, "regressed"), (1e-4, 0, "ok")])
def test_a_regression_against_the_baseline_is_exit_code_1(
    measured: Ran, monkeypatch: pytest.MonkeyPatch, ratio: float, code: int, verdict: str
) -> None:
    monkeypatch.setattr(CoreWait, "cores", lambda self: 0.0)  # whatever else runs here meanwhile
    # Its interval is narrow, and a busy machine cannot widen it.
    save_baseline(measured, value=ratio, interval={"low": 0.99 * ratio, "high": 1.01 * ratio})
    ran = bncli("profile", *TINY, *BASELINE, "--fail-above", "1.5", "--json", "--html", "gate.html")
    (change,) = json.loads(ran.out)["gate"]["changes"]
    assert (ran.code, change["verdict"]) == (code, verdict)
    assert f'<div class="headline {["good", "bad"][code]}">' in Path("gate.html").read_text()


def test_a_baseline_of_other_shapes_is_a_mistake_after_the_figures(measured: Ran) -> None:
    saved = json.dumps(json.loads(measured.out))
    Path("baseline.json").write_text(saved.replace("[8, 4, 5, 5]", "[3, 3]"))
    ran = bncli("profile", *TINY, *BASELINE)
    assert ran.code == 2
    assert "2 rows measured" in ran.out
    assert "no row is in both" in ran.err


@pytest.mark.parametrize(("strict", "code"), [((), 0), (("--strict",), 1)])
def test_what_the_gate_cannot_tell_is_exit_code_1_with_strict_alone(
    measured: Ran, strict: tuple[str, ...], code: int
) -> None:
    save_baseline(measured, interval={"low": 1e-3, "high": 1e3})
    ran = bncli("profile", *TINY, *BASELINE, *strict, "--json")
    gate = json.loads(ran.out)["gate"]
    assert [change["verdict"] for change in gate["changes"]] == ["cannot tell"]
    assert (ran.code, gate["regressed"], gate["failed"]) == (code, False, bool(strict))


def test_a_baseline_without_intervals_is_refused_at_once(measured: Ran) -> None:
    save_baseline(measured, interval={"low": None, "high": None})
    ran = bncli("profile", *TINY, *BASELINE)
    assert (ran.code, ran.out) == (2, "")
    assert "baseline.json: 1 of its 1 ratios to native come from too few rounds for an interval" in ran.err
    assert "measure it with 6 rounds or more" in ran.err


# --- how long, and how much -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["kernels", "step"])
def test_every_ratio_has_the_rounds_asked_for_whatever_the_time(view: str) -> None:
    shapes = ("--shape", "8x4x5x5", "--shape", "8x4x6x6", "--operation", "bn", "--warm")
    step = ("small.yaml", "--arm", "normed")
    asked = ("profile", *(shapes if view == "kernels" else step), "--device", "cpu", "--time", "0.001", "-q")
    for least, options in ((6, ()), (2, ("--min-rounds", "2"))):
        ran = bncli(*asked, *options, "--json")
        assert ran.code == 0
        rows = json.loads(ran.out)["rows"]
        samples = [row["samples_ms"] if view == "step" else row["both"]["samples_ms"] for row in rows]
        assert [row["error"] for row in rows] == [None] * len(rows)
        assert {len(each) for each in samples} == {least}
        intervals = [row["faster"]["interval"]["low"] for row in rows if row["faster"]]
        assert len(intervals) >= 2
        assert {low is None for low in intervals} == {least < 6}


def test_options_that_take_several_names_can_be_repeated() -> None:
    kernels = ("--kernel", "native", "--kernel", "mine:right,native", "--allow-code", "--operation", "bn")
    ran = bncli("profile", *TINY, *kernels, "--dtype", "fp32", "--dtype", "fp64", "--json")
    assert ran.code == 0
    rows = json.loads(ran.out)["rows"]
    assert [(row["case"]["operation"], row["case"]["dtype"], row["kernel"]) for row in rows] == [
        (operation, dtype, kernel)
        for operation in ("bn+relu", "bn")
        for dtype in ("fp32", "fp64")
        for kernel in ("native", "mine:right")
    ]


# --- a step -----------------------------------------------------------------------------------------------------------


def test_the_step_view_of_a_recipe_shows_every_arm_and_writes_a_trace() -> None:
    ran = bncli("profile", *STEP, "--arm", "normed", "--trace", "step.json", "--html", "step.html")
    assert ran.code == 0
    for word in ("normed", "training", "evaluation", "native", "fused", "Share of a step", "Memory of a training step"):
        assert word in ran.out
    assert "normed, fused: 1 batch norm (1 fused with relu)" in ran.out
    names = {event.get("name") for event in json.loads(Path("step.json").read_text())["traceEvents"]}
    assert {"hidden1.linear (Linear)", "hidden1.linear (Linear), backward"} <= names
    page = Path("step.html").read_text()
    for words in ("profile small.yaml --device cpu", "normed: a training step takes", "norm: {kind: batch,"):
        assert words in page

    ran = bncli("profile", *STEP, "--json")
    assert ran.code == 0
    Path("saved.json").write_text(ran.out)
    found = export.load(Path("saved.json"))
    assert isinstance(found, StepProfile)
    assert [(row.arm, row.mode, row.kernel) for row in found.rows] == [
        ("plain", "training", None), ("plain", "evaluation", None),
        ("normed", "training", "native"), ("normed", "training", "fused"),
        ("normed", "evaluation", "native"), ("normed", "evaluation", "fused"), ("normed", "evaluation", "folded"),
    ]  # fmt: skip
    ran = bncli("profile", *TINY, "--baseline", "saved.json")
    assert ran.code == 2
    assert "saved.json: it holds the profile of a step, and this is one of kernels" in ran.err


def test_a_model_of_the_users_own_is_measured_when_that_is_allowed() -> None:
    asked = ("profile", "--input", "4x3x8x8", *CPU, "--json", "--allow-code", "--model")
    ran = bncli(*asked, "mine:make")
    assert ran.code == 0
    assert [(row["kernel"], row["mode"], row["error"]) for row in json.loads(ran.out)["rows"]] == [
        *((kernel, mode, None) for mode in ("training", "evaluation") for kernel in ("native", "fused")),
        ("folded", "evaluation", None),
    ]
    broken, missing = bncli(*asked, "mine:broken"), bncli(*asked, "mine:maek")
    assert broken.code == 2
    assert "bncli: mine:broken raised RuntimeError: no weights here" in broken.err
    assert missing.code == 2
    assert "has no attribute 'maek'" in missing.err


def test_an_input_that_a_model_does_not_take_is_a_mistake_in_that_option() -> None:
    ran = bncli("profile", "--model", "mine:make", "--input", "4x5x8x8", *CPU, "--allow-code")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("bncli: --input 4x5x8x8: mine:make raised RuntimeError: ")
    assert len(ran.err.splitlines()) == 1


def test_an_error_that_several_rows_share_is_told_once() -> None:
    ran = bncli("profile", "--model", "mine:one_way", "--input", "4x3x8x8", *CPU, "--allow-code")
    assert ran.code == 1
    table = ran.out.partition("- mine:one_way")[0]
    assert table.count("no way back") == 1
    assert table.count("the same error") == 3


def test_a_wrong_model_of_any_arm_is_refused_before_the_first_is_measured() -> None:
    own = ("--set", "model={kind: module, module: 'mine:make'}", "--allow-code")
    ran = bncli("profile", "small.yaml", *CPU, *own)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("bncli: arms plain, normed: model.module: mine:make raised TypeError: ")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "natve"], "--kernel natve: there is no such kernel; did you mean native?"),
        (["--kernel", "mine:right"],
         "--kernel mine:right: it is your own code, which would be executed; allow it with --allow-code"),
        (["--kernel", ",", "--shape", "8x4"], "--kernel: name at least one"),
        (["small.yaml", "--kernel", "native,compiled"], "--kernel compiled: models can "
                                                        "only be trained with native and fused"),
        (["--shape", "8"], "--shape 8: expected the batch, the channels and up to three sides"),
        (["--shape", "1x3"], "--shape 1x3: training needs more than one value per channel, and it has one"),
        (["--shape", "8x4", "--batch", "3"], "--batch: a shape holds its own batch, its first number"),
        (["--batch", "0"], "--batch: 0 is not in the range"),
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
        (["--min-rounds", "0"], "--min-rounds: 0 is not in the range"),
        (["--min-rounds", "5", "--baseline", "other.json"],
         "--min-rounds 5 with --baseline: a verdict needs intervals"),
        (["--fail-above", "0.5"], "--fail-above 0.5: expected more than 1, as in 1.10 for a tenth slower"),
        (["--json", "--csv"], "--json, --csv, --markdown and --latex: choose one"),
        (["--csv", "--baseline", "other.json"],
         "--csv with --baseline: it has no place for the verdicts; use --json or --markdown"),
        (["--baseline", "other.json"], "--baseline other.json: is JSON, but not a profile"),
        (["--baseline", "small.yaml"], "--baseline small.yaml: is not JSON"),
        (["--baseline", "none.json"], "--baseline none.json: cannot be read"),
        (["--baseline", "other.json", "--kernel", "fused"], "--baseline: speedups over "
                                                            "native are compared; name native"),
        (["--no-caption"], "--no-caption: without --plot FILE nothing is drawn"),
        (["--plot", "x.eps"], "x.eps: a plot's file name must end in .svg, .png or .pdf"),
        (["--plot", "nowhere/x.svg"], "nowhere/x.svg: its folder nowhere does not exist"),
        (["small.yaml", "--trace", "nowhere/t.json"], "nowhere/t.json: its folder nowhere does not exist"),
        (["--trace", "t.json"], "--trace belongs to the step view: give a recipe"),
        (["small.yaml", "--warm", "--shape", "8x4"], "--shape, --warm belong to the kernel view: omit the recipe"),
        (["nothing.yaml"], "nothing.yaml: there is no such file"),
        (["resnet50"], "resnet50 is no recipe; for its shapes give --shapes resnet50"),
        (["bad.csv"], "bad.csv is no recipe; for its shapes give --shapes bad.csv"),
        (["8x4x5x5"], "8x4x5x5 is no recipe; for that shape give --shape 8x4x5x5"),
        (["small.yaml", "--arm", "norm"], "--arm norm: did you mean normed?"),
        (["small.yaml", "--set", "nrom=batch"], "--set nrom=batch: nrom: unknown key; did you mean norm"),
        (["small.yaml", "--input", "4x8"], "--input 4x8: it belongs to --model; a recipe's data have a shape"),
        (["small.yaml", "--model", "mine:make"], "small.yaml and --model mine:make: give one of them"),
        (["--model", "mine:make", "--arm", "a"], "--set and --arm change a recipe; with --model there is none"),
        (["--model", "mine:make"], "--model mine:make: give its input's shape too, as in --input 32x3x224x224"),
        (["--model", "mine:make", "--input", "4x3x8x8"],
         "--model mine:make: it is your own code, which would be executed; allow it with --allow-code"),
        (["--model", "mine", "--input", "2x3"], "--model mine: expected package.module:function"),
        (["--model", "mine:make", "--input", "2x", "--allow-code"], "--input 2x: expected the batch, the channels"),
        (["--device", "gpu"], "--device gpu: expected one of auto, cpu, cuda"),
        (["--threads", "0"], "--threads: 0 is not in the range"),
    ],
)  # fmt: skip
def test_mistakes_leave_with_2_a_message_and_no_traceback(arguments: list[str], message: str) -> None:
    ran = bncli("profile", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err


@pytest.mark.parametrize("arguments", [["--kernel", "nonsense"], ["small.yaml", "--kernel", "apex"]])
def test_an_impossible_kernel_is_refused_before_torch_is_loaded(arguments: list[str]) -> None:
    refuse = f"import sys; sys.argv = {['bncli', 'profile', *arguments]!r}; import bncli.cli; bncli.cli.main()"
    assert "torch" not in modules_after(refuse)


@pytest.mark.parametrize("view", [[], ["small.yaml"]])
def test_a_gpu_that_is_not_here_is_refused_at_once(view: list[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ran = bncli("profile", *view, "--device", "cuda")
    assert (ran.code, ran.out) == (3, "")
    assert "bncli: --device cuda: this torch" in ran.err
