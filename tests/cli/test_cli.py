"""The door as a user meets it: what is printed where, exit codes, folders, and what happens when things go wrong."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bncli.cli import main
from bncli.errors import BncliError
from bncli.kernels import fused
from bncli.measure.compare import reuse
from bncli.names import RECIPE_KERNELS
from bncli.recipe.load import load
from bncli.report.files import from_json
from bncli.results.compare import Comparison
from bncli.results.train import RunResult
from tests.conftest import OWN
from tests.test_architecture import modules_after

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


# --- train --------------------------------------------------------------------------------------------------------


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


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "smal.yaml"], 2, "bncli: smal.yaml: there is no such file; did you mean small.yaml?"),
        (
            ["train", "small.yaml", "--set", "norm=no"],
            2,
            '--set norm=no: norm.kind: expected none, batch, layer, group or instance, found "no"; did you mean none?',
        ),
        (["train", "small.yaml", "--set", "optimizer.lt=1"], 2, "optimizer.lt: unknown key; did you mean lr?"),
        (["train", "small.yaml", "--device", "gpu"], 2, "--device gpu: expected one of auto, cpu, cuda, cuda:N, mps"),
        (["train", "small.yaml", "--set", "data={source: npz, path: a.npz, held_out: 3}"], 2, "a.npz"),
        (["train", "small.yaml", "--set", "model={kind: module, module: mine:make}"], 2, "allow it with --allow-code"),
        (["compare"], 2, "bncli: give a recipe, as in: bncli compare recipes/digits.yaml"),
        (["compare", "small.yaml", "--json", "--csv"], 2, "--json, --csv and --markdown: choose one"),
        (["compare", "small.yaml", "--plot", "curve.pdf"], 2, "curve.pdf: a plot is written as .svg or .png"),
        (["compare", "small.yaml", "--device", "cuda:9"], 3, "--device cuda:9"),
        (["compare", "small.yaml", "--set", "train.target=null"], 2, "train.target is missing"),
        (["compare", "--from", "nothing.json"], 2, "--from nothing.json: nothing.json cannot be read"),
        (["compare", "--from", "small.yaml"], 2, "--from small.yaml: "),
    ],
)
def test_mistakes_leave_with_their_code_a_message_and_no_traceback(
    recipe: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    if "cuda" in str(arguments) and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert bncli(monkeypatch, *arguments) == code
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "runs", "--set", "train.steps=4"], "--set: nothing is trained with --from"),
        (["--from", "runs", "--dry-run", "-j", "3"], "--dry-run, --jobs: nothing is trained with --from"),
        (["--from", "runs", "--device", "nonsense", "--allow-code"], "--device, --allow-code: nothing is trained with"),
        (["--from", "runs", "--threads", "1"], "--threads: nothing is trained with --from"),  # its default, but asked
        (["small.yaml", "--html", "nowhere/x.html"], "nowhere/x.html: its folder nowhere does not exist"),
        (["small.yaml", "--plot", "there.svg"], "there.svg: is a folder; give a file's name"),
        (["-", "-"], "- is standard input, which can be read only once"),
        (["small.yaml", "--set", "reference=norm"], "reference: there is no arm norm; did you mean normed?"),
    ],
)
def test_what_could_not_be_obeyed_is_refused_before_any_work(
    recipe: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    Path("there.svg").mkdir()
    assert bncli(monkeypatch, "compare", *arguments) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""
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


def test_several_mistakes_are_counted_and_listed(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bncli(monkeypatch, "train", recipe, "--set", "train.steps=0", "--set", "nrom=batch") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "bncli: 2 mistakes"
    assert len(lines) == 3


# --- dry run ------------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_where_each_value_came_from_and_trains_nothing(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bncli(monkeypatch, "compare", recipe, "--dry-run", "--set", "train.seed=3") == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["optimizer.lr"][1:] == ["0.5", "small.yaml:4"]
    assert rows["train.seed"][1:] == ["3", "--set", "train.seed=3"]
    assert rows["optimizer.momentum"][1:] == ["0.0", "default"]
    assert rows["normed"][-3:] == ["6", "+", "2"]
    steps = "16 runs, 960 optimizer steps at most, more where an arm keeps several points of the grid."
    assert f"{steps} Nothing was trained." in " ".join(out.split())
    assert re.search(r"available on this machine \(CPU\): [\d,]+\.\d MiB", " ".join(out.split()))
    assert not Path("runs").exists()


def test_a_dry_run_of_train_gives_the_parameters_that_the_run_has(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bncli(monkeypatch, "train", recipe, "--arm", "normed", "--dry-run", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert bncli(monkeypatch, "train", recipe, "--arm", "normed", "--json", "-q") == 0
    assert planned["arms"][0]["parameters"] == json.loads(capsys.readouterr().out)["parameters"]
    assert 0 < planned["arms"][0]["memory_mib"] < planned["available_memory_mib"]


# --- compare ------------------------------------------------------------------------------------------------------


def test_compare_answers_keeps_every_run_and_makes_the_report_again_from_files(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bncli(monkeypatch, "compare", recipe, "-j", "2", "--plot", "curves.svg", "--html", "report.html") == 0
    table, err = capsys.readouterr()
    assert "16 runs" in err
    for word in ("plain", "normed", "times", "5/5", "reference", "tuning runs"):
        assert word in table
    assert Path("curves.svg").read_text().startswith("<?xml")
    assert "<table" in Path("report.html").read_text()
    runs = {file: file.stat().st_mtime_ns for file in Path("runs/small/runs").glob("*.json")}
    assert len(runs) == 16

    assert bncli(monkeypatch, "compare", recipe) == 0  # all runs are found again
    again, err = capsys.readouterr()
    assert "16 of them done already" in err
    assert again == table
    assert {file: file.stat().st_mtime_ns for file in runs} == runs

    for source in ("runs/small", "runs/small/comparison.json"):
        assert bncli(monkeypatch, "compare", "--from", source) == 0
        assert capsys.readouterr().out == table

    assert bncli(monkeypatch, "compare", "--from", "runs/small", "--csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["arm"] for row in rows] == ["plain", "normed"]
    assert bncli(monkeypatch, "compare", "--from", "runs/small", "--markdown") == 0
    assert "| normed |" in capsys.readouterr().out
    assert bncli(monkeypatch, "compare", "--from", "runs/small", "--json") == 0
    out = capsys.readouterr().out
    assert len(json.loads(out)["runs"]) == 16
    Path("copy.json").write_text(out)
    assert bncli(monkeypatch, "compare", "--from", "copy.json") == 0
    assert capsys.readouterr().out == table


def test_one_job_and_two_give_the_same_figures(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for jobs in ("1", "2"):
        assert bncli(monkeypatch, "compare", recipe, "-j", jobs, "-o", f"jobs{jobs}", "--json", "-q") == 0
        comparison = json.loads(capsys.readouterr().out)
        found.append([(run["key"], run["arm"], run["result"]["evaluations"]) for run in comparison["runs"]])
    assert found[0] == found[1]


def test_a_comparison_that_is_killed_goes_on_where_it_stopped(recipe: str, tmp_path: Path) -> None:
    command = ("compare", recipe, "-j", "1", "--set", "seeds.report=9", "--set", "train.steps=600",
               "--set", "train.stop_at_target=false")  # fmt: skip
    first = process(*command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    folder = tmp_path / "runs/small/runs"
    while not (folder.exists() and len(list(folder.glob("*.json"))) >= 3):
        assert first.poll() is None
        time.sleep(0.02)
    first.kill()
    first.wait()
    kept = {file.name: file.read_text() for file in folder.glob("*.json")}
    assert 3 <= len(kept) < 30
    report = process("compare", "--from", "runs/small", stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    out, err = report.communicate()
    assert report.returncode == 0
    assert f"{len(kept)} of 30 runs are done; the figures rest on those" in " ".join(out.split())
    assert "runs/small has no comparison.json: the report is made from its plan and runs" in err
    second = process(*command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    out, err = second.communicate()
    assert second.returncode == 0
    assert f"{len(kept)} of them done already" in err
    assert "12/12" in out
    assert {name: (folder / name).read_text() for name in kept} == kept


def test_two_comparisons_do_not_write_into_one_folder(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bncli.report.folder import ComparisonFolder

    with ComparisonFolder(Path("runs/small")):
        assert bncli(monkeypatch, "compare", recipe) == 1
    assert "runs/small: another comparison is writing here" in capsys.readouterr().err


def test_the_answer_is_written_while_no_other_process_may_write(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bncli.report.folder import ComparisonFolder

    finish, refused = ComparisonFolder.finish, []

    def finish_beside_another(folder: ComparisonFolder, comparison: Comparison) -> None:
        with pytest.raises(BncliError, match="another comparison is writing here") as error:
            ComparisonFolder(folder.path).__enter__()
        refused.append(error)
        finish(folder, comparison)

    monkeypatch.setattr(ComparisonFolder, "finish", finish_beside_another)
    assert bncli(monkeypatch, "compare", recipe) == 0
    assert len(refused) == 1


def test_an_answer_to_another_plan_is_kept_and_another_comparisons_folder_is_refused(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bncli(monkeypatch, "compare", recipe) == 0
    first = Path("runs/small/comparison.json").read_text()
    capsys.readouterr()
    assert bncli(monkeypatch, "compare", recipe, "--set", "seeds.report=3") == 0
    out, err = capsys.readouterr()
    assert "18 runs, 16 of them done already" in err
    assert "runs/small: the folder's earlier answer, to another plan, is kept as comparison-1.json" in err
    assert "the folder's earlier answer, to another plan, is kept as comparison-1.json" in " ".join(out.split())
    assert Path("runs/small/comparison-1.json").read_text() == first
    assert bncli(monkeypatch, "compare", "--from", "runs/small") == 0
    assert capsys.readouterr().out == out

    steps = ("--set", "train.steps=50", "--set", "seeds.report=1")  # another recipe for every run, from the same file
    assert bncli(monkeypatch, "compare", recipe, *steps) == 0
    assert "kept as comparison-2.json" in capsys.readouterr().err

    Path("other").mkdir()
    Path("other/small.yaml").write_text(RECIPE.replace("noise: 0.5", "noise: 0.6"))
    before = {file: file.read_bytes() for file in Path("runs/small").rglob("*.json")}
    assert bncli(monkeypatch, "compare", "other/small.yaml") == 2
    out, err = capsys.readouterr()
    assert f"runs/small: holds 32 runs of another comparison of {Path(recipe).resolve()}, none of which fits" in err
    assert "choose another folder with --out" in err
    assert {file: file.read_bytes() for file in Path("runs/small").rglob("*.json")} == before
    Path("other/small.yaml").write_text(RECIPE.replace("seeds: {tune: 3, report: 2}", "seeds: {tune: 3, report: 1}"))
    assert bncli(monkeypatch, "compare", "other/small.yaml") == 0  # the same recipe under another name


def test_a_change_in_a_package_that_an_own_model_imports_is_seen_and_the_runs_of_before_are_kept(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine/parts").mkdir(parents=True)
    Path("mine/models.py").write_text(
        "from torch import nn\nfrom mine.parts.block import WIDTH\n"
        "def make(shape, classes, norm):\n"
        "    return nn.Sequential(nn.Linear(shape[0], WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))\n"
    )
    asked = ("compare", recipe, "--set", "model={kind: module, module: 'mine.models:make'}", "--set", "grid={}",
             "--allow-code", "--json")  # fmt: skip

    def parameters(width: int) -> tuple[int, str]:
        Path("mine/parts/block.py").write_text(f"WIDTH = {width}\n")
        assert bncli(monkeypatch, *asked) == 0
        out, err = capsys.readouterr()
        return json.loads(out)["arms"][0]["parameters"], err

    assert parameters(8)[0] == 8 * 8 + 8 + 8 * 3 + 3
    changed = parameters(20)
    assert changed[0] == 8 * 20 + 20 + 20 * 3 + 3
    # Both arms' runs are of one recipe but for the norm.
    assert "4 earlier runs are not reused: the model's code has changed (4)" in changed[1]
    back = parameters(8)
    assert back[0] == 99
    assert "4 of them done already" in back[1]


def test_runs_by_code_that_was_changed_while_others_ran_are_left_out_and_done_again(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("width.py").write_text("WIDTH = 8\n")
    Path("mine.py").write_text(
        "import os, pathlib\nfrom torch import nn\nfrom width import WIDTH\n"
        "def make(shape, classes, norm):\n"
        "    begun = pathlib.Path('begun')\n"
        "    begun.write_text(begun.read_text() + '.' if begun.exists() else '.')\n"
        "    if begun.read_text() == '..':\n"  # in the second run
        "        pathlib.Path('width.py').write_text('WIDTH = 20')\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return nn.Sequential(nn.Linear(shape[0], WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))\n"
    )
    asked = ("compare", recipe, "--set", "model={kind: module, module: 'mine:make'}", "--set", "grid={}", "-j", "1",
             "--allow-code", "--json")  # fmt: skip
    assert bncli(monkeypatch, *asked) == 1
    found = json.loads(capsys.readouterr().out)
    assert {run["result"]["parameters"] for run in found["runs"] if run["result"]} == {8 * 20 + 20 + 20 * 3 + 3}
    assert {"kind": "unfinished", "arm": None, "facts": {"done": 2, "planned": 4, "failed": 1}} in found["notes"]
    assert found["remarks"] == [{"kind": "earlier code", "arm": None, "facts": {"runs": 1}}]
    assert found["notes"][-1] == found["remarks"][0]
    assert bncli(monkeypatch, *asked) == 0
    out, err = capsys.readouterr()
    assert "2 of them done already" in err
    assert [arm["runs"] for arm in json.loads(out)["arms"]] == [2, 2]


def test_a_change_of_bnclis_own_code_makes_new_runs_and_is_said(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bncli(monkeypatch, "compare", recipe) == 0
    monkeypatch.setattr(reuse, "sources_digest", lambda package: "other sources")
    capsys.readouterr()
    assert bncli(monkeypatch, "compare", recipe) == 0
    out, err = capsys.readouterr()
    assert "12 earlier runs are not reused: bncli's own code has changed since (12)" in err  # those of the tuning
    assert "16 earlier runs are not reused: bncli's own code has changed since (16)" in " ".join(out.split())
    assert len(list(Path("runs/small/runs").glob("*.json"))) == 32
    assert bncli(monkeypatch, "compare", recipe) == 0
    out, err = capsys.readouterr()
    assert "16 of them done already" in err
    assert "not reused" not in out + err


def test_runs_with_other_threads_give_their_steps_and_not_their_cost(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bncli(monkeypatch, "compare", recipe) == 0
    capsys.readouterr()
    assert bncli(monkeypatch, "compare", recipe, "--threads", "2", "--set", "seeds.report=3", "--json") == 0
    out, err = capsys.readouterr()
    assert "18 runs, 16 of them done already" in err
    found = json.loads(out)
    assert [arm["runs"] for arm in found["arms"]] == [6, 6]
    cost = {run["arm"]: run["result"]["ms_per_step"] for run in found["runs"] if run["seed"] == 5}
    assert {arm["arm"]: arm["ms_per_step"] for arm in found["arms"]} == cost
    facts = {"runs": 16, "of": 18, "had": [1], "asked": 2}
    assert found["notes"][-1] == {"kind": "other threads", "arm": None, "facts": facts}


def test_a_failed_run_is_reported_the_others_go_on_and_the_exit_code_is_1(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text(
        "import os\nfrom torch import nn\n"
        "def make(shape, classes, norm):\n    return Dies(shape[0], classes)\n"
        "class Dies(nn.Linear):\n    def forward(self, x):\n        os.kill(os.getpid(), 9)\n"
    )
    arms = "arms={plain: {}, deadly: {model: {kind: module, module: 'mine:make'}}}"
    assert bncli(monkeypatch, "compare", recipe, "--set", arms, "--set", "grid={}", "--allow-code") == 1
    out, err = capsys.readouterr()
    assert "2 of 4 runs are done, 2 failed" in " ".join(out.split())
    assert "SIGKILL" in out
    assert "2/2" in out
    assert len(list(Path("runs/small/failed").glob("*.json"))) == 2
    assert "failed" in err


# --- signals and terminals ----------------------------------------------------------------------------------------

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


def test_ctrl_c_in_a_comparison_says_how_to_go_on(recipe: str, tmp_path: Path) -> None:
    started = process("compare", recipe, "-j", "1", "--set", "train.steps=4000", "--set", "train.stop_at_target=false",
                      stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    folder = tmp_path / "runs/small/runs"
    while not (folder.exists() and list(folder.glob("*.json"))):
        assert started.poll() is None
        time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=30)
    assert started.returncode == 130
    assert "of 16 runs are kept in runs/small; the same command goes on from there" in err
    assert "of 16 runs are done" in out


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


# --- gradcheck ----------------------------------------------------------------------------------------------------


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
