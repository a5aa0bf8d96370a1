"""`bncli compare` as a user meets it: its table and files, what is done again after a change, failures, signals."""

from __future__ import annotations

import csv
import errno
import io
import json
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from bncli.errors import USAGE
from bncli.measure.compare import reuse
from bncli.report.files import from_json, to_json
from bncli.results.compare import BegunComparison
from tests.cli.conftest import RECIPE, InThisProcess, Ran, bncli, process
from tests.engine.train.test_stacked import SAME_BITS


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "runs", "--set", "train.steps=4"], "--set: nothing is trained with --from"),
        (["--from", "runs", "--dry-run", "-j", "3"], "--dry-run, --jobs: nothing is trained with --from"),
        (["--from", "runs", "--device", "nonsense", "--allow-code"], "--device, --allow-code: nothing is trained with"),
        (["--from", "runs", "--full-grid"], "--full-grid: nothing is trained with --from"),
        (["--from", "runs", "--threads", "1"], "--threads: nothing is trained with --from"),  # its default, but asked
        (["small.yaml", "--html", "nowhere/x.html"], "nowhere/x.html: its folder nowhere does not exist"),
        (["small.yaml", "--plot-width", "3.3", "--no-caption"], "--plot-width, --no-caption: without --plot FILE"),
        (["small.yaml", "--plot", "there.svg"], "there.svg: is a folder; give a file's name"),
        (["-", "-"], "- is standard input, which can be read only once"),
        (["small.yaml", "--set", "reference=norm"], "reference: there is no arm norm; did you mean normed?"),
        (["small.yaml", "--require-claims", "-n"], "--require-claims: there are no claims"),
        (
            ["--from", "nope"],
            "--from nope: cannot be read: No such file or directory; give the folder or the JSON file",
        ),
    ],
)
def test_what_could_not_be_obeyed_is_refused_before_any_work(arguments: list[str], message: str) -> None:
    Path("there.svg").mkdir()
    ran = bncli("compare", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert not Path("runs").exists()


def test_more_jobs_than_the_memory_holds_are_refused_with_the_figures(recipe: str) -> None:
    for dry in ((), ("--dry-run",)):
        ran = bncli("compare", recipe, "--jobs", "1000000", "--device", "cpu", *dry)
        assert (ran.code, ran.out) == (USAGE, "")
        figures = r"1000000 processes need about [\d,]+ of [\d,]+ MiB available \(data 1 MiB, each with torch 170 MiB, "
        assert re.search(rf"--jobs 1000000: {figures}its training 1 MiB\); free memory, or use \d+", ran.err)


def test_without_jobs_there_are_as_many_as_the_memory_holds_and_that_is_said(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bncli.measure.dry_run.available_mib", lambda: 190.0)
    monkeypatch.setattr("bncli.measure.compare.processes.cores", lambda: 3)
    ran = bncli("compare", recipe, "--device", "cpu", "--dry-run")
    assert ran.code == 0
    assert "--jobs 1 instead of one per core: 3 processes need about 511 of 190 MiB available (data 1 MiB" in ran.err
    assert "one process needs about 171 of 190 MiB available" in ran.words


def test_a_dry_run_shows_where_each_value_came_from_and_trains_nothing(recipe: str) -> None:
    ran = bncli("compare", recipe, "--dry-run", "--set", "train.seed=3")
    assert ran.code == 0
    rows = {line.split()[0]: line.split() for line in ran.out.splitlines() if line.strip()}
    assert rows["optimizer.lr"][1:] == ["0.5", "small.yaml:4"]
    assert rows["train.seed"][1:] == ["3", "--set", "train.seed=3"]
    assert rows["optimizer.momentum"][1:] == ["0.0", "default"]
    assert rows["normed"][-3:] == ["6", "+", "2"]
    steps = "16 runs, 960 optimizer steps at most, more where an arm keeps several points of the grid."
    assert f"{steps} Nothing was trained." in ran.words
    assert re.search(r"On a CPU .* about [\d,]+ of [\d,]+ MiB available", ran.words)
    assert not Path("runs").exists()


# --- the check before the first run -------------------------------------------------------------------------------

OWN = ("--set", "model={kind: module, module: 'mine:make'}", "--allow-code", "-j", "1")
TAKES_NORM = "from torch import nn\ndef make(norm='batch'):\n    return nn.Linear(8, 3)\n"


@pytest.mark.usefixtures("recipe")
@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_a_wrong_model_is_one_message_and_nothing_is_started(dry_run: tuple[str, ...]) -> None:
    Path("mine.py").write_text(TAKES_NORM)
    ran = bncli("compare", "small.yaml", *OWN, *dry_run)
    assert (ran.code, ran.out) == (2, "")
    _, message = ran.err.splitlines()  # after what it is doing
    assert message.startswith(
        "bncli: arms plain, normed: model.module: mine:make raised TypeError: make() got an unexpected keyword "
        "argument 'shape'. It is called with shape=(8,), classes=3, norm="
    )
    assert not Path("runs/small").exists()


def test_data_that_are_not_finite_are_one_message(recipe: str, request: pytest.FixtureRequest) -> None:
    np.savez("mine.npz", x=np.zeros((40, 8)), y=np.arange(40) % 3)
    np.savez("nan.npz", x=np.full((40, 8), np.nan), y=np.arange(40) % 3)
    npz = ("compare", recipe, "-j", "1", "-n", "--set")
    ran = bncli(*npz, "data={source: npz, path: nan.npz, held_out: 10}")
    assert (ran.code, ran.out) == (2, "")
    assert "data.path: nan.npz has values in x that are not finite in float32, in 40 of 40 examples" in ran.err
    request.getfixturevalue("runs_here")
    assert "Checked: the data were read" in bncli(*npz, "data={source: npz, path: mine.npz, held_out: 10}").words


@pytest.mark.usefixtures("made_up_runs")
def test_a_dry_run_counts_what_the_folder_holds(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bncli("compare", recipe).code == 0
    monkeypatch.setattr(InThisProcess, "ended", None)  # no run may be made, nor any check
    assert "16 runs, all of them done already: nothing would be trained." in bncli("compare", recipe, "-n").words
    assert bncli("compare", recipe).code == 0
    more = bncli("compare", recipe, "-n", "--set", "seeds.report=4")
    assert "20 runs, 16 of them done already; 4 to do, 240 optimizer steps at most. Nothing was trained." in more.words
    elsewhere = bncli("compare", recipe, "-n", "-o", "other")
    assert "16 runs, 960 optimizer steps at most" in elsewhere.words
    assert not Path("other").exists()


@pytest.mark.usefixtures("made_up_runs")
def test_several_recipes_have_a_folder_of_their_own(recipe: str) -> None:
    Path("large.yaml").write_text(RECIPE)
    assert bncli("compare", recipe).code == 0
    answer = Path("runs/small/comparison.json").read_bytes()
    assert bncli("compare", recipe, "large.yaml").code == 0
    assert Path("runs/small+large/comparison.json").exists()
    assert Path("runs/small/comparison.json").read_bytes() == answer


# --- a comparison by worker processes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, Path]:
    """A comparison by two worker processes, and the folder that it was made in."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "small.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "100")
        ran = bncli("compare", "small.yaml", "-j", "2", "--plot", "curves.svg", "--html", "report.html")
    return ran, folder


@pytest.fixture
def copied(compared: tuple[Ran, Path], folder: Path) -> Ran:
    """The same with a copy of its files in the current folder."""
    shutil.copytree(compared[1], folder, dirs_exist_ok=True)
    return compared[0]


def test_compare_answers_and_keeps_every_run(copied: Ran) -> None:
    assert copied.code == 0
    assert "16 runs" in copied.err
    for word in ("plain", "normed", "5/5", "reference", "tuning runs"):
        assert word in copied.out
    assert Path("curves.svg").read_text().startswith("<?xml")
    page = Path("report.html").read_text()
    assert "bncli compare small.yaml -j 2 --plot curves.svg --html report.html" in page
    for words in ("<table", "arms:\n  plain:", "optimizer.lr: [0.1, 0.5]", "seeds:\n  tune: [0, 1, 2]"):
        assert words in page
    runs = {file: file.stat().st_mtime_ns for file in Path("runs/small/runs").glob("*.json")}
    assert len(runs) == 18  # with one of each arm that measures what a step costs

    assert copied.err.splitlines()[-1].startswith(
        "Runs and result in runs/small. Next: bncli compare small.yaml -j 2 --plot curves.svg --html report.html --set "
    )

    again = bncli("compare", "small.yaml")  # all runs are found again
    assert "18 of them already done" in again.err
    assert (again.code, again.out) == (0, copied.out)
    assert {file: file.stat().st_mtime_ns for file in runs} == runs


def test_the_report_is_made_again_from_files(copied: Ran) -> None:
    for source in ("runs/small", "runs/small/comparison.json"):
        again = bncli("compare", "--from", source)
        assert again.out == copied.out
        trained = "/small.yaml --out runs/small" if Path(source).is_dir() else "the command that trained it, with"
        assert f"{trained} --set 'grid.optimizer.lr=[" in again.err
    rows = list(csv.DictReader(io.StringIO(bncli("compare", "--from", "runs/small", "--csv").out)))
    assert [row["arm"] for row in rows] == ["plain", "normed"]
    assert "| normed |" in bncli("compare", "--from", "runs/small", "--markdown").out
    assert "\nnormed & " in bncli("compare", "--from", "runs/small", "--latex").out
    column = ["--plot", "column.pdf", "--plot-width", "3.3", "--no-caption"]
    assert bncli("compare", "--from", "runs/small", *column).code == 0
    assert b"/MediaBox [ 0 0 237.6 " in Path("column.pdf").read_bytes()  # points
    saved = bncli("compare", "--from", "runs/small", "--json").out
    assert len(json.loads(saved)["runs"]) == 18
    plan = Path("runs/small/plan.json").read_text()
    Path("runs/small/plan.json").write_text(plan + " ")
    told = bncli("compare", "--from", "runs/small").err
    assert "runs/small: 1 of its files cannot be used: plan.json (was changed after bncli wrote it" in told
    Path("runs/small/plan.json").write_text(plan)
    Path("copy.json").write_text(saved)
    copy = bncli("compare", "--from", "copy.json")
    assert (copy.code, copy.out) == (0, copied.out)
    plan = Path("runs/small/plan.json")
    begun = from_json(BegunComparison, plan.read_text())
    later = {name: {**each, "model": {"kind": "later"}} for name, each in begun.plan.recipes.items()}
    plan.write_text(to_json(replace(begun, plan=replace(begun.plan, recipes=later))))
    unknown = bncli("compare", "--from", "runs/small")
    assert unknown.code == 2
    assert "--from runs/small/plan.json: its recipes are not as this bncli has them" in unknown.err


@pytest.mark.usefixtures("copied", "runs_here")
def test_a_full_disk_names_the_file_and_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = bncli("compare", "--from", "runs/small", "--html", "/dev/full")
    assert ran.code == 1
    assert ran.err.endswith(
        "bncli: /dev/full: cannot be written: No space left on device; the runs in runs/small are kept; free space, "
        "then: bncli compare --from runs/small\n"
    )

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    ran = bncli("compare", "small.yaml", "--set", "seeds.report=3")
    assert ran.code == 1
    assert ran.err.endswith(
        "bncli: runs/small/plan.json: cannot be written: No space left on device; the runs in runs/small are kept; "
        "free space, and the same command continues\n"
    )


@pytest.mark.usefixtures("made_up_runs")
@pytest.mark.parametrize(
    ("options", "then"),
    [
        (["--set", "grid={}"], "Next: bncli compare --from runs/small --html small.html"),
        (["--set", "grid={}", "--html", "a.html"], ""),
        (["--set", "grid.optimizer.lr=[0.5, 0.7]", "--html", "a.html"],
         "Next: bncli compare small.yaml --set 'grid.optimizer.lr=[0.5, 0.7]' --html a.html "
         "--set 'grid.optimizer.lr=[0.357, 0.5, 0.7]'"),
        (["--set", "grid={train.batch_size: [20, 30]}", "--html", "a.html"],
         "Next: add values to grid.train.batch_size beyond its edge, as far as the field allows"),
        (["--set", "arms={plain: {}, deadly: {norm: batch}}"],
         "Next: mend what failed, see Warnings; until then it will fail again"),
        (["--json"], None),
        (["--quiet"], None),
    ],
)  # fmt: skip
def test_compare_ends_with_where_the_results_are_and_the_next_command(
    recipe: str, options: list[str], then: str | None
) -> None:
    ran = bncli("compare", recipe, *options)
    if then is None:
        assert "runs/small" not in ran.err
    else:
        assert ran.err.splitlines()[-1].rstrip() == f"Runs and result in runs/small. {then}".rstrip()


@pytest.mark.usefixtures("copied", "runs_here")
def test_one_run_at_a_time_and_two_give_the_same_figures() -> None:
    found, losses = [], []
    for arguments in (("small.yaml", "-o", "one"), ("--from", "runs/small")):
        runs = json.loads(bncli("compare", *arguments, "--json").out)["runs"]
        found.append([(run["key"], run["arm"]) for run in runs])
        losses.append([each["loss"] for run in runs for each in run["result"]["evaluations"]])
    assert found[0] == found[1]
    np.testing.assert_allclose(*losses, rtol=0 if SAME_BITS else 1e-4)
    assert len(list(Path("one/runs").glob("*.json"))) == len(found[0]) == 18


# A model of the user's own that waits in the fourth run until there is a file called go.
WAITING = """
import pathlib, time
from torch import nn
made = 0
def make(shape, classes, norm):
    global made
    made += 1
    while made == 4 and not pathlib.Path("go").exists():
        time.sleep(0.02)
    return nn.Sequential(norm(shape[0]) if norm else nn.Identity(), nn.Linear(shape[0], classes))
"""
OWN_MODEL = ("--set", "model={kind: module, module: 'mine:make'}", "--set", "grid={}", "--allow-code", "-j", "1")


@pytest.fixture
def waiting(folder: Path, recipe: str) -> tuple[subprocess.Popen[str], tuple[str, ...]]:
    """A comparison of 8 runs, in a process of its own, that waits in its fourth run; and the command."""
    Path("mine.py").write_text(WAITING)
    command = ("compare", recipe, *OWN_MODEL, "--set", "seeds.report=4")
    started = process(*command)
    while len(list(Path("runs/small/runs").glob("*.json"))) < 3:
        assert started.poll() is None
        time.sleep(0.02)
    return started, command


@pytest.mark.usefixtures("runs_here")
def test_a_comparison_that_is_killed_goes_on_where_it_stopped(
    waiting: tuple[subprocess.Popen[str], tuple[str, ...]],
) -> None:
    started, command = waiting
    workers = psutil.Process(started.pid).children(recursive=True)
    started.kill()
    started.communicate()
    assert workers
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        time.sleep(0.02)  # they end by themselves, though a model of the user's is in the middle of something
    kept = {file: file.read_text() for file in Path("runs/small/runs").glob("*.json")}
    assert len(kept) == 3
    report = bncli("compare", "--from", "runs/small")
    assert report.code == 0
    assert "3 of 8 runs are done; the figures are based on those" in report.words
    assert "runs/small has no comparison.json: the report is made from its plan and runs" in report.err
    Path("go").touch()
    ended = bncli(*command)
    assert ended.code == 0
    assert "3 of them already done" in ended.err
    assert "4/4" in ended.out
    assert {file: file.read_text() for file in kept} == kept


# A model of the user's own each of whose training steps takes 10 ms at least, as long as there is a file called slow.
SLOW = """
import pathlib, time
from torch import nn
class Slow(nn.Sequential):
    def forward(self, x):
        if self.training and pathlib.Path("slow").exists():
            time.sleep(0.01)
        return super().forward(x)
def make(shape, classes, norm):
    return Slow(nn.Linear(shape[0], 8), norm(8) if norm else nn.ReLU(), nn.Linear(8, classes))
"""


def test_runs_of_a_comparison_that_is_stopped_or_killed_go_on_from_their_checkpoints(
    recipe: str, request: pytest.FixtureRequest
) -> None:
    Path("mine.py").write_text(SLOW)
    Path("slow").touch()
    alone = ("compare", recipe, *OWN_MODEL, "--set", "seeds.report=1", "--set", "train.stop_at_target=false")
    alone += ("--set", "train.steps=200", "--set", "train.evaluate_every=20", "--set")
    command = (*alone, "train.checkpoint={every: 20}")
    saved = Path("runs/small/checkpoints")

    def stopped_by(number: int) -> tuple[int, str]:
        """After a run has gone on from where it was, and saved its state."""
        before = {file: file.stat().st_mtime_ns for file in saved.glob("*.pt")}
        started = process(*command)
        while all(file.stat().st_mtime_ns == before.get(file) for file in saved.glob("*.pt")):
            assert started.poll() is None
            time.sleep(0.005)
        started.send_signal(number)
        return started.wait(), started.communicate()[1]

    code, err = stopped_by(signal.SIGINT)
    assert code == 130
    assert err.splitlines()[-1] == "Stopped before any run ended; the same command continues from their checkpoints"
    assert stopped_by(signal.SIGKILL)[0] == -signal.SIGKILL
    assert not list(Path("runs/small/runs").glob("*.json"))
    Path("slow").unlink()
    ended = bncli(*command, "--json")
    assert ended.code == 0
    assert not list(saved.iterdir())
    request.getfixturevalue("runs_here")
    at_once = bncli(*alone, "train.checkpoint={every: 200}", "-o", "at once", "--json")
    found = [json.loads(ran.out)["runs"] for ran in (ended, at_once)]
    for runs in found:
        assert [(run["key"], run["result"]["steps_run"]) for run in runs] == [(run["key"], 200) for run in found[0]]
    assert [run["result"]["evaluations"] for run in found[0]] == [run["result"]["evaluations"] for run in found[1]]


def test_a_folder_that_vanishes_ends_the_comparison_with_a_sentence(
    waiting: tuple[subprocess.Popen[str], tuple[str, ...]],
) -> None:
    started, _ = waiting
    Path("runs").rename("moved")
    Path("go").touch()
    _, err = started.communicate(timeout=600)
    assert started.returncode == 2
    assert err.splitlines()[-1] == "bncli: --out runs/small: was removed or renamed meanwhile"
    assert len(list(Path("moved/small/runs").glob("*.json"))) == 3


def test_ctrl_c_in_a_comparison_says_how_to_go_on(waiting: tuple[subprocess.Popen[str], tuple[str, ...]]) -> None:
    started, _ = waiting
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=600)
    assert started.returncode == 130
    assert "3 of 8 runs are kept in runs/small; the same command continues from there" in err
    assert "3 of 8 runs are done" in out


@pytest.mark.usefixtures("folder")
def test_ctrl_c_before_any_run_has_ended_is_one_line(recipe: str) -> None:
    Path("mine.py").write_text(
        "import pathlib, time\nfrom torch import nn\n"
        "def make(shape, classes, norm):\n"
        "    if pathlib.Path('runs/small/plan.json').exists():\n"  # after the checks
        "        pathlib.Path('begun').touch()\n"
        "        time.sleep(600)\n"
        "    return nn.Sequential(*([norm(shape[0])] if norm else []), nn.Linear(shape[0], classes))\n"
    )
    started = process("compare", recipe, *OWN_MODEL)
    while not Path("begun").exists():
        assert started.poll() is None
        time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=600)
    assert (started.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "Stopped before any run ended; the same command begins again"


@pytest.mark.usefixtures("runs_here")
def test_a_change_in_a_package_that_an_own_model_imports_is_seen(recipe: str) -> None:
    Path("mine/parts").mkdir(parents=True)
    Path("mine/__init__.py").touch()
    Path("mine/models.py").write_text(
        "from torch import nn\nfrom mine.parts.block import WIDTH\n"
        "def make(shape, classes, norm):\n"
        "    made = norm(WIDTH) if norm else nn.ReLU()\n"
        "    return nn.Sequential(nn.Linear(shape[0], WIDTH), made, nn.Linear(WIDTH, classes))\n"
    )

    def parameters(width: int) -> tuple[int, str]:
        Path("mine/parts/block.py").write_text(f"WIDTH = {width}\n")
        ran = bncli("compare", recipe, *OWN_MODEL, "--set", "model.module=mine.models:make", "--json")
        assert ran.code == 0
        return json.loads(ran.out)["arms"][0]["parameters"], ran.err

    assert parameters(8)[0] == 8 * 8 + 8 + 8 * 3 + 3
    found, err = parameters(20)
    assert found == 8 * 20 + 20 + 20 * 3 + 3
    # Both arms' runs are of one recipe but for the norm.
    assert "4 earlier runs are not reused: the model's code has changed (4)" in err
    found, err = parameters(8)
    assert found == 99
    assert "4 of them already done" in err


def test_runs_by_code_changed_meanwhile_are_left_out_and_done_again(
    recipe: str, request: pytest.FixtureRequest
) -> None:
    Path("width.py").write_text("WIDTH = 8\n")
    Path("mine.py").write_text(
        "import os, pathlib\nfrom torch import nn\nfrom width import WIDTH\n"
        "def make(shape, classes, norm):\n"
        "    begun = pathlib.Path('begun')\n"
        "    begun.write_text(begun.read_text() + '.' if begun.exists() else '.')\n"
        "    if begun.read_text() == '....':\n"  # in the second run, after the checks of both arms
        "        pathlib.Path('width.py').write_text('WIDTH = 20')\n"
        "        os.kill(os.getpid(), 9)\n"
        "    norm and norm(WIDTH)\n"
        "    return nn.Sequential(nn.Linear(shape[0], WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))\n"
    )
    ran = bncli("compare", recipe, *OWN_MODEL, "--json")
    assert ran.code == 1
    found = json.loads(ran.out)
    assert {run["result"]["parameters"] for run in found["runs"] if run["result"]} == {8 * 20 + 20 + 20 * 3 + 3}
    assert ["SIGKILL" in run["failure"] for run in found["runs"] if run["failure"]] == [True]
    assert {"kind": "unfinished", "arm": None, "facts": {"done": 2, "planned": 4, "failed": 1}} in found["notes"]
    assert found["remarks"] == [{"kind": "earlier code", "arm": None, "facts": {"runs": 1}}]
    assert found["notes"][-1] == found["remarks"][0]
    request.getfixturevalue("runs_here")  # a process of their own was needed for the death of one
    ran = bncli("compare", recipe, *OWN_MODEL, "--json")
    assert ran.code == 0
    assert "2 of them already done" in ran.err
    assert [arm["runs"] for arm in json.loads(ran.out)["arms"]] == [2, 2]


# --- the folder ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_comparisons_at_the_same_time_share_the_runs_of_a_folder(
    waiting: tuple[subprocess.Popen[str], tuple[str, ...]],
) -> None:
    started, command = waiting
    second, third = process(*command, "--json"), process(*command)
    while len(list(Path("runs/small/calls").iterdir())) < 3 or len(list(Path("runs/small/runs").glob("*.json"))) < 6:
        assert second.poll() is third.poll() is None
        time.sleep(0.02)
    third.send_signal(signal.SIGINT)
    assert third.wait(600) == 130
    assert "the same command continues from there" in third.communicate()[1]
    Path("go").touch()
    (out, err), _ = second.communicate(timeout=600), started.communicate(timeout=600)
    assert (started.returncode, second.returncode) == (0, 0), err
    found = json.loads(out)
    assert len(found["runs"]) == len(list(Path("runs/small/runs").iterdir())) == 8
    assert json.loads(Path("runs/small/comparison.json").read_text()) == found
    assert not list(Path("runs/small/calls").iterdir())


@pytest.mark.usefixtures("made_up_runs")
def test_shares_of_a_comparison_are_gathered_in_one_folder(recipe: str) -> None:
    whole = json.loads(bncli("compare", recipe, "-o", "whole", "--json").out)
    for share in ("1/2", "2/2"):
        ran = bncli("compare", recipe, "--shard", share, "-o", share.replace("/", "of"))
        assert (ran.code, ran.out) == (0, "")
        assert re.search(rf"Share {share} is done: \d+ of \d+ runs are in ", ran.err)
    for file in Path("2of2/runs").iterdir():
        file.rename(Path("1of2/runs") / file.name)
    ran = bncli("compare", recipe, "-o", "1of2", "--json")
    assert ran.code == 0
    assert "of them already done" in ran.err
    assert [arm["steps"] for arm in json.loads(ran.out)["arms"]] == [arm["steps"] for arm in whole["arms"]]
    ran = bncli("compare", recipe, "--shard", "1/2", "-o", "1of2")
    assert "plain" in ran.out  # all is done, so that there is a report


@pytest.mark.parametrize("share", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2"])
def test_a_share_that_is_none_is_refused(recipe: str, share: str) -> None:
    ran = bncli("compare", recipe, "--shard", share)
    assert ran.code == 2
    assert f"--shard {share}: write I/N" in ran.err


@pytest.mark.usefixtures("made_up_runs")
def test_an_earlier_answer_is_kept_and_another_comparison_is_refused(recipe: str) -> None:
    assert bncli("compare", recipe).code == 0
    first = Path("runs/small/comparison.json").read_text()
    second = bncli("compare", recipe, "--set", "seeds.report=3")
    assert second.code == 0
    assert "20 runs, 18 of them already done" in second.err
    words = "the folder's earlier result, of another plan, is kept as comparison-1.json"
    assert f"runs/small: {words}" in second.err
    assert words in second.words
    assert Path("runs/small/comparison-1.json").read_text() == first
    assert bncli("compare", "--from", "runs/small").out == second.out

    # Another recipe for every run, from the same file.
    third = bncli("compare", recipe, "--set", "train.steps=50", "--set", "seeds.report=1")
    assert third.code == 0
    assert "kept as comparison-2.json" in third.err

    Path("other").mkdir()
    Path("other/small.yaml").write_text(RECIPE.replace("noise: 0.5", "noise: 0.6"))
    before = {file: file.read_bytes() for file in Path("runs/small").rglob("*.json")}
    refused = bncli("compare", "other/small.yaml")
    assert refused.code == 2
    assert (
        f"runs/small: contains 36 runs of another comparison of {Path(recipe).resolve()}, none of which" in refused.err
    )
    assert "choose another folder with --out" in refused.err
    assert {file: file.read_bytes() for file in Path("runs/small").rglob("*.json")} == before
    Path("other/small.yaml").write_text(RECIPE.replace("seeds: {tune: 3, report: 2}", "seeds: {tune: 3, report: 1}"))
    assert bncli("compare", "other/small.yaml").code == 0  # the same recipe under another name


# --- what is done again, and what failed --------------------------------------------------------------------------


@pytest.mark.usefixtures("made_up_runs")
def test_a_change_of_bnclis_own_code_makes_new_runs_and_is_reported(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bncli("compare", recipe).code == 0
    monkeypatch.setattr(reuse, "sources_digest", lambda package: "other sources")
    ran = bncli("compare", recipe)
    assert ran.code == 0
    # Those of the tuning at first, then all.
    assert "12 earlier runs are not reused: bncli's own code has changed since (12)" in ran.err
    assert "18 earlier runs are not reused: bncli's own code has changed since (18)" in ran.words
    assert len(list(Path("runs/small/runs").glob("*.json"))) == 36
    ran = bncli("compare", recipe)
    assert ran.code == 0
    assert "18 of them already done" in ran.err
    assert "not reused" not in ran.out + ran.err


@pytest.mark.usefixtures("made_up_runs")
def test_runs_with_other_threads_give_their_steps_and_not_their_cost(recipe: str) -> None:
    assert bncli("compare", recipe).code == 0
    ran = bncli("compare", recipe, "--threads", "2", "--set", "seeds.report=3", "--json")
    assert ran.code == 0
    assert "20 runs, 18 of them already done" in ran.err
    found = json.loads(ran.out)
    assert [arm["runs"] for arm in found["arms"]] == [6, 6]
    assert {run["seed"]: run["result"]["ms_per_step"] for run in found["runs"]} == {**dict.fromkeys(range(5), 1), 5: 2}
    assert [arm["ms_per_step"] for arm in found["arms"]] == [2, 2]
    facts = {"runs": 18, "of": 20, "had": [1], "asked": 2}
    assert found["notes"][-1] == {"kind": "other threads", "arm": None, "facts": facts}


@pytest.mark.usefixtures("made_up_runs")
def test_a_failed_run_is_reported_the_others_go_on_and_the_exit_code_is_1(recipe: str) -> None:
    ran = bncli("compare", recipe, "--set", "arms={plain: {}, deadly: {norm: batch}}", "--set", "grid={}")
    assert ran.code == 1
    assert "3 of 6 runs are done, 3 failed" in ran.words
    assert "SIGKILL" in ran.out
    assert "2/2" in ran.out
    assert len(list(Path("runs/small/failed").glob("*.json"))) == 3
    assert "failed" in ran.err


@pytest.mark.usefixtures("made_up_runs")
def test_a_missed_target_is_an_error_only_when_it_is_required(recipe: str) -> None:
    missed = ("compare", recipe, "--set", "seeds.report=1", "--set", "arms={plain: {}, late: {norm: batch}}")
    assert bncli(*missed).code == 0
    assert bncli(*missed, "--require-target").code == 1


@pytest.mark.usefixtures("made_up_runs")
@pytest.mark.parametrize(("side", "code"), [("at_least", 0), ("at_most", 1)])
def test_a_claim_that_is_not_shown_is_an_error_only_when_it_is_required(recipe: str, side: str, code: int) -> None:
    claim = f"{{say: as many steps, measure: steps_to_target, arm: normed, over: plain, {side}: 0.5}}"
    arms = ("--set", "arms={plain: {}, normed: {norm: batch}}", "--set", "grid={}", "--set", f"claims=[{claim}]")
    ran = bncli("compare", recipe, *arms, "--require-claims")
    assert (ran.code, "as many steps" in ran.out) == (code, True)
    assert bncli("compare", recipe, *arms).code == 0
    assert bncli("compare", "--from", "runs/small", "--require-claims").code == code


@pytest.mark.usefixtures("made_up_runs")
def test_required_claims_of_an_unfinished_comparison_are_an_error(recipe: str) -> None:
    claim = "{say: as many steps, measure: steps_to_target, arm: normed, over: plain, at_least: 0.5}"
    arms = ("--set", "arms={plain: {}, normed: {norm: batch}}", "--set", "grid={}", "--set", f"claims=[{claim}]")
    assert bncli("compare", recipe, *arms, "--require-claims").code == 0
    answer = json.loads(Path("runs/small/comparison.json").read_text())
    for planned, code in ((answer["planned_runs"], 0), (answer["planned_runs"] + 1, 1)):
        Path("saved.json").write_text(json.dumps({**answer, "planned_runs": planned}))
        assert bncli("compare", "--from", "saved.json", "--require-claims").code == code


def test_required_claims_that_no_recipe_has_are_refused(copied: Ran) -> None:
    for arguments in (["small.yaml", "-o", "other"], ["--from", "runs/small"]):
        ran = bncli("compare", *arguments, "--require-claims")
        assert (ran.code, ran.out) == (2, "")
        assert "there are no claims; write them into the recipe under claims" in ran.err
    assert not Path("other").exists()
