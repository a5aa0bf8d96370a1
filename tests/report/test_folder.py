"""Folder of a run: nothing lost, one writer at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import bncli
from bncli.errors import UsageError
from bncli.report.compare.folder import load_comparison
from bncli.report.folder import RunFolder
from bncli.results.train import Evaluated, Evaluation, RunStarted


def test_metrics_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", "name") as folder:
        folder.begin("train: {}\n")
        folder.metrics(Evaluated(Evaluation(0, 0.1, float("nan"), None), 0.5))
        line = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert (line["event"], line["step"], line["loss"]) == ("evaluated", 0, "NaN")
    assert (tmp_path / "run/recipe.yaml").read_text().split("\n", 1)[1] == "train: {}\n"


def test_each_run_without_a_name_gets_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = []
    for _ in range(3):
        with RunFolder(None, "small") as folder:
            folder.begin("")
            paths.append(folder.path)
    assert len(set(paths)) == 3
    assert all(str(path).startswith("runs/small/") for path in paths)


# A process that is ready, waits for the others, and then begins a run; how it ended is its output.
BEGIN = """
import sys
from pathlib import Path
from bncli.errors import BncliError
from bncli.report.folder import RunFolder
from bncli.results.train import RunStarted
try:
    with RunFolder(Path(sys.argv[1]) if sys.argv[1] else None, "small", sys.argv[2] == "force") as folder:
        print("ready", flush=True)
        sys.stdin.readline()  # as a command does that loads torch in between
        folder.begin(f"seed: {sys.argv[3]}")
        folder.metrics(RunStarted(sys.argv[3], "cpu", 1, 1, 1, None))
        print(folder.path, flush=True)
        sys.stdin.readline()  # the run goes on
except BncliError as error:
    print(f"refused: {error}", flush=True)
"""


def begun_at_once(count: int, cwd: Path, out: str = "", force: str = "") -> list[str]:
    """What as many processes say that begin a run at the same time, all of them still there."""
    commands = [[sys.executable, "-c", BEGIN, out, force, str(number)] for number in range(count)]
    pipe, paths = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(Path(bncli.__file__).parent.parent)}
    started = [subprocess.Popen(each, stdin=pipe, stdout=pipe, text=True, cwd=cwd, env=paths) for each in commands]
    said = []
    for step in ("ready", "begun"):
        said = [one.stdout.readline().strip() for one in started if one.stdout]
        for one in started if step == "ready" else ():
            assert one.stdin is not None
            one.stdin.write("\n")
            one.stdin.flush()
    for one in started:
        one.communicate("\n")
    return said


def test_twenty_runs_that_begin_at_once_get_twenty_folders(tmp_path: Path) -> None:
    said = begun_at_once(20, tmp_path)
    assert len(set(said)) == 20
    for number, folder in enumerate(said):
        assert (tmp_path / folder / "recipe.yaml").read_text().endswith(f"seed: {number}")
        assert json.loads((tmp_path / folder / "metrics.jsonl").read_text())["name"] == str(number)


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "an earlier run"])
def test_one_of_two_runs_for_the_same_folder_is_refused(tmp_path: Path, before: str) -> None:
    if before == "an earlier run":
        begun_at_once(1, tmp_path, "run")
    elif before == "an empty folder":
        (tmp_path / "run").mkdir()
    said = begun_at_once(2, tmp_path, "run", "force" if before == "an earlier run" else "")
    assert sorted(line.startswith("refused: out run: ") for line in said) == [False, True]
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1


def begin(path: Path, overwrite: bool = False, recipe: str = "train: {}\n") -> None:
    with RunFolder(path, "name", overwrite) as folder:
        folder.begin(recipe)
        folder.metrics(RunStarted("name", "cpu", 1, 1, 1, None))


def test_a_run_that_was_killed_is_written_over_only_when_forced(tmp_path: Path, make_result) -> None:
    begin(tmp_path)
    with pytest.raises(
        UsageError,
        match=r"already contains an unfinished run; choose another folder, or overwrite it with overwrite=True",
    ):
        RunFolder(tmp_path, "name")
    begin(tmp_path, overwrite=True, recipe="train: {seed: 1}\n")
    assert "seed: 1" in (tmp_path / "recipe.yaml").read_text()
    with RunFolder(tmp_path, "name", overwrite=True) as folder:
        folder.begin("")
        folder.finish(make_result(100.0))
    with pytest.raises(UsageError, match="already contains a run"):
        RunFolder(tmp_path, "name")


def edited(folder: Path) -> None:
    begin(folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "# my notes\n")


STRANGERS: dict[str, Callable[[Path], object]] = {
    "a recipe": lambda folder: (folder / "recipe.yaml").write_text("# my notes\ntrain: {}\n"),
    "an edited recipe": edited,
    "other metrics": lambda folder: (folder / "metrics.jsonl").write_text('{"loss": 1}\n'),
    "no JSON": lambda folder: (folder / "metrics.jsonl").write_text("loss\n"),
    "another result": lambda folder: (folder / "result.json").write_text("[]"),
    "no text": lambda folder: (folder / "result.json").write_bytes(b"\xff\x00"),
    "a link": lambda folder: (folder / "metrics.jsonl").symlink_to(folder / "recipe.yaml"),
    "a broken link": lambda folder: (folder / "metrics.jsonl").symlink_to("nowhere"),
    "a folder": lambda folder: (folder / "recipe.yaml").mkdir(),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_file_that_bncli_did_not_write_is_never_written_over(tmp_path: Path, stranger: str, overwrite: bool) -> None:
    STRANGERS[stranger](tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with pytest.raises(UsageError, match="was not written by bncli, or was edited since, and is never overwritten"):
        begin(tmp_path, overwrite)
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


def test_other_files_of_the_folder_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    begin(tmp_path)
    begin(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_made_read_or_shared_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"out .*file/run: cannot be created: Not a directory"):
        RunFolder(tmp_path / "file/run", "name").begin("")
    with pytest.raises(
        UsageError,
        match=r"comparison.json: cannot be read: No such file or directory; give the folder",
    ):
        load_comparison(tmp_path)
    (tmp_path / "plan.json").touch()
    with pytest.raises(UsageError, match="contains a comparison; choose another folder"):
        RunFolder(tmp_path, "small", overwrite=True).begin("data: {}")


def test_a_full_disk_in_a_run_names_the_file_of_its_events(tmp_path):
    with pytest.raises(OSError, match="No space left") as full, RunFolder(tmp_path / "run", "digits"):
        raise OSError(28, "No space left on device")
    assert full.value.filename == str(tmp_path / "run" / "metrics.jsonl")
