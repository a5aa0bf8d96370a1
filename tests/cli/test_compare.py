"""`bncli compare` as a user meets it: its table and files, what is done again after a change, failures, signals."""

from __future__ import annotations

import csv
import io
import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from bncli.errors import BncliError
from bncli.measure.compare import reuse
from bncli.results.compare import Comparison
from tests.cli.conftest import RECIPE, bncli, process


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
